"""Where queries and keys stand, and which pairs may attend before any bias has a say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

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
    batch, lq, lk = x["q"].shape[0], x["q"].shape[2], x["k"].shape[2]
    full = np.full(batch, lq), np.full(batch, lk)
    return np.asarray(x.get("q_lengths", full[0]), np.int64), np.asarray(x.get("kv_lengths", full[1]), np.int64)


def place(causal: Any, x: Mapping[str, Any]) -> Place:
    """Query i stands at key position i + (Lk − Lq), lengths taken per sequence; at i if top-left; or where it is told."""
    lq, lk = x["q"].shape[2], x["k"].shape[2]
    ragged = lengths(x)
    offset = np.asarray([lk - lq]) if ragged is None else ragged[1] - ragged[0]
    if causal == "top_left":
        offset = np.zeros(1, np.int64)
    i = np.arange(lq) + offset[:, None]
    if "q_positions" in x:
        i = np.asarray(x["q_positions"], np.int64).reshape(-1, lq)
    j = np.asarray(x.get("k_positions", np.arange(lk)), np.int64).reshape(-1, lk)
    return Place(i[:, None, :, None], j[:, None, None, :], x["q"].shape[1])


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
        q_index, k_index = np.arange(x["q"].shape[2]), np.arange(x["k"].shape[2])
        live = live & (q_index < ragged[0][:, None])[:, None, :, None] & (k_index < ragged[1][:, None])[:, None, None, :]
    if "q_segment_ids" in x:
        q_segment, k_segment = np.atleast_2d(x["q_segment_ids"]), np.atleast_2d(x["k_segment_ids"])
        live = live & (q_segment[:, None, :, None] == k_segment[:, None, None, :])
    if "mask" in x:
        live = live & x["mask"]
    return live
