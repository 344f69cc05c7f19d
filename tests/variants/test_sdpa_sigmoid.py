"""Sigmoid attention: numbers by hand, the plan, every engine, and what a pair may not do to another."""

import math
from dataclasses import replace

import flint
import numpy as np
import pytest
from checks import near, qkv, same, slopes_by_complex_step
from problems import PROBLEMS, Problem, Sizes, arrays

import refattn as ra
from refattn import api
from refattn.bound import BoundSpace
from refattn.dtypes import format_of
from refattn.engines import certified, cpu
from refattn.engines.cpu import pool
from refattn.errors import ShapeError, SpecError
from refattn.plan import execute
from refattn.profiles import FLOAT32
from refattn.variants._sigmoid import minus_log


def sigmoid(bias=0.0, **options):
    return ra.SDPA(normalizer="sigmoid", sigmoid_bias=bias, **options)


# Every named problem without a sink, weighed by sigmoids.
SIGMOID = {
    name: problem._replace(spec=replace(problem.spec, normalizer="sigmoid", sigmoid_bias=-1.25))
    for name, problem in PROBLEMS.items()
    if "sink" not in problem.extras and name != "everything"
} | {
    "everything": Problem(
        replace(PROBLEMS["everything"].spec, normalizer="sigmoid", sigmoid_bias="keys"),
        PROBLEMS["everything"].sizes,
        tuple(e for e in PROBLEMS["everything"].extras if e != "sink"),
    )
}
EACH = pytest.mark.parametrize("name", SIGMOID)


def given(name, rng, dtype=np.float64):
    inputs, cotangents = arrays(SIGMOID[name], rng, dtype)
    return SIGMOID[name].spec, inputs, {"out": cotangents["out"]}


def everything(spec, inputs, cotangents, engine):
    out = ra.evaluate(spec, inputs, engine=engine, dtype="float64").out
    return {"out": out} | dict(ra.vjp(spec, inputs, cotangents, engine=engine, dtype="float64"))


# Numbers worked by hand


def test_a_weight_is_one_over_one_plus_n_at_a_bias_of_minus_log_n():
    """Logits 0, ln 2 and a masked one; b = −ln 3: weights 1/4 and 2/5 of values 20 and 30."""
    q, k = np.ones((1, 1, 1, 1)), np.array([0, math.log(2), 5]).reshape(1, 1, 3, 1)
    v, mask = np.array([20.0, 30.0, 1e9]).reshape(1, 1, 3, 1), np.array([True, True, False])
    spec = sigmoid(-math.log(3), scale=1.0)
    near(ra.evaluate(spec, {"q": q, "k": k, "v": v, "mask": mask}).out, [[[[5.0 + 12.0]]]])


def test_gradients_by_hand():
    """p = 1/4 each of values 16 and 32; ds = p (1 − p) v = 3 and 6; dq = Σ ds k, dk = ds q, dv = p."""
    q, k = np.full((1, 1, 1, 1), 2.0), np.zeros((1, 1, 2, 1))
    v = np.array([16.0, 32.0]).reshape(1, 1, 2, 1)
    g = ra.vjp(sigmoid(-math.log(3), scale=1.0), {"q": q, "k": k, "v": v}, {"out": np.ones((1, 1, 1, 1))})
    near(g.dv, np.full((1, 1, 2, 1), 0.25))
    near(g.dk, np.array([6.0, 12.0]).reshape(1, 1, 2, 1))
    same(g.dq, np.zeros((1, 1, 1, 1)))


def test_one_key_beside_a_sink_is_a_sigmoid(rng):
    """exp(s) / (exp(s) + exp(sink)) is the sigmoid of s − sink."""
    a = qkv(rng, (2, 2, 1, 3, 1, 4, 2))
    x = {n: a[n] for n in "qkv"}
    near(ra.evaluate(sigmoid(-0.75), x).out, ra.evaluate(ra.SDPA(), x | {"sink": np.full(2, 0.75)}).out)


def test_split_keys_add_up(rng):
    a = qkv(rng, (2, 2, 1, 3, 7, 4, 2))
    parts = [{"q": a["q"], "k": a["k"][:, :, s], "v": a["v"][:, :, s]} for s in (slice(0, 4), slice(4, 7))]
    whole = ra.evaluate(sigmoid(-2.0), {n: a[n] for n in "qkv"}).out
    near(whole, sum(ra.evaluate(sigmoid(-2.0), part).out for part in parts))


@pytest.mark.parametrize("n", [1, 2, 3, 7, 255, 256, 2048, 131072, 2**31 - 1])
def test_minus_log_is_rounded_once_to_float32(n):
    with flint.ctx.workprec(200):
        exact = -flint.arb(n).log()
        half = np.spacing(np.float32(abs(minus_log(n)))) / 2
        assert np.float32(minus_log(n)) == minus_log(n)
        assert abs(exact - minus_log(n)) <= flint.arb(float(half))
    assert not math.copysign(1, minus_log(1)) < 0


def test_the_bias_of_the_keys_is_shown_as_a_number():
    sizes = {"B": 1, "Hq": 8, "Hkv": 8, "Lq": 1, "Lk": 1000, "D": 64, "Dv": 64}
    told = ra.explain(sigmoid("keys"), sizes)
    assert told["spec"].sigmoid_bias == told["plan"]["sigmoid_bias"] == minus_log(1000)
    assert told["plan"]["normalizer"] == "sigmoid"
    assert "sink" not in told["signature"]


# Laws


@EACH
def test_a_plan_means_what_the_reference_says(name, rng):
    spec, inputs, _ = given(name, rng)
    found = execute(api.build(spec, inputs, "float64", ("out",)).plan)
    assert list(found) == ["out"]
    near(found["out"], ra.evaluate(spec, inputs).out)


@EACH
def test_gradients_are_those_of_the_text(name, rng):
    slopes_by_complex_step(*given(name, rng), rng)


@EACH
def test_the_cpu_engine_in_float64_gives_the_references_numbers(name, rng):
    spec, inputs, cotangents = given(name, rng)
    expected = everything(spec, inputs, cotangents, "reference")
    found = everything(spec, inputs, cotangents, "cpu")
    assert list(found) == list(expected)
    for n in expected:
        near(found[n], expected[n])


@EACH
def test_the_cpu_engine_in_float32_is_within_the_bound_of_each_element(name, rng):
    spec, inputs, cotangents = given(name, rng, np.float32)
    checked = api.build(spec, inputs, None, ("out",))
    wrt = tuple(checked.real_inputs())
    bounds = checked.differentiate(BoundSpace(FLOAT32).real, cotangents, wrt)
    found = cpu.vjp(checked, cotangents, wrt)
    for n, bound in bounds.items():
        assert np.isfinite(bound.e).all()
        assert (np.abs(found[n] - bound.x) <= bound.e).all(), n


@pytest.mark.parametrize("name", ["plain", "softcap", "ragged ALiBi", "keep", "mask", "no key", "everything"])
def test_certified_values_are_all_decided_and_within_the_float64_bound(name, rng):
    spec, inputs, cotangents = given(name, rng)
    checked = api.build(spec, inputs, "float64", ("out",))
    for n, proved in certified.certify(checked, cotangents, tuple(checked.real_inputs())).items():
        assert not (proved.status == certified.ENCLOSED).any(), n
        assert (np.abs(proved.rne - proved.centre) <= proved.bound).all(), n


@pytest.mark.parametrize("name", ["everything", "ragged", "lengths around 32"])
def test_any_number_of_threads_gives_the_same_bits(name, rng, monkeypatch):
    spec, inputs, cotangents = given(name, rng, np.float32)
    monkeypatch.setattr(pool, "_SMALL", 0)
    found = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv(pool.VARIABLE, threads)
        checked = api.build(spec, inputs, None, ("out",))
        found.append(cpu.vjp(checked, cotangents, tuple(checked.real_inputs())))
    for other in found[1:]:
        for n in other:
            same(other[n], found[0][n])


def test_saved_outputs_spare_the_forward_pass(rng, monkeypatch):
    spec, inputs, cotangents = given("everything", rng, np.float32)
    saved = ra.evaluate(spec, inputs, engine="cpu")
    expected = ra.vjp(spec, inputs, cotangents, engine="cpu")
    monkeypatch.setattr(cpu, "_forward", None)
    found = ra.vjp(spec, inputs, cotangents, outputs=saved, engine="cpu")
    for n in expected:
        same(found[n], expected[n])


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_weights_saturate_without_a_nan_forwards_or_backwards(engine):
    """Logits of ±1000 and of −1e30: weights 1 and 0, slopes 0."""
    q, k = np.ones((1, 1, 1, 1), np.float32), np.array([1e3, -1e3, -1e30], np.float32).reshape(1, 1, 3, 1)
    x = {"q": q, "k": k, "v": np.array([7, 8, 9], np.float32).reshape(1, 1, 3, 1)}
    spec, ones = sigmoid(scale=1.0), np.ones((1, 1, 1, 1), np.float32)
    same(ra.evaluate(spec, x, engine=engine).out, 7 * ones)
    g = ra.vjp(spec, x, {"out": ones}, engine=engine)
    same(g.dv.ravel(), np.array([1, 0, 0], np.float32))
    same(g.dk.ravel(), np.zeros(3, np.float32))
    same(g.dq, np.zeros_like(ones))


# What is masked, and what is no number


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30])
def test_what_a_masked_slot_holds_touches_nothing(engine, poison, rng):
    a = qkv(rng, (1, 4, 2, 3, 5, 2, 3))
    live = np.array([[True] * 3 + [False] * 2] * 2 + [[False] * 5])
    dirty = {name: a[name].copy() for name in "qkv"}
    dirty["q"][:, :, 2], dirty["k"][:, :, 3:], dirty["v"][:, :, 3:] = poison, poison, poison
    spec, duals = sigmoid(-1.0, softcap=5.0), {"out": a["dout"]}
    clean = everything(spec, {n: a[n] for n in "qkv"} | {"mask": live}, duals, engine)
    found = everything(spec, dirty | {"mask": live}, duals, engine)
    for name in clean:
        same(found[name], clean[name])
    assert not clean["out"][:, :, 2].any()
    assert not clean["dq"][:, :, 2].any()


@pytest.mark.parametrize("engine", ["reference", "cpu", "certified"])
@pytest.mark.parametrize("poison", [np.nan, np.inf])
@pytest.mark.parametrize("slot", ["q", "k", "v"])
def test_a_live_number_that_is_none_spoils_its_pairs_and_no_others(engine, poison, slot, rng):
    """Causal, two query heads over each key head; row 2 of q, key 2 of k, or an entry of value 2."""
    a = qkv(rng, (1, 4, 2, 4, 4, 2, 3))
    a[slot][0, 1, 2, 1] = poison
    with np.errstate(invalid="ignore"):
        found = everything(sigmoid(-1.0, causal=True), {n: a[n] for n in "qkv"}, {"out": a["dout"]}, engine)
    row, key = np.zeros((1, 4, 4), bool), np.zeros((1, 2, 4), bool)
    if slot == "q":
        row[0, 1, 2] = True
        key[0, 0, :3] = True
    else:
        row[0, 2:, 2:] = True
        key[0, 1, 2] = True
    columns = np.arange(3) == 1 if slot == "v" else np.ones(3, bool)
    same(np.isnan(found["out"]), row[..., None] & columns)
    same(np.isnan(found["dq"]), np.repeat(row[..., None], 2, -1))
    same(np.isnan(found["dk"]), np.repeat(key[..., None], 2, -1))
    same(np.isnan(found["dv"]), np.repeat(key[..., None], 3, -1) & (slot != "v"))


# What is refused


def test_the_bias_has_no_default_and_belongs_to_sigmoids():
    with pytest.raises(SpecError, match="no default bias: give sigmoid_bias"):
        ra.SDPA(normalizer="sigmoid")
    with pytest.raises(SpecError, match="goes with normalizer='sigmoid'"):
        ra.SDPA(sigmoid_bias=-1.0)
    with pytest.raises(SpecError, match="normalizer is 'softmax' or 'sigmoid'; given: 'none'"):
        ra.SDPA(normalizer="none")
    for wrong in (np.nan, "length", True, 1j):
        with pytest.raises(SpecError, match="sigmoid_bias is a finite number"):
            sigmoid(wrong)


def test_there_is_no_lse_and_no_sink(rng):
    a = qkv(rng, (1, 2, 1, 2, 2, 2, 2))
    x = {n: a[n] for n in "qkv"}
    with pytest.raises(SpecError, match="want names 'lse'; sdpa offers out"):
        ra.evaluate(sigmoid(), x, want=("out", "lse"))
    with pytest.raises(ShapeError, match="cotangent of 'lse'"):
        ra.vjp(sigmoid(), x, {"lse": a["dlse"]})
    with pytest.raises(ShapeError, match="unknown array 'sink'"):
        ra.evaluate(sigmoid(), x | {"sink": np.zeros(2)})


def test_json_of_a_softmax_is_older_than_the_option_and_that_of_a_sigmoid_names_it():
    assert "normalizer" not in ra.SDPA(causal=True).to_json()
    told = sigmoid(-0.5).to_json()
    assert (told["normalizer"], told["sigmoid_bias"]) == ("sigmoid", (-0.5).hex())


def test_decode_over_grouped_heads_in_bfloat16(rng):
    problem = Problem(sigmoid("keys", causal="bottom_right"), Sizes(B=3, Hq=8, Hkv=2, Lq=1, Lk=70, D=16, Dv=8))
    inputs, _ = arrays(problem, rng)
    narrow = {n: a.astype(np.float32).astype(format_of("bfloat16").numpy) for n, a in inputs.items()}
    wide = {n: a.astype(np.float64) for n, a in narrow.items()}
    expected = api.build(problem.spec, {n: a.astype(np.float32) for n, a in wide.items()}, None, ("out",))
    bound = expected.evaluate(BoundSpace(FLOAT32).real)["out"]
    found = ra.evaluate(problem.spec, narrow, engine="cpu", dtype="float32").out
    assert (np.abs(found - bound.x) <= bound.e).all()
