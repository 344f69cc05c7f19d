"""Choices among pairs: which is larger, which the largest, in which order; what the radii leave open is said to be."""

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.engines.certified.pairs_arithmetic import Floats, Triple, add, negative
from refattn.errors import Undecided
from refattn.space import Bools, Integers


def least_magnitude(x: Triple) -> Floats:
    """|h + low| from below."""
    found: Floats = np.abs(x.h) * (1 - 2.0**-50)
    return found


def larger(a: Triple, b: Triple) -> Triple:
    """The larger centre; the larger number moves no further from it than either from its own."""
    first = (a.h > b.h) | ((a.h == b.h) & (a.low >= b.low))
    h, low = np.where(first, a.h, b.h), np.where(first, a.low, b.low)
    h = np.where(np.isnan(a.h) | np.isnan(b.h), np.nan, h)
    bounded = np.isfinite(h)
    return Triple(h, np.where(bounded, low, 0.0), np.where(bounded, np.maximum(a.e, b.e), 0.0))


def step(x: Triple, at_zero: float) -> Triple:
    """1 above 0, 0 below, `at_zero` at an exact 0, and ½ ± ½ where that is open."""
    sure = (least_magnitude(x) > x.e) | (x.e == 0)
    value = np.where(sure, np.heaviside(x.h, at_zero), 0.5)
    return Triple(value, np.zeros_like(value), np.where(sure, 0.0, 0.5))


def peak(x: Triple, live: Bools) -> Triple:
    """1 at the first largest live entry of the last axis; where none surely is that, ½ ± ½ at all that may be."""
    best, may = _largest(x, live)
    sure = np.sum(may, -1, keepdims=True) < 2
    first = (np.arange(x.h.shape[-1]) == best) & live
    value = np.where(sure, first * 1.0, np.where(may, 0.5, 0.0))
    return Triple(value, np.zeros_like(value), np.where(sure | ~may, 0.0, 0.5))


def amax(x: Triple, live: Bools) -> Triple:
    """The largest live centre, 0 where none is live; the largest number is no further off than any that may be it."""
    best, may = _largest(x, live)
    none, nan = ~np.any(live, -1), np.any(live & np.isnan(x.h), -1)
    h, low = (np.where(none | nan, 0.0, np.take_along_axis(part, best, -1)[..., 0]) for part in x[:2])
    e = np.where(nan, 0.0, np.max(np.where(may, x.e, 0.0), -1))
    return Triple(np.where(nan, np.nan, h), low, e)


def top_k(x: Triple, k: int) -> Integers:
    """Indices of the k largest of the last axis, the largest first, exact equals in their order.

    Raises
    ------
    Undecided
        Two entries are closer than their radii.
    """
    order = _order(x)
    a = Triple(*(np.take_along_axis(part, order, -1) for part in x))
    for n in range(min(k, order.shape[-1])):
        rest = Triple(*(part[..., n + 1 :] for part in a))
        gap = _gap(Triple(*(part[..., n : n + 1] for part in a)), rest)
        if not ((least_magnitude(gap) > gap.e) | _equal(gap)).all():
            raise Undecided("two entries too close to tell in pairs which is larger: balls will")
    return order[..., :k]


def _order(x: Triple) -> Integers:
    """Centres from the largest down, equal ones in their order."""
    at = np.broadcast_to(np.arange(x.h.shape[-1]), x.h.shape)
    found: Integers = np.lexsort((at, -x.low, -x.h), -1).astype(np.int64)
    return found


def _largest(x: Triple, live: Bools) -> tuple[Integers, Bools]:
    """Index of the first largest centre (kept axis), and the entries that may be the first of the largest."""
    x = Triple(*(np.where(live, part, fill) for part, fill in zip(x, (-np.inf, 0.0, 0.0), strict=True)))
    best = _order(x)[..., :1]
    behind = _gap(Triple(*(np.take_along_axis(part, best, -1) for part in x)), x)
    later = np.arange(x.h.shape[-1]) > best
    may: Bools = live & ~(least_magnitude(behind) > behind.e) & ~(_equal(behind) & later)
    return best, may


def _gap(one: Triple, others: Triple) -> Triple:
    """One number of each row minus others, whose centres are no larger."""
    with np.errstate(all="ignore"):
        found: Triple = add(Triple(*(np.broadcast_to(part, others.h.shape) for part in one)), negative(others))
    return found


def _equal(gap: Triple) -> Any:
    return (gap.h == 0) & (gap.e == 0)
