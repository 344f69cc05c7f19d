"""The arithmetic that every proof rests on, in NumPy and in kernels as we compile them: IEEE, to nearest, no flushing.

An error-free transformation fails as soon as a product and a sum are contracted, reassociated or flushed.
"""

import ctypes
import platform
from contextlib import contextmanager

import numba
import numpy as np
import pytest

import refattn as ra
from refattn import api
from refattn.engines import certified
from refattn.engines.certified import arithmetic, pairs_kernels, twofold
from refattn.errors import RefattnError
from refattn.jit import jit

PAIRS = 1_000_000
SPLIT = 2.0**27 + 1
two_sum, two_product = twofold.two_sum.py_func, twofold.two_prod.py_func


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


def test_this_process_passes():
    arithmetic.check()
    pairs_kernels.kernels.__wrapped__()


def test_contraction_is_seen():
    """Whatever the flag, only a processor with a fused multiply-add contracts."""
    rules = numba.njit(two_sum), numba.njit(two_product)
    loose = numba.njit(fastmath={"contract"})(arithmetic.answering(*rules))

    def answers(*given):
        return np.array([loose(*map(float, column)) for column in np.stack(given).T]).T

    if "vfm" not in (loose(*arithmetic.INPUTS), *loose.inspect_asm().values())[1]:
        pytest.skip("this processor has no fused multiply-add that the compiler would use")
    with pytest.raises(RefattnError, match=r"Loose code .*contracted"):
        arithmetic.check(answers, "Loose code")


GLIBC_X86 = platform.machine() == "x86_64" and platform.libc_ver()[0] == "glibc"


@contextmanager
def switched(change):
    """Change the floating-point environment of this thread and put it back, through glibc's 32 bytes of it."""
    if not GLIBC_X86:
        pytest.skip("the layout of the floating-point environment is known for glibc on x86-64 only")
    libm = ctypes.CDLL("libm.so.6")
    before = ctypes.create_string_buffer(32)
    libm.fegetenv(before)
    control = change(int.from_bytes(before.raw[28:], "little"))
    libm.fesetenv(ctypes.create_string_buffer(before.raw[:28] + control.to_bytes(4, "little"), 32))
    try:
        yield
    finally:
        libm.fesetenv(before)


@pytest.mark.parametrize(
    "flag, wrong",
    [(1 << 15, "flushed"), (1 << 6, "read as 0"), (1 << 13, "nearest"), (2 << 13, "nearest"), (3 << 13, "nearest")],
)
def test_another_mode_of_the_processor_is_seen_before_anything_is_certified(flag, wrong):
    problem = api.build(ra.SDPA(), {name: np.ones((1, 1, 2, 2), np.float32) for name in "qkv"}, "float32", ("out",), 0)
    kernels = pairs_kernels.kernels()
    seen = []
    with switched(lambda control: control | flag):
        for ask in (arithmetic.check, lambda: pairs_kernels.tried(kernels), lambda: certified.certify(problem)):
            try:
                ask()
            except RefattnError as error:
                seen.append(str(error))
    assert len(seen) == 3 and all(wrong in message for message in seen)
    assert seen[1].startswith("Code compiled by Numba")
    certified.certify(problem)
