"""The rules of pairs compiled by Numba, for arrays so large that compiling pays: the same text, the same bits.

The exponential alone is another than NumPy's: `twofold.exp`, which is proved instead of measured, takes a tenth of the
time.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np

from refattn.engines.certified import pairs_functions as functions
from refattn.engines.certified import twofold
from refattn.engines.certified.pairs_arithmetic import FLOOR, SLACK, Rules, Triple, accumulation, rules

# From here on twofold's exponential says nothing.
_REACH = twofold.EXP_REACH - 1


@twofold.jit
def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


@cache
def compiled() -> Rules:
    """The rules for Numba."""
    return rules(twofold.jit, _where)


@twofold.jit
def _exp(x: Any) -> Any:
    """As `pairs_functions.exp`, for an |x| that twofold's reaches; the radius of the others is infinite."""
    h, low = twofold.exp(x.h, x.low)
    growth = x.e * (1 + x.e)
    e = (h * (growth + twofold.EXP * (1 + growth))) * SLACK + FLOOR
    e = _where(x.e < 1, _where(abs(x.h) < _REACH, e, np.inf), np.inf)
    one = (x.h == 0) & (x.e == 0)
    return Triple(_where(one, 1.0, h), _where(one, 0.0, low), _where(one, 0.0, e))


@cache
def _of_one(name: str) -> Callable[..., None]:
    rule = _exp if name == "exp" else getattr(compiled(), name)

    @numba.njit(nogil=True, error_model="numpy")
    def run(a, to):  # type: ignore[no-untyped-def]
        (ah, al, ae), (h, low, e) = a, to
        for i in range(h.shape[0]):
            found = rule(Triple(ah[i], al[i], ae[i]))
            h[i], low[i], e[i] = found.h, found.low, found.e

    return run


@cache
def _of_two(name: str) -> Callable[..., None]:
    rule = getattr(compiled(), name)

    @numba.njit(nogil=True, error_model="numpy")
    def run(a, b, to):  # type: ignore[no-untyped-def]
        (ah, al, ae), (bh, bl, be), (h, low, e) = a, b, to
        for i in range(h.shape[0]):
            found = rule(Triple(ah[i], al[i], ae[i]), Triple(bh[i], bl[i], be[i]))
            h[i], low[i], e[i] = found.h, found.low, found.e

    return run


def elementwise(name: str, *operands: Triple) -> Triple:
    """An operation on flat arrays."""
    found = Triple(*(np.empty(operands[0].h.shape) for _ in range(3)))
    given = [tuple(np.ascontiguousarray(part) for part in x) for x in operands]
    (_of_one if len(operands) == 1 else _of_two)(name)(*given, tuple(found))
    if name == "exp":
        far = ~(np.abs(operands[0].h) < _REACH)
        if far.any():
            with np.errstate(all="ignore"):
                beyond = functions.exp(Triple(*(part[far] for part in operands[0])))
            for part, other in zip(found, beyond, strict=True):
                part[far] = other
    return found


@cache
def _product() -> Callable[..., None]:
    accumulated = twofold.jit(accumulation(compiled().two_sum, compiled().two_product))

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


def product(a: Triple, b: Triple) -> Triple:
    """(n, m, k) @ (n, k, p) as `accumulation` adds it up, not yet settled."""
    found = Triple(*(np.zeros((*a.h.shape[:2], b.h.shape[2])) for _ in range(3)))
    given = [tuple(np.ascontiguousarray(part) for part in x) for x in (a, b)]
    _product()(*given, tuple(found))
    return found
