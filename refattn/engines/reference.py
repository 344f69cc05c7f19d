"""The reference engine: the variant's own text on float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refattn.problem import Problem
from refattn.spec import Outputs

name = "reference"


def refuses(problem: Problem) -> str | None:
    """Every variant has a reference."""
    return None


def run(problem: Problem) -> Outputs:
    """Outputs in float64."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        # Not asarray: a state's caches are arrays that can grow in place.
        return Outputs(problem.evaluate(np.asanyarray))


def vjp(
    problem: Problem, cotangents: Mapping[str, Any], wrt: Sequence[str], outputs: Mapping[str, Any] | None = None
) -> Outputs:
    """Outputs and gradients in float64, by the tape."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        return Outputs(problem.differentiate(np.asarray, cotangents, wrt))
