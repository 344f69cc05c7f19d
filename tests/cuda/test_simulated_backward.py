"""Every kernel of the backward pass in the simulator: problems of every kind, odd shapes, several schedulers."""

import numpy as np
import pytest
from problems import PROBLEMS, Problem, Sizes, arrays
from simulating import gradients
from test_simulated_forward import CAUSAL, ODD, PROFILE, TAKEN, WANT

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
    wide = {n: a.astype(np.float64) for n, a in duals.items()}
    expected = built.differentiate(BoundSpace(PROFILES[PROFILE[dtype]]).real, wide, tuple("qkv"))
    forward = ra.evaluate(problem.spec, inputs, want=WANT, dtype=dtype)
    given = (duals["out"], forward["out"].astype(np.float32), forward["lse"].astype(np.float32), duals["lse"])
    found = gradients(built.plan, *(inputs[n] for n in "qkv"), given, **options)
    for n, gradient in zip(("dq", "dk", "dv"), found, strict=False):
        off = np.abs(gradient.astype(np.float64) - expected[n].x)
        assert (off <= expected[n].e).all(), (n, off.max())
    return found


@pytest.mark.parametrize("name", TAKEN)
def test_a_problem_of_every_kind_in_float32(name, rng):
    problem = PROBLEMS[name]
    inputs, duals = arrays(problem, rng)
    checked(problem, inputs, duals, "float32")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain", "lengths around 16", "softcap", "sink", "biases of all kinds"])
def test_problems_in_16_bits(name, dtype, rng):
    problem = PROBLEMS[name]._replace(sizes=Sizes(B=1))
    checked(problem, *arrays(problem, rng), dtype)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("dtype", "sizes"), [("float32", (19, 26, 9, 17)), ("bfloat16", (35, 50, 20, 33))])
def test_several_tiles_under_several_schedulers(dtype, sizes, seed, rng):
    problem = Problem(CAUSAL, Sizes(1, 2, 1, *sizes))
    checked(problem, *arrays(problem, rng), dtype, seed=seed)


@pytest.mark.parametrize("name", ["one row", "rows without keys", "a window"])
def test_odd_shapes(name, rng):
    spec, sizes = ODD[name]
    checked(Problem(spec, sizes), *arrays(Problem(spec, sizes), rng), "float16")


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_are_aligned_are_copied_16_bytes_at_a_time(dtype, rng):
    problem = Problem(CAUSAL, Sizes(1, 2, 1, 9, 11, 16, 8))
    checked(problem, *arrays(problem, rng), dtype, wide=True)
