r"""Double-double arithmetic with proved errors: a number is an unevaluated sum h + l of two doubles, |l| ≤ ulp(h)/2.

u = 2^-53. The operations are those of Joldes, Muller and Popescu, "Tight and rigorous error bounds for basic building
blocks of double-word arithmetic" (ACM TOMS 44, 2017), whose bounds Muller and Rideau proved again in Coq (TOMS 48,
2022): relative errors, also where the terms of a sum cancel.

    two_sum, two_prod   exact                    add_double   2 u²
    add                 3 u² / (1 − 4u)          mul_double   3/2 u² + 4 u³
    div                 15 u² + 56 u³            mul          7 u²     (5 u² in Coq)

The names below bound them by powers of two. They hold where nothing overflows and no product is below 2^-900 (or is
exactly 0); a product below that is off by at most 2^-1070. They need IEEE 754 doubles rounded to nearest even, nothing
flushed and nothing contracted: hence no fastmath, and products by Dekker's and Veltkamp's splitting, which no fused
multiply-add may enter. Every operation is a fixed sequence of roundings: the same bits on every such machine.

docs/certification.md proves the exponential and the logarithm.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.jit import inlined

Floats = NDArray[np.float64]
Pair = tuple[Any, Any]

ADD, ADD_DOUBLE, MUL, MUL_DOUBLE, DIV = 2.0**-104, 2.0**-105, 2.0**-103, 2.0**-105, 2.0**-102
# Of exp, relative; of log, relative to its result, and absolute on top.
EXP, LOG, LOG_ABSOLUTE = 2.0**-102, 2.0**-105, 2.0**-101
# |x| of an exponential's argument.
EXP_REACH = 600.0

_SPLIT = 2.0**27 + 1
_RECIPROCAL_LN2 = float.fromhex("0x1.71547652b82fep+0")
_MAGIC = 1.5 * 2.0**52
# ln 2 in three parts; the first two have 40 bits, so that n times either is exact for |n| < 2^13.
_LN2 = (
    float.fromhex("0x1.62e42fefa2p-1"),
    float.fromhex("0x1.9ef35793c6p-41"),
    float.fromhex("0x1.673007e5ed5e8p-81"),
)
# 1/k! for k = 0..13 as pairs and for k = 14..23 as doubles: Fractions are rounded to nearest.
_FACTORIALS = [Fraction(1)]
for _k in range(1, 24):
    _FACTORIALS.append(_FACTORIALS[-1] / _k)
_HEADS = tuple(float(c) for c in _FACTORIALS)
_TAILS = tuple(float(c - Fraction(h)) for c, h in zip(_FACTORIALS[:14], _HEADS, strict=False))


@inlined
def two_sum(a: Any, b: Any) -> Pair:
    """The sum rounded, and what the rounding left: exact (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


@inlined
def fast_two_sum(a: Any, b: Any) -> Pair:
    """The same for |a| ≥ |b| or a = 0 (Dekker)."""
    s = a + b
    return s, b - (s - a)


@inlined
def two_prod(a: Any, b: Any) -> Pair:
    """The product rounded, and what the rounding left: exact (Dekker, Veltkamp)."""
    p = a * b
    c, d = _SPLIT * a, _SPLIT * b
    a_high, b_high = c - (c - a), d - (d - b)
    a_low, b_low = a - a_high, b - b_high
    return p, a_low * b_low - (((p - a_high * b_high) - a_low * b_high) - a_high * b_low)


@inlined
def add(xh: Any, xl: Any, yh: Any, yl: Any) -> Pair:
    """x + y (AccurateDWPlusDW)."""
    sh, sl = two_sum(xh, yh)
    th, tl = two_sum(xl, yl)
    vh, vl = fast_two_sum(sh, sl + th)
    return fast_two_sum(vh, tl + vl)


@inlined
def add_double(xh: Any, xl: Any, y: Any) -> Pair:
    """x + y of a double y (DWPlusFP)."""
    sh, sl = two_sum(xh, y)
    return fast_two_sum(sh, xl + sl)


@inlined
def mul(xh: Any, xl: Any, yh: Any, yl: Any) -> Pair:
    """x · y (DWTimesDW1)."""
    ch, cl = two_prod(xh, yh)
    return fast_two_sum(ch, cl + (xh * yl + xl * yh))


@inlined
def mul_double(xh: Any, xl: Any, y: Any) -> Pair:
    """x · y of a double y (DWTimesFP1)."""
    ch, cl = two_prod(xh, y)
    th, tl = fast_two_sum(ch, xl * y)
    return fast_two_sum(th, tl + cl)


@inlined
def div(xh: Any, xl: Any, yh: Any, yl: Any) -> Pair:
    """x / y (DWDivDW2)."""
    th = xh / yh
    rh, rl = mul_double(yh, yl, th)
    d = (xh - rh) + (xl - rl)
    return fast_two_sum(th, d / yh)


@inlined
def _term(k: int, rh: Any, rl: Any, yh: Any, yl: Any) -> Pair:
    """1/k! + r y, a step of Horner's rule. Steps stand one below the other: a loop would not be vectorised."""
    yh, yl = mul(rh, rl, yh, yl)
    return add(_HEADS[k], _TAILS[k], yh, yl)


@inlined
def exp(xh: Any, xl: Any) -> Pair:
    """e^x within EXP, relative, for |x| ≤ EXP_REACH: x = n ln 2 + r, |r| < 0.3466, and Taylor's series to r^23."""
    shifted = xh * _RECIPROCAL_LN2 + _MAGIC
    n = shifted - _MAGIC
    rh, rl = two_sum(xh - n * _LN2[0], -(n * _LN2[1]))
    rh, rl = add_double(rh, rl, xl)
    rh, rl = add_double(rh, rl, -(n * _LN2[2]))
    y = _HEADS[22] + rh * _HEADS[23]
    y = _HEADS[21] + rh * y
    y = _HEADS[20] + rh * y
    y = _HEADS[19] + rh * y
    y = _HEADS[18] + rh * y
    y = _HEADS[17] + rh * y
    y = _HEADS[16] + rh * y
    y = _HEADS[15] + rh * y
    y = _HEADS[14] + rh * y
    yh, yl = mul_double(rh, rl, y)
    yh, yl = add(_HEADS[13], _TAILS[13], yh, yl)
    yh, yl = _term(12, rh, rl, yh, yl)
    yh, yl = _term(11, rh, rl, yh, yl)
    yh, yl = _term(10, rh, rl, yh, yl)
    yh, yl = _term(9, rh, rl, yh, yl)
    yh, yl = _term(8, rh, rl, yh, yl)
    yh, yl = _term(7, rh, rl, yh, yl)
    yh, yl = _term(6, rh, rl, yh, yl)
    yh, yl = _term(5, rh, rl, yh, yl)
    yh, yl = _term(4, rh, rl, yh, yl)
    yh, yl = _term(3, rh, rl, yh, yl)
    yh, yl = mul(rh, rl, yh, yl)
    yh, yl = add_double(yh, yl, 0.5)
    yh, yl = mul(rh, rl, yh, yl)
    yh, yl = add_double(yh, yl, 1.0)
    yh, yl = mul(rh, rl, yh, yl)
    yh, yl = add_double(yh, yl, 1.0)
    power = np.int64((np.int64(n) + 1023) << 52).view(np.float64)
    return yh * power, yl * power


@inlined
def log(xh: Any, xl: Any) -> Pair:
    """Log x within LOG relative and LOG_ABSOLUTE, for 2^-800 ≤ x ≤ 2^800; NaN where the guess is too far off.

    One step from the guess y of a library, whatever its error: log x = y + log(1 + t), t = x e^−y − 1.
    """
    y = np.log(xh)
    eh, el = exp(-y, 0.0)
    th, tl = mul(xh, xl, eh, el)
    th, tl = add_double(th, tl, -1.0)
    if not abs(th) <= 2.0**-45:
        return np.nan, np.nan
    # t² / 2, in double: its own error and t³ / 3 are below 2^-136.
    th, tl = add_double(th, tl, -0.5 * th * th)
    return add_double(th, tl, y)
