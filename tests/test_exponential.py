"""exp64 and log64 against Arb, and the error analysis of docs/certification.md computed term by term."""

from fractions import Fraction

import flint
import numpy as np
import pytest

from refattn import exponential
from refattn.exponential import EXP_ERROR, LOG_ERROR, exp64, log64

U = 2.0**-53
LN2 = float.fromhex("0x1.62e42fefa39efp-1")


def arguments(rng):
    """Over the whole range, near 0, tiny, and around the breakpoints (n + ½) ln 2 and n ln 2: over 10^5 in all."""
    n, count = np.arange(-1075, 1022), 20_000
    breaks = np.concatenate([(n + 0.5) * LN2, n * LN2])
    near = np.concatenate([np.nextafter(breaks, side) for side in (-np.inf, np.inf)])
    tiny = rng.choice([-1, 1], count) * 2.0 ** rng.uniform(-1074, -1, count)
    edges = [-745.2, -745.1, -744.4, -708.4, -708.3, 709.0, 0.0, -0.0, 5e-324, -5e-324, 2.0**-54, -1.0, 1.0]
    uniform = [rng.uniform(low, high, count) for low, high in ((-745, 709), (-60, 5), (-1, 1), (-0.35, 0.35))]
    return np.concatenate([*uniform, tiny, breaks, near, edges]).clip(-746, 709)


@pytest.mark.parametrize("part", range(4))
def test_exponential_is_within_its_bound(rng, part):
    x = arguments(rng)[part::4]
    y = exp64(x)
    with flint.ctx.workprec(160):
        worst = 0.0
        for a, b in zip(x.tolist(), y.tolist(), strict=True):
            exact = flint.arb(a).exp()
            excess = abs(flint.arb(b) - exact) - flint.arb(2) ** -1075
            worst = max(worst, float((excess / exact).upper()))
    assert len(x) > 25_000
    assert U < worst <= 2.6 * U < EXP_ERROR  # 2.6 is what the proof gives


def test_logarithm_is_within_its_bound(rng):
    around = rng.choice([-1, 1], 5000) * 2.0 ** rng.uniform(-52, -2, 5000)
    edges = [5e-324, 2.0**-1022, np.finfo(float).max, 1 - U, 1 + 2 * U, np.sqrt(0.5), np.nextafter(np.sqrt(0.5), 0)]
    powers = [2.0 ** rng.uniform(-1074, 1023, 15_000), 2.0 ** rng.integers(-1074, 1024, 5000)]
    sums = [1 + around, rng.uniform(0.7, 1.5, 15_000), rng.uniform(1, 4097, 10_000)]
    x = np.concatenate([*powers, *sums, edges])
    x = x[x != 1]
    with flint.ctx.workprec(160):
        pairs = zip(x.tolist(), log64(x).tolist(), strict=True)
        worst = max(float(abs(flint.arb(b) / flint.arb(a).log() - 1).upper()) for a, b in pairs)
    assert U < worst <= 6.2 * U < LOG_ERROR


def test_edges():
    np.testing.assert_array_equal(exp64([0.0, -0.0, -746.0, -1e300, -np.inf, np.nan]), [1, 1, 0, 0, 0, np.nan])
    x, logarithms = [1.0, 0.0, np.inf, -1.0, np.nan, 2.0], [0, -np.inf, np.inf, np.nan, np.nan, LN2]
    np.testing.assert_array_equal(log64(x), logarithms)


def test_logarithm_of_two_is_split_exactly():
    head, tail = exponential._LN2_HEAD, exponential._LN2_TAIL
    integer = Fraction(head) * 2**33
    assert integer.denominator == 1 and integer < 2**33
    with flint.ctx.workprec(300):
        rest = abs(flint.arb(2).log() - flint.arb(head) - flint.arb(tail))
    assert rest < 2.0**-89


def test_recursion_of_the_proof():
    """Horner's scheme: E_k ≤ |r| E_k+1 + u (|r y_k+1| + |y_k| + c_k, where c_k is rounded), worst over |r| ≤ 0.3466."""
    worst = 0.0
    for r in np.linspace(-0.3466, 0.3466, 201):
        y, e = exponential._EXP[17], U * exponential._EXP[17]
        for k in range(16, -1, -1):
            c = exponential._EXP[k]
            rounded = 0.0 if k <= 2 else c
            e = abs(r) * e + U * (abs(r * y) + abs(r * y + c) + rounded)
            y = r * y + c
        worst = max(worst, e / y)
    truncation = 0.3466**18 / (18 * exponential._EXP[17] ** -1) * 1.02 / np.exp(-0.3466)
    assert worst + truncation + 0.36 * U < 2.6 * U
    assert worst > 1.9 * U  # the proof's figures are the scheme's, not a guess far above it


@pytest.mark.parametrize("name, index", [("_EXP", 2), ("_EXP", 5), ("_LOG", 1), ("_LOG", 2)])
def test_a_wrong_coefficient_leaves_the_bound(monkeypatch, rng, name, index):
    wrong = list(getattr(exponential, name))
    wrong[index] *= 1 + 2.0**-30
    monkeypatch.setattr(exponential, name, wrong)
    if name == "_EXP":
        f, exact, bound, x = exp64, flint.arb.exp, EXP_ERROR, rng.uniform(-3, 3, 300)
    else:
        f, exact, bound, x = log64, flint.arb.log, LOG_ERROR, rng.uniform(1.1, 9, 300)
    with flint.ctx.workprec(120):
        pairs = zip(x.tolist(), f(x).tolist(), strict=True)
        worst = max(float(abs(flint.arb(b) / exact(flint.arb(a)) - 1)) for a, b in pairs)
    assert worst > bound
