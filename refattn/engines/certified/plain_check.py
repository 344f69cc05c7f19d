r"""The independent check of the exact-slice tier: the variant's text in plain float64, with a bound that needs no tape.

With u = 2^-53 and γ = 1.01 n u for n = the row's keys + Dv + the rows that dk and dv add up, docs/certification.md
derives, for row i whose scores that matter are at most S_i, scale |q·k| and |bias| alike,

    κ_i = 4 (16 u (S_i + 1) + γ)          relative, of a weight P_ij and of what is summed with it
    F_i = 4 κ_i (2 Σ_d |dout_id| max_j |v_jd| + |dlse_i|)     of the cotangent of a score, in units of P_ij

    out  κ max_j |v_j|     lse  κ + 8 u (|lse| + |m|)     dv  Σ_i P κ max_i |dout_i|
    dq   scale F max_j |k_j|     dk  scale Σ_i P F max_i |q_i|

and dbias Σ P F, dsink Σ_i P F of the sink. Sums may be in any order. It assumes that NumPy's exponential and logarithm
are right to 4 units. The text runs on a few rows at a time, so memory does not grow with the square of the length.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.problem import Problem

Floats = NDArray[np.float64]

_UNIT = 2.0**-53
_TINY = 1e-290
ROWS = 256
# Outputs whose third axis is that of the query rows.
BY_ROW = ("out", "lse", "dq")


class Check(NamedTuple):
    """A float64 evaluation x, within e of the exact value."""

    x: Floats
    e: Floats


class Strain(NamedTuple):
    """κ and F of a few rows, (rows, 1)."""

    weight: Floats
    score: Floats


def strain(scores: Floats, count: NDArray[Any], reach: Floats, dlse: Floats) -> Strain:
    """Of rows (rows,) whose scores that matter are at most `scores`, sums of `count` terms, and |dout·v| ≤ `reach`."""
    weight = 4 * (16 * _UNIT * (scores + 1) + 1.01 * _UNIT * count)
    return Strain(weight[:, None], (4 * weight * (2 * reach + np.abs(dlse)))[:, None])


def in_blocks(
    problem: Problem, cotangents: Mapping[str, NDArray[Any]], wrt: Sequence[str], limits: Mapping[str, Floats]
) -> dict[str, Check]:
    """The text's outputs and gradients, a few query rows at a time, with the limits of what they may be off by."""
    found: dict[str, Floats] = {name: np.zeros(limit.shape) for name, limit in limits.items()}
    lq = problem.sizes["Lq"]
    whole = not hasattr(problem.variant, "restrict") or lq <= ROWS
    for start in range(0, max(lq, 1), max(lq, 1) if whole else ROWS):
        rows = tuple(range(start, lq if whole else min(start + ROWS, lq)))
        part = problem if whole else problem.restricted(rows)
        weights = {name: np.asarray(c)[:, :, start : start + len(rows)] for name, c in cotangents.items()}
        with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
            values = part.differentiate(np.asarray, weights, wrt)
        for name, value in values.items():
            if name in BY_ROW:
                found[name][:, :, start : start + len(rows)] = value
            elif np.shape(value) == found[name].shape:
                found[name] += value
            else:
                found[name][..., start : start + len(rows), :] += value
    return {name: Check(x, limits[name] * 1.01 + _TINY) for name, x in found.items()}
