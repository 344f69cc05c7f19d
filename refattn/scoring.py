"""What every engine that runs Score plans asks of one: which differences of positions are visible, which occur."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.errors import ShapeError
from refattn.plan import Score, Table

Array = NDArray[Any]
LEAST, GREATEST = np.iinfo(np.int64).min, np.iinfo(np.int64).max


def span(plan: Score) -> tuple[int, int]:
    """Least and greatest position(j) − position(i) that is visible."""
    left, right = plan.window
    reach = GREATEST if right is None else right
    return LEAST if left is None else -left, min(reach, 0) if plan.causal else reach


def differences(plan: Score) -> tuple[int, int]:
    """Least position(j) − position(i), and how many integers lie from it to the greatest; (0, 0) where no pair is.

    Taken sequence by sequence: two that stand far apart have no difference between them.
    """
    q_at, k_at = plan.positions
    if not (q_at.size and k_at.size):
        return 0, 0
    low, high = int((k_at.min(1) - q_at.max(1)).min()), int((k_at.max(1) - q_at.min(1)).max())
    return low, high - low + 1


def summed(tables: Sequence[Table], heads: int, low: int, count: int) -> Array:
    """Sum of the tables over the differences that occur; −∞ in one masks, whatever another holds."""
    if not tables or not count:
        return np.zeros((heads, 0))
    for table in tables:
        first, stop = low + table.offset, low + table.offset + count
        if first < 0 or stop > table.values.shape[1]:
            given = f"{-table.offset} to {table.values.shape[1] - table.offset - 1}"
            occur = f"{low} to {low + count - 1}"
            raise ShapeError(f"a bias table covers the differences {given}, but {occur} occur: widen the table")
    parts = np.stack([t.values[:, low + t.offset : low + t.offset + count] for t in tables])
    with np.errstate(invalid="ignore"):
        return np.where(np.isneginf(parts).any(0), -np.inf, parts.sum(0))
