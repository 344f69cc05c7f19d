r"""Tiles of keys far away that `decode` leaves out, by the norms of a cache.

The nearest keys are decoded first, alone: their lse and out give a row's log₂ z and |o_d| / z of `skipping`, whose
bounds hold here with two changes. c is the mean of the first tile of the cache. A tile's own values take the place of
all: with s_d the first greatest |v_d| of a tile that is not 0, n keys of tiles B, that weigh at most w, may go if

    w ≤ ε 4u z   and   w max_B,d |v_d| / s_d ≤ ε 7u min_d |o_d| / s_d.

A channel that is 0 in all measured tiles loses nothing by them, and is on neither side.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np

from refattn.engines.cpu import bounds, cached, skipping, tiles, vectors, work
from refattn.engines.cpu.cached import NEVER, Norms
from refattn.engines.cpu.skipping import LSE, OUT, SLACK
from refattn.engines.cpu.work import KEYS, LN2, Array, Arrays
from refattn.jit import bare, inner, stamp

_FAR = -(1 << 29)
_NEAR = 2  # tiles that are decoded first


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
    VERSION = stamp(bounds, cached, skipping, tiles, vectors, work)

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
        room[2, r] = total - base - rounding + OUT + (math.log2(least) if least > 0 else NEVER)
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
