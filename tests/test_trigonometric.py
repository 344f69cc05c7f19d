"""sin64 and cos64 against Arb, and the proof in refattn/trigonometric.py computed step by step."""

import math
from fractions import Fraction

import flint
import numpy as np
import pytest

from refattn import numeric, trigonometric
from refattn.bound import Bounded, BoundSpace
from refattn.engines.certified.balls import BALLS
from refattn.profiles import FLOAT32, FLOAT64
from refattn.tape import Tape
from refattn.trigonometric import CIRCULAR_ERROR, REACH, cos64, sin64

U = 2.0**-53
OURS = {"sin": (sin64, flint.arb.sin), "cos": (cos64, flint.arb.cos)}
EACH = pytest.mark.parametrize("name", OURS)


def arguments(rng):
    """Over the whole reach, near 0, tiny, and around the multiples of π/4, where n and the quarter change."""
    n = np.concatenate([np.arange(-2000, 2000), rng.integers(-1_300_000, 1_300_000, 8000)])
    breaks = n * (math.pi / 4)
    near = [np.nextafter(breaks, side) for side in (-np.inf, np.inf)]
    tiny = rng.choice([-1, 1], 4000) * 2.0 ** rng.uniform(-1074, -1, 4000)
    uniform = [rng.uniform(-w, w, 8000) for w in (0.8, 10.0, 5000.0, REACH)]
    return np.concatenate([*uniform, tiny, breaks, *near, [0.0, -0.0, REACH, -REACH, 1.0]])


def worst_of(name, x):
    ours, exact = OURS[name]
    with flint.ctx.workprec(200):
        pairs = zip(x.tolist(), ours(x).tolist(), strict=True)
        return max(float(abs(flint.arb(y) - exact(flint.arb(a))).upper()) for a, y in pairs)


@EACH
def test_within_the_bound(rng, name):
    x = arguments(rng)
    assert len(x) > 50_000
    assert np.abs(x).max() == REACH
    assert 0.5 * U < worst_of(name, x) <= 3.2 * U < CIRCULAR_ERROR  # 3.2 is what the proof gives


@EACH
def test_a_wrong_coefficient_leaves_the_bound(monkeypatch, rng, name):
    table = f"_{name.upper()}"
    wrong = list(getattr(trigonometric, table))
    wrong[2] *= 1 + 2.0**-30
    monkeypatch.setattr(trigonometric, table, wrong)
    assert worst_of(name, rng.uniform(-10, 10, 300)) > CIRCULAR_ERROR


@EACH
@pytest.mark.parametrize("part", [1, 2])
def test_a_lost_part_of_half_pi_leaves_the_bound(monkeypatch, rng, name, part):
    parts = list(trigonometric._HALF_PI)
    parts[part] = 0.0
    monkeypatch.setattr(trigonometric, "_HALF_PI", tuple(parts))
    # n h₃ is below 2^-48 at the end of the reach, so its loss shows there alone.
    assert worst_of(name, rng.uniform(REACH / 2, REACH, 300)) > CIRCULAR_ERROR


def test_half_pi_is_split_exactly():
    h1, h2, h3 = trigonometric._HALF_PI
    for part, unit in ((h1, 2.0**-32), (h2, 2.0**-66)):
        assert Fraction(part) / Fraction(unit) == int(part / unit) < 2**33
    with flint.ctx.workprec(300):
        rest = flint.arb.pi() / 2 - flint.arb(h1) - flint.arb(h2) - flint.arb(h3)
        assert abs(rest) < 2.0**-122
        assert flint.arb(h1) < flint.arb.pi() / 2 * (1 - flint.arb(2) ** -36)


@pytest.mark.parametrize(("table", "exact", "rest"), [("_SIN", 1, 19), ("_COS", 2, 20)])
def test_recursion_of_the_proof(table, exact, rest):
    """E_k ≤ z E_k+1 + u (2 |z y_k+1| + |y_k| + c_k, where c_k is rounded), worst over 0 ≤ z ≤ 0.6171."""
    coefficients = getattr(trigonometric, table)
    worst = 0.0
    for z in np.linspace(0, 0.6171, 201):
        y, e = coefficients[-1], U * abs(coefficients[-1])
        for k in range(len(coefficients) - 2, -1, -1):
            c = coefficients[k]
            e = z * e + U * (2 * abs(z * y) + abs(z * y + c) + (abs(c) if k >= exact else 0.0))
            y = z * y + c
        worst = max(worst, e / U)
    assert 1.2 < worst < 1.7  # the proof's figure is the scheme's, not a guess far above it
    assert 0.7855**rest / math.factorial(rest) < 0.001 * U


TURNS = np.array(
    [Fraction(n, d) for d in (1, 2, 3, 4, 5, 7, 446) for n in range(-2 * d, 2 * d + 1)]
    + [Fraction(10**30 + n, 6) for n in range(12)]
    + [Fraction(1, 3**60), Fraction(-(2**60) - 1, 2**61), Fraction(1, 2) + Fraction(1, 10**20)],
    object,
)


@pytest.mark.parametrize("name", ["sin_pi", "cos_pi"])
def test_multiples_of_pi_in_every_space(name):
    """Within the bound of Arb's, exact where the value is −1, 0 or 1, and far arguments as good as near ones."""
    f = getattr(numeric, name)
    with flint.ctx.workprec(200):
        exact = [getattr(flint.arb, name + "_fmpq")(flint.fmpq(t.numerator, t.denominator)) for t in TURNS]
        plain, t = f(TURNS, np.zeros(1)), f(TURNS, BALLS.real(np.zeros(1)))
        off = [float(abs(flint.arb(y) - e).upper()) for y, e in zip(plain.tolist(), exact, strict=True)]
        assert max(off) <= 5.2 * U
        middle, rest, radius = t.enclosure()
        assert radius.max() < 2.0**-100
    whole = np.array([(2 * t).denominator == 1 for t in TURNS])
    assert set(plain[whole]) == {-1.0, 0.0, 1.0}
    np.testing.assert_array_equal(plain[whole], middle[whole])
    assert not radius[whole].any() and not rest[whole].any()
    taped = f(TURNS, Tape().variable(np.zeros(1)))
    np.testing.assert_array_equal(taped, plain)


@pytest.mark.parametrize("profile", [FLOAT64, FLOAT32], ids=lambda p: p.name)
@pytest.mark.parametrize("name", ["sin_pi", "cos_pi"])
def test_a_kernel_that_forms_the_argument_is_within_the_bound(name, profile):
    """π, f and x rounded, and both products, as a kernel of the profile multiplies them: no reduction, no exact 0."""
    dtype = np.float64 if profile is FLOAT64 else np.float32
    f = np.array([Fraction(1) + Fraction(111 * k, 63) for k in range(64)], object)
    x = np.array([Fraction(2 * p, 223) - 1 for p in range(0, 224, 7)], object)
    found = getattr(numeric, name)(np.outer(f, x), BoundSpace(profile).real(np.zeros(1)))
    angles = np.outer(f.astype(dtype), x.astype(dtype)) * dtype(np.pi)
    assert angles.dtype == dtype
    gap = np.abs(getattr(np, name[:3])(angles.astype(np.float64)) - found.x)
    assert (gap <= found.e).all()
    assert gap.max() > 0.05 * found.e.max()
    assert found.e[0].max() < 1e-5


def test_edges():
    np.testing.assert_array_equal(sin64([0.0, np.nan, np.inf, -np.inf, 2 * REACH]), [0.0] + [np.nan] * 4)
    np.testing.assert_array_equal(cos64([0.0, np.nan, np.inf, -np.inf, 2 * REACH]), [1.0] + [np.nan] * 4)
    np.testing.assert_array_equal(cos64(np.nextafter(REACH, np.inf)), np.nan)


@EACH
def test_running_bounds_hold_beyond_the_reach_and_around_any_argument(rng, name):
    """Centres and errors of every size, an exact argument at either end: the value lies within its bound."""
    f, exact = getattr(numeric, name), OURS[name][1]
    x = np.concatenate([rng.uniform(-10, 10, 300), rng.uniform(-4, 4, 300) * REACH, [1e300]])
    for profile in (FLOAT64, FLOAT32):
        for e in (0.0, 2.0**-40, 0.25, 10.0, 1e300):
            found = f(Bounded(BoundSpace(profile), x, e))
            assert np.isfinite(found.x).all()
            assert found.e.max() <= 2 * (1 + 2.0**-20)
            with flint.ctx.workprec(1200):
                for a, y, bound in zip(x.tolist(), found.x.tolist(), found.e.tolist(), strict=True):
                    for end in (-1, 1):
                        assert abs(exact(flint.arb(a) + end * flint.arb(e)) - flint.arb(y)) <= bound


@EACH
def test_of_what_is_no_number_each_space_says_so(name):
    x = np.array([np.nan, np.inf, -np.inf])
    f = getattr(numeric, name)
    assert np.isnan(f(BALLS.real(x)).enclosure()[0]).all()
    assert np.isnan(f(BoundSpace(FLOAT64).real(x)).x).all()
    assert not numeric.finite(f(BALLS.real(x))).any()


@EACH
def test_a_ball_of_infinite_radius_has_a_value_between_minus_1_and_1(name):
    unbounded = 1 / (BALLS.real(np.zeros(1)) / 3)  # a ball that holds 0 is what a division makes of it
    t, d, r = getattr(numeric, name)(unbounded).enclosure()
    assert np.isfinite(t).all() and (np.abs(t + d) + r >= 1).all() and (r < 1.1).all()
