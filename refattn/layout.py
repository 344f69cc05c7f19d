"""Layouts of q, k, v and out: "bhsd" inside, "bshd" and packed "thd" at the door."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.errors import LayoutError, ShapeError

LAYOUTS = ("bhsd", "bshd", "thd")
_DIMS = {"bhsd": "(batch, head, length, width)", "bshd": "(batch, length, head, width)", "thd": "(token, head, width)"}
_PACKED = ("q", "k", "v", "q_positions", "k_positions", "q_segment_ids", "k_segment_ids")


def offsets(name: str, given: Any, total: int) -> NDArray[np.int64]:
    """Cumulative lengths (B + 1,) checked: from 0 upwards to the packed length."""
    cu = np.asarray(given)
    if cu.ndim != 1 or cu.size < 1 or cu.dtype.kind not in "iu":
        raise ShapeError(f"{name} is a vector of B + 1 integers; given: shape {cu.shape}, {cu.dtype}")
    if cu[0] != 0 or cu[-1] != total or (np.diff(cu.astype(np.int64)) < 0).any():
        raise ShapeError(f"{name} must rise from 0 to the packed length {total}; given: {cu.tolist()}")
    return cu.astype(np.int64)


def unpack(packed: NDArray[Any], cu: NDArray[np.int64]) -> NDArray[Any]:
    """(T, ...) to (B, longest, ...), zeros after each sequence's end."""
    lengths = np.diff(cu)
    out = np.zeros((len(lengths), lengths.max(initial=0), *packed.shape[1:]), packed.dtype)
    for b, (start, stop) in enumerate(pairwise(cu)):
        out[b, : stop - start] = packed[start:stop]
    return out


def pack(padded: NDArray[Any], cu: NDArray[np.int64]) -> NDArray[Any]:
    """(B, longest, ...) back to (T, ...)."""
    pieces = [padded[b, :n] for b, n in enumerate(np.diff(cu))]
    return np.concatenate(pieces) if pieces else np.zeros((0, *padded.shape[2:]), padded.dtype)


def inward(
    arrays: dict[str, NDArray[Any]], layout: str, *, cu_seqlens_q: Any = None, cu_seqlens_k: Any = None
) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64] | None]:
    """Arrays in "bhsd", and the query offsets where they were packed.

    Raises
    ------
    LayoutError
        For an unknown layout, or cumulative lengths where nothing is packed, or none where something is.
    ShapeError
        An array is missing, of another rank than the layout's, or not as long as the cumulative lengths say.
    """
    if not isinstance(layout, str) or layout not in LAYOUTS:
        raise LayoutError(f"layout is one of {', '.join(LAYOUTS)}; given: {layout!r}")
    if (layout == "thd") != (cu_seqlens_q is not None) or (layout != "thd" and cu_seqlens_k is not None):
        raise LayoutError(
            f"layout='thd' goes with cu_seqlens_q (and cu_seqlens_k), other layouts without; given: layout={layout!r}, "
            f"cu_seqlens_q={cu_seqlens_q}, cu_seqlens_k={cu_seqlens_k}"
        )
    rank = 3 if layout == "thd" else 4
    for name in ("q", "k", "v"):
        if name not in arrays or arrays[name].ndim != rank:
            given = ", ".join(f"{n} {a.shape}" for n, a in arrays.items())
            raise ShapeError(f"layout={layout!r} needs {name} of {rank} dimensions, {_DIMS[layout]}; given: {given}")
    if layout == "bhsd":
        return arrays, None
    if layout == "bshd":
        return arrays | {name: arrays[name].swapaxes(1, 2) for name in ("q", "k", "v")}, None
    if "q_lengths" in arrays or "kv_lengths" in arrays:
        raise LayoutError("layout='thd' has its lengths in cu_seqlens_q and cu_seqlens_k; drop q_lengths, kv_lengths")
    q_at = offsets("cu_seqlens_q", cu_seqlens_q, len(arrays["q"]))
    k_at = q_at if cu_seqlens_k is None else offsets("cu_seqlens_k", cu_seqlens_k, len(arrays["k"]))
    if len(q_at) != len(k_at):
        raise ShapeError(
            f"cu_seqlens_q {q_at.tolist()} and cu_seqlens_k {k_at.tolist()} must name the same number of sequences"
        )
    padded = dict(arrays)
    for name in _PACKED:
        if name in arrays:
            at = q_at if name.startswith("q") else k_at
            if arrays[name].shape[:1] != (at[-1],):
                raise ShapeError(f"packed {name} begins with {at[-1]} tokens, one by one; given: {arrays[name].shape}")
            padded[name] = unpack(arrays[name], at)
    padded |= {name: padded[name].swapaxes(1, 2) for name in ("q", "k", "v")}
    return padded | {"q_lengths": np.diff(q_at), "kv_lengths": np.diff(k_at)}, q_at


def outward(out: NDArray[Any], layout: str, q_at: NDArray[np.int64] | None) -> NDArray[Any]:
    """`out` (B, H, L, Dv) in the caller's layout."""
    if layout == "bhsd":
        return out
    rows = out.swapaxes(1, 2)
    return rows if q_at is None else pack(rows, q_at)
