"""The vocabulary of a reference: one text that runs on float64, on balls, on running bounds and on the tape.

A *space* is a kind of number with the operations below. NumPy float64 arrays are the plain space; every other space
wraps its arrays in a `Value`, so that a NumPy ufunc or a stray Python float raises instead of slipping an unproved
number in. Integers are exact everywhere and may stand in any formula; other constants go through `real`.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Bools = NDArray[np.bool_]


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
        return _apply("add", self, other)

    def __radd__(self, other: Any) -> Any:
        return _apply("add", other, self)

    def __sub__(self, other: Any) -> Any:
        return _apply("sub", self, other)

    def __rsub__(self, other: Any) -> Any:
        return _apply("sub", other, self)

    def __mul__(self, other: Any) -> Any:
        return _apply("mul", self, other)

    def __rmul__(self, other: Any) -> Any:
        return _apply("mul", other, self)

    def __truediv__(self, other: Any) -> Any:
        return _apply("div", self, other)

    def __rtruediv__(self, other: Any) -> Any:
        return _apply("div", other, self)

    def __neg__(self) -> Any:
        return _apply("sub", 0, self)

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
    exp, log, tanh, sin, cos = np.exp, np.log, np.tanh, np.sin, np.cos
    finite = np.isfinite
    reshape, transpose, broadcast = staticmethod(np.reshape), staticmethod(np.transpose), staticmethod(np.broadcast_to)
    take, where, concatenate = staticmethod(np.take), staticmethod(np.where), staticmethod(np.concatenate)

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

    def row_max(self, x: Any, live: Bools) -> Any:
        """Largest live entry of the last axis, kept; 0 where none is live. Detached, of the real part."""
        top = np.max(np.where(live, x.real, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        return np.where(np.isneginf(top), 0.0, top)

    def stored(self, x: Any, cotangent: bool) -> Any:
        """float64 stores everything as it is."""
        return x

    def stop(self, x: Any) -> Any:
        """The real part, which is all but in a complex step."""
        return x.real


FLOAT64 = Float64()


def space_of(*operands: Any) -> Any:
    """The space that a formula over these operands runs in: the tape before balls and bounds, these before float64."""
    spaces = [x.space for x in operands if isinstance(x, Value)]
    return max(spaces, key=lambda space: getattr(space, "rank", 0)) if spaces else FLOAT64


def _apply(name: str, a: Any, b: Any) -> Any:
    space = space_of(a, b)
    return getattr(space, name)(space.coerce(a), space.coerce(b))


def real(value: Any, like: Any) -> Any:
    """An exact number in the space of `like`: int, Fraction, a float as the dyadic it is, or an array of these."""
    return space_of(like).real(value)


def exp(x: Any) -> Any:
    """e to the x."""
    return space_of(x).exp(x)


def log(x: Any) -> Any:
    """Natural logarithm of a positive x."""
    return space_of(x).log(x)


def tanh(x: Any) -> Any:
    """Hyperbolic tangent."""
    return space_of(x).tanh(x)


def sin(x: Any) -> Any:
    """Sine of x in radians."""
    return space_of(x).sin(x)


def cos(x: Any) -> Any:
    """Cosine of x in radians."""
    return space_of(x).cos(x)


def reshape(x: Any, shape: tuple[int, ...]) -> Any:
    """The same numbers in another shape."""
    return space_of(x).reshape(x, shape)


def transpose(x: Any, axes: Sequence[int]) -> Any:
    """Axes in another order."""
    return space_of(x).transpose(x, axes)


def broadcast(x: Any, shape: tuple[int, ...]) -> Any:
    """Repeat along axes of size 1 and along new leading axes."""
    return space_of(x).broadcast(x, shape)


def take(x: Any, indices: NDArray[np.intp], axis: int) -> Any:
    """Entries of one axis by integer index."""
    return space_of(x).take(x, indices, axis)


def concatenate(parts: Sequence[Any], axis: int) -> Any:
    """Join along an axis."""
    space = space_of(*parts)
    return space.concatenate([space.coerce(part) for part in parts], axis)


def total(x: Any, axis: int | tuple[int, ...], keepdims: bool = False) -> Any:
    """Sum over axes."""
    return space_of(x).sum(x, axis, keepdims)


def einsum(letters: str, a: Any, b: Any) -> Any:
    """Two-operand einsum with explicit letters."""
    space = space_of(a, b)
    return space.einsum(letters, space.coerce(a), space.coerce(b))


def where(condition: Bools, a: Any, b: Any) -> Any:
    """Entries of a where the condition holds, else of b; the other entry never touches the result."""
    space = space_of(a, b)
    return space.where(condition, space.coerce(a), space.coerce(b))


def finite(x: Any) -> Bools:
    """Which entries are numbers, neither NaN nor infinite."""
    found: Bools = space_of(x).finite(x)
    return found


def clean(x: Any) -> Any:
    """0 for what is no number, with the derivative of x all the same: what a clean slot there would receive."""
    space = space_of(x)
    return space.clean(x) if hasattr(space, "clean") else where(finite(x), x, 0)


def minus_infinite(x: Any) -> Bools:
    """Which entries are −∞, the bias that means masked."""
    found: Bools = space_of(x).minus_infinite(x)
    return found


def row_max(x: Any, live: Bools) -> Any:
    """Midpoint of the largest live entry of the last axis (kept), 0 where none is live; detached.

    Only a shift that cancels: a wrong choice costs digits, never truth.
    """
    return space_of(x).row_max(x, live)


def stop(x: Any) -> Any:
    """The same number with no derivative: what a paper detaches."""
    return space_of(x).stop(x)


def stored(x: Any, *, cotangent: bool = False) -> Any:
    """Mark a result that a kernel may keep in its storage type (the cotangent of it, if so said).

    Exact spaces pass it on unchanged; the running bound of a precision profile rounds here (docs/tolerance.md).
    """
    return space_of(x).stored(x, cotangent)


def softmax_attend(
    s: Any, live: Bools, v: Any, *, sink: Any = None, keep: Any = None, spoiled: Bools | None = None
) -> tuple[Any, Any]:
    r"""Softmax over the live keys, then the mean of the values: the end of every softmax attention.

        p_ij = exp(s_ij − m_i) [live_ij],   z_i = Σ_j p_ij + exp(sink − m_i),   out_i = Σ_j keep_ij p_ij v_j / z_i
        lse_i = m_i + log z_i

    s (B,H,Lq,Lk); live broadcastable to it; v (B,G,Lk,Dv), head h reading h // (H/G); sink (H,); keep like live,
    holding 1/probability or 0. `spoiled` (like live) are pairs whose score came from a number that is not finite.
    A row with nothing live has out 0 and lse −∞ (with a sink, lse = sink). What is not finite in a live pair makes
    its row NaN; in a pair that is not live it touches nothing.
    """
    batch, heads, lq, lk = s.shape
    groups, dv = v.shape[1], v.shape[3]
    live = np.broadcast_to(live, s.shape)
    bad = live & ~finite(s) if spoiled is None else live & (spoiled | ~finite(s))
    s = stored(where(live, clean(s), 0), cotangent=True)
    columns = live
    if sink is not None:
        s = concatenate([s, broadcast(reshape(sink, (1, heads, 1, 1)), (batch, heads, lq, 1))], -1)
        columns = np.concatenate([live, np.ones((batch, heads, lq, 1), bool)], -1)
    empty, keyless = ~np.any(columns, -1), ~np.any(live, -1, keepdims=True)
    m = row_max(s, columns)
    p = where(columns, exp(where(columns, s - m, 0)), 0)
    z = where(empty, 1, total(p, -1))
    lse = where(empty, real(-np.inf, s), reshape(m, z.shape) + log(z))
    w = p[..., :lk] if sink is not None else p
    w = stored(w) if keep is None else stored(w) * keep
    if bad.any():
        # On the weights of the live keys alone, so that forwards and backwards no other key hears of it.
        w = w * where(live & np.any(bad, -1, keepdims=True), real(np.nan, s), real(1, s))
        lse = lse * where(np.any(bad, -1), real(np.nan, s), real(1, s))
    grouped = (batch, groups, heads // groups, lq)
    mean = einsum("bgrij,bgjd->bgrid", reshape(w, (*grouped, lk)), clean(v))
    mean, size = reshape(mean, (batch, heads, lq, dv)), reshape(z, (batch, heads, lq, 1))
    out = stored(where(keyless, 0, mean) / where(keyless, 1, size))
    v_ok = finite(v)
    if not v_ok.all():
        # A value that is no number spoils its row's weights backwards, never another value: dv is a weight.
        reach = live.reshape(*grouped, lk).astype(np.float64)
        hit = (reach @ (~v_ok).astype(np.float64)[:, :, None] > 0).reshape(out.shape)
        out = out + total(w, -1, keepdims=True) * where(hit, real(np.nan, s), real(0, s))
    return out, lse
