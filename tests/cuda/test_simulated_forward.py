"""Every kernel of the forward pass in the simulator: every problem, odd shapes, several schedulers."""

import numpy as np
import pytest
from problems import PROBLEMS, Problem, Sizes, arrays
from simulating import run

import refattn as ra
from refattn import api
from refattn.bound import BoundSpace
from refattn.dtypes import round_to
from refattn.engines.cuda import operands
from refattn.plan import Score
from refattn.profiles import PROFILES

PROFILE = {"float32": "float32", "bfloat16": "flash-bf16", "float16": "flash-f16"}
WANT = ("out", "lse")


def checked(problem, inputs, dtype, **options):
    """Asserts that out and lse are within the published bound of each element of the exact result."""
    inputs = {n: round_to(a.astype(np.float64), dtype) if n in "qkv" else a for n, a in inputs.items()}
    built = api.build(problem.spec, inputs, None, WANT)
    plan = built.plan
    wide = {n: np.asarray(a, np.float64) if n in "qkv" else a for n, a in inputs.items()}
    expected = ra.evaluate(problem.spec, wide, want=WANT, dtype="float64")
    bounds = built.evaluate(BoundSpace(PROFILES[PROFILE[dtype]]).real)
    q, k, v = (inputs[n] for n in "qkv")
    if built.outline is None:
        q, k, v = (getattr(plan, n).astype(np.float32) for n in "qkv")
    out, lse = run(plan, q, k, v, **options)
    for n, found in (("out", out), ("lse", lse)):
        hidden = np.isneginf(expected[n])
        assert np.array_equal(np.isneginf(found), hidden), n
        off = np.abs(np.where(hidden, 0, found.astype(np.float64)) - np.where(hidden, 0, expected[n]))
        assert (off <= np.where(hidden, 0, bounds[n].e)).all(), (n, off.max())


def taken(name):
    problem = PROBLEMS[name]
    if 0 in problem.sizes or problem.sizes.D == 0:
        return False
    inputs, _ = arrays(problem, np.random.default_rng(0))
    plan = api.build(problem.spec, inputs, None, WANT).plan
    return isinstance(plan, Score) and operands.refuses(plan) is None


TAKEN = [name for name in PROBLEMS if taken(name)]


@pytest.mark.parametrize("name", TAKEN)
def test_every_problem_in_float32(name, rng):
    problem = PROBLEMS[name]
    checked(problem, arrays(problem, rng, np.float32)[0], "float32")
