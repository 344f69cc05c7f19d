"""The logits of a tile of rows and a tile of keys, as forward and backward passes both need them.

A tile's shape is passed as a literal number, as `vectors.Lanes` reads it.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.engines.cpu.sight import MASKS, POSITIONS, SEGMENTS
from refattn.engines.cpu.tiles import add, bend, hide, keep, lean, part, products, turn, turn_mask, widen
from refattn.engines.cpu.work import LOG2E, Array, Arrays, Rows, Tile, gather, gather_mask, lookup
from refattn.jit import inner


@inner
def stored(shape: int, wide: Array, numbers: Array, at: int, count: int) -> Any:
    """Address of `count` float32 numbers of k or v from index `at` on, widened into `wide` where they are narrower."""
    address = np.int64(numbers.ctypes.data) + numbers.itemsize * at
    if numbers.itemsize == 4:
        return address
    widen(shape, wide.ctypes.data, address, count)
    return np.int64(wide.ctypes.data)


@inner
def scores(shape: int, x: Arrays, tile: Tile, at: Rows, k: int, j: int, count: int, kinds: int) -> Any:
    """Fill tile.s with logits over a number that is returned; times it they are logits times log₂e.

    −∞ for what is masked; keys j to j + count, all of one tile, whose vectors are at the address k in float32. `kinds`:
    what hides some of the pairs, as `see` says.
    """
    s, steep = tile.s.ctypes.data, np.float32(x.cap[0])
    products(shape, s, tile.q.ctypes.data, k, 4 * x.sizes[5], count, x.sizes[5])
    unit = np.float32(x.unit)
    if steep > 0:
        bend(shape, s, count, steep, np.float32(x.cap[1]))
        unit = np.float32(1.0)
    return biased(shape, x, tile, at, j, count, kinds, unit)


@inner
def biased(shape: int, x: Arrays, tile: Tile, at: Rows, j: int, count: int, kinds: int, unit: Any) -> Any:
    """Add biases and masks to logits in tile.s over `unit`; return what they are over now."""
    line, s, bias = 4 * tile.lanes, tile.s.ctypes.data, tile.bias.ctypes.data
    one, width, places = np.float32(1.0), shape >> 16 & 255, x.k_at[at.b % x.k_at.shape[0]]
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
        gather(x, tile, at, m, j, count, width if whole else 0)
        add(shape, s, count, unit, bias, line, np.float32(LOG2E))
        unit = one
    if kinds:
        veil(shape, x, tile, at, j, count, kinds)
    return unit


@inner
def veil(shape: int, x: Arrays, tile: Tile, at: Rows, j: int, count: int, kinds: int) -> None:
    """−∞ in tile.s for pairs that are masked."""
    s, bias, line = tile.s.ctypes.data, tile.bias.ctypes.data, 4 * tile.lanes
    if kinds & POSITIONS:
        low, high = x.span
        places = x.k_at[at.b % x.k_at.shape[0]].ctypes.data + 4 * j
        hide(shape, s, count, places, tile.place.ctypes.data, low, high - low)
    if kinds & SEGMENTS:
        own = x.k_segment[at.b % x.k_segment.shape[0]].ctypes.data + 4 * j
        part(shape, s, count, own, tile.segment.ctypes.data)
    if kinds & MASKS:
        for m in range(x.mask_strides.shape[0]):
            step = x.mask_strides[m]
            whole = at.apart and step[4] == 1
            if whole:
                start = step[0] + at.b * step[1] + at.h * step[2] + at.i * step[3] + j
                turn_mask(shape, bias, x.masks.ctypes.data + start, at.rows, count, line, step[3])
            gather_mask(x, tile, at, m, j, count, (shape >> 16 & 255) if whole else 0)
            keep(shape, s, count, bias)
