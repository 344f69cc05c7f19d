"""Matrix products of pairs: one accumulation, written once, that Numba compiles for large products and NumPy runs else.

Every product of heads comes with its rest, every sum with what it left; the sums of these rests are error-free too, and
what they leave is the error.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from refattn.engines.certified import twofold
from refattn.engines.certified.pairs_arithmetic import CROSS, FLOOR, SLACK, SMALL, Floats, Triple, two_sum

# Multiplications from which on compiling pays.
_LARGE = 1 << 19


def _accumulation(two_sum: Callable[..., Any], two_product: Callable[..., Any]) -> Callable[..., Any]:
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


def _in_numpy(a: Triple, b: Triple) -> Triple:
    """(n, m, k) @ (n, k, p) for small ones."""
    shape = (a.h.shape[0], a.h.shape[1], b.h.shape[2])
    accumulated = _accumulation(two_sum, twofold.two_prod.py_func)
    h, low, e = np.zeros(shape), np.zeros(shape), np.zeros(shape)
    for k in range(a.h.shape[2]):
        left, right = (part[:, :, k, None] for part in a), (part[:, k, None, :] for part in b)
        h, low, e = accumulated(h, low, e, *left, *right)
    return Triple(h, low, e)


@cache
def _compiled() -> Callable[..., None]:
    accumulated = twofold.jit(_accumulation(twofold.two_sum, twofold.two_prod))

    @numba.njit(nogil=True, error_model="numpy")
    def product(a, b, found):  # type: ignore[no-untyped-def]
        (ah, al, ae), (bh, bl, be), (h, low, e) = a, b, found
        for n in range(ah.shape[0]):
            for i in range(ah.shape[1]):
                # Views of one row each: only then does the compiler see that they may be computed side by side.
                to_h, to_low, to_e = h[n, i], low[n, i], e[n, i]
                for k in range(ah.shape[2]):
                    x, y, z = ah[n, i, k], al[n, i, k], ae[n, i, k]
                    if x == 0 and z == 0:
                        continue
                    of_h, of_low, of_e = bh[n, k], bl[n, k], be[n, k]
                    for j in range(of_h.shape[0]):
                        to_h[j], to_low[j], to_e[j] = accumulated(
                            to_h[j], to_low[j], to_e[j], x, y, z, of_h[j], of_low[j], of_e[j]
                        )

    return product


def _least(x: Floats) -> float:
    size = np.abs(x)
    return float(np.min(size, where=size > 0, initial=np.inf))


def matmul(a: Triple, b: Triple) -> Triple:
    """(n, m, k) @ (n, k, p) of finite numbers, each entry summed in index order of k."""
    n, m, length = a.h.shape
    width = b.h.shape[2]
    if n * m * length * width < _LARGE:
        h, low, e = _in_numpy(a, b)
    else:
        h, low, e = Triple(*(np.zeros((n, m, width)) for _ in range(3)))
        dense = [tuple(np.ascontiguousarray(part) for part in x) for x in (a, b)]
        _compiled()(*dense, (h, low, e))
    h, low = two_sum(h, low)
    e = e * SLACK
    if any(part.any() for part in (a.low, a.e, b.low, b.e)) or _least(a.h) * _least(b.h) < SMALL:
        # A product may have underflowed; none that has a factor 0, and such do not count.
        live = [((x.h != 0) | (x.e != 0)).astype(np.float64) for x in (a, b)]
        e = e + FLOOR * (live[0] @ live[1])
    return Triple(h, low, e)
