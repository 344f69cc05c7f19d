"""The committed suite itself: what it covers, what it weighs, and that no lazy or mistaken backend could pass it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, fields, replace
from functools import cache
from typing import Any

import numpy as np
import pytest

from refattn import api, registry
from refattn.case import Case
from refattn.errors import RefattnError
from refattn.golden import flags, load, suite
from refattn.golden import inputs as recipes
from refattn.golden.build import problem_of, rows_of
from refattn.golden.load import Golden, folder_of_suite

CASES = suite.cases()
NAMES = [case.name for case in CASES]
KIB = 1024


@cache
def golden(name: str) -> Golden:
    return load.load(name)


def longest(case: Case) -> int:
    return max(case.sizes.values())


def lengths() -> set[int]:
    return {size for case in CASES for size in case.sizes.values()}


def wrong(result: np.ndarray, expected: np.ndarray, bound: np.ndarray) -> bool:
    """Whether a result lies outside the hard bound anywhere, or is not finite where the other is, or the reverse."""
    result, expected = np.broadcast_arrays(result, expected)
    same = (result == expected) | (np.isnan(result) & np.isnan(expected))
    with np.errstate(invalid="ignore"):
        near = np.abs(result - expected) <= bound
    return not (same | near).all()


# What the suite covers


def test_the_committed_index_names_exactly_the_cases_of_the_registry() -> None:
    assert load.names() == NAMES


def test_there_are_at_least_a_hundred_cases_over_fifteen_input_families() -> None:
    used = {flag for case in CASES for flag in case.flags}
    assert len(CASES) >= 100
    assert len(used & {name for name, flag in flags.known().items() if flag.family}) >= 15


def test_the_three_storage_types_have_a_share_each_and_float64_has_cases() -> None:
    count = Counter(case.dtype for case in CASES)
    assert min(count[d] for d in ("float32", "bfloat16", "float16")) >= len(CASES) // 6
    assert count["float64"] >= 2


def test_a_quarter_of_the_cases_is_long_and_twelve_are_very_long() -> None:
    assert sum(longest(case) >= 257 for case in CASES) >= len(CASES) / 4
    very = [case for case in CASES if longest(case) >= 2049]
    assert len(very) >= 12
    assert all(case.rows is not None for case in very)


def test_lengths_stand_on_both_sides_of_tile_sizes() -> None:
    assert {1, 63, 65, 127, 129, 255, 257, 2049, 2050, 4097} <= lengths()


def test_every_option_of_sdpa_and_alibi_occurs_alone_or_together() -> None:
    used = Counter(flag for case in CASES for flag in set(case.flags))
    options = (
        "causal_top_left", "causal_bottom_right", "window", "softcap", "mask", "bias", "sink", "segments", "padding",
        "zero_length", "positions", "keep_mask", "scale", "gqa", "mqa", "lse_cotangent", "alibi", "alibi_both_sides",
        "alibi_half", "alibi_two_sided", "learned_slopes", "explicit_slopes", "geometric_slopes",
        "heads_not_power_of_two", "sigmoid", "int8_kv", "paged",
    )  # fmt: skip
    assert [name for name in options if not used[name]] == []
    heads = {case.sizes["Hq"] for case in CASES if "alibi" in case.flags}
    assert {1, 2, 3, 6, 8, 12, 16, 40} <= heads


def test_gradients_are_published_for_nearly_every_case() -> None:
    without = {case.name for case in CASES if "vjp" not in case.want}
    assert without == {
        "alibi/forty_heads", "mask/live_nan", "numerics/constant_values", "numerics/equal_keys_causal",
    }  # fmt: skip
    published = {name for n in NAMES for name in golden(n).expected}
    assert {"out", "lse", "dq", "dk", "dv", "dbias", "dsink", "dslopes", "dslopes_right"} <= published


# What it weighs


def test_the_files_stay_within_their_budget() -> None:
    sizes = [path.stat().st_size for path in folder_of_suite().rglob("*") if path.is_file()]
    # 300 cases in 4 MiB.
    assert sum(sizes) <= 4 * KIB * KIB * len(CASES) / 300
    assert max(sizes) <= 128 * KIB


# What is proved


def test_every_element_is_proved_and_the_constant_values_are_identities() -> None:
    assert {status for n in NAMES for status in golden(n).status.values()} == {"correctly_rounded"}
    outputs = {(n, out): entry for n in NAMES for out, entry in golden(n).manifest["outputs"].items()}
    assert {place: entry["identity"] for place, entry in outputs.items() if "identity" in entry} == {
        ("numerics/constant_values", "out"): list(range(10)),
        # 8-bit numbers are few: components coincide, and the gradient of their difference is 0.
        ("float8/causal_heads_e5m2", "dq"): [29, 557],
    }
    assert (golden("numerics/constant_values").expected["out"] == 1.5).all()


def test_every_bound_is_finite_and_not_negative() -> None:
    for name in NAMES:
        for output, bound in golden(name).bound.items():
            assert np.isfinite(bound).all(), f"{name} {output}: a bound that no result can break"
            assert (bound >= 0).all(), f"{name} {output}"


def test_inputs_are_exact_in_the_dtype_and_have_the_recorded_hash() -> None:
    # Both raise: materialise where a value is not exact, inputs() where a hash differs.
    for name in NAMES:
        case = golden(name)
        for arrays in (case.inputs(), case.cotangents()):
            kinds = {a.dtype.name for a in arrays.values() if a.dtype.kind not in "biu"}
            assert kinds <= {case.dtype, "float32"}, name


# Flags


def test_every_flag_is_described_and_every_description_is_of_a_flag() -> None:
    used = {flag for case in CASES for flag in case.flags}
    assert used == set(flags.known())


def test_flags_do_not_repeat_and_every_case_says_what_it_catches() -> None:
    for case in CASES:
        assert len(case.flags) == len(set(case.flags)), case.name
        assert len(case.catches) > 20, case.name


def test_the_table_of_flags_has_a_row_for_each() -> None:
    table = flags.table()
    for name, flag in flags.known().items():
        assert f"| `{name}` | {flag.exercises} |" in table


# Null backends: each must fail every case, but where it is right

Nulls = Mapping[str, np.ndarray]


def null_outputs(case: Golden) -> Nulls:
    """What backends that do not attend would give for `out`; the last two where the inputs are keys and values."""
    arrays, out = case.inputs(), case.expected["out"]
    nulls = {"zeros": np.zeros_like(out), "shuffled_rows": np.roll(out, 1, axis=-2)}
    if {"q", "k", "v"} <= set(arrays):
        v = arrays["v"].astype(np.float64)
        v = np.repeat(np.where(np.isfinite(v), v, 0.0), out.shape[1] // v.shape[1], axis=1)
        mean = v.mean(axis=2, keepdims=True)
        # The values of all blocks, whoever reads them.
        mean = mean.mean(axis=0, keepdims=True) if "block_table" in arrays else mean
        nulls["mean_of_values"] = np.broadcast_to(mean, out.shape)
        nulls["keys_off_by_one"] = shifted_keys(case)
    return nulls


def shifted_keys(case: Golden) -> np.ndarray:
    """Result where key j − 1 is read for key j, or block n − 1 for block n."""
    arrays = case.inputs()
    axis = 0 if "block_table" in arrays else 2
    return reference(case.case(), arrays | {"k": np.roll(arrays["k"], 1, axis=axis)})["out"]


def reference(case: Case, arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The float64 reference's published rows, on other arrays than the case's own."""
    with np.errstate(all="ignore"):
        return problem_of(case, dict(arrays)).evaluate(lambda a: a)


# Where a null backend is right: by flag, with the reason.
RIGHT = {
    "zeros": {},
    "mean_of_values": {
        "single_key": "the mean of one value is the value",
        "constant_values": "every mean is the same",
        "equal_keys": "equal weights are what a mean is",
    },
    "shuffled_rows": {
        "single_query": "one row has no other order",
        "single_key": "every row is the only value",
        "constant_values": "every row is that value",
        "equal_keys": "every row is the mean of V",
        "dominant_key": "every row is the dominant key's value",
    },
    "keys_off_by_one": {
        "single_key": "there is no other key",
        "constant_values": "weights do not show",
        "equal_keys": "the other key is equal",
        "one_visible_key": "a single weight is 1 whatever its key",
    },
}  # fmt: skip


@pytest.mark.parametrize("null", RIGHT)
def test_a_backend_that_does_not_attend_fails_every_case(null: str) -> None:
    tried = {name: null_outputs(golden(name)) for name in NAMES}
    passed = [
        name for name in NAMES
        if null in tried[name] and not wrong(tried[name][null], golden(name).expected["out"], golden(name).bound["out"])
    ]  # fmt: skip
    excused = {flag for name in passed for flag in set(golden(name).flags) & set(RIGHT[null])}
    assert [name for name in passed if not set(golden(name).flags) & set(RIGHT[null])] == []
    assert excused == set(RIGHT[null]), "an excuse that no case needs"


# Mistakes in the options: whatever a case sets must be visible in out or lse

Mistake = tuple[str, dict[str, Any], dict[str, Any]]


def mistakes(case: Case) -> Iterator[Mistake]:
    """What a backend may get wrong of the options that this case sets: label, arrays, changed fields of the spec."""
    spec, arrays = registry.whole(case.spec)[0], recipes.inputs(case)
    optional = [name for name in DROPPED if name in arrays and not ("block_table" in arrays and name == "kv_lengths")]
    yield from ((f"without {name}", without(arrays, name), {}) for name in optional)
    if "keep" in arrays:
        yield "without the keep-mask", without(arrays, "keep"), {"keep_probability": None}
    if spec.variant == "sdpa":
        yield from mistakes_of_sdpa(case, spec, arrays)
        yield from mistakes_of_newer_options(case, spec, arrays)
    else:
        yield from defaults_instead(case, spec, arrays)
    if spec.variant == "axial":
        other = ("height",) if spec.axes != ("height",) else ("width",)
        yield "another axis", arrays, {"axes": other}
        if 1 < spec.width < case.sizes["Lq"] != spec.width**2:
            yield "pixels column by column", arrays, {"width": case.sizes["Lq"] // spec.width}
    if {"E", "F"} <= set(arrays):
        yield "E for F", arrays | {"F": arrays["E"]}, {}
    if spec.scale:
        yield "default scale", arrays, {"scale": None}
    else:
        yield "scale 1 % off", arrays, {"scale": 1.01 * case.sizes["D"] ** -0.5}
    groups, heads = (case.sizes.get(name, 1) for name in ("Hkv", "Hq"))
    if 1 < groups < heads:
        signature = recipes.signature_of(case)
        given = {name: array.dims.split() for name, array in signature.items() if name in arrays}
        axes = {name: dims.index("Hkv") for name, dims in given.items() if "Hkv" in dims}
        swapped = {name: np.take(arrays[name], np.arange(heads) % groups, axis) for name, axis in axes.items()}
        yield "key head h mod Hkv", arrays | swapped, {}


# What no output shows, although the case sets it: the reason.
INVISIBLE = {
    ("compressive/attached", "default detach"): "gradients alone show it",
    ("compressive/mean_300", "default detach"): "gradients alone show it",
    ("transformer_xl/attached_history", "default detach"): "gradients alone show it",
    ("skeinformer/every_key_257", "default reuse_pilot"): "where every key is drawn a row is exact, reused or not",
}


def defaults_instead(case: Case, spec: Any, arrays: dict[str, Any]) -> Iterator[Mistake]:
    """Every option that is not the default set back to it, where the same arrays are a problem then too."""
    for field in fields(spec):
        given, default = getattr(spec, field.name), field.default
        if default is MISSING or given == default or field.name in ("scale", "axes", "width"):
            continue
        try:
            other = replace(spec, **{field.name: default})
            taken = recipes.signature_of(replace(case, spec=other))
            kept = {name: array for name, array in arrays.items() if name in taken}
            api.build(other, kept, case.dtype, ("out",), case.history)
        except RefattnError:
            continue
        yield f"default {field.name}", kept, {field.name: default}


def mistakes_of_sdpa(case: Case, spec: Any, arrays: dict[str, Any]) -> Iterator[Mistake]:
    if spec.causal:
        last_row_only = case.sizes["Lq"] == 1 and spec.causal == "bottom_right"
        if not last_row_only and (spec.window is None or spec.window[1] != 0):
            yield "not causal", arrays, {"causal": False}
        if case.sizes["Lq"] != case.sizes.get("Lk") and "q_positions" not in arrays:
            yield "other alignment", arrays, {"causal": ALIGNMENTS[spec.causal]}
    if spec.window:
        yield "no window", arrays, {"window": None}
        left, right = spec.window
        if left is not None:
            yield "left end + 1", arrays, {"window": (left + 1, right)}
        if right is not None and not spec.causal:
            yield "right end + 1", arrays, {"window": (left, right + 1)}
    if spec.softcap:
        yield "no softcap", arrays, {"softcap": None}
    if spec.bias:
        learned = [name for term in spec.bias for name in registry.info(term.variant).module.signature(term)]
        if spec.bias != (registry.spec("nope"),):
            yield "no term", without(arrays, *learned), {"bias": ()}
        else:
            yield "a term", arrays, {"bias": (registry.spec("alibi"),)}
        for term in spec.bias:
            if term.variant == "alibi_interpolation" and longest(case) > term.train_length:
                yield "slopes as trained", arrays, {"bias": (registry.spec("alibi", slopes=term.slopes),)}


def mistakes_of_newer_options(case: Case, spec: Any, arrays: dict[str, Any]) -> Iterator[Mistake]:
    if spec.normalizer == "sigmoid":
        own = -math.log(case.sizes["Lk"]) if spec.sigmoid_bias == "keys" else spec.sigmoid_bias
        yield "softmax", arrays, {"normalizer": "softmax", "sigmoid_bias": None}
        yield "sigmoid bias 2 % off", arrays, {"sigmoid_bias": 1.02 * own}
        yield "no sigmoid bias", arrays, {"sigmoid_bias": 0.0}
    if spec.paged:
        table = np.clip(arrays["block_table"], 0, case.sizes["N"] - 1)
        in_order = np.arange(table.size).reshape(table.shape) % case.sizes["N"]
        wrong = {"blocks in their order": in_order, "blocks from the last on": table[:, ::-1]}
        if len(table) > 1:
            wrong["the first sequence's blocks"] = np.repeat(table[:1], len(table), 0)
        yield from ((label, arrays | {"block_table": other}, {}) for label, other in wrong.items())
        full = np.full(len(table), table.shape[1] * case.sizes["S"])
        if (arrays["kv_lengths"] < full).any():
            yield "lengths of whole tables", arrays | {"block_table": table, "kv_lengths": full}, {}
    if spec.kv == "int8":
        for name in ("k_scale", "v_scale"):
            given = arrays[name]
            yield f"no {name}", arrays | {name: np.ones_like(given)}, {}
            for axis in range(given.ndim):
                if given.shape[axis] > 1:
                    yield f"the first {name} of axis {axis}", arrays | {name: np.take(given, [0], axis)}, {}


DROPPED = ("mask", "bias", "sink", "q_lengths", "kv_lengths", "q_segment_ids", "q_positions", "k_positions")
ALIGNMENTS = {"top_left": "bottom_right", "bottom_right": "top_left"}
PARTNER = {"q_segment_ids": "k_segment_ids"}


def without(arrays: Mapping[str, Any], *names: str) -> dict[str, Any]:
    gone = {*names, *(PARTNER.get(name, name) for name in names)}
    return {name: array for name, array in arrays.items() if name not in gone}


def test_every_option_that_a_case_sets_is_visible_in_out_or_lse() -> None:
    hidden = []
    for case in CASES:
        published = golden(case.name)
        spec = registry.whole(case.spec)[0]
        for label, arrays, changes in mistakes(case):
            found = reference(replace(case, spec=replace(spec, **changes)), arrays)
            both = [n for n, array in published.expected.items() if n in found and found[n].shape == array.shape]
            if not any(wrong(found[n], published.expected[n], published.bound[n]) for n in both):
                hidden.append((case.name, label))
    assert sorted(hidden) == sorted(INVISIBLE)


# Gradients: 0 is no answer, and the cotangent of lse counts

# Where dq and dk are 0, or as good as 0 within any kernel's bound: one weight is 1, or all keys pull alike.
VANISHING = {"single_key", "one_visible_key", "dominant_key", "equal_keys"}


def test_a_backend_whose_gradients_are_zero_fails_every_case() -> None:
    passed = {
        (name, output)
        for name in NAMES
        for output, expected in golden(name).expected.items()
        if output.startswith("d") and not wrong(np.zeros(expected.shape), expected, golden(name).bound[output])
    }
    assert {output for _, output in passed} <= {"dq", "dk"}
    assert [name for name, _ in sorted(passed) if not VANISHING & set(golden(name).flags)] == []


def test_a_backend_that_ignores_the_cotangent_of_another_output_is_caught() -> None:
    hidden = []
    for case in CASES:
        published, problem = golden(case.name), problem_of(case, recipes.inputs(case))
        given, wrt = recipes.cotangents(case), tuple(problem.real_inputs())
        for ignored in sorted(set(given) - {"out"}):
            full, found = (
                problem.differentiate(lambda a: a, {n: c for n, c in given.items() if n != left}, wrt)
                for left in (None, ignored)
            )
            moved = [f"d{n}" for n in wrt if not np.array_equal(full[f"d{n}"], found[f"d{n}"], equal_nan=True)]
            assert moved, f"{case.name}: nothing depends on {ignored}"
            hidden += [
                (case.name, ignored, n)
                for n in moved
                if not wrong(rows_of(case, n, found[n]), published.expected[n], published.bound[n])
            ]
    assert hidden == []
