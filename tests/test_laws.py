"""Laws that hold for every golden case of every variant in the registry, without a line about any of them.

The plan means what the text says, and the tape's gradients are those of the text: ⟨w, Jv⟩ by complex step, which shares
nothing with the tape but the formula, equals ⟨Jᵀw, v⟩.
"""

import numpy as np
import pytest
from checks import near

from refattn.golden import inputs as recipes
from refattn.golden import suite
from refattn.golden.build import problem_of
from refattn.plan import execute

CASES = {case.name: case for case in suite.cases()}
ROWS, STEP = 1000, 1e-200


def problem(case):
    return problem_of(case, recipes.inputs(case))


@pytest.mark.parametrize("name", CASES)
def test_the_plan_means_what_the_reference_says(name):
    given = problem(CASES[name])
    if given.unplanned:
        pytest.skip(given.unplanned)
    with np.errstate(all="ignore"):
        expected = given.evaluate(np.asarray)
        if expected["out"][..., 0].size > ROWS:
            pytest.skip(f"more than {ROWS} rows, which the plan's meaning goes through one by one")
        found = execute(given.plan)
    assert "out" in found
    for output in found:
        near(found[output], expected[output], 1e-11)


@pytest.mark.parametrize("name", CASES)
def test_gradients_are_those_of_the_text(name):
    case = CASES[name]
    given, rng = problem(case), np.random.default_rng(len(name))
    duals = {n: w.astype(np.float64) for n, w in recipes.cotangents(case).items()}
    if not duals:
        pytest.skip("no gradients are published")
    wrt = tuple(given.real_inputs())
    ways = {n: rng.standard_normal(given.inputs[n].shape) for n in wrt}
    with np.errstate(all="ignore"):
        x = given.lift(np.asarray)
        moved = given.text(x | {n: x[n] + 1j * STEP * ways[n] for n in wrt})
        gradients = given.differentiate(np.asarray, duals, wrt)
        forward = [np.where(w == 0, 0, w * np.imag(moved[n]) / STEP) for n, w in duals.items()]
        backward = [np.where(ways[n] == 0, 0, ways[n] * gradients[f"d{n}"]) for n in wrt]
    terms = [np.concatenate([a.ravel() for a in side]) for side in (forward, backward)]
    size = max(np.abs(side).sum() for side in terms)
    assert abs(terms[0].sum() - terms[1].sum()) <= 1e-11 * size
