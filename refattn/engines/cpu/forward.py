r"""The fast forward pass: online softmax over tiles of keys, queries in the vector lanes; `tiles` has its steps.

One task is one tile of rows of one key head: rows of a single query head, or, where a head has few, of all the query
heads that share the key head. Whatever a task needs it computes by itself and in a fixed order.

Rows whose result is not a finite number, and rows without any weight, are only marked: the caller has them made by
`score.forward`, which knows what a NaN, an infinity or an overflow comes from. So here no number needs to be examined.
"""
# ruff: noqa: PLR0912, PLR0915  a kernel that calls intrinsics of a literal shape is one function

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np

from refattn.engines.cpu import tiles, vectors, work
from refattn.engines.cpu._jit import jit, lanes, stamp
from refattn.engines.cpu.tiles import accumulate, add, bend, fill, hide, lean, part, products, scale, turn, weigh
from refattn.engines.cpu.vectors import take
from refattn.engines.cpu.work import KEYS, LOG2E, Array, Arrays, Tile, divide, gather, lay, lookup, pack, settle


class Shape(NamedTuple):
    """Of a tile: lanes of a vector, vectors of a row, rows that are summed up at a time."""

    width: int
    vectors: int
    block: int

    @property
    def rows(self) -> int:
        """Queries in a tile."""
        return self.width * self.vectors

    def tasks(self, share: int, lq: int) -> int:
        """Tiles of one key head, which `share` heads of queries read."""
        return share * -(-lq // self.rows) if lq >= self.rows else -(-share * lq // self.rows)


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
def kernel(shape: Shape) -> Callable[[Arrays, Tile, Array], int]:
    """The compiled pass for a tile shape: of arrays, scratch, and the number of the next task, which threads share."""
    WIDTH, ROWS = shape.width, shape.rows
    LITERAL = shape.width << 16 | shape.vectors << 8 | shape.block
    VERSION = stamp(tiles, vectors, work)

    @jit
    def forward(x: Arrays, tile: Tile, counter: Array) -> int:
        batch, heads, groups, lq, lk, depth, width = x.sizes
        share, apart, line = heads // groups, lq >= ROWS, 4 * ROWS
        each = -(-lq // ROWS) * share if apart else -(-share * lq // ROWS)
        q, o, s, bias = tile.q.ctypes.data, tile.o.ctypes.data, tile.s.ctypes.data, tile.bias.ctypes.data
        top, total, factor = tile.top.ctypes.data, tile.total.ctypes.data, tile.factor.ctypes.data
        slope, place, segment = tile.slope.ctypes.data, tile.place.ctypes.data, tile.segment.ctypes.data
        one, log2e, steep, cap = np.float32(1.0), np.float32(LOG2E), np.float32(x.cap[0]), np.float32(x.cap[1])
        low, high = x.span
        while True:
            task = take(counter.ctypes.data)
            if task >= batch * groups * each:
                break
            # The last rows first: where they see more keys than the others, threads end together.
            b, g, t = task // (groups * each), task // each % groups, each - 1 - task % each
            if apart:
                h, i = g * share + t % share, t // share * ROWS
                first, rows = (b * heads + h) * lq + i, min(ROWS, lq - i)
            else:
                h, i = g * share, 0
                first, rows = (b * heads + h) * lq + t * ROWS, min(ROWS, share * lq - t * ROWS)
            least, greatest, part_low, part_high = lay(x, tile, b, first, rows)
            turn(LITERAL, q, x.q.ctypes.data + 4 * first * depth, rows, depth, line, 4 * depth)
            pack(x, tile, first, rows, WIDTH)
            fill(LITERAL, o, width, np.float32(0.0))
            keys = x.k_length[b] if least <= greatest else 0
            for n in range(-(-keys // KEYS)):
                j = n * KEYS
                count = min(KEYS, keys - j)
                ends, parts = x.k_ends[b % x.k_ends.shape[0], n], x.k_parts[b % x.k_parts.shape[0], n]
                nearest, farthest = ends[0] - greatest, ends[1] - least
                if farthest < low or nearest > high or parts[1] < part_low or parts[0] > part_high:
                    continue
                key = (b * groups + g) * lk + j
                at = x.k_at[b % x.k_at.shape[0]].ctypes.data + 4 * j
                products(LITERAL, s, q, x.k.ctypes.data + 4 * key * depth, 4 * depth, count, depth)
                unit = np.float32(x.unit)
                if steep > 0:
                    bend(LITERAL, s, count, steep, cap)
                    unit = one
                if x.sloping:
                    lean(LITERAL, s, count, unit, at, place, slope)
                    unit = one
                if x.table.shape[1] > 0:
                    if x.evenly and apart:
                        column = x.zero - (x.k_at[b % x.k_at.shape[0], j] - tile.place[0])
                        start = x.table.ctypes.data + 4 * (h * x.table.shape[1] + column)
                        add(LITERAL, s, count, unit, start, -4, one)
                    else:
                        lookup(x, tile, b, first, rows, j, count)
                        add(LITERAL, s, count, unit, bias, line, one)
                    unit = one
                for m in range(x.bias_strides.shape[0]):
                    step = x.bias_strides[m]
                    whole = apart and step[4] == 1
                    if whole:
                        start = step[0] + b * step[1] + h * step[2] + i * step[3] + j
                        turn(LITERAL, bias, x.biases.ctypes.data + 4 * start, rows, count, line, 4 * step[3])
                    gather(x, tile, m, b, first, rows, j, count, WIDTH if whole else 0)
                    add(LITERAL, s, count, unit, bias, line, log2e)
                    unit = one
                if nearest < low or farthest > high:
                    hide(LITERAL, s, count, at, place, low, high - low)
                if parts[0] != part_high or parts[1] != part_low:
                    own = x.k_segment[b % x.k_segment.shape[0]].ctypes.data + 4 * j
                    part(LITERAL, s, count, own, segment)
                weigh(LITERAL, s, top, total, factor, count, unit)
                accumulate(LITERAL, o, factor, s, x.v.ctypes.data + 4 * key * width, 4 * width, count, width)
            divide(tile)
            scale(LITERAL, o, factor, slope, width)
            turn(LITERAL, x.out.ctypes.data + 4 * first * width, o, width, rows, 4 * width, line)
            settle(x, tile, b, first, rows, WIDTH)
        return VERSION

    return forward
