r"""The fast forward pass: online softmax over tiles of keys, queries in the vector lanes; `tiles` has its steps.

One task is one tile of rows of one key head: rows of a single query head, or, where a head has few, of all the query
heads that share the key head. Whatever a task needs it computes by itself and in a fixed order.

Rows whose result is not a finite number, and rows without any weight, are only marked: the caller has them made by
`score.forward`, which knows what a NaN, an infinity or an overflow comes from. So here no number needs to be examined.
"""
from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from refattn.engines.cpu import logits, tiles, vectors, work
from refattn.engines.cpu._jit import jit, lanes, stamp
from refattn.engines.cpu.logits import scores, seen
from refattn.engines.cpu.tiles import accumulate, fill, scale, turn, weigh
from refattn.engines.cpu.vectors import take
from refattn.engines.cpu.work import KEYS, Array, Arrays, Results, Tile, divide, lay, locate, pack, settle, tiles_of


class Shape(NamedTuple):
    """Of a tile: lanes of a vector, vectors of a row, rows that are summed up at a time."""

    width: int
    vectors: int
    block: int

    @property
    def rows(self) -> int:
        """Queries in a tile."""
        return self.width * self.vectors


# Accumulators, a row and one number more fit the registers: 32, or 16 with vectors of 8 and 4.
_SHAPES = {
    16: (Shape(16, 4, 6), Shape(16, 1, 12)),
    8: (Shape(8, 3, 4), Shape(8, 1, 8)),
    4: (Shape(4, 3, 4), Shape(4, 1, 8)),
}


def shape_for(share: int, lq: int) -> Shape:
    """The tile shape for so many rows of so many heads that share a key head."""
    large, small = _SHAPES[lanes()]
    return small if share * lq <= small.rows else large


@cache
def kernel(shape: Shape) -> Callable[[Arrays, Results, Tile, Array], int]:
    """The compiled pass for a tile shape; the array of one number is the next task, which threads share."""
    WIDTH, ROWS = shape.width, shape.rows
    LITERAL = shape.width << 16 | shape.vectors << 8 | shape.block
    VERSION = stamp(logits, tiles, vectors, work)

    @jit
    def forward(x: Arrays, results: Results, tile: Tile, counter: Array) -> int:
        batch, heads, groups, lq, _, depth, width = x.sizes
        tasks, line = batch * groups * tiles_of(heads // groups, lq, ROWS), 4 * ROWS
        q, o, s = tile.q.ctypes.data, tile.o.ctypes.data, tile.s.ctypes.data
        top, total, factor = tile.top.ctypes.data, tile.total.ctypes.data, tile.factor.ctypes.data
        while True:
            task = take(counter.ctypes.data)
            if task >= tasks:
                break
            at = locate(x, ROWS, task)
            ends = lay(x, tile, at)
            turn(LITERAL, q, x.q.ctypes.data + 4 * at.first * depth, at.rows, depth, line, 4 * depth)
            pack(x, tile, at, WIDTH)
            fill(LITERAL, o, width, np.float32(0.0))
            keys = x.k_length[at.b] if ends.least <= ends.greatest else 0
            for n in range(-(-keys // KEYS)):
                if not seen(x, at, ends, n):
                    continue
                j, count = n * KEYS, min(KEYS, keys - n * KEYS)
                unit = scores(LITERAL, x, tile, at, ends, j, count)
                v = x.v.ctypes.data + 4 * ((at.b * groups + at.g) * x.sizes[4] + j) * width
                weigh(LITERAL, s, top, total, factor, count, unit)
                accumulate(LITERAL, o, factor, s, v, 4 * width, count, width)
            divide(tile)
            scale(LITERAL, o, factor, tile.slope.ctypes.data, width)
            turn(LITERAL, results.out.ctypes.data + 4 * at.first * width, o, width, at.rows, 4 * width, line)
            settle(x, results, tile, at, WIDTH)
        return VERSION

    return forward
