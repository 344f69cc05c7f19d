"""The condition number of a case: by hand, by perturbing inputs, and what it says of cases made to be hard."""

import numpy as np

import refattn as ra
from refattn import api
from refattn.golden.condition import condition


def solved(spec, arrays, weights):
    problem = api.build(spec, arrays, "float64", ("out",))
    found = problem.differentiate(np.asarray, weights, tuple(problem.real_inputs()))
    return problem, condition(problem, weights, found)


def test_one_key_moves_the_output_as_much_as_its_value_moves():
    arrays = {n: np.full((1, 1, 1, 2), 3.0) for n in "qkv"}
    assert solved(ra.SDPA(), arrays, {"out": np.ones((1, 1, 1, 2))})[1] == 1.0


def test_two_values_that_nearly_cancel_are_as_ill_conditioned_as_their_sum():
    # Equal scores of 0: out = (v_0 + v_1) / 2 = 1/4096, moved by (|v_0| + |v_1|) / 2 and, the queries being 0, no more.
    v = np.array([1.0, -1 + 2.0**-11]).reshape(1, 1, 2, 1)
    arrays = {"q": np.zeros((1, 1, 1, 2)), "k": np.ones((1, 1, 2, 2)), "v": v}
    exact = (1 + (1 - 2.0**-11)) / 2**-11
    found = solved(ra.SDPA(), arrays, {"out": np.ones((1, 1, 1, 1))})[1]
    assert exact <= found <= exact * (1 + 2.0**-7)


def test_no_relative_change_of_the_inputs_moves_more_and_the_worst_moves_as_much(rng):
    arrays = {n: rng.standard_normal((1, 2, 5, 4)) for n in "qkv"}
    w = {"out": rng.standard_normal((1, 2, 5, 4))}
    problem, kappa = solved(ra.SDPA(causal=True), arrays, w)
    plain = problem.differentiate(np.asarray, w, tuple("qkv"))
    size, step = np.abs(w["out"] * plain["out"]).sum(), 2.0**-20

    def moved(signs):
        changed = {n: a * (1 + step * signs[n]) for n, a in arrays.items()}
        out = api.build(ra.SDPA(causal=True), changed, "float64", ("out",)).evaluate(np.asarray)["out"]
        return abs((w["out"] * (out - plain["out"])).sum()) / (step * size)

    for _ in range(20):
        assert moved({n: rng.choice([-1.0, 1.0], a.shape) for n, a in arrays.items()}) <= kappa * (1 + 1e-5)
    worst = moved({n: np.sign(a * plain[f"d{n}"]) for n, a in arrays.items()})
    assert kappa * (1 - 2.0**-7) <= worst * (1 + 1e-5)


def test_outputs_that_are_all_zero_have_none():
    arrays = {n: np.ones((1, 1, 2, 2)) for n in "qkv"} | {"mask": np.zeros((2, 2), bool)}
    assert solved(ra.SDPA(), arrays, {"out": np.ones((1, 1, 2, 2))})[1] is None


def test_without_cotangents_it_is_that_of_the_sum_of_out(rng):
    arrays = {n: rng.standard_normal((1, 1, 3, 2)) for n in "qkv"}
    problem, kappa = solved(ra.SDPA(), arrays, {"out": np.ones((1, 1, 3, 2))})
    assert condition(problem, {}, problem.evaluate(np.asarray)) == kappa
