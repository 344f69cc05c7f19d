"""Norms of a cache: what has to be known of keys and values before `decode` may leave some out, by `remote`.

Decoding reads each key once, so a bound spares reading only if it was there before: it is state of the cache. A cache
is what `refattn.extend` grows. A slot of its buffer is written once, so a whole tile of keys is measured when a call
first meets it and never again; tiles that are not whole yet are always read. Norms are kept beside the buffer and go
with it: they follow from k and v, so states and files do not hold them.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from threading import Lock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np

from refattn.cache import Buffer, whole
from refattn.engines.cpu import bounds, skipping, tiles, vectors, work
from refattn.engines.cpu.bounds import peaks, squares
from refattn.engines.cpu.pool import spread
from refattn.engines.cpu.skipping import SHORTEST, SLACK
from refattn.engines.cpu.storage import bits, widened
from refattn.engines.cpu.work import KEYS, Array, Arrays
from refattn.jit import bare, lanes, stamp

NEVER = -(2.0**100)  # logarithm of what is too small to count


class Norms(NamedTuple):
    """Of the first `measured` tiles of a cache; T = B·Hkv.

    centre (T,D) c; keys (T,tiles) the greatest |k − c| of a tile, ∞ where one is not finite. scales (T,Dv) s_d, and
    since (T,Dv) the tile that it is of; values (T,tiles) log₂ of the greatest |v_d| / s_d. keys_before, values_before:
    the greatest of a tile and all before it.
    """

    measured: int
    centre: Array
    keys: Array
    keys_before: Array
    scales: Array
    since: Array
    values: Array
    values_before: Array


class _Known:
    """What is known of the first `count` tiles of a buffer of keys or values; `base` is c or s_d."""

    def __init__(self, buffer: Buffer, base: Array) -> None:
        self.count, self.lock, self.base, self.since = 0, Lock(), base, np.zeros(base.shape, np.int64)
        self.each, self.before = (np.empty((len(base), buffer.memory.shape[2] // KEYS), np.float32) for _ in range(2))


_keys: WeakKeyDictionary[Buffer, _Known] = WeakKeyDictionary()
_values: WeakKeyDictionary[Buffer, _Known] = WeakKeyDictionary()
_first = Lock()


def buffers(k: Array, v: Array) -> tuple[Buffer, Buffer] | None:
    """Those in which k and v begin with the first slot, if slots lie alike in both; None for other arrays."""
    of_k, of_v = whole(k, 2), whole(v, 2)
    if of_k is None or of_v is None or k.dtype != v.dtype or of_k.memory.shape[2] != of_v.memory.shape[2]:
        return None
    return of_k, of_v


def norms(x: Arrays, held: tuple[Buffer, Buffer], storage: int) -> Norms | None:
    """Of a cache, where the plan's bias falls with distance and has no array to be searched; else None."""
    lk, depth = x.sizes[4:6]
    if not x.sloping or lk < SHORTEST or depth > skipping.DEEPEST or os.environ.get(skipping.VARIABLE) == "0":
        return None
    if x.bias_strides.size or x.table.size or not (x.slopes > 0).any() or (x.slopes < 0).any():
        return None
    count, shape = lk // KEYS, literal(storage)
    with _first:
        keys, values = (
            known[buffer] if buffer in known else known.setdefault(buffer, _Known(buffer, base(buffer.memory)))
            for known, buffer, base in zip((_keys, _values), held, (_centre, _unknown), strict=True)
        )
    _measure(keys, held[0], count, of_keys(shape))
    _measure(values, held[1], count, of_values(shape))
    return Norms(count, keys.base, keys.each, keys.before, values.base, values.since, values.each, values.before)


def literal(storage: int) -> int:
    """What `vectors` is told of a storage: one vector in a row."""
    return lanes() << 16 | 1 << 8 | 1 | storage << 24


def _centre(memory: Array) -> Array:
    """Mean of the first tile of each head, where it is finite: of the first, so that it tells of no other call."""
    with np.errstate(over="ignore", invalid="ignore"):
        mean = widened(memory[:, :, :KEYS]).mean(2).reshape(-1, memory.shape[3])
    return np.where(np.isfinite(mean), mean, np.float32(0))


def _unknown(memory: Array) -> Array:
    return np.zeros((memory.shape[0] * memory.shape[1], memory.shape[3]), np.float32)


def _measure(known: _Known, buffer: Buffer, count: int, measure: Callable[..., Any]) -> None:
    """Go on to so many tiles."""
    with known.lock:
        if known.count < count:
            room, many = np.empty(known.base.shape, np.int32), known.base.size * (count - known.count) * KEYS
            own = known.base, known.since, known.each, known.before
            memory = bits(buffer.memory), buffer.memory.shape[2]
            spread(measure, (*memory, *own, room, known.count, count), len(room), many)
            known.count = count


@cache
def of_keys(shape: int) -> Callable[..., Any]:
    """Lengths of keys, tile by tile."""
    LITERAL, VERSION = shape, stamp(bounds, skipping, tiles, vectors, work)

    @bare
    def measure(
        memory: Array,
        slots: int,
        centre: Array,
        since: Array,
        each: Array,
        before: Array,
        room: Array,
        first: int,
        last: int,
        start: int,
        stop: int,
    ) -> int:
        width = centre.shape[1]
        for t in range(start, stop):
            for n in range(first, last):
                place = memory.ctypes.data + memory.itemsize * (t * slots + n * KEYS) * width
                each[t, n] = 0.0
                squares(LITERAL, each[t, n:].ctypes.data, place, centre[t].ctypes.data, KEYS, width)
                length = np.sqrt(each[t, n] + np.float32(1e-30)) * np.float32(1 + SLACK)
                each[t, n] = length if math.isfinite(length) else np.inf
                before[t, n] = max(each[t, n], before[t, n - 1]) if n else each[t, n]
        return VERSION

    return measure


@cache
def of_values(shape: int) -> Callable[..., Any]:
    """The greatest |v_d| / s_d as logarithms, tile by tile, and s_d where it is met first."""
    LITERAL, VERSION = shape, stamp(bounds, skipping, tiles, vectors, work)

    @bare
    def measure(
        memory: Array,
        slots: int,
        scales: Array,
        since: Array,
        each: Array,
        before: Array,
        room: Array,
        first: int,
        last: int,
        start: int,
        stop: int,
    ) -> int:
        width = scales.shape[1]
        found = room.view(np.float32)
        for t in range(start, stop):
            for n in range(first, last):
                place = memory.ctypes.data + memory.itemsize * (t * slots + n * KEYS) * width
                room[t] = 0
                peaks(LITERAL, room[t].ctypes.data, place, KEYS, width)
                most = 0.0
                for d in range(width):
                    peak = float(found[t, d])
                    if not peak < np.inf:
                        most = np.inf
                    elif peak > 0:
                        if scales[t, d] == 0:
                            scales[t, d], since[t, d] = peak, n
                        most = max(most, peak / float(scales[t, d]))
                each[t, n] = math.log2(most) + SLACK if most > 0 else NEVER
                before[t, n] = max(each[t, n], before[t, n - 1]) if n else each[t, n]
        return VERSION

    return measure
