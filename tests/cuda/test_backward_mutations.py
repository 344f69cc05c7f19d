"""What keeps the threads of the backward kernels in order is needed: without one of them a kernel fails."""

import sys

import numpy as np
import pytest
from simulating import gradients
from test_mutations import SEEDS, dropping, without

from refattn.engines.cuda import sim
from refattn.engines.cuda.kernels import tiles
from refattn.engines.cuda.simulator import SimulationError
from refattn.plan import Score, Slope, Table

TILES = {"float32": {"rows": 16, "keys": 16, "threads": 64, "lanes": 8}, "float16": {}}
DIFFERENCE = {"rtol": 0, "atol": 4e-3}


def pass_of(storage, tabled):
    """A plan of two tiles of rows and of keys, its arrays, and what dq, dk, dv and the sums of slopes and table are."""
    rng, rows = np.random.default_rng(5), 19 if storage == "float32" else 35
    at = np.arange(rows)[None] + 2, np.arange(rows + 2)[None]
    lengths = rows, rows + 2, rows + 2, rows
    q, k, v, dout = (rng.standard_normal((1, 1, n, 8)).astype(np.float16) for n in lengths)
    table = rng.standard_normal((1, 2 * rows + 1))
    bias = Slope(slopes=np.array([0.125])), Table(values=table, offset=rows + 1)
    table, bias = (table, bias) if tabled else (0 * table, bias[:1])
    plan = Score(q=q, k=k, v=v, scale=0.4, positions=at, causal=True, bias=bias)
    away = at[1] - at[0].T
    s = np.where(away <= 0, 0.4 * (q[0, 0].astype(float) @ k[0, 0].astype(float).T) - 0.125 * np.abs(away), -np.inf)
    s = s + table[0][away + rows + 1]
    lse = np.logaddexp.reduce(s, axis=1)
    p = np.exp(s - lse[:, None])
    out = p @ v[0, 0]
    ds = p * (dout[0, 0].astype(float) @ v[0, 0].T - (dout[0, 0] * out).sum(1, keepdims=True))
    expected = 0.4 * ds @ k[0, 0], 0.4 * ds.T @ q[0, 0], p.T @ dout[0, 0], -(ds * np.abs(away)).sum(1)
    expected += (np.bincount((away + rows + 1).ravel(), tabled * ds.ravel()),)
    given = [a.astype(storage) for a in (q, k, v, dout)]
    others = out[None, None].astype(np.float32), lse[None, None].astype(np.float32), np.zeros((1, 1, rows), np.float32)
    return plan, given[:3], (given[3], *others), expected


def right(storage, ops, seed, tabled=False):
    """Whether the kernels ran to their end and gave the gradients."""
    plan, arrays, given, expected = pass_of(storage, tabled)
    try:
        found = gradients(plan, *arrays, given, ops=ops, seed=seed, wide=True, **TILES[storage])
    except SimulationError:
        return False
    found[4] = found[4].sum(2)
    return all(np.allclose(f[0, 0], e, **DIFFERENCE) for f, e in zip(found, expected, strict=True))


def places_of(name, storage, tabled=False):
    """Where in the kernels a primitive is called."""
    found = set()

    def recording(*operands):
        frame = sys._getframe(1)
        found.add((frame.f_code.co_filename, frame.f_lineno))
        return getattr(sim, name)(*operands)

    assert right(storage, without(name, recording), 0, tabled)
    return sorted(found)


@pytest.mark.parametrize("storage", TILES)
def test_the_kernels_are_right(storage):
    assert all(right(storage, sim, seed) for seed in SEEDS)


# In each of the two kernels: one wait, and a barrier behind it, before either buffer is filled again.
@pytest.mark.parametrize("storage", TILES)
@pytest.mark.parametrize(("name", "count"), [("wait", 2), ("barrier", 6), ("warp_sync", 1), ("shuffle_xor", 1)])
def test_a_guard_that_is_left_out_is_missed_under_every_scheduler(name, count, storage):
    places = places_of(name, storage)
    assert len(places) == (0 if (name, storage) == ("warp_sync", "float16") else count)
    for place in places:
        assert not any(right(storage, dropping(name, place), seed) for seed in SEEDS), place


@pytest.mark.parametrize("storage", TILES)
def test_what_is_kept_and_what_is_met_in_one_buffer_is_caught(storage, monkeypatch):
    def shared(*sizes):
        k, *rest = places(*sizes)
        return [0, *rest]

    places = tiles.places
    monkeypatch.setattr(tiles, "places", shared)
    assert not any(right(storage, sim, seed) for seed in SEEDS)


@pytest.mark.parametrize("storage", TILES)
def test_the_barrier_before_a_table_s_sums_is_needed(storage):
    (place,) = set(places_of("barrier", storage, tabled=True)) - set(places_of("barrier", storage))
    assert all(right(storage, sim, seed, tabled=True) for seed in SEEDS)
    assert not any(right(storage, dropping("barrier", place), seed, tabled=True) for seed in SEEDS)
