r"""The decode kernel: few rows of queries for each key head, and many keys, of which each is read once.

One task is a *share*: a stretch of the keys of one key head, met by the rows of all query heads that read it; `dots`
has its steps. A share leaves a part: for each row the maximum m of its logits, the sum l of its weights and o. Who
ends the last share of a key head merges its parts, in the order of the keys:

    m = max(sink, m_1, m_2, ...),  l = exp2(sink − m) + Σ_n l_n exp2(m_n − m),  out = Σ_n o_n exp2(m_n − m) / l

k and v are not looked at beforehand. A number in them that is not finite makes what comes of it NaN, and the row is
marked to be made again; where a key is masked its logit does not matter.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import accumulate
from typing import NamedTuple

import numpy as np
from numba import literally  # type: ignore[attr-defined]

from refattn.engines.cpu import dots as steps
from refattn.engines.cpu import sight, tiles, vectors, work
from refattn.engines.cpu._jit import bare, inner, lanes, stamp
from refattn.engines.cpu.dots import BYTES, LEAST, PARTS, added, blend, dots, sloped, weights
from refattn.engines.cpu.pool import together
from refattn.engines.cpu.sight import MASKS, NOTHING, POSITIONS, SEGMENTS, see
from refattn.engines.cpu.tiles import BOTTOM, bend, hide, keep, part
from refattn.engines.cpu.vectors import FLOAT32, take
from refattn.engines.cpu.work import KEYS, LN2, LOG2E, Array, Arrays, Ends, Results, Rows, own

MOST = 16  # rows of a key head
_LEAST = 512  # keys in a share, but for the last
_SHORT, _LONG = 1024, 8192  # bytes that are brought near ahead of one pass, and of several
_TILES = 1  # of keys whose weights are made together
_TASKS = 128  # shares wanted in all, so that threads end together


class Parts(NamedTuple):
    """What shares leave: top and total (B·Hkv·shares, R), o (B·Hkv·shares, R, W), W being Dv in whole lines.

    ends (B·Hkv,) int64: how many shares of a key head have ended.
    """

    top: Array
    total: Array
    o: Array
    ends: Array


class Scratch(NamedTuple):
    """A thread's scratch for R rows and several tiles of keys.

    q (R, D in whole lines), s (_TILES, R, KEYS), a bias (R, KEYS), sums (R, lanes); factor, ones and slope, a number for
    each row; place, segment (R,) int32; at (KEYS,) int32 positions or segments of keys; first (_TILES,) int32 where
    tiles begin.
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


@own
def scratch(count: int, depth: int) -> Scratch:
    """Scratch for so many rows, each part from a whole line of the cache on."""
    shapes = [(count, depth), (_TILES, count, KEYS), (count, KEYS), (count, lanes()), *[(count,)] * 5, (KEYS,), (_TILES,)]
    sizes = [math.prod(shape) for shape in shapes]
    starts = [0, *accumulate(-(-size // 16) * 16 for size in sizes)]
    memory = np.empty(starts[-1] + 16, np.float32)
    skipped = -memory.ctypes.data // 4 % 16
    found = [
        memory[skipped + start : skipped + start + size].reshape(shape)
        for start, size, shape in zip(starts, sizes, shapes, strict=False)
    ]
    found[5][:] = 1.0
    return Scratch(*found[:7], *(a.view(np.int32) for a in found[7:]))


def in_lines(size: int, storage: int) -> int:
    """Numbers of a row in whole lines."""
    line = lanes() * PARTS[storage]
    return -(-size // line) * line


def share_of(heads: int, lk: int) -> int:
    """Keys in a share, whole tiles: `heads` counts the key heads of all batches."""
    return max(_LEAST, -(-lk * heads // _TASKS // KEYS) * KEYS)


def suits(heads: int, groups: int, lq: int) -> bool:
    """Whether so few rows of queries share a key head that this kernel is the faster one."""
    return heads // groups * lq <= MOST


def run(x: Arrays, storage: int = FLOAT32) -> tuple[Array, Array, Array]:
    """Out (B,Hq,Lq,Dv), lse (B,Hq,Lq) and which rows are to be made again."""
    batch, heads, groups, lq, lk, depth, width = x.sizes
    shape = (batch, heads, lq)
    out, lse, redo = np.empty((*shape, width), np.float32), np.empty(shape, np.float32), np.empty(shape, np.bool_)
    results = Results(out.reshape(-1), lse.reshape(-1), redo.reshape(-1))
    count, share = heads // groups * lq, share_of(batch * groups, lk)
    tasks = batch * groups * -(-lk // share)
    top, total = (np.empty((tasks, count), np.float32) for _ in range(2))
    o = np.empty((tasks, count, in_lines(width, storage)), np.float32)
    parts = Parts(top, total, o, np.zeros(batch * groups, np.int64))
    counter = np.zeros(1, np.int64)
    together(
        kernel(lanes(), storage),
        lambda: (x, results, parts, scratch(count, in_lines(depth, storage)), share, counter),
        tasks,
        lse.size * lk * (depth + width),
    )
    return out, lse, redo


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
    literally(shape)
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
    for n in range(count):
        to[n] = numbers[j + n]


@inner
def bias(shape: int, x: Arrays, tile: Scratch, s: int, at: Rows, j: int, count: int) -> None:
    """Add all biases of a tile to its logits at the address s."""
    literally(shape)
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
def merge(x: Arrays, results: Results, parts: Parts, at: Rows, shares: int, lane: int, lines: int) -> None:
    """Results of the rows of a key head from the parts of its shares; v's numbers lie in o as in `dots`."""
    _, _, groups, lq, _, _, width = x.sizes
    first, line = (at.b * groups + at.g) * shares, lane * lines
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
                factor = np.float32(2.0 ** (float(parts.top[first + n, r]) - float(top)) / total)
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


@inner
def visible(
    shape: int, x: Arrays, room: Array, at: Rows, ends: Ends, n: int, stop: int, keys: int
) -> tuple[int, int]:
    """The first tile of keys from n on, before `stop`, of which a row sees some, and what hides pairs of it."""
    literally(shape)
    while n < stop:
        kinds = see(shape, x, room, at, ends, n, min(KEYS, keys - n * KEYS))
        if kinds != NOTHING:
            return n, kinds
        n += 1
    return n, NOTHING


@cache
def kernel(lane: int, storage: int) -> Callable[..., int]:
    """The compiled pass for vectors of so many lanes and a storage; threads share the counter of one number."""
    SHAPE = storage << 24 | lane << 16 | KEYS // lane << 8
    ONE, TWO, FOUR = SHAPE | 1, SHAPE | 2, SHAPE | 4
    LANES, LINES, SIZE = lane, PARTS[storage], BYTES[storage]
    TILES, SHORT, LONG = _TILES, _SHORT, _LONG
    VERSION = stamp(sight, steps, tiles, vectors, work)

    @bare
    def decode(x: Arrays, results: Results, parts: Parts, tile: Scratch, share: int, counter: Array) -> int:
        batch, heads, groups, lq, lk, depth, width = x.sizes
        shares, tasks, count = -(-lk // share), parts.top.shape[0], parts.top.shape[1]
        q, s, line, bent = tile.q.ctypes.data, tile.s.ctypes.data, 4 * tile.q.shape[1], x.cap[0] > 0
        sums, factor, ones = tile.sums.ctypes.data, tile.factor.ctypes.data, tile.ones.ctypes.data
        o_line, row, whole = 4 * parts.o.shape[2], 4 * KEYS, 4 * KEYS * count
        c = np.float32(x.cap[0] if bent else x.unit)
        k_size, v_size = depth * SIZE, width * SIZE
        # Several passes over the same keys take them in small steps, so that they are read from memory once.
        step, ahead = (KEYS, SHORT) if count <= 2 else (LANES, LONG)
        k_ahead, v_ahead = -(-ahead // k_size) * k_size, -(-ahead // v_size) * v_size
        while True:
            task = take(counter.ctypes.data)
            if task >= tasks:
                break
            b, g = task // (groups * shares), task // shares % groups
            h = g * (heads // groups)
            at = Rows(b, g, h, 0, (b * heads + h) * lq, count, count == lq)
            ends = begin(x, tile, at, LANES, LINES)
            keys = x.k_length[b] if ends.least <= ends.greatest else 0
            n, stop = task % shares * (share // KEYS), -(-min(keys, (task % shares + 1) * share) // KEYS)
            top, o = parts.top[task].ctypes.data, parts.o[task].ctypes.data
            parts.top[task] = LEAST
            parts.o[task] = 0.0
            tile.sums[:] = 0.0
            k, v = x.k.ctypes.data + (b * groups + g) * lk * k_size, x.v.ctypes.data + (b * groups + g) * lk * v_size
            n, kinds = visible(SHAPE, x, tile.bias[0], at, ends, n, stop, keys)
            while n < stop:
                used = 0
                while used < TILES and n < stop:
                    j, many, here = n * KEYS, min(KEYS, keys - n * KEYS), s + used * whole
                    a = k + j * k_size
                    for m in range(0, many, step):
                        some, near = min(step, many - m), k_ahead
                        for r in range(0, count - 3, 4):
                            dots(FOUR, here + row * r + 4 * m, q + line * r, line, a + m * k_size, near, some, depth, c)
                            near = 0
                        if count & 2:
                            r = count & ~3
                            dots(TWO, here + row * r + 4 * m, q + line * r, line, a + m * k_size, near, some, depth, c)
                            near = 0
                        if count & 1:
                            r = count - 1
                            dots(ONE, here + row * r + 4 * m, q + line * r, line, a + m * k_size, near, some, depth, c)
                    if bent:
                        bend(SHAPE, here, count, np.float32(1.0), np.float32(x.cap[1]))
                    bias(SHAPE, x, tile, here, at, j, many)
                    veil(SHAPE, x, tile, here, at, j, many, kinds)
                    for r in range(count):
                        for m in range(many, KEYS):
                            tile.s[used, r, m] = -np.inf
                    tile.first[used] = j
                    used += 1
                    n, kinds = visible(SHAPE, x, tile.bias[0], at, ends, n + 1, stop, keys)
                weights(SHAPE, s, whole, used, top, sums, factor, count)
                for t in range(used):
                    j, many, here = tile.first[t], min(KEYS, keys - tile.first[t]), s + t * whole
                    for m in range(0, many, step):
                        some, near, by = min(step, many - m), v_ahead, factor if t + m == 0 else ones
                        a, w = v + (j + m) * v_size, here + 4 * m
                        for r in range(0, count - 1, 2):
                            blend(TWO, o + o_line * r, o_line, by + 4 * r, w + row * r, a, near, some, width)
                            near = 0
                        if count & 1:
                            r = count - 1
                            blend(ONE, o + o_line * r, o_line, by + 4 * r, w + row * r, a, near, some, width)
            for r in range(count):
                total = np.float32(0.0)
                for lane in range(LANES):
                    total += tile.sums[r, lane]
                parts.total[task, r] = total
            if take(parts.ends.ctypes.data + 8 * (b * groups + g)) == shares - 1:
                merge(x, results, parts, at, shares, LANES, LINES)
        return VERSION

    return decode
