"""The prime field as a space: its modulus, its arithmetic, its choices, and every reference in it."""

from fractions import Fraction

import flint
import numpy as np
import pytest

from refattn import numeric, registry
from refattn.dtypes import odd_fraction
from refattn.engines.certified.field import FieldSpace
from refattn.engines.certified.modulus import draw
from refattn.errors import DTypeError, Undecided
from refattn.golden import build as building
from refattn.golden import inputs as recipes
from refattn.golden import load, suite


def test_the_modulus_is_what_it_says_and_hangs_on_the_seed():
    one, other = draw(b"one", 256), draw(b"other", 256)
    assert one == draw(b"one", 256) and one.prime != other.prime and one.base != other.base
    for modulus in (one, other, draw(b"one", 384)):
        assert flint.fmpz(modulus.prime).is_prime() and flint.fmpz(modulus.order).is_prime()
        assert modulus.order.bit_length() == modulus.bits and (modulus.prime - 1) % modulus.order == 0
        assert modulus.base != 1 and pow(modulus.base, modulus.order, modulus.prime) == 1


@pytest.fixture
def space():
    return FieldSpace(draw(b"a test", 256))


def test_exponents_add_up_and_what_is_no_number_proves_nothing(space):
    a, b = space.real(np.array([0.375, -2.0, 0.0])), space.real(Fraction(1, 3))
    product = numeric.exp(a) * numeric.exp(b)
    assert (product.residue == numeric.exp(a + b).residue).all() and not product.known().any()
    assert numeric.exp(a).known().tolist() == [False, False, True]
    assert space.fineness == 24 and space.chance(1.0) < -200
    spoiled = space.real(np.array([np.nan, np.inf])) * 0
    assert not spoiled.known().any() and np.isinf(spoiled.weight).all() and space.chance(np.inf) == np.inf
    assert (np.isinf((1 / (product - product)).weight)).all()


def test_functions_of_equal_arguments_are_equal_and_mirrored(space):
    x = numeric.exp(space.real(np.array([1.0, 2.0])))
    for function in (numeric.sin, numeric.tanh, numeric.erf):
        assert ((function(x) + function(0 - x)).residue == 0).all()
    assert ((numeric.cos(x) - numeric.cos(0 - x)).residue == 0).all()
    assert ((numeric.exp(x) * numeric.exp(-x)).residue == 1).all()
    one, other = numeric.log(x * 3), numeric.log(x + x + x)
    assert (one.residue == other.residue).all() and one.residue[0] != one.residue[1]
    zero = x - x
    assert [numeric.tanh(zero).residue[0], numeric.cos(zero).residue[0]] == [0, 1]
    assert space.sqrt(space.real(np.array([2.25, 2.0, 0.0]))).known().tolist() == [True, False, True]
    turns = np.array([Fraction(1, 2), Fraction(0), Fraction(1, 7), Fraction(6, 7), Fraction(15, 7)], object)
    sines = numeric.sin_pi(turns, x)
    assert [None if q is None else int(q.p) for q in sines.rational] == [1, 0, None, None, None]
    assert sines.residue[2] == sines.residue[3] == sines.residue[4]


def test_choices_are_made_by_rational_residue_or_ball_or_not_at_all(space):
    e = numeric.exp(space.real(np.array([1.0, 1.0, 0.5, 2.0])))
    two = space.real(np.array([2.0]))
    assert (numeric.maximum(e, two).residue == np.array([*e.residue[:2], two.residue[0], e.residue[3]])).all()
    assert numeric.top_k(e, 3).tolist() == [3, 0, 1]
    # e (e^2 − e) / (e^2 − e) is e, which no ball tells.
    again = e[:1] * (e[3:] - e[:1]) / (e[3:] - e[:1])
    pair = numeric.concatenate([again, e[:1]], 0)
    live = np.ones(2, bool)
    assert numeric.top_k(pair, 2).tolist() == [0, 1] and space.chosen
    assert numeric.peak(pair, live).residue.tolist() == [1, 0]
    assert numeric.step(again - e[:1], 0.5).rational[0] == flint.fmpq(1, 2)
    assert numeric.amax(pair, live).residue == e.residue[0]
    # 1 + e^-1000 and 1 differ by less than these balls tell.
    near_one = numeric.concatenate([1 + numeric.exp(space.real(np.array([-1000.0]))), space.real(np.ones(1))], 0)
    with pytest.raises(Undecided):
        numeric.top_k(near_one, 1)
    for doubtful in (numeric.peak(near_one, live), numeric.amax(near_one, live), numeric.step(near_one[:1] - 1, 0.5)):
        assert np.isinf(doubtful.weight).all() and not doubtful.known().any()


def test_products_and_solutions_are_rational_where_every_term_is(space):
    a = space.real(np.array([[2.0, 0.0], [1.0, 4.0]]))
    mixed = numeric.concatenate([space.real(np.ones((1, 2))), numeric.exp(space.real(np.ones((1, 2))))], 0)
    product = numeric.einsum("ij,jk->ik", a, mixed)
    assert product.known().tolist() == [[True, True], [False, False]]
    assert (product.residue == [[2, 2], [5 * 0 + r for r in (1 + 4 * mixed.residue[1])]]).all()
    found = numeric.solve(a, product, 1.0)
    assert (found.residue == mixed.residue).all()
    assert numeric.solve(a, a, 1.0).rational.tolist() == [[1, 0], [0, 1]]


def test_nothing_enters_a_field_unseen(space):
    one = space.real(np.ones(1))
    for attempt in (lambda: one + 0.5, lambda: one * np.float64(2), lambda: np.exp(one), lambda: np.ones(1) + one):
        with pytest.raises((TypeError, DTypeError)):
            attempt()


SMALLEST = {name: min(info.cases(), key=suite.work, default=None) for name, info in registry.variants().items()}


@pytest.mark.parametrize("name", [name for name, case in SMALLEST.items() if case is not None])
def test_every_reference_runs_in_a_field(space, name):
    """Its balls hold the published values, and what is rational is what was published."""
    golden = load.load(SMALLEST[name].name)
    problem = building.problem_of(golden.case(), golden.inputs())
    weights = recipes.cotangents(golden.case())
    with flint.ctx.workprec(512):
        found = problem.differentiate(space.real, weights, tuple(problem.real_inputs()) if weights else ())
    for output, value in golden.expected.items():
        part = found[output]
        if golden.rows is not None:
            continue
        t, _, r = part.balls.enclosure()
        finite, known = np.isfinite(value), part.known()
        assert (np.abs(t[finite] - value[finite]) <= r[finite] + np.spacing(np.abs(value[finite]))).all()
        exact = [odd_fraction(Fraction(int(q.p), int(q.q))) for q in part.rational[known]]
        np.testing.assert_array_equal(exact, value[known])
