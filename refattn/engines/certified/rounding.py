"""Rounding enclosures to float64: to odd, so that one more rounding to any shorter format is correct, and to nearest.

A double rounded to odd is the value itself if it is a double, else the neighbouring double with an odd significand.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.dtypes import nearest, odd
from refattn.engines.certified.enclosure import Enclosing

Floats = NDArray[np.float64]

ROUNDED, EXACT, ENCLOSED, PROPAGATED, IDENTITY = 0, 1, 2, 3, 4
STATUS = ("correctly_rounded", "exact", "enclosed", "propagated", "identity")
# Below this a radius may have no double worth the name. Such elements, and those that a radius below a step does not
# settle (ties to 2^-50 of a step, exact doubles), go the slow way, by integers.
_SMALL = 2.0**-900


class Rounded(NamedTuple):
    """`odd` and `nearest` roundings, a code of STATUS per element, and the width of what is only enclosed."""

    odd: Floats
    nearest: Floats
    status: NDArray[np.uint8]
    width: Floats


def round_enclosed(found: Enclosing, to_nearest: bool) -> Rounded:
    """Decide every element that the intervals settle; `to_nearest` asks that both roundings be settled."""
    t, d, r = found.enclosure()
    exact = (d == 0) & (r == 0)
    size = np.abs(np.where(np.isfinite(t), t, 1.0))
    is_odd = (np.ascontiguousarray(t).view(np.int64) & 1).astype(bool).reshape(np.shape(t))
    with np.errstate(invalid="ignore", over="ignore"):
        neighbour = np.nextafter(t, np.where(d > 0, np.inf, -np.inf))
        # Both steps from an odd double are equal, but beyond the largest there is none.
        step = np.abs(np.where(is_odd, np.nextafter(t, 0.0), neighbour) - t)
    reach = np.abs(d) + r
    decided = exact | (np.where(is_odd, True, np.abs(d) > r) & (reach < step))
    if to_nearest:
        decided &= (r == 0) | (reach < (size - np.nextafter(size, -np.inf)) / 2)
    value = np.where(exact | is_odd, t, neighbour)
    status = np.where(exact, EXACT, np.where(decided, ROUNDED, ENCLOSED)).astype(np.uint8)
    status[np.isnan(t)] = PROPAGATED
    settled = np.array(t + 0.0)
    slow = (status == ENCLOSED) & ((size < _SMALL) | np.isinf(t) | (r < step)) & np.isfinite(r)
    if slow.any():
        ends = found.endpoints(slow)
        lower, upper = (np.array([(odd(*e[i]), _nearest(*e[i])) for e in ends]) for i in (0, 1))
        agree = lower == upper
        same = agree.all(1) if to_nearest else agree[:, 0]
        value[slow] = np.where(same, lower[:, 0], t[slow])
        settled[slow] = np.where(agree[:, 1], lower[:, 1], t[slow]) + 0.0
        status[slow] = np.where(same, ROUNDED, ENCLOSED)
    open_ = status == ENCLOSED
    value = np.array(np.where(open_, t, value) + 0.0)
    value[np.isnan(t)] = np.nan
    width = np.where(open_, np.where(np.isinf(t), np.inf, np.nextafter(reach, np.inf)), 0.0)
    return Rounded(value, settled, status, width)


def _nearest(man: int, exp: int) -> float:
    """man·2^exp to nearest, ties to even; what is far beyond the doubles needs no rational of its size."""
    top = man.bit_length() + exp
    if top < -1100 or top > 1100:
        return 0.0 if top < 0 else (-np.inf if man < 0 else np.inf)
    return nearest(man * Fraction(2) ** exp, "float64")


def better(old: Rounded | None, new: Rounded) -> Rounded:
    """Elements already decided stay; the others take what more bits say."""
    if old is None:
        return new
    parts: Any = zip(old, new, strict=True)
    return Rounded(*(np.where(old.status == ENCLOSED, b, a) for a, b in parts))


def count(status: Any) -> dict[str, int]:
    """Elements by the name of their status."""
    return {name: int(np.sum(status == code)) for code, name in enumerate(STATUS)}
