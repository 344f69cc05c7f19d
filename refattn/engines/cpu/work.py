"""What the fast kernels read and write, and the parts of their work that go number by number."""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
from collections.abc import Callable
from functools import wraps
from itertools import accumulate
from threading import local
from typing import Any, NamedTuple, TypeVar, cast

import numpy as np
from numpy.typing import NDArray

from refattn.engines.cpu.tiles import BOTTOM
from refattn.jit import inner

Array = NDArray[Any]
Made = TypeVar("Made")

KEYS = 64  # of a tile
LN2, LOG2E = math.log(2.0), 1 / math.log(2.0)


class Arrays(NamedTuple):
    """What a kernel reads.

    q, k, v flat, of the shapes `sizes` = (B, Hq, Hkv, Lq, Lk, D, Dv). q_length, k_length (B,) int64; q_at, q_segment
    (1 or B,Lq), k_at, k_segment (1 or B,Lk) int32, none so large that a difference overflows; k_ends, k_parts
    (1 or B, tiles, 2) int64 a tile's least and greatest position and segment. span: the least and greatest visible
    difference. sign: of the scale; unit: its magnitude times log₂e. cap: 0 for none, else the scale over it and it
    times log₂e.

    Times log₂e: slopes (Hq,) and table (Hq, n), from the greatest difference down, its column `zero` for the difference
    0, n = 0 for none, and if `evenly`, positions of queries and keys go up by one; sink (Hq,), `BOTTOM` for none.
    offset: what a sigmoid, if there is one in the softmax's place, adds to logits.

    biases, masks: stacks as in `operands.Operands`; −∞ in a bias masks.
    """

    sizes: tuple[int, int, int, int, int, int, int]
    q: Array
    k: Array
    v: Array
    q_length: Array
    k_length: Array
    q_at: Array
    k_at: Array
    k_ends: Array
    span: tuple[int, int]
    q_segment: Array
    k_segment: Array
    k_parts: Array
    sign: float
    unit: float
    cap: tuple[float, float]
    sloping: bool
    slopes: Array
    table: Array
    zero: int
    evenly: bool
    biases: Array
    bias_strides: Array
    masks: Array
    mask_strides: Array
    sink: Array
    sigmoid: bool
    offset: float


class Results(NamedTuple):
    """What the forward kernel writes: out flat, lse, and which rows are to be made again; a row each, flat."""

    out: Array
    lse: Array
    redo: Array


class Rows(NamedTuple):
    """Where a tile of rows stands: `rows` rows from row `first` of all (B,Hq,Lq) on, of batch b and key head g.

    apart: they all belong to query head h, and are its rows i, i + 1, ...; else h and i are the first one's.
    """

    b: int
    g: int
    h: int
    i: int
    first: int
    rows: int
    apart: bool


class Ends(NamedTuple):
    """Least and greatest position and segment of a tile's live rows; none is live where least > greatest."""

    least: int
    greatest: int
    part_low: int
    part_high: int


class Tile(NamedTuple):
    """A tile's scratch: flat arrays qᵀ (D,R), oᵀ (Dv,R), s and a bias (KEYS,R), and a number for each of R rows.

    k (KEYS,D), v (KEYS,Dv) widened, where they are stored in fewer bits. top, total: running maximum and sum; factor:
    what the sum changes by; slope; norm, base, budget, spent as in `skipping`; place, segment int32. lanes: numbers in
    a row, R, or more if the tile is cut from another.
    """

    lanes: int
    q: Array
    o: Array
    s: Array
    bias: Array
    k: Array
    v: Array
    top: Array
    total: Array
    factor: Array
    slope: Array
    norm: Array
    base: Array
    budget: Array
    spent: Array
    place: Array
    segment: Array


def own(make: Callable[..., Made]) -> Callable[..., Made]:
    """Scratch that a thread keeps for its next call of the same sizes, which reads nothing that this one left."""
    last = local()

    @wraps(make)
    def found(*sizes: int) -> Made:
        if last.__dict__.get("sizes") != sizes:
            last.made, last.sizes = make(*sizes), sizes
        return cast("Made", last.made)

    found.last = last  # type: ignore[attr-defined]
    return found


@own
def scratch(rows: int, depth: int, width: int, storage: int) -> Tile:
    """Scratch of a thread, each part from a whole line of the cache on."""
    wide = [KEYS * depth, KEYS * width] if storage else [0, 0]
    sizes = [*(rows * n for n in (depth, width, KEYS, KEYS)), *wide, *[rows] * 10]
    starts = [0, *accumulate(-(-size // 16) * 16 for size in sizes)]
    memory = np.empty(starts[-1] + 16, np.float32)
    skipped = -memory.ctypes.data // 4 % 16
    parts = [memory[skipped + start : skipped + start + size] for start, size in zip(starts, sizes, strict=False)]
    return Tile(rows, *parts[:14], *(part.view(np.int32) for part in parts[14:]))


@inner
def tiles_of(share: int, lq: int, lanes: int) -> int:
    """Tiles of rows of one key head, which `share` heads of queries read: heads apart if one fills a tile."""
    return share * -(-lq // lanes) if lq >= lanes else -(-share * lq // lanes)


@inner
def locate(x: Arrays, lanes: int, task: int) -> Rows:
    """Tile number `task` of rows, in tiles of so many lanes.

    The last rows come first: where they see more keys than the others, threads end together.
    """
    _, heads, groups, lq, _, _, _ = x.sizes
    share, apart = heads // groups, lq >= lanes
    each = tiles_of(share, lq, lanes)
    b, g, t = task // (groups * each), task // each % groups, each - 1 - task % each
    if apart:
        h, i = g * share + t % share, t // share * lanes
        return Rows(b, g, h, i, (b * heads + h) * lq + i, min(lanes, lq - i), True)
    h = g * share
    return Rows(b, g, h, 0, (b * heads + h) * lq + t * lanes, min(lanes, share * lq - t * lanes), False)


@inner
def cut(tile: Tile, lane: int) -> Tile:
    """The tile from that row on; o, s and bias with it."""
    return Tile(
        tile.lanes,
        tile.q[lane:],
        tile.o[lane:],
        tile.s[lane:],
        tile.bias[lane:],
        tile.k,
        tile.v,
        tile.top[lane:],
        tile.total[lane:],
        tile.factor[lane:],
        tile.slope[lane:],
        tile.norm[lane:],
        tile.base[lane:],
        tile.budget[lane:],
        tile.spent[lane:],
        tile.place[lane:],
        tile.segment[lane:],
    )


@inner
def lay(x: Arrays, tile: Tile, at: Rows) -> None:
    """Begin the rows of a tile."""
    _, heads, _, lq, _, _, _ = x.sizes
    # Counted, for two divisions a row would cost as much as all else here.
    i, h = at.first % lq - 1, at.first // lq % heads
    for r in range(tile.lanes):
        if r < at.rows:
            i += 1
            if i == lq:
                i, h = 0, h + 1
        tile.place[r] = x.q_at[at.b % x.q_at.shape[0], i]
        tile.segment[r] = x.q_segment[at.b % x.q_segment.shape[0], i]
        tile.slope[r] = x.slopes[h]
        tile.top[r] = x.sink[h]
        tile.total[r] = 1.0 if x.sigmoid or x.sink[h] != BOTTOM else 0.0
        tile.factor[r] = 1.0


@inner
def ends_of(x: Arrays, tile: Tile, at: Rows) -> Ends:
    """The ends of positions and segments, after `lay`."""
    least, greatest, low, high = 1 << 40, -(1 << 40), 1 << 40, -(1 << 40)
    i = at.first % x.sizes[3] - 1
    for r in range(at.rows):
        i = i + 1 if i + 1 < x.sizes[3] else 0
        if i < x.q_length[at.b]:
            least, greatest = min(least, tile.place[r]), max(greatest, tile.place[r])
            low, high = min(low, tile.segment[r]), max(high, tile.segment[r])
    return Ends(least, greatest, low, high)


@inner
def pack(x: Arrays, tile: Tile, at: Rows, width: int) -> None:
    """What `turn` leaves of qᵀ: rows and columns that fill no square of `width`; and the scale's sign."""
    first, rows = at.first, at.rows
    lanes, depth = tile.lanes, x.sizes[5]
    squares, columns = rows // width * width, depth // width * width
    for r in range(lanes):
        for d in range(columns if r < squares else 0, depth):
            tile.q[d * lanes + r] = x.q[(first + r) * depth + d] if r < rows else 0.0
    if x.sign != 1.0:
        for n in range(tile.q.size):
            tile.q[n] *= np.float32(x.sign)


@inner
def lookup(x: Arrays, tile: Tile, at: Rows, j: int, count: int) -> None:
    """The table's logits of a tile, key by key."""
    _, heads, _, lq, _, _, _ = x.sizes
    lanes, b = tile.lanes, at.b
    for r in range(at.rows):
        h = (at.first + r) // lq % heads
        for n in range(count):
            tile.bias[n * lanes + r] = x.table[h, x.zero - (x.k_at[b % x.k_at.shape[0], j + n] - tile.place[r])]


@inner
def gather(x: Arrays, tile: Tile, at: Rows, m: int, j: int, count: int, width: int) -> None:
    """What `turn` leaves of the m-th bias of a tile; all of it where width is 0."""
    _, heads, _, lq, _, _, _ = x.sizes
    b, first, rows, lanes, strides = at.b, at.first, at.rows, tile.lanes, x.bias_strides[m]
    squares, columns = (rows // width * width, count // width * width) if width else (0, 0)
    for r in range(rows):
        i, h = (first + r) % lq, (first + r) // lq % heads
        start = strides[0] + b * strides[1] + h * strides[2] + i * strides[3] + j * strides[4]
        for n in range(columns if r < squares else 0, count):
            tile.bias[n * lanes + r] = x.biases[start + n * strides[4]]


@inner
def gather_mask(x: Arrays, tile: Tile, at: Rows, m: int, j: int, count: int, width: int) -> None:
    """What `turn_mask` leaves of the m-th mask of a tile; all of it where width is 0."""
    _, heads, _, lq, _, _, _ = x.sizes
    lanes, strides, rows = tile.lanes, x.mask_strides[m], at.rows
    squares, columns = (rows // width * width, count // width * width) if width else (0, 0)
    for r in range(rows):
        i, h = (at.first + r) % lq, (at.first + r) // lq % heads
        start = strides[0] + at.b * strides[1] + h * strides[2] + i * strides[3] + j * strides[4]
        for n in range(columns if r < squares else 0, count):
            tile.bias[n * lanes + r] = 0.0 if x.masks[start + n * strides[4]] else -np.inf


@inner
def divide(tile: Tile) -> None:
    """What each row is multiplied by in the end."""
    for r in range(tile.lanes):
        tile.factor[r] = 1.0 if tile.total[r] == 0.0 else 1.0 / tile.total[r]


@inner
def settle(x: Arrays, results: Results, tile: Tile, at: Rows, width: int) -> None:
    """What `turn` leaves of out, lse, and which rows are to be made again; slope is NaN where out is not finite."""
    _, heads, _, lq, _, _, size = x.sizes
    b, first, rows, lanes = at.b, at.first, at.rows, tile.lanes
    squares, columns = rows // width * width, size // width * width
    i, h = first % lq - 1, first // lq % heads
    for r in range(rows):
        i += 1
        if i == lq:
            i, h = 0, h + 1
        row, total, top = first + r, tile.total[r], tile.top[r]
        for d in range(columns if r < squares else 0, size):
            results.out[row * size + d] = tile.o[d * lanes + r]
        if i >= x.q_length[b]:
            results.out[row * size : (row + 1) * size] = 0.0
            top = x.sink[h]
            total = np.float32(0.0 if top == BOTTOM else 1.0)
            results.redo[row] = False
        else:
            results.redo[row] = total == 0.0 or not math.isfinite(total + tile.slope[r])
        results.lse[row] = -np.inf if total == 0.0 else LN2 * (top + math.log2(total))
