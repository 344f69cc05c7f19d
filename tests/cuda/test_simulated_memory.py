"""The kernel of Recurrent plans in the simulator."""

import sys
from dataclasses import replace

import numpy as np
import pytest
from simulating import recur
from test_mutations import SEEDS, dropping, without

from refattn.engines.cuda import sim
from refattn.engines.cuda.simulator import SimulationError
from refattn.plan import Recurrent, execute

OPTIONS = {
    "plain": {},
    "delta": {"delta": True},
    "moved": {"moved": True},
    "divided": {"divided": True},
    "divided, clamped, delta": {"divided": True, "clamp": 0.5, "delta": True},
    "divided, added, written once": {"divided": True, "add": 0.25, "weighed": False},
    "nothing yet, divided, delta": {"divided": True, "delta": True, "empty": True},
    "nothing yet, written once": {"divided": True, "empty": True, "weighed": False},
    "all": {"divided": True, "delta": True, "moved": True, "add": 0.5},
}


def plan_of(sizes=(2, 4, 2, 21, 29, 11, 13), segment=6, *, moved=False, divided=False, empty=False, **options):
    """Positive features, so that no divisor is near 0."""
    batch, heads, groups, lq, lk, features, dv = sizes
    rng = np.random.default_rng(3)
    shapes = {"q": (batch, heads, lq, features), "k": (batch, groups, lk, features)}
    arrays = {n: rng.random(shape) / 4 for n, shape in shapes.items()}
    arrays |= {"v": rng.standard_normal((batch, groups, lk, dv))}
    arrays |= {"memory": rng.standard_normal((batch, groups, features, dv))}
    arrays |= {"weight": rng.random((batch, groups, features))} if divided else {}
    arrays |= {"transition": rng.standard_normal((features, features)) / features} if moved else {}
    arrays = {n: a.astype(np.float32).astype(np.float64) for n, a in arrays.items()}
    if empty:
        arrays |= {n: np.zeros_like(arrays[n]) for n in ("memory", "weight")}
    return Recurrent(**arrays, segment=segment, **options)


def near(found, plan):
    expected = execute(plan)["out"]
    return np.allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name):
    plan = plan_of(**OPTIONS[name])
    assert near(recur(plan), plan)


@pytest.mark.parametrize("segment", [1, 8, 9, 17, 40])
@pytest.mark.parametrize("seed", range(2))
def test_segments_that_fill_no_chunk(segment, seed):
    plan = plan_of((1, 2, 1, 19, 19, 17, 9), segment, divided=True, delta=True)
    assert near(recur(plan, seed=seed), plan)


def test_more_features_than_threads():
    plan = plan_of((1, 1, 1, 9, 17, 70, 3), 8, divided=True, moved=True)
    assert near(recur(plan), plan)


def test_what_is_not_finite_reaches_what_reads_it():
    plan = plan_of((1, 1, 1, 12, 12, 4, 9), 4)
    v = plan.v.copy()
    v[0, 0, 5, 2] = np.nan
    plan = replace(plan, v=v)
    found = recur(plan)
    assert np.isnan(found[0, 0, 8:, 2]).all()
    assert not np.isnan(found[0, 0, :8]).any()
    assert np.isnan(found).sum() == 4


def right(ops, seed):
    """Of a weight of which one thread alone has a number that is not 0."""
    plan = plan_of((1, 1, 1, 18, 18, 40, 9), 9, divided=True, delta=True, moved=True, add=0.5, weighed=False)
    plan = replace(plan, weight=plan.weight * (np.arange(40) == 7))
    try:
        return near(recur(plan, ops=ops, seed=seed), plan)
    except SimulationError:
        return False


@pytest.mark.parametrize("name", ["wait", "barrier", "barrier_or", "shuffle_xor"])
def test_a_guard_that_is_left_out_is_missed_under_every_scheduler(name):
    places = set()

    def recording(*operands):
        frame = sys._getframe(1)
        places.add((frame.f_code.co_filename, frame.f_lineno))
        return getattr(sim, name)(*operands)

    assert right(without(name, recording), 0)
    assert len(places) == {"barrier": 4}.get(name, 1)
    for place in places:
        assert not any(right(dropping(name, place), seed) for seed in SEEDS), place
