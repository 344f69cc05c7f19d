"""A released suite is immutable: no byte changes without an erratum that says why, and new cases may be added."""

import json

import pytest
from golden_folder import CASES, NAME, contents, files

from refattn.errors import GoldenFormatError
from refattn.golden import errata, load, suite
from refattn.golden.generate import generate
from refattn.golden.verify import verify

FIRST = sorted(files())[0]


def nothing(case, built):
    pass


@pytest.fixture
def released(folder):
    assert errata.release(folder, "1.0") == len(CASES)
    return folder


def differ(monkeypatch, name):
    """From now on the case builds to other tensors and manifest, as after a correction."""
    plain = suite.build_all

    def built(todo, processes=None):
        for case, made in plain(todo, processes):
            manifest = json.dumps({**json.loads(made.manifest), "catches": "something else"}).encode()
            yield case, type(made)(manifest, made.tensors, made.tally) if case.name == name else made

    monkeypatch.setattr("refattn.golden.generate.build_all", built)


def test_a_suite_without_a_record_promises_nothing(folder):
    assert load.read_errata(folder)["released"] == {}
    assert list(errata.broken(folder)) == []


def test_a_release_records_every_hash_and_the_next_one_only_what_is_new(released):
    told = load.read_errata(released)
    assert told["version"] == "1.0" and told["released"] == errata.current(released)
    assert errata.release(released, "1.1") == 0
    assert list(errata.broken(released)) == []


def test_released_files_are_not_replaced_without_a_reason(released, monkeypatch):
    before = contents(released)
    differ(monkeypatch, FIRST)
    with pytest.raises(GoldenFormatError, match=f"{FIRST} was released with other bytes.* say why with --erratum"):
        generate(released, CASES, 1, nothing)
    assert contents(released) == before


def test_a_released_case_does_not_go_unsaid(released, monkeypatch):
    monkeypatch.setattr("refattn.golden.generate.cases", lambda of: CASES[:-1])
    before = contents(released)
    with pytest.raises(GoldenFormatError, match=f"{NAME} was released with other bytes, or is gone"):
        generate(released, CASES[:-1], 1, nothing)
    assert contents(released) == before


def test_with_a_reason_the_erratum_has_both_hashes_and_the_suite_is_whole_again(released, monkeypatch):
    old = errata.current(released)[FIRST]
    differ(monkeypatch, FIRST)
    generate(released, CASES, 1, nothing, erratum="the sign was wrong")
    (found,) = load.read_errata(released)["errata"]
    assert found == found | {"case": FIRST, "file": "manifest", "old": old["manifest"], "why": "the sign was wrong"}
    assert found["new"] == errata.current(released)[FIRST]["manifest"] != old["manifest"]
    assert list(errata.broken(released)) == []
    assert errata.release(released, "1.1") == 0


@pytest.mark.parametrize("what", ["changed", "gone"])
def test_a_released_case_that_changed_or_went_is_named_by_verify(released, monkeypatch, what):
    monkeypatch.setattr(suite, "cases", lambda of="core": CASES)
    assert verify(released, CASES, 1, nothing) == []
    path = released / load.INDEX
    index = json.loads(path.read_bytes())
    if what == "gone":
        index["cases"] = [entry for entry in index["cases"] if entry["name"] != NAME]
    else:
        next(entry for entry in index["cases"] if entry["name"] == NAME)["tensors"] = "0" * 64
    path.write_text(json.dumps(index))
    found = {d.file: d.what for d in verify(released, CASES, 1, nothing)}
    expected = "was released and is gone" if what == "gone" else "was released with other bytes, and no erratum"
    assert found[f"{NAME} (tensors)"].startswith(expected)
    with pytest.raises(GoldenFormatError, match="restore it, or `refattn golden generate --erratum`"):
        errata.release(released, "1.1")


def test_an_erratum_of_another_hash_is_refused(released):
    told = load.read_errata(released)
    hashes = {"old": "1" * 64, "new": "2" * 64}
    wrong = {"case": NAME, "file": "tensors", "why": "no reason", "date": "2026-01-01", **hashes}
    (released / load.ERRATA).write_text(json.dumps(told | {"errata": [wrong]}))
    assert [name for name, _ in errata.broken(released)] == [load.ERRATA]


def test_a_damaged_record_is_refused_with_the_field(released):
    told = load.read_errata(released)
    (released / load.ERRATA).write_text(json.dumps(told | {"released": {NAME: {"tensors": "x"}}}))
    with pytest.raises(GoldenFormatError, match=rf"errata.json, field released.{NAME}"):
        load.read_errata(released)


@pytest.mark.parametrize("of", ["core", "large"])
def test_the_committed_suites_are_what_was_released(of):
    committed = load.folder_of_suite(of)
    assert load.read_errata(committed)["released"]
    assert list(errata.broken(committed)) == []
