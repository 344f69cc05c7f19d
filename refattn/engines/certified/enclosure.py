"""What every tier hands over: for each element two doubles and a radius, and the exact ends of the interval they mean.

Balls hold these already; a tier that computes with pairs of doubles makes an `Enclosure`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
End = tuple[int, int]


class Enclosing(Protocol):
    """An array of intervals that provably hold the exact values."""

    def enclosure(self) -> tuple[Floats, Floats, Floats]:
        """(t, d, r): the exact value lies within r of t + d; t is the double nearest to t + d; r = 0 only if equal."""

    def endpoints(self, where: NDArray[np.bool_]) -> list[tuple[End, End]]:
        """Lower and upper ends, as (significand, exponent), of the intervals chosen; these are bounded."""


class Enclosure(NamedTuple):
    """Intervals t + d ± r in three float64 arrays of one shape; d and r of a t that is not finite say nothing."""

    t: Floats
    d: Floats
    r: Floats

    def enclosure(self) -> tuple[Floats, Floats, Floats]:
        """The three arrays."""
        return self.t, self.d, self.r

    def endpoints(self, where: NDArray[np.bool_]) -> list[tuple[End, End]]:
        """Exact sums of the three doubles."""
        chosen = zip(*(a[where].tolist() for a in self), strict=True)
        return [(_dyadic(_sum(t, d) - Fraction(r)), _dyadic(_sum(t, d) + Fraction(r))) for t, d, r in chosen]


def _sum(t: float, d: float) -> Fraction:
    return Fraction(t) + Fraction(d)


def _dyadic(q: Fraction) -> End:
    """man·2^exp of a rational whose denominator is a power of two."""
    return q.numerator, 1 - q.denominator.bit_length()
