"""Memorizing attention against numbers worked by hand, exact attention, its plan, and complex step."""

import math

import numpy as np
import pytest
from checks import near, same
from memorizing_problems import EVERY, MODULE, SIZES, arrays, everything

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError
from refattn.golden import build
from refattn.golden import inputs as recipes
from refattn.plan import execute


def line(*numbers):
    return np.array(numbers, float).reshape(1, 1, -1, 1)


def stream(values, keys=None, query=0.0, gate=0.0):
    """One head of width 1; keys 0 unless given."""
    v, k = line(*values), line(*(keys or [0] * len(values)))
    return {"q": np.full(v.shape, float(query)), "k": k, "v": v, "gate": np.array([float(gate)])}


def logs(*numbers):
    return [math.log(n) for n in numbers]


# Numbers worked by hand


def test_equal_products_find_the_oldest():
    """near is the token's own value; far is 0, 3, (3 + 5)/2 and again tokens 0 and 1; the gate gives half of each."""
    found = everything(ra.Memorizing(segment=1, memory=9, top=2), stream((3, 5, 10, 2)))
    near(found.out.ravel(), [(0 + 3) / 2, (3 + 5) / 2, (4 + 10) / 2, (4 + 2) / 2])
    same(found.indices[0, 0], np.array([[-1, -1], [0, -1], [0, 1], [0, 1]]))
    near(found.margin.ravel(), np.zeros(4))


def test_the_oldest_leave():
    """Two tokens are kept: token 3 finds 1 and 2, whose places in the stream are told, not those in the memory."""
    found = everything(ra.Memorizing(segment=1, memory=2, top=2), stream((3, 5, 10, 2)))
    near(found.out.ravel()[3], ((5 + 10) / 2 + 2) / 2)
    same(found.indices[0, 0, 3], np.array([1, 2]))
    near(found.state["memory_v"].ravel(), [10, 2])


def test_weights_of_what_was_found_and_the_margin():
    """e^k of 1, 2, 3: token 3 finds keys 2 and 1, 3 : 2, and leaves key 0 behind by ln 2 − ln 1."""
    x = stream((7, 5, 10, 2), logs(1, 2, 3, 1), query=1, gate=math.log(3))
    found = everything(ra.Memorizing(segment=1, memory=9, top=2), x)
    far = (0, 7, (7 * 1 + 5 * 2) / 3, (10 * 3 + 5 * 2) / 5)
    near(found.out.ravel(), [3 / 4 * f + 1 / 4 * v for f, v in zip(far, (7, 5, 10, 2), strict=True)])
    same(found.indices[0, 0], np.array([[-1, -1], [0, -1], [1, 0], [2, 1]]))
    near(found.margin.ravel(), [0, 0, 0, math.log(2)])


def test_one_softmax_over_both():
    """Token 3 weighs keys 2 and 1 of the memory and its own key as 3 : 2 : 4."""
    x = stream((7, 5, 10, 2), logs(1, 2, 3, 4), query=1)
    del x["gate"]
    found = everything(ra.Memorizing(segment=1, memory=9, top=2, combine="joint"), x)
    near(found.out.ravel(), [7, (7 + 5 * 2) / 3, (7 + 5 * 2 + 10 * 3) / 6, (10 * 3 + 5 * 2 + 2 * 4) / 9])
    near(found.lse.ravel(), logs(1, 3, 6, 9))


def test_a_token_does_not_find_its_own_segment():
    """Segments of 2: tokens 2 and 3 find token 1, the larger key, and see 2 and then 2 and 3 beside it."""
    x = stream((7, 5, 10, 2), logs(1, 2, 3, 5), query=1)
    found = everything(ra.Memorizing(segment=2, memory=9, top=1), x)
    near(found.out.ravel(), [7 / 2, (7 + 10) / 3 / 2, (5 + 10) / 2, (5 + (10 * 3 + 2 * 5) / 8) / 2])
    same(found.indices.ravel(), np.array([-1, -1, 1, 1]))


def test_the_nearest_of_each_bucket():
    """Token t lies in bucket t mod 2: of keys 4, 1, 2, 3, 6 token 5 finds 6 (token 4) and 3 (token 3)."""
    x = stream((7, 5, 10, 2, 1, 0), logs(4, 1, 2, 3, 6, 1), query=1)
    found = everything(ra.Memorizing(segment=1, memory=4, top=2, selection="bucketed"), x)
    same(found.indices[0, 0], np.array([[-1, -1], [0, -1], [0, 1], [0, 1], [0, 3], [4, 3]]))
    near(found.out.ravel()[5], (1 * 6 + 2 * 3) / 9 / 2)
    # Tokens 1 to 4 are kept: 3 over 1, and 6 over 2.
    near(found.margin.ravel()[5], math.log(3))
    near(found.margin.ravel()[4], min(math.log(4 / 2), math.log(3 / 1)))


@pytest.mark.parametrize(("temperature", "a"), [("absolute", 2.0), ("exponential", math.exp(-2))])
def test_normalised_keys(temperature, a):
    """q (3, 4) meets keys along (1, 0) and (0, 1) at cosines 0.6 and 0.8, whatever their lengths."""
    spec = ra.Memorizing(
        segment=1, memory=9, top=1, combine="joint", normalise=True, temperature=temperature, epsilon=0
    )
    q, k = np.tile([3.0, 4.0], (1, 1, 2, 1)), np.array([[[[50.0, 0.0], [0.0, 0.25]]]])
    found = everything(spec, {"q": q, "k": k, "v": line(1, 0), "sharpness": np.array([-2.0])})
    weights = math.exp(a * 0.6), math.exp(a * 0.8)
    near(found.lse.ravel(), [a * 0.6, math.log(sum(weights))])
    near(found.out.ravel(), [1, weights[0] / sum(weights)])
    near(found.state["memory_k"][0, 0], np.eye(2))


def test_epsilon_is_added_under_the_root():
    """A key of length 1 with epsilon 3 has length ½; so has the query: their product is ¼ of the cosine."""
    spec = ra.Memorizing(segment=1, memory=9, top=1, combine="joint", normalise=True, epsilon=3.0)
    x = {"q": line(1), "k": line(-1), "v": line(5), "sharpness": np.array([8.0])}
    near(everything(spec, x).lse.ravel(), [-2.0])


def test_no_gradient_reaches_the_token_that_left_a_key():
    """far reads tokens 0 to 2, and yet dv is the near part's ½; dgate = ¼ Σ (far − near) = ¼ (0 + 3 + 4 + 4 − 20)."""
    found = ra.vjp(ra.Memorizing(segment=1, memory=9, top=2), stream((3, 5, 10, 2)), {"out": np.ones((1, 1, 4, 1))})
    near(found.dv.ravel(), [0.5] * 4)
    near(found.dgate, [(0 + 3 + 4 + 4 - 20) / 4])
    near(found.dk.ravel(), [0.0] * 4)


def test_the_query_hears_of_what_it_found():
    """Token 3 of keys 1, 2, 3 as above: dq = ¾ Σ p (v − mean) k over keys 2 and 1, of weights 3/5 and 2/5."""
    x = stream((7, 5, 10, 2), logs(1, 2, 3, 1), query=1, gate=math.log(3))
    dout = line(0, 0, 0, 1)
    found = ra.vjp(ra.Memorizing(segment=1, memory=9, top=2), x, {"out": dout})
    near(found.dq.ravel()[3], 3 / 4 * (3 / 5 * (10 - 8) * math.log(3) + 2 / 5 * (5 - 8) * math.log(2)))
    near(found.dq.ravel()[:3], [0, 0, 0])
    near(found.dk.ravel(), [0, 0, 0, 0])


# Identities


def test_everything_kept_and_found_is_causal_attention(rng):
    spec = ra.Memorizing(segment=4, memory=14, top=14, combine="joint")
    x = arrays(spec, rng)
    found, whole = everything(spec, x), ra.evaluate(ra.SDPA(causal=True), x, want=("out", "lse"))
    near(found.out, whole.out)
    near(found.lse, whole.lse)
    dout = rng.standard_normal(whole.out.shape)
    near(ra.vjp(spec, x, {"out": dout}).dq, ra.vjp(ra.SDPA(causal=True), x, {"out": dout}).dq)


def test_the_gate_open_to_a_memory_found_in_full_is_attention_over_it(rng):
    spec = ra.Memorizing(segment=7, memory=7, top=7)
    x = arrays(spec, rng) | {"gate": np.full(4, 1000.0)}
    past = {"q": x["q"][:, :, 7:], "k": x["k"][:, :, :7], "v": x["v"][:, :, :7]}
    near(everything(spec, x).out[:, :, 7:], ra.evaluate(ra.SDPA(), past).out)


@EVERY
def test_a_sequence_within_one_segment_is_attention_times_what_the_gate_leaves(options, rng):
    spec = ra.Memorizing(**options | {"segment": 50, "normalise": False})
    x = arrays(spec, rng)
    local = ra.evaluate(ra.SDPA(causal=True, bias=spec.bias), {n: x[n] for n in x if n != "gate"}).out
    share = 1 - 1 / (1 + np.exp(-x["gate"])) if "gate" in x else np.ones(4)
    near(everything(spec, x).out, share[:, None, None] * local)


def test_lengths_of_normalised_rows_do_not_matter(rng):
    spec = ra.Memorizing(segment=3, memory=6, top=2, normalise=True, epsilon=0)
    x = arrays(spec, rng)
    longer = x | {name: x[name] * 2.0 ** rng.integers(-9, 9, (*x[name].shape[:3], 1)) for name in "qk"}
    found, expected = everything(spec, longer), everything(spec, x)
    same(found.indices, expected.indices)
    near(found.out, expected.out)


def test_one_bucket_is_the_single_nearest(rng):
    one, other = (ra.Memorizing(segment=3, memory=9, top=1, selection=s) for s in ("exact", "bucketed"))
    x = arrays(one, rng)
    found, expected = everything(one, x), everything(other, x)
    for name in ("out", "indices", "margin"):
        near(found[name], expected[name], 0)


def test_the_memory_holds_the_last_tokens_of_ended_segments(rng):
    spec = ra.Memorizing(segment=4, memory=6, top=2)
    x = arrays(spec, rng)
    state = everything(spec, x).state
    same(np.asarray(state["memory_k"]), x["k"][:, :, 6:12])
    same(np.asarray(state["memory_v"]), x["v"][:, :, 6:12])
    same(np.asarray(state["v"]), x["v"][:, :, 12:])


def test_the_state_stays_as_large_as_memory_and_segment_make_it(rng):
    spec = ra.Memorizing(segment=8, memory=20, top=2)
    state, sizes = ra.init_state(spec, B=1, Hkv=2, D=3, Dv=2), []
    for length in rng.integers(0, 30, 60):
        state = ra.step(spec, state, arrays(spec, rng, B=1, L=int(length)))[1]
        sizes.append(sum(a.size for a in state.values()))
        buffers = [a.buffer.memory.shape[2] for a in state.values() if getattr(a, "buffer", None) is not None]
        assert max(buffers, default=0) <= 2 * (20 + 8) + 16
    assert max(sizes) <= 2 * (20 + 7) * 5


def test_a_value_that_is_no_number_spoils_the_rows_that_find_it(rng):
    spec = ra.Memorizing(segment=4, memory=8, top=2)
    x = arrays(spec, rng)
    expected = everything(spec, x)
    x["v"][0, 1, 2] = np.nan
    found = everything(spec, x).out
    hit = np.zeros((2, 4, 14), bool)
    hit[0, 2:] = np.any(expected.indices[0, 2:] == 2, -1)
    assert hit[:, :, 4:].any()
    hit[0, 2:, 2:4] = True
    assert np.isnan(found[hit]).all()
    near(found[~hit], expected.out[~hit], 0)


# The plan, and gradients by what shares nothing with the tape


def test_ranks_by_products_of_16_bits_fail_the_case_that_is_there_for_them():
    case = next(c for c in ra.variants()["memorizing"].cases() if c.name == "memorizing/faint_differences")
    x = recipes.inputs(case)
    expected = build.problem_of(case, x).evaluate(lambda a: a)["indices"]
    s = np.einsum("bhid,bhjd->bhij", x["q"].astype(float), x["k"].astype(float))
    # The second segment finds keys of the first.
    s, expected = s[:, :, 8:, :8], expected[:, :, 8:]
    exact, rounded = (np.argsort(-a, -1, kind="stable")[..., :3] for a in (s, s.astype(np.float16)))
    same(np.sort(exact, -1), np.sort(expected, -1))
    assert (np.sort(rounded, -1) != np.sort(expected, -1)).any()


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@pytest.mark.parametrize("history", [0, 3, 9])
def test_the_plan_means_what_the_reference_says(options, history, rng):
    spec = ra.Memorizing(**options)
    x = arrays(spec, rng)
    state = ra.init_state(spec, B=2, Hkv=2, D=3, Dv=2)
    state = ra.step(spec, state, {n: a[:, :, :history] if n in "qkv" else a for n, a in x.items()})[1]
    x |= {name: x[name][:, :, history:] for name in "qkv"} | {f"state_{n}": np.asarray(a) for n, a in state.items()}
    problem = api.build(spec, x, "float64", ("out",), history)
    found, expected = execute(problem.plan), problem.evaluate(np.asarray)
    for name in found:
        near(found[name], expected[name])
    assert set(found) == {"out", "lse"} & set(MODULE.outputs(spec))


@EVERY
def test_gradients_by_complex_step(options, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    spec = ra.Memorizing(**options)
    x = arrays(spec, rng)
    problem = built(spec, x)
    duals = {n: rng.standard_normal(a.shape(SIZES)) for n, a in MODULE.outputs(spec).items() if a.kind == "real"}
    gradients = ra.vjp(spec, x, duals)
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.text(x | {name: x[name] + 1e-30j * u})
        forward = sum((np.imag(moved[n]) / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-11)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment is a number of tokens from 1 on; given: 0"),
        ({"memory": 2.0}, "memory is a number of tokens from 1 on; given: 2.0"),
        ({"top": True}, "top is a number of tokens from 1 on; given: True"),
        ({"combine": "add"}, "combine is one of 'gated', 'joint'; given: 'add'"),
        ({"selection": None}, "selection is one of 'exact', 'bucketed'; given: None"),
        ({"temperature": 1}, "temperature is one of 'absolute', 'exponential'; given: 1"),
        ({"normalise": 1}, "normalise is False or True; given: 1"),
        ({"epsilon": -1e-9}, "epsilon is a number from 0 on; given: -1e-09"),
        ({"epsilon": math.nan}, "epsilon is a finite number"),
        ({"scale": math.inf}, "scale is a finite number"),
        ({"bias": ra.RoPE(pairing="half")}, "bias takes Specs such as ALiBi"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Memorizing(**({"segment": 4, "memory": 8, "top": 2} | options))


def test_what_has_no_rank_is_refused(rng):
    spec = ra.Memorizing(segment=4, memory=8, top=2, normalise=True, epsilon=0)
    x = arrays(spec, rng)
    for name, bad in (("q", np.nan), ("k", np.inf)):
        with pytest.raises(ShapeError, match=f"{name} must hold finite numbers, for keys are ranked"):
            ra.evaluate(spec, x | {name: np.full_like(x[name], bad)})
    with pytest.raises(ShapeError, match="k holds a row of zeros, which has no direction"):
        ra.evaluate(spec, x | {"k": np.zeros_like(x["k"])})
    same(everything(ra.Memorizing(segment=4, memory=8, top=1, normalise=True), x | {"k": 0 * x["k"]}).margin[:, :, :4],
         np.zeros((2, 4, 4)))  # fmt: skip


def test_arrays_of_other_options_are_refused_with_the_signature(rng):
    spec = ra.Memorizing(segment=4, memory=8, top=2, combine="joint")
    with pytest.raises(ShapeError, match="unknown array 'gate'"):
        ra.evaluate(spec, arrays(spec, rng) | {"gate": np.zeros(4)})
    with pytest.raises(ShapeError, match="Hq must be a multiple of Hkv; given: Hq=3, Hkv=2"):
        ra.evaluate(spec, arrays(spec, rng, Hq=3))
    with pytest.raises(SpecError, match="memorizing offers out, indices, margin, state"):
        ra.evaluate(ra.Memorizing(segment=4, memory=8, top=2), arrays(spec, rng) | {"gate": np.zeros(4)}, want=("lse",))


def test_operations_are_linear_in_the_length():
    """2 B Hq L ((segment + memory) D + (segment + top) Dv); scores of one segment with itself and the memory."""
    spec = ra.Memorizing(segment=8, memory=32, top=4)
    one, two = (ra.explain(spec, SIZES | {"L": 64 * n}) for n in (1, 2))
    assert one["operations"] == 2 * 2 * 4 * 64 * (40 * 3 + 12 * 2)
    assert two["operations"] == 2 * one["operations"]
    assert one["score_matrix_bytes"] == two["score_matrix_bytes"] == 8 * 2 * 4 * 8 * 40
