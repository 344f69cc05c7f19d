"""The vocabulary: what each space accepts and refuses, exact constants, and the end of every softmax."""

import math
from fractions import Fraction

import flint
import numpy as np
import pytest
from checks import near, same

from refattn import numeric
from refattn.bound import BoundSpace
from refattn.engines.certified.balls import BALLS, Balls
from refattn.errors import DTypeError
from refattn.numeric import softmax_attend
from refattn.profiles import FLOAT64
from refattn.space import contraction
from refattn.tape import Tape

BOUND = BoundSpace(FLOAT64)
LIFTS = {
    "float64": np.asarray,
    "balls": BALLS.real,
    "bound": BOUND.real,
    "tape": lambda x: Tape().variable(np.asarray(x)),
    "tape_of_balls": lambda x: Tape().variable(BALLS.real(x)),
}
PROVED = {name: LIFTS[name] for name in ("balls", "bound", "tape_of_balls")}
SPACES = pytest.mark.parametrize("lift", LIFTS.values(), ids=LIFTS)


def plain(x):
    """Midpoints or values of an array of any space."""
    x = getattr(x, "value", x)
    if isinstance(x, Balls):
        return x.enclosure()[0]
    return np.asarray(getattr(x, "x", x), np.float64)


# Nothing unproved gets in


@pytest.mark.parametrize(
    "ufunc", [np.maximum, np.add, np.exp, np.less, np.matmul, np.isfinite], ids=lambda f: f.__name__
)
@pytest.mark.parametrize("lift", [LIFTS[n] for n in LIFTS if n != "float64"], ids=[n for n in LIFTS if n != "float64"])
def test_numpy_ufuncs_refuse_what_is_not_float64(lift, ufunc):
    x = lift(np.ones((2, 2)))
    with pytest.raises(TypeError):
        ufunc(*[x] * ufunc.nin)
    with pytest.raises(TypeError):
        ufunc(*[np.ones((2, 2)), x][-ufunc.nin :])


@pytest.mark.parametrize(
    "stray",
    [
        0.5,
        np.float64(0.5),
        np.float32(0.5),
        np.ones(2),
        1 + 0j,
        True,
        "1",
        None,
        Fraction(1, 2),
        np.arange(2),
        flint.arb(1),
    ],
    ids=lambda x: type(x).__name__,
)
@pytest.mark.parametrize("operation", ["add", "radd", "sub", "mul", "rmul", "div", "where"])
@pytest.mark.parametrize("lift", PROVED.values(), ids=PROVED)
def test_proved_spaces_refuse_numbers_that_were_not_lifted(lift, operation, stray):
    x = lift(np.ones(2))
    apply = {
        "add": lambda: x + stray,
        "radd": lambda: stray + x,
        "sub": lambda: x - stray,
        "mul": lambda: x * stray,
        "rmul": lambda: stray * x,
        "div": lambda: x / stray,
        "where": lambda: numeric.where(np.array([True, False]), x, stray),
    }
    with pytest.raises((DTypeError, TypeError)):
        apply[operation]()


@SPACES
def test_integers_are_exact_everywhere(lift):
    x = lift(np.array([0.5, 3.0]))
    same(plain(1 + x * 2 - 3), np.array([-1.0, 4.0]))
    same(plain(6 / x), np.array([12.0, 2.0]))
    same(plain(1 - x), np.array([0.5, -2.0]))
    same(plain(-x), np.array([-0.5, -3.0]))


@pytest.mark.parametrize("lift", PROVED.values(), ids=PROVED)
def test_a_comparison_that_could_be_undecided_does_not_read_as_a_truth(lift):
    x, y = lift(np.ones(2)), lift(np.zeros(2))
    with pytest.raises(TypeError):
        x < y  # noqa: B015


# Constants


@SPACES
def test_real_lifts_exact_numbers(lift):
    x = lift(np.ones(2))
    for value in (3, 0.1, np.float32(0.1), np.int64(2**40), np.array([1, 2]), np.array([0.1, 2.0])):
        same(plain(numeric.real(value, x)), np.asarray(value, np.float64))
    near(plain(numeric.real(Fraction(1, 3), x)), np.float64(1 / 3), 1e-16)


def test_a_fraction_becomes_a_ball_that_holds_it():
    third = numeric.real(Fraction(1, 3), BALLS.real(np.ones(1)))
    t, d, r = third.enclosure()
    assert abs(Fraction(float(t)) + Fraction(float(d)) - Fraction(1, 3)) <= Fraction(float(r))
    t, d, r = (third * 3 - 1).enclosure()
    assert 0 < abs(t + d) <= r


def test_a_double_is_the_dyadic_number_it_is():
    t, d, r = BALLS.real(np.array([0.1, 2.0**-1074, 1e308])).enclosure()
    same(t, np.array([0.1, 2.0**-1074, 1e308]))
    same(d, np.zeros(3))
    same(r, np.zeros(3))


# Shapes, choices


@SPACES
def test_the_shape_functions_are_those_of_numpy(lift):
    a = np.arange(24.0).reshape(2, 3, 4)
    x = lift(a)
    assert x.ndim == 3
    same(plain(numeric.reshape(x, (4, 6))), a.reshape(4, 6))
    same(plain(numeric.transpose(x, (1, 2, 0))), a.transpose(1, 2, 0))
    same(plain(numeric.broadcast(x[:, :1], (5, 2, 3, 4))), np.broadcast_to(a[:, :1], (5, 2, 3, 4)))
    same(plain(numeric.take(x, np.array([2, 0, 2]), 1)), a[:, [2, 0, 2]])
    same(plain(numeric.concatenate([x, x[..., :1]], -1)), np.concatenate([a, a[..., :1]], -1))
    same(plain(numeric.total(x, (0, 2), keepdims=True)), a.sum((0, 2), keepdims=True))
    same(plain(x[1, ..., ::-1]), a[1, ..., ::-1])


@SPACES
def test_sums_of_nothing_are_0(lift):
    x = lift(np.zeros((2, 0)))
    same(plain(numeric.total(x, -1)), np.zeros(2))
    same(plain(numeric.einsum("ij,kj->ik", x, x)), np.zeros((2, 2)))
    same(plain(numeric.row_max(x, np.zeros((2, 0), bool))), np.zeros((2, 1)))


@SPACES
def test_where_clean_finite_and_row_max(lift):
    a = np.array([[1.0, -np.inf, 5.0], [np.nan, np.inf, -2.0]])
    x = lift(a)
    same(numeric.finite(x), np.isfinite(a))
    same(numeric.minus_infinite(x), np.isneginf(a))
    same(plain(numeric.clean(x)), np.where(np.isfinite(a), a, 0.0))
    same(plain(numeric.where(np.isfinite(a), x, 0)), np.where(np.isfinite(a), a, 0.0))
    live = np.array([[True, True, False], [False, False, True]])
    same(plain(numeric.row_max(x, live)), np.array([[1.0], [-2.0]]))
    same(plain(numeric.row_max(x, np.zeros_like(live))), np.zeros((2, 1)))


@SPACES
def test_a_constant_is_its_formula_in_the_space_of_what_it_is_like(lift):
    found = numeric.constant(lambda like: numeric.cos(numeric.real(np.arange(3), like)), lift(np.ones(2)))
    near(plain(found), np.cos(np.arange(3)))
    assert not hasattr(found, "parents")
    assert plain(found)[0] == 1


@SPACES
def test_functions(lift):
    a = np.array([0.5, 1.0, 3.0])
    x = lift(a)
    near(plain(numeric.exp(x)), np.exp(a), 1e-15)
    near(plain(numeric.log(x)), np.log(a), 1e-15)
    near(plain(numeric.tanh(x)), np.tanh(a), 1e-15)
    near(plain(numeric.sin(x)), np.sin(a), 1e-15)
    near(plain(numeric.cos(x)), np.cos(a), 1e-15)
    same(plain(numeric.stop(x)), a)
    same(plain(numeric.stored(x)), a)


@pytest.mark.parametrize(
    ("letters", "a", "b"),
    [
        ("ij,jk->ik", (2, 3), (3, 4)),
        ("ij,kj->ki", (2, 3), (4, 3)),
        ("bgrid,bgjd->bgrij", (2, 2, 3, 2, 4), (2, 2, 5, 4)),
        ("bgrij,bgjd->bgrid", (1, 2, 3, 2, 5), (1, 2, 5, 4)),
        ("i,j->ij", (2,), (3,)),
        ("i,i->", (3,), (3,)),
        ("i,i->i", (3,), (3,)),
        ("ij,jk->ik", (2, 0), (0, 3)),
    ],
    ids=str,
)
@SPACES
def test_einsum_is_numpys(letters, a, b, lift, rng):
    x, y = rng.integers(-9, 9, a).astype(float), rng.integers(-9, 9, b).astype(float)
    same(plain(numeric.einsum(letters, lift(x), lift(y))), np.asarray(np.einsum(letters, x, y)))


def test_einsum_refuses_sizes_that_differ():
    with pytest.raises(ValueError, match=r"argument 2 is (shorter|longer)"):
        contraction("ij,jk->ik", (2, 3), (3, 4, 5))


# The end of every softmax


@SPACES
def test_softmax_attend_by_hand(lift):
    """Weights 1, 2, 4 of 7, 14, 28; a masked key that would weigh most."""
    s = lift(np.log([[[[1.0, 2.0, 4.0, 1e9]]]]))
    v = lift(np.array([7.0, 14.0, 28.0, np.nan]).reshape(1, 1, 4, 1))
    out, lse = softmax_attend(s, np.array([True, True, True, False]), v)
    near(plain(out), [[[[21.0]]]], 1e-14)
    near(plain(lse), [[[math.log(7)]]], 1e-14)


@SPACES
def test_softmax_attend_with_a_sink_and_a_keep_mask(lift):
    s, v = lift(np.zeros((1, 1, 1, 3))), lift(np.array([8.0, 16.0, 32.0]).reshape(1, 1, 3, 1))
    keep = lift(np.array([2.0, 0.0, 2.0]))
    out, lse = softmax_attend(s, np.array(True), v, sink=lift(np.zeros(1)), keep=keep)
    near(plain(out), [[[[(16 + 64) / 4]]]], 1e-14)
    near(plain(lse), [[[math.log(4)]]], 1e-14)


@SPACES
def test_one_live_key_gives_its_value_exactly(lift):
    s = lift(np.array([[[[0.3, 1e5]]]]))
    out, lse = softmax_attend(s, np.array([True, False]), lift(np.array([0.1, 7.0]).reshape(1, 1, 2, 1)))
    same(plain(out), np.array([[[[0.1]]]]))
    same(plain(lse), np.array([[[0.3]]]))


@SPACES
@pytest.mark.parametrize("with_sink", [False, True])
def test_nothing_live(lift, with_sink):
    s, v = lift(np.full((1, 2, 1, 3), 1e9)), lift(np.full((1, 1, 3, 2), np.nan))
    sink = np.array([0.25, -3.0])
    out, lse = softmax_attend(s, np.array(False), v, sink=lift(sink) if with_sink else None)
    same(plain(out), np.zeros((1, 2, 1, 2)))
    same(plain(lse), sink.reshape(1, 2, 1) if with_sink else np.full((1, 2, 1), -np.inf))


def test_an_array_of_fractions_is_lifted_number_by_number():
    """As a double, 1/3 would be a proved 0.333…3148."""
    thirds = np.array([[Fraction(1, 3), Fraction(2, 3)], [Fraction(1, 7), 5]], object)
    with flint.ctx.workprec(128):
        three, whole = (numeric.real(np.array(a), BALLS.real(0)) for a in ([[3, 3], [7, 1]], [[1, 2], [1, 5]]))
        value, _, radius = (numeric.real(thirds, BALLS.real(0)) * three - whole).enclosure()
    assert (np.abs(value) + radius < 1e-30).all()
    bounded = numeric.real(thirds, BoundSpace(FLOAT64).real(0))
    assert (bounded.e > 0).tolist() == [[True, True], [True, False]]
    np.testing.assert_array_equal(numeric.real(thirds, np.zeros(1)), thirds.astype(float))
