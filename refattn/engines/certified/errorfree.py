"""The two error-free transformations: what a rounding leaves is a double too, and these find it.

Plain functions of numbers or of arrays, so that NumPy runs them as they stand and Numba compiles them: one text.
"""

from __future__ import annotations

from typing import Any

_SPLIT = 2.0**27 + 1


def two_sum(a: Any, b: Any) -> tuple[Any, Any]:
    """The sum rounded, and what the rounding left: exact where nothing overflows (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def two_product(a: Any, b: Any) -> tuple[Any, Any]:
    """The product rounded, and the rest: exact for a product above 2^-900 and factors below 2^996 (Veltkamp, Dekker)."""
    p = a * b
    c, d = _SPLIT * a, _SPLIT * b
    a_high, b_high = c - (c - a), d - (d - b)
    a_low, b_low = a - a_high, b - b_high
    return p, a_low * b_low - (((p - a_high * b_high) - a_low * b_high) - a_high * b_low)
