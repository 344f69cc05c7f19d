"""Attention alignment against numbers worked by hand, plain loops, SDPA, its plan, balls, and complex step."""

import math

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near

import refattn as ra
from refattn import api, registry
from refattn.errors import ShapeError, SpecError, Unsupported
from refattn.plan import execute

SIZES = {"B": 3, "Hq": 4, "Hkv": 2, "Lq": 5, "Lk": 7, "D": 3, "Dv": 2}
ALL = ("out", "lse", "max_prob", "entropy")
BIASES = {
    "t5": ra.T5(buckets=6, max_distance=5),
    "two-sided t5": ra.T5(buckets=8, max_distance=5, bidirectional=True),
    "alibi": ra.ALiBi(),
    "learned alibi": ra.ALiBi(slopes="learned"),
    "alibi of half the heads": ra.ALiBi(direction="half"),
    "sandwich": ra.Sandwich(dimension=8),
    "nope": ra.NoPE(),
    "none": None,
}
SPECS = {
    f"{name}, {divide}, {causal}": ra.AttentionAlignment(bias=bias, divide=divide, causal=causal)
    for name, bias in BIASES.items()
    for divide in ("logits", "scores")
    for causal in (False, "top_left", "bottom_right")
}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)
DIVIDE = pytest.mark.parametrize("divide", ["logits", "scores"])
LENGTHS = pytest.mark.parametrize("lengths", [None, (7, 0, 3)], ids=["full", "padded"])
LN2, LN3 = math.log(2), math.log(3)


def arrays(spec, rng, lengths=None, **changed):
    """Inputs and cotangents of all outputs; temperatures between 1/4 and 2."""
    sizes, module = SIZES | changed, registry.info("attention_alignment").module
    signature = {n: a for n, a in module.signature(spec).items() if not a.optional}
    x = {name: rng.standard_normal(a.shape(sizes)) for name, a in signature.items()}
    x["temperature"] = rng.uniform(0.25, 2.0, sizes["Hq"])
    duals = {name: rng.standard_normal(a.shape(sizes)) for name, a in module.outputs(spec).items()}
    return x if lengths is None else x | {"kv_lengths": np.array(lengths, np.int64)}, duals


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


def two(duals):
    """The cotangents that kernels take."""
    return duals["out"], duals["lse"]


def one_head(**rows):
    return {name: np.array(values, float).reshape(1, 1, -1, 1) for name, values in rows.items()}


# Numbers worked by hand


def test_two_keys_without_a_bias():
    """Logits 0 and 2 ln 2 over tau = 2: weights 1/3 and 2/3."""
    x = one_head(q=[1], k=[0, 2 * LN2], v=[3, 6]) | {"temperature": np.array([2.0])}
    found = ra.evaluate(ra.AttentionAlignment(bias=None), x, want=ALL)
    near(found.out.ravel(), [5])
    near(found.lse.ravel(), [LN3])
    near(found.max_prob.ravel(), [2 / 3])
    near(found.entropy.ravel(), [LN3 - 2 / 3 * LN2])


def biased():
    """No contents; the key before has the bias 2 ln 3, its own key 0; tau = 2."""
    x = one_head(q=[0, 0], k=[0, 0], v=[4, 0])
    return x | {"temperature": np.array([2.0]), "t5_table": np.array([[0.0], [2 * LN3]])}


@pytest.mark.parametrize(("divide", "weight"), [("logits", 3 / 4), ("scores", 9 / 10)])
def test_dividing_the_scores_alone_leaves_the_bias_as_it_is(divide, weight):
    spec = ra.AttentionAlignment(bias=ra.T5(buckets=2, max_distance=2), causal=True, divide=divide)
    found = ra.evaluate(spec, biased(), want=ALL)
    near(found.out.ravel(), [4, 4 * weight])
    near(found.lse.ravel(), [0, -math.log(1 - weight)])
    near(found.max_prob.ravel(), [1, weight])
    near(found.entropy.ravel(), [0, -weight * math.log(weight) - (1 - weight) * math.log(1 - weight)])


@pytest.mark.parametrize(
    ("output", "slope"),
    [("out", -3 / 8 * LN3), ("lse", -3 / 8 * LN3), ("max_prob", -3 / 32 * LN3), ("entropy", 3 / 32 * LN3**2)],
)
def test_gradients_of_the_temperature(output, slope):
    """−Σ p s (v − out) / tau², −E s / tau², p (E s − s) / tau² and Var s / tau³, of s = 2 ln 3, 0 with p = 3/4, 1/4."""
    spec = ra.AttentionAlignment(bias=ra.T5(buckets=2, max_distance=2), causal=True)
    ones = np.ones((1, 1, 2, 1) if output == "out" else (1, 1, 2))
    near(ra.vjp(spec, biased(), {output: ones}).dtemperature, [slope])


def test_of_equal_logits_the_first_has_the_gradient():
    """Weights 1/2 each: d max_prob / d s = p (1 − p) / tau for the first, −p² / tau for the second."""
    x = one_head(q=[1], k=[5, 5], v=[0, 0]) | {"temperature": np.array([4.0])}
    found = ra.vjp(ra.AttentionAlignment(bias=None), x, {"max_prob": np.ones((1, 1, 1))})
    near(found.dk.ravel(), [1 / 16, -1 / 16])


def test_equal_logits_have_the_entropy_ln_n_at_any_temperature(rng):
    x = one_head(q=[1, -2], k=[0.3] * 7, v=range(7)) | {"temperature": np.array([0.03125])}
    found = ra.evaluate(ra.AttentionAlignment(bias=None), x, want=ALL)
    near(found.entropy, np.full((1, 1, 2), math.log(7)))
    near(found.max_prob, np.full((1, 1, 2), 1 / 7))


def test_a_row_that_sees_nothing(rng):
    spec = ra.AttentionAlignment()
    x, duals = arrays(spec, rng, (0, 0, 0))
    found = dict(ra.evaluate(spec, x, want=ALL)) | dict(ra.vjp(spec, x, duals))
    near(found.pop("lse"), np.full((3, 4, 5), -np.inf))
    for name, value in found.items():
        assert not value.any(), name


# Plain loops


@DIVIDE
@LENGTHS
def test_against_plain_loops(divide, lengths, rng):
    spec = ra.AttentionAlignment(bias=BIASES["two-sided t5"], divide=divide, causal="bottom_right")
    x, duals = arrays(spec, rng, lengths)
    found = dict(ra.evaluate(spec, x, want=ALL)) | dict(ra.vjp(spec, x, {n: duals[n] for n in ("out", "lse")}))
    n, tau, table = lengths or (7, 7, 7), x["temperature"], x["t5_table"]
    share = np.ones(4) if divide == "scores" else tau

    def bucket(r):
        return min(abs(r), 2) + (abs(r) >= 4) + (4 if r > 0 else 0)

    def bias(b, h, i, j):
        return table[bucket(j - i - (n[b] - 5)), h] / share[h]

    def sees(b, h, i, j):
        return j < n[b] and j <= i + n[b] - 5

    q = (x["q"] / tau[:, None, None]).tolist()
    plain = loops.attention(
        q, x["k"].tolist(), x["v"].tolist(), duals["out"].tolist(), duals["lse"].tolist(), scale=1, sees=sees, bias=bias
    )
    plain = {name: np.array(value) for name, value in plain.items()}
    logits = np.full((3, 4, 5, 7), -np.inf)
    for b, h, i, j in np.ndindex(logits.shape):
        if sees(b, h, i, j):
            logits[b, h, i, j] = loops.dot(q[b][h][i], x["k"][b, h // 2, j].tolist()) + bias(b, h, i, j)
    p = np.exp(logits - np.where(np.isneginf(plain["lse"]), 0, plain["lse"])[..., None])
    expected = {name: plain[name] for name in ("out", "lse", "dk", "dv")}
    expected["max_prob"] = p.max(-1)
    expected["entropy"] = -np.array([math.fsum(w * math.log(w) for w in row if w) for row in p.reshape(-1, 7)])
    expected["entropy"] = expected["entropy"].reshape(3, 4, 5)
    expected["dq"] = plain["dq"] / tau[:, None, None]
    # d l / d tau = −l / tau, of that part of the logit which is divided.
    divided = (plain["dq"] * np.array(q)).sum((0, 2, 3))
    if divide == "logits":
        divided += (plain["dbias"] * np.vectorize(bias)(*np.indices(logits.shape))).sum((0, 2, 3))
    expected["dtemperature"] = -divided / tau
    buckets = np.vectorize(lambda b, i, j: bucket(j - i - (n[b] - 5)))(*np.indices((3, 5, 7)))
    expected["dt5_table"] = np.stack(
        [(plain["dbias"] * (buckets == m)[:, None]).sum((0, 2, 3)) / share for m in range(8)]
    )
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        near(found[name], value, 1e-11)


# Identities


@EVERY
def test_at_temperature_1_it_is_attention_without_a_scale(spec, rng):
    x, duals = arrays(spec, rng)
    plain = ra.SDPA(scale=1.0, bias=() if spec.bias is None else (spec.bias,), causal=spec.causal)
    x["temperature"] = np.ones(4)
    found = forward_and_gradients(spec, x, *two(duals))
    expected = forward_and_gradients(plain, {n: a for n, a in x.items() if n != "temperature"}, *two(duals))
    for name, value in expected.items():
        near(found[name], value, 1e-11)


def test_a_temperature_of_4_is_a_scale_of_a_quarter_where_nothing_is_biased(rng):
    x, duals = arrays(ra.AttentionAlignment(bias=None), rng)
    hot = forward_and_gradients(ra.AttentionAlignment(bias=None), x | {"temperature": np.full(4, 4.0)}, *two(duals))
    plain = {name: x[name] for name in "qkv"}
    for name, value in forward_and_gradients(ra.SDPA(scale=0.25), plain, *two(duals)).items():
        near(hot[name], value)


@DIVIDE
def test_the_statistics_do_not_see_a_constant_added_to_the_bias(divide, rng):
    spec = ra.AttentionAlignment(divide=divide)
    x, _ = arrays(spec, rng)
    expected = ra.evaluate(spec, x, want=ALL)
    found = ra.evaluate(spec, x | {"t5_table": x["t5_table"] + 3}, want=ALL)
    for name in ("out", "max_prob", "entropy"):
        near(found[name], expected[name])
    share = x["temperature"][:, None] if divide == "logits" else 1
    near(found.lse, expected.lse + 3 / share)


def test_entropy_rises_with_the_temperature_and_the_largest_weight_falls(rng):
    spec = ra.AttentionAlignment(causal="bottom_right")
    x, _ = arrays(spec, rng, (7, 3, 1))
    rows = [ra.evaluate(spec, x | {"temperature": np.full(4, 2.0**n)}, want=ALL) for n in np.arange(-6, 7, 0.5)]
    for name, sign in (("entropy", 1), ("max_prob", -1)):
        steps = sign * np.diff([r[name] for r in rows], axis=0)
        assert (steps >= -1e-15).all()
        # Rows of two keys and more move, however little at the ends.
        assert (steps[8:14, 0] > 0).all()


def test_rows_are_those_of_the_whole(rng):
    spec = ra.AttentionAlignment(causal="bottom_right")
    x, _ = arrays(spec, rng, (7, 0, 3))
    problem = built(spec, x)
    short = problem.variant.restrict(problem.spec, problem.inputs, (3, 1))
    expected = ra.evaluate(spec, x, want=ALL)
    for name, value in ra.evaluate(spec, short, want=ALL).items():
        near(value, expected[name][:, :, [3, 1]], 0)


def test_a_nan_in_a_key_reaches_the_rows_that_see_it_and_no_others(rng):
    spec = ra.AttentionAlignment(causal="top_left")
    x, duals = arrays(spec, rng)
    expected = ra.evaluate(spec, x, want=ALL)
    x["k"][1, 1, 2, 0] = np.nan
    found = ra.evaluate(spec, x, want=ALL)
    hit = np.zeros((3, 4, 5), bool)
    hit[1, 2:, 2:] = True
    for name in ALL:
        assert np.isnan(found[name][hit]).all(), name
        near(found[name][~hit], expected[name][~hit], 0)
    for name in ("max_prob", "entropy"):
        dq = ra.vjp(spec, x, {name: duals[name]}).dq
        assert (np.isnan(dq).any(-1) == hit).all(), name


def test_a_nan_in_a_query_stays_in_its_row(rng):
    x, _ = arrays(ra.AttentionAlignment(), rng)
    expected = ra.evaluate(ra.AttentionAlignment(), x, want=ALL)
    x["q"][1, 2, 3, 0] = np.nan
    hit = np.zeros((3, 4, 5), bool)
    hit[1, 2, 3] = True
    for name, value in ra.evaluate(ra.AttentionAlignment(), x, want=ALL).items():
        assert np.isnan(value[hit]).all(), name
        near(value[~hit], expected[name][~hit], 0)


def test_what_is_padded_is_never_read(rng):
    spec = ra.AttentionAlignment()
    x, duals = arrays(spec, rng, (7, 0, 3))
    clean = dict(ra.evaluate(spec, x, want=ALL)) | dict(ra.vjp(spec, x, duals))
    for name, bad in (("k", np.nan), ("v", np.inf)):
        x[name][1], x[name][2, :, 3:] = bad, bad
    for name, value in (dict(ra.evaluate(spec, x, want=ALL)) | dict(ra.vjp(spec, x, duals))).items():
        near(value, clean[name], 0)


# The plan, proofs, and gradients by what shares nothing with the tape


@EVERY
@LENGTHS
def test_the_plan_means_what_the_reference_says(spec, lengths, rng):
    x, _ = arrays(spec, rng, lengths)
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    for name, value in execute(built(spec, x).plan).items():
        near(value, expected[name])


@EVERY
def test_the_kernels_agree(spec, rng):
    x, duals = arrays(spec, rng, (7, 0, 3))
    expected = forward_and_gradients(spec, x, *two(duals))
    for name, value in forward_and_gradients(spec, x, *two(duals), engine="cpu").items():
        near(value, expected[name], 1e-11)


@pytest.mark.parametrize("name", ["max_prob", "entropy"])
def test_the_kernels_do_not_answer_without_the_statistics(name, rng):
    spec = ra.AttentionAlignment()
    x, duals = arrays(spec, rng)
    for call in (
        lambda: ra.evaluate(spec, x, want=("out", name), engine="cpu"),
        lambda: ra.vjp(spec, x, {"out": duals["out"], name: duals[name]}, engine="cpu"),
    ):
        with pytest.raises(Unsupported, match=f"the cpu engine gives out and lse, and not {name}"):
            call()


@DIVIDE
def test_a_single_key_and_ties_are_proved_exact_at_a_temperature_of_three_quarters(divide, rng):
    spec = ra.AttentionAlignment(causal=True, divide=divide)
    x = {name: np.round(a * 4) / 4 for name, a in arrays(spec, rng, Lk=5)[0].items()}
    x["k"][:, :, 1], x["t5_table"][1] = x["k"][:, :, 0], x["t5_table"][0]
    x["temperature"] = np.full(4, 0.75)
    found = ra.evaluate(spec, x, want=ALL, engine="certified")
    assert (found.max_prob[:, :, :2] == [1, 0.5]).all()
    assert (found.entropy[:, :, 0] == 0).all()
    near(found.entropy[:, :, 1], np.full((3, 4), LN2))
    for name, status in found.status.items():
        assert (status < 2).all(), name


@EVERY
@LENGTHS
def test_gradients_by_complex_step(spec, lengths, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, duals = arrays(spec, rng, lengths)
    problem = built(spec, x)
    gradients = ra.vjp(spec, x, duals)
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.variant.reference(problem.spec, x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-10)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"divide": "bias"}, "divide is 'logits' or 'scores'; given: 'bias'"),
        ({"divide": None}, "divide is 'logits' or 'scores'; given: None"),
        ({"bias": "t5"}, r"bias takes one Spec such as T5\(\), or None; given: 't5'"),
        ({"bias": (ra.T5(),)}, r"bias takes one Spec such as T5\(\), or None"),
        ({"bias": ra.Linformer()}, r"bias takes Specs such as ALiBi\(\)"),
        ({"causal": "left"}, "causal is False, True, 'top_left' or 'bottom_right'"),
        ({"scale": math.inf}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.AttentionAlignment(**options)


@pytest.mark.parametrize("bad", [0.0, -1.0, np.inf, np.nan])
def test_a_temperature_that_is_not_positive(bad, rng):
    x, _ = arrays(ra.AttentionAlignment(), rng)
    x["temperature"][2] = bad
    with pytest.raises(ShapeError, match="temperature must hold finite numbers above 0; given: "):
        ra.evaluate(ra.AttentionAlignment(), x)


@pytest.mark.parametrize("bias", [None, ra.NoPE(), ra.T5(buckets=6, max_distance=9)], ids=str)
def test_json_keeps_the_bias_and_its_absence(bias):
    spec = ra.AttentionAlignment(bias=bias, scale=None)
    assert registry.from_json(spec.to_json()) == spec


def test_explain_takes_a_temperature_of_1():
    shown = ra.explain(ra.AttentionAlignment(), SIZES)
    assert shown["signature"]["temperature"] == "(Hq) real"
    assert shown["operations"] == 2 * 3 * 4 * 5 * 7 * 5
    assert shown["engines"]["cpu"] is None
