"""C1: the slopes of ALiBi, by both rules."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np

import refattn as ra
from claims.claim import Result, Row, verdict

TITLE = "ALiBi: slopes of 8, 12, 16 and 40 heads"
RULES = {"interleaved": "the authors' code", "geometric": "the paper's sentence"}


def slopes(heads: int, rule: str) -> list[float]:
    """As a kernel is handed them."""
    sizes = {"B": 1, "Hq": heads, "Hkv": heads, "Lq": 1, "Lk": 1, "D": 1, "Dv": 1}
    resolved = ra.explain(ra.SDPA(causal=True, bias=ra.ALiBi(slopes=rule)), sizes)["spec"]
    return list(resolved.bias[0].slopes)


def exponents(heads: int, rule: str) -> list[Fraction]:
    """Slopes are 2 to the minus these: 8h/n, or those of the power of two below and every other one of the next."""
    below = 2 ** (heads.bit_length() - 1)
    if rule == "geometric" or below == heads:
        return [Fraction(8 * h, heads) for h in range(1, heads + 1)]
    between = [Fraction(8 * h, 2 * below) for h in range(1, 2 * below, 2)]
    return exponents(below, rule) + between[: heads - below]


def measure(small: bool = False) -> Result:
    """Every slope against its exact exponent, to half a unit of float32."""
    rows = []
    for heads, paper in (
        (8, "1/2, 1/4, ..., 1/256"),
        (16, "2^-0.5, 2^-1, ..., 2^-8"),
        (12, "not monotone"),
        (40, "not in the paper"),
    ):
        for rule in RULES if heads & (heads - 1) else ("interleaved",):
            found, exact = slopes(heads, rule), [2.0 ** -float(e) for e in exponents(heads, rule)]
            worst = max(abs(a / b - 1) for a, b in zip(found, exact, strict=True))
            ends = f"{found[0]:.6g}, {found[1]:.6g}, ..., {found[-1]:.6g}; within {worst:.1e} of the exact powers"
            figure = paper if rule == "interleaved" else "2^(-8h/n) for any n"
            falls = all(a > b for a, b in pairwise(found))
            shape = falls == (rule == "geometric" or not heads & (heads - 1))
            label = f"{heads} heads, {RULES[rule]}" if heads & (heads - 1) else f"{heads} heads, either rule"
            rows.append(Row(label, figure, ends, verdict(worst <= 2**-24 and shape, "a slope is off")))
    apart = sum(a != b for a, b in zip(slopes(12, "interleaved"), slopes(12, "geometric"), strict=True))
    told = f"{apart} of 12 slopes differ"
    rows.append(
        Row("The two rules agree for powers of two alone", "not in the paper", told, verdict(apart > 0, "they agree"))
    )
    how = "`refattn.explain` gives the resolved Spec; the exponents are exact fractions, the powers float64."
    return Result(rows, how, draw)


def draw(figure: Any) -> None:
    """Slopes by head, 12 and 40 of them."""
    for place, heads in enumerate((12, 40), 1):
        axes = figure.add_subplot(1, 2, place)
        for rule, mark in zip(RULES, "o+", strict=True):
            axes.semilogy(np.arange(1, heads + 1), slopes(heads, rule), mark, label=RULES[rule], markersize=4)
        axes.set(title=f"{heads} heads", xlabel="head", ylabel="slope")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=2)
