"""Sums, products, quotients and roots of pairs of doubles, each with a radius that is measured and not assumed.

A `Triple` (h, low, e) of arrays stands for a number within e of h + low, where h is the double nearest to this sum.
Every operation is made of error-free transformations; what it has to drop it adds to e, and a quotient or a root is put
to the test: multiplied back and compared. So no theorem on the accuracy of an algorithm is needed, and a result that
happens to be exact has e = 0. docs/certification.md has the rules.

An entry of which nothing is known has e = ∞ and h = low = 0. Exact infinities and NaN have h so, and low = e = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from refattn.engines.certified import twofold

Floats = NDArray[np.float64]

# Radii are sums of nonnegative terms, a few roundings deep (2^24 in the longest sum): this covers them.
SLACK = 1 + 2.0**-26
# The cross terms of a product, rounded three times, and the product of the tails, which is dropped.
CROSS = 2.0**-51
# Below SMALL the rest of a product may be no double: it is dropped, and FLOOR covers it and every underflow besides.
SMALL, FLOOR = 2.0**-900, 2.0**-940


class Triple(NamedTuple):
    """Centre h + low and radius e: three float64 arrays of one shape, or three numbers."""

    h: Any
    low: Any
    e: Any


def exact(h: Any) -> Triple:
    """Doubles as they are."""
    h = np.asarray(h, np.float64)
    return Triple(h, np.zeros_like(h), np.zeros_like(h))


def negative(a: Triple) -> Triple:
    """−a, exactly."""
    return Triple(-a.h, -a.low, a.e)


class Rules(NamedTuple):
    """The operations of one way of running them."""

    two_sum: Any
    two_product: Any
    add: Any
    mul: Any
    div: Any
    sqrt: Any


def rules(compiled: Callable[[Any], Any], where: Callable[..., Any]) -> Rules:
    """The rules as `compiled` makes them: as they stand they are NumPy's, for arrays; Numba's are for numbers."""
    sums, products = cast("Any", (twofold.two_sum, twofold.two_prod))
    two_sum, two_product = compiled(sums.py_func), compiled(products.py_func)

    @compiled
    def add(a: Triple, b: Triple) -> Triple:
        """Six error-free sums; the two rests that find no place are the error."""
        s, r = two_sum(a.h, b.h)
        t, spare = two_sum(a.low, b.low)
        c, lost = two_sum(r, t)
        h, v = two_sum(s, c)
        w, lost_too = two_sum(v, spare)
        h, low = two_sum(h, w)
        return Triple(h, low, (np.abs(lost) + np.abs(lost_too) + a.e + b.e) * SLACK)

    @compiled
    def mul(a: Triple, b: Triple) -> Triple:
        """The product of the heads with its rest, and both cross terms; 0 times what is bounded is exactly 0."""
        p, r = two_product(a.h, b.h)
        small = np.abs(p) < SMALL
        r = where(small, 0.0, r)
        c, d = a.h * b.low, a.low * b.h
        y, lost = two_sum(r, c + d)
        h, low = two_sum(p, y)
        most_a, most_b = np.abs(a.h) + a.e, np.abs(b.h) + b.e
        e = np.abs(lost) + CROSS * (np.abs(c) + np.abs(d)) + most_a * b.e + a.e * most_b
        vague = small | (np.abs(a.low) + np.abs(b.low) + a.e + b.e > 0)
        zero = ((most_a == 0) & (most_b < np.inf)) | ((most_b == 0) & (most_a < np.inf))
        return Triple(h, low, where(zero, 0.0, e * SLACK + where(vague, FLOOR, 0.0)))

    @compiled
    def apart(a: Triple, b: Triple) -> Any:
        """From above: |a − b| of two centres, and what is not known of it."""
        found = add(a, Triple(-b.h, -b.low, b.e))
        return (np.abs(found.h) + np.abs(found.low) + found.e) * SLACK

    @compiled
    def div(a: Triple, b: Triple) -> Triple:
        """Q and one correction; then |a/b − q| ≤ (|a − q b| + e_a + |q| e_b) / (|b| − e_b), with a − q b as found."""
        q = a.h / b.h
        p, r = two_product(q, b.h)
        h, low = two_sum(q, (((a.h - p) - r) + (a.low - q * b.low)) / b.h)
        rest = apart(Triple(a.h, a.low, 0.0), mul(Triple(h, low, 0.0), Triple(b.h, b.low, 0.0)))
        least = np.abs(b.h) * (1 - 2.0**-50) - b.e
        stray = (rest + a.e + np.abs(h) * b.e) * SLACK
        e = stray / least * SLACK + where(rest + a.e + b.e > 0, FLOOR, 0.0)
        e = where(least > 0, e, np.inf)
        return Triple(h, low, where((a.h == 0) & (a.e == 0) & (least > 0), 0.0, e))

    @compiled
    def sqrt(x: Triple) -> Triple:
        """Y and one correction; then |√x − y| ≤ (|x − y²| + e_x) / y, with x − y² as found; √0 = 0 exactly."""
        y = np.sqrt(x.h)
        p, r = two_product(y, y)
        h, low = two_sum(y, (((x.h - p) - r) + x.low) / (2 * y))
        rest = apart(Triple(x.h, x.low, 0.0), mul(Triple(h, low, 0.0), Triple(h, low, 0.0)))
        e = (rest + x.e) / (h * (1 - 2.0**-50)) * SLACK + where(rest + x.e > 0, FLOOR, 0.0)
        e = where(x.h * (1 - 2.0**-50) - x.e > 0, e, np.inf)
        zero = (x.h == 0) & (x.e == 0)
        return Triple(where(zero, 0.0, h), where(zero, 0.0, low), where(zero, 0.0, e))

    return Rules(two_sum, two_product, add, mul, div, sqrt)


two_sum, two_product, add, mul, div, sqrt = rules(lambda rule: rule, np.where)


def accumulation(two_sum: Callable[..., Any], two_product: Callable[..., Any]) -> Callable[..., Any]:
    """One step of a sum of products: h + low + a·b, and what is lost with it, of a sum that is settled in the end."""

    def accumulated(  # noqa: PLR0917
        h: Any, low: Any, e: Any, ah: Any, al: Any, ae: Any, bh: Any, bl: Any, be: Any
    ) -> tuple[Any, Any, Any]:
        p, r = two_product(ah, bh)
        c, d = ah * bl, al * bh
        h, s = two_sum(h, p)
        r, lost = two_sum(r, c + d)
        r, lost_too = two_sum(s, r)
        low, lost_as_well = two_sum(low, r)
        e = e + (abs(lost) + abs(lost_too) + abs(lost_as_well) + CROSS * (abs(c) + abs(d)))
        return h, low, e + ((abs(ah) + ae) * be + ae * (abs(bh) + be))

    return accumulated


def total(x: Triple, add: Callable[[Triple, Triple], Triple] = add) -> Triple:
    """Sum over the last axis, halves first: a tree of `add`, however that is run."""
    while x.h.shape[-1] > 1:
        n = x.h.shape[-1]
        half = n // 2
        found = add(*(Triple(*(part[..., at] for part in x)) for at in (slice(half), slice(half, 2 * half))))
        spare = Triple(*(part[..., 2 * half :] for part in x))
        x = Triple(*(np.concatenate(both, -1) for both in zip(found, spare, strict=True))) if n % 2 else found
    if not x.h.shape[-1]:
        return exact(np.zeros(x.h.shape[:-1]))
    return Triple(*(part[..., 0] for part in x))
