"""Expire-Span against numbers worked by hand, plain loops, forgetting that changes nothing, and its plan."""

import math

import numpy as np
import pytest
from checks import near, same

import refattn as ra
from refattn import api
from refattn.errors import SpecError
from refattn.plan import execute

SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "L": 13, "D": 3, "Dv": 2, "E": 3}
SPECS = {
    "plain": ra.ExpireSpan(max_span=5, ramp=3),
    "own": ra.ExpireSpan(max_span=5, ramp=2, own="included", divisor=2.0, coefficient=0.5),
    "epsilon": ra.ExpireSpan(max_span=4, ramp=3, epsilon=0.25, lags=3),
    "code": ra.ExpireSpan(max_span=6, ramp=4, epsilon=1e-8, lags=4),
    "every lag": ra.ExpireSpan(max_span=9, ramp=1, own="included", lags=40, scale=0.7),
}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
OUTPUTS = ("out", "lse", "spans", "loss")


def arrays(spec, rng, **changed):
    signature = ra.variants()["expire_span"].module.signature(spec)
    return {name: rng.standard_normal(a.shape(SIZES | changed)) for name, a in signature.items()}


# Numbers worked by hand


def four_tokens():
    """Equal scores, spans of 1 (max_span 2, sigmoid 0), values 1, 2, 4, 8."""
    zeros = np.zeros((1, 1, 4, 1))
    v = np.array([1.0, 2, 4, 8]).reshape(zeros.shape)
    hidden = {"hidden": np.zeros((1, 4, 1)), "span_weight": np.ones(1), "span_bias": np.zeros(1)}
    return {"q": zeros, "k": zeros, "v": v, **hidden}


def test_a_ramp_of_two_tokens():
    """M is 1 at a distance of 1, 1/2 at 2, 0 at 3: (v0), (v0/2 + v1)/1.5, (v1/2 + v2)/1.5; nothing at the first."""
    found = ra.evaluate(ra.ExpireSpan(max_span=2, ramp=2), four_tokens(), want=OUTPUTS)
    near(found.out.ravel(), [0, 1, 2.5 / 1.5, 5 / 1.5])
    near(found.lse.ravel(), [-math.inf, 0, math.log(1.5), math.log(1.5)])
    near(found.spans.ravel(), [1, 1, 1, 1])
    near(found.loss.ravel(), [0, 0, -0.5, -0.5])


def test_epsilon_is_added_to_the_masked_probabilities():
    """Token 2: halves (1/4, 1/2) over 3/4 + 1/2; the divisor of undivided weights is 1.5 + 2/2."""
    found = ra.evaluate(ra.ExpireSpan(max_span=2, ramp=2, epsilon=0.5), four_tokens(), want=OUTPUTS)
    near(found.out.ravel(), [0, 1 / 1.5, 1.25 / 1.25, 2.5 / 1.25])
    near(found.lse.ravel(), [-math.inf, math.log(1.5), math.log(2.5), math.log(2.5)])


def test_a_token_that_sees_itself():
    """Its own m is 1: (v0), (v0 + v1)/2, (v0/2 + v1 + v2)/2.5, (v1/2 + v2 + v3)/2.5."""
    found = ra.evaluate(ra.ExpireSpan(max_span=2, ramp=2, own="included"), four_tokens())
    near(found.out.ravel(), [1, 1.5, 6.5 / 2.5, 13 / 2.5])


def test_gradients_of_the_spans():
    """At token 2 d out/d e_j = ½ (v_j − out)/1.5, for j = 1 too, at r = 0; d e/d b = 2 σ' = ½; the loss has 1/ramp."""
    spec, x = ra.ExpireSpan(max_span=2, ramp=2), four_tokens()
    dout, dloss = np.zeros((1, 1, 4, 1)), np.zeros((1, 4))
    dout[0, 0, 2, 0] = dloss[0, 2] = 1
    near(ra.vjp(spec, x, {"out": dout}).dspan_bias, [0.5 * 0.5 * (3 - 2 * 2.5 / 1.5) / 1.5])
    # Token 1 stands at r = 0, where the loss has half its slope.
    near(ra.vjp(spec, x, {"loss": dloss}).dspan_bias, [0.5 * (0.5 + 0.25)])


# Plain loops


def by_loops(spec, x):
    found = {"out": [], "lse": [], "spans": [], "loss": []}
    for b, rows in enumerate(x["hidden"].tolist()):
        z = [math.fsum(w * u for w, u in zip(x["span_weight"].tolist(), row, strict=True)) for row in rows]
        e = [spec.max_span / (1 + math.exp(-(a / spec.divisor + x["span_bias"].item()))) for a in z]
        found["spans"].append(e)
        past = [range(t + (spec.own == "included")) for t in range(len(e))]
        fallen = [math.fsum(max(e[j] - (t - j), -spec.ramp) for j in past[t] if is_on_ramp(spec, e, t, j))
                  for t in range(len(e))]  # fmt: skip
        found["loss"].append([spec.coefficient * f / spec.ramp for f in fallen])
        heads = [one_head(spec, x, e, past, (b, h)) for h in range(SIZES["Hq"])]
        for name in ("out", "lse"):
            found[name].append([head[name] for head in heads])
    return found


def is_on_ramp(spec, e, t, j):
    return -spec.ramp < e[j] - (t - j) < 0


def one_head(spec, x, e, past, at):
    b, h = at
    q, k, v = x["q"][b, h].tolist(), x["k"][b, h // 2].tolist(), x["v"][b, h // 2].tolist()
    c, first = x["position_keys"].tolist() if spec.lags else [], int(spec.own == "excluded")
    out, lse = [], []
    for t, query in enumerate(q):
        left = [j for j in past[t] if e[j] - (t - j) + spec.ramp > 0]
        weights = {}
        for j in left:
            n = t - j - first
            key = [a + (c[n][d] if n < len(c) else 0) for d, a in enumerate(k[j])]
            scale = 3**-0.5 if spec.scale is None else spec.scale
            weights[j] = math.exp(scale * math.fsum(a * u for a, u in zip(query, key, strict=True)))
        m = {j: min(max((e[j] - (t - j)) / spec.ramp + 1, 0), 1) for j in left}
        size = math.fsum(m[j] * w + spec.epsilon * w for j, w in weights.items())
        lse.append(math.log(size) if left else -math.inf)
        out.append([math.fsum(m[j] * w * v[j][d] for j, w in weights.items()) / size if left else 0.0 for d in (0, 1)])
    return {"out": out, "lse": lse}


@EVERY
def test_against_plain_loops(spec, rng):
    x = arrays(spec, rng)
    found, expected = ra.evaluate(spec, x, want=OUTPUTS), by_loops(spec, x)
    for name in OUTPUTS:
        near(found[name], expected[name])


# Forgetting


@pytest.mark.parametrize("bad", [1e9, np.nan, np.inf])
def test_what_has_expired_for_every_later_query_can_be_dropped(bad, rng):
    """Whatever stands in the slots whose r + ramp is 0 or less at the next token, not one bit of what follows moves."""
    spec = ra.ExpireSpan(max_span=12, ramp=3, lags=2)
    x = arrays(spec, rng)
    _, state = ra.step(spec, ra.init_state(spec, B=2, Hkv=2, D=3, Dv=2), x)
    age = 13 - np.arange(13)
    gone = state["spans"] - age + spec.ramp <= 0
    assert 0 < gone.sum() < gone.size
    kept = {n: np.where(gone[:, None, :, None], bad, state[n]) for n in "kv"}
    later = arrays(spec, rng, L=6)
    after = [ra.step(spec, s, later, want=OUTPUTS)[0] for s in (state, ra.State(spec, 13, dict(state) | kept))]
    for name in OUTPUTS:
        same(after[1][name], after[0][name])


def test_a_token_with_a_long_span_is_recalled_and_others_are_not(rng):
    """Two tokens answer the same query 60 tokens later: the one whose hidden state asks for a long span."""
    x = {"q": np.zeros((1, 1, 64, 2)), "k": np.zeros((1, 1, 64, 2)), "v": rng.standard_normal((1, 1, 64, 2))}
    x |= {"hidden": np.full((1, 64, 1), -1.0), "span_weight": np.array([8.0]), "span_bias": np.zeros(1)}
    x["q"][:, :, 63], x["k"][:, :, [2, 3]] = 40, 40
    x["hidden"][0, 3] = 1
    spec = ra.ExpireSpan(max_span=100, ramp=4)
    found = ra.evaluate(spec, x, want=("out", "spans"))
    assert found.spans[0, 2] < 1
    assert found.spans[0, 3] > 99
    near(found.out[0, 0, 63], x["v"][0, 0, 3])
    x["hidden"][0, 3] = -1
    near(ra.evaluate(spec, x).out[0, 0, 63] @ [1, 0], x["v"][0, 0, 59:63, 0] @ weights(found.spans[0, 59]), 1e-9)


def weights(span):
    """Shares of four tokens with equal scores, 4 to 1 tokens old, ramp 4."""
    m = np.clip((span - np.arange(4, 0, -1)) / 4 + 1, 0, 1)
    return m / m.sum()


@pytest.mark.parametrize("epsilon", [0.0, 2**-20])
def test_out_is_continuous_where_a_key_expires(epsilon, rng):
    """A span a hair longer than what lets key 0 expire at token 5, and a hair shorter."""
    spec = ra.ExpireSpan(max_span=4, ramp=3, epsilon=epsilon)
    x = arrays(spec, rng, L=6) | {"span_weight": np.zeros(3)}
    # e = 2 for all, so that r_50 = −3 to the last bit.
    one, two = (ra.evaluate(spec, x | {"span_bias": np.array([b])}).out[:, :, 5] for b in (-1e-9, 1e-9))
    near(one, two, 1e-8 + epsilon * 100)


@EVERY
def test_the_state_stops_growing_at_what_can_still_have_a_weight(spec, rng):
    state = ra.evaluate(spec, arrays(spec, rng, L=40), want=("state",)).state
    assert state["k"].shape[2] == state["spans"].shape[1] == spec.max_span + spec.ramp - 1


# The plan


@EVERY
@pytest.mark.parametrize("sizes", [{"L": 13}, {"L": 1}, {"L": 0}, {"D": 0}], ids=str)
def test_the_plan_means_what_the_reference_says(spec, sizes, rng):
    x = arrays(spec, rng, **sizes)
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    found = execute(api.build(spec, x, "float64", ("out",)).plan)
    near(found["out"], expected.out)
    near(found["lse"], expected.lse)


@EVERY
def test_the_plan_of_what_follows_a_state(spec, rng):
    x = arrays(spec, rng)
    _, state = ra.step(spec, ra.init_state(spec, B=2, Hkv=2, D=3, Dv=2), x)
    later = arrays(spec, rng, L=4)
    expected, _ = ra.step(spec, state, later, want=("out", "lse"))
    given = later | {f"state_{n}": np.asarray(a) for n, a in state.items()}
    found = execute(api.build(spec, given, "float64", ("out",), 13).plan)
    near(found["out"], expected.out)
    near(found["lse"], expected.lse)


@EVERY
def test_gradients_by_complex_step(spec, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x = arrays(spec, rng)
    problem = api.build(spec, x, "float64", ("out",))
    duals = {n: rng.standard_normal(ra.evaluate(spec, x, want=(n,))[n].shape) for n in OUTPUTS}
    gradients = ra.vjp(spec, x, duals)
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.text(x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-11)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_span": 0}, "max_span is a number of tokens from 1 on; given: 0"),
        ({"ramp": 2.0}, "ramp is a number of tokens from 1 on; given: 2.0"),
        ({"lags": -1}, "lags is a number of tokens from 0 on; given: -1"),
        ({"own": True}, "own is 'excluded' or 'included'; given: True"),
        ({"divisor": 0.0}, "divisor is positive"),
        ({"epsilon": -1e-8}, "epsilon is not negative"),
        ({"coefficient": math.nan}, "coefficient is a finite number"),
        ({"scale": "1"}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.ExpireSpan(**({"max_span": 4} | options))


def test_operations_stop_growing_with_the_square_of_the_length():
    spec, sizes = ra.ExpireSpan(max_span=8, ramp=8), SIZES | {"L": 32}
    one, two = (ra.explain(spec, sizes | {"L": n}) for n in (32, 64))
    assert one["operations"] == 2 * (2 * 4 * 32 * 16 * 5 + 2 * 32 * 3)
    assert two["operations"] == 2 * one["operations"]
