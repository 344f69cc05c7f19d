"""Matrix products of pairs, each entry summed in index order.

Every product of heads comes with its rest, every sum with what it left; the sums of these rests are error-free too, and
what they leave is the error.
"""

from __future__ import annotations

import numpy as np

from refattn.engines.certified.pairs_arithmetic import (
    FLOOR,
    SLACK,
    SMALL,
    Floats,
    Triple,
    accumulation,
    two_product,
    two_sum,
)

# Multiplications from which on compiling pays.
_LARGE = 1 << 16
# A product of two numbers of which the least are above this is a normal number.
_NORMAL = 2.0**-960


def matmul(a: Triple, b: Triple) -> Triple:
    """(n, m, k) @ (n, k, p) of finite numbers."""
    (n, m, length), width = a.h.shape, b.h.shape[2]
    if n * m * length * width < _LARGE:
        h, low, e = _product(a, b)
    else:
        from refattn.engines.certified.pairs_kernels import product

        h, low, e = product(a, b)
    h, low = two_sum(h, low)
    return Triple(h, low, e * SLACK + _underflow(a, b))


def _product(a: Triple, b: Triple) -> Triple:
    accumulated = accumulation(two_sum, two_product)
    shape = (a.h.shape[0], a.h.shape[1], b.h.shape[2])
    h, low, e = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for k in range(a.h.shape[2]):
        left, right = (part[:, :, k, None] for part in a), (part[:, k, None, :] for part in b)
        h, low, e = accumulated(h, low, e, *left, *right)
    return Triple(h, low, e)


def _underflow(a: Triple, b: Triple) -> Floats | float:
    """FLOOR for each term that is not exactly 0, where some product of heads, tails or radii may underflow."""
    heads = _least(a.h) * _least(b.h)
    tails = min(_least(a.h) * _least(b.low), _least(a.low) * _least(b.h))
    most = [np.abs(x.h) + x.e for x in (a, b)]
    radii = min(_least(most[0]) * _least(b.e), _least(a.e) * _least(most[1]))
    if heads >= SMALL and tails >= _NORMAL and radii >= _NORMAL:
        return 0.0
    # Counts are exact in any order.
    left, right = ((x > 0).astype(np.float64) for x in most)
    found: Floats = FLOOR * (left @ right)
    return found


def _least(x: Floats) -> float:
    """The least magnitude but 0."""
    size = np.abs(x)
    return float(np.min(size, where=size > 0, initial=1.0))
