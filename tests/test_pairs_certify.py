"""Pairs of doubles in `certify`: what they leave goes on, alone, and no certificate differs from that of balls."""

import numpy as np
import pytest

import refattn as ra
from refattn import api
from refattn.engines import certified
from refattn.engines.certified import pairs
from refattn.engines.certified.pairs import PAIRS
from refattn.engines.certified.rounding import ENCLOSED, IDENTITY, round_enclosed
from refattn.errors import Undecided


def ties():
    """Causal attention whose first five values are equal: so are, exactly, the first five rows; the rest is generic."""
    rng = np.random.default_rng(5)
    x = {name: rng.standard_normal((1, 1, 64, 8)) for name in "qkv"}
    x["v"][:, :, :5] = x["v"][:, :, :1]
    problem = api.build(ra.SDPA(causal=True), x, "float64", ("out",), 0)
    return problem, {"out": rng.standard_normal((1, 1, 64, 8))}, ("q", "k", "v")


def test_balls_are_asked_for_the_rows_that_are_open_and_say_the_same(monkeypatch):
    asked = []

    def recorded(task, bits, in_balls=certified._in_balls):
        asked.append((task.problem.sizes["Lq"], task.wrt))
        return in_balls(task, bits)

    monkeypatch.setattr(certified, "_in_balls", recorded)
    whole = certified.certify(*ties(), bits=(128, 256))
    assert asked[0] == (64, ("q", "k", "v"))
    asked.clear()
    monkeypatch.setattr(certified, "PAIRS_FROM", 0)
    found = certified.certify(*ties(), bits=(128, 256))
    assert asked == [(4, ("q",)), (4, ("q",))]
    for name, one in whole.items():
        np.testing.assert_array_equal(found[name].value, one.value)
        np.testing.assert_array_equal(found[name].rne, one.rne)
        np.testing.assert_array_equal(found[name].status == IDENTITY, one.status == IDENTITY)
        np.testing.assert_array_equal(found[name].width, one.width)
    np.testing.assert_array_equal(np.any(found["out"].status[0, 0] == IDENTITY, -1), [1 <= i < 5 for i in range(64)])


def test_nothing_is_asked_of_balls_where_nothing_is_open(monkeypatch, rng):
    monkeypatch.setattr(certified, "_in_balls", lambda *_, bits: pytest.fail("balls have been asked"))
    monkeypatch.setattr(certified, "PAIRS_FROM", 0)
    x = {name: rng.standard_normal((1, 2, 16, 8)).astype(np.float32) for name in "qkv"}
    problem = api.build(ra.SDPA(causal=True), x, "float32", ("out",), 0)
    found = certified.certify(problem, {"out": x["q"]}, ("q", "k", "v"))
    assert not any((c.status == ENCLOSED).any() for c in found.values())


LARGE = {
    "plain": (ra.SDPA(causal=True), 1.0, {}),
    "softcap and a sink": (ra.SDPA(softcap=5.0), 3.0, {"sink": np.array([0.3, -2.0])}),
    "weights that underflow": (ra.SDPA(), 60.0, {}),
    "what is no number": (ra.SDPA(causal=True), 1.0, {"spoil": True}),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_problems_get_the_certificates_of_balls(rng, name, monkeypatch):
    """Compiled: 96 queries, 2 heads, inputs of 24 bits; the tier is chosen as it is for everyone."""
    spec, size, extras = LARGE[name]
    x = {n: rng.standard_normal((1, 2, 96, 40)).astype(np.float32) for n in "qkv"}
    x["q"] *= np.float32(size)
    extras = dict(extras)
    if extras.pop("spoil", False):
        x["k"][0, 0, 90, 3], x["v"][0, 1, 70, 0] = np.nan, np.inf
    problem = api.build(spec, x | extras, "float32", ("out",), 0)
    asked = problem, {"out": rng.standard_normal((1, 2, 96, 40)).astype(np.float32)}, tuple(problem.real_inputs())
    monkeypatch.setattr(certified, "LARGE", 1 << 60)
    given = []
    monkeypatch.setattr(pairs, "enclose", lambda *a, f=pairs.enclose: given.append(f(*a)) or given[-1])
    found = certified.certify(*asked)
    left = sum(int(np.sum(round_enclosed(e, False).status == ENCLOSED)) for e in given[0].values())
    total = sum(c.value.size for c in found.values())
    assert left == 0 or (name == "weights that underflow" and left < total / 2)
    monkeypatch.setattr(certified, "PAIRS_FROM", 1 << 60)
    for output, one in certified.certify(*asked).items():
        np.testing.assert_array_equal(found[output].value, one.value)
        np.testing.assert_array_equal(found[output].status == ENCLOSED, one.status == ENCLOSED)
        np.testing.assert_array_equal(np.isnan(found[output].value), np.isnan(one.value))
    assert len(given) == 1


def test_an_open_choice_goes_to_balls(monkeypatch):
    def open_(x):
        raise Undecided("open")

    monkeypatch.setattr(type(PAIRS), "finite", lambda space, x: open_(x))
    monkeypatch.setattr(certified, "PAIRS_FROM", 0)
    assert pairs.enclose(*ties()) is None
    assert not (certified.certify(*ties(), bits=(128, 256))["dv"].status == ENCLOSED).any()
