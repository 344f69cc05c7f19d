r"""Pairs of doubles with errors, and their fixed-point slices: integers that matrix products add up exactly.

    x = Σ_s n_s unit 2^(−s bits) + rest,   s = 0..count−1,  |n_s| ≤ 2^bits

For integers a of at most `most`, Σ_j n_ij a_j over `terms` entries is at most 2^53 if bits = 53 − ⌈log2(most·terms)⌉:
then every partial sum in any order is exact (Ozaki, Ogita, Oishi, Rump, 2012).
"""
# ruff: noqa: E741  (h, l) is a pair

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.engines.certified import kernels
from refattn.engines.certified.enclosure import Enclosure
from refattn.engines.certified.twofold import ADD
from refattn.errors import RefattnError

Floats = NDArray[np.float64]

# Keys, or rows, that one product adds up: more would leave slices too few bits.
BLOCK = 4096
_SIGNIFICANT = 118
_FEWEST_BITS, _MOST_BITS = 16, 48
# Radii are computed in float64, by fewer than 2^20 roundings each; what is near underflow loses less than 2^-1060.
_SLACK, _UNDERFLOW = 1 + 2.0**-30, 2.0**-1060


class Pairs(NamedTuple):
    """Numbers h + l within e, three arrays of one shape."""

    h: Floats
    l: Floats
    e: Floats

    def at(self, key: Any) -> Pairs:
        """Contiguous copies of entries."""
        return Pairs(*(np.ascontiguousarray(a[key]) for a in self))

    def put(self, key: Any, x: Pairs) -> None:
        """Set entries."""
        for mine, a in zip(self, x, strict=True):
            mine[key] = a

    def scaled(self, factor: float, divisor: float = 1.0) -> Pairs:
        """Times factor / divisor, divisor > 0; by powers of two exactly."""
        inexact = tuple(float(np.frexp(abs(x))[0] != 0.5) for x in (factor, divisor))
        flat = Pairs(*(a.reshape(1, -1).copy() for a in self))
        kernels.times(factor, divisor, inexact, *flat)
        return Pairs(*(a.reshape(self.h.shape) for a in flat))

    def plus(self, x: Pairs) -> Pairs:
        """Sum; of doubles it is exact."""
        a, b = (Pairs(*(part.reshape(1, -1).copy() for part in y)) for y in (self, x))
        inexact = (a.l != 0) | (b.l != 0)
        kernels.accumulate(b.h, b.l, a.h, a.l)
        e = a.e + b.e + np.where(inexact, ADD * np.abs(a.h), 0.0)
        return Pairs(*(part.reshape(self.h.shape) for part in (a.h, a.l, e)))

    def enclosure(self) -> Enclosure:
        """With what the roundings of the errors themselves may have lost."""
        e = np.where(np.isnan(self.e), np.inf, self.e)
        return Enclosure(self.h, self.l, np.where(e > 0, e * _SLACK + _UNDERFLOW, 0.0))


def zeros(*shape: int) -> Pairs:
    """Exact zeros."""
    return Pairs(np.zeros(shape), np.zeros(shape), np.zeros(shape))


@dataclass(frozen=True)
class Fixed:
    """Slices of `bits` bits, `count` of them, for products by integers up to `most`."""

    bits: int
    count: int
    most: int

    def allow(self, terms: int) -> None:
        """Refuse sums of more terms than are exact.

        Raises
        ------
        RefattnError
            There are.
        """
        if self.most * terms > 2 ** (53 - self.bits):
            raise RefattnError(
                f"{terms} products of {self.bits} bits by {self.most} are not summed exactly: please report this"
            )

    def cut(self, x: Pairs, unit: float) -> Floats:
        """Slices (count, n, m) of numbers at most unit, a power of two; what they leave is added to x.e.

        Raises
        ------
        RefattnError
            A slice is wider than `bits`: products would not be exact.
        """
        parts = np.empty((self.count, *x.h.shape))
        largest = kernels.cut(x.h, x.l, unit / 2.0**self.bits, self.bits, parts, x.e)
        if largest > 2.0**self.bits:
            raise RefattnError(f"a slice of {largest} where {self.bits} bits are exact: please report this")
        return parts

    def gather(self, parts: Floats, unit: float, into: Pairs) -> None:
        """Add what products or sums of slices mean, (count, n, m), to pairs (n, m)."""
        kernels.gather(parts, unit / 2.0**self.bits, self.bits, *into)

    def product(self, parts: Floats, matrix: Floats, unit: float) -> Pairs:
        """Slices (count, n, m) times a matrix (m, p), in blocks of keys that are exact."""
        found = zeros(parts.shape[1], matrix.shape[1])
        for start in range(0, parts.shape[2], BLOCK):
            block = slice(start, min(start + BLOCK, parts.shape[2]))
            self.allow(block.stop - start)
            self.gather(parts[:, :, block] @ matrix[block], unit, found)
        return found

    def error(self, e: Floats, matrix: Floats) -> Floats:
        """An upper bound of e (n, m) times |matrix| (m, p): integers too, so the same on every machine; 0 of zeros."""
        top = float(e.max(initial=0.0))
        if not 0 < top < np.inf:
            return np.full((e.shape[0], matrix.shape[1]), top) if top else np.zeros((e.shape[0], matrix.shape[1]))
        unit = 2.0 ** (int(np.frexp(top)[1]) - self.bits)
        whole_errors = np.ceil(e / unit)
        blocks = [slice(start, start + BLOCK) for start in range(0, e.shape[1], BLOCK)]
        found: Floats = sum((whole_errors[:, block] @ np.abs(matrix[block]) for block in blocks), np.zeros(()))
        return found * unit


def fixed(most: int, terms: int) -> Fixed | None:
    """The widest slices for products by integers up to `most`, so many terms each; None where they are too thin."""
    most = max(most, 1)
    bits = min(53 - (most * max(min(terms, BLOCK), 1) - 1).bit_length(), _MOST_BITS)
    return None if bits < _FEWEST_BITS else Fixed(bits, -(-_SIGNIFICANT // bits), most)


def whole(*arrays: Any) -> tuple[int, int]:
    """(n, e): every entry is an integer of at most n times 2^e; n is vast where the entries span more than 60 bits."""
    x = np.concatenate([np.abs(np.asarray(a, np.float64)).ravel() for a in arrays])
    x = x[x != 0]
    if not x.size:
        return 0, 0
    m, exponent = np.frexp(x)
    k = np.ldexp(m, 53).astype(np.int64)
    low = np.frexp((k & -k).astype(np.float64))[1] - 1
    e = int((exponent - 53 + low).min())
    top = int(exponent.max()) - e
    return (1 << top if top > 60 else int(np.ldexp(x.max(), -e))), e
