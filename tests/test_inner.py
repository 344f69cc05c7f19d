"""Scores and probs: what stands inside softmax attention, in every space, and what they add up to."""

import ml_dtypes
import numpy as np
import pytest

import refattn as ra
from refattn import api
from refattn.engines import certified
from refattn.errors import SpecError, Unsupported

INNER = ("out", "lse", "scores", "probs")


@pytest.fixture
def x(rng):
    arrays = {n: rng.standard_normal((2, h, length, 8)) for n, h, length in (("q", 4, 5), ("k", 2, 7), ("v", 2, 7))}
    return arrays | {"sink": rng.standard_normal(4), "bias": rng.standard_normal((1, 4, 5, 7))}


SPECS = {
    "plain": ra.SDPA(),
    "causal": ra.SDPA(causal="bottom_right", softcap=1.5),
    "window": ra.SDPA(window=(1, 1), bias=(ra.ALiBi(),)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
def test_weights_are_the_exponentials_of_scores_and_give_out(x, spec):
    found = ra.evaluate(spec, x, want=INNER)
    np.testing.assert_allclose(found.probs, np.exp(found.scores - found.lse[..., None]), rtol=1e-12)
    np.testing.assert_allclose(found.probs @ np.repeat(x["v"], 2, 1), found.out, rtol=1e-11, atol=1e-13)
    sink = np.exp(x["sink"][None, :, None] - found.lse)
    np.testing.assert_allclose(found.probs.sum(-1) + sink, 1, rtol=1e-12)
    assert (np.isneginf(found.scores) == (found.probs == 0)).all()
    assert np.isneginf(found.scores).any() == (spec is not SPECS["plain"])


def test_scores_by_hand():
    q, k = np.array([2.0, 0.0]).reshape(1, 1, 1, 2), np.array([[1.0, 5.0], [-3.0, 1.0]]).reshape(1, 1, 2, 2)
    found = ra.evaluate(ra.SDPA(scale=0.5, softcap=2.0), {"q": q, "k": k, "v": k}, want=("scores",))
    np.testing.assert_allclose(found.scores.ravel(), [2 * np.tanh(0.5), 2 * np.tanh(-1.5)], rtol=1e-15)
    assert list(found) == ["scores"]


def test_sigmoid_weights_have_the_bias_in_their_scores(x):
    del x["sink"]
    spec = ra.SDPA(normalizer="sigmoid", sigmoid_bias=-3.0)
    found, softmax = ra.evaluate(spec, x, want=("scores", "probs")), ra.evaluate(ra.SDPA(), x, want=("scores",))
    np.testing.assert_allclose(found.scores, softmax.scores - 3, rtol=1e-12, atol=1e-13)
    np.testing.assert_allclose(found.probs, 1 / (1 + np.exp(-found.scores)), rtol=1e-12)


def test_the_keep_mask_does_not_reach_the_weights(x, rng):
    keep = rng.random((2, 4, 5, 7)) < 0.5
    found = ra.evaluate(ra.SDPA(keep_probability=0.5), x | {"keep": keep}, want=INNER)
    np.testing.assert_array_equal(found.probs, ra.evaluate(ra.SDPA(), x, want=("probs",)).probs)


def test_certified_scores_are_the_nearest_float32(x):
    x = {n: a.astype(np.float32) for n, a in x.items()}
    exact = ra.evaluate(ra.SDPA(causal="bottom_right"), {n: a.astype(np.float64) for n, a in x.items()}, want=INNER)
    found = ra.evaluate(ra.SDPA(causal="bottom_right"), x, want=INNER, engine="certified")
    for name in ("scores", "probs"):
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], exact[name], rtol=6.1e-8)
        assert found.status[name].shape == found[name].shape


def test_short_types_keep_scores_in_float32_and_nan_stays_with_its_pair(x):
    short = {n: a.astype(ml_dtypes.bfloat16) for n, a in x.items()}
    short["k"][0, 0, 3] = np.nan
    found = ra.evaluate(ra.SDPA(), short, want=("scores", "out"))
    assert found.scores.dtype == np.float32 and found.out.dtype == ml_dtypes.bfloat16
    bad = np.zeros((2, 4, 5, 7), bool)
    bad[0, :2, :, 3] = True
    assert (np.isnan(found.scores) == bad).all()


def test_they_are_asked_by_name_of_engines_and_variants_that_have_them(x):
    assert "scores" not in ra.evaluate(ra.SDPA(), x)
    with pytest.raises(Unsupported, match="gives out and lse, and not scores"):
        ra.evaluate(ra.SDPA(), x, want=("scores",), engine="cpu")
    plain = {n: x[n] for n in "qkv"} | {"E": np.ones((3, 7)), "F": np.ones((3, 7))}
    with pytest.raises(SpecError, match="want names 'scores'; linformer offers out"):
        ra.evaluate(ra.Linformer(), plain, want=("scores",))


def test_the_fast_tiers_leave_scores_to_those_that_have_them(x):
    problem = api.build(ra.SDPA(), {n: np.round(a * 16) / 16 for n, a in x.items()}, "float32", INNER)
    fast, slow = (certified.certify(problem, fast=which) for which in (True, False))
    assert fast.keys() == slow.keys() == set(INNER)
    for name in INNER:
        np.testing.assert_array_equal(fast[name].value, slow[name].value)
