"""What is done wrong with a rotation is named."""

import numpy as np
import pytest

import refattn as ra
from refattn import registry
from refattn.golden import suite
from refattn.golden.build import build

CASES = ("rope/half", "rope/last_6_of_9", "rope/far_exact", "rope/far_float32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    built = {case.name: build(case) for case in registry.info("rope").cases() if case.name in CASES}
    path = tmp_path_factory.mktemp("suite")
    suite.publish(path, {name: (b.manifest, b.tensors) for name, b in built.items()})
    return path


def backend(**mistake):
    """Ours in the case's own dtype, with fields of the rotation done wrong; rotary=None turns nothing."""

    def fn(*, q, k, v, rotary, causal=False, q_positions=None, k_positions=None):
        turn = None if "rotary" in mistake else registry.from_json(rotary | mistake)
        at = {"q_positions": q_positions, "k_positions": k_positions}
        return ra.attention(q, k, v, causal=causal, rotary=turn, **at)

    return fn


def test_without_a_mistake_all_pass(folder):
    assert ra.validate(backend(), folder=folder).ok


@pytest.mark.parametrize(
    ("mistake", "cases", "named"),
    [
        ({"rotary": None}, "rope/half", "rotary_ignored"),
        ({"pairing": "interleaved"}, "rope/half", "rotary_pairing"),
        ({"part": "first"}, "rope/last*", "rotary_part"),
        ({"angles": "float32"}, "rope/far_exact", "rotary_angles"),
        ({"angles": "exact"}, "rope/far_float32", "rotary_angles"),
    ],
    ids=str,
)
def test_a_mistake_is_named(mistake, cases, named, folder):
    report = ra.validate(backend(**mistake), folder=folder, cases=cases)
    assert report.failures
    assert report.mistakes == (named,), report.findings
    assert np.all([line.words for line in report.failures])


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_refattn_s_own_engines_take_terms_as_plain_data(engine):
    assert ra.validate(f"refattn:{engine}", cases="rope/[hi]*").ok
    report = ra.validate(f"refattn:{engine}", cases="shaw/[ck]*")
    assert not report.failures
    assert bool(report.unsupported) == (engine == "cpu")
