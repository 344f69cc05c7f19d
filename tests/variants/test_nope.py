import math

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn import api
from refattn.plan import execute


def inputs(rng, sizes):
    a = qkv(rng, sizes)
    return {name: a[name] for name in "qkv"}, a


def test_it_is_causal_attention_and_nothing_else(rng):
    x, a = inputs(rng, (2, 4, 2, 6, 6, 3, 2))
    bare = forward_and_gradients(ra.SDPA(causal=True), x, a["dout"], a["dlse"])
    for name, array in forward_and_gradients(ra.NoPE(), x, a["dout"], a["dlse"]).items():
        same(array, bare[name])
    expected = loops.attention(
        *(a[n].tolist() for n in ("q", "k", "v", "dout", "dlse")), scale=3**-0.5, sees=lambda b, h, i, j: j <= i
    )
    for name, array in bare.items():
        near(array, expected[name])


def test_by_hand():
    """Equal scores: the means 6, (6 + 0)/2, (6 + 0 + 3)/3 of the values, and lse = ln m."""
    zero, v = np.zeros((1, 1, 3, 1)), np.array([6.0, 0.0, 3.0]).reshape(1, 1, 3, 1)
    found = ra.evaluate(ra.NoPE(), {"q": zero, "k": zero, "v": v}, want=("out", "lse"))
    near(found.out.ravel(), [6, 3, 3])
    near(found.lse.ravel(), [0, math.log(2), math.log(3)])


def test_beside_other_terms_it_changes_nothing(rng):
    x, _ = inputs(rng, (1, 4, 2, 5, 5, 3, 2))
    alone, beside = (ra.SDPA(causal=True, bias=terms) for terms in ((ra.ALiBi(),), (ra.NoPE(), ra.ALiBi())))
    same(ra.evaluate(beside, x).out, ra.evaluate(alone, x).out)


def test_the_plan_has_no_bias(rng):
    x, _ = inputs(rng, (1, 2, 1, 5, 5, 3, 2))
    plan = api.build(ra.NoPE(), x, "float64", ("out",)).plan
    assert plan.bias == ()
    assert plan.causal
    near(execute(plan)["out"], ra.evaluate(ra.NoPE(), x).out)


# Order


@pytest.mark.parametrize("i", [1, 4, 8])
def test_permuting_the_tokens_before_i_leaves_out_i(rng, i):
    x, _ = inputs(rng, (2, 2, 1, 9, 9, 4, 3))
    order = np.concatenate([rng.permutation(i), np.arange(i, 9)])
    shuffled = {name: a[:, :, order] for name, a in x.items()}
    found = [ra.evaluate(ra.NoPE(), given, want=("out", "lse")) for given in (x, shuffled)]
    near(found[1].out[:, :, i:], found[0].out[:, :, i:])
    near(found[1].lse[:, :, i:], found[0].lse[:, :, i:])


def test_a_bias_by_distance_does_hear_of_the_permutation(rng):
    x, _ = inputs(rng, (1, 2, 1, 9, 9, 4, 3))
    shuffled = {name: a[:, :, [3, 1, 0, 2, *range(4, 9)]] for name, a in x.items()}
    with_alibi = [ra.evaluate(ra.ALiBi(), given).out[:, :, -1] for given in (x, shuffled)]
    assert np.abs(with_alibi[1] - with_alibi[0]).max() > 1e-3


def test_the_causal_mask_itself_tells_order(rng):
    """Swapping a token with one after it changes the row between them."""
    x, _ = inputs(rng, (1, 2, 1, 9, 9, 4, 3))
    swapped = {name: a[:, :, [0, 1, 8, 3, 4, 5, 6, 7, 2]] for name, a in x.items()}
    rows = [ra.evaluate(ra.NoPE(), given).out[:, :, 5] for given in (x, swapped)]
    assert np.abs(rows[1] - rows[0]).max() > 1e-3


# The variance of the m-th output is 1/m of that of the values


def variances(samples, length, width, sigma, seed):
    """Unbiased-mean estimate of E[out²] of each row: random weights, random inputs of unit variance."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((samples, 1, length, width))
    wq, wk, wv = (sigma * rng.standard_normal((samples, 1, width, width)) for _ in range(3))
    out = ra.evaluate(ra.NoPE(), {"q": x @ wq, "k": x @ wk, "v": (x @ wv)[..., :1]}).out
    return (out[:, 0, :, 0] ** 2).mean(0)


def test_variance_falls_as_one_over_the_count_of_keys():
    """Weights of deviation σ = 0.02 as models draw them: scores are near 0, so Var out_m = d σ² / m.

    Of N samples of a number of mean 0 and kurtosis κ the mean square has a relative deviation √((κ − 1)/N). Entries of
    x W_v are Gaussian given |x|² ~ χ²_d; so κ ≤ 3 (1 + 2/d) = 3.375 for d = 16, and five deviations are 0.086.
    """
    samples, length, width, sigma = 8000, 32, 16, 0.02
    found = variances(samples, length, width, sigma, seed=7)
    count = np.arange(1, length + 1)
    five = 5 * math.sqrt((3 * (1 + 2 / width) - 1) / samples)
    assert np.abs(found * count / (width * sigma**2) - 1).max() < five < 0.09
    # The slope of a line through the 32 logarithms: each is off by less than `five`, so the slope by less than
    # five · Σ|w|, w the weights of least squares.
    at = np.log(count) - np.log(count).mean()
    weights = at / (at @ at)
    slope = float(weights @ np.log(found))
    assert abs(slope + 1) < -math.log1p(-five) * np.abs(weights).sum() < 0.15


def test_large_weights_attend_to_few_keys_and_the_variance_stays():
    """The claim is of random initialisation: with σ = 2 the softmax picks one key and m no longer counts."""
    found = variances(1000, 32, 16, 2.0, seed=7)
    assert found[-1] > 0.3 * found[0]
