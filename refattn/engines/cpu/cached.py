r"""Norms of a cache, and the tiles of keys that `decode` leaves out by them.

Decoding reads each key once, so a bound spares reading only if it was there before: it is state of the cache. A cache
is what `refattn.extend` grows. A slot of its buffer is written once, so a whole tile of keys is measured when a call
first meets it and never again; tiles that are not whole yet are always read. Norms are kept beside the buffer and go
with it: they follow from k and v, so states and files do not hold them.

The nearest keys are decoded first, alone: their lse and out give a row's log₂ z and |o_d| / z of `skipping`, whose
bounds hold here with two changes. c is the mean of the first tile of the cache. A tile's own values take the place of
all: with s_d the first greatest |v_d| of a tile that is not 0, n keys of tiles B, that weigh at most w, may go if

    w ≤ ε 4u z   and   w max_B,d |v_d| / s_d ≤ ε 7u min_d |o_d| / s_d.

A channel that is 0 in all measured tiles loses nothing by them, and is on neither side.
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
from refattn.engines.cpu._jit import bare, inner, lanes, stamp
from refattn.engines.cpu.bounds import peaks, squares
from refattn.engines.cpu.pool import spread
from refattn.engines.cpu.skipping import LSE, OUT, SHORTEST, SLACK
from refattn.engines.cpu.storage import bits, widened
from refattn.engines.cpu.work import KEYS, LN2, Array, Arrays

_NEVER = -(2.0**100)  # logarithm of what is too small to count
_FAR = -(1 << 29)
_NEAR = 2  # tiles that are decoded first


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
                each[t, n] = math.log2(most) + SLACK if most > 0 else _NEVER
                before[t, n] = max(each[t, n], before[t, n - 1]) if n else each[t, n]
        return VERSION

    return measure


def left_out(x: Arrays, known: Norms, decoded: Callable[[Array, int], tuple[Array, Array, Array]]) -> Array:
    """Tiles that no row needs, (T,tiles) bool; `decoded(starts, size)` gives out and lse of a stretch of each sequence.

    Starts are (B,1) int64, where the stretches of `size` keys begin.
    """
    batch, heads, groups, lq = x.sizes[:4]
    greatest = np.array([x.q_at[b % len(x.q_at), : x.q_length[b]].max(initial=_FAR) for b in range(batch)])
    reached = (x.k_ends[..., 0] <= greatest[:, None]) & (np.arange(x.k_ends.shape[1]) * KEYS < x.k_length[:, None])
    near = np.where(reached.any(1), reached.shape[1] - reached[:, ::-1].argmax(1), 1).astype(np.int64)
    starts = np.maximum(near - _NEAR, 0)
    out, lse, _ = decoded(KEYS * starts[:, None], _NEAR * KEYS)
    left, room = np.zeros((batch * groups, x.k_ends.shape[1]), np.bool_), np.empty((8, heads // groups * lq))
    most = np.maximum.accumulate(x.k_ends[..., 1], axis=1)
    leave()(x, known, out.reshape(-1), lse.reshape(-1), starts, near, greatest, most, room, left)
    return left


@cache
def leave() -> Callable[..., Any]:
    """The compiled choice of tiles, the farthest first, for they weigh the least: to the left, then to the right."""
    VERSION = stamp(skipping, work)

    @bare
    def choose(
        x: Arrays,
        known: Norms,
        out: Array,
        lse: Array,
        starts: Array,
        near: Array,
        greatest: Array,
        most: Array,
        room: Array,
        left: Array,
    ) -> int:
        for t in range(left.shape[0]):
            b = t // x.sizes[2]
            ends, far = x.k_ends[b % x.k_ends.shape[0]], most[b % most.shape[0]]
            begin(x, known, out, lse, room, t)
            stop, last = min(starts[b], known.measured), known.measured
            while last > near[b] and ends[last - 1, 0] - greatest[b] > x.span[1]:
                last -= 1
            limit = 1.0 if last <= near[b] else 0.5
            # Half of it for as many as one bound is good for, the other half for the next ones, one by one.
            low, high = 0, stop
            while low < high:
                n = (low + high + 1) // 2
                keys, values = known.keys_before[t, n - 1], known.values_before[t, n - 1]
                if afford(room, _FAR, far[n - 1], keys, values, n * KEYS, limit / 2):
                    low = n
                else:
                    high = n - 1
            if low > 0:
                keys, values = known.keys_before[t, low - 1], known.values_before[t, low - 1]
                left[t, :low] = spared(room, _FAR, far[low - 1], keys, values, low * KEYS, limit / 2)
            for n in range(low, stop):
                left[t, n] = spared(room, ends[n, 0], ends[n, 1], known.keys[t, n], known.values[t, n], KEYS, limit)
            for n in range(last - 1, near[b] - 1, -1):
                left[t, n] = spared(room, ends[n, 0], ends[n, 1], known.keys[t, n], known.values[t, n], KEYS, 1.0)
        return VERSION

    return choose


@inner
def begin(x: Arrays, known: Norms, out: Array, lse: Array, room: Array, t: int) -> None:
    """What the rows of key head number t may leave out: a column of `room` for each, as `afford` reads them."""
    _, heads, groups, lq, _, depth, width = x.sizes
    b, h, share = t // groups, t % groups * (heads // groups), heads // groups
    middle = 0.0
    for d in range(depth):
        middle += float(known.centre[t, d]) ** 2
    middle = math.sqrt(middle) * (1 + SLACK)
    for r in range(share * lq):
        i, row = r % lq, (b * heads + h) * lq + r
        square, dot, least = 0.0, 0.0, np.inf
        for d in range(depth):
            a = float(x.q[row * depth + d])
            square, dot = square + a * a, dot + a * float(known.centre[t, d])
        for d in range(width):
            if known.scales[t, d] > 0 and known.since[t, d] < known.measured:
                size = abs(float(out[row * width + d])) / float(known.scales[t, d])
                # NaN is the least of all.
                least = min(least, size) if size >= 0 else -np.inf
        norm = x.unit * (1 + SLACK) * math.sqrt(square)
        # A cap would raise a logit below 0.
        base, more = (0.0, middle) if x.cap[0] > 0 else (x.unit * x.sign * dot, 0.0)
        total = float(lse[row]) / LN2
        rounding = (abs(total) + abs(base)) * 2.0**-20 + norm * middle * 2.0**-40
        room[0, r] = 0.0
        room[1, r] = total - base - rounding + LSE
        room[2, r] = total - base - rounding + OUT + (math.log2(least) if least > 0 else _NEVER)
        room[3, r], room[4, r] = norm, more
        room[5, r] = float(x.slopes[h + r // lq]) * (1 - SLACK)
        room[6, r] = x.q_at[b % x.q_at.shape[0], i]
        if i >= x.q_length[b]:
            room[1:3, r], room[3:6, r] = np.inf, 0.0


@inner
def spared(room: Array, near: int, far: int, length: float, size: float, count: int, limit: float) -> bool:
    """As `afford`, and booked if so."""
    if not afford(room, near, far, length, size, count, limit):
        return False
    for r in range(room.shape[1]):
        room[0, r] = room[7, r]
    return True


@inner
def afford(room: Array, near: int, far: int, length: float, size: float, count: int, limit: float) -> bool:
    """Whether all rows may leave out `count` more keys, of places `near` to `far`, within that part of their share."""
    bits = math.log2(count)
    for r in range(room.shape[1]):
        away = max(near - room[6, r], room[6, r] - far, 0.0)
        weight = bits + room[3, r] * (length + room[4, r]) - room[5, r] * away
        by_lse, by_out = weight - room[1, r], weight + size - room[2, r]
        # A comparison with NaN is false.
        if not (by_lse < 1.0 and by_out < 1.0):
            return False
        room[7, r] = room[0, r] + 2.0 ** max(by_lse, by_out, -100.0)
        if room[7, r] > limit:
            return False
    return True
