"""What the decode kernel keeps of a share of the keys and of a thread, and the parts of its work that go row by row."""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from refattn.engines.cpu.columns import LEAST, added, sloped
from refattn.engines.cpu.lines import PARTS
from refattn.engines.cpu.sight import MASKS, POSITIONS, SEGMENTS
from refattn.engines.cpu.tiles import BOTTOM, hide, keep, part
from refattn.engines.cpu.work import KEYS, LN2, LOG2E, Array, Arrays, Ends, Results, Rows, own
from refattn.jit import inner, lanes

TILES = 8  # of keys whose weights are made together
_LEAST = 512  # keys in a share, but for the last
_TASKS = 128  # shares wanted in all, so that threads end together


class Parts(NamedTuple):
    """What shares leave: top and total (B·Hkv·shares, R), o (B·Hkv·shares, R, W), W being Dv in whole lines.

    ends (B·Hkv,) int64: how many shares of a key head have ended. starts (1 or B, shares) int64: where they begin.
    """

    top: Array
    total: Array
    o: Array
    ends: Array
    starts: Array


class Scratch(NamedTuple):
    """A thread's scratch for R rows and several tiles of keys.

    q (R, D in whole lines), s (TILES, R, KEYS), a bias (R, KEYS), sums (R, lanes); factor, ones, slope (R,); place,
    segment (R,) int32; at (KEYS,) int32 positions or segments of keys; first (TILES,) int32 where tiles begin;
    where (2 KEYS,) int64 addresses of rows of k or v; k_scale (KEYS,), v_scale (TILES, KEYS).
    """

    q: Array
    s: Array
    bias: Array
    sums: Array
    factor: Array
    ones: Array
    slope: Array
    place: Array
    segment: Array
    at: Array
    first: Array
    where: Array
    k_scale: Array
    v_scale: Array


@own
def scratch(count: int, depth: int) -> Scratch:
    """Scratch for so many rows, each part from a whole line of the cache on."""
    tiles = [(TILES, count, KEYS), (count, KEYS), (count, lanes())]
    shapes = [(count, depth), *tiles, *[(count,)] * 5, (KEYS,), (TILES,), (4 * KEYS,), (KEYS,), (TILES, KEYS)]
    sizes = [math.prod(shape) for shape in shapes]
    starts = [0, *accumulate(-(-size // 16) * 16 for size in sizes)]
    memory = np.empty(starts[-1] + 16, np.float32)
    skipped = -memory.ctypes.data // 4 % 16
    found = [
        memory[skipped + start : skipped + start + size].reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]
    found[5][:] = 1.0
    kinds = [np.float32] * 7 + [np.int32] * 4 + [np.int64] + [np.float32] * 2
    return Scratch(*(a.view(kind) for a, kind in zip(found, kinds, strict=True)))


def in_lines(size: int, storage: int) -> int:
    """Numbers of a row in whole lines."""
    line = lanes() * PARTS[storage]
    return -(-size // line) * line


def share_of(heads: int, lk: int) -> int:
    """Keys in a share, whole tiles: `heads` counts the key heads of all batches."""
    return max(_LEAST, -(-lk * heads // _TASKS // KEYS) * KEYS)


@inner
def place_of(d: int, lane: int, parts: int) -> int:
    """Where number d of a row stands in lines of `parts` vectors of `lane` numbers; all powers of two."""
    line = lane * parts
    place: int = (d & -line) + (d & parts - 1) * lane + (d & line - 1) // parts
    return place


@inner
def begin(x: Arrays, tile: Scratch, at: Rows, lane: int, parts: int) -> Ends:
    """Begin a share: the rows of a key head, q by lines."""
    lq, depth, b = x.sizes[3], x.sizes[5], at.b
    least, greatest, low, high = 1 << 40, -(1 << 40), 1 << 40, -(1 << 40)
    for r in range(at.rows):
        i, h = r % lq, at.h + r // lq
        tile.place[r] = place = x.q_at[b % x.q_at.shape[0], i]
        tile.segment[r] = segment = x.q_segment[b % x.q_segment.shape[0], i]
        tile.slope[r] = x.slopes[h]
        if i < x.q_length[b]:
            least, greatest = min(least, place), max(greatest, place)
            low, high = min(low, segment), max(high, segment)
        q = tile.q[r]
        q[:] = 0.0
        for d in range(depth):
            q[place_of(d, lane, parts)] = np.float32(x.sign) * x.q[(at.first + r) * depth + d]
    return Ends(least, greatest, low, high)


@inner
def veil(shape: int, x: Arrays, tile: Scratch, s: int, at: Rows, j: int, count: int, kinds: int) -> None:
    """−∞ in the logits at the address s for pairs that are masked; `kinds` as `sight.see` says."""
    lq = x.sizes[3]
    if kinds & POSITIONS:
        low, high = x.span
        copy(tile.at, x.k_at[at.b % x.k_at.shape[0]], j, count)
        hide(shape, s, at.rows, tile.place.ctypes.data, tile.at.ctypes.data, -high, high - low)
    if kinds & SEGMENTS:
        copy(tile.at, x.k_segment[at.b % x.k_segment.shape[0]], j, count)
        part(shape, s, at.rows, tile.segment.ctypes.data, tile.at.ctypes.data)
    if kinds & MASKS:
        for m in range(x.mask_strides.shape[0]):
            start, of_b, of_h, of_i, of_j = x.mask_strides[m]
            for r in range(at.rows):
                first = start + at.b * of_b + (at.h + r // lq) * of_h + r % lq * of_i + j * of_j
                for n in range(count):
                    tile.bias[r, n] = 0.0 if x.masks[first + n * of_j] else -np.inf
            keep(shape, s, at.rows, tile.bias.ctypes.data)


@inner
def copy(to: Array, numbers: Array, j: int, count: int) -> None:
    """Numbers j to j + count."""
    # A slice, for an index that may be negative is no vector's.
    some = numbers[j : j + count]
    for n in range(count):
        to[n] = some[n]


@inner
def bias(shape: int, x: Arrays, tile: Scratch, s: int, at: Rows, j: int, count: int) -> None:
    """Add all biases of a tile to its logits at the address s."""
    lq, b = x.sizes[3], at.b
    places = x.k_at[b % x.k_at.shape[0]]
    if x.sloping:
        copy(tile.at, places, j, count)
        sloped(shape, s, at.rows, tile.at.ctypes.data, tile.place.ctypes.data, tile.slope.ctypes.data)
    if x.table.shape[1] > 0:
        for r in range(at.rows):
            h, column = at.h + r // lq, x.zero + tile.place[r]
            for n in range(count):
                tile.bias[r, n] = x.table[h, column - places[j + n]]
        added(shape, s, at.rows, tile.bias.ctypes.data, np.float32(1.0))
    for m in range(x.bias_strides.shape[0]):
        start, of_b, of_h, of_i, of_j = x.bias_strides[m]
        for r in range(at.rows):
            first = start + b * of_b + (at.h + r // lq) * of_h + r % lq * of_i + j * of_j
            for n in range(count):
                tile.bias[r, n] = x.biases[first + n * of_j]
        added(shape, s, at.rows, tile.bias.ctypes.data, np.float32(LOG2E))


@inner
def merge(x: Arrays, results: Results, parts: Parts, at: Rows, shares: int, lane: int, lines: int, unit: float) -> None:
    """Results of the rows of a key head from the parts of its shares, of which o is over `unit` and lies as `lines`."""
    _, _, groups, lq, _, _, width = x.sizes
    first = (at.b * groups + at.g) * shares
    for r in range(at.rows):
        row, sink = at.first + r, x.sink[at.h + r // lq]
        out = results.out[row * width : (row + 1) * width]
        out[:] = 0.0
        top = np.float32(LEAST if sink == BOTTOM else sink)
        dead = r % lq >= x.q_length[at.b]
        if not dead:
            for n in range(shares):
                top = max(top, parts.top[first + n, r])
        total = 0.0 if sink == BOTTOM else 2.0 ** (float(sink) - float(top))
        if not dead:
            for n in range(shares):
                total += parts.total[first + n, r] * 2.0 ** (float(parts.top[first + n, r]) - float(top))
        good = math.isfinite(total)
        if total != 0.0 and not dead:
            # The sum goes into the first share's part, and from there in order to the results.
            o = parts.o[first, r]
            for n in range(shares):
                factor = np.float32(unit * 2.0 ** (float(parts.top[first + n, r]) - float(top)) / total)
                other = parts.o[first + n, r]
                for d in range(o.size):
                    o[d] = factor * other[d] + (o[d] if n > 0 else np.float32(0.0))
            strange = np.float32(0.0)
            for d in range(width):
                out[d] = o[place_of(d, lane, lines)]
                strange += out[d] * np.float32(0.0)
            good = good and strange == 0.0
        results.redo[row] = not good
        results.lse[row] = -np.inf if total == 0.0 else LN2 * (float(top) + math.log2(total))
