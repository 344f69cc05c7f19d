"""A Score plan as the arrays that kernels read: fixed ranks and dtypes, C order; what broadcasts is not expanded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.plan import Dense, Score, Slope, Table
from refattn.scoring import differences, span, summed

Array = NDArray[Any]


class Operands(NamedTuple):
    """What a Score kernel reads; T is the type it computes in, float32 or float64.

    q (B,Hq,Lq,D), k (B,Hkv,Lk,D), v (B,Hkv,Lk,Dv) T. constants (4,) T: scale, softcap (0 for none), 1/keep probability,
    sigmoid bias; sigmoid: whether weights are single keys' sigmoids instead of a softmax.
    span (2,) int64: least and greatest position(j) − position(i) that is visible. q_at, q_segment (1 or B, Lq), k_at,
    k_segment (1 or B, Lk) int64; q_length, k_length (B,) int64. masks, keeps (boolean) and biases (T) are stacks.
    slopes (Hq,) T, the sum of all; table (Hq, n) T, the sum of all, its first column for the difference `low`, n = 0
    for none; sink (Hq,) T, −∞ for none.

    A *stack* of m arrays that broadcast to (B,Hq,Lq,Lk) is their elements in one flat array and strides (m, 5): where
    each begins, and what one step in b, h, i, j adds, 0 where it is repeated.
    """

    q: Array
    k: Array
    v: Array
    constants: Array
    span: Array
    q_at: Array
    k_at: Array
    q_length: Array
    k_length: Array
    q_segment: Array
    k_segment: Array
    masks: Array
    mask_strides: Array
    keeps: Array
    keep_strides: Array
    biases: Array
    bias_strides: Array
    slopes: Array
    table: Array
    low: int
    sink: Array
    sigmoid: bool


def prepare(plan: Score, kind: type[np.floating[Any]]) -> Operands:
    """Operands of a plan whose leaves are float64 arrays, converted once to the type computed in.

    What is not finite becomes NaN where it will be read: a whole row of q or k, for no score from it is a number; one
    entry of v, so that a weight of 0 does not hide it.

    Raises
    ------
    ShapeError
        A table lacks a position difference that occurs.
    """
    batch, heads, lq, _ = plan.q.shape
    lk = plan.k.shape[2]
    q_length, k_length = plan.lengths or (np.full(batch, lq), np.full(batch, lk))
    segments = plan.segments or (np.zeros((1, 1), np.int64), np.zeros((1, 1), np.int64))
    masks, mask_strides = stacked([] if plan.mask is None else [plan.mask], np.bool_)
    keeps, keep_strides = stacked([] if plan.keep is None else [plan.keep[0]], np.bool_)
    biases, bias_strides = stacked([b.values for b in plan.bias if isinstance(b, Dense)], kind)
    low, count = differences(plan)
    slopes = np.sum([b.slopes for b in plan.bias if isinstance(b, Slope)], axis=0) + np.zeros(heads)
    probability = 1.0 if plan.keep is None else plan.keep[1]
    return Operands(
        q=rows(converted(plan.q, kind)),
        k=rows(converted(plan.k, kind)),
        v=_entries(converted(plan.v, kind)),
        constants=converted([plan.scale, plan.softcap or 0.0, 1 / probability, plan.sigmoid_bias], kind),
        span=converted(span(plan), np.int64),
        q_at=_each(plan.positions[0], lq),
        k_at=_each(plan.positions[1], lk),
        q_length=converted(q_length, np.int64),
        k_length=converted(k_length, np.int64),
        q_segment=_each(segments[0], lq),
        k_segment=_each(segments[1], lk),
        masks=masks,
        mask_strides=mask_strides,
        keeps=keeps,
        keep_strides=keep_strides,
        biases=biases,
        bias_strides=bias_strides,
        slopes=converted(slopes, kind),
        table=converted(summed([b for b in plan.bias if isinstance(b, Table)], heads, low, count), kind),
        low=low,
        sink=converted(np.full(heads, -np.inf) if plan.sink is None else plan.sink, kind),
        sigmoid=plan.normalizer == "sigmoid",
    )


def converted(given: Any, kind: Any) -> Array:
    """As a kernel takes an array: of that dtype, C-contiguous, aligned and writeable, copied only where it is not."""
    if isinstance(given, np.ndarray) and given.flags.carray and given.dtype == kind:
        return given
    with np.errstate(over="ignore"):
        return np.require(given, kind, ["C_CONTIGUOUS", "ALIGNED", "WRITEABLE"])


def rank4(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with leading axes of size 1, four in all."""
    return (1,) * (4 - len(shape)) + shape


def stacked(arrays: Sequence[Array], kind: Any) -> tuple[Array, Array]:
    """A stack: the elements of all arrays, and their strides."""
    strides, start = np.zeros((len(arrays), 5), np.int64), 0
    for row, array in zip(strides, arrays, strict=True):
        shape = rank4(array.shape)
        step = np.cumprod((1, *shape[:0:-1]))[::-1]
        row[:] = start, *np.where(np.array(shape) > 1, step, 0)
        start += array.size
    return converted(np.concatenate([np.zeros(0, kind), *(np.ravel(a) for a in arrays)]), kind), strides


def _each(integers: Array, length: int) -> Array:
    """One integer for each row or key: (1 or B, length)."""
    return converted(np.broadcast_to(integers, (integers.shape[0], length)), np.int64)


def rows(array: Array) -> Array:
    """NaN in the whole of a row where an entry is not finite."""
    finite = np.isfinite(array).all(-1, keepdims=True)
    return array if finite.all() else np.where(finite, array, array.dtype.type(np.nan))


def _entries(array: Array) -> Array:
    finite = np.isfinite(array)
    return array if finite.all() else np.where(finite, array, array.dtype.type(np.nan))
