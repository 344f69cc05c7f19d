r"""Loops of the exact-slice tier over (rows, keys): weights, cotangents of scores, fixed-point slices, their sums.

Nearly every loop is elementwise, so that LLVM makes vectors of it without any licence to reorder. A number is a pair
(h, l) as in `twofold`, with an error e: |exact − (h + l)| ≤ e. Errors are computed in float64; what their own roundings
lose, the slack of `fixed` covers.
"""
# ruff: noqa: E741, PLR0917  (h, l) is a pair, and Numba calls kernels by position

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.engines.certified.twofold import (
    _MAGIC,
    ADD,
    ADD_DOUBLE,
    DIV,
    EXP,
    LOG,
    LOG_ABSOLUTE,
    MUL,
    MUL_DOUBLE,
    Floats,
    add,
    add_double,
    div,
    exp,
    log,
    mul,
    mul_double,
    two_prod,
    two_sum,
)
from refattn.jit import inlined

# Weights below e^-90 < 2^-129 count as 0, with that for their error.
FAR = 90.0
FAR_ERROR = 2.0**-129
# Relative errors up to here are right to first order.
_SMALL = 2.0**-40
# A sink this far above the scores is left to other tiers, and one this far below counts as 0.
_SINK_REACH = 500.0


@inlined
def weigh(
    dots: Floats,
    scale: float,
    bh: Floats,
    bl: Floats,
    beta: float,
    live: Any,
    top: Floats,
    h: Floats,
    l: Floats,
    e: Floats,
) -> None:
    """Weights exp(scale·dot + bias − top) of live pairs, from exact dots and biases (bh + bl within beta).

    The sum b_h − top is exact, and the two that follow are off by 3 u² and 2 u² of the result, or of it and b_l: the
    exponent's error, and to first order the relative one of its exponential. One too large for that is infinite.
    """
    for i in range(dots.shape[0]):
        for j in range(dots.shape[1]):
            sh, sl = two_prod(dots[i, j], scale)
            ch, cl = two_sum(bh[i, j], -top[i])
            xh, xl = add(ch, cl, sh, sl)
            xh, xl = add_double(xh, xl, bl[i, j])
            near = live[i, j] and xh > -FAR
            # Above 1 only where the maximum, as a double, is far off: that row is refused.
            xh, xl = (min(xh, 1.0) if near else 0.0), (xl if near else 0.0)
            yh, yl = exp(xh, xl)
            h[i, j], l[i, j] = (yh if near else 0.0), (yl if near else 0.0)
            relative = EXP + 2 * ADD * (abs(xh) + abs(bl[i, j])) + beta
            relative = relative if relative < _SMALL else np.inf
            e[i, j] = yh * relative if near else (FAR_ERROR if live[i, j] else 0.0)


@inlined
def exponentials(sink: float, top: Floats, h: Floats, l: Floats, e: Floats) -> None:
    """e^(sink − top), (rows,)."""
    for i in range(top.shape[0]):
        xh, xl = two_sum(sink, -top[i])
        if xh > _SINK_REACH:
            h[i], l[i], e[i] = 1.0, 0.0, np.inf
        elif xh < -_SINK_REACH:
            h[i], l[i], e[i] = 0.0, 0.0, 2.0**-700
        else:
            h[i], l[i] = exp(xh, xl)
            e[i] = EXP * h[i]


@inlined
def normalise(h: Floats, l: Floats, e: Floats, rh: Floats, rl: Floats, re: Floats) -> None:
    """Weights times the reciprocals r (rows,) of their sums, in place; those of an exact 1 stay what they are."""
    for i in range(h.shape[0]):
        unit = rh[i] == 1 and rl[i] == 0 and re[i] == 0
        rounding = 0.0 if unit else MUL
        for j in range(h.shape[1]):
            wh, wl = mul(h[i, j], l[i, j], rh[i], rl[i])
            e[i, j] = e[i, j] * (rh[i] + re[i]) + h[i, j] * re[i] + rounding * wh
            h[i, j], l[i, j] = wh, wl


@inlined
def scores(
    h: Floats, l: Floats, e: Floats, dp: Floats, dh: Floats, dl: Floats, de: Floats, gh: Floats, gl: Floats, ge: Floats
) -> None:
    """Cotangents g = w (dp − δ) of the scores, from weights w (h, l, e), exact dp, and δ (rows,)."""
    for i in range(h.shape[0]):
        rounding = 0.0 if dl[i] == 0 else ADD_DOUBLE
        for j in range(h.shape[1]):
            fh, fl = add_double(-dh[i], -dl[i], dp[i, j])
            fe = de[i] + rounding * abs(fh)
            wh, we = h[i, j], e[i, j]
            gh[i, j], gl[i, j] = mul(wh, l[i, j], fh, fl)
            exact = (wh == 1 and l[i, j] == 0) or wh == 0 or fh == 0
            ge[i, j] = we * (abs(fh) + fe) + wh * fe + (0.0 if exact else MUL * abs(gh[i, j]))


@inlined
def cut(h: Floats, l: Floats, unit: float, bits: int, parts: Any, e: Floats) -> float:
    """Slices n_s of h + l = Σ_s n_s unit 2^(−s bits), integers; adds what is left to e; returns the largest |n_s|.

    Each remainder is exact: a − rint(a) for |a| < 2^51, and a two_sum.
    """
    step = 2.0**bits
    largest = 0.0
    last = unit / step ** (parts.shape[0] - 1)
    for i in range(h.shape[0]):
        a, b = h[i] / unit, l[i] / unit
        for s in range(parts.shape[0]):
            for j in range(h.shape[1]):
                n = (a[j] + _MAGIC) - _MAGIC
                parts[s, i, j] = n
                a[j], b[j] = two_sum(a[j] - n, b[j])
            if s + 1 < parts.shape[0]:
                for j in range(h.shape[1]):
                    a[j], b[j] = a[j] * step, b[j] * step
        for j in range(h.shape[1]):
            e[i, j] += (abs(a[j]) + abs(b[j])) * last
    for s in range(parts.shape[0]):
        for i in range(h.shape[0]):
            for j in range(h.shape[1]):
                largest = max(largest, abs(parts[s, i, j]))
    return largest


@inlined
def gather(parts: Any, unit: float, bits: int, h: Floats, l: Floats, e: Floats) -> None:
    """Add Σ_s parts_s unit 2^(−s bits) to the pairs (n, m), and the roundings to e; a sum with l = 0 is exact."""
    for s in range(parts.shape[0]):
        for i in range(h.shape[0]):
            for j in range(h.shape[1]):
                term = parts[s, i, j] * unit
                rounding = 0.0 if (l[i, j] == 0 or term == 0) else ADD_DOUBLE
                h[i, j], l[i, j] = add_double(h[i, j], l[i, j], term)
                e[i, j] += rounding * abs(h[i, j])
        unit /= 2.0**bits


@inlined
def inner(a: Floats, h: Floats, l: Floats, e: Floats, oh: Floats, ol: Floats, oe: Floats) -> None:
    """Σ_d a_id (h + l)_id for doubles a, into (rows,)."""
    for i in range(a.shape[0]):
        th, tl, te = 0.0, 0.0, 0.0
        for d in range(a.shape[1]):
            ph, pl = mul_double(h[i, d], l[i, d], a[i, d])
            te += abs(a[i, d]) * e[i, d] + (0.0 if l[i, d] == 0 else ADD_DOUBLE * abs(ph))
            exact = tl == 0 and pl == 0
            th, tl = add(th, tl, ph, pl)
            te += 0.0 if exact else ADD * abs(th)
        oh[i], ol[i], oe[i] = th, tl, te


@inlined
def quotient(h: Floats, l: Floats, e: Floats, zh: Floats, zl: Floats, ze: Floats) -> None:
    """Divide (rows, columns) by (rows,) > 0 in place; by an exact 1 nothing is changed."""
    for i in range(h.shape[0]):
        unit = zh[i] == 1 and zl[i] == 0 and ze[i] == 0
        least = zh[i] - 2 * ze[i]
        for j in range(h.shape[1] if not unit else 0):
            qh, ql = div(h[i, j], l[i, j], zh[i], zl[i])
            e[i, j] = (e[i, j] + abs(qh) * ze[i]) / least + DIV * abs(qh) if least > 0 else np.inf
            h[i, j], l[i, j] = qh, ql


@inlined
def log_sums(top: Floats, h: Floats, l: Floats, e: Floats) -> None:
    """Top + log(h + l) in place, (rows,)."""
    for i in range(h.shape[0]):
        yh, yl = log(h[i], l[i])
        h2, l2 = add_double(yh, yl, top[i])
        least = h[i] - 2 * e[i]
        error = e[i] / least if least > 0 else np.inf
        e[i] = error + LOG_ABSOLUTE + LOG * abs(yh) + ADD_DOUBLE * abs(h2)
        h[i], l[i] = h2, l2


@inlined
def singles(dots: Floats, scale: float, bh: Floats, bl: Floats, beta: float, h: Floats, l: Floats, e: Floats) -> None:
    """Scores scale·dot + bias, (rows,); exact where the product or the bias is 0."""
    for i in range(dots.shape[0]):
        sh, sl = two_prod(dots[i], scale)
        h[i], l[i] = add(sh, sl, bh[i], bl[i])
        e[i] = beta + (0.0 if (bh[i] == 0 or sh == 0) else ADD * abs(h[i]))


@inlined
def slope_bias(slope: float, distance: Floats, h: Floats, l: Floats) -> None:
    """−slope·distance, exact."""
    for i in range(h.shape[0]):
        for j in range(h.shape[1]):
            h[i, j], l[i, j] = two_prod(-slope, distance[i, j])


@inlined
def accumulate(ah: Floats, al: Floats, h: Floats, l: Floats) -> None:
    """Add pairs to pairs in place, (n, m)."""
    for i in range(h.shape[0]):
        for j in range(h.shape[1]):
            h[i, j], l[i, j] = add(h[i, j], l[i, j], ah[i, j], al[i, j])


@inlined
def times(factor: float, divisor: float, rounding: Any, h: Floats, l: Floats, e: Floats) -> None:
    """Multiply (n, m) by factor and divide by divisor > 0, in place; rounding is 0 for what of the two is exact."""
    for i in range(h.shape[0]):
        for j in range(h.shape[1]):
            first = 0.0 if l[i, j] == 0 else rounding[0]
            h[i, j], l[i, j] = mul_double(h[i, j], l[i, j], factor)
            h[i, j], l[i, j] = div(h[i, j], l[i, j], divisor, 0.0)
            e[i, j] = e[i, j] * abs(factor) / divisor + (first * MUL_DOUBLE + rounding[1] * DIV) * abs(h[i, j])
