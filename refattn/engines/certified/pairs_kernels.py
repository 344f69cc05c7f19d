"""The rules of pairs compiled by Numba, for arrays so large that compiling pays: the same text, the same bits.

The exponential alone is another than NumPy's: `twofold.exp`, which is proved instead of measured, takes a tenth of the
time.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import numpy as np

from refattn.engines.certified import arithmetic, pairs_arithmetic, twofold
from refattn.engines.certified import pairs_functions as functions
from refattn.engines.certified.pairs_arithmetic import FLOOR, SLACK, Floats, Triple, accumulation, rules
from refattn.jit import inlined, jit, stamp

# From here on twofold's exponential says nothing.
_REACH = twofold.EXP_REACH - 1


@inlined
def _where(condition: Any, a: Any, b: Any) -> Any:
    return a if condition else b


_RULES = rules(inlined, _where)
_add, _mul, _div = _RULES.add, _RULES.mul, _RULES.div
_answers = inlined(arithmetic.answering(_RULES.two_sum, _RULES.two_product))
_accumulated = inlined(accumulation(_RULES.two_sum, _RULES.two_product))


@inlined
def _exp(x: Any) -> Any:
    """As `pairs_functions.exp`, for an |x| that twofold's reaches; the radius of the others is infinite."""
    h, low = twofold.exp(x.h, x.low)
    growth = x.e * (1 + x.e)
    e = (h * (growth + twofold.EXP * (1 + growth))) * SLACK + FLOOR
    e = _where(x.e < 1, _where(abs(x.h) < _REACH, e, np.inf), np.inf)
    one = (x.h == 0) & (x.e == 0)
    return Triple(_where(one, 1.0, h), _where(one, 0.0, low), _where(one, 0.0, e))


class Kernels(NamedTuple):
    """Loops over flat arrays, and the product of matrices."""

    add: Any
    mul: Any
    div: Any
    exp: Any
    product: Any
    answers: Any


def _kernels(version: int) -> Kernels:
    """The kernels close over the stamp: it is part of the key under which Numba keeps them, and the rules are not."""

    @jit
    def add(a, b, to):  # type: ignore[no-untyped-def]
        (ah, al, ae), (bh, bl, be), (h, low, e), _ = a, b, to, version
        for i in range(h.shape[0]):
            found = _add(Triple(ah[i], al[i], ae[i]), Triple(bh[i], bl[i], be[i]))
            h[i], low[i], e[i] = found.h, found.low, found.e

    @jit
    def mul(a, b, to):  # type: ignore[no-untyped-def]
        (ah, al, ae), (bh, bl, be), (h, low, e), _ = a, b, to, version
        for i in range(h.shape[0]):
            found = _mul(Triple(ah[i], al[i], ae[i]), Triple(bh[i], bl[i], be[i]))
            h[i], low[i], e[i] = found.h, found.low, found.e

    @jit
    def div(a, b, to):  # type: ignore[no-untyped-def]
        (ah, al, ae), (bh, bl, be), (h, low, e), _ = a, b, to, version
        for i in range(h.shape[0]):
            found = _div(Triple(ah[i], al[i], ae[i]), Triple(bh[i], bl[i], be[i]))
            h[i], low[i], e[i] = found.h, found.low, found.e

    @jit
    def exp(a, to):  # type: ignore[no-untyped-def]
        (ah, al, ae), (h, low, e), _ = a, to, version
        for i in range(h.shape[0]):
            found = _exp(Triple(ah[i], al[i], ae[i]))
            h[i], low[i], e[i] = found.h, found.low, found.e

    @jit
    def product(a, b, found):  # type: ignore[no-untyped-def]
        (ah, al, ae), (bh, bl, be), (h, low, e), _ = a, b, found, version
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
                        to_h[j], to_low[j], to_e[j] = _accumulated(
                            to_h[j], to_low[j], to_e[j], x, y, z, of_h[j], of_low[j], of_e[j]
                        )

    @jit
    def answers(given, to):  # type: ignore[no-untyped-def]
        _ = version
        for i in range(to.shape[1]):
            found = _answers(given[0, i], given[1, i], given[2, i], given[3, i], given[4, i], given[5, i])
            for n in range(to.shape[0]):
                to[n, i] = found[n]

    return Kernels(add, mul, div, exp, product, answers)


@cache
def kernels() -> Kernels:
    """Kept for this text of the rules and no other, and tried."""
    return tried(_kernels(stamp(twofold, pairs_arithmetic, arithmetic)))


def tried(found: Kernels) -> Kernels:
    """The kernels.

    Raises
    ------
    RefattnError
        What they have been compiled to is not IEEE arithmetic.
    """

    def answers(*given: Floats) -> Any:
        to = np.empty((len(arithmetic.EXPECTED), given[0].size))
        found.answers(np.stack(given), to)
        return to

    arithmetic.check(answers, "Code compiled by Numba")
    return found


def elementwise(name: str, *operands: Triple) -> Triple:
    """An operation on flat arrays."""
    found = Triple(*(np.empty(operands[0].h.shape) for _ in range(3)))
    given = [tuple(np.ascontiguousarray(part) for part in x) for x in operands]
    getattr(kernels(), name)(*given, tuple(found))
    if name == "exp":
        far = ~(np.abs(operands[0].h) < _REACH)
        if far.any():
            with np.errstate(all="ignore"):
                beyond = functions.exp(Triple(*(part[far] for part in operands[0])))
            for part, other in zip(found, beyond, strict=True):
                part[far] = other
    return found


def product(a: Triple, b: Triple) -> Triple:
    """(n, m, k) @ (n, k, p) as `accumulation` adds it up, not yet settled."""
    found = Triple(*(np.zeros((*a.h.shape[:2], b.h.shape[2])) for _ in range(3)))
    given = [tuple(np.ascontiguousarray(part) for part in x) for x in (a, b)]
    kernels().product(*given, tuple(found))
    return found
