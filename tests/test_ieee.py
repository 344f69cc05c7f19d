"""The arithmetic that every proof rests on, in NumPy and in kernels as we compile them: IEEE, to nearest, no flushing.

An error-free transformation fails as soon as a product and a sum are contracted, reassociated or flushed.
"""

import numpy as np
import pytest

from refattn.engines.cpu._jit import jit

PAIRS = 1_000_000
SPLIT = 2.0**27 + 1


def two_sum(a, b):
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a, b):
    p = a * b
    c, d = SPLIT * a, SPLIT * b
    a_high, b_high = c - (c - a), d - (d - b)
    a_low, b_low = a - a_high, b - b_high
    return p, a_low * b_low - (((p - a_high * b_high) - a_low * b_high) - a_high * b_low)


@jit
def sums(a, b, s, e):
    for i in range(a.shape[0]):
        s[i] = a[i] + b[i]
        t = s[i] - a[i]
        e[i] = (a[i] - (s[i] - t)) + (b[i] - t)


@jit
def products(a, b, p, e, split):
    for i in range(a.shape[0]):
        p[i] = a[i] * b[i]
        c, d = split * a[i], split * b[i]
        a_high, b_high = c - (c - a[i]), d - (d - b[i])
        a_low, b_low = a[i] - a_high, b[i] - b_high
        e[i] = a_low * b_low - (((p[i] - a_high * b_high) - a_low * b_high) - a_high * b_low)


@jit
def probes(x, out):
    out[0] = x[0] + x[1]  # 1 + 2^-53, a tie to even
    out[1] = x[0] + 3 * x[1]
    out[2] = -x[0] - 3 * x[1]
    out[3] = x[2] / 2  # half the smallest normal number
    out[4] = x[3] * 1.0  # the smallest subnormal number
    out[5] = x[2] - x[2] * (1 - x[1])


def integers(rng):
    """Integers of 53 bits, signed, as the doubles they are."""
    return rng.integers(-(2**53) + 1, 2**53, PAIRS).astype(np.float64)


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_residuals_of_sums_are_exact(rng, engine):
    a, b = np.ldexp(integers(rng), rng.integers(0, 9, PAIRS)), integers(rng)
    s, e = two_sum(a, b) if engine == "numpy" else (np.empty(PAIRS), np.empty(PAIRS))
    if engine == "numba":
        sums(a, b, s, e)
    # Both sides are integers below 2^63.
    exact = a.astype(np.int64) + b.astype(np.int64)
    np.testing.assert_array_equal(s.astype(np.int64) + e.astype(np.int64), exact)
    assert (e != 0).mean() > 0.5


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_residuals_of_products_are_exact(rng, engine):
    a, b = integers(rng), integers(rng)
    p, e = two_product(a, b) if engine == "numpy" else (np.empty(PAIRS), np.empty(PAIRS))
    if engine == "numba":
        products(a, b, p, e, SPLIT)
    # Equal modulo 2^64, and apart by less than 2^54: equal.
    with np.errstate(over="ignore"):
        product = a.astype(np.int64) * b.astype(np.int64)
    m, exponent = np.frexp(p)
    shift = np.maximum(exponent - 53, 0)
    rounded = np.ldexp(m, exponent - shift).astype(np.int64)
    modulo = np.where(shift < 63, rounded << np.minimum(shift, 63), 0)
    np.testing.assert_array_equal(modulo + e.astype(np.int64), product)
    assert (np.abs(e) <= np.spacing(np.abs(p)) / 2).all()
    assert (e != 0).mean() > 0.9


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_rounding_is_to_nearest_even_and_nothing_is_flushed(engine):
    x, out = np.array([1.0, 2.0**-53, 2.0**-1022, 5e-324]), np.empty(6)
    (probes if engine == "numba" else probes.py_func)(x, out)
    np.testing.assert_array_equal(out, [1.0, 1 + 2.0**-51, -1 - 2.0**-51, 2.0**-1023, 5e-324, 0.0])
