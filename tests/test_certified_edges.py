"""Where the fast tiers might lose an error to underflow, or a NaN to an identity: each was a wrong certificate once."""

import flint
import numpy as np
import pytest
from flint import arb
from test_pairs import outside
from test_slices import agree, built

import refattn as ra
from refattn.engines import certified
from refattn.engines.certified import pairs_arithmetic as arithmetic
from refattn.engines.certified import pairs_kernels, slices
from refattn.engines.certified.pairs_arithmetic import Triple
from refattn.engines.certified.rounding import IDENTITY, PROPAGATED


def test_what_is_near_underflow_is_refused(rng):
    """A sink's share of 2^-700, times cotangents of 2^-360, would be 0 with an error of 0: exact, and wrong."""

    def change(x):
        x["k"] *= 2.0**180
        for n in "qv":
            x[n] *= 2.0**-180

    problem, weights = built(ra.SDPA(), rng, change=change, sink=np.array([480.0, -480.0, 0.0, -700.0]))
    weights = {"out": weights["out"] * 2.0**-180}
    assert slices.enclose(problem, weights, ("q", "k", "v", "sink")) is None
    seldom, weights = built(ra.SDPA(keep_probability=2.0**-1000), rng, keep=np.arange(37)[None] % 3 > 0)
    assert slices.enclose(seldom, weights, ("q", "k", "v")) is None


@pytest.mark.parametrize("sink", [99.0, 101.0, 600.0, -99.0, -101.0, -600.0])
def test_the_least_errors_do_not_underflow(rng, sink):
    """Everything as small as the tier takes it, and a sink as far from the scores; beyond, none but its own row."""
    small = 2.0**-92

    def change(x):
        x["q"] *= 2.0**180
        x["k"] *= small
        x["v"] *= small
        x["sink"] += (x["q"][0, :, 0] * x["k"][0, 0, 0]).sum(-1) * small

    problem, weights = built(
        ra.SDPA(scale=small), rng, (1, 4, 1, 3, 5, 2, 3), change, sink=np.array([sink, 0.0, 1.0, -1.0])
    )
    weights = {"out": weights["out"] * small}
    agree(problem, weights, tuple(problem.real_inputs()))
    certified.certify(problem, weights, tuple(problem.real_inputs()), bits=(128,), fast=True)


def test_a_bias_of_nan_on_the_only_key_is_no_weight_of_1(rng):
    bias = np.zeros((19, 37))
    bias[3, 7] = np.nan
    given = {"bias": bias, "mask": np.arange(37) == np.arange(19)[:, None] + 4}
    problem, weights = built(ra.SDPA(), rng, **given)
    assert slices.enclose(problem, weights, ("q", "k", "v")) is None
    found = certified.certify(problem, weights, ("q",), bits=(128,), fast=True)
    assert np.isnan(found["out"].value[:, :, 3]).all() and (found["out"].status[:, :, 3] == PROPAGATED).all()


@pytest.mark.parametrize("rules", [arithmetic.div, lambda *x: pairs_kernels.elementwise("div", *x)])
def test_a_radius_that_underflows_is_not_lost_by_a_small_divisor(rules):
    """2^-435 / (2^-300 ± 2^-940): the quotient times the radius is 2^-1075."""
    e = 2.0**-940 * (1 - 2.0**-13)
    a, b = (Triple(*(np.full(3, part) for part in x)) for x in ((2.0**-435, 0.0, 0.0), (2.0**-300, 0.0, e)))
    with flint.ctx.workprec(3000):
        least = arb(2) ** -435 / (arb(2) ** -300 - arb(e))
        assert outside(rules(a, b), [least] * 3) == 0


def test_an_identity_without_axes(rng):
    """The gradient of one bias for all scores is the sum of dlse, which no radius proves: its array has no axes."""
    problem, weights = built(ra.SDPA(), rng, (1, 1, 1, 2, 3, 2, 2), bias=np.float64(0.5))
    found = certified.certify(problem, weights, ("bias",), bits=(128,), fast=False)["dbias"]
    assert found.value == weights["lse"].sum() and found.status == IDENTITY
