"""The answer in float64 NumPy, from the formula alone, and how far an output is from it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cells import SOFTCAP, UNITS, Cell, Floats, by_difference, visible

ROWS = 64


def rows_of(cell: Cell) -> NDArray[np.int64]:
    """Queries whose outputs are checked: all of a short sequence, else 64 from first to last; the gradients' all."""
    if cell.kind == "backward" or cell.queries <= 512:
        return np.arange(cell.queries)
    return np.unique(np.linspace(0, cell.queries - 1, ROWS).astype(np.int64))


def exact(cell: Cell, given: Mapping[str, NDArray[Any]]) -> dict[str, Floats]:
    """Out at `rows_of`, (1,H,rows,D); for a backward cell dq, dk and dv whole. One head at a time."""
    rows = rows_of(cell)
    first, end = (a[rows, None] for a in visible(cell))
    flat = by_difference(cell, given.get("t5_table"))
    j = np.arange(cell.length)
    found: dict[str, list[Floats]] = {}
    for h in range(cell.heads):
        g = h // (cell.heads // cell.kv_heads)
        q = given["q"][0, h, rows].astype(np.float64)
        k, v = (_real(given, n, g) for n in "kv")
        scores = q @ k.T / np.sqrt(cell.width)
        if cell.term == "softcap":
            scores = SOFTCAP * np.tanh(scores / SOFTCAP)
        if flat is not None:
            scores += flat[h][j - rows[:, None] + cell.length - 1]
        scores[(j < first) | (j >= end)] = -np.inf
        p = np.exp(scores - scores.max(1, keepdims=True))
        p /= p.sum(1, keepdims=True)
        one = {"out": p @ v}
        if cell.kind == "backward":
            one = _gradients(p, (q, k, v), one["out"], given["dout"][0, h].astype(np.float64))
        for name, a in one.items():
            found.setdefault(name, []).append(a)
    return {name: _grouped(cell, name, np.stack(heads))[None] for name, heads in found.items()}


def _real(given: Mapping[str, NDArray[Any]], name: str, g: int) -> Floats:
    """One head of k or v."""
    scale = given.get(f"{name}_scale")
    found: Floats = given[name][0, g].astype(np.float64)
    return found if scale is None else found * scale[0, g, :, None]


def _gradients(p: Floats, qkv: tuple[Floats, Floats, Floats], out: Floats, dout: Floats) -> dict[str, Floats]:
    q, k, v = qkv
    ds = p * (dout @ v.T - (dout * out).sum(1, keepdims=True)) / np.sqrt(q.shape[1])
    return {"dq": ds @ k, "dk": ds.T @ q, "dv": p.T @ dout}


def _grouped(cell: Cell, name: str, heads: Floats) -> Floats:
    """Gradients of a key head: the sum over the query heads that read it."""
    if name not in ("dk", "dv"):
        return heads
    shared: Floats = heads.reshape(cell.kv_heads, -1, *heads.shape[1:]).sum(1)
    return shared


def units(cell: Cell, found: Mapping[str, NDArray[Any]], want: Mapping[str, Floats]) -> float:
    """Greatest error over the outputs, in units u·max|exact| of each, u the rounding unit of the cell's dtype."""
    worst = 0.0
    for name, right in want.items():
        if found[name].shape != right.shape:
            raise ValueError(f"{name} has shape {found[name].shape}; expected {right.shape}")
        error = np.abs(found[name].astype(np.float64) - right).max()
        worst = max(worst, float(error / (UNITS[cell.dtype] * np.abs(right).max())))
    return worst
