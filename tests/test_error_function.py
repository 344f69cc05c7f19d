"""erf64 against Arb, and the steps of the proof in its docstring computed one by one."""

from fractions import Fraction

import flint
import numpy as np

from refattn import error_function
from refattn.error_function import ERF_ERROR, erf64

U = 2.0**-53


def worst(x):
    with flint.ctx.workprec(160):
        pairs = zip(x.tolist(), erf64(x).tolist(), strict=True)
        return max(float(abs(flint.arb(b) / flint.arb(a).erf() - 1).upper()) for a, b in pairs)


def test_it_is_within_its_bound(rng):
    small = rng.choice([-1, 1], 5000) * 2.0 ** rng.uniform(-1000, 0, 5000)
    edges = [6.0, -6.0, np.nextafter(6.0, 9), np.nextafter(-6.0, -9), 1e300, 5.9999, 1.0, -0.5]
    uniform = [rng.uniform(low, high, 10_000) for low, high in ((-8, 8), (-1, 1), (5, 6.01), (1, 3))]
    found = worst(np.concatenate([*uniform, small, edges]))
    assert U < found <= 158 * U < ERF_ERROR  # 158 is what the proof gives


def test_edges():
    x = [0.0, -0.0, np.inf, -np.inf, np.nan, 6.5, -30.0]
    np.testing.assert_array_equal(erf64(x), [0, 0, 1, -1, np.nan, 1, -1])


def test_the_steps_of_the_proof():
    """In exact arithmetic at the end of the interval, z = 36, where every bound is worst."""
    z, c, sums, powers = Fraction(36), Fraction(1), Fraction(0), Fraction(0)
    for n in range(400):
        sums, powers = sums + c, powers + n * c
        if n == 140:
            at_end = sums
        c = c * 2 * z / (2 * n + 3)
    assert 35 < powers / sums <= z  # the average of n
    assert 1 - at_end / sums < 1e-24
    with flint.ctx.workprec(160):
        assert flint.arb(6).erfc() < 2.2e-17
        assert abs(2 / flint.arb.pi().sqrt() - error_function._TWO_OVER_ROOT_PI) < U


def test_coefficients_are_rounded_once():
    odd = 1
    for n, c in enumerate(error_function._SERIES):
        odd *= 2 * n + 1
        assert abs(Fraction(c) * odd / 2**n - 1) <= U
    assert n == 140


def test_a_wrong_coefficient_leaves_the_bound(monkeypatch, rng):
    wrong = list(error_function._SERIES)
    wrong[30] *= 1 + 2.0**-30
    monkeypatch.setattr(error_function, "_SERIES", wrong)
    assert worst(rng.uniform(3, 6, 300)) > ERF_ERROR
