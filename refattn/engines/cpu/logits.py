"""The logits of a tile of rows and a tile of keys, as forward and backward passes both need them.

A tile's shape is passed as a literal number, as `vectors.Lanes` reads it.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from typing import Any

import numpy as np
from numba import literally  # type: ignore[attr-defined]

from refattn.engines.cpu._jit import jit
from refattn.engines.cpu.tiles import add, bend, hide, lean, part, products, turn
from refattn.engines.cpu.work import KEYS, LOG2E, Arrays, Ends, Rows, Tile, gather, lookup


@jit
def seen(x: Arrays, at: Rows, ends: Ends, n: int) -> bool:
    """Whether a pair of these rows and the n-th tile of keys may be visible."""
    near, far = x.k_ends[at.b % x.k_ends.shape[0], n]
    low, high = x.k_parts[at.b % x.k_parts.shape[0], n]
    if far - ends.least < x.span[0] or near - ends.greatest > x.span[1]:
        return False
    return bool(high >= ends.part_low and low <= ends.part_high)


@jit
def scores(shape: int, x: Arrays, tile: Tile, at: Rows, ends: Ends, j: int, count: int) -> Any:
    """Fill tile.s with logits over a number that is returned; times it they are logits times log₂e.

    −∞ for what is masked; keys j to j + count, all of one tile.
    """
    literally(shape)
    depth, s = x.sizes[5], tile.s.ctypes.data
    steep, key = np.float32(x.cap[0]), (at.b * x.sizes[2] + at.g) * x.sizes[4] + j
    products(shape, s, tile.q.ctypes.data, x.k.ctypes.data + 4 * key * depth, 4 * depth, count, depth)
    unit = np.float32(x.unit)
    if steep > 0:
        bend(shape, s, count, steep, np.float32(x.cap[1]))
        unit = np.float32(1.0)
    return biased(shape, x, tile, at, ends, j, count, unit)


@jit
def biased(shape: int, x: Arrays, tile: Tile, at: Rows, ends: Ends, j: int, count: int, unit: Any) -> Any:
    """Add biases and masks to logits in tile.s over `unit`; return what they are over now."""
    literally(shape)
    lanes, s, bias = tile.top.size, tile.s.ctypes.data, tile.bias.ctypes.data
    line, one, places = 4 * lanes, np.float32(1.0), x.k_at[at.b % x.k_at.shape[0]]
    if x.sloping:
        lean(shape, s, count, unit, places.ctypes.data + 4 * j, tile.place.ctypes.data, tile.slope.ctypes.data)
        unit = one
    if x.table.shape[1] > 0:
        if x.evenly and at.apart:
            column = x.zero - (places[j] - tile.place[0])
            add(shape, s, count, unit, x.table.ctypes.data + 4 * (at.h * x.table.shape[1] + column), -4, one)
        else:
            lookup(x, tile, at, j, count)
            add(shape, s, count, unit, bias, line, one)
        unit = one
    for m in range(x.bias_strides.shape[0]):
        step = x.bias_strides[m]
        whole = at.apart and step[4] == 1
        if whole:
            start = step[0] + at.b * step[1] + at.h * step[2] + at.i * step[3] + j
            turn(shape, bias, x.biases.ctypes.data + 4 * start, at.rows, count, line, 4 * step[3])
        gather(x, tile, at, m, j, count, shape >> 16 if whole else 0)
        add(shape, s, count, unit, bias, line, np.float32(LOG2E))
        unit = one
    veil(shape, x, tile, at, ends, j, count)
    return unit


@jit
def veil(shape: int, x: Arrays, tile: Tile, at: Rows, ends: Ends, j: int, count: int) -> None:
    """−∞ in tile.s for pairs that positions or segments mask, where the tile has both kinds."""
    literally(shape)
    n, s = j // KEYS, tile.s.ctypes.data
    near, far = x.k_ends[at.b % x.k_ends.shape[0], n]
    low, high = x.span
    if near - ends.greatest < low or far - ends.least > high:
        places = x.k_at[at.b % x.k_at.shape[0]].ctypes.data + 4 * j
        hide(shape, s, count, places, tile.place.ctypes.data, low, high - low)
    first, last = x.k_parts[at.b % x.k_parts.shape[0], n]
    if first != ends.part_high or last != ends.part_low:
        own = x.k_segment[at.b % x.k_segment.shape[0]].ctypes.data + 4 * j
        part(shape, s, count, own, tile.segment.ctypes.data)
