"""A Score plan as a kernel takes it: the form it is compiled for, and its arguments, with arrays for pointers."""
# ruff: noqa: PLR0917  as a kernel has them

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
from numpy.typing import NDArray

from refattn.engines.cuda.kernels import decode
from refattn.engines.cuda.kernels.cotangents import Cotangents
from refattn.engines.cuda.kernels.form import Arguments, Form, tiled
from refattn.plan import Dense, Score, Slope, Table, keys
from refattn.scoring import differences, span, summed

Array = NDArray[Any]

LOG2E = 1 / math.log(2.0)
STORAGE = ("float32", "bfloat16", "float16")
DEEPEST = 128  # of D and Dv, for more would not fit the registers
_FARTHEST = 1 << 29  # differences of positions stay well inside int32
_EXACT = 1 << 23  # differences of positions in float32
_LARGEST = 1e30  # a few factors below do not overflow


def refuses(plan: Score) -> str | None:  # noqa: PLR0911  a sentence each
    """What of a plan the kernels have not, as the end of a sentence, or None."""
    others = [("relative", "vectors by relative position"), ("v_table", "values by relative position")]
    others += [("keep", "dropout"), ("k_scale", "int8 keys"), ("v_scale", "int8 values")]
    for field, what in others:
        given = getattr(plan, field)
        if given is not None and not (isinstance(given, tuple) and not given):
            return what
    if plan.normalizer != "softmax":
        return "sigmoid weights"
    heads, pairs = (plan.q.shape[3], plan.v.shape[3]), plan.q.shape[2] * keys(plan)
    if not 1 <= min(heads) <= max(heads) <= DEEPEST:
        return f"heads of no numbers, or of more than {DEEPEST}"
    if max(plan.q.shape[2] * heads[1], 0 if plan.mask is None and not plan.bias else pairs) >= 1 << 31:
        return "so many rows and keys that an index has more than 32 bits"
    integers = [*plan.positions, *(plan.segments or ())]
    if any(a.size and max(-int(a.min()), int(a.max())) > _FARTHEST for a in integers):
        return "positions or segments beyond 2^29"
    if any(isinstance(b, Slope) for b in plan.bias) and any(np.abs(a).max() > _EXACT for a in plan.positions if a.size):
        return "slopes of positions beyond 2^23"
    factors = [plan.scale, *([] if plan.softcap is None else [plan.softcap, plan.scale / plan.softcap])]
    if any(number and not 1 / _LARGEST < abs(number) < _LARGEST for number in factors):
        return "a scale or softcap at the ends of float32"
    return None


def splits_of(plan: Score) -> int:
    """Into how many parts `decode` cuts the keys of a plan; 0 where the rows that share a key head are too many."""
    batch, heads, lq, _ = plan.q.shape
    groups, lk = plan.k.shape[1], keys(plan)
    if heads // groups * lq > decode.MOST or lk < decode.LEAST:
        return 0
    return min(-(-int(lk) // decode.LEAST), -(-decode.BLOCKS // int(batch * groups)))


def form_of(plan: Score, storage: str, wide: bool, split: bool = False) -> Form:
    """The form of a plan whose q, k and v are stored so."""
    (low, high), limit = span(plan), _limit(plan)
    return tiled(
        depth=plan.q.shape[3],
        width=plan.v.shape[3],
        storage=storage,
        wide=wide,
        positions=low > -limit or high < limit,
        segments=plan.segments is not None,
        mask=plan.mask is not None,
        slopes=any(isinstance(b, Slope) for b in plan.bias),
        table=any(isinstance(b, Table) for b in plan.bias),
        dense=any(isinstance(b, Dense) for b in plan.bias),
        softcap=plan.softcap is not None,
        split=split,
        paged=plan.pages is not None,
    )


def arguments(plan: Score, form: Form, q: Any, k: Any, v: Any, out: Any, lse: Any, *, splits: int = 1) -> Arguments:
    """What the kernel of the form is called with; q, k, v, out and lse stand in for the plan's, strides in elements."""
    kept = _STILL.setdefault(plan, {})
    if form not in kept:
        kept[form] = _still(plan, form)
    strides = {"q_strides": steps(q), "k_strides": steps(k), "v_strides": steps(v)}
    return kept[form]._replace(q=q, k=k, v=v, out=out, lse=lse, page=plan.k.shape[2], splits=splits, **strides)


_STILL: WeakKeyDictionary[Score, dict[Form, Arguments]] = WeakKeyDictionary()
_NONE = np.zeros(0, np.float32)


def _still(plan: Score, form: Form) -> Arguments:
    """What depends on neither q, k and v nor how many parts they are taken in, kept for the plan's next call."""
    batch, heads, lq, _ = plan.q.shape
    groups, lk = plan.k.shape[1], keys(plan)
    q_length, k_length = plan.lengths or (np.full(batch, lq), np.full(batch, lk))
    none = np.zeros((1, 0), np.int64)
    segments = plan.segments or (none, none)
    places = [_each(a, n) for a, n in zip(plan.positions, (lq, lk), strict=True)]
    parts = [_each(a, n if a.size else 0) for a, n in zip(segments, (lq, lk), strict=True)]
    table, zero = _table(plan, heads)
    dense, dense_strides = _stepped(_total([b.values for b in plan.bias if isinstance(b, Dense)]), np.float32)
    mask, mask_strides = _stepped(plan.mask, np.uint8)
    slopes = sum((b.slopes for b in plan.bias if isinstance(b, Slope)), np.zeros(heads))
    cap = (0.0, 0.0) if plan.softcap is None else (plan.scale / plan.softcap, plan.softcap * LOG2E)
    return Arguments(
        q=_NONE,
        k=_NONE,
        v=_NONE,
        out=_NONE,
        lse=_NONE,
        q_at=places[0],
        k_at=places[1],
        q_segment=parts[0],
        k_segment=parts[1],
        q_ends=_ends(places[0], parts[0], q_length, form.rows),
        k_ends=_ends(places[1], parts[1], k_length, form.keys),
        q_length=np.asarray(q_length, np.int32),
        k_length=np.asarray(k_length, np.int32),
        slopes=_in_base_2(slopes),
        sink=_in_base_2(np.full(heads, -np.inf) if plan.sink is None else plan.sink),
        table=table,
        dense=dense,
        mask=mask,
        heads=heads,
        share=heads // groups,
        lq=lq,
        lk=lk,
        q_strides=(0, 0, 0),
        k_strides=(0, 0, 0),
        v_strides=(0, 0, 0),
        at_strides=tuple(a.shape[1] if a.shape[0] > 1 else 0 for a in (places[0], parts[0], places[1], parts[1])),
        span=tuple(min(max(end, -4 * _FARTHEST), 4 * _FARTHEST - 1) for end in span(plan)),
        unit=np.float32(plan.scale * LOG2E),
        cap=tuple(map(np.float32, cap)),
        columns=table.shape[1],
        zero=zero,
        dense_strides=dense_strides,
        mask_strides=mask_strides,
        splits=1,
        pages=np.zeros(0, np.int32) if plan.pages is None else np.array(plan.pages, np.int32, order="C"),
        page=1,
        entries=0 if plan.pages is None else plan.pages.shape[1],
    )


def cotangents(
    plan: Score, dout: Any, out: Array, lse: Array, dlse: Array, dq: Any, dk: Any, dv: Any, slope: Any, sums: Any
) -> Cotangents:
    """What the backward kernels are given beside `arguments`; out, lse and dlse float32, dout as q is stored."""
    less = (np.asarray(dout, np.float64) * out).sum(-1) - dlse
    return Cotangents(
        dout=dout,
        level=np.where(np.isneginf(lse), np.float32(np.inf), _in_base_2(lse)),
        less=less.astype(np.float32),
        dq=dq,
        dk=dk,
        dv=dv,
        slope=slope,
        sums=sums,
        dout_strides=steps(dout),
        scale=np.float32(plan.scale),
    )


def steps(array: Any) -> tuple[int, ...]:
    """Elements from batch to batch, head to head, row to row."""
    return tuple(step // array.dtype.itemsize for step in array.strides[:3])


def _limit(plan: Score) -> int:
    """No difference of positions is larger."""
    return sum(int(np.abs(a).max()) for a in plan.positions if a.size)


def _each(integers: Array, length: int) -> Array:
    """One int32 for each row or key: (1 or B, length)."""
    return np.array(np.broadcast_to(integers, (integers.shape[0], length)), np.int32, order="C")


def _ends(places: Array, parts: Array, lengths: Array, size: int) -> Array:
    """Least and greatest position and segment of each tile, of what is inside its length, (B, tiles, 4) int32."""
    batch, length = len(lengths), places.shape[1]
    found = np.zeros((batch, -(-length // size), 4), np.int32)
    inside = np.arange(length) < np.asarray(lengths)[:, None]
    starts = np.arange(0, length, size)
    for column, given in ((0, places), (2, parts)):
        if given.size and found.size:
            low, high = np.where(inside, given, 2 * _FARTHEST), np.where(inside, given, -2 * _FARTHEST)
            np.minimum.reduceat(low, starts, axis=1, out=found[..., column])
            np.maximum.reduceat(high, starts, axis=1, out=found[..., column + 1])
    return found


def _in_base_2(numbers: Any) -> Array:
    with np.errstate(over="ignore"):
        return np.array(numbers * LOG2E, np.float32, order="C")


def _table(plan: Score, heads: int) -> tuple[Array, int]:
    """Sum of the tables, (Hq, n), and its column for the difference 0."""
    tables = [b for b in plan.bias if isinstance(b, Table)]
    low, count = differences(plan)
    return _in_base_2(summed(tables, heads, low, count)), -low


def _total(biases: Sequence[Array]) -> Array | None:
    """Sum of the biases; −∞ where one masks, whatever another holds."""
    if not biases:
        return None
    with np.errstate(invalid="ignore"):
        total, masked = sum(biases[1:], biases[0]), np.isneginf(biases[0])
        for bias in biases[1:]:
            masked = masked | np.isneginf(bias)
    return np.where(masked, -np.inf, total)


def _stepped(array: Any, kind: Any) -> tuple[Array, tuple[int, int, int, int]]:
    """The array flat, and what a step in b, h, i, j adds to an index, 0 where it is repeated."""
    if array is None:
        return np.zeros(0, kind), (0, 0, 0, 0)
    shape = (1,) * (4 - array.ndim) + array.shape
    step = np.cumprod((1, *shape[:0:-1]))[::-1]
    with np.errstate(over="ignore"):
        flat = np.array(array, kind, order="C").reshape(-1)
    return flat, tuple(np.where(np.array(shape) > 1, step, 0).tolist())
