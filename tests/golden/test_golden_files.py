"""Golden files on disk: bytes that never vary, and damage that is always refused."""

import hashlib
import json
import shutil

import jsonschema
import ml_dtypes
import numpy as np
import pytest
import safetensors
from checks import same
from golden_folder import CASES, COMMITTED, FILES, NAME, files
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from refattn.errors import GoldenFormatError
from refattn.files import safetensors_bytes
from refattn.golden import load, suite
from refattn.golden.build import build
from refattn.golden.store import METADATA, json_bytes, read_json, read_safetensors


def edit(folder, change, reindex=True):
    """Change the manifest of NAME as JSON, and have the index agree with it."""
    manifest, tensors = suite.paths(folder, NAME)
    data = json.loads(manifest.read_bytes())
    change(data)
    manifest.write_bytes(json_bytes(data))
    if reindex:
        index = json.loads((folder / load.INDEX).read_bytes())
        entry = next(e for e in index["cases"] if e["name"] == NAME)
        entry["manifest"] = hashlib.sha256(manifest.read_bytes()).hexdigest()
        entry["tensors"] = hashlib.sha256(tensors.read_bytes()).hexdigest()
        (folder / load.INDEX).write_bytes(json_bytes(index))


# Bytes


TENSORS = {
    "out": np.arange(6.0).reshape(2, 3),
    "out.bound": np.arange(6.0).astype(ml_dtypes.bfloat16).reshape(2, 3),
    "a": np.float32([1.5, -0.0]),
    "scalar": np.array(0.1),
    "empty": np.zeros((0, 3), np.float16),
}


def test_the_safetensors_library_reads_what_is_written():
    found = dict(safetensors.deserialize(safetensors_bytes(TENSORS, METADATA)))
    assert found.keys() == TENSORS.keys()
    for name, array in TENSORS.items():
        assert found[name]["shape"] == list(array.shape)
        assert (
            found[name]["dtype"]
            == {"float64": "F64", "bfloat16": "BF16", "float32": "F32", "float16": "F16"}[array.dtype.name]
        )
        assert bytes(found[name]["data"]) == array.tobytes()


def test_reading_gives_the_arrays_back():
    found = read_safetensors(safetensors_bytes(TENSORS, METADATA), "here")
    for name, array in TENSORS.items():
        same(found[name], array)


def test_the_bytes_depend_on_the_numbers_alone():
    """Not on the order of names, the strides or the byte order; the header is padded to 8 bytes."""
    plain = safetensors_bytes(TENSORS, METADATA)
    turned = {name: np.asfortranarray(a) if a.ndim > 1 else a for name, a in reversed(TENSORS.items())}
    turned["a"] = turned["a"].astype(">f4")
    assert safetensors_bytes(turned, METADATA) == plain
    assert int.from_bytes(plain[:8], "little") % 8 == 0


def test_the_bytes_of_one_tensor_by_hand():
    header = b'{"__metadata__":{"format":"refattn.golden/1"},"x":{"dtype":"F64","shape":[1],"data_offsets":[0,8]}}'
    header += b" " * (-len(header) % 8)
    data = len(header).to_bytes(8, "little") + header + bytes.fromhex("000000000000f03f")
    assert safetensors_bytes({"x": np.ones(1)}, METADATA) == data


def test_canonical_json():
    text = b'{\n  "a": [1, 2, "\xc3\xa9"],\n  "b": {},\n  "c": [\n    {\n      "d": null\n    }\n  ]\n}\n'
    assert json_bytes({"c": [{"d": None}], "b": {}, "a": [1, 2, "é"]}) == text
    with pytest.raises(ValueError, match="Out of range float"):
        json_bytes(float("nan"))


@settings(max_examples=100, derandomize=True, deadline=None)
@given(st.recursive(st.none() | st.integers() | st.text(), lambda x: st.lists(x) | st.dictionaries(st.text(), x)))
def test_canonical_json_is_json(value):
    assert json.loads(json_bytes(value)) == value


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_case_has_the_committed_bytes_each_time(case):
    built = build(case)
    assert (built.manifest, built.tensors) == files()[case.name]
    assert files()[case.name] == tuple(path.read_bytes() for path in suite.paths(COMMITTED, case.name))


# The committed files and the schema


def test_the_schema_is_one_and_every_committed_file_obeys_it():
    schema = read_json(load.Path(load.__file__).with_name("schema.json"))
    jsonschema.Draft202012Validator.check_schema(schema)
    parts = {load.INDEX: "index", load.ERRATA: "errata"}
    for path in sorted([*COMMITTED.rglob("*.json"), *load.folder_of_suite(load.LARGE).rglob("*.json")]):
        part = parts.get(path.name, "case")
        data = read_json(path)
        jsonschema.Draft202012Validator(schema | {"$ref": f"#/$defs/{part}"}).validate(data)
        assert json_bytes(data) == path.read_bytes()


def test_a_case_comes_back_from_its_files(folder):
    golden = load.load(NAME, folder)
    case = CASES[-1]
    assert golden.case().inputs == {n: golden.case().inputs[n] for n in golden.manifest["inputs"]}
    assert (golden.name, golden.dtype, golden.sizes) == (case.name, case.dtype, dict(case.sizes))
    assert golden.inputs().keys() >= {"q", "k", "v"}
    assert golden.expected.keys() == golden.bound.keys() == golden.status.keys()
    assert load.names(folder=folder) == sorted(case.name for case in CASES)


# Damage


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(FILES), st.data())
def test_any_byte_changed_or_cut_off_is_refused(small, tmp_path_factory, file, data):
    """An index whose changed byte belongs to another case may load: then the values are the same."""
    whole = (small / file).read_bytes()
    at = data.draw(st.integers(0, len(whole) - 1))
    cut = data.draw(st.booleans())
    value = data.draw(st.integers(1, 255))
    bad = whole[:at] if cut else whole[:at] + bytes([whole[at] ^ value]) + whole[at + 1 :]
    folder = shutil.copytree(small, tmp_path_factory.mktemp("damaged") / "suite")
    (folder / file).write_bytes(bad)
    try:
        golden = load.load(NAME, folder)
    except GoldenFormatError as error:
        assert str(folder) in str(error)
    else:
        assert file == load.INDEX
        assert contents_of(golden) == contents_of(load.load(NAME, small))


@settings(
    max_examples=150, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(FILES[1:]), st.data())
def test_without_an_index_damage_is_refused_or_changes_no_value(small, tmp_path_factory, file, data):
    whole = (small / file).read_bytes()
    at, value = data.draw(st.integers(0, len(whole) - 1)), data.draw(st.integers(1, 255))
    folder = shutil.copytree(small, tmp_path_factory.mktemp("damaged") / "suite")
    (folder / file).write_bytes(whole[:at] + bytes([whole[at] ^ value]) + whole[at + 1 :])
    expected = load.load(NAME, small)
    try:
        golden = load.read_case(folder / f"{NAME}.json")
        inputs = golden.inputs() | golden.cotangents()
    except GoldenFormatError:
        return
    for name in golden.expected:
        same(golden.expected[name], expected.expected[name])
    for name, array in (expected.inputs() | expected.cotangents()).items():
        same(inputs[name], array)


def contents_of(golden):
    return {name: array.tobytes() for name, array in (golden.expected | golden.bound).items()}


def remove(*keys):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        del data[keys[-1]]

    return change


def put(value, *keys):
    def change(data):
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


MANIFESTS = {
    "unknown_field": (put(1, "comment"), "field .top level.: .*'comment' was unexpected"),
    "unknown_field_within": (put(1, "inputs", "q", "strides"), "field inputs.q: .*'strides' was unexpected"),
    "unknown_recipe_field": (put(1, "inputs", "q", "recipe", "seed"), "field inputs.q.recipe: .*'seed' was unexpected"),
    "later_version": (put("refattn.golden/2", "schema"), "has schema 'refattn.golden/2'; this version reads"),
    "foreign_version": (put(7, "schema"), "has schema 7; this version reads"),
    "no_version": (remove("schema"), "has schema None"),
    "no_outputs": (put({}, "outputs"), "field outputs"),
    "missing_field": (remove("catches"), "'catches' is a required property"),
    "wrong_type": (put("one", "sizes", "B"), "field sizes.B: 'one' is not of type 'integer'"),
    "negative_size": (put(-1, "sizes", "Lq"), "field sizes.Lq: -1 is less than the minimum of 0"),
    "unknown_dtype": (put("int8", "dtype"), "field dtype: 'int8' is not one of"),
    "unknown_variant": (put("flash", "spec", "variant"), "field spec: unknown variant 'flash'"),
    "unknown_option": (put(0, "spec", "dropout"), "field spec: unknown field 'dropout'"),
    "bad_option": (put([-1, 0], "spec", "window"), "field spec: window counts keys"),
    "bad_real": (put("0x1p+99999", "spec", "scale"), "field spec: 0x1p.99999 is beyond"),
    "wrong_shape": (put([1], "outputs", "out", "shape"), "'out' is not what outputs.out of the manifest says"),
    "wrong_hash": (put("0" * 64, "outputs", "out", "sha256"), "'out' is not what outputs.out of the manifest says"),
    "no_such_tensor": (lambda d: d["outputs"].update(dsink=d["outputs"]["out"]), "lacks 'dsink' or its bound"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), MANIFESTS.values(), ids=MANIFESTS)
def test_a_manifest_that_is_not_one_names_file_field_and_remedy(folder, change, message):
    edit(folder, change)
    with pytest.raises(GoldenFormatError, match=message) as caught:
        load.load(NAME, folder)
    assert NAME.split("/")[1] in str(caught.value)
    assert "refattn golden generate" in str(caught.value) or "use a matching refattn" in str(caught.value)


RECIPES = {
    "wrong_input_hash": (put("0" * 64, "inputs", "q", "sha256"), "field inputs.q.sha256: is not that of the array"),
    "another_seed": (put(12345, "seed"), "field inputs.q.sha256"),
    "an_input_fewer": (remove("inputs", "k"), "field inputs: holds .*; its spec asks for q, k, v"),
    "an_input_more": (lambda d: d["inputs"].update(x=d["inputs"]["q"]), "field inputs: these recipes make no arrays"),
    "values_of_another_size": (put({"kind": "values", "values": ["0x1p0"]}, "inputs", "q", "recipe"), "make no arrays"),
    "values_that_are_no_numbers": (put({"kind": "values", "values": [{}]}, "inputs", "q", "recipe"), "make no arrays"),
    "an_edit_beyond_the_array": (
        put({"kind": "normal12", "edits": [{"at": [99], "op": "set", "value": "0x1p+0"}]}, "inputs", "q", "recipe"),
        "field inputs: these recipes make no arrays",
    ),
    "a_real_beyond_float64": (put({"kind": "constant", "value": "0x1p+9999"}, "inputs", "q", "recipe"), "no arrays"),
    "a_size_beyond_all_memory": (put(2**62, "sizes", "Lq"), "make no arrays"),
    "a_size_missing": (remove("sizes", "D"), "make no arrays"),
}  # fmt: skip


@pytest.mark.parametrize(("change", "message"), RECIPES.values(), ids=RECIPES)
def test_recipes_that_do_not_make_the_recorded_arrays(folder, change, message):
    edit(folder, change)
    golden = load.load(NAME, folder)
    with pytest.raises(GoldenFormatError, match=message) as caught:
        golden.inputs()
    assert NAME in str(caught.value)
    assert "refattn golden generate" in str(caught.value)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x00",
        b"not json",
        b"[",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"schema": "refattn.golden/1"',
        b"3",
        b"null",
        b"[]",
    ],
    ids=lambda b: b[:12].decode("latin1") or "empty",
)
@pytest.mark.parametrize("file", FILES[:2], ids=["index", "manifest"])
def test_json_that_is_none_or_another(folder, file, data):
    (folder / file).write_bytes(data)
    with pytest.raises(GoldenFormatError, match=r"is not readable JSON|has schema") as caught:
        load.read_index(folder) if file == load.INDEX else load.read_case(folder / file)
    assert str(folder / file) in str(caught.value)


def header(text, data=b""):
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x08",
        b"PK\x03\x04 a zip, or a pickle \x80\x04.",
        (2**63).to_bytes(8, "little"),
        header(b"{}"),
        header(b'{"out":{"dtype":"F64","shape":[2],"data_offsets":[0,8]}}', b"\0" * 8),
        header(b'{"out":{"dtype":"F64","shape":[1],"data_offsets":[0,16]}}', b"\0" * 8),
        header(b'{"out":{"dtype":"I64","shape":[1],"data_offsets":[0,8]}}', b"\0" * 8),
        safetensors_bytes({"other": np.ones(3)}, METADATA),
        safetensors_bytes({"out": np.ones(3), "out.bound": np.ones(3)}, METADATA),
    ],
    ids=["empty", "short", "foreign", "vast", "nothing", "shape", "offsets", "integers", "other_names", "other_shape"],
)
def test_tensors_that_are_none_or_others(folder, data):
    path = folder / f"{NAME}.safetensors"
    path.write_bytes(data)
    with pytest.raises(GoldenFormatError, match="refattn golden generate") as caught:
        load.read_case(path.with_suffix(".json"))
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("change", ["dtype", "bound"])
def test_tensors_with_the_right_hash_and_another_meaning(folder, change):
    """Files that agree with each other, and still are not float64 values with a bound each."""
    path = folder / f"{NAME}.safetensors"
    tensors = read_safetensors(path.read_bytes(), "here")
    if change == "dtype":
        tensors["out"] = tensors["out"].view(np.float16).reshape(*tensors["out"].shape[:-1], -1)
    else:
        tensors["out.bound"] = tensors["out.bound"][..., :1]
    path.write_bytes(safetensors_bytes(tensors, METADATA))
    edit(folder, put(list(tensors["out"].shape), "outputs", "out", "shape"))
    with pytest.raises(GoldenFormatError, match="expected float64 and a bound of the same shape"):
        load.load(NAME, folder)


@pytest.mark.parametrize("file", FILES)
def test_a_file_that_is_missing(folder, file):
    (folder / file).unlink()
    with pytest.raises(GoldenFormatError, match=r"cannot be read .No such file or directory"):
        load.load(NAME, folder)


def test_an_unknown_case_or_suite(folder):
    with pytest.raises(GoldenFormatError, match=r"no case 'x/y' in .*`refattn golden list` names them"):
        load.load("x/y", folder)
    with pytest.raises(GoldenFormatError, match="unknown suite 'full'; this folder holds 'core'"):
        load.names("full", folder)
