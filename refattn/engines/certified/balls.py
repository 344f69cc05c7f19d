"""Arb balls as a space: every number carries a radius that provably holds the exact value.

Bare `flint.arb` objects in NumPy arrays are silently unsound (an undecided comparison reads as False, a float mixes
into the proof), so they live inside `Balls`, which NumPy's ufuncs and Python floats cannot enter. Precision is
flint's global `ctx.prec`, set by the engine.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from flint import arb, arb_mat, fmpq
from numpy.typing import NDArray

from refattn.errors import DTypeError
from refattn.numeric import Bools, Value, contraction

_exp, _log, _tanh, _lift = (np.frompyfunc(f, 1, 1) for f in (arb.exp, arb.log, arb.tanh, arb))
_midpoint, _radius, _float = (np.frompyfunc(f, 1, 1) for f in (arb.mid, arb.rad, float))
_is_finite, _is_exact = (np.frompyfunc(f, 1, 1) for f in (arb.is_finite, arb.is_exact))


class Balls(Value):
    """An array of balls; the objects inside are reached by the space alone."""

    __slots__ = ("_balls",)

    def __init__(self, balls: NDArray[np.object_]) -> None:
        self._balls = balls

    @property
    def space(self) -> BallSpace:  # type: ignore[override]
        """The one ball space."""
        return BALLS

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the array."""
        return self._balls.shape

    def enclosure(self) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
        """(t, d, r): the exact value lies within r of t + d, where t is the double nearest to the midpoint.

        r is 0 only where value and t + d are equal; elsewhere it is at least 2^-1074.
        """
        mid = _objects(_midpoint(self._balls))
        t = np.asarray(_float(mid), np.float64)
        rest = _objects(np.where(np.isfinite(t), mid, arb(0)) - _lift(np.where(np.isfinite(t), t, 0.0)))
        d = np.asarray(_float(rest), np.float64)
        exact = np.asarray(_is_exact(self._balls) & (rest == _lift(d)), bool)
        radius = np.asarray(_float(_radius(self._balls)), np.float64)
        return t, d, np.where(exact, 0.0, radius * (1 + 2.0**-50) + np.abs(d) * 2.0**-50 + 2.0**-1074)

    def endpoints(self, where: Bools) -> list[tuple[tuple[int, int], tuple[int, int]]]:
        """Lower and upper ends as (significand, exponent) of the bounded balls chosen."""
        return [tuple((int(m), int(e)) for m, e in (x.lower().man_exp(), x.upper().man_exp())) for x in self._balls[where]]  # type: ignore[misc]


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
        """Quotient."""
        return Balls(_objects(a._balls / b._balls))

    def exp(self, x: Balls) -> Balls:
        """Exponential."""
        return Balls(_objects(_exp(x._balls)))

    def log(self, x: Balls) -> Balls:
        """Logarithm."""
        return Balls(_objects(_log(x._balls)))

    def tanh(self, x: Balls) -> Balls:
        """Hyperbolic tangent."""
        return Balls(_objects(_tanh(x._balls)))

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
        return Balls(_objects(np.sum(x._balls, axis=axis, keepdims=keepdims, initial=arb(0))))

    def einsum(self, letters: str, a: Balls, b: Balls) -> Balls:
        """Batched products by `arb_mat`, which is exact where inputs are exact and the precision holds the sums."""
        c = contraction(letters, a.shape, b.shape)
        batch, m, k, n = *c.a_shape, c.b_shape[2]
        left, right = a._balls.transpose(c.a_axes).reshape(c.a_shape), b._balls.transpose(c.b_axes).reshape(c.b_shape)
        out = np.full((batch, m, n), arb(0), dtype=object)
        for i in range(batch if m * k * n else 0):
            product = arb_mat(m, k, left[i].ravel().tolist()) * arb_mat(k, n, right[i].ravel().tolist())
            out[i] = np.array(product.entries(), dtype=object).reshape(m, n)
        return Balls(out.reshape(c.shape).transpose(c.axes))

    def where(self, condition: Bools, a: Balls, b: Balls) -> Balls:
        """Entries of a where the condition holds, else of b."""
        return Balls(np.where(condition, a._balls, b._balls))

    def finite(self, x: Balls) -> Bools:
        """Which balls are bounded."""
        return np.asarray(_is_finite(x._balls), bool)

    def minus_infinite(self, x: Balls) -> Bools:
        """Which are exactly −∞."""
        return np.isneginf(np.asarray(_float(x._balls), np.float64)) & (np.asarray(_float(_radius(x._balls))) == 0)

    def row_max(self, x: Balls, live: Bools) -> Balls:
        """Exact midpoint of an entry whose double is largest; any choice is sound, for the shift cancels."""
        if not x.shape[-1]:
            return Balls(np.full((*x.shape[:-1], 1), arb(0), dtype=object))
        near = np.where(live, np.asarray(_float(x._balls), np.float64), -np.inf)
        best = np.argmax(near, axis=-1)[..., None]
        top = _objects(_midpoint(np.take_along_axis(x._balls, best, -1)))
        return Balls(np.where(np.isneginf(np.take_along_axis(near, best, -1)), arb(0), top))

    def stored(self, x: Balls, cotangent: bool) -> Balls:
        """Balls store everything as it is."""
        return x

    def stop(self, x: Balls) -> Balls:
        """The same."""
        return x


BALLS = BallSpace()


def _object(ball: arb) -> NDArray[np.object_]:
    out = np.empty((), dtype=object)
    out[()] = ball
    return out


def _objects(result: Any) -> NDArray[np.object_]:
    """Object ufuncs return the bare object for a scalar; arrays stay arrays."""
    return result if isinstance(result, np.ndarray) else _object(result)
