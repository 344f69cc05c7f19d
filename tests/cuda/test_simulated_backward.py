"""Every kernel of the backward pass in the simulator: every problem, odd shapes, several schedulers."""

import numpy as np
import pytest
from problems import PROBLEMS, Problem, Sizes, arrays
from simulating import gradients
from test_simulated_forward import CAUSAL, ODD, PROFILE, SIXTEEN, TAKEN, WANT

import refattn as ra
from refattn import api
from refattn.bound import BoundSpace
from refattn.dtypes import round_to
from refattn.profiles import PROFILES


def checked(problem, inputs, duals, dtype, **options):
    """Asserts that dq, dk and dv are within the published bound of each element of the exact result."""
    inputs = {n: round_to(a.astype(np.float64), dtype) if n in "qkv" else a for n, a in inputs.items()}
    duals = {n: round_to(duals[n], dtype if n == "out" else "float32") for n in WANT}
    built = api.build(problem.spec, inputs, None, WANT)
    plan = built.plan
    wide = {n: a.astype(np.float64) for n, a in duals.items()}
    expected = built.differentiate(BoundSpace(PROFILES[PROFILE[dtype]]).real, wide, tuple("qkv"))
    forward = ra.evaluate(problem.spec, inputs, want=WANT, dtype=dtype)
    if built.outline is None:
        return None
    given = (forward["out"].astype(np.float32), forward["lse"].astype(np.float32), duals["lse"])
    found = gradients(plan, *(inputs[n] for n in "qkv"), duals["out"], *given, **options)
    for n, gradient in zip(("dq", "dk", "dv"), found, strict=False):
        off = np.abs(gradient.astype(np.float64) - expected[n].x)
        assert (off <= expected[n].e).all(), (n, off.max())
    return found


@pytest.mark.parametrize("name", TAKEN)
def test_every_problem_in_float32(name, rng):
    problem = PROBLEMS[name]
    inputs, duals = arrays(problem, rng)
    checked(problem, inputs, duals, "float32")
