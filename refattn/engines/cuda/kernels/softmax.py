"""The online softmax of a row that several lanes hold, in base 2."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cuda.kernels.product import Product

F = np.float32


class Softmax(NamedTuple):
    """Device functions."""

    sum: Any
    lse: Any
    weigh: Any


def make(ops: Any, product: Product) -> Softmax:
    """Of rows that the lanes of a product share.

    `sum(x)` over the lanes. `weigh(s, o, top, total, searching)`: logits to weights, in place; the running maximum
    `top` and this lane's share of the total of each row, and the outputs o, are brought to the new maximum. In a search
    a weight is 1 where the row sees the key. `lse(top, total)`: natural, −∞ where the total is 0.
    """
    tall, broad, wide, score, output = product.tall, product.broad, product.wide, product.score, product.output
    one, half, zero, bottom, ln2 = F(1), product.lanes // 2, F(0), F(-np.inf), F(0.6931471805599453)

    @ops.device
    def greatest(x):
        distance = half
        while distance > 0:
            x = ops.larger(x, ops.shuffle_xor(x, distance))
            distance >>= 1
        return x

    @ops.device
    def total_of(x):
        distance = half
        while distance > 0:
            x = x + ops.shuffle_xor(x, distance)
            distance >>= 1
        return x

    @ops.device
    def base(top):
        return zero if top == bottom else top

    @ops.device
    def lse(top, total):
        return bottom if total == zero else ln2 * (base(top) + ops.log2(total))

    @ops.device
    def weigh(s, o, top, total, searching):
        for r in range(tall):
            here = bottom
            for c in range(broad):
                here = ops.larger(here, s[score(r, c)])
            new = ops.larger(top[r], greatest(here))
            low = base(new)
            factor = ops.exp2(top[r] - low)
            top[r], total[r] = new, total[r] * factor
            for w in range(wide):
                o[output(r, w)] = o[output(r, w)] * factor
            for c in range(broad):
                m = score(r, c)
                seen = zero if s[m] == bottom else one
                weight = ops.exp2(s[m] - low)
                total[r] = total[r] + weight
                s[m] = seen if searching else weight

    return Softmax(total_of, lse, weigh)
