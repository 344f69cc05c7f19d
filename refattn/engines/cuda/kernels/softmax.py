"""The online softmax of a row that several lanes hold, in base 2."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

F = np.float32


class Softmax(NamedTuple):
    """Device functions."""

    greatest: Any
    sum: Any
    base: Any
    lse: Any


def make(ops: Any, lanes: int) -> Softmax:
    """Of rows that so many lanes beside each other hold, a power of 2.

    `greatest(x)` and `sum(x)` over the lanes; `base(top)`: what is subtracted before 2ˢ, a number even where no key was
    seen; `lse(top, total)`: natural, −∞ where the total is 0.
    """
    half, zero, bottom, ln2 = lanes // 2, F(0), F(-np.inf), F(0.6931471805599453)

    @ops.device
    def greatest(x):  # type: ignore[no-untyped-def]
        distance = half
        while distance > 0:
            x = ops.larger(x, ops.shuffle_xor(x, distance))
            distance >>= 1
        return x

    @ops.device
    def total_of(x):  # type: ignore[no-untyped-def]
        distance = half
        while distance > 0:
            x = x + ops.shuffle_xor(x, distance)
            distance >>= 1
        return x

    @ops.device
    def base(top):  # type: ignore[no-untyped-def]
        return zero if top == bottom else top

    @ops.device
    def lse(top, total):  # type: ignore[no-untyped-def]
        return bottom if total == zero else ln2 * (base(top) + ops.log2(total))

    return Softmax(greatest, total_of, base, lse)
