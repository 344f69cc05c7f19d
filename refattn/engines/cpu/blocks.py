"""Where keys and values stand: in a row or in blocks that a table names; and the scales of those that are integers."""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cpu.operands import Array
from refattn.engines.cpu.storage import storage_of
from refattn.engines.cpu.vectors import INT8
from refattn.engines.cpu.work import KEYS
from refattn.jit import inner
from refattn.plan import Score, keys


class Blocks(NamedTuple):
    """Key j of sequence b and key head g is slot j mod S of block table[b, j div S], of (N,Hkv,S,D).

    table (B,M) int64; keys in a row are one block for each sequence. size: S. left (B·Hkv,tiles) bool: tiles of keys
    that need not be read, (B·Hkv,0) for none. k_scale, v_scale: float32, flat, none for
    what is no integer; k_steps, v_steps (3,) int64: what one step in block, head and slot adds to an index of theirs.
    """

    table: Array
    size: int
    k_scale: Array
    k_steps: Array
    v_scale: Array
    v_steps: Array
    left: Array


def blocks(plan: Score, size: int) -> Blocks:
    """Of a plan whose k and v have so many slots in a block, or in a row: at least as many as keys."""
    table = np.arange(plan.q.shape[0])[:, None] if plan.pages is None else plan.pages
    return Blocks(np.array(table, np.int64), size, *_flat(plan.k_scale), *_flat(plan.v_scale), _NONE)


def _flat(scale: Any) -> tuple[Array, Array]:
    """What is repeated of a scale is taken once."""
    if scale is None:
        return np.zeros(0, np.float32), np.zeros(3, np.int64)
    once = scale[tuple(slice(None, None if step else 1) for step in scale.strides)]
    steps = np.where(np.array(once.shape) > 1, np.cumprod((1, *once.shape[:0:-1]))[::-1], 0)
    return np.array(once, np.float32, order="C").reshape(-1), steps.astype(np.int64)


_NONE = np.zeros((1, 0), np.bool_)


def stored(array: Array) -> int | None:
    """As `storage_of`, of integers of 8 bits too, which `decode` alone reads."""
    return INT8 if array.dtype == np.int8 else storage_of(array)


def packed(plan: Score) -> bool:
    """Whether keys or values stand in blocks or are integers."""
    return not (plan.pages is plan.k_scale is plan.v_scale is None)


def paged_alone(plan: Score) -> bool:
    """Whether keys and values stand in blocks and are no integers."""
    return plan.pages is not None and plan.k_scale is plan.v_scale is None


def in_a_row(plan: Score, k: Array, v: Array) -> Score:
    """The plan with k (B,Hkv,Lk,D) and v (B,Hkv,Lk,Dv) in a row: integers times scales in float32, else as stored.

    k and v stand in for those of the plan. What lies beyond a sequence's length becomes 0.
    """
    found: dict[str, Any] = {}
    for name, kept in (("k", k), ("v", v)):
        scale = getattr(plan, f"{name}_scale")
        real = _gathered(plan, kept)
        if scale is not None:
            with np.errstate(invalid="ignore", over="ignore"):
                by = np.asarray(scale if plan.pages is None else _gathered(plan, scale), np.float32)
                real = np.multiply(real, by[..., None], dtype=np.float32)
        if plan.lengths is not None and real is not kept:
            for row, length in zip(real, plan.lengths[1].tolist(), strict=True):
                row[:, length:] = 0
        found[name] = real
    return replace(plan, **found, pages=None, k_scale=None, v_scale=None)


def _gathered(plan: Score, kept: Array) -> Array:
    """Of blocks (N,Hkv,S,...) the slots of each sequence in a row; those beyond its length hold anything."""
    if plan.pages is None or plan.lengths is None:
        return kept
    (count, groups, size), lk = kept.shape[:3], keys(plan)
    if not count:
        return np.zeros((len(plan.pages), groups, lk, *kept.shape[3:]), kept.dtype)
    place = np.arange(lk)
    table = np.where(np.arange(plan.pages.shape[1]) * size < plan.lengths[1][:, None], plan.pages, 0)
    block, slot = (table[:, place // size], place % size) if lk else (np.zeros((len(table), 0), np.int64), place)
    found: Array = kept[block[:, None], np.arange(groups)[:, None], slot]
    return found


def on_pages(blocks: int, size: int, table: Array, lengths: Array, gradient: Array) -> Array:
    """Cotangent (N,Hkv,S,D) of N blocks from that of keys or values in a row (B,Hkv,M·S,D).

    A block that several sequences share has the sum of theirs.
    """
    found = np.zeros((blocks, gradient.shape[1], size, gradient.shape[3]), gradient.dtype)
    for names, length, row in zip(table, lengths.tolist(), gradient, strict=True):
        for m in range(-(-length // size)):
            found[names[m]] += row[:, m * size : (m + 1) * size]
    return found


@inner
def located(
    shape: int, x: Blocks, where: Array, b: int, g: int, groups: int, base: int, size: int, j: int, stop: int, near: int
) -> Any:
    """What tells where the keys from j on lie: the address of key j, or of a table of so many as a tile and `near`."""
    if shape >> 27 & 1:
        addresses(where[: KEYS + near], x, b, g, groups, base, size, j, stop)
        return np.int64(where.ctypes.data)
    return np.int64(base + ((b * groups + g) * x.size + j) * size)


@inner
def addresses(to: Array, x: Blocks, b: int, g: int, groups: int, base: int, size: int, j: int, stop: int) -> None:
    """Where the rows of `size` bytes of keys from j on begin; the last before `stop` stands in for those from it on."""
    n, many = 0, to.shape[0]
    while n < many and j + n < stop:
        m, slot = (j + n) // x.size, (j + n) % x.size
        first = base + ((x.table[b, m] * groups + g) * x.size + slot) * size
        run = min(many - n, stop - j - n, x.size - slot)
        for i in range(run):
            to[n + i] = first + i * size
        n += run
    for i in range(n, many):
        to[i] = to[n - 1]


@inner
def scales(to: Array, numbers: Array, steps: Array, x: Blocks, b: int, g: int, j: int, count: int) -> None:
    """Scales of the keys j to j + count."""
    n = 0
    while n < count:
        m, slot = (j + n) // x.size, (j + n) % x.size
        first = x.table[b, m] * steps[0] + g * steps[1] + slot * steps[2]
        run = min(count - n, x.size - slot)
        own, some = to[n : n + run], numbers[first:]
        if steps[2] == 1:
            for i in range(run):
                own[i] = some[i]
        else:
            own[:] = some[0]
        n += run
