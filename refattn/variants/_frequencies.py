"""Frequencies base^(−2t/width) of sinusoids: the exact numbers in every space, and those of float32 arithmetic."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Context, Decimal
from fractions import Fraction
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.dtypes import nearest
from refattn.numeric import exp, log, real

# Decimal powers are those of this software, the same on every machine; 60 digits decide a rounding to 24 bits.
_DIGITS = Context(prec=60, Emin=-(10**6), Emax=10**6)


def frequencies(base: float, indices: Sequence[int], width: int, like: Any) -> Any:
    """The exact base^(−2t/width) for the indices t; in float64 within a few units of the last place."""
    return exp(-(log(real(base, like)) * real(2 * np.array(indices, np.int64), like) / width))


@cache
def float32_frequencies(base: float, width: int) -> NDArray[np.float32]:
    """Frequencies as float32 arithmetic finds them: quotient 2t/width, power and reciprocal each rounded correctly."""
    return np.array([_float32_frequency(base, Fraction(2 * t, width)) for t in range(width // 2)], np.float32)


def _float32_frequency(base: float, exponent: Fraction) -> float:
    held = Decimal(nearest(exponent, "float32"))
    power = nearest(Fraction(_DIGITS.power(Decimal(base), held)), "float32")
    return nearest(1 / Fraction(power), "float32")
