"""Keys and values that are kept in pages or in integers, as the numbers that they mean, one after another.

Of arrays as well as of tape variables, which carry cotangents back to where a number is kept.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.numeric import broadcast, real, reshape, take, transpose
from refattn.plan import Score

Integers = NDArray[np.int64]


def unpacked(plan: Score) -> Score:
    """The plan with real k and v in a row, without pages and scales: what kernels take that know neither."""
    if plan.pages is None and plan.k_scale is None and plan.v_scale is None:
        return plan
    named = {}
    for name in ("k", "v"):
        kept, scale = getattr(plan, name), getattr(plan, f"{name}_scale")
        if plan.pages is not None and plan.lengths is not None:
            kept, scale = (None if a is None else in_a_row(a, plan.pages, plan.lengths[1]) for a in (kept, scale))
        named[name] = kept if scale is None else dequantised(kept, scale, plan.q)
    return replace(plan, **named, pages=None, k_scale=None, v_scale=None)


def dequantised(integers: Any, scale: Any, like: Any) -> Any:
    """Integers (B,Hkv,Lk,D) times scales that broadcast to (B,Hkv,Lk), in the space of `like`."""
    # In a slot that is not read a scale may be infinite and an integer 0.
    with np.errstate(invalid="ignore", over="ignore"):
        return real(integers, like) * reshape(scale, (*scale.shape, 1))


def in_a_row(pages: Any, table: Integers, lengths: Integers) -> Any:
    """Key j of sequence b, (B,Hkv,M·S,...), from slot j mod S of block table[b, j div S] of pages (N,Hkv,S,...).

    table (B,M); from the first block on that lies beyond a sequence's length, some block stands in for what it names.
    """
    (blocks, groups, size), rest = pages.shape[:3], pages.shape[3:]
    batch, count = table.shape
    if not blocks:
        return broadcast(real(np.zeros(()), pages), (batch, groups, count * size, *rest))
    used = np.arange(count) * size < np.asarray(lengths)[:, None]
    found = take(pages, np.where(used, table, 0).reshape(-1), 0)
    found = transpose(reshape(found, (batch, count, groups, size, *rest)), (0, 2, 1, *range(3, 4 + len(rest))))
    return reshape(found, (batch, groups, count * size, *rest))
