r"""Keys left out of a backward pass: what each row may leave out, found before the pass begins.

Names as in `skipping`; P_ij = exp2(s_ij − lse_i), dP_ij = dout_i·v_j, dS_ij = P_ij (dP_ij − δ_i). A tile's n keys weigh
at most w = n 2^(b_B − lse_i). With V = max |v_j| and t_i = |dout_i| V + |δ_i| ≥ |dP_ij − δ_i|, without them

    dq_id changes by     w scale t_i max |k_d|
    dk changes by        Σ_j |change of dk_jd| ≤ Σ_i w scale t_i |q_id|      over the keys j, for each d
    dv changes by        Σ_j |change of dv_jd| ≤ Σ_i w |dout_id|             likewise.

Of what `refattn.bound` allows, these terms are enough. Whatever the softmax of a row has been divided by has a bound of
12u of itself, every sum of products 12u Σ |a| |b| (docs/tolerance.md, section 3), so that in all

    dS_ij    g_ij  = 12u P_ij (2 |dP_ij| + |δ_i|)
    dq_id    scale Σ_j G_ij |k_jd|,   Σ_j dk_jd    scale Σ_i |q_id| Σ_j G_ij,     G_ij = g_ij + 12u |dS_ij|
    Σ_j dv_jd    24u Σ_i |dout_id| Σ_j P_ij.

P and G are summed over N, the one or two tiles of keys that are nearest: less than all, so still a lower bound, and
neither a sum of the pass itself nor a sign is needed. What is left out stays below ε of the bound

    of each dq_id                             if w ≤ ε / t_i min_d Σ_N G_ij |k_jd| / max |k_d|,
    of dk and dv over all keys of a head      if w ≤ ε / √T min(Σ_N G_ij / t_i, 24u Σ_N P_ij) too,

for each d, both in the sum and in the root of the sum of squares over its keys, of which there are T tiles: of squares,
a tile adds at most w / √KEYS instead of w, and the bound has its sum over keys / √(T KEYS) at least.

With a softcap all of it would be times its slopes, which may be 0 near and 1 far. So there, and where cotangents of
biases are wanted, a tile goes whose weights are below 2⁻¹²⁷: they are 0 in the kernel, and no bit changes.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from refattn.engines.cpu import backward, bounds, gradients, logits, sight, skipping, tiles, tuples, vectors, work
from refattn.engines.cpu.backward import Given, enter, weights
from refattn.engines.cpu.bounds import charge, gauge, magnitudes, weigh_bound
from refattn.engines.cpu.forward import Shape
from refattn.engines.cpu.pool import together
from refattn.engines.cpu.sight import NOTHING, between, see
from refattn.engines.cpu.skipping import EPSILON, Allowed, Norms, begin, longest
from refattn.engines.cpu.tiles import accumulate, fill
from refattn.engines.cpu.tuples import lent
from refattn.engines.cpu.vectors import take
from refattn.engines.cpu.work import KEYS, Array, Arrays, Ends, Rows, Tile, ends_of, lay, locate, scratch, tiles_of
from refattn.jit import bare, inner, stamp

SHORTEST = 640  # keys: below, the search costs what it spares
_NEAREST = 2  # tiles that a share is told by
_SHARED, _ZERO = 32.0, 120.0  # bits by which a bias falls at least, before a tile goes by its share or as 0


class Sides(NamedTuple):
    """What the shares need beside `Norms`, if `on`.

    longest (B,Hkv) max |v_j|; scales, absent (B,Hkv,D) of k as `Norms` has them of v; least (2,) the logarithms of
    ε 12u / KEYS, and of that over √T, less what is rounded.
    """

    on: bool
    longest: Array
    scales: Array
    absent: Array
    least: Array


class Room(NamedTuple):
    """A thread's scratch: sums (D,R) of G |k|, keys (KEYS,D) |k|, price (R,) 1 / t, ones (R,), all flat."""

    sums: Array
    keys: Array
    price: Array
    ones: Array


def allowed(x: Arrays, norms: Norms, given: Given, shape: Shape, by_share: bool) -> Allowed | None:
    """What rows may leave out; None where lse or δ of a row that sees a key is not finite."""
    batch, heads, groups, lq, lk, depth, width = x.sizes
    if not norms.on or lk < SHORTEST:
        return skipping.NOTHING_ALLOWED
    rows, tasks = batch * heads * lq, batch * groups * tiles_of(heads // groups, lq, shape.rows)
    found = Allowed(
        on=True,
        norm=np.zeros(rows, np.float32),
        budget=np.full(rows, -(2.0**100), np.float32),
        spent=np.zeros(given.shares * rows, np.float32),
    )
    sides = _sides(x, shape, given.shares) if by_share and not x.cap[0] else _NONE
    doubt, counter = np.zeros(tasks, np.bool_), np.zeros(1, np.int64)

    def arguments() -> tuple[object, ...]:
        sizes = depth * shape.rows, KEYS * depth, shape.rows
        sums, keys, price = (np.empty(n, np.float32) for n in sizes)
        room = Room(sums, keys, price, np.ones(shape.rows, np.float32))
        tile = scratch(shape.rows, depth, width, shape.storage)
        return x, norms, given, sides, found, tile, room, doubt, counter

    together(kernel(shape), arguments, tasks, rows * KEYS * (2 * depth + width))
    return None if doubt.any() else found


_EMPTY = np.zeros((1, 1, 0), np.float32)
_NONE = Sides(False, np.zeros((1, 1), np.float32), _EMPTY, _EMPTY, np.zeros(2, np.float32))


def _sides(x: Arrays, shape: Shape, shares: int) -> Sides:
    lengths, scales, absent = longest(x, shape.width, shape.storage)
    unit = math.log2(EPSILON * 12 * 2.0**-24 / KEYS / shares) - 2.0**-4
    least = [unit, unit - math.log2(-(-x.sizes[4] // KEYS)) / 2]
    return Sides(True, lengths, scales, absent, np.array(least, np.float32))


@cache
def kernel(shape: Shape) -> Callable[..., int]:
    """The compiled search for a tile shape; the array of one number is the next task, which threads share."""
    ROWS = shape.rows
    LITERAL = shape.literal
    VERSION = stamp(backward, bounds, gradients, logits, sight, skipping, tiles, tuples, vectors, work)

    @bare
    def spare(
        x: Arrays,
        norms: Norms,
        given: Given,
        sides: Sides,
        found: Allowed,
        tile: Tile,
        room: Room,
        doubt: Array,
        counter: Array,
    ) -> int:
        x, norms, given, sides = lent(x), lent(norms), lent(given), lent(sides)
        found, tile, room = lent(found), lent(tile), lent(room)
        _, heads, groups, lq, _, _, _ = x.sizes
        while True:
            task = take(counter.ctypes.data)
            if task >= doubt.shape[0]:
                break
            at = locate(x, ROWS, task)
            lay(x, tile, at)
            ends = ends_of(x, tile, at)
            if not at.apart or not x.slopes[at.h] > 0 or ends.least > ends.greatest:
                continue
            gap, far = gaps(x, at, ends)
            if x.slopes[at.h] * far < (_SHARED if sides.on else _ZERO):
                continue
            doubt[task] = not enter(LITERAL, x, given, tile, at)
            begin(LITERAL, x, tile, norms, at)
            if sides.on:
                share(LITERAL, x, given, sides, tile, room, at, ends, gap)
            settle(tile, room, found, at, sides.on)
        return VERSION

    return spare


@inner
def away(x: Arrays, at: Rows, ends: Ends, n: int) -> int:
    """Least distance of the rows from the n-th tile of keys; -1 where all its pairs are hidden, masks aside."""
    near, far = x.k_ends[at.b % x.k_ends.shape[0], n]
    low, high = x.k_parts[at.b % x.k_parts.shape[0], n]
    if between(x.span, ends, near, far, low, high) == NOTHING:
        return -1
    return int(max(near - ends.greatest, ends.least - far, 0))


@inner
def gaps(x: Arrays, at: Rows, ends: Ends) -> tuple[int, int]:
    """The least and the greatest such distance of a tile; 0 for the greatest where there is none."""
    least, greatest = 1 << 40, 0
    for n in range(-(-x.k_length[at.b] // KEYS)):
        gap = away(x, at, ends, n)
        if gap >= 0:
            least, greatest = min(least, gap), max(greatest, gap)
    return least, greatest


@inner
def share(
    shape: int, x: Arrays, given: Given, sides: Sides, tile: Tile, room: Room, at: Rows, ends: Ends, gap: int
) -> None:
    """The budgets of a tile's rows by what the nearest keys have of the bounds; after `enter` and `begin`."""
    depth, taken = x.sizes[5], 0
    top, total, base = tile.top.ctypes.data, tile.total.ctypes.data, tile.base.ctypes.data
    charge(shape, room.price.ctypes.data, tile.o.ctypes.data, x.sizes[6], sides.longest[at.b, at.g], total)
    fill(shape, room.sums.ctypes.data, depth, np.float32(0.0))
    tile.factor[:] = 0.0
    for n in range(-(-x.k_length[at.b] // KEYS)):
        if taken < _NEAREST and away(x, at, ends, n) == gap:
            count = min(KEYS, x.k_length[at.b] - n * KEYS)
            kinds = see(shape, x, tile.bias, at, ends, n, count)
            if kinds != NOTHING:
                taken += 1
                take_in(shape, x, given, tile, room, at, n * KEYS, count, kinds)
    for r in range(tile.lanes):
        tile.total[r] = min(2 * tile.factor[r], tile.spent[r])
    scales, absent = sides.scales[at.b, at.g].ctypes.data, sides.absent[at.b, at.g].ctypes.data
    budget, sums, least = tile.budget.ctypes.data, room.sums.ctypes.data, sides.least
    gauge(shape, budget, base, sums, depth, scales, absent, top, total, least[0], least[1])


@inner
def take_in(
    shape: int, x: Arrays, given: Given, tile: Tile, room: Room, at: Rows, j: int, count: int, kinds: int
) -> None:
    """Add Σ P to tile.factor, Σ G to tile.spent and Σ G |k| to room.sums, G over 12u t."""
    depth, key = x.sizes[5], (at.b * x.sizes[2] + at.g) * x.sizes[4] + j
    weights(shape, x, given, tile, room.sums, at, j, count, kinds, np.float32(1.0))
    p, g, delta, price = tile.s.ctypes.data, tile.bias.ctypes.data, tile.total.ctypes.data, room.price.ctypes.data
    weigh_bound(shape, p, g, count, delta, price, tile.factor.ctypes.data, tile.spent.ctypes.data)
    magnitudes(shape, room.keys.ctypes.data, x.k.ctypes.data + 4 * key * depth, count * depth)
    sums, keys = room.sums.ctypes.data, room.keys.ctypes.data
    accumulate(shape, sums, room.ones.ctypes.data, g, keys, 4 * depth, count, depth)


@inner
def settle(tile: Tile, room: Room, found: Allowed, at: Rows, by_share: bool) -> None:
    """Write what the rows may leave out: their share, or weights of 0; all of it where they have nothing to give."""
    for r in range(at.rows):
        top, base, budget = tile.top[r], tile.base[r], tile.budget[r]
        if top == np.inf or (by_share and room.price[r] == np.inf):
            budget = np.float32(2.0**100)
        else:
            rounding = (abs(top) + abs(base)) * np.float32(2.0**-22)
            budget = max(budget, top - base - rounding - np.float32(128.0))
        found.norm[at.first + r], found.budget[at.first + r] = tile.norm[r], budget
