"""The certified engine: balls rounded against exact integers, and proofs that are broken on purpose and refused."""

from fractions import Fraction
from itertools import product

import flint
import numpy as np
import pytest
from flint import arb
from problems import PROBLEMS, arrays

import refattn as ra
from refattn import api, exponential
from refattn.dtypes import FORMATS, nearest, odd_fraction, round_to, ulp
from refattn.engines.certified import balls as balls_module
from refattn.engines.certified import certify, escalation
from refattn.engines.certified.balls import BALLS, Balls
from refattn.engines.certified.rounding import ENCLOSED, EXACT, PROPAGATED, ROUNDED, better, round_enclosed
from refattn.errors import DTypeError, RefattnError, Undecided
from refattn.numeric import clean, exp, log

MAX = Fraction(np.finfo(np.float64).max)
TINY = Fraction(2) ** -1074
STEP = Fraction(2) ** -52  # between doubles just above 1


def ball(mid, radius=0):
    """A ball with an exact rational (dyadic) middle."""
    with flint.ctx.workprec(4000):
        exact = arb(flint.fmpz(mid.numerator)) / arb(flint.fmpz(mid.denominator))
        return arb(exact, arb(flint.fmpz(radius.numerator)) / arb(flint.fmpz(radius.denominator))) if radius else exact


def boxed(items):
    out = np.empty(len(items), object)
    out[:] = items
    return Balls(out)


def ends(one):
    """Both ends as exact rationals, read from middle and radius."""
    mid, radius = (Fraction(int(m)) * Fraction(2) ** int(e) for m, e in (one.mid().man_exp(), one.rad().man_exp()))
    return mid - radius, mid + radius


def tricky(rng):
    """Around doubles, ties, powers of two from both sides, subnormals, overflow and 0; radii from 0 to two steps."""
    bases = [Fraction(1), 1 + STEP, 1 - STEP / 2, Fraction(3), Fraction(2) ** -1022, MAX, MAX + Fraction(2) ** 970]
    bases += [TINY, 3 * TINY, 2 * TINY, Fraction(0), Fraction(2) ** -1000, Fraction(2) ** 1023, Fraction(2) ** 1100]
    bases += [Fraction(float(x)) for x in rng.standard_normal(40) * 2.0 ** rng.integers(-40, 40, 40)]
    bases += [Fraction(float(x)) for x in rng.standard_normal(20) * 2.0 ** rng.integers(-1070, -1010, 20)]
    half, little = Fraction(1, 2), Fraction(2) ** -60
    parts = (0, half, half / 2, 3 * half / 2, half + little, little / 2**10)
    radii = (0, little / 2**30, 2 * little, half / 2, half, 3 * half)
    for base in bases:
        step = Fraction(float(ulp(np.float64(min(base, MAX)), np.float64)))
        for part, radius, sign in product(parts, radii, (1, -1)):
            yield ball(sign * (base + part * step), radius * step)


@pytest.mark.parametrize("to_nearest", [False, True])
def test_every_decision_is_right_and_none_that_integers_settle_is_missed(rng, to_nearest):
    given = list(tricky(rng))
    found = round_enclosed(boxed(given), to_nearest)
    missed = 0
    for one, value, near, status, width in zip(given, *found, strict=True):
        low, high = ends(one)
        settled = odd_fraction(low) == odd_fraction(high)
        settled &= not to_nearest or nearest(low, np.float64) == nearest(high, np.float64)
        if status == ENCLOSED:
            assert np.isinf(value) or max(high - Fraction(value), Fraction(value) - low) <= Fraction(width)
            missed += settled
            continue
        assert status in (ROUNDED, EXACT) and width == 0
        assert settled and value == odd_fraction(low)
        assert not to_nearest or near == nearest(low, np.float64)
        assert status == ROUNDED or low == high == Fraction(value)
    assert missed == 0
    assert (found.status == ENCLOSED).any() and (found.status == EXACT).any()


def test_signs_of_zero_infinities_and_nan():
    below = ball(Fraction(0), TINY / 64)
    one = boxed([arb(0), -arb(0), arb("-inf"), arb("inf"), arb("nan"), below, arb(0, float("inf"))])
    found = round_enclosed(one, True)
    np.testing.assert_array_equal(found.odd, [0, 0, -np.inf, np.inf, np.nan, 0, 0])
    assert not np.signbit(found.odd[:2]).any()
    assert found.status.tolist() == [EXACT, EXACT, EXACT, EXACT, PROPAGATED, ENCLOSED, ENCLOSED]
    assert found.width[5] > 0 and np.isinf(found.width[6])


def test_one_more_rounding_to_any_format_is_the_only_one(rng):
    """Values near ties of every format, a little to either side: 1 + 2^-8 + 2^-40 and all its relatives."""
    values, near = [], Fraction(2) ** -80
    for fmt in FORMATS.values():
        for k in rng.integers(1, 2 ** (fmt.precision - 1), 30).tolist():
            unit = Fraction(2) ** (fmt.quantum + int(rng.integers(0, 3)))
            tie = (2 ** (fmt.precision - 1) + k + Fraction(1, 2)) * unit
            values += [tie, tie * (1 + near), tie * (1 - near), k * unit]
        values += [Fraction(fmt.max_finite) * (1 + near), Fraction(2) ** (fmt.quantum - 1)]
    values += [-x for x in values]
    found = round_enclosed(boxed([ball(x) for x in values]), False)
    assert (found.status != ENCLOSED).all()
    for name, fmt in FORMATS.items():
        if name != "float64":
            exact = np.array([nearest(x, fmt.numpy) for x in values])
            np.testing.assert_array_equal(round_to(found.odd, name).astype(np.float64), exact)


def test_a_decided_element_stays():
    first = round_enclosed(boxed([ball(1 + STEP / 8, STEP / 2**20), arb(0.1, 0.01)]), False)
    second = round_enclosed(boxed([arb(7), arb(0.1)]), False)
    both = better(first, second)
    assert both.status.tolist() == [ROUNDED, EXACT]
    assert both.odd.tolist() == [1 + float(STEP), 0.1]
    assert better(None, first) is first


def test_what_precision_cannot_tell_is_never_called_a_number_or_a_nan():
    near_zero = boxed([arb(0, 1)])
    for result in (BALLS.div(boxed([arb(1)]), near_zero), log(near_zero)):
        assert round_enclosed(result, False).status.tolist() == [ENCLOSED]
        with pytest.raises(Undecided):
            clean(result)
    assert round_enclosed(BALLS.div(boxed([arb("nan")]), boxed([arb(1)])), False).status.tolist() == [PROPAGATED]
    assert BALLS.minus_infinite(boxed([arb("-inf"), arb(-(10.0**300)), arb(-1)])).tolist() == [True, False, False]


def test_nothing_enters_balls_unseen():
    one = boxed([arb(1)])
    for attempt in (lambda: one + 0.5, lambda: one * np.float64(2), lambda: np.exp(one), lambda: np.ones(1) + one):
        with pytest.raises((TypeError, DTypeError)):
            attempt()
    assert exp(one + 1).shape == (1,)


@pytest.mark.parametrize("name", ["plain", "one key", "sink", "mask of nothing", "softcap", "everything"])
def test_certified_values_are_those_of_far_more_bits(rng, name):
    inputs, weights = arrays(PROBLEMS[name], rng)
    problem = api.build(PROBLEMS[name].spec, inputs, np.float64, ("out",))
    wrt = tuple(problem.real_inputs())
    found = certify(problem, weights, wrt, bits=(128,))
    with flint.ctx.workprec(700):
        exact = problem.differentiate(BALLS.real, weights, wrt)
    for output, certificate in found.items():
        again = round_enclosed(exact[output], True)
        decided = certificate.status != ENCLOSED
        np.testing.assert_array_equal(certificate.value[decided], again.odd[decided])
        np.testing.assert_array_equal(certificate.rne[decided], again.nearest[decided])
        t, d, _ = exact[output].enclosure()
        open_ = ~decided
        assert (np.abs((certificate.value[open_] - t[open_]) - d[open_]) <= certificate.width[open_]).all()


def small(dtype=np.float64):
    inputs, weights = arrays(PROBLEMS["plain"], np.random.default_rng(5), dtype)
    return api.build(ra.SDPA(), inputs, dtype, ("out",)), weights


def refused():
    problem, weights = small()
    with pytest.raises(RefattnError, match="one of the two arithmetics is wrong"):
        certify(problem, weights, ("q", "k", "v"), bits=(128,))


def test_the_proof_as_it_is_stands():
    problem, weights = small()
    assert all((c.status != ENCLOSED).all() for c in certify(problem, weights, ("q", "k", "v"), bits=(128,)).values())


def test_a_wrong_constant_in_the_exponential_is_refused(monkeypatch):
    wrong = list(exponential._EXP)
    wrong[2] *= 1 + 2.0**-30
    monkeypatch.setattr(exponential, "_EXP", wrong)
    refused()


def test_a_ball_space_with_too_small_a_radius_is_refused(monkeypatch):
    """An exponential good to 30 bits that claims to be exact."""

    def overconfident(x):
        with flint.ctx.workprec(30):
            return x.exp().mid()

    monkeypatch.setattr(balls_module, "_exp", np.frompyfunc(overconfident, 1, 1))
    refused()


def test_a_wrong_rounding_is_refused(monkeypatch):
    """Values that went through float32 on their way: the double rounding that library casts do."""

    def twice(balls, to_nearest):
        found = round_enclosed(balls, to_nearest)
        return found._replace(odd=found.odd.astype(np.float32).astype(np.float64))

    monkeypatch.setattr(escalation, "round_enclosed", twice)
    refused()
