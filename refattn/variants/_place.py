"""Where queries and keys stand, and which pairs may attend before any bias has a say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.variants._kept import key_count

Integers = NDArray[np.int64]


class Place(NamedTuple):
    """Integer positions: `i` (1 or B, 1, Lq, 1) of the queries, `j` (1 or B, 1, 1, Lk) of the keys; `heads` = Hq."""

    i: Integers
    j: Integers
    heads: int


def lengths(x: Mapping[str, Any]) -> tuple[Integers, Integers] | None:
    """Lengths of each sequence, (B,) and (B,), or None where all are full."""
    if "q_lengths" not in x and "kv_lengths" not in x:
        return None
    batch, lq, lk = x["q"].shape[0], x["q"].shape[2], key_count(x)
    full = np.full(batch, lq), np.full(batch, lk)
    return np.asarray(x.get("q_lengths", full[0]), np.int64), np.asarray(x.get("kv_lengths", full[1]), np.int64)


def per_sequence(given: Any, length: int) -> Integers:
    """Integers broadcastable to (B, L) as (1 or B, L)."""
    found = np.atleast_2d(np.asarray(given, np.int64))
    return np.broadcast_to(found, (found.shape[0], length))


def segments(x: Mapping[str, Any]) -> tuple[Integers, Integers] | None:
    """Segment ids of queries and keys, (1 or B, Lq) and (1 or B, Lk), or None where there are none."""
    if "q_segment_ids" not in x:
        return None
    return per_sequence(x["q_segment_ids"], x["q"].shape[2]), per_sequence(x["k_segment_ids"], key_count(x))


def place(causal: Any, x: Mapping[str, Any]) -> Place:
    """Query i stands at key position i + (Lk − Lq), its sequence's lengths; at i if top-left; or where it is told."""
    lq, lk = x["q"].shape[2], key_count(x)
    ragged = lengths(x)
    offset = np.asarray([lk - lq]) if ragged is None else ragged[1] - ragged[0]
    if causal == "top_left":
        offset = np.zeros(1, np.int64)
    i = np.arange(lq) + offset[:, None]
    if "q_positions" in x:
        i = per_sequence(x["q_positions"], lq)
    j = per_sequence(x.get("k_positions", np.arange(lk)), lk)
    return Place(i[:, None, :, None], j[:, None, None, :], x["q"].shape[1])


def reach(at: Place) -> tuple[int, int]:
    """Least and greatest position(j) − position(i) of a sequence's keys and queries, 0 counted too."""
    if not (at.i.size and at.j.size):
        return 0, 0
    least, greatest = at.j.min(3) - at.i.max(2), at.j.max(3) - at.i.min(2)
    return min(int(least.min()), 0), max(int(greatest.max()), 0)


def visible(spec: Any, x: Mapping[str, Any], at: Place) -> NDArray[np.bool_]:
    """Pairs that causality, window, lengths, segments and mask allow, broadcastable to (B, Hq, Lq, Lk)."""
    distance = at.j - at.i
    live = np.ones(distance.shape, bool)
    if spec.causal:
        live = live & (distance <= 0)
    left, right = spec.window or (None, None)
    if left is not None:
        live = live & (distance >= -left)
    if right is not None:
        live = live & (distance <= right)
    ragged = lengths(x)
    if ragged is not None:
        q_index, k_index = np.arange(x["q"].shape[2]), np.arange(key_count(x))
        live = live & (q_index < ragged[0][:, None])[:, None, :, None]
        live = live & (k_index < ragged[1][:, None])[:, None, None, :]
    ids = segments(x)
    if ids is not None:
        live = live & (ids[0][:, None, :, None] == ids[1][:, None, None, :])
    if "mask" in x:
        live = live & x["mask"]
    return live
