"""Angles that fall geometrically, p / base^(n/d): what sinusoidal embeddings and their inner products are made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.numeric import cos, exp, log, real, reshape, sin

Integers = NDArray[np.int64]


def frequencies(base: float, numerators: Integers, denominator: int, like: Any) -> Any:
    """base^(−n/d) for every numerator n, as real numbers."""
    return exp(-(log(real(base, like)) * real(numerators, like) / denominator))


def circle(positions: Integers, base: float, numerators: Integers, denominator: int, like: Any) -> tuple[Any, Any]:
    """Cosines and sines (positions, numerators) of p / base^(n/d), by a division: a second derivation."""
    p = reshape(real(positions, like), (len(positions), 1))
    angles = p / exp(log(real(base, like)) * real(numerators, like) / denominator)
    return cos(angles), sin(angles)
