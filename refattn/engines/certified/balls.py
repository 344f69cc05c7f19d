"""Arb balls as a space: every number carries a radius that provably holds the exact value.

Bare `flint.arb` objects in NumPy arrays are silently unsound (an undecided comparison reads as False, a float mixes
into the proof), so they live inside `Balls`, which NumPy's ufuncs and Python floats cannot enter. Precision is
flint's global `ctx.prec`, set by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from functools import cmp_to_key, partial, reduce
from typing import Any

import numpy as np
from flint import arb, arb_mat, ctx, fmpq
from numpy.typing import NDArray

from refattn.engines.certified.enclosure import Enclosure
from refattn.errors import DTypeError, Undecided
from refattn.space import Bools, Integers, Value, contraction

_exp, _log, _tanh, _lift = (np.frompyfunc(f, 1, 1) for f in (arb.exp, arb.log, arb.tanh, arb))
_sqrt, _erf = np.frompyfunc(arb.sqrt, 1, 1), np.frompyfunc(arb.erf, 1, 1)
_max, _min = np.frompyfunc(arb.max, 2, 1), np.frompyfunc(arb.min, 2, 1)
_sin, _cos = (np.frompyfunc(f, 1, 1) for f in (lambda x: _turn(x).sin(), lambda x: _turn(x).cos()))
_sin_pi = np.frompyfunc(lambda t: arb.sin_pi_fmpq(fmpq(t.numerator, t.denominator)), 1, 1)
_cos_pi = np.frompyfunc(lambda t: arb.cos_pi_fmpq(fmpq(t.numerator, t.denominator)), 1, 1)
_midpoint, _radius, _float = (np.frompyfunc(f, 1, 1) for f in (arb.mid, arb.rad, float))
_is_finite, _is_exact, _is_nan = (np.frompyfunc(f, 1, 1) for f in (arb.is_finite, arb.is_exact, arb.is_nan))
_around = np.frompyfunc(lambda r: arb(0, r), 1, 1)
_ZERO: Any = arb(0)
_UNBOUNDED: Any = arb(0, float("inf"))
_EITHER: Any = arb(0.5, 0.5)
# More bits than any precision tried, so that the ends of a ball are read off without a rounding that matters.
_END_BITS = 8192


class Balls(Value):
    """An array of balls; the objects inside are reached by the space alone."""

    __slots__ = ("_balls",)

    def __init__(self, balls: NDArray[np.object_]) -> None:
        self._balls = balls

    @property
    def space(self) -> BallSpace:
        """The one ball space."""
        return BALLS

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the array."""
        return self._balls.shape

    def enclosure(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(t, d, r): the exact value lies within r of t + d, where t is the double nearest to the midpoint.

        r is 0 only where value and t + d are equal; elsewhere it covers the roundings of d and of the radius too.
        Where t is infinite and the ball is not, d says nothing and r is not 0.
        """
        mid: Any = _objects(_midpoint(self._balls))
        t = np.asarray(_float(mid), np.float64)
        rest = _objects(np.where(np.isfinite(t), mid, _ZERO) - _lift(np.where(np.isfinite(t), t, 0.0)))
        d = np.asarray(_float(rest), np.float64)
        back: Any = _lift(d)
        exact = np.asarray(_is_exact(self._balls), bool) & np.asarray(rest == back, bool)
        exact &= np.isfinite(t) | ~np.asarray(_is_finite(self._balls), bool)
        radius = np.asarray(_float(_objects(_radius(self._balls))), np.float64)
        return t, d, np.where(exact, 0.0, radius * (1 + 2.0**-50) + np.abs(d) * 2.0**-50 + 2.0**-1072)

    def endpoints(self, where: Bools) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Lower and upper ends as (significand, exponent) of the bounded balls chosen."""
        with ctx.workprec(_END_BITS):
            ends = [(x.lower().man_exp(), x.upper().man_exp()) for x in self._balls[where]]
        return [((int(m), int(e)), (int(n), int(f))) for (m, e), (n, f) in ends]


class BallSpace:
    """The operations of `numeric` on balls."""

    def coerce(self, value: Any) -> Balls:
        """Balls pass and integers are exact; anything else needs `numeric.real`, in sight."""
        if isinstance(value, Balls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return Balls(_object(arb(value)))
        raise DTypeError(f"a {type(value).__name__} in a formula on balls: lift exact numbers with numeric.real")

    def real(self, value: Any) -> Balls:
        """Exact lift; a Fraction becomes the ball of its quotient."""
        if isinstance(value, Fraction):
            return Balls(_object(arb(fmpq(value.numerator, value.denominator))))
        array = np.asarray(value)
        array = array.astype(object) if array.dtype.kind in "iub" else array.astype(np.float64)
        return Balls(_objects(_lift(array)))

    def within(self, found: Enclosure) -> Balls:
        """Balls that hold what the intervals hold; NaN where these are NaN."""
        return Balls(_objects(_lift(found.t) + _lift(found.d) + _around(found.r)))

    def add(self, a: Balls, b: Balls) -> Balls:
        """Sum."""
        return Balls(_objects(a._balls + b._balls))

    def sub(self, a: Balls, b: Balls) -> Balls:
        """Difference."""
        return Balls(_objects(a._balls - b._balls))

    def mul(self, a: Balls, b: Balls) -> Balls:
        """Product."""
        return Balls(_objects(a._balls * b._balls))

    def div(self, a: Balls, b: Balls) -> Balls:
        """Quotient; by a ball that holds 0, an unbounded ball."""
        return _undetermined(_objects(a._balls / b._balls), a, b)

    def exp(self, x: Balls) -> Balls:
        """Exponential."""
        return Balls(_objects(_exp(x._balls)))

    def log(self, x: Balls) -> Balls:
        """Logarithm; of a ball that holds 0, an unbounded ball."""
        return _undetermined(_objects(_log(x._balls)), x)

    def tanh(self, x: Balls) -> Balls:
        """Hyperbolic tangent."""
        return Balls(_objects(_tanh(x._balls)))

    def sin(self, x: Balls) -> Balls:
        """Sine."""
        return Balls(_objects(_sin(x._balls)))

    def cos(self, x: Balls) -> Balls:
        """Cosine."""
        return Balls(_objects(_cos(x._balls)))

    def erf(self, x: Balls) -> Balls:
        """Error function."""
        return _undetermined(_objects(_erf(x._balls)), x)

    def pi(self) -> Balls:
        """To the precision of the moment."""
        return Balls(_object(arb.pi()))

    def solve(self, a: Balls, b: Balls, least: float) -> Balls:
        """By `arb_mat`, which proves that the matrix is regular.

        Raises
        ------
        Undecided
            It cannot at this precision.
        """
        (n, m), left, right = b.shape, a._balls.ravel().tolist(), b._balls.ravel().tolist()
        try:
            found = arb_mat(n, n, left).solve(arb_mat(n, m, right))
        except ZeroDivisionError:
            raise Undecided("a matrix that the radii do not prove regular: more bits will") from None
        return Balls(_filled(found.entries(), (n, m)))

    def sin_pi(self, turns: Any) -> Balls:
        """Sine of π times Fractions; Arb reduces them exactly."""
        return Balls(_objects(_sin_pi(np.asarray(turns, object))))

    def cos_pi(self, turns: Any) -> Balls:
        """Cosine likewise."""
        return Balls(_objects(_cos_pi(np.asarray(turns, object))))

    def sqrt(self, x: Balls) -> Balls:
        """Square root; of a ball that reaches below 0, an unbounded ball."""
        return _undetermined(_objects(_sqrt(x._balls)), x)

    def maximum(self, a: Balls, b: Balls) -> Balls:
        """A ball that holds the larger, whichever that is."""
        return Balls(_objects(_max(a._balls, b._balls)))

    def minimum(self, a: Balls, b: Balls) -> Balls:
        """A ball that holds the smaller."""
        return Balls(_objects(_min(a._balls, b._balls)))

    def step(self, x: Balls, at_zero: float) -> Balls:
        """All of [0, 1] where the ball holds 0 and more."""
        values = [_stepped(ball, at_zero) for ball in x._balls.ravel()]
        return Balls(_filled(values, x.shape))

    def peak(self, x: Balls, live: Bools) -> Balls:
        """All of [0, 1] for entries that may be the largest where none surely is."""
        if not x.shape[-1]:
            return x
        rows = zip(x._balls.reshape(-1, x.shape[-1]), live.reshape(-1, x.shape[-1]), strict=True)
        return Balls(_filled([w for row, ok in rows for w in _peak(row, ok)], x.shape))

    def amax(self, x: Balls, live: Bools) -> Balls:
        """The largest of the live, folded."""
        count = int(np.prod(x.shape[:-1]))
        rows = zip(x._balls.reshape(count, x.shape[-1]), live.reshape(count, x.shape[-1]), strict=True)
        found = [reduce(arb.max, row[ok]) if ok.any() else _ZERO for row, ok in rows]
        return Balls(_filled(found, x.shape[:-1]))

    def top_k(self, x: Balls, k: int) -> Integers:
        """Every row sorted by comparisons that the radii settle."""
        count = min(k, x.shape[-1])
        rows = x._balls.reshape(int(np.prod(x.shape[:-1])), x.shape[-1])
        ordered = [sorted(range(len(row)), key=cmp_to_key(partial(_before, row)))[:count] for row in rows]
        return np.array(ordered, np.int64).reshape((*x.shape[:-1], count))

    def reshape(self, x: Balls, shape: tuple[int, ...]) -> Balls:
        """Another shape."""
        return Balls(x._balls.reshape(shape))

    def transpose(self, x: Balls, axes: Sequence[int]) -> Balls:
        """Another order of axes."""
        return Balls(x._balls.transpose(axes))

    def broadcast(self, x: Balls, shape: tuple[int, ...]) -> Balls:
        """Repeated entries."""
        return Balls(np.broadcast_to(x._balls, shape))

    def index(self, x: Balls, key: Any) -> Balls:
        """Basic indexing."""
        return Balls(_objects(x._balls[key]))

    def take(self, x: Balls, indices: NDArray[np.intp], axis: int) -> Balls:
        """Entries of one axis."""
        return Balls(np.take(x._balls, indices, axis))

    def concatenate(self, parts: Sequence[Balls], axis: int) -> Balls:
        """Joined along an axis."""
        return Balls(np.concatenate([part._balls for part in parts], axis))

    def sum(self, x: Balls, axis: Any, keepdims: bool) -> Balls:
        """Sum over axes; an empty sum is 0."""
        return Balls(_objects(np.sum(x._balls, axis=axis, keepdims=keepdims, initial=_ZERO)))

    def einsum(self, letters: str, a: Balls, b: Balls) -> Balls:
        """Batched products by `arb_mat`, which is exact where inputs are exact and the precision holds the sums."""
        c = contraction(letters, a.shape, b.shape)
        batch, m, k, n = *c.a_shape, c.b_shape[2]
        left, right = a._balls.transpose(c.a_axes).reshape(c.a_shape), b._balls.transpose(c.b_axes).reshape(c.b_shape)
        out = np.full((batch, m, n), _ZERO, dtype=object)
        for i in range(batch if m * k * n else 0):
            product = arb_mat(m, k, left[i].ravel().tolist()) * arb_mat(k, n, right[i].ravel().tolist())
            out[i] = np.array(product.entries(), dtype=object).reshape(m, n)
        return Balls(out.reshape(c.shape).transpose(c.axes))

    def where(self, condition: Bools, a: Balls, b: Balls) -> Balls:
        """Entries of a where the condition holds, else of b."""
        return Balls(np.where(condition, a._balls, b._balls))

    def finite(self, x: Balls) -> Bools:
        """Which balls are numbers; a ball of infinite radius may be one or not.

        Raises
        ------
        Undecided
            There is such a ball.
        """
        bounded = np.asarray(_is_finite(x._balls), bool)
        if np.isfinite(np.asarray(_float(x._balls[~bounded]), np.float64)).any():
            raise Undecided("a ball of infinite radius: more bits will tell whether it is a number")
        return bounded

    def minus_infinite(self, x: Balls) -> Bools:
        """Which are exactly −∞."""
        return np.isneginf(np.asarray(_float(x._balls), np.float64)) & ~self.finite(x)

    def row_max(self, x: Balls, live: Bools) -> Balls:
        """Exact midpoint of an entry whose double is largest; any choice is sound, for the shift cancels."""
        if not x.shape[-1]:
            return Balls(np.full((*x.shape[:-1], 1), _ZERO, dtype=object))
        near = np.where(live, np.asarray(_float(x._balls), np.float64), -np.inf)
        best = np.argmax(near, axis=-1)[..., None]
        top = _objects(_midpoint(np.take_along_axis(x._balls, best, -1)))
        return Balls(np.where(np.isneginf(np.take_along_axis(near, best, -1)), _ZERO, top))

    def stored(self, x: Balls, cotangent: bool) -> Balls:
        """Balls store everything as it is."""
        return x

    def stop(self, x: Balls) -> Balls:
        """The same."""
        return x


BALLS = BallSpace()


def _before(row: Any, i: int, j: int) -> int:
    """Negative where entry i comes before entry j in a row sorted from the largest down."""
    a, b = row[i], row[j]
    if a > b or b > a:
        return -1 if a > b else 1
    if a.is_exact() and b.is_exact() and not (a.is_nan() or b.is_nan()):
        return i - j
    raise Undecided("two entries too close to tell which is larger: more bits will, unless they are equal")


def _peak(row: Any, live: Bools) -> list[Any]:
    """Weights of one row: 1 for an entry that is surely the first of the largest, else [0, 1] for each that may be."""

    def beats(i: Any, j: Any) -> bool:
        return bool(row[i] > row[j] or (row[i].is_exact() and row[i] == row[j] and i < j))

    there = np.flatnonzero(live)
    may = [i for i in there if not any(beats(j, i) for j in there if j != i)]
    weights = [_ZERO] * len(row)
    for i in may:
        weights[i] = arb(1) if len(may) == 1 else _EITHER
    return weights


def _stepped(ball: arb, at_zero: float) -> arb:
    if ball.is_nan():
        return ball
    if ball > 0 or ball < 0:
        return arb(1) if ball > 0 else _ZERO
    return arb(at_zero) if ball == 0 else _EITHER


def _filled(values: Sequence[Any], shape: tuple[int, ...]) -> NDArray[np.object_]:
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out.reshape(shape)


def _turn(x: arb) -> arb:
    """An exact infinity has no sine, though Arb gives it all of [−1, 1]; a ball of infinite radius has."""
    return x if x.is_finite() or not x.is_exact() else arb("nan")


def _object(ball: arb) -> NDArray[np.object_]:
    out = np.empty((), dtype=object)
    out[()] = ball
    return out


def _objects(result: Any) -> NDArray[np.object_]:
    """Object ufuncs return the bare object for a scalar; arrays stay arrays."""
    return result if isinstance(result, np.ndarray) else _object(result)


def _undetermined(result: NDArray[np.object_], *operands: Balls) -> Balls:
    """NaN is what a NaN operand makes; where no operand is one, the result is unbounded, which more bits may mend."""
    spoiled = np.asarray(_is_nan(result), bool)
    for operand in operands if spoiled.any() else ():
        spoiled = spoiled & ~np.asarray(_is_nan(operand._balls), bool)
    return Balls(np.where(spoiled, _UNBOUNDED, result))
