r"""How ill-conditioned a case is: one number beside it.

    κ = Σ_x Σ_i |x_i · dx_i| / Σ_y Σ_j |w_j · y_j|,      dx the gradients for the cotangents w of the outputs y

To first order, inputs that are each off by a relative ε move ⟨w, y⟩ by at most κ ε Σ |w_j y_j|, and some such inputs
do (Higham, *Accuracy and Stability of Numerical Algorithms*, section 1.6, for the sum that a cotangent asks for).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.bound import BoundSpace
from refattn.dtypes import round_up_bfloat16
from refattn.errors import Undecided
from refattn.problem import Problem
from refattn.profiles import FLOAT64

Arrays = Mapping[str, NDArray[Any]]


def condition(problem: Problem, weights: Arrays, values: Arrays) -> float | None:
    """κ in three digits, rounded up; None where it has no value: outputs that are all 0, or a choice too close.

    `values`: outputs and gradients d<name> for the cotangents `weights`; where there are none, of the sum of `out`.
    """
    if not weights:
        weights = {"out": np.ones(np.shape(values["out"]))}
        try:
            with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
                found = problem.differentiate(BoundSpace(FLOAT64).real, weights, tuple(problem.real_inputs()))
        except Undecided:
            return None
        values = {name: bounded.x for name, bounded in found.items()}
    size = math.fsum(_products(w, values[name]) for name, w in weights.items())
    moved = math.fsum(_products(x, values[f"d{name}"]) for name, x in problem.real_inputs().items())
    return float(round_up_bfloat16(moved / size)) if size > 0 else None


def _products(a: NDArray[Any], b: NDArray[Any]) -> float:
    """Σ |a b|, correctly rounded, of the products that are finite."""
    with np.errstate(invalid="ignore", over="ignore", under="ignore"):
        products = np.abs(np.asarray(a, np.float64) * b)
    return math.fsum(products[np.isfinite(products)].tolist())
