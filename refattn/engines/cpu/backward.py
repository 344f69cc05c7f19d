r"""The fast backward pass: tiles of keys outside, tiles of queries inside; `gradients` has its steps.

One task is a share of the tiles of keys of one key head, dealt out in turn: for each of them it goes through all rows
of the query heads that share it, so dk and dv are finished within the task. dq is added to in memory of the share's
own; the caller sums the shares. How many shares there are depends on shapes alone.

A tile's five products, with dU = scale cap' dS:

    Sᵀ = K Qᵀ,   dPᵀ = V dOᵀ,   dQ += dU K,   dV += Pᵀ dO,   dK += dUᵀ Q
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cpu import bounds, gradients, logits, sight, skipping, tiles, tuples, vectors, work
from refattn.engines.cpu.forward import Shape
from refattn.engines.cpu.gradients import bend_back, deltas, multiply, outer, times, turn_back
from refattn.engines.cpu.logits import biased, scores
from refattn.engines.cpu.sight import NOTHING, see
from refattn.engines.cpu.skipping import Allowed, Norms, book, gone, recall
from refattn.engines.cpu.tiles import products, turn
from refattn.engines.cpu.tuples import lent
from refattn.engines.cpu.vectors import take
from refattn.engines.cpu.work import KEYS, LOG2E, Array, Arrays, Rows, Tile, ends_of, lay, locate, pack, tiles_of
from refattn.jit import bare, inner, stamp


class Given(NamedTuple):
    """Out and lse of the forward pass and their cotangents, flat; scale; shares of a head's keys, tiles in a step."""

    out: Array
    lse: Array
    dout: Array
    dlse: Array
    scale: float
    shares: int
    step: int


class Gradients(NamedTuple):
    """What the kernel adds to, all 0 at first, flat; and for each task whether one of its numbers is not finite.

    q (S,B,Hq,Lq,D), k, v float32, S shares. Where wanted, else of size 0, float64 sums of dS: slope, row (S,B,Hq,Lq) of
    −dS |r| and of dS; key (B,Hq,Lk); table (S,B,Hq,columns), by r = position(j) − position(i) from `low` on.
    """

    q: Array
    k: Array
    v: Array
    slope: Array
    row: Array
    key: Array
    table: Array
    low: int
    columns: int
    doubt: Array


@inner
def finite(numbers: Array) -> bool:
    """Whether all of a flat float32 array are: as integers without the sign, infinity and NaN are the greatest."""
    greatest = np.uint32(0)
    for bits in numbers.view(np.uint32):
        greatest = max(greatest, np.uint32(bits << np.uint32(1)))
    return bool(greatest < np.uint32(0xFF000000))


@inner
def begin(x: Arrays, given: Given, tile: Tile, at: Rows, width: int) -> bool:
    """Lse in base 2 in tile.top and δ in tile.total; False where one of a row that sees a key is not finite.

    Rows that see none, and lanes without a row, have +∞ for lse: all their weights are 0.
    """
    lq, size, first = x.sizes[3], x.sizes[6], at.first
    i, sure = first % lq - 1, True
    for r in range(tile.lanes):
        tile.top[r] = np.inf
        if r < at.rows:
            i = 0 if i + 1 == lq else i + 1
            row = first + r
            lse = given.lse[row]
            if i < x.q_length[at.b] and lse != -np.inf:
                delta = tile.total[r] - given.dlse[row]
                for d in range(size // width * width, size):
                    delta += given.out[row * size + d] * given.dout[row * size + d]
                tile.top[r] = LOG2E * lse
                tile.total[r] = delta
                sure = sure and math.isfinite(lse) and math.isfinite(delta)
    return sure


@inner
def rest(to: Array, source: Array, first: int, rows: int, columns: int, width: int) -> None:
    """What `turn` leaves of a tile: rows and columns that fill no square of `width`; lanes without a row are 0."""
    lanes = to.size // max(columns, 1)
    squares, whole = rows // width * width, columns // width * width
    for r in range(lanes):
        for c in range(whole if r < squares else 0, columns):
            to[c * lanes + r] = source[(first + r) * columns + c] if r < rows else 0.0


@inner
def enter(shape: int, x: Arrays, given: Given, tile: Tile, at: Rows) -> bool:
    """Qᵀ and doutᵀ of a tile of rows, and what `begin` does."""
    depth, width, lanes = x.sizes[5], x.sizes[6], tile.lanes
    q, dout = x.q.ctypes.data + 4 * at.first * depth, given.dout.ctypes.data + 4 * at.first * width
    turn(shape, tile.q.ctypes.data, q, at.rows, depth, 4 * lanes, 4 * depth)
    pack(x, tile, at, shape >> 16 & 255)
    turn(shape, tile.o.ctypes.data, dout, at.rows, width, 4 * lanes, 4 * width)
    rest(tile.o, given.dout, at.first, at.rows, width, shape >> 16 & 255)
    out = given.out.ctypes.data + 4 * at.first * width
    deltas(shape, tile.total.ctypes.data, out, dout, at.rows, 4 * width, width)
    return begin(x, given, tile, at, shape >> 16 & 255)


@inner
def add_product(
    shape: int, to: int, count: int, w: int, down: int, along: int, depth: int, by: int, columns: int
) -> None:
    """`outer` of rows whose columns are all they have; compiled once."""
    outer(shape, to, 4 * columns, count, w, down, along, depth, by, 4 * columns, columns)


@inner
def collect(x: Arrays, found: Gradients, tile: Tile, at: Rows, j: int, count: int, share: int) -> None:
    """Add the cotangents of a tile's logits, in tile.bias, to the sums that are wanted."""
    batch, heads, _, lq, lk, _, _ = x.sizes
    lanes, begun = tile.lanes, share * batch * heads * lq + at.first
    places = x.k_at[at.b % x.k_at.shape[0]]
    for sums, steep in ((found.slope, True), (found.row, False)):
        if sums.size:
            tile.factor[:] = 0.0
            for n in range(count):
                line, place = tile.bias[n * lanes : (n + 1) * lanes], places[j + n]
                for r in range(lanes):
                    tile.factor[r] -= line[r] * np.float32(abs(place - tile.place[r]) if steep else -1)
            for r in range(at.rows):
                sums[begun + r] += tile.factor[r]
    for r in range(at.rows if found.key.size or found.table.size else 0):
        head = (at.first + r) // lq
        if found.key.size:
            line = found.key[head * lk + j : head * lk + j + count]
            for n in range(count):
                line[n] += tile.bias[n * lanes + r]
        if found.table.size:
            own = (share * batch * heads + head) * found.columns - tile.place[r] - found.low
            for n in range(count):
                found.table[own + places[j + n]] += tile.bias[n * lanes + r]


@inner
def weights(
    shape: int,
    x: Arrays,
    given: Given,
    tile: Tile,
    slope: Array,
    at: Rows,
    j: int,
    count: int,
    kinds: int,
    factor: Any,
) -> None:
    """P in tile.s and dS times `factor` in tile.bias; with a softcap, scale cap' in `slope`."""
    depth, width, key = x.sizes[5], x.sizes[6], (at.b * x.sizes[2] + at.g) * x.sizes[4] + j
    s, dp, k, steep = tile.s.ctypes.data, tile.bias.ctypes.data, x.k.ctypes.data + 4 * key * depth, np.float32(x.cap[0])
    if steep > 0:
        products(shape, s, tile.q.ctypes.data, k, 4 * depth, count, depth)
        bend_back(shape, s, slope.ctypes.data, count, steep, np.float32(x.cap[1]), np.float32(given.scale))
        unit = biased(shape, x, tile, at, j, count, kinds, np.float32(1.0))
    else:
        unit = scores(shape, x, tile, at, k, j, count, kinds)
    products(shape, dp, tile.o.ctypes.data, x.v.ctypes.data + 4 * key * width, 4 * width, count, width)
    turn_back(shape, s, dp, count, unit, tile.top.ctypes.data, tile.total.ctypes.data, factor)


@inner
def pair(
    shape: int,
    x: Arrays,
    given: Given,
    found: Gradients,
    tile: Tile,
    slope: Array,
    at: Rows,
    j: int,
    count: int,
    kinds: int,
    share: int,
) -> None:
    """The five products of a tile of rows and the n-th tile of keys."""
    depth, width, line = x.sizes[5], x.sizes[6], 4 * tile.lanes
    key = (at.b * x.sizes[2] + at.g) * x.sizes[4] + j
    s, dp, scale = tile.s.ctypes.data, tile.bias.ctypes.data, np.float32(given.scale)
    bent, summed = x.cap[0] > 0, found.slope.size + found.row.size + found.key.size + found.table.size > 0
    weights(shape, x, given, tile, slope, at, j, count, kinds, np.float32(1.0) if bent or summed else scale)
    if summed:
        collect(x, found, tile, at, j, count, share)
    if bent:
        times(shape, dp, slope.ctypes.data, count)
    elif summed:
        multiply(shape, dp, count, scale)
    q, dout = x.q.ctypes.data + 4 * at.first * depth, given.dout.ctypes.data + 4 * at.first * width
    dq = found.q.ctypes.data + 4 * (share * x.q.size + at.first * depth)
    add_product(shape, found.v.ctypes.data + 4 * key * width, count, s, line, 4, at.rows, dout, width)
    add_product(shape, found.k.ctypes.data + 4 * key * depth, count, dp, line, 4, at.rows, q, depth)
    add_product(shape, dq, at.rows, dp, 4, line, count, x.k.ctypes.data + 4 * key * depth, depth)


@bare
def total(parts: Array, start: int, stop: int) -> None:
    """Add all rows (n, size) to the first; task = column."""
    for n in range(1, parts.shape[0]):
        for i in range(start, stop):
            parts[0, i] += parts[n, i]


@cache
def kernel(shape: Shape) -> Callable[[Arrays, Norms, Allowed, Given, Gradients, Tile, Array, Array], int]:
    """The compiled pass for a tile shape; the array of one number is the next task, which threads share."""
    ROWS = shape.rows
    LITERAL = shape.literal
    VERSION = stamp(bounds, gradients, logits, sight, skipping, tiles, tuples, vectors, work)

    @bare
    def backward(
        x: Arrays,
        known: Norms,
        allowed: Allowed,
        given: Given,
        found: Gradients,
        tile: Tile,
        slope: Array,
        counter: Array,
    ) -> int:
        x, known, allowed = lent(x), lent(known), lent(allowed)
        given, found, tile = lent(given), lent(found), lent(tile)
        batch, heads, groups, lq, lk, depth, width = x.sizes
        each = tiles_of(heads // groups, lq, ROWS)
        rows, step = heads // groups * lq * depth, given.shares * given.step
        while True:
            task = take(counter.ctypes.data)
            if task >= batch * groups * given.shares:
                break
            head, share = task // given.shares, task % given.shares
            sure, seen_keys = True, -(-x.k_length[head // groups] // KEYS)
            for first in range(share * given.step, seen_keys, step):
                stop = min(first + given.step, seen_keys)
                for t in range(each):
                    at = locate(x, ROWS, head * each + t)
                    lay(x, tile, at)
                    ends = ends_of(x, tile, at)
                    if ends.least > ends.greatest:
                        continue
                    entered, falls = False, allowed.on and at.apart and x.slopes[at.h] > 0
                    if falls:
                        recall(tile, allowed, at, share)
                    for n in range(first, stop):
                        count = min(KEYS, x.k_length[at.b] - n * KEYS)
                        kinds = see(LITERAL, x, tile.bias, at, ends, n, count)
                        if kinds != NOTHING and not (falls and gone(LITERAL, x, tile, known, at, n)):
                            if not entered:
                                entered, sure = True, enter(LITERAL, x, given, tile, at) and sure
                            pair(LITERAL, x, given, found, tile, slope, at, n * KEYS, count, kinds, share)
                    if falls:
                        book(tile, allowed, at, share)
                for n in range(first, stop):
                    key, count = head * lk + n * KEYS, min(KEYS, lk - n * KEYS)
                    sure = sure and finite(found.k[key * depth : (key + count) * depth])
                    sure = sure and finite(found.v[key * width : (key + count) * width])
            begun = share * x.q.size + head * rows
            found.doubt[task] = not (sure and finite(found.q[begun : begun + rows]))
        return VERSION

    return backward


@cache
def by_pair(shape: Shape) -> Callable[..., int]:
    """The compiled pass for the cotangent of a dense bias, (own[0],own[1],Lq,Lk) flat, 0 at first.

    One task is a tile of rows of it, which goes through all batches and heads that it is repeated for.
    """
    ROWS = shape.rows
    LITERAL = shape.literal
    VERSION = stamp(bounds, gradients, logits, sight, skipping, tiles, tuples, vectors, work)

    @bare
    def backward_bias(
        x: Arrays,
        given: Given,
        own: tuple[int, int],
        found: Array,
        tile: Tile,
        slope: Array,
        doubt: Array,
        counter: Array,
    ) -> int:
        x, given, tile = lent(x), lent(given), lent(tile)
        batch, heads, groups, lq, lk, _, _ = x.sizes
        each = -(-lq // ROWS)
        while True:
            task = take(counter.ctypes.data)
            if task >= own[0] * own[1] * each:
                break
            i, sure = (each - 1 - task % each) * ROWS, True
            begun = (task // each * lq + i) * lk
            for b in range(task // each // own[1], batch, own[0]):
                for h in range(task // each % own[1], heads, own[1]):
                    first = (b * heads + h) * lq + i
                    at = Rows(b, h // (heads // groups), h, i, first, min(ROWS, lq - i), True)
                    lay(x, tile, at)
                    ends = ends_of(x, tile, at)
                    if ends.least > ends.greatest:
                        continue
                    sure = enter(LITERAL, x, given, tile, at) and sure
                    for n in range(-(-x.k_length[b] // KEYS)):
                        j = n * KEYS
                        count = min(KEYS, x.k_length[b] - j)
                        kinds = see(LITERAL, x, tile.bias, at, ends, n, count)
                        if kinds != NOTHING:
                            weights(LITERAL, x, given, tile, slope, at, j, count, kinds, np.float32(1.0))
                            for r in range(at.rows):
                                line = found[begun + r * lk + j : begun + r * lk + j + count]
                                for c in range(count):
                                    line[c] += tile.bias[c * ROWS + r]
            doubt[task] = not (sure and finite(found[begun : begun + min(ROWS, lq - i) * lk]))
        return VERSION

    return backward_bias
