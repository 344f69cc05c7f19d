"""Plans: the few computations that every variant lowers to, as frozen data, and their plain float64 meaning.

`execute` is the specification of the kernels: one row at a time, over the keys that row sees and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, overload

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, eq=False)
class Slope:
    """Logits −slope_h |j − i| for positions i, j; `slopes` (H,)."""

    slopes: Any


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """Logits values[h, (j − i) + offset] for positions i, j; `values` (H, n), −∞ for pairs that may not attend."""

    values: Any
    offset: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Dense:
    """Logits values[b, h, i, j] for row i and column j; broadcastable to (B, Hq, Lq, Lk), −∞ for masked."""

    values: Any


Bias = Slope | Table | Dense


@dataclass(frozen=True, kw_only=True, eq=False)
class Relative:
    """Logits rows · values[h, (j − i) + offset] for positions i, j: a vector for each difference, met by q or k.

    `values` (H or 1, n, W). side "q": `rows` (B,Hq,Lq,W), row i's vector; side "k": (B,Hkv,Lk,W), that of key j.
    Added to scale q·k before the softcap; no scale is applied to it.
    """

    rows: Any
    values: Any
    offset: int
    side: Literal["q", "k"] = "q"


@dataclass(frozen=True, kw_only=True, eq=False)
class ValueTable:
    """Adds values[h, (j − i) + offset] to the value of key j where row i reads it; `values` (H or 1, n, Dv)."""

    values: Any
    offset: int


@dataclass(frozen=True, kw_only=True, eq=False)
class Score:
    r"""Masked softmax attention over explicit keys; head h reads key head h // (Hq / Hkv).

        s_ij = softcap(scale q_i·k_j + Σ relative_ij) + Σ bias_ij
        out_i = Σ_j keep_ij softmax_j(s_i, sink) (v_j + Σ v_table_ij)

    With pages (B,M) and lengths, k, v and scales are blocks of S slots, k (N,Hkv,S,D): key j < Lk = M S of sequence b
    stands in slot j mod S of block pages[b, j div S]; entries and slots beyond its length may hold anything.
    k_scale and v_scale (B,Hkv,Lk) multiply the logit q_i·k_j and the value v_j of a key whose k and v are integers.
    With normalizer "sigmoid" the weight is 1 / (1 + exp(−s_ij − sigmoid_bias)), and there is no sink and no lse.
    Row i sees key j when: position(j) ≤ position(i) if causal; −left ≤ position(j) − position(i) ≤ right; both lie
    inside their lengths; their segments are equal; the mask says so; no bias is −∞.

    q (B,Hq,Lq,D); k (B,Hkv,Lk,D); v (B,Hkv,Lk,Dv); positions and segments pairs of (1 or B, Lq) and (1 or B, Lk)
    integers; lengths a pair of (B,) integers; mask boolean, broadcastable to (B,Hq,Lq,Lk); sink (Hq,) a logit each;
    keep (boolean broadcastable mask, probability): kept probabilities are divided by it after normalising.
    """

    q: Any
    k: Any
    v: Any
    scale: float
    positions: tuple[NDArray[np.int64], NDArray[np.int64]]
    causal: bool = False
    window: tuple[int | None, int | None] = (None, None)
    relative: tuple[Relative, ...] = ()
    softcap: float | None = None
    bias: tuple[Bias, ...] = ()
    mask: NDArray[np.bool_] | None = None
    lengths: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    segments: tuple[NDArray[np.int64], NDArray[np.int64]] | None = None
    sink: Any = None
    keep: tuple[NDArray[np.bool_], float] | None = None
    v_table: tuple[ValueTable, ...] = ()
    normalizer: Literal["softmax", "sigmoid"] = "softmax"
    sigmoid_bias: float = 0.0
    pages: NDArray[np.int64] | None = None
    k_scale: Any = None
    v_scale: Any = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Mix:
    """Weighted sum of the outputs of several plans, Σ weight · out; it has no lse.

    A weight is a real array broadcastable to (B,Hq,Lq,Dv).
    """

    parts: tuple[Plan, ...]
    weights: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Merge:
    """One softmax over the key sets of several plans, at most one of which has a sink.

    lse = log Σ exp(lse of a part); out = Σ exp(lse of the part − lse) · out of the part.
    """

    parts: tuple[Plan, ...]


@dataclass(frozen=True, kw_only=True, eq=False)
class Recurrent:
    r"""A memory S (F,Dv) of each key head, read row by row and written where a segment of keys ends; it has no lse.

        out_i = f_i S / (max(f_i·z, clamp) + add)      of the memory at the beginning of the row's segment
        S' = A S + Σ_j g_j u_jᵀ,   z' = z + Σ_j g_j,   u_j = v_j, or by the delta rule v_j − what g_j reads of S

    q (B,Hq,Lq,F) the features f; k (B,Hkv,Lk,F) the features g; v (B,Hkv,Lk,Dv); memory (B,Hkv,F,Dv) and weight
    (B,Hkv,F), S and z at the beginning; transition (F,F) is A, None the identity. Key j is in segment j // segment; the
    first Lk − Lq keys have no rows, row i stands at key Lk − Lq + i. Without weight no reading is divided. A divisor
    of 0 reads 0. weighed: whether z is written on once it is no longer 0.
    """

    q: Any
    k: Any
    v: Any
    memory: Any
    weight: Any = None
    transition: Any = None
    segment: int
    delta: bool = False
    weighed: bool = True
    clamp: float = 0.0
    add: float = 0.0


Plan = Score | Mix | Merge | Recurrent

_REAL_LEAVES = {
    Score: ("q", "k", "v", "sink", "k_scale", "v_scale"),
    Recurrent: ("q", "k", "v", "memory", "weight", "transition"),
}


def leaves(plan: Plan) -> dict[str, Any]:
    """The numbers of a plan by name: q, k, v, sink, k_scale, v_scale, bias.0, ..., relative.0.rows, ..., v_table.0.

    Of a Mix or Merge: those of part n under n.q, n.k, ..., and weight.0, weight.1, ...
    """
    if isinstance(plan, (Mix, Merge)):
        parts = {f"{n}.{name}": leaf for n, part in enumerate(plan.parts) for name, leaf in leaves(part).items()}
        return parts | {f"weight.{n}": weight for n, weight in enumerate(getattr(plan, "weights", ()))}
    found = {name: getattr(plan, name) for name in _REAL_LEAVES[type(plan)] if getattr(plan, name) is not None}
    if isinstance(plan, Recurrent):
        return found
    found |= {f"bias.{n}": _values(bias) for n, bias in enumerate(plan.bias)}
    for n, relative in enumerate(plan.relative):
        found |= {f"relative.{n}.rows": relative.rows, f"relative.{n}.values": relative.values}
    return found | {f"v_table.{n}": table.values for n, table in enumerate(plan.v_table)}


@overload
def map_leaves(plan: Score, change: Callable[[Any], Any]) -> Score: ...


@overload
def map_leaves(plan: Mix, change: Callable[[Any], Any]) -> Mix: ...


@overload
def map_leaves(plan: Merge | Recurrent, change: Callable[[Any], Any]) -> Merge | Recurrent: ...


def map_leaves(plan: Plan, change: Callable[[Any], Any]) -> Plan:
    """The same plan with every array of numbers that `leaves` names replaced by change(array)."""
    if isinstance(plan, Mix):
        parts = tuple(map_leaves(part, change) for part in plan.parts)
        return replace(plan, parts=parts, weights=tuple(change(weight) for weight in plan.weights))
    if isinstance(plan, Merge):
        return replace(plan, parts=tuple(map_leaves(part, change) for part in plan.parts))
    kept = _REAL_LEAVES[type(plan)]
    named = {name: change(getattr(plan, name)) for name in kept if getattr(plan, name) is not None}
    if isinstance(plan, Recurrent):
        return replace(plan, **named)
    bias = tuple(replace(b, **{_field(b): change(_values(b))}) for b in plan.bias)
    relative = tuple(replace(r, rows=change(r.rows), values=change(r.values)) for r in plan.relative)
    v_table = tuple(replace(table, values=change(table.values)) for table in plan.v_table)
    return replace(plan, bias=bias, relative=relative, v_table=v_table, **named)


def _field(bias: Bias) -> str:
    return "slopes" if isinstance(bias, Slope) else "values"


def _values(bias: Bias) -> Any:
    return getattr(bias, _field(bias))


def execute(plan: Plan) -> dict[str, Floats]:
    """Out (B,Hq,Lq,Dv) and, of a Merge and of a softmax, lse (B,Hq,Lq) of a plan in float64, row by row."""
    if isinstance(plan, Mix):
        outs = [weight * execute(part)["out"] for part, weight in zip(plan.parts, plan.weights, strict=True)]
        return {"out": np.sum(outs, axis=0)}
    if isinstance(plan, Merge):
        return _merged([execute(part) for part in plan.parts])
    if isinstance(plan, Recurrent):
        return {"out": _recur(plan)}
    batch, heads, lq, _ = plan.q.shape
    groups, _, dv = plan.v.shape[1:]
    out, lse = np.zeros((batch, heads, lq, dv)), np.full((batch, heads, lq), -np.inf)
    for b, h, i in np.ndindex(batch, heads, lq):
        g = h // (heads // groups)
        seen = np.flatnonzero(sees(plan, b, h, i))
        s = plan.scale * (_or_nan(_kept(plan, plan.k, b, g, seen)) @ _or_nan(plan.q[b, h, i]))
        if plan.k_scale is not None:
            s = s * _or_nan(_kept(plan, plan.k_scale, b, g, seen))
        for r in plan.relative:
            rows = r.rows[b, h, i] if r.side == "q" else r.rows[b, g, seen]
            s = s + (_or_nan(rows) * _row(r, plan, b, h, i)[seen]).sum(-1)
        if plan.softcap is not None:
            s = plan.softcap * np.tanh(s / plan.softcap)
        for bias in plan.bias:
            s = s + row_of(bias, plan, b, h, i)[seen]
        s = _or_nan(s)
        sink = -np.inf if plan.sink is None else plan.sink[h]
        lse[b, h, i] = np.logaddexp.reduce(s, initial=sink)
        if seen.size:
            each = lse[b, h, i] if plan.normalizer == "softmax" else np.logaddexp(s, -plan.sigmoid_bias)
            weight = np.exp(s - each) / (1.0 if plan.keep is None else plan.keep[1])
            if plan.keep is not None:
                weight = weight * _entry(plan.keep[0], b, h, i, keys(plan))[seen]
            values = _or_nan(_kept(plan, plan.v, b, g, seen))
            if plan.v_scale is not None:
                values = values * _or_nan(_kept(plan, plan.v_scale, b, g, seen))[:, None]
            out[b, h, i] = weight @ sum((_row(table, plan, b, h, i)[seen] for table in plan.v_table), values)
    return {"out": out, "lse": lse} if plan.normalizer == "softmax" else {"out": out}


def _merged(parts: list[dict[str, Floats]]) -> dict[str, Floats]:
    lse = np.logaddexp.reduce([part["lse"] for part in parts], axis=0)
    top = np.where(np.isneginf(lse), 0.0, lse)
    outs = [np.where(np.isneginf(p["lse"]), 0.0, np.exp(p["lse"] - top))[..., None] * p["out"] for p in parts]
    return {"out": np.sum(outs, axis=0), "lse": lse}


def _recur(plan: Recurrent) -> Floats:
    batch, heads, rows, _ = plan.q.shape
    groups, keys, dv = plan.v.shape[1:]
    out = np.zeros((batch, heads, rows, dv))
    for b, g in np.ndindex(batch, groups):
        k, v, s = plan.k[b, g], plan.v[b, g], plan.memory[b, g]
        z = None if plan.weight is None else plan.weight[b, g]
        for j in range(keys):
            if j and j % plan.segment == 0:
                past = slice(j - plan.segment, j)
                written = v[past] - np.array([_read(plan, f, s, z) for f in k[past]]) if plan.delta else v[past]
                kept = s if plan.transition is None else plan.transition @ s
                s = kept + k[past].T @ written
                z = z + k[past].sum(0) if z is not None and (plan.weighed or not z.any()) else z
            i = j - (keys - rows)
            for h in range(g * heads // groups, (g + 1) * heads // groups):
                if i >= 0:
                    out[b, h, i] = _read(plan, plan.q[b, h, i], s, z)
    return out


def _read(plan: Recurrent, f: Floats, s: Floats, z: Floats | None) -> Floats:
    if z is None:
        return f @ s
    size = max(float(f @ z), plan.clamp) + plan.add
    return np.zeros(s.shape[1]) if size == 0 else f @ s / size


def _or_nan(array: Floats) -> Floats:
    """NaN for what is not finite: a live infinity has no meaning that a softmax could give it."""
    return np.where(np.isfinite(array), array, np.nan)


def keys(plan: Score) -> int:
    """Lk: the places for keys that each sequence has."""
    return int(plan.k.shape[2] * (1 if plan.pages is None else plan.pages.shape[1]))


def _kept(plan: Score, kept: NDArray[Any], b: int, g: int, seen: NDArray[np.intp]) -> NDArray[Any]:
    """Of an array that is kept as k is, what belongs to these keys of key head g in sequence b."""
    if plan.pages is None:
        return np.asarray(kept[b, g, seen])
    block, slot = np.divmod(seen, kept.shape[2])
    return np.asarray(kept[plan.pages[b, block], g, slot])


def sees(plan: Score, b: int, h: int, i: int) -> NDArray[np.bool_]:
    """Which of the Lk keys row i of head h in batch b may attend to."""
    lk = keys(plan)
    r = relative(plan, b, i)
    live = np.ones(lk, bool)
    if plan.causal:
        live &= r <= 0
    left, right = plan.window
    if left is not None:
        live &= r >= -left
    if right is not None:
        live &= r <= right
    if plan.lengths is not None:
        live &= (np.arange(lk) < plan.lengths[1][b]) & (i < plan.lengths[0][b])
    if plan.segments is not None:
        q_segment, k_segment = (a[b % a.shape[0]] for a in plan.segments)
        live &= k_segment == q_segment[i]
    if plan.mask is not None:
        live &= _entry(plan.mask, b, h, i, lk)
    for bias in plan.bias:
        live &= ~np.isneginf(row_of(bias, plan, b, h, i))
    return live


def relative(plan: Score, b: int, i: int) -> NDArray[np.int64]:
    """Positions of the keys minus the position of row i, (Lk,)."""
    q_position, k_position = (a[b % a.shape[0]] for a in plan.positions)
    distance: NDArray[np.int64] = k_position - q_position[i]
    return distance


def row_of(bias: Bias, plan: Score, b: int, h: int, i: int) -> Floats:
    """A bias's logits for one row, (Lk,)."""
    if isinstance(bias, Slope):
        return np.asarray(-bias.slopes[h] * np.abs(relative(plan, b, i)))
    if isinstance(bias, Table):
        return np.asarray(bias.values[h][relative(plan, b, i) + bias.offset])
    return _entry(bias.values, b, h, i, keys(plan))


def _row(table: Relative | ValueTable, plan: Score, b: int, h: int, i: int) -> Floats:
    """A table's vectors for one row, (Lk, width)."""
    return np.asarray(table.values[h % table.values.shape[0]][relative(plan, b, i) + table.offset])


def _entry(array: NDArray[Any], b: int, h: int, i: int, lk: int) -> NDArray[Any]:
    """Row (b, h, i) of an array broadcastable to (B, H, Lq, Lk)."""
    full = array.reshape((1,) * (4 - array.ndim) + array.shape)
    row = full[b % full.shape[0], h % full.shape[1], i % full.shape[2]]
    return np.broadcast_to(row, (lk,))


def describe(plan: Any) -> Mapping[str, Any]:
    """Field names and the shapes or values they hold, for `explain`."""
    shown = {}
    for field in fields(plan):
        value = getattr(plan, field.name)
        if value is not None and not (isinstance(value, tuple) and not value):
            shown[field.name] = _show(value)
    return shown


def _show(value: Any) -> Any:
    if is_dataclass(value):
        return {type(value).__name__: {f.name: _show(getattr(value, f.name)) for f in fields(value)}}
    if isinstance(value, tuple):
        return tuple(_show(item) for item in value)
    return tuple(value.shape) if hasattr(value, "shape") and value.shape else value
