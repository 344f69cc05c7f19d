"""Which plans the fast kernels take, and how they are given to them."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

import numpy as np

from refattn.engines.cpu import decode
from refattn.engines.cpu.blocks import blocks, stored
from refattn.engines.cpu.cached import buffers
from refattn.engines.cpu.cached import norms as norms_of
from refattn.engines.cpu.forward import kernel, shape_for
from refattn.engines.cpu.operands import converted, rows, stacked
from refattn.engines.cpu.pool import together
from refattn.engines.cpu.skipping import norms
from refattn.engines.cpu.storage import bits, storage_of, widened
from refattn.engines.cpu.tiles import BOTTOM
from refattn.engines.cpu.vectors import FLOAT32, INT8
from refattn.engines.cpu.work import KEYS, LOG2E, Array, Arrays, Results, scratch, tiles_of
from refattn.plan import Dense, Score, Slope, Table, keys
from refattn.scoring import differences, span, summed

Found = TypeVar("Found")

_FARTHEST = 1 << 29  # differences of positions stay well inside int32
_LARGEST = 1e30  # a few factors below do not overflow
_MARGIN = 64  # rows in a tile at most: what a tile reads of a table beyond its columns


def _once(find: Callable[[Score], Found]) -> Callable[[Score], Found]:
    """The function, asked once for each plan, and what it found forgotten with the plan."""
    known: WeakKeyDictionary[Score, Found] = WeakKeyDictionary()

    @wraps(find)
    def found(plan: Score) -> Found:
        try:
            return known[plan]
        except KeyError:
            known[plan] = result = find(plan)
            return result

    return found


@_once
def takes(plan: Score) -> bool:
    """Whether the kernel computes all that the plan asks for."""
    numbers = plan.q.size and plan.k.size and plan.v.size and keys(plan)
    if plan.keep is not None or plan.relative or plan.v_table or not numbers:
        return False
    integers = [*plan.positions, *(plan.segments or ())]
    if any(a.size and max(-int(a.min()), int(a.max())) > _FARTHEST for a in integers):
        return False
    if any(isinstance(b, Slope) for b in plan.bias) and max(int(np.abs(a).max()) for a in plan.positions) > 1 << 23:
        return False
    low, high = span(plan)
    factors = [plan.scale or 1.0, *([] if plan.softcap is None else [plan.softcap, (plan.scale or 1.0) / plan.softcap])]
    if low > high or not all(1 / _LARGEST < abs(number) < _LARGEST for number in factors):
        return False
    return plan.sink is None or bool((np.abs(plan.sink[~np.isneginf(plan.sink)]) < _LARGEST).all())


def few(plan: Score, count: int, lk: int) -> bool:
    """Whether the decode kernel is to run the plan: so many rows of queries share each key head of lk keys."""
    return plan.normalizer == "softmax" and decode.suits(count, lk)


def run(plan: Score, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """Out (B,Hq,Lq,Dv), lse and which rows are to be made again (B,Hq,Lq).

    q, k, v are the plan's, C order, q in float32, k and v stored alike in a way that `storage_of` knows; without
    infinities in q, without pages and scales. Where `few` says so they may have all that, in a way that `stored`
    knows, and k and v in any order. What is not finite in v reaches all rows of a tile, masked or not: they are to
    be made again.
    """
    if few(plan, q.shape[1] // k.shape[1] * q.shape[2], keys(plan)):
        return _few(plan, q, k, v)
    x = arrays(plan, q, k, v)
    *found, finite = _tiled(x, storage_of(k) or FLOAT32)
    if not finite:
        # A logit of −∞ that a key's infinity makes has counted as masked.
        *found, _ = _tiled(arrays(plan, q, rows(widened(k)), widened(v)), FLOAT32)
    out, lse, redo = found
    return out, lse, redo


def _tiled(x: Arrays, storage: int) -> tuple[Array, Array, Array, bool]:
    """As `run`, of rows that are not few; and whether k is finite."""
    batch, heads, groups, lq, lk, depth, width = x.sizes
    size = batch, heads, lq
    out, lse = np.empty((*size, width), np.float32), np.empty(size, np.float32)
    redo, counter = np.empty(size, np.bool_), np.zeros(2, np.int64)
    results = Results(out.reshape(-1), lse.reshape(-1), redo.reshape(-1))
    shape = shape_for(heads // groups, lq, storage)
    tasks = batch * groups * tiles_of(heads // groups, lq, shape.rows)
    work = lse.size * lk * (depth + width)
    sizes = shape.rows, depth, width, shape.storage
    known = norms(x, shape.width, shape.storage)
    together(kernel(shape), lambda: (x, known, results, scratch(*sizes), counter), tasks, work)
    return out, lse, redo, not counter[1]


def _few(plan: Score, q: Array, k: Array, v: Array) -> tuple[Array, Array, Array]:
    """By the decode kernel, from the buffers of a cache where k and v have them."""
    code, held = stored(k) or FLOAT32, None if plan.pages is not None else buffers(k, v)
    if held is None:
        k, v = converted(k, k.dtype), converted(v, v.dtype)
    else:
        k, v = (buffer.memory for buffer in held)
    x = arrays(plan, q, k, v)
    known = None if held is None or code == INT8 else norms_of(x, held, code)
    return decode.run(x, blocks(plan, k.shape[2]), code, plan.pages is not None, known)


def arrays(plan: Score, q: Array, k: Array, v: Array) -> Arrays:
    """What the kernels read of a plan whose q, k, v are these, as `run` takes them."""
    return _still(plan)._replace(q=q.reshape(-1), k=bits(k), v=bits(v))


@_once
def _still(plan: Score) -> Arrays:
    """What does not depend on the numbers of q, k and v."""
    batch, heads, lq, depth = plan.q.shape
    groups, _, width = plan.v.shape[1:]
    lk = keys(plan)
    low, high = (min(max(end, -4 * _FARTHEST), 4 * _FARTHEST - 1) for end in span(plan))
    q_at, k_at = _each(plan.positions[0], lq), _each(plan.positions[1], lk)
    ends = _ends(k_at)
    if plan.segments is None:
        q_segment, k_segment, parts = np.zeros((1, lq), np.int32), _NO_SEGMENT, np.zeros((1, *ends.shape[1:]), np.int64)
    else:
        q_segment, k_segment = _each(plan.segments[0], lq), _each(plan.segments[1], lk)
        parts = _ends(k_segment)
    q_length, k_length = plan.lengths or (np.full(batch, lq), np.full(batch, lk))
    slopes = [b.slopes for b in plan.bias if isinstance(b, Slope)]
    table, zero = _table(plan, heads)
    dense = [b.values for b in plan.bias if isinstance(b, Dense)]
    masks, mask_strides = stacked([] if plan.mask is None else [plan.mask], np.bool_)
    biases, bias_strides = stacked(dense, np.float32)
    return Arrays(
        sizes=(batch, heads, groups, lq, lk, depth, width),
        q=_NONE,
        k=_NONE,
        v=_NONE,
        q_length=np.array(q_length, np.int64),
        k_length=np.array(k_length, np.int64),
        q_at=q_at,
        k_at=k_at,
        k_ends=ends,
        span=(low, high),
        q_segment=q_segment,
        k_segment=k_segment,
        k_parts=parts,
        sign=float(np.sign(plan.scale)),
        unit=abs(plan.scale) * LOG2E or 1.0,
        cap=(0.0, 0.0) if plan.softcap is None else ((abs(plan.scale) or 1.0) / plan.softcap, plan.softcap * LOG2E),
        sloping=bool(slopes),
        slopes=_in_base_2(sum(slopes, np.zeros(heads))),
        table=table,
        zero=zero,
        evenly=bool(table.size) and _evenly(q_at) and _evenly(k_at),
        biases=biases,
        bias_strides=bias_strides,
        masks=masks,
        mask_strides=mask_strides,
        sigmoid=plan.normalizer == "sigmoid",
        offset=plan.sigmoid_bias * LOG2E,
        sink=_in_base_2(np.full(heads, BOTTOM / LOG2E) if plan.sink is None else np.maximum(plan.sink, BOTTOM / LOG2E)),
    )


_NONE = np.zeros(0, np.float32)
_NO_SEGMENT = np.zeros((1, 1), np.int32)  # never read, for there is one segment


def _each(integers: Array, length: int) -> Array:
    """One int32 for each row or key: (1 or B, length)."""
    if integers.shape[1] != length:
        integers = np.broadcast_to(integers, (integers.shape[0], length))
    return np.array(integers, np.int32, order="C")


def _ends(integers: Array) -> Array:
    """Least and greatest of each tile of keys, (1 or B, tiles, 2)."""
    starts = np.arange(0, integers.shape[1], KEYS)
    ends = np.empty((integers.shape[0], starts.size, 2), np.int64)
    np.minimum.reduceat(integers, starts, axis=1, out=ends[..., 0])
    np.maximum.reduceat(integers, starts, axis=1, out=ends[..., 1])
    return ends


def _in_base_2(numbers: Array) -> Array:
    with np.errstate(over="ignore"):
        return np.array(numbers * LOG2E, np.float32, order="C")


def _table(plan: Score, heads: int) -> tuple[Array, int]:
    """Sum of the tables from the greatest difference down with a margin, and the column of the difference 0."""
    tables: list[Any] = [b for b in plan.bias if isinstance(b, Table)]
    if not tables:
        return np.zeros((heads, 0), np.float32), 0
    low, count = differences(plan)
    values = _in_base_2(summed(tables, heads, low, count)[:, ::-1])
    return np.pad(values, ((0, 0), (_MARGIN, _MARGIN))), low + count - 1 + _MARGIN


def _evenly(positions: Array) -> bool:
    return bool((np.diff(positions, axis=1) == 1).all())
