r"""The decode kernel: few rows of queries for each key head, and many keys, of which each is read once.

One task is a *share*: a stretch of the keys of one key head, met by the rows of all query heads that read it; `dots`
and `columns` have its steps. A share leaves a part: for each row the maximum m of its logits, the sum l of its weights
and o. Who ends the last share of a key head merges its parts, in the order of the keys:

    m = max(sink, m_1, m_2, ...),  l = exp2(sink − m) + Σ_n l_n exp2(m_n − m),  out = Σ_n o_n exp2(m_n − m) / l

k and v are not looked at beforehand. A number in them that is not finite makes what comes of it NaN, and the row is
marked to be made again; where a key is masked its logit does not matter.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np

from refattn.engines.cpu import blocks, columns, lines, shares, sight, tiles, tuples, vectors, work
from refattn.engines.cpu import dots as products
from refattn.engines.cpu.blocks import Blocks, located, scales
from refattn.engines.cpu.cached import Norms
from refattn.engines.cpu.columns import LEAST, scaled, valued, weights
from refattn.engines.cpu.dots import blend, dots
from refattn.engines.cpu.lines import PARTS, UNIT
from refattn.engines.cpu.pool import together
from refattn.engines.cpu.remote import left_out
from refattn.engines.cpu.shares import TILES, Parts, Scratch, begin, bias, in_lines, merge, scratch, share_of, veil
from refattn.engines.cpu.sight import NOTHING, between, masked
from refattn.engines.cpu.tiles import bend
from refattn.engines.cpu.tuples import lent
from refattn.engines.cpu.vectors import FLOAT32, take
from refattn.engines.cpu.work import KEYS, Array, Arrays, Ends, Results, Rows
from refattn.jit import bare, inner, lanes, stamp

MOST = 16  # of a key head at most; with few keys fewer, as was measured: 4 always, 8 from 128 keys on
_ALWAYS = 4
_ROWS_AHEAD = 4  # rows of k and v that are brought near ahead of a single pass over them
_BYTES_AHEAD = 8192  # the same where several passes share what was read, or where pages do not follow each other


def suits(rows: int, lk: int) -> bool:
    """Whether so few rows of queries share a key head of so many keys that this kernel is the faster one."""
    return rows <= MOST and (rows <= _ALWAYS or 2 * rows * rows <= lk)


def run(
    x: Arrays, kept: Blocks, storage: int = FLOAT32, tabled: bool = False, norms: Norms | None = None
) -> tuple[Array, Array, Array]:
    """Out (B,Hq,Lq,Dv), lse (B,Hq,Lq) and which rows are to be made again; tabled: whether keys stand in pages.

    Where norms are known, keys that are proved not to count are not read.
    """
    if norms is not None:
        kept = kept._replace(left=left_out(x, norms, lambda *stretch: _pass(x, kept, storage, tabled, *stretch)))
    share = share_of(x.sizes[0] * x.sizes[2], x.sizes[4])
    return _pass(x, kept, storage, tabled, np.arange(0, x.sizes[4], share)[None], share)


def _pass(x: Arrays, kept: Blocks, storage: int, tabled: bool, starts: Array, share: int) -> tuple[Array, Array, Array]:
    """As `run`, of the keys of some shares: `starts` (1 or B, shares) tells where they begin."""
    batch, heads, groups, lq, lk, depth, width = x.sizes
    shape = (batch, heads, lq)
    out, lse, redo = np.empty((*shape, width), np.float32), np.empty(shape, np.float32), np.empty(shape, np.bool_)
    results = Results(out.reshape(-1), lse.reshape(-1), redo.reshape(-1))
    count, tasks = heads // groups * lq, batch * groups * starts.shape[1]
    top, total = (np.empty((tasks, count), np.float32) for _ in range(2))
    o = np.empty((tasks, count, in_lines(width, storage)), np.float32)
    parts = Parts(top, total, o, np.zeros(batch * groups, np.int64), starts)
    counter = np.zeros(1, np.int64)
    together(
        kernel(lanes(), storage, tabled),
        lambda: (x, kept, results, parts, scratch(count, in_lines(depth, storage)), share, counter),
        tasks,
        lse.size * min(lk, share * starts.shape[1]) * (depth + width),
    )
    return out, lse, redo


@cache
def kernel(lane: int, storage: int, tabled: bool = False) -> Callable[..., int]:
    """The compiled pass for vectors of so many lanes and a storage; threads share the counter of one number."""
    ONE = UNIT[storage]
    SHAPE, LANES, LINES = tabled << 27 | storage << 24 | lane << 16 | KEYS // lane << 8, lane, PARTS[storage]
    VERSION = stamp(blocks, columns, lines, products, shares, sight, tiles, tuples, vectors, work)

    @bare
    def decode(
        x: Arrays, kept: Blocks, results: Results, parts: Parts, tile: Scratch, share: int, counter: Array
    ) -> int:
        x, kept, results, parts, tile = lent(x), lent(kept), lent(results), lent(parts), lent(tile)
        _, heads, groups, lq, _, _, _ = x.sizes
        each, rows = parts.starts.shape[1], parts.top.shape[1]
        while True:
            task = take(counter.ctypes.data)
            if task >= parts.top.shape[0]:
                break
            b, g = task // (groups * each), task // each % groups
            first = parts.starts[b % parts.starts.shape[0], task % each]
            h = g * (heads // groups)
            at = Rows(b, g, h, 0, (b * heads + h) * lq, rows, rows == lq)
            ends = begin(x, tile, at, LANES, LINES)
            parts.top[task] = LEAST
            parts.o[task] = 0.0
            tile.sums[:] = 0.0
            if ends.least <= ends.greatest:
                stop = min(first + share, x.k_length[b])
                attend(SHAPE, x, kept, tile, at, ends, parts.top[task], parts.o[task], first, stop)
            for r in range(rows):
                total = np.float32(0.0)
                for n in range(LANES):
                    total += tile.sums[r, n]
                parts.total[task, r] = total
            if take(parts.ends.ctypes.data + 8 * (b * groups + g)) == each - 1:
                merge(x, results, parts, at, each, LANES, LINES, ONE)
        return VERSION

    return decode


@inner
def attend(
    shape: int,
    x: Arrays,
    kept: Blocks,
    tile: Scratch,
    at: Rows,
    ends: Ends,
    top: Array,
    o: Array,
    first: int,
    stop: int,
) -> None:
    """Take the keys from `first`, where a tile begins, to `stop` into a share's part."""
    step, size = step_of(shape, at), x.sizes[5] * x.k.itemsize
    k_ends, k_parts = x.k_ends[at.b % x.k_ends.shape[0]], x.k_parts[at.b % x.k_parts.shape[0]]
    q, q_line, near = tile.q.ctypes.data, 4 * tile.q.shape[1], ahead(shape, at, size)
    k, unit = x.k.ctypes.data, 8 if shape >> 27 & 1 else size
    s, used = tile.s.ctypes.data, 0
    bent, biased = x.cap[0] > 0, x.sloping or x.table.shape[1] + x.bias_strides.shape[0] > 0
    c = np.float32(x.cap[0] if bent else x.unit)
    for j in range(first, stop, KEYS):
        n, count, here = j // KEYS, min(KEYS, stop - j), s + used * 4 * KEYS * at.rows
        kinds = between(x.span, ends, k_ends[n, 0], k_ends[n, 1], k_parts[n, 0], k_parts[n, 1])
        if kept.left.shape[1] > 0 and kept.left[at.b * x.sizes[2] + at.g, n]:
            kinds = NOTHING
        if kinds != NOTHING and x.mask_strides.shape[0] > 0:
            kinds = masked(shape, x, tile.bias[0], at, j, count, kinds)
        if kinds != NOTHING:
            at_k = located(shape, kept, tile.where, at.b, at.g, x.sizes[2], k, size, j, stop, near)
            for m in range(0, count, step):
                many = min(step, count - m)
                dots(shape, here + 4 * m, q, q_line, at.rows, at_k + m * unit, near * unit, many, x.sizes[5], c)
            # A call that hands over all arrays takes as long as some keys: none for what the plan has not.
            if kept.k_scale.shape[0] > 0:
                own = tile.v_scale[used]
                scales(tile.k_scale, kept.k_scale, kept.k_steps, kept, at.b, at.g, j, count)
                scales(own, kept.v_scale, kept.v_steps, kept, at.b, at.g, j, count)
                scaled(shape, here, at.rows, tile.k_scale.ctypes.data, own.ctypes.data)
            if bent:
                bend(shape, here, at.rows, np.float32(1.0), np.float32(x.cap[1]))
            if biased:
                bias(shape, x, tile, here, at, j, count)
            if kinds:
                veil(shape, x, tile, here, at, j, count, kinds)
            for r in range(at.rows):
                tile.s[used, r, count:] = -np.inf
            tile.first[used] = j
            used += 1
        if used == TILES or (j + KEYS >= stop and used > 0):
            weigh(shape, x, kept, tile, at, top, o, used, stop)
            used = 0


@inner
def weigh(
    shape: int, x: Arrays, kept: Blocks, tile: Scratch, at: Rows, top: Array, o: Array, used: int, stop: int
) -> None:
    """Make weights of the logits of so many tiles, and take the values of their keys, none from `stop` on, into o."""
    step, row, v = step_of(shape, at), x.sizes[6] * x.v.itemsize, x.v.ctypes.data
    s, size, line, near = tile.s.ctypes.data, 4 * KEYS * at.rows, 4 * o.shape[1], ahead(shape, at, row)
    unit = 8 if shape >> 27 & 1 else row
    weights(shape, s, size, used, top.ctypes.data, tile.sums.ctypes.data, tile.factor.ctypes.data, at.rows)
    for t in range(used):
        j, here = tile.first[t], s + t * size
        count = min(KEYS, stop - j)
        if kept.v_scale.shape[0] > 0:
            valued(shape, here, at.rows, tile.v_scale[t].ctypes.data)
        at_v = located(shape, kept, tile.where, at.b, at.g, x.sizes[2], v, row, j, stop, near)
        for m in range(0, count, step):
            by = tile.factor.ctypes.data if t + m == 0 else tile.ones.ctypes.data
            many, w = min(step, count - m), here + 4 * m
            blend(shape, o.ctypes.data, line, by, w, at.rows, at_v + m * unit, near * unit, many, x.sizes[6])


@inner
def step_of(shape: int, at: Rows) -> int:
    """Several passes over the same keys take so many at a time, so that they are read from memory once."""
    return KEYS if at.rows <= 2 else shape >> 16 & 255


@inner
def ahead(shape: int, at: Rows, size: int) -> int:
    """Rows of `size` bytes between the one that is met and the one that is brought near."""
    rows = -(-_BYTES_AHEAD // size)
    if shape >> 27 & 1:
        return min(KEYS, rows)
    return _ROWS_AHEAD if at.rows <= 2 else rows
