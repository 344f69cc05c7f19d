"""Spaces: the kinds of number that a reference runs on, and the plain one, float64.

A *space* is a class with the operations that `numeric` names. NumPy float64 arrays are the plain space; every other
space wraps its arrays in a `Value`, so that a NumPy ufunc or a stray Python float raises instead of slipping an
unproved number in.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.cache import extend

Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


class Value:
    """An array of a space other than float64: operators only, never NumPy's ufuncs."""

    __slots__ = ()
    __array_ufunc__ = None
    space: Any
    shape: tuple[int, ...]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)

    def __add__(self, other: Any) -> Any:
        return apply("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return apply("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return apply("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return apply("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return apply("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return apply("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return apply("div", other, self)

    def __neg__(self) -> Any:
        return apply("sub", 0, self)

    def __getitem__(self, key: Any) -> Any:
        return self.space.index(self, key)


class Contraction(NamedTuple):
    """A two-operand einsum as a batched matrix product: transpose, reshape, multiply, reshape, transpose."""

    a_axes: list[int]
    a_shape: tuple[int, ...]
    b_axes: list[int]
    b_shape: tuple[int, ...]
    shape: tuple[int, ...]
    axes: list[int]


def contraction(letters: str, a: tuple[int, ...], b: tuple[int, ...]) -> Contraction:
    """Plan `einsum(letters)` as (batch, m, k) @ (batch, k, n); a letter of one operand alone stands in the output."""
    operands, out = letters.split("->")
    left, right = operands.split(",")
    size = dict(zip(left, a, strict=True)) | dict(zip(right, b, strict=True))
    batch = [c for c in out if c in left and c in right]
    rows, columns = [c for c in out if c not in right], [c for c in out if c not in left]
    inner = [c for c in left if c not in out]
    count = [int(np.prod([size[c] for c in group], dtype=np.int64)) for group in (batch, rows, inner, columns)]
    order = batch + rows + columns
    return Contraction(
        [left.index(c) for c in batch + rows + inner],
        (count[0], count[1], count[2]),
        [right.index(c) for c in batch + inner + columns],
        (count[0], count[2], count[3]),
        tuple(size[c] for c in order),
        [order.index(c) for c in out],
    )


class Float64:
    """The plain space: NumPy float64, or complex128 when a derivative is taken by complex step."""

    def coerce(self, value: Any) -> Any:
        """Arrays pass; a Python float does too, for here it is what it is elsewhere: a double."""
        return value

    def real(self, value: Any) -> Any:
        """The nearest double of an exact number, elementwise."""
        if isinstance(value, Fraction):
            return np.float64(value.numerator / value.denominator)
        return np.asarray(value).astype(np.float64)

    add, sub, mul, div = np.add, np.subtract, np.multiply, np.true_divide
    exp, log, tanh, sin, cos, sqrt = np.exp, np.log, np.tanh, np.sin, np.cos, np.sqrt
    maximum, minimum = np.maximum, np.minimum
    finite = np.isfinite
    reshape, transpose, broadcast = staticmethod(np.reshape), staticmethod(np.transpose), staticmethod(np.broadcast_to)
    take, where, concatenate = staticmethod(np.take), staticmethod(np.where), staticmethod(np.concatenate)

    def erf(self, x: Any) -> Any:
        """SciPy's, complex arguments included; imported when first asked for, because that takes a while."""
        from scipy.special import erf

        return erf(x)

    def index(self, x: Any, key: Any) -> Any:
        """Basic indexing."""
        return x[key]

    def minus_infinite(self, x: Any) -> Bools:
        """Of the real part."""
        return np.asarray(np.isneginf(x.real))

    def sum(self, x: Any, axis: Any, keepdims: bool) -> Any:
        """Sum over axes."""
        return np.sum(x, axis=axis, keepdims=keepdims)

    def einsum(self, letters: str, a: Any, b: Any) -> Any:
        """Two-operand einsum by one batched matrix product."""
        c = contraction(letters, a.shape, b.shape)
        product = np.transpose(a, c.a_axes).reshape(c.a_shape) @ np.transpose(b, c.b_axes).reshape(c.b_shape)
        return product.reshape(c.shape).transpose(c.axes)

    def pi(self) -> Any:
        """The nearest double."""
        return np.float64(np.pi)

    def solve(self, a: Any, b: Any, least: float) -> Any:
        """By LAPACK."""
        return np.linalg.solve(a, b)

    def extend(self, cache: Any, rows: Any, axis: int) -> Any:
        """In spare room behind the cache, where there is some."""
        return extend(cache, rows, axis)

    def row_max(self, x: Any, live: Bools) -> Any:
        """Largest live entry of the last axis, kept; 0 where none is live. Detached, of the real part."""
        top = np.max(np.where(live, x.real, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        return np.where(np.isneginf(top), 0.0, top)

    def step(self, x: Any, at_zero: float) -> Any:
        """1 above 0, 0 below, `at_zero` between."""
        return np.heaviside(x.real, at_zero)

    def peak(self, x: Any, live: Bools) -> Any:
        """1 at the largest live entry of the last axis, the first of several, and 0 elsewhere."""
        return (np.arange(x.shape[-1]) == np.argmax(_only(live, x.real), -1)[..., None]) * (live * 1.0)

    def amax(self, x: Any, live: Bools) -> Any:
        """Largest live entry of the last axis, 0 where none is live."""
        return np.sum(np.where(self.peak(x, live) > 0, x, 0), -1)

    def top_k(self, x: Any, k: int) -> Integers:
        """Indices of the k largest entries of the last axis, the largest first, of equals the first."""
        return np.argsort(-x.real, axis=-1, kind="stable")[..., :k].astype(np.int64)

    def stored(self, x: Any, cotangent: bool) -> Any:
        """float64 stores everything as it is."""
        return x

    def stop(self, x: Any) -> Any:
        """The real part, which is all but in a complex step."""
        return x.real


def _only(live: Bools, x: Any) -> Any:
    """−∞ for what is not live, in an axis that is not empty."""
    return np.where(live, x, -np.inf) if x.shape[-1] else np.zeros((*x.shape[:-1], 1))


FLOAT64 = Float64()


def space_of(*operands: Any) -> Any:
    """The space that a formula over these operands runs in: the tape before balls and bounds, these before float64."""
    spaces = [x.space for x in operands if isinstance(x, Value)]
    return max(spaces, key=lambda space: getattr(space, "rank", 0)) if spaces else FLOAT64


def apply(name: str, a: Any, b: Any) -> Any:
    """The operation of that name on two operands, in the space of both."""
    space = space_of(a, b)
    return getattr(space, name)(space.coerce(a), space.coerce(b))
