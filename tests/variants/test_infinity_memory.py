"""∞-former: what its memory keeps of a signal, what it loses with age, and where its points stand."""


import numpy as np
import pytest
from checks import near, same
from infinity_former_problems import BASE, arrays

import refattn as ra
from refattn.variants import _ridge as ridge
from refattn.variants import infinity_former as module

# What a memory keeps

FINE = {"segment": 64, "basis": 64, "sigmas": (0.02,), "ridge": 1e-3, "samples": 256, "contraction": 0.75}


def memory_of(spec, signals):
    """Coefficients after whole segments of a signal (L,)."""
    like, memory = np.zeros(1), None
    for signal in signals:
        if memory is None:
            memory = ridge.fit(spec, False, like).T @ signal
        else:
            read = ridge.samples(spec, like) @ memory
            memory = ridge.fit(spec, True, like).T @ np.concatenate([read, signal])
    return memory


def test_a_known_signal_is_reconstructed():
    spec = ra.InfinityFormer(**FINE)
    t = (np.arange(64) + 0.5) / 64
    for signal in (np.sin(2 * np.pi * t), np.cos(3 * np.pi * t) * t):
        found = ridge.basis_at(spec, t) @ memory_of(spec, [signal])
        near(found[4:-4], signal[4:-4], 0.01)


def test_what_is_older_takes_less_room_by_the_contraction():
    """A segment of ones among zeros, n segments old, has the mass (1 − τ) τⁿ, the zeros nothing."""
    spec, inside = ra.InfinityFormer(**FINE), np.linspace(0, 1, 2001)
    for n in range(4):
        memory = memory_of(spec, [np.zeros(64), np.ones(64), *[np.zeros(64)] * n])
        signal = ridge.basis_at(spec, inside) @ memory
        near(np.trapezoid(signal, inside), 0.25 * 0.75**n, 0.05)
        left, right = 0.75 ** (n + 1), 0.75**n
        middle = (inside > left + 0.03) & (inside < right - 0.03)
        assert not middle.any() or np.abs(signal[middle] - 1).max() < 0.1


def test_a_bounded_memory_knows_the_last_segment_alone(rng):
    spec = ra.InfinityFormer(**BASE | {"contraction": None})
    x = arrays(spec, rng)
    expected = ra.evaluate(spec, x).out
    x["x"][:, :4] = rng.standard_normal((2, 4, 3))
    near(ra.evaluate(spec, x).out[:, :, 8:], expected[:, :, 8:], 0)


def test_a_region_that_was_looked_at_is_kept_in_full(rng):
    """All draws from one bin: its left end's value fills [0, τ]."""
    spec = ra.InfinityFormer(**FINE | {"sticky": True, "bins": 16})
    x = arrays(spec, rng, B=1, L=129, E=1)
    t = (np.arange(64) + 0.5) / 64
    x["x"][0, :64, 0], x["x"][0, 64:, 0] = np.sin(2 * np.pi * t), 0
    x["drawn"][:] = 4
    memory = np.asarray(ra.evaluate(spec, x, want=("state",)).state["memory"])[0, :, 0]
    near(ridge.basis_at(spec, np.array([0.1, 0.3, 0.6])) @ memory, np.ones(3), 0.02)


def test_the_order_of_draws_does_not_matter_nor_do_those_that_no_fit_reads(rng):
    spec = ra.InfinityFormer(**BASE | {"sticky": True, "bins": 16})
    x = arrays(spec, rng)
    expected = ra.evaluate(spec, x).out
    other = x | {"drawn": rng.integers(0, 16, x["drawn"].shape)}
    for row in (8, 12):
        other["drawn"][:, row] = x["drawn"][:, row, ::-1]
    same(ra.evaluate(spec, other).out, expected)
    other["drawn"][:, 8] = 15 - x["drawn"][:, 8]
    assert (ra.evaluate(spec, other).out != expected)[:, :, 8:].any()


def test_draws_at_the_samples_are_the_linear_memory(rng):
    """Left ends 1/4, 2/4, 3/4 of four bins are the samples 1/4, 2/4, 3/4; the linear grid also has 1, which no bin has.

    So the fits differ by the last sample alone, and agree where the memory is the same at ¾ as at 1.
    """
    linear = ra.InfinityFormer(**BASE | {"samples": 4})
    sticky = ra.InfinityFormer(**BASE | {"samples": 4, "sticky": True, "bins": 4})
    like = np.zeros(1)
    same(ridge.samples(linear, like)[:3], ridge.bin_starts(sticky, like)[1:])
    same(ridge.fit(linear, True, like), ridge.fit(sticky, True, like))
    null = np.linalg.svd(np.diff(ridge.samples(linear, like)[2:], axis=0))[2][-1]
    x = {name: arrays(linear, rng)[name] for name in ("x",)}
    memory = np.broadcast_to(null[:, None], (2, 6, 3))
    drawn = np.array([[1, 2, 3, 3]] * 2)
    near(
        module._fitted(sticky, x, x["x"][:, :4], memory, drawn),
        module._fitted(linear, x, x["x"][:, :4], memory, None),
        1e-11,
    )


# Points


@pytest.mark.parametrize("segment", [1, 2, 5, 8])
def test_a_segment_stands_at_centres_with_zeros_beside_it(segment):
    """The authors' grids: 2L points of spacing 1/L for even L, 2L − 1 for odd, those in the middle used."""
    spec = ra.InfinityFormer(segment=segment, basis=2)
    odd = segment % 2
    shift = 1 / segment if odd else 1 / (2 * segment)
    grid = np.linspace(-0.5 + shift, 1.5 - shift, 2 * segment - odd)
    own = grid[segment // 2 : segment // 2 + segment]
    near(ridge._own_points(spec, False, np.zeros(1)), own)
    near([float(t) for t in ridge._padding(spec, False)], np.setdiff1d(grid, own))


@pytest.mark.parametrize(("segment", "samples"), [(4, 5), (8, 16), (1024, 512)])
def test_a_contracted_signal_has_as_many_zeros_as_points(segment, samples):
    spec = ra.InfinityFormer(segment=segment, samples=samples, contraction=0.75, basis=2)
    count, shift = segment + samples, 1 / (2 * segment + samples)
    grid = np.linspace(-0.5 + shift, 1.5 - shift, 2 * count)
    expected = grid[(grid < 0) | (grid > 1)]
    near([float(t) for t in ridge._padding(spec, True)], expected)
    assert len(expected) == 2 * (count // 2)
    t = ridge._own_points(spec, True, np.zeros(1))
    near(t[[0, samples - 1, samples, -1]], [0.75 / samples, 0.75, 0.75 + 0.25 / segment, 1])
