"""The functions of the fast kernels, densely: 2^y, tanh and the sigmoid on vectors of float32."""

import numba
import numpy as np
import pytest
from checks import same

from refattn.engines.cpu.tiles import squash
from refattn.engines.cpu.vectors import Lanes, inline

UNIT = 2.0**-24


@inline
def exponential(x: Lanes, to, numbers, count):
    with x.each(count) as n:
        x.stores([x.exp2(a) for a in x.loads(x.at(numbers, (n, x.row)))], x.at(to, (n, x.row)))


@inline
def hyperbolic(x: Lanes, to, numbers, count):
    with x.each(count) as n:
        x.stores(x.tanh(x.loads(x.at(numbers, (n, x.row)))), x.at(to, (n, x.row)))


SHAPE = 4 << 16 | 1 << 8 | 1


@numba.njit
def run_exponential(to, numbers):
    exponential(SHAPE, to.ctypes.data, numbers.ctypes.data, numbers.size // 4)


@numba.njit
def run_hyperbolic(to, numbers):
    hyperbolic(SHAPE, to.ctypes.data, numbers.ctypes.data, numbers.size // 4)


@numba.njit
def run_hyperbolic_of_two(to, numbers):
    hyperbolic(4 << 16 | 2 << 8 | 1, to.ctypes.data, numbers.ctypes.data, numbers.size // 8)


@numba.njit
def run_squash(to, numbers):
    to[:] = numbers
    squash(SHAPE, to.ctypes.data, to.size // 4, np.float32(1.0), np.float32(0.0))


def of(run, numbers):
    numbers = np.resize(np.asarray(numbers, np.float32), -(-np.size(numbers) // 4) * 4)
    found = np.full_like(numbers, np.nan)
    run(found, numbers)
    return numbers.astype(np.float64), found.astype(np.float64)


def floats(first, last, step=1):
    """Every step-th float32 of one sign from first to last, by magnitude."""
    ends = np.array([first, last], np.float32).view(np.int32)
    return np.arange(ends[0], ends[1] + 1, step, dtype=np.int32).view(np.float32)


def test_exp2_is_within_three_roundoffs():
    """Every float32 from ½ to 2, so every fraction that the polynomial sees at that size; the others thinned out."""
    numbers = np.concatenate(
        [-floats(2.0**-40, 126.0, 97), floats(2.0**-40, 126.0, 97), -floats(0.5, 2.0), floats(0.0, 2.0**-126, 1009)]
    )
    numbers, found = of(run_exponential, numbers)
    assert (np.abs(found / np.exp2(numbers) - 1) <= 3 * UNIT).all()


def test_exp2_at_its_ends():
    ends = [0.0, -0.0, -126.5001, -127.0, -1e4, -3e38, -np.inf, np.nan]
    _, found = of(run_exponential, ends)
    same(found, np.array([1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0, np.nan]))


def test_tanh_is_within_four_roundoffs():
    sizes = np.concatenate([floats(2.0**-60, 3e38, 997), floats(0.5, 4.0, 5)])
    numbers, found = of(run_hyperbolic, np.concatenate([sizes, -sizes]))
    assert (np.abs(found / np.tanh(numbers) - 1) <= 4 * UNIT).all()
    _, found = of(run_hyperbolic, [0.0, np.inf, -np.inf, np.nan])
    same(found, np.array([0.0, 1.0, -1.0, np.nan]))


@pytest.mark.parametrize("bad", [np.nan, 3.0])
def test_tanh_of_a_large_number_beside_others_in_its_row(bad):
    """One number beyond 1, or a NaN before one in the same lane, is enough for the second half of the work."""
    numbers = np.full(8, 0.25, np.float32)
    numbers[1], numbers[5] = bad, 3.0
    found = np.zeros(8, np.float32)
    run_hyperbolic_of_two(found, numbers)
    assert np.abs(found - np.tanh(numbers))[~np.isnan(numbers)].max() <= 4 * UNIT
    assert np.isnan(found[1]) == np.isnan(bad)


def test_squash_is_within_six_roundoffs():
    numbers, found = of(run_squash, np.concatenate([floats(2.0**-40, 125.0, 97), -floats(2.0**-40, 125.0, 97)]))
    assert (np.abs(found * (1 + np.exp2(-numbers)) - 1) <= 6 * UNIT).all()
    _, found = of(run_squash, [np.inf, -np.inf, np.nan, -126.5, 126.5, 1e30, -1e30])
    same(found, np.array([1.0, 0.0, np.nan, 0.0, 1.0, 1.0, 0.0, 1.0]))
