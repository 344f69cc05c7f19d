"""The large suite: manifests with hashes in the repository, tensors made when asked for."""

from dataclasses import replace

import pytest
from golden_folder import CASES

from refattn.errors import GoldenFormatError, SpecError
from refattn.golden import load, suite
from refattn.golden.generate import generate
from refattn.golden.verify import verify

LARGE = [replace(case, suite="large") for case in CASES]


def nothing(case, built):
    pass


@pytest.fixture
def stored(tmp_path, monkeypatch):
    """The suite's folder as the repository has it, and that of someone who made the tensors."""
    monkeypatch.setattr(suite, "cases", lambda of="core": LARGE if of == "large" else CASES)
    monkeypatch.setattr("refattn.golden.generate.cases", suite.cases)
    whole, bare = tmp_path / "whole", tmp_path / "bare"
    for folder in (whole, bare):
        generate(folder, LARGE, 1, nothing)
    for path in bare.rglob("*.safetensors"):
        path.unlink()
    return whole, bare


def test_manifests_are_read_without_tensors_and_a_case_says_how_to_make_them(stored):
    whole, bare = stored
    for name in load.names("large", bare):
        assert load.read_manifest(bare / f"{name}.json")["suite"] == "large"
        with pytest.raises(GoldenFormatError, match=rf"refattn golden generate --suite large --cases {name} --folder"):
            load.load(name, bare)
        assert load.load(name, whole).case().suite == "large"


def test_verify_holds_what_is_made_against_the_recorded_hashes(stored):
    _, bare = stored
    assert verify(bare, LARGE, 1, nothing) == []
    index = (bare / load.INDEX).read_text()
    hashes = {entry["name"]: entry["tensors"] for entry in load.read_index(bare)["cases"]}
    (bare / load.INDEX).write_text(index.replace(hashes[LARGE[0].name], "0" * 64))
    found = {d.file: d.what for d in verify(bare, LARGE[:1], 1, nothing)}
    assert found == {f"{LARGE[0].name}.safetensors": "has not the sha256 that the index records"}


def test_a_part_is_made_in_a_folder_of_its_own_and_never_replaces_the_whole(stored, tmp_path):
    whole, _ = stored
    generate(tmp_path / "part", LARGE[:1], 1, nothing)
    assert load.names("large", tmp_path / "part") == [LARGE[0].name]
    with pytest.raises(SpecError, match="a part cannot replace it: name another --folder"):
        generate(whole, LARGE[:1], 1, nothing)


def test_the_two_suites_keep_to_themselves():
    large = {case.name for case in suite.cases("large")}
    assert large and not large & {case.name for case in suite.cases()}
    assert load.folder_name("large") == "v1_large"
    with pytest.raises(GoldenFormatError, match="unknown suite 'huge'; there are core and large"):
        load.folder_of_suite("huge")
