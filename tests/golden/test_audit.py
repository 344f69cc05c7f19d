"""The audit: on balls alone, on some rows of what is too large for them, and of the fast tiers on other seeds."""

from dataclasses import replace

import numpy as np
import pytest

from refattn.engines import certified
from refattn.golden import audit as auditing
from refattn.golden import load, suite
from refattn.golden.audit import audit, jobs_of_seeds, reseeded, sample


@pytest.fixture(scope="module")
def name():
    return next(c.name for c in suite.cases() if c.name.startswith("lengths/65x65"))


def test_an_audit_asks_balls_alone(monkeypatch, name):
    asked = []
    plain = certified.certify

    def watched(problem, weights, wrt, **options):
        asked.append(options)
        return plain(problem, weights, wrt, **options)

    monkeypatch.setattr(certified, "certify", watched)
    finding = audit(name, load.folder_of_suite(), 256)
    assert not finding.wrong and not finding.note and finding.elements > 1000
    assert asked == [{"bits": (256, 1024), "fast": False}]


def test_of_a_case_too_large_some_rows_are_audited_and_what_hangs_on_all_rows_is_named(monkeypatch, name):
    monkeypatch.setattr(auditing, "LARGE", 1)
    monkeypatch.setattr(auditing, "SAMPLE", 5)
    golden = load.load(name)
    heads, width = golden.sizes["B"] * golden.sizes["Hq"], golden.sizes["D"] + golden.sizes["Dv"] + 1
    finding = audit(name, load.folder_of_suite(), 256)
    assert finding.note == "5 query rows, without dk, dv"
    assert finding.elements == 5 * heads * width and not finding.wrong
    for row, seen in ((64, True), (1, False)):
        out = golden.expected["out"].copy()
        out[0, 0, row, 0] = np.nextafter(out[0, 0, row, 0], 9)
        altered = replace(golden, expected=dict(golden.expected) | {"out": out})
        monkeypatch.setattr(load, "load", lambda name, folder, altered=altered: altered)
        found = audit(name, load.folder_of_suite(), 256).wrong
        assert found == (("1 values of out are not what 256 bits prove",) if seen else ())


def test_the_rows_of_a_sample_hold_both_ends_and_are_many():
    rows = sample(4096)
    assert len(rows) == auditing.SAMPLE and rows[0] == 0 and rows[-1] == 4095
    assert any(r % 2 for r in rows[1:-1]) and sample(3) == (0, 1, 2)


def test_other_seeds_hold_the_fast_tiers_against_balls(monkeypatch):
    case = next(c for c in suite.cases() if c.name.startswith("heads/"))
    finding = reseeded(case, 7, 256)
    assert finding.elements > 100 and not finding.wrong and finding.name.endswith("(seed 7)")
    plain = certified.certify

    def mistaken(problem, weights, wrt, **options):
        found = plain(problem, weights, wrt, **options)
        if options["fast"]:
            found["out"].value.flat[3] = np.nextafter(found["out"].value.flat[3], 9)
        return found

    monkeypatch.setattr(certified, "certify", mistaken)
    assert reseeded(case, 7, 256).wrong == ("1 values of out are not what 256 bits prove",)


def test_seeds_are_for_small_cases():
    cases = suite.cases()
    assert len(jobs_of_seeds(cases, 2, 256)) <= 2 * len(cases)
    assert jobs_of_seeds([c for c in suite.cases("large") if c.name == "whole/alibi_4096"], 2, 256) == []
