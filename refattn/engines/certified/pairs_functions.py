r"""Exponential, logarithm and hyperbolic tangent of pairs, in the measured arithmetic of `pairs_arithmetic`.

    x = (64 m + j) (ln 2 / 64) + r,  |r| < 0.0055,   e^x = 2^m 2^(j/64) (1 + E),   E = Σ_{k=1}^{11} r^k / k!

The roundings measure themselves; what is left to prove, and is in docs/certification.md, are the end of the series and
that of the double tail that stands for r^7 and beyond. The constants are made here from integers.
"""

from __future__ import annotations

from fractions import Fraction
from functools import cache
from math import factorial, isqrt
from typing import NamedTuple

import numpy as np

from refattn.engines.certified.pairs_arithmetic import FLOOR, SLACK, Floats, Triple, add, div, exact, mul
from refattn.exponential import horner, log64

# Beyond these nothing is said of e^x but that it is small, or nothing at all.
LEAST, MOST = -620.0, 709.0
BELOW = 2.0**-894
# What the reduction adds to the error of r: the third part of ln 2 / 64, rounded, times up to 2^16, and that product.
_REDUCTION = 2.0**-112
_REACH = 0.0055
# |r|^11 / 12! · e^|r|: the rest of the series, relative to r.
_SERIES = 2.0**-111
# Of the tail Σ_{k=7}^{11} r^(k−7) / k! in double, relative: the first coefficient and the last sum, and little more.
_TAIL = 2.0**-51
_BITS = 256


class Constants(NamedTuple):
    """ln 2 / 64 in three parts, ln 2, 2^(j/64) for j < 64, 1/k! for k < 7, and for k = 7 … 11 as doubles."""

    parts: tuple[float, float, float]
    ln2: Triple
    powers: Triple
    inverse: list[Triple]
    tail: list[float]


def rational(q: Fraction, stray: Fraction = Fraction(0)) -> Triple:
    """The pair nearest to a rational that itself may be off by `stray`."""
    h = _double(q)
    low = _double(q - Fraction(h))
    rest = abs(q - Fraction(h) - Fraction(low)) + stray
    return Triple(np.float64(h), np.float64(low), np.float64(_double(rest) * SLACK + 2.0**-1070 if rest else 0.0))


def _double(q: Fraction) -> float:
    """The nearest double: Python rounds the quotient of integers correctly."""
    return q.numerator / q.denominator


@cache
def constants() -> Constants:
    """All from integers of 256 bits, each within 2^-240.

    ln 2 = Σ 2 / ((2k + 1) 3^(2k+1)), and 2^(1/64) by six square roots.
    """
    one = 1 << _BITS
    stray = Fraction(1, 1 << 240)
    ln2 = Fraction(sum(2 * one // ((2 * k + 1) * 3 ** (2 * k + 1)) for k in range(90)), one)
    part = ln2 / 64
    first = Fraction(int(part * 2**42), 2**42)
    second = Fraction(int((part - first) * 2**78), 2**78)
    root = 2 * one
    for _ in range(6):
        root = isqrt(root << _BITS)
    powers = [one]
    for _ in range(63):
        powers.append(powers[-1] * root >> _BITS)
    pairs = [rational(Fraction(1))] + [rational(Fraction(p, one), stray) for p in powers[1:]]
    return Constants(
        (_double(first), _double(second), _double(part - first - second)),
        rational(ln2, stray),
        Triple(*(np.array(column) for column in zip(*pairs, strict=True))),
        [rational(Fraction(1, factorial(k))) for k in range(7)],
        [1 / factorial(k) for k in range(7, 12)],
    )


def _reduced(x: Triple) -> tuple[Floats, Triple]:
    """(n, E): x near n ln 2 / 64, and e^r − 1 of what is left; an infinite radius where the reduction failed."""
    c = constants()
    n = np.rint(np.nan_to_num(np.clip(x.h, 2 * LEAST, MOST)) / _double(Fraction(c.ln2.h) / 64))
    r = add(x, Triple(-n * c.parts[0], -n * c.parts[1], np.zeros_like(n)))
    r = add(r, Triple(-n * c.parts[2], np.zeros_like(n), np.where(n == 0, 0.0, _REDUCTION)))
    tail = horner(c.tail, r.h)
    series = Triple(tail, np.zeros_like(tail), _TAIL * np.abs(tail))
    for k in range(6, 0, -1):
        series = add(mul(series, r), c.inverse[k])
    found = mul(series, r)
    sure = (np.abs(r.h) < _REACH) & (r.e < 2.0**-90)
    return n, Triple(found.h, found.low, np.where(sure, found.e + _SERIES * np.abs(r.h), np.inf))


def _centre(x: Triple) -> Triple:
    return Triple(x.h, x.low, np.zeros_like(x.h))


def _spread(y: Triple, e: Floats) -> Floats:
    """Radius of e^(x + δ) for |δ| ≤ e where y is e^x: e^e − 1 ≤ e + e² up to 1."""
    growth = np.where(e < 1, e * (1 + e), np.inf)
    found: Floats = np.where(e > 0, (y.e + (np.abs(y.h) + y.e) * growth) * SLACK + FLOOR, y.e)
    return found


def _exp(n: Floats, small: Triple) -> Triple:
    powers = Triple(*(part[n.astype(np.int64) % 64] for part in constants().powers))
    y = add(powers, mul(powers, small))
    m = np.floor(n / 64).astype(np.int64)
    return Triple(*(np.ldexp(part, m) for part in (y.h, y.low, y.e * SLACK)))


def exp(x: Triple) -> Triple:
    """e^x; e^0 = 1 exactly; below −620 all that is said is 0 ≤ e^x < 2^-894."""
    n, small = _reduced(_centre(x))
    y = _exp(n, small)
    y = Triple(y.h, y.low, _spread(Triple(y.h, y.low, y.e + FLOOR), x.e))
    y = Triple(*(np.where(x.h < LEAST, other, part) for part, other in zip(y, (0.0, 0.0, np.inf), strict=True)))
    y = Triple(y.h, y.low, np.where(x.h + x.e < LEAST - 1, BELOW, y.e))
    one = (x.h == 0) & (x.e == 0)
    return Triple(*(np.where(one, other, part) for part, other in zip(y, (1.0, 0.0, 0.0), strict=True)))


def expm1(x: Triple) -> Triple:
    """e^x − 1 for |x| ≤ 600, right in its own digits near 0, and 0 exactly at 0."""
    n, small = _reduced(_centre(x))
    y = _exp(n, small)
    less = add(y, exact(np.full_like(y.h, -1.0)))
    found = Triple(*(np.where(n == 0, a, b) for a, b in zip(small, less, strict=True)))
    e = np.where(x.e > 0, found.e + _spread(y, x.e), found.e) * SLACK
    e = np.where(np.abs(x.h) <= 600.0, e, np.inf)
    return Triple(found.h, found.low, np.where((x.h == 0) & (x.e == 0), 0.0, e))


def tanh(x: Triple) -> Triple:
    """E / (E + 2) with E = e^2x − 1; the slope is at most 1; beyond 300, 1 within 2^-860."""
    far = np.abs(x.h) > 300.0
    near = np.where(far, 0.0, 1.0)
    twice = expm1(Triple(2 * x.h * near, 2 * x.low * near, np.zeros_like(x.h)))
    y = div(twice, add(twice, exact(np.full_like(x.h, 2.0))))
    y = Triple(*(np.where(far, other, part) for part, other in zip(y, (np.sign(x.h), 0.0, 2.0**-860), strict=True)))
    # Two values of tanh are never 2 apart.
    e = (y.e + np.minimum(x.e, 2.0)) * SLACK
    return Triple(y.h, y.low, e)


def log(x: Triple) -> Triple:
    """One step from a guess y, whoever made it: log x = k ln 2 + y + log(1 + t), where x = 2^k f and t = f e^−y − 1.

    |log(1 + t) − t + t²/2| ≤ |t|³ for the |t| < 2^-40 that are let pass; |log x* − log x| ≤ e / (x − e). log 1 = 0
    exactly.
    """
    c = constants()
    with np.errstate(divide="ignore"):
        f, k = np.frexp(x.h)
        under = f < 0.75
        f, k = np.where(under, 2 * f, f), k - under
    low = np.ldexp(x.low, -k)
    y = np.nan_to_num(log64(f))
    t = add(mul(Triple(f, low, np.where(x.low == 0, 0.0, 2.0**-1074)), exp(exact(-y))), exact(np.full_like(y, -1.0)))
    square = t.h * t.h
    second = Triple(-square / 2, np.zeros_like(y), square * 2.0**-50 + np.abs(square * t.h))
    own = add(add(t, second), exact(y))
    own = add(own, mul(exact(k.astype(np.float64)), Triple(*(np.broadcast_to(part, y.shape) for part in c.ln2))))
    least = x.h * (1 - 2.0**-50) - x.e
    e = own.e + np.where(x.e > 0, x.e / np.maximum(least, 0.0) * SLACK + FLOOR, 0.0)
    e = np.where((least > 0) & (np.abs(t.h) < 2.0**-40) & (t.e < 2.0**-60), e * SLACK, np.inf)
    e = np.where((x.h == 1) & (x.low == 0) & (x.e == 0), 0.0, e)
    return Triple(own.h, own.low, e)
