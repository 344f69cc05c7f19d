"""Sums, products and elimination in float64 in one fixed order: the same bits on every IEEE machine, no BLAS."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def ordered_sum(x: Floats, axes: Sequence[int]) -> Floats:
    """Sum in index order, last axis first: accumulate has no freedom that a reduction has."""
    for axis in reversed(axes):
        x = np.take(np.add.accumulate(x, axis), -1, axis) if x.shape[axis] else np.zeros(np.delete(x.shape, axis))
    return x


def ordered_matmul(a: Floats, b: Floats) -> Floats:
    """(n, m, k) @ (n, k, p), each entry summed in index order of k."""
    out = np.zeros((a.shape[0], a.shape[1], b.shape[2]))
    for k in range(a.shape[2]):
        out += a[:, :, k, None] * b[:, k, None, :]
    return out


def eliminate(a: Floats, b: Floats) -> Floats:
    """Solution of a x = b for a positive definite a (n, n) and b (n, m), without pivots; how far off, others prove."""
    both = np.concatenate([a, b], 1)
    for k in range(len(a)):
        row = both[k] / both[k, k]
        both = both - both[:, k, None] * row
        both[k] = row
    return both[:, len(a) :]
