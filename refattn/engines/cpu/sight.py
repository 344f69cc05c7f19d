"""What a tile of rows sees of a tile of keys: nothing, all of it, or something that a mask has to tell.

`room` is a flat array to write to, of one number at least.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import numpy as np

from refattn.engines.cpu.tiles import survey
from refattn.engines.cpu.work import KEYS, Array, Arrays, Ends, Rows
from refattn.jit import inner

POSITIONS, SEGMENTS, MASKS = 1, 2, 4  # what hides some pairs and not all
NOTHING = -1


@inner
def see(shape: int, x: Arrays, room: Array, at: Rows, ends: Ends, n: int, count: int) -> int:
    """Sum of what hides pairs of these rows and the n-th tile of `count` keys; NOTHING where all are hidden."""
    near, far = x.k_ends[at.b % x.k_ends.shape[0], n]
    low, high = x.k_parts[at.b % x.k_parts.shape[0], n]
    kinds = between(x.span, ends, near, far, low, high)
    if kinds == NOTHING or x.mask_strides.shape[0] == 0:
        return kinds
    return masked(shape, x, room, at, n * KEYS, count, kinds)


@inner
def between(span: tuple[int, int], ends: Ends, near: int, far: int, low: int, high: int) -> int:
    """As `see`, masks aside, of rows and keys whose positions and segments have these ends."""
    first, last = span
    if far - ends.least < first or near - ends.greatest > last or high < ends.part_low or low > ends.part_high:
        return NOTHING
    kinds = 0
    if near - ends.greatest < first or far - ends.least > last:
        kinds = POSITIONS
    if low != ends.part_high or high != ends.part_low:
        kinds += SEGMENTS
    return kinds


@inner
def hidden(span: tuple[int, int], ends: Ends, place: int, part: int) -> bool:
    """Whether no row with these ends sees a key, masks aside."""
    away = place - ends.least < span[0] or place - ends.greatest > span[1]
    return bool(away or part < ends.part_low or part > ends.part_high)


@inner
def masked(shape: int, x: Arrays, room: Array, at: Rows, j: int, count: int, kinds: int) -> int:
    """`kinds` and MASKS, if masks hide some of the pairs with the keys from j on; NOTHING if one hides all."""
    _, heads, _, lq, _, _, _ = x.sizes
    found, every = room.view(np.uint8), True
    for m in range(x.mask_strides.shape[0]):
        step, some = x.mask_strides[m], False
        # Rows of one head lie one stride apart.
        rows = at.rows if at.apart else 1
        for r in range(0, at.rows, rows):
            h, i = (at.first + r) // lq % heads, (at.first + r) % lq
            start = x.masks.ctypes.data + step[0] + at.b * step[1] + h * step[2] + i * step[3] + j * step[4]
            survey(shape, found.ctypes.data, start, rows, count if step[4] else 1, step[3])
            some, every = some or found[0] != 0, every and found[1] != 0
        if not some:
            return NOTHING
    return kinds if every else kinds + MASKS


@inner
def reach(shape: int, x: Arrays, room: Array, at: Rows, ends: Ends, j: int, count: int) -> tuple[int, int, int]:
    """First and end of the keys from j to j + count that a few rows may see, and what hides pairs of them."""
    if ends.least > ends.greatest:
        return j, j, NOTHING
    places, parts = x.k_at[at.b % x.k_at.shape[0]], x.k_segment[at.b % x.k_segment.shape[0]]
    several = parts.size > 1
    first, end = j, j + count
    while first < end and hidden(x.span, ends, places[first], parts[first] if several else ends.part_low):
        first += 1
    while end > first and hidden(x.span, ends, places[end - 1], parts[end - 1] if several else ends.part_low):
        end -= 1
    if first == end:
        return j, j, NOTHING
    near, far, low, high = places[first], places[first], ends.part_low, ends.part_low
    for n in range(first, end):
        near, far = min(near, places[n]), max(far, places[n])
    if several:
        low, high = parts[first], parts[first]
        for n in range(first, end):
            low, high = min(low, parts[n]), max(high, parts[n])
    kinds = between(x.span, ends, near, far, low, high)
    if x.mask_strides.shape[0] > 0:
        kinds = masked(shape, x, room, at, first, end - first, kinds)
    return first, end, kinds
