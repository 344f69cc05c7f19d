"""What keeps threads in order is needed: without one wait, barrier, sync or shuffle a kernel fails in the simulator.

So a kernel that passes there has them all, and a simulator that let one of these through would be blind to it.
"""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
from simulating import run

from refattn.engines.cuda import sim
from refattn.engines.cuda.kernels import tiles
from refattn.engines.cuda.simulator import SimulationError
from refattn.plan import Score, execute

GUARDS = ("wait", "barrier", "barrier_or", "warp_sync", "shuffle_xor")
SEEDS = range(4)
TILES = {"float32": {"rows": 16, "keys": 16, "threads": 64, "lanes": 8}, "float16": {}}


def plan(spoilt):
    """Two tiles of rows and of keys; a value that is not finite makes the kernel take its passes over them."""
    rng = np.random.default_rng(5)
    q, k, v = (rng.standard_normal((1, 1, n, d)).astype(np.float16) for n, d in ((33, 8), (35, 8), (35, 8)))
    if spoilt:
        v[0, 0, 34, 1] = np.nan
    at = np.arange(33)[None] + 2, np.arange(35)[None]
    return Score(q=q.astype(float), k=k.astype(float), v=v.astype(float), scale=0.4, positions=at, causal=True)


def outputs(plan, storage, ops, seed):
    arrays = (getattr(plan, n).astype(storage) for n in "qkv")
    return run(plan, *arrays, ops=ops, seed=seed, wide=True, **TILES[storage])


def right(plan, storage, ops, seed):
    """Whether the kernel ran to its end and gave the plan's results."""
    try:
        out, lse = outputs(plan, storage, ops, seed)
    except SimulationError:
        return False
    expected = execute(plan)
    near = {"rtol": 0, "atol": 2e-3, "equal_nan": True}
    return np.allclose(out, expected["out"], **near) and np.allclose(lse, expected["lse"], **near)


def places_of(name, storage):
    """Where in the kernels a primitive is called."""
    found = set()

    def recording(*operands):
        frame = sys._getframe(1)
        found.add((frame.f_code.co_filename, frame.f_lineno))
        return getattr(sim, name)(*operands)

    outputs(plan(spoilt=True), storage, without(name, recording), 0)
    return sorted(found)


def without(name, stand_in):
    return SimpleNamespace(**{n: getattr(sim, n) for n in sim.__all__} | {name: stand_in})


def dropping(name, place):
    """The primitives, of which one does nothing where it is called at that place."""

    def dropped(*operands):
        frame = sys._getframe(1)
        if (frame.f_code.co_filename, frame.f_lineno) == place:
            return operands[0] if operands else None
        return getattr(sim, name)(*operands)

    return without(name, dropped)


@pytest.mark.parametrize("storage", TILES)
@pytest.mark.parametrize("spoilt", [False, True])
def test_the_kernels_are_right(storage, spoilt):
    assert all(right(plan(spoilt), storage, sim, seed) for seed in SEEDS)


@pytest.mark.parametrize("storage", TILES)
@pytest.mark.parametrize("name", GUARDS)
def test_a_guard_that_is_left_out_is_missed_under_every_scheduler(name, storage):
    places = places_of(name, storage)
    expected = {"wait": 2, "barrier": 3, "barrier_or": 1, "shuffle_xor": 2}
    expected["warp_sync"] = 1 if storage == "float32" else 0
    assert len(places) == expected[name]
    for place in places:
        ops, given = dropping(name, place), plan(spoilt=name.startswith("barrier"))
        assert not any(right(given, storage, ops, seed) for seed in SEEDS), place


@pytest.mark.parametrize("storage", TILES)
def test_keys_and_values_in_one_buffer_are_caught(storage, monkeypatch):
    def shared(*sizes):
        k, v, *rest = places(*sizes)
        return [k, k, *rest]

    places = tiles.places
    monkeypatch.setattr(tiles, "places", shared)
    assert not any(right(plan(spoilt=False), storage, sim, seed) for seed in SEEDS)
