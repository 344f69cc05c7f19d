"""The plan of a problem whose q, k and v go into it as they are, without their having been converted to float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refattn.plan import Score, leaves
from refattn.problem import Problem


class Unread:
    """Stands for an array of which a lowering may ask the shape and nothing else."""

    dtype = np.dtype(np.float64)
    __array_ufunc__ = None

    def __init__(self, array: Any) -> None:
        self.array = array
        self.shape, self.ndim, self.size = array.shape, array.ndim, array.size

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError("the array's numbers are read")


def plan(problem: Problem, others: Mapping[str, Any] | None = None) -> Score | None:
    """The Score plan with q, k, v in the caller's own dtype; None where lowering reads them, or it is another plan.

    `others` stand in the place of the inputs of their names.
    """
    inputs, lower = problem.inputs, getattr(problem.variant, "lower", None)
    if not callable(lower) or hasattr(problem.variant, "state") or not {"q", "k", "v"} <= set(inputs):
        return None
    given = {n: Unread(inputs[n]) for n in "qkv"}
    real = {n: a.astype(np.float64, copy=False) for n, a in problem.real_inputs().items() if n not in given}
    try:
        found = lower(problem.spec, dict(inputs) | real | dict(others or {}) | given)
    except (TypeError, AttributeError):
        return None
    if not isinstance(found, Score) or any(getattr(found, n) is not array for n, array in given.items()):
        return None
    if sum(isinstance(leaf, Unread) for leaf in leaves(found).values()) > len(given):
        return None
    return replace(found, **{n: array.array for n, array in given.items()})
