import math
from dataclasses import replace

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn import api, registry
from refattn.errors import SpecError
from refattn.golden import build
from refattn.golden import inputs as recipes
from refattn.plan import execute, row_of
from refattn.profiles import PROFILE_OF, PROFILES
from refattn.variants._place import place

CASES = list(registry.info("sandwich").cases())


def bias_by_hand(heads, dimension=128, first=0):
    """(H / 8h) Σ cos((i − j) / 10000^(2t/d̄)), a power and a cosine of the C library at a time."""

    def bias(h, i, j):
        terms = (math.cos((i - j) / 10000 ** (2 * t / dimension)) for t in range(first, first + dimension // 2))
        return math.fsum(terms) * heads / (8 * (h + 1))

    return bias


def biases(spec, heads, distances):
    """The bias (heads, distances) alone: lse of a single key whose score is 0."""
    q, k = np.zeros((1, heads, len(distances), 1)), np.zeros((1, 1, 1, 1))
    at = {"q_positions": np.asarray(distances), "k_positions": np.zeros(1, np.int64)}
    x = {"q": q, "k": k, "v": k} | at
    return ra.evaluate(ra.SDPA(bias=(spec,)), x, want=("lse",)).lse[0]


# Numbers worked by hand


def test_two_cosines_of_d_4():
    """w = 1 and 10000^(−1/2) = 1/100; heads 1 and 2 of 2 have the ratios 4 and 8."""
    curve = [2, math.cos(1) + math.cos(0.01), math.cos(100) + math.cos(1)]
    near(biases(ra.Sandwich(dimension=4), 2, [0, 1, 100]), [[c / 4 for c in curve], [c / 8 for c in curve]])


def test_from_one_drops_the_fastest_cosine_and_adds_a_slower_one():
    """w = 1/100 and 1/10000."""
    found = biases(ra.Sandwich(dimension=4, first=1), 1, [0, 100, 10000])
    near(found, [[2 / 8, (math.cos(1) + math.cos(0.01)) / 8, (math.cos(100) + math.cos(1)) / 8]])


def test_the_ratios_of_eight_heads_are_1_to_8():
    found = biases(ra.Sandwich(), 8, [0])
    near(found[:, 0], [64 / h for h in range(1, 9)])


def test_the_odds_of_two_keys():
    """d̄ = 2 is one cosine, cos(i − j): of keys at distances 3 and 0 the odds are exp((cos 3 − 1) / 8)."""
    x = {"q": np.zeros((1, 1, 4, 1)), "k": np.zeros((1, 1, 4, 1)), "v": np.eye(4)[None, None]}
    mask = np.array([True, False, False, True])
    out = ra.evaluate(ra.SDPA(causal=True, bias=(ra.Sandwich(dimension=2),)), x | {"mask": mask}).out
    odds = math.exp((math.cos(3) - 1) / 8)
    near(out[0, 0, 3], [odds / (1 + odds), 0, 0, 1 / (1 + odds)])


# What the paper claims


@pytest.mark.parametrize(("first", "slope", "constant"), [(0, -0.832, -0.794), (1, -0.841, -0.611)])
def test_the_curve_is_a_logarithm(first, slope, constant):
    """Least squares of the curve less d̄/2, at r = 8, on log(1 + x) over the distances 0 to 8191."""
    distances = np.arange(8192)
    curve = biases(ra.Sandwich(first=first), 1, distances)[0] - 8
    columns = np.stack([np.log1p(distances), np.ones(8192)], 1)
    found = np.linalg.lstsq(columns, curve, rcond=None)[0]
    np.testing.assert_allclose(found, [slope, constant], rtol=0, atol=5e-4)


def test_the_bias_is_the_inner_product_of_the_embeddings():
    """PE @ PE.T of the sinusoids as they are added to hidden states, sines and cosines interleaved."""
    dimension, n = 24, np.arange(40)
    angles = n[:, None] / 10000 ** (np.arange(0, dimension, 2) / dimension)
    table = np.stack([np.sin(angles), np.cos(angles)], -1).reshape(40, dimension)
    plain = ra.attention(*[np.zeros((1, 1, 40, 1))] * 2, np.eye(40)[None, None], bias=table @ table.T / 8)
    found = ra.attention(*[np.zeros((1, 1, 40, 1))] * 2, np.eye(40)[None, None], bias=ra.Sandwich(dimension=dimension))
    near(found, plain)


def test_the_weights_depend_on_distances_alone():
    """Toeplitz, and symmetric: positions shifted by 1000 or turned round leave every bit."""
    spec, distances = ra.Sandwich(dimension=20), np.arange(-30, 31)
    found = biases(spec, 2, distances)
    same(found, found[:, ::-1])
    q = np.zeros((1, 2, 9, 1))
    x = {"q": q, "k": q, "v": np.tile(np.eye(9), (1, 2, 1, 1))}
    moved = {name: np.arange(1000, 1009) for name in ("q_positions", "k_positions")}
    spec = ra.SDPA(bias=(spec,))
    same(ra.evaluate(spec, x | moved).out, ra.evaluate(spec, x).out)


def test_the_tail_is_heavier_than_that_of_alibi():
    """Of equal contents the farthest tenth of 4096 keys keeps 1.9 per cent; under ALiBi's slope 1/2 nothing is left."""
    zero, v = np.zeros((1, 1, 4096, 1)), np.zeros((1, 1, 4096, 1))
    v[:, :, :410] = 1
    sandwich, alibi = (
        ra.attention(zero[:, :, :1], zero, v, causal="bottom_right", bias=b).item()
        for b in (ra.Sandwich(), ra.ALiBi(slopes=(0.5,)))
    )
    by_hand = bias_by_hand(1)
    weights = [math.exp(by_hand(0, 4095, j)) for j in range(4096)]
    near(sandwich, math.fsum(weights[:410]) / math.fsum(weights))
    assert 0.019 < sandwich < 0.02
    assert alibi < 1e-300


# Against four plain loops


@pytest.mark.parametrize("lengths", [(4, 4), (3, 5), (5, 3)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("options", [{"dimension": 6}, {"dimension": 10, "first": 1}, {}], ids=str)
def test_every_option_and_alignment(rng, options, causal, lengths):
    lq, lk = lengths
    a = qkv(rng, (2, 4, 2, lq, lk, 3, 2))
    offset = 0 if causal == "top_left" else lk - lq
    by_hand = bias_by_hand(4, **options)
    x = {name: a[name] for name in "qkv"}
    spec = ra.SDPA(causal=causal, bias=(ra.Sandwich(**options),))
    found = forward_and_gradients(spec, x, a["dout"], a["dlse"])
    expected = loops.attention(
        *(a[n].tolist() for n in ("q", "k", "v", "dout", "dlse")),
        scale=3**-0.5,
        sees=lambda b, h, i, j: not (causal and j > i + offset),
        bias=lambda b, h, i, j: by_hand(h, i + offset, j),
    )
    for name in ("out", "lse", "dq", "dk", "dv"):
        near(found[name], expected[name])


def test_distances_follow_given_positions(rng):
    a = qkv(rng, (1, 2, 2, 3, 4, 2, 2))
    at_q, at_k = np.array([7, 0, 3]), np.array([1, 9, 3, 3])
    by_hand = bias_by_hand(2)
    dense = np.array([[[by_hand(h, i, j) for j in at_k] for i in at_q] for h in range(2)])
    found = ra.attention(a["q"], a["k"], a["v"], bias=ra.Sandwich(), q_positions=at_q, k_positions=at_k[None])
    near(found, ra.attention(a["q"], a["k"], a["v"], bias=dense))


def test_a_term_alone_is_causal_attention_with_that_bias(rng):
    a = qkv(rng, (1, 2, 2, 4, 4, 2, 2))
    x = {name: a[name] for name in "qkv"}
    same(ra.evaluate(ra.Sandwich(), x).out, ra.evaluate(ra.SDPA(causal=True, bias=(ra.Sandwich(),)), x).out)


# The lowering is the other derivation


@pytest.mark.parametrize("spread", [1, 2, 3, 16, 17, 99, 100, 101])
def test_the_table_covers_every_difference_once(spread):
    """Lengths around squares, where the blocks of embeddings just fit or one more is begun."""
    q, k = np.zeros((1, 3, 1, 1)), np.zeros((1, 1, spread, 1))
    x = {"q": q, "k": k, "v": k, "q_positions": np.array([5])}
    lowered = api.build(ra.SDPA(bias=(ra.Sandwich(dimension=10),)), x, "float64", ("out",)).plan
    assert lowered.bias[0].values.shape == (3, max(spread, 6))
    by_hand = bias_by_hand(3, 10)
    for h in range(3):
        near(row_of(lowered.bias[0], lowered, 0, h, 0), [by_hand(h, 5, j) for j in range(spread)])


def test_long_distances_keep_their_digits(rng):
    """The reference and the table at 200000 positions: angles, not a recurrence that loses a digit at every step."""
    spec, far = ra.SDPA(bias=(ra.Sandwich(dimension=32),)), 200_000
    q, k = rng.standard_normal((1, 2, 4, 3)), rng.standard_normal((1, 2, 5, 3))
    x = {"q": q, "k": k, "v": k, "q_positions": np.array([0, far, 9, far - 1]), "k_positions": np.arange(5)}
    found = execute(api.build(spec, x, "float64", ("out",)).plan)["lse"]
    near(found, ra.evaluate(spec, x, want=("lse",)).lse, 1e-10)


# Kernels: what the golden cases let pass and what they catch


def with_bias(case, bias):
    """The case's out and lse in float64 with another bias (H, Lq, Lk) in place of the term."""
    problem = build.problem_of(case, recipes.inputs(case))
    spec = replace(problem.spec, bias=())
    x = {n: a if a.dtype.kind in "biu" else a.astype(np.float64) for n, a in problem.inputs.items()}
    found = api.build(spec, x | {"bias": bias}, "float64", ("out",)).evaluate(np.asarray)
    truth = problem.evaluate(np.asarray)
    limit = build.bounds(problem, {}, (), PROFILES[PROFILE_OF[case.dtype]])
    return {n: np.nanmax(np.abs(found[n] - truth[n]) - limit[n]) for n in ("out", "lse")}


def places_of(case):
    problem = build.problem_of(case, recipes.inputs(case))
    at = place(problem.spec.causal, problem.inputs)
    return at.i[:, 0], at.j[:, 0], at.heads


def float32_bias(term, heads, i, j, absolute):
    """The bias as a float32 kernel makes it: float32 frequencies and angles, of distances or of absolute positions."""
    t = np.arange(term.first, term.first + term.dimension // 2, dtype=np.float32)
    w = np.float32(10000) ** (-2 * t / np.float32(term.dimension))
    if absolute:
        a, b = ((p[..., None] * w).astype(np.float32) for p in (i.astype(np.float32), j.astype(np.float32)))
        curve = (np.cos(a) * np.cos(b) + np.sin(a) * np.sin(b)).sum(-1)
    else:
        curve = np.cos((i - j).astype(np.float32)[..., None] * w).sum(-1)
    ratios = np.float32(heads) / (8 * np.arange(1, heads + 1, dtype=np.float32))
    bias = ratios[None, :, None, None] * curve[:, None]
    assert bias.dtype == np.float32
    return bias.astype(np.float64)


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != "float64"], ids=lambda c: c.name)
def test_a_float32_table_is_within_the_bound(case):
    term = registry.whole(case.spec)[0].bias[0]
    i, j, heads = places_of(case)
    assert max(with_bias(case, float32_bias(term, heads, i, j, absolute=False)).values()) <= 0


def test_embeddings_of_far_positions_in_float32_are_caught():
    (case,) = (c for c in CASES if c.name == "sandwich/far_positions")
    i, j, heads = places_of(case)
    assert min(with_bias(case, float32_bias(case.spec.bias[0], heads, i, j, absolute=True)).values()) > 0


@pytest.mark.parametrize("change", [{"first": 1}, {"dimension": 14}, {"dimension": 18}], ids=str)
def test_other_indices_and_dimensions_are_caught(change):
    (case,) = (c for c in CASES if c.name == "sandwich/two_heads")
    i, j, heads = places_of(case)
    wrong = ra.Sandwich(**({"dimension": 16} | change))
    assert min(with_bias(case, float32_bias(wrong, heads, i, j, absolute=False)).values()) > 0


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dimension": 0}, "even number from 2 on"),
        ({"dimension": 7}, "even number from 2 on, two a cosine; given: 7"),
        ({"dimension": 8.0}, "even number from 2 on"),
        ({"dimension": True}, "even number from 2 on"),
        ({"first": 2}, "first is 0 or 1"),
        ({"first": False}, "first is 0 or 1"),
        ({"first": 1.0}, "first is 0 or 1"),
        ({"first": "1"}, "first is 0 or 1"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Sandwich(**options)
