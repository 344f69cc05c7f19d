"""Which keys score highest: as a reference chooses them, by rank, and a second time as a plan does, by a threshold."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.numeric import amax, einsum, minimum, real, reshape, take, top_k

Bools = NDArray[np.bool_]
Integers = NDArray[np.int64]


class Chosen(NamedTuple):
    """Of scores (..., n): `indices` (..., top), −1 where there are fewer; `live`, the same as a mask; `margin` (...).

    The margin is the least score chosen minus the largest that is not, 0 where all are chosen.
    """

    indices: Integers
    live: Bools
    margin: Any


def products(q: Any, k: Any) -> Any:
    """q·k of every query head with the keys of its group, (B,Hq,Lq,Lk)."""
    batch, heads, count, width = q.shape
    groups, keys = k.shape[1:3]
    rows = reshape(q, (batch, groups, heads // groups, count, width))
    return reshape(einsum("bgrid,bgjd->bgrij", rows, k), (batch, heads, count, keys))


def nearest(s: Any, top: int) -> Chosen:
    """The `top` largest of the last axis, the largest first, of equals the lowest index."""
    count = s.shape[-1]
    found, live = top_k(s, min(top, count)), np.zeros(s.shape, bool)
    np.put_along_axis(live, found, True, -1)
    indices = np.full((*s.shape[:-1], top), -1, np.int64)
    indices[..., : found.shape[-1]] = found
    return Chosen(indices, live, _margin(s, live) if count > top else real(np.zeros(s.shape[:-1]), s))


def nearest_of_buckets(s: Any, top: int, first: int) -> Chosen:
    """The largest of each of `top` buckets, entry n being in bucket (first + n) mod top; margin the least of them."""
    place = first + np.arange(s.shape[-1])
    indices, live = np.full((*s.shape[:-1], top), -1, np.int64), np.zeros(s.shape, bool)
    margin = None
    for bucket in range(top):
        members = np.flatnonzero(place % top == bucket)
        if members.size:
            best = nearest(take(s, members, s.ndim - 1), 1)
            live[..., members] = best.live
            indices[..., bucket] = members[best.indices[..., 0]]
            if members.size > 1:
                margin = best.margin if margin is None else minimum(margin, best.margin)
    return Chosen(indices, live, real(np.zeros(s.shape[:-1]), s) if margin is None else margin)


def _margin(s: Any, live: Bools) -> Any:
    return -amax(-s, live) - amax(s, ~live)


def above_threshold(s: NDArray[np.float64], live: Bools, top: int) -> Bools:
    """The `top` largest live entries as those above the one of that rank, and as many of its equals as there is room.

    A plan holds no index of keys, so a mask says which.
    """
    if s.shape[-1] <= top:
        return live
    threshold = np.sort(np.where(live, -s, np.inf), -1)[..., top - 1 : top]
    above, equal = live & (-s < threshold), live & (-s == threshold)
    room = top - above.sum(-1, keepdims=True)
    found: Bools = above | (equal & (np.cumsum(equal, -1) <= room))
    return found
