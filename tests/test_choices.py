"""Continuous and decided choices in every space: values, slopes at kinks, and what stays open is said to be open."""

import flint
import numpy as np
import pytest
from checks import near, same
from test_numeric import LIFTS, plain

from refattn import numeric
from refattn.bound import Bounded, BoundSpace
from refattn.engines.certified.balls import BALLS, Balls
from refattn.errors import Undecided
from refattn.profiles import FLOAT32
from refattn.tape import Tape

SPACES = pytest.mark.parametrize("lift", LIFTS.values(), ids=LIFTS)
LIVE = np.array([[True, True, True, True], [True, True, True, False], [False, False, False, False]])
ROWS = np.array([[1.0, -2.0, 3.0, 3.0], [0.0, 0.0, -1.0, 5.0], [1.0, 2.0, 3.0, 4.0]])
KINKS = np.array([-2.0, 0.0, 0.5, 1.0, 3.0])


@SPACES
def test_values(lift):
    x, y = lift(KINKS), lift(KINKS[::-1].copy())
    same(plain(numeric.maximum(x, y)), np.array([3.0, 1.0, 0.5, 1.0, 3.0]))
    same(plain(numeric.minimum(x, y)), np.array([-2.0, 0.0, 0.5, 0.0, -2.0]))
    same(plain(numeric.maximum(x, 0)), np.array([0.0, 0.0, 0.5, 1.0, 3.0]))
    same(plain(numeric.clip(x, 0, 1)), np.array([0.0, 0.0, 0.5, 1.0, 1.0]))
    same(plain(numeric.absolute(x)), np.array([2.0, 0.0, 0.5, 1.0, 3.0]))
    same(plain(numeric.step(x, 0.5)), np.array([0.0, 0.5, 1.0, 1.0, 1.0]))
    near(plain(numeric.sqrt(x * x)), np.abs(KINKS), 1e-15)
    near(plain(numeric.sigmoid(x)), 1 / (1 + np.exp(-KINKS)), 1e-15)
    near(plain(numeric.softplus(x)), np.log1p(np.exp(KINKS)), 1e-15)
    near(plain(numeric.elu1(x)), np.where(KINKS > 0, KINKS + 1, np.exp(KINKS)), 1e-15)


def test_functions_of_large_numbers_stay_finite():
    x = np.array([-800.0, 800.0])
    same(numeric.softplus(x), np.array([0.0, 800.0]))
    same(numeric.elu1(x), np.array([0.0, 801.0]))
    with np.errstate(over="ignore"):
        same(numeric.sigmoid(x), np.array([0.0, 1.0]))


@SPACES
def test_the_largest_live_entry_and_where_it_first_stands(lift):
    x = lift(ROWS)
    same(plain(numeric.amax(x, LIVE)), np.array([3.0, 0.0, 0.0]))
    first = np.zeros((3, 4))
    first[0, 2] = first[1, 0] = 1.0
    same(plain(numeric.peak(x, LIVE)), first)
    same(numeric.top_k(x, 3), np.array([[2, 3, 0], [3, 0, 1], [3, 2, 1]]))
    assert numeric.top_k(x, 9).shape == (3, 4)


@SPACES
def test_of_nothing(lift):
    x = lift(np.zeros((2, 0)))
    same(plain(numeric.amax(x, np.ones((2, 0), bool))), np.zeros(2))
    assert numeric.top_k(x, 3).shape == (2, 0)
    assert numeric.peak(x, np.ones((2, 0), bool)).shape == (2, 0)


def slopes(f, *arrays, lift=np.asarray):
    tape = Tape()
    leaves = [tape.variable(lift(np.asarray(a, float))) for a in arrays]
    out = f(*leaves)
    return [plain(g) for g in tape.gradients([(out, lift(np.ones(out.shape)))], leaves)]


@pytest.mark.parametrize("lift", [np.asarray, BALLS.real], ids=["float64", "balls"])
def test_slopes_at_kinks_are_those_that_the_vocabulary_states(lift):
    half, one = slopes(numeric.maximum, [1.0, 2.0], [1.0, 3.0], lift=lift)
    same(half, np.array([0.5, 0.0]))
    same(one, np.array([0.5, 1.0]))
    same(slopes(numeric.minimum, [1.0, 2.0], [1.0, 3.0], lift=lift)[0], np.array([0.5, 1.0]))
    same(slopes(lambda x: numeric.clip(x, 0, 1), KINKS, lift=lift)[0], np.array([0.0, 1.0, 1.0, 1.0, 0.0]))
    same(slopes(numeric.absolute, KINKS, lift=lift)[0], np.array([-1.0, 0.0, 1.0, 1.0, 1.0]))
    same(slopes(numeric.softplus, [0.0], lift=lift)[0], np.array([0.5]))
    same(slopes(numeric.elu1, [0.0], lift=lift)[0], np.array([1.0]))
    same(slopes(lambda x: numeric.amax(x, LIVE), ROWS, lift=lift)[0], plain(numeric.peak(ROWS, LIVE)))


def ball(mid, radius):
    out = np.empty(len(mid), object)
    out[:] = [flint.arb(m, r) for m, r in zip(mid, radius, strict=True)]
    return Balls(out)


def test_balls_that_overlap_give_every_slope_that_may_be_right():
    x = ball([0.0, 1.0, 0.9], [0.1, 0.0, 0.2])
    value, _, radius = numeric.step(x, 0.5).enclosure()
    same(value, np.array([0.5, 1.0, 1.0]))
    assert (radius >= [0.5, 0.0, 0.0]).all()
    assert radius[1] == radius[2] == 0
    value, _, radius = numeric.peak(x[None], np.ones((1, 3), bool)).enclosure()
    same(value, np.array([[0.0, 0.5, 0.5]]))
    assert (radius[0, 1:] >= 0.5).all()
    value, _, radius = numeric.amax(x[None], np.ones((1, 3), bool)).enclosure()
    assert value[0] - radius[0] <= 1.0
    assert value[0] + radius[0] >= 1.1


def test_a_selection_that_balls_do_not_settle_is_undecided_and_exact_equals_are_settled():
    with pytest.raises(Undecided, match="too close to tell"):
        numeric.top_k(ball([1.0, 0.9], [0.0, 0.2]), 1)
    with pytest.raises(Undecided):
        numeric.top_k(ball([1.0, 1.0], [1e-30, 1e-30]), 1)
    same(numeric.top_k(ball([1.0, 1.0], [0.0, 0.0]), 1), np.array([0]))


def bounded(x, e):
    return Bounded(BoundSpace(FLOAT32), np.array(x), np.array(e))


def test_a_selection_that_an_evaluation_may_make_otherwise_is_undecided():
    same(numeric.top_k(bounded([3.0, 1.0, 2.0], [0.1, 0.1, 0.1]), 2), np.array([0, 2]))
    same(numeric.top_k(bounded([1.0, 1.0, 0.0], [0.0, 0.0, 0.0]), 1), np.array([0]))
    for x, e in (([1.0, 0.9], [0.06, 0.06]), ([2.0, 1.0, 0.0], [0.1, 0.1, 3.0]), ([1.0, 1.0], [0.0, 0.1])):
        with pytest.raises(Undecided):
            numeric.top_k(bounded(x, e), 1)
    # Which is third is open, and nobody asked.
    same(numeric.top_k(bounded([9.0, 5.0, 1.0, 1.1], [0.1, 0.1, 1.0, 1.0]), 2), np.array([0, 1]))


def test_bounds_of_choices_hold_at_their_corners(rng):
    e = 2.0 ** rng.uniform(-9, 0, (2, 400))
    x = rng.standard_normal((2, 400))
    exact, got = x + e * rng.choice([-1, 1], x.shape), None
    got = exact + e * rng.choice([-1, 1], x.shape)
    a, b = (bounded(x[n], e[n]) for n in (0, 1))
    for f, g in ((numeric.maximum, np.maximum), (numeric.minimum, np.minimum)):
        found = f(a, b)
        assert (np.abs(g(*exact) - found.x) <= found.e * (1 + 1e-12)).all()
        assert (np.abs(g(*exact) - g(*got)) <= found.e * (1 + 1e-12)).all()
    found = numeric.step(a, 0.5)
    for point in (exact[0], got[0]):
        assert (np.abs(np.heaviside(point, 0.5) - np.heaviside(exact[0], 0.5)) <= found.e).all()
    rows = bounded(x[0].reshape(20, 20), e[0].reshape(20, 20))
    found, where = numeric.amax(rows, np.ones((20, 20), bool)), numeric.peak(rows, np.ones((20, 20), bool))
    one, other = exact[0].reshape(20, 20), got[0].reshape(20, 20)
    assert (np.abs(one.max(1) - found.x) <= found.e * (1 + 1e-12)).all()
    assert (np.abs(one.max(1) - other.max(1)) <= found.e * (1 + 1e-12)).all()
    for point in (one, other):
        picked = (np.arange(20) == point.argmax(1)[:, None]).astype(float)
        assert (np.abs(picked - where.x) <= where.e).all()
