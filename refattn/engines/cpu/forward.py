r"""The fast forward pass: online softmax over tiles of keys, queries in the vector lanes; `tiles` has its steps.

One task is one tile of rows of one key head: rows of a single query head, or, where a head has few, of all the query
heads that share the key head. Whatever a task needs it computes by itself and in a fixed order.

Rows whose result is not a finite number, and rows without any weight, are only marked: the caller has them made by
`score.forward`, which knows what a NaN, an infinity or an overflow comes from. So here no number needs to be examined.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from refattn.engines.cpu import bounds, logits, sight, skipping, tiles, tuples, vectors, work
from refattn.engines.cpu.logits import scores, stored
from refattn.engines.cpu.sight import NOTHING, POSITIONS, SEGMENTS, reach, see
from refattn.engines.cpu.skipping import Norms, begin, first_tile, note, skipped
from refattn.engines.cpu.tiles import accumulate, fetch, fill, scale, sound, squash, turn, weigh
from refattn.engines.cpu.tuples import lent
from refattn.engines.cpu.vectors import FLOAT32, take
from refattn.engines.cpu.work import (
    KEYS,
    Array,
    Arrays,
    Ends,
    Results,
    Rows,
    Tile,
    cut,
    divide,
    ends_of,
    lay,
    locate,
    pack,
    settle,
    tiles_of,
)
from refattn.jit import bare, inner, lanes, stamp


class Shape(NamedTuple):
    """Of a tile: lanes of a vector, vectors of a row, rows that are summed up at a time, how k and v are stored."""

    width: int
    vectors: int
    block: int
    storage: int = FLOAT32

    @property
    def rows(self) -> int:
        """Queries in a tile."""
        return self.width * self.vectors

    @property
    def literal(self) -> int:
        """The number that `Lanes` reads."""
        return self.block | self.vectors << 8 | self.width << 16 | self.storage << 24

    @property
    def strip(self) -> int:
        """The number for one vector of this tile: a block of twice as many rows fills the registers as well."""
        return self.block * min(self.vectors, 2) | 1 << 8 | self.width << 16 | self.vectors << 28


# Accumulators, a row and one number more fit the registers: 32, or 16 with vectors of 8 and 4.
_SHAPES = {
    16: (Shape(16, 4, 6), Shape(16, 1, 12)),
    8: (Shape(8, 3, 4), Shape(8, 1, 8)),
    4: (Shape(4, 3, 4), Shape(4, 1, 8)),
}


def shape_for(share: int, lq: int, storage: int = FLOAT32) -> Shape:
    """The tile shape for so many rows of so many heads that share a key head."""
    large, small = _SHAPES[lanes()]
    return (small if share * lq <= small.rows else large)._replace(storage=storage)


@cache
def kernel(shape: Shape) -> Callable[[Arrays, Norms, Results, Tile, Array], int]:
    """The compiled pass for a tile shape.

    The array holds the next task, which threads share, and 0, which becomes 1 where a number of k is not finite.
    """
    ROWS, VECTORS = shape.rows, shape.vectors
    LITERAL, STRIP = shape.literal, shape.strip
    VERSION = stamp(bounds, logits, sight, skipping, tiles, tuples, vectors, work)

    @bare
    def forward(x: Arrays, norms: Norms, results: Results, tile: Tile, counter: Array) -> int:
        x, norms, results, tile = lent(x), lent(norms), lent(results), lent(tile)
        batch, heads, groups, lq, _, depth, width = x.sizes
        tasks = batch * groups * tiles_of(heads // groups, lq, ROWS)
        while True:
            task = take(counter.ctypes.data)
            if task >= tasks:
                break
            at = locate(x, ROWS, task)
            if not examined(LITERAL, x, tile, task, tasks):
                counter[1] = 1
            ends = opened(LITERAL, x, results, tile, at)
            keys = x.k_length[at.b] if ends.least <= ends.greatest else 0
            begun, turns = False, -(-keys // KEYS)
            last = first_tile(x, norms, at, ends.greatest, turns)
            if last >= 0:
                begin(LITERAL, x, tile, norms, at)
            turned = 0
            while turned < turns:
                n = last - turned if turned <= last else turned
                turned += 1
                j, count = n * KEYS, min(KEYS, keys - n * KEYS)
                kinds = see(LITERAL, x, tile.bias, at, ends, n, count)
                if kinds == NOTHING:
                    continue
                if begun:
                    away = skipped(LITERAL, x, tile, norms, at, n, count, n <= last)
                    if away:
                        turned += away - 1
                        continue
                key = (at.b * groups + at.g) * x.sizes[4] + j
                k = stored(LITERAL, tile.k, x.k, key * depth, count * depth)
                v = stored(LITERAL, tile.v, x.v, key * width, count * width)
                if VECTORS == 1 or not kinds & (POSITIONS + SEGMENTS):
                    attend(LITERAL, x, tile, at, k, v, j, count, kinds)
                else:
                    strips(STRIP, x, tile, at, k, v, j, count)
                if last >= 0:
                    note(LITERAL, tile, norms, at, width)
                    begun = True
            closed(LITERAL, x, results, tile, at)
        return VERSION

    return forward


@inner
def opened(shape: int, x: Arrays, results: Results, tile: Tile, at: Rows) -> Ends:
    """Begin a tile of rows: qᵀ, sums of nothing, and the ends of what its rows are."""
    depth, width, line = x.sizes[5], x.sizes[6], 4 * tile.lanes
    start = x.q.ctypes.data + 4 * at.first * depth
    fetch(shape, start, results.out.ctypes.data + 4 * at.first * width, 4 * at.rows * min(depth, width))
    lay(x, tile, at)
    turn(shape, tile.q.ctypes.data, start, at.rows, depth, line, 4 * depth)
    pack(x, tile, at, shape >> 16 & 255)
    fill(shape, tile.o.ctypes.data, width, np.float32(0.0))
    return ends_of(x, tile, at)


@inner
def examined(shape: int, x: Arrays, tile: Tile, task: int, tasks: int) -> bool:
    """Whether k is finite in the task's share of it: where queries are as many as keys, those beside its rows."""
    each = tasks // (x.sizes[0] * x.sizes[2])
    part = task // each * each + each - 1 - task % each
    begin, end = part * x.k.size // tasks, (part + 1) * x.k.size // tasks
    sound(shape, tile.factor.ctypes.data, np.int64(x.k.ctypes.data) + begin * x.k.itemsize, end - begin)
    return bool(tile.factor[0] == 0.0)


@inner
def closed(shape: int, x: Arrays, results: Results, tile: Tile, at: Rows) -> None:
    """End a tile of rows: what its sums come to, by the total of the weights."""
    width, o, line = x.sizes[6], tile.o.ctypes.data, 4 * tile.lanes
    divide(tile)
    scale(shape, o, tile.factor.ctypes.data, tile.slope.ctypes.data, width)
    turn(shape, results.out.ctypes.data + 4 * at.first * width, o, width, at.rows, 4 * width, line)
    settle(x, results, tile, at, shape >> 16 & 255)


@inner
def attend(shape: int, x: Arrays, tile: Tile, at: Rows, k: int, v: int, j: int, count: int, kinds: int) -> None:
    """Take the keys j to j + count into the rows' sums; k and v are addresses of their float32 vectors."""
    s, factor, width = tile.s.ctypes.data, tile.factor.ctypes.data, x.sizes[6]
    unit = scores(shape, x, tile, at, k, j, count, kinds)
    if x.sigmoid:
        squash(shape, s, count, unit, np.float32(x.offset))
    else:
        weigh(shape, s, tile.top.ctypes.data, tile.total.ctypes.data, factor, count, unit)
    accumulate(shape, tile.o.ctypes.data, factor, s, v, 4 * width, count, width)


@inner
def strips(shape: int, x: Arrays, tile: Tile, at: Rows, k: int, v: int, j: int, count: int) -> None:
    """As `attend`, one vector of rows after the other, each with no more keys than from the first it sees to the last.

    Along the edge of what is visible that is close to half the work.
    """
    lanes = shape >> 16 & 255
    for lane in range(0, at.rows, lanes):
        strip = lent(cut(tile, lane))
        rows = Rows(at.b, at.g, at.h, at.i + lane, at.first + lane, min(lanes, at.rows - lane), at.apart)
        first, end, kinds = reach(shape, x, strip.bias, rows, ends_of(x, strip, rows), j, count)
        if kinds != NOTHING:
            skipped = first - j
            k_from, v_from = k + 4 * skipped * x.sizes[5], v + 4 * skipped * x.sizes[6]
            attend(shape, x, strip, rows, k_from, v_from, first, end - first, kinds)
