r"""Keys left out because what they could add is proved too small: a bias that falls with distance has an end.

Logits, maxima and sums are in base 2. A row i that has seen some keys holds its maximum m, the sum z of its weights and
the sums o_d of weights times values, all over 2^m. A key of a tile B has a logit of at most

    b_B = |scale| log₂e (q_i·c + |q_i| max_B |k − c|) + bias of the nearest key of B + greatest entry of the table

for any one c (Cauchy), here the mean of some keys, as heads have channels that are far from 0 in all of them. So its n
keys weigh at most w = n 2^b_B. With Z the final sum, and as Σ_j p_j |v_jd| ≥ 2^m |o_d| / Z, without them

    lse changes by    w / Z                        ≤ ε 4u                     if w ≤ ε 4u 2^m z
    out_d changes by  w / Z (|out_d| + max |v_d|)  ≤ ε 12u Σ_j p_j |v_jd|     if w ≤ ε 7u 2^m |o_d| / max |v_d| too.

4u is the least that `refattn.bound` allows lse, 12u Σ p |v| the least it allows out (docs/tolerance.md, sections 2, 3).
Z is not needed, for both sides are over it. There is one ε for each row: what its tiles may weigh is summed up against
it. Whatever is rounded here is rounded to the safe side, by `SLACK` or a few hundredths of a bit. A tile with a number
in it that is not finite is never left out, nor is anything by a row with one.

Gradients have shares of their own: `sparing`.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
import os
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from refattn.engines.cpu import bounds, tiles, vectors, work
from refattn.engines.cpu.bounds import afford, gauge, lengths, peaks, squares
from refattn.engines.cpu.pool import spread
from refattn.engines.cpu.vectors import BFLOAT16, FLOAT16, FLOAT32
from refattn.engines.cpu.work import KEYS, Array, Arrays, Rows, Tile
from refattn.jit import bare, inner, stamp
from refattn.plan import Dense, Score, Slope, Table

VARIABLE = "REFATTN_SKIPPING"
EPSILON = 2.0**-4  # of the published bound
SHORTEST = 512  # keys: below, the bounds cost more than they spare
SLACK = 2.0**-10  # relative, of lengths and distances: more than they round for D up to 4096
DEEPEST = 4096
_SAMPLE = 256  # keys that a centre is the mean of
_COMMON = 10  # scale |q||k| of the example that `told` gives
OUT, LSE = (np.float32(math.log2(EPSILON * n * 2.0**-24) - 2.0**-4) for n in (7, 4))  # bits, less what is rounded here


class Norms(NamedTuple):
    """What is known of keys and values before; `on` False, and the arrays empty, where nothing may be left out.

    centre (B,Hkv,D) c; slack (B,Hkv) what q·c may be rounded by, over |q|. keys (B,Hkv,tiles) the greatest |k − c| of a
    tile, before the greatest of it and all tiles before it: ∞ where one is not finite. scales (B,Hkv,Dv) 1 / max |v_d|,
    0 where that is not finite; absent: large where max |v_d| = 0, else 0.
    most (1 or B, tiles) the greatest position of a tile and all before it. tables (Hq,) a head's greatest entry.
    """

    on: bool
    centre: Array
    slack: Array
    keys: Array
    before: Array
    scales: Array
    absent: Array
    most: Array
    tables: Array


class Allowed(NamedTuple):
    """What rows may leave out of a backward pass, flat by row (B,Hq,Lq), as `work.Tile` has it; nothing if not `on`.

    budget: of a key, as if its tile were full of such; spent: of each share of the keys.
    """

    on: bool
    norm: Array
    budget: Array
    spent: Array


NOTHING_ALLOWED = Allowed(False, *[np.zeros(0, np.float32)] * 3)
_EMPTY = np.zeros((1, 1, 0), np.float32)
_NONE = Norms(
    False, _EMPTY, np.zeros((1, 1), np.float32), _EMPTY, _EMPTY, _EMPTY, _EMPTY, np.zeros((1, 0), np.int64), np.zeros(0)
)


def norms(x: Arrays, width: int, storage: int) -> Norms:
    """Of a plan whose bias falls with distance and has no array to be searched; else nothing is left out."""
    batch, heads, groups, lq, lk, depth, size = x.sizes
    wanted = x.sloping and lq >= KEYS and lk >= SHORTEST and depth <= DEEPEST
    if not wanted or x.bias_strides.size or x.sigmoid or not (x.slopes > 0).any() or os.environ.get(VARIABLE) == "0":
        return _NONE
    centre = _centre(x, storage)
    keys, scales, absent = _measured(x, centre, width, storage)
    tables = np.nan_to_num(x.table.max(1, initial=-np.inf), nan=np.inf, neginf=-(2.0**100)) if x.table.size else 0.0
    return Norms(
        on=True,
        centre=centre,
        slack=(DEEPEST * 2.0**-23 * np.linalg.norm(centre, axis=-1)).astype(np.float32),
        keys=keys,
        before=np.maximum.accumulate(keys, axis=2),
        scales=scales,
        absent=absent,
        most=np.maximum.accumulate(x.k_ends[..., 1], axis=1),
        tables=np.zeros(heads) + tables,
    )


def longest(x: Arrays, width: int, storage: int) -> tuple[Array, Array, Array]:
    """The greatest |v| of each key head (B,Hkv), ∞ where one is not finite; `scales` and `absent` of k (B,Hkv,D)."""
    batch, heads, groups, lq, lk, depth, size = x.sizes
    turned = x._replace(sizes=(batch, heads, groups, lq, lk, size, depth), k=x.v, v=x.k)
    lengths, scales, absent = _measured(turned, np.zeros((batch, groups, size), np.float32), width, storage)
    return lengths.max(2), scales, absent


def _measured(x: Arrays, centre: Array, width: int, storage: int) -> tuple[Array, Array, Array]:
    """`keys`, `scales` and `absent` of `Norms`."""
    batch, _, groups, _, lk, depth, size = x.sizes
    keys, largest = np.empty((batch, groups, -(-lk // KEYS)), np.float32), np.empty((batch, groups, size), np.int32)
    measure = _measure(width << 16 | 1 << 8 | 1 | storage << 24)
    spread(measure, (x, centre, keys, largest), batch * groups, keys.size * KEYS * (depth + size))
    peak = largest.view(np.float32)
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        scales = np.where(np.isfinite(peak) & (peak > 0), (1 - SLACK) / peak, np.float32(0)).astype(np.float32)
    scales[~np.isfinite(scales)] = 0.0
    return keys, scales, np.where(peak == 0, np.float32(2.0**100), np.float32(0))


def _centre(x: Arrays, storage: int) -> Array:
    """Mean of some keys of each head, where it is finite; 0 under a cap, which would raise a bound below 0."""
    batch, _, groups, _, lk, depth, _ = x.sizes
    if x.cap[0]:
        return np.zeros((batch, groups, depth), np.float32)
    kinds = {FLOAT32: np.float32, BFLOAT16: ml_dtypes.bfloat16, FLOAT16: np.float16}
    some = x.k.view(kinds[storage]).reshape(batch, groups, lk, depth)[:, :, :: -(-lk // _SAMPLE)]
    with np.errstate(over="ignore", invalid="ignore"):
        mean = some.astype(np.float32).mean(2)
    return np.where(np.isfinite(mean), mean, np.float32(0))


def told(plan: Score, few: bool) -> str | None:
    """For `explain`: where leaving out may begin; None for a plan of which no key is left out.

    `few`: whether `decode` runs it, which leaves out keys of a cache alone, as `remote` says.

    In natural units a tile of keys goes once slope · distance > 2 c + ln n + ln 1 / (4 ε u), where c is the greatest
    scale |q||k|; values that nearly cancel, and short heads of a large value, put it off.
    """
    slopes = sum((b.slopes for b in plan.bias if isinstance(b, Slope)), np.zeros(plan.q.shape[1]))
    lq, lk = plan.q.shape[2], plan.k.shape[2]
    plain = plan.normalizer == "softmax" and not any(isinstance(b, Dense) for b in plan.bias)
    if not (plain and (slopes > 0).any() and lk >= SHORTEST and (few or lq >= KEYS)):
        return None
    packed = plan.pages is not None or plan.k_scale is not None
    if few and (packed or (slopes < 0).any() or any(isinstance(b, Table) for b in plan.bias)):
        return None
    if os.environ.get(VARIABLE) == "0":
        return f"{VARIABLE}=0: no key is left out"
    bits = 2 * _COMMON + math.log(KEYS) - math.log(4 * EPSILON * 2.0**-24)
    first = ", ".join(f"{bits / slope:.0f}" if slope > 0 else "never" for slope in slopes.tolist())
    return (
        f"{'of k and v that refattn.extend has grown, ' if few else ''}"
        f"keys that together are proved to weigh less than 1/{1 / EPSILON:.0f} of the published bound are left out; "
        f"where scale |q||k| is at most {_COMMON}, from about these distances on, head by head: {first}; gradients of "
        f"q, k and v likewise, not under a softcap and not beside those of biases, which leave out weights of 0 alone"
    )


@cache
def _measure(literal: int) -> Callable[..., Any]:
    LITERAL, VERSION = literal, stamp(bounds, tiles, vectors, work)

    @bare
    def measure(x: Arrays, centre: Array, keys: Array, largest: Array, start: int, stop: int) -> int:
        _, _, groups, _, lk, depth, size = x.sizes
        for task in range(start, stop):
            b, g = task // groups, task % groups
            largest[b, g] = 0
            for n in range(keys.shape[2]):
                j = n * KEYS
                count, key = min(KEYS, x.k_length[b] - j), (b * groups + g) * lk + j
                keys[b, g, n] = 0.0
                if count > 0:
                    k, v = x.k.itemsize * key * depth, x.v.itemsize * key * size
                    middle = centre[b, g].ctypes.data
                    squares(LITERAL, keys[b, g, n:].ctypes.data, x.k.ctypes.data + k, middle, count, depth)
                    peaks(LITERAL, largest[b, g].ctypes.data, x.v.ctypes.data + v, count, size)
                length = np.sqrt(keys[b, g, n] + np.float32(1e-30)) * np.float32(1 + SLACK)
                keys[b, g, n] = length if math.isfinite(length) else np.inf
        return VERSION

    return measure


@inner
def begin(shape: int, x: Arrays, tile: Tile, norms: Norms, at: Rows) -> None:
    """Of a tile of rows that has seen nothing, after its queries are laid out."""
    unit = np.float32(x.unit * (1 + SLACK))
    norm, base, centre = tile.norm.ctypes.data, tile.base.ctypes.data, norms.centre[at.b, at.g].ctypes.data
    lengths(shape, norm, base, tile.q.ctypes.data, centre, x.sizes[5], unit, norms.slack[at.b, at.g])
    i = at.first % x.sizes[3] - 1
    for r in range(tile.lanes):
        i = i + 1 if i + 1 < x.sizes[3] else 0
        tile.budget[r] = -(2.0**100) if r < at.rows and i < x.q_length[at.b] else 2.0**100
        tile.spent[r] = 0.0


@inner
def note(shape: int, tile: Tile, norms: Norms, at: Rows, width: int) -> None:
    """What the rows may leave out by what they have seen so far."""
    scales, absent = norms.scales[at.b, at.g].ctypes.data, norms.absent[at.b, at.g].ctypes.data
    top, total, base = tile.top.ctypes.data, tile.total.ctypes.data, tile.base.ctypes.data
    gauge(shape, tile.budget.ctypes.data, base, tile.o.ctypes.data, width, scales, absent, top, total, OUT, LSE)


@inner
def spare(shape: int, tile: Tile, norms: Norms, at: Rows, near: int, far: int, length: float, count: int) -> bool:
    """Whether all rows may leave out `count` more keys, of at most that length, from place `near` to `far`: booked."""
    bits = np.float32(math.log2(count) + norms.tables[at.h] + 2.0**-12)
    to, spent, budget, norm = tile.factor, tile.spent.ctypes.data, tile.budget.ctypes.data, tile.norm.ctypes.data
    place, slope = tile.place.ctypes.data, tile.slope.ctypes.data
    afford(shape, to.ctypes.data, spent, budget, norm, place, slope, near, far, np.float32(length), bits)
    for r in range(tile.lanes):
        if not to[r] <= 1.0:
            return False
    for r in range(tile.lanes):
        tile.spent[r] = to[r]
    return True


@inner
def recall(tile: Tile, allowed: Allowed, at: Rows, share: int) -> None:
    """What the rows may leave out of a backward pass, and have left out."""
    begun = share * allowed.budget.size + at.first
    for r in range(tile.lanes):
        live = r < at.rows
        tile.norm[r] = allowed.norm[at.first + r] if live else 0.0
        tile.budget[r] = allowed.budget[at.first + r] if live else 2.0**100
        tile.spent[r] = allowed.spent[begun + r] if live else 0.0


@inner
def book(tile: Tile, allowed: Allowed, at: Rows, share: int) -> None:
    """Remember what the rows have left out, after `recall`."""
    begun = share * allowed.budget.size + at.first
    for r in range(at.rows):
        allowed.spent[begun + r] = tile.spent[r]


@inner
def gone(shape: int, x: Arrays, tile: Tile, norms: Norms, at: Rows, n: int) -> bool:
    """Whether the n-th tile of keys is left out of a backward pass, after `recall`."""
    near, far = x.k_ends[at.b % x.k_ends.shape[0], n]
    return spare(shape, tile, norms, at, near, far, norms.keys[at.b, at.g, n], 1)


@inner
def first_tile(x: Arrays, norms: Norms, at: Rows, greatest: int, count: int) -> int:
    """The nearest tile of keys: from it they are taken to the left, then to the right. -1 for all as they come."""
    if not (norms.on and at.apart and x.slopes[at.h] > 0):
        return -1
    n = count - 1
    while n > 0 and x.k_ends[at.b % x.k_ends.shape[0], n, 0] > greatest:
        n -= 1
    return n


@inner
def skipped(shape: int, x: Arrays, tile: Tile, norms: Norms, at: Rows, n: int, count: int, left: bool) -> int:
    """How many tiles may be left out from the n-th on: 0, 1, or if `left`, all from there to the first."""
    near, far = x.k_ends[at.b % x.k_ends.shape[0], n]
    if not spare(shape, tile, norms, at, near, far, norms.keys[at.b, at.g, n], count):
        return 0
    if not left or n == 0:
        return 1
    most = norms.most[at.b % norms.most.shape[0], n - 1]
    if spare(shape, tile, norms, at, -(1 << 29), most, norms.before[at.b, at.g, n - 1], n * KEYS):
        return n + 1
    return 1
