"""The vocabulary of a reference: one text that runs on float64, on balls, on running bounds and on the tape.

Each function asks the space of its operands (`refattn.space`). Integers are exact everywhere and may stand in any
formula; other constants go through `real`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.space import Bools, Integers, apply, space_of
from refattn.trigonometric import half_turns


def real(value: Any, like: Any) -> Any:
    """An exact number in the space of `like`: int, Fraction, a float as the dyadic it is, or an array of these."""
    space = space_of(like)
    if isinstance(value, np.ndarray) and value.dtype == object:
        parts = [reshape(space.real(number), (1,)) for number in value.flat]
        return reshape(concatenate(parts, 0), value.shape)
    return space.real(value)


def constant(formula: Callable[[Any], Any], like: Any) -> Any:
    """`formula(like)`, which no input enters: a kernel is handed the number, rounded once, and does not derive it.

    The argument stands for `like` in every use of `real`.
    """
    space = space_of(like)
    return space.constant(formula) if hasattr(space, "constant") else formula(like)


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


def erf(x: Any) -> Any:
    """The error function (2/√π) ∫_0^x e^(−t²) dt."""
    return space_of(x).erf(x)


def pi(like: Any) -> Any:
    """The number π in the space of `like`."""
    return space_of(like).pi()


def sin_pi(turns: Any, like: Any) -> Any:
    """Sine of π times exact rationals, an array of Fractions, in the space of `like`; 0, 1 and −1 are exact."""
    space = space_of(like)
    return space.sin_pi(turns) if hasattr(space, "sin_pi") else half_turns(turns, 0)


def cos_pi(turns: Any, like: Any) -> Any:
    """Cosine of π times exact rationals, as `sin_pi`."""
    space = space_of(like)
    return space.cos_pi(turns) if hasattr(space, "cos_pi") else half_turns(turns, 1)


def sqrt(x: Any) -> Any:
    """Square root of x ≥ 0; at 0 it has no derivative."""
    return space_of(x).sqrt(x)


def maximum(a: Any, b: Any) -> Any:
    """The larger of two numbers, whose value needs no decision; where they are equal each has half the slope."""
    return apply("maximum", a, b)


def minimum(a: Any, b: Any) -> Any:
    """The smaller of two numbers; slopes as those of `maximum`."""
    return apply("minimum", a, b)


def clip(x: Any, low: Any, high: Any) -> Any:
    """Low where x is below it, high where above; the slope is 1 from low to high, both included."""
    space = space_of(x)
    return space.clip(x, low, high) if hasattr(space, "clip") else minimum(maximum(x, low), high)


def absolute(x: Any) -> Any:
    """|x|; its slope at 0 is 0."""
    return maximum(x, -x)


def sigmoid(x: Any) -> Any:
    """1 / (1 + e^−x)."""
    return 1 / (1 + exp(-x))


def softplus(x: Any) -> Any:
    """log(1 + e^x), for an x of any size."""
    return maximum(x, 0) + log(1 + exp(-absolute(x)))


def elu1(x: Any) -> Any:
    """1 + ELU(x): x + 1 above 0, e^x below."""
    return maximum(x, 0) + exp(minimum(x, 0))


def step(x: Any, at_zero: float) -> Any:
    """1 where x > 0, 0 where x < 0, `at_zero` where x is 0: the slope of what has a kink there."""
    return space_of(x).step(x, at_zero)


def peak(x: Any, live: Bools) -> Any:
    """1 at the largest live entry of the last axis, of several equals the first, and 0 elsewhere: the slope of `amax`.

    Proved spaces answer anything from 0 to 1 where they cannot tell.
    """
    return space_of(x).peak(x, np.broadcast_to(live, x.shape))


def amax(x: Any, live: Bools) -> Any:
    """Largest live entry of the last axis, 0 where none is live; of equals, the first has the slope."""
    return space_of(x).amax(x, np.broadcast_to(live, x.shape))


def top_k(x: Any, k: int) -> Integers:
    """Indices of the k largest of the last axis, the largest first, exact equals in their order.

    Raises
    ------
    Undecided
        The precision does not tell which is larger.
    """
    found: Integers = space_of(x).top_k(x, k)
    return found


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


def extend(cache: Any, rows: Any, axis: int) -> Any:
    """Rows behind a cache along an axis; on float64 they go into spare room, and nothing is copied."""
    space = space_of(cache, rows)
    if hasattr(space, "extend"):
        return space.extend(space.coerce(cache), space.coerce(rows), axis)
    return concatenate([cache, rows], axis)


def total(x: Any, axis: int | tuple[int, ...], keepdims: bool = False) -> Any:
    """Sum over axes."""
    return space_of(x).sum(x, axis, keepdims)


def einsum(letters: str, a: Any, b: Any) -> Any:
    """Two-operand einsum with explicit letters."""
    space = space_of(a, b)
    return space.einsum(letters, space.coerce(a), space.coerce(b))


def solve(a: Any, b: Any, least: float) -> Any:
    """The x of a x = b for a symmetric a (n,n) whose eigenvalues are at least `least` > 0, and b (n,m).

    For constants: a kernel that solved for itself could not be held to any bound.
    """
    space = space_of(a, b)
    return space.solve(space.coerce(a), space.coerce(b), least)


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


def certain(x: Any, live: Bools) -> Bools:
    """Rows with one live entry (kept axis), which a softmax weighs 1 whatever it is: exactly, and with no slope.

    None where a kernel's roundings are bounded, for a kernel may recompute that weight as it does any other.
    """
    space = space_of(x)
    alone = np.sum(live, -1, keepdims=True) == 1
    found: Bools = space.certain(x, alone) if hasattr(space, "certain") else alone
    return found


def stop(x: Any) -> Any:
    """The same number with no derivative: what a paper detaches."""
    return space_of(x).stop(x)


def stored(x: Any, *, cotangent: bool = False) -> Any:
    """Mark a result that a kernel may keep in its storage type (the cotangent of it, if so said).

    Exact spaces pass it on unchanged; the running bound of a precision profile rounds here (docs/tolerance.md).
    """
    return space_of(x).stored(x, cotangent)


def softmax_attend(
    s: Any,
    live: Bools,
    v: Any,
    *,
    sink: Any = None,
    keep: Any = None,
    spoiled: Bools | None = None,
    relative: Sequence[tuple[Integers, Any]] = (),
) -> tuple[Any, Any]:
    r"""Softmax over the live keys, then the mean of the values: the end of every softmax attention.

        p_ij = exp(s_ij − m_i) [live_ij],   z_i = Σ_j p_ij + exp(sink − m_i),   out_i = Σ_j keep_ij p_ij v_j / z_i
        lse_i = m_i + log z_i

    s (B,H,Lq,Lk); live broadcastable to it; v (B,G,Lk,Dv), head h reading h // (H/G); sink (H,); keep like live,
    holding 1/probability or 0. relative: tables (n,Dv) or (H,n,Dv), each after which of its rows a pair adds to the
    value, (1 or B,Lq,Lk). `spoiled` (like live) are pairs whose score came from a number that is not finite.
    A row with nothing live has out 0 and lse −∞ (with a sink, lse = sink). What is not finite in a live pair makes
    its row NaN; in a pair that is not live it touches nothing.
    """
    batch, heads, lq, lk = s.shape
    live = np.broadcast_to(live, s.shape)
    bad = live & ~finite(s) if spoiled is None else live & (spoiled | ~finite(s))
    s = stored(where(live, clean(s), 0), cotangent=True)
    columns = live
    if sink is not None:
        s = concatenate([s, broadcast(reshape(sink, (1, heads, 1, 1)), (batch, heads, lq, 1))], -1)
        columns = np.concatenate([live, np.ones((batch, heads, lq, 1), bool)], -1)
    empty, keyless = ~np.any(columns, -1), ~np.any(live, -1, keepdims=True)
    m, alone = row_max(s, columns), certain(s, columns)
    p = where(columns, exp(where(columns & ~alone, s - m, 0)), 0)
    z = where(empty, 1, total(p, -1))
    lse = where(alone[..., 0], total(where(columns & alone, s, 0), -1), reshape(m, z.shape) + log(z))
    lse = where(empty, real(-np.inf, s), lse)
    w = p[..., :lk] if sink is not None else p
    w = stored(w) if keep is None else stored(w) * keep
    if bad.any():
        # On the weights of the live keys alone, so that forwards and backwards no other key hears of it.
        w = w * where(live & np.any(bad, -1, keepdims=True), real(np.nan, s), real(1, s))
        lse = lse * where(np.any(bad, -1), real(np.nan, s), real(1, s))
    mean = weighted(w, v, relative)
    size = reshape(z, (batch, heads, lq, 1))
    out = stored(where(keyless, 0, mean) / where(keyless, 1, size))
    v_ok = finite(v)
    if not v_ok.all():
        # A value that is no number spoils its row's weights backwards, never another value: dv is a weight.
        hit = where(reached(live, ~v_ok), real(np.nan, s), real(0, s))
        out = out + total(w, -1, keepdims=True) * hit
    return out, lse


def weighted(w: Any, v: Any, relative: Sequence[tuple[Integers, Any]]) -> Any:
    """Σ_j w_ij v_j for weights (B,H,Lq,Lk), values and tables as `softmax_attend` takes them, no number being 0."""
    (batch, heads, lq, lk), (groups, dv) = w.shape, v.shape[1::2]
    by_group = reshape(w, (batch, groups, heads // max(groups, 1), lq, lk))
    found = reshape(einsum("bgrij,bgjd->bgrid", by_group, clean(v)), (batch, heads, lq, dv))
    for which, table in relative:
        count = table.shape[-2]
        rows = np.broadcast_to(which[..., None] == np.arange(count), (batch, lq, lk, count)).astype(np.int64)
        letters = "bhin,nd->bhid" if table.ndim == 2 else "bhin,hnd->bhid"
        found = found + einsum(letters, einsum("bhij,bijn->bhin", w, real(rows, w)), table)
    return found


def reached(live: Bools, bad: Bools) -> Bools:
    """Where (B,H,Lq,Dv) a row of live (B,H,Lq,Lk) reads a bad entry (B,G,Lk,Dv) of the values."""
    (batch, heads, lq, lk), (groups, dv) = live.shape, bad.shape[1::2]
    by_group = live.reshape(batch, groups, heads // max(groups, 1), lq, lk).astype(np.float64)
    found: Bools = (by_group @ bad.astype(np.float64)[:, :, None] > 0).reshape(batch, heads, lq, dv)
    return found
