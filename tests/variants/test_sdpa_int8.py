"""Keys and values in int8 with scales: what they mean, the plan, every engine, and what a scale may not do."""

from dataclasses import replace

import numpy as np
import pytest
from checks import near, same, slopes_by_complex_step
from problems import PROBLEMS, Problem, Sizes, arrays

import refattn as ra
from refattn import api, unread
from refattn.bound import BoundSpace
from refattn.dtypes import format_of
from refattn.engines import certified, cpu
from refattn.engines.cpu import pool
from refattn.errors import DTypeError, ShapeError, SpecError
from refattn.plan import execute, leaves
from refattn.profiles import FLOAT32
from refattn.unpack import unpacked

WANT = ("out", "lse")
SHAPES = {"a token": "B Hkv Lk", "a head": "1 Hkv 1", "a key": "Lk", "all": ""}
EACH = pytest.mark.parametrize("name", PROBLEMS)


def integers(problem, rng, dtype=np.float64, scales="a token"):
    """The problem with int8 keys and values, and its cotangents."""
    inputs, cotangents = arrays(problem, rng, dtype)
    shape = tuple(int(d) if d.isdigit() else getattr(problem.sizes, d) for d in SHAPES[scales].split())
    for n in ("k", "v"):
        inputs[n] = rng.integers(-128, 128, inputs[n].shape, np.int8)
        inputs[f"{n}_scale"] = np.asarray((0.5 + rng.random(shape)) / 64, dtype)
    return replace(problem.spec, kv="int8"), inputs, cotangents


def plainly(x):
    """The same problem in real numbers."""
    found = {n: a for n, a in x.items() if n not in ("k_scale", "v_scale")}
    for n in ("k", "v"):
        found[n] = x[n] * x[f"{n}_scale"].astype(np.float64)[..., None]
    return found


def everything(spec, inputs, cotangents, engine):
    found = dict(ra.evaluate(spec, inputs, engine=engine, want=WANT, dtype="float64"))
    return found | dict(ra.vjp(spec, inputs, cotangents, engine=engine, dtype="float64"))


def test_scales_multiply_logits_and_values_by_hand():
    """Integers 1 and 4 of scales 2 and 1/2 are equal keys; values 3 · 8 and 5 · 4 have the mean 22."""
    k, v = (np.array(a, np.int8).reshape(1, 1, 2, 1) for a in ([1, 4], [3, 5]))
    x = {"q": np.ones((1, 1, 1, 1)), "k": k, "v": v, "k_scale": np.array([2, 0.5]), "v_scale": np.array([8.0, 4.0])}
    found = ra.evaluate(ra.SDPA(kv="int8", scale=1.0), x, want=WANT)
    near(found.out, [[[[22.0]]]])
    near(found.lse, [[[2 + np.log(2)]]])


@pytest.mark.parametrize("scales", SHAPES)
@EACH
def test_out_and_lse_are_those_of_the_real_numbers_bit_for_bit(name, scales, rng):
    spec, x, _ = integers(PROBLEMS[name], rng, scales=scales)
    expected = ra.evaluate(PROBLEMS[name].spec, plainly(x), want=WANT)
    found = ra.evaluate(spec, x, want=WANT)
    for n in WANT:
        same(found[n], expected[n])


@pytest.mark.parametrize("scales", SHAPES)
def test_gradients_of_scales_are_sums_of_those_of_the_real_numbers(scales, rng):
    problem = PROBLEMS["everything"]
    spec, x, duals = integers(problem, rng, scales=scales)
    found, real = ra.vjp(spec, x, duals), ra.vjp(problem.spec, plainly(x), duals)
    assert {"dk", "dv"}.isdisjoint(found)
    near(found.dq, real.dq)
    for n in ("k", "v"):
        whole = (real[f"d{n}"] * x[n]).sum(-1)
        shape = x[f"{n}_scale"].shape
        axes = tuple(i for i in range(3) if i < 3 - len(shape) or shape[i - 3] == 1)
        near(found[f"d{n}_scale"], whole.sum(axes).reshape(shape))


@EACH
def test_a_plan_means_what_the_reference_says_packed_and_unpacked(name, rng):
    spec, x, _ = integers(PROBLEMS[name], rng)
    plan = api.build(spec, x, "float64", ("out",)).plan
    assert plan.k.dtype == plan.v.dtype == np.int8
    plain = unpacked(plan)
    assert {"k_scale", "v_scale"} <= set(leaves(plan))
    assert {"k_scale", "v_scale"}.isdisjoint(leaves(plain))
    expected = ra.evaluate(spec, x, want=WANT)
    for found in (execute(plan), execute(plain)):
        for n in WANT:
            near(found[n], expected[n])


@EACH
def test_gradients_are_those_of_the_text(name, rng):
    spec, x, duals = integers(PROBLEMS[name], rng)
    slopes_by_complex_step(spec, x, duals, rng)


@EACH
def test_the_cpu_engine_in_float64_gives_the_references_numbers(name, rng):
    spec, x, duals = integers(PROBLEMS[name], rng)
    expected, found = (everything(spec, x, duals, engine) for engine in ("reference", "cpu"))
    assert list(found) == list(expected)
    for n in expected:
        near(found[n], expected[n])


@EACH
def test_the_cpu_engine_in_float32_is_within_the_bound_of_each_element(name, rng):
    spec, x, duals = integers(PROBLEMS[name], rng, np.float32)
    checked = api.build(spec, x, None, WANT)
    wrt = tuple(checked.real_inputs())
    bounds = checked.differentiate(BoundSpace(FLOAT32).real, duals, wrt)
    alone, found = cpu.run(checked), cpu.vjp(checked, duals, wrt)
    for n, bound in bounds.items():
        live = ~np.isneginf(bound.x)
        for results in (alone, found):
            if n in results:
                same(np.isneginf(results[n]), ~live)
                assert (np.abs(results[n][live] - bound.x[live]) <= bound.e[live]).all(), n


@pytest.mark.parametrize("name", ["plain", "softcap", "ragged ALiBi", "keep", "no key", "everything"])
def test_certified_values_are_all_decided(name, rng):
    spec, x, duals = integers(PROBLEMS[name], rng)
    checked = api.build(spec, x, "float64", ("out",))
    for n, proved in certified.certify(checked, duals, tuple(checked.real_inputs())).items():
        assert not (proved.status == certified.ENCLOSED).any(), n


@pytest.mark.parametrize("rotary", [None, ra.RoPE(pairing="half")])
def test_what_turns_or_reads_keys_meets_the_real_numbers(rotary, rng):
    problem = Problem(ra.SDPA(causal="bottom_right", rotary=rotary, content=(ra.Shaw(clip=2),)), Sizes(D=4))
    spec, x, duals = integers(problem, rng)
    x |= {"shaw_k": rng.standard_normal((5, 4)), "shaw_v": rng.standard_normal((5, 5))}
    expected = ra.evaluate(problem.spec, plainly(x), want=WANT)
    for found in (ra.evaluate(spec, x, want=WANT), execute(api.build(spec, x, "float64", WANT).plan)):
        for n in WANT:
            near(found[n], expected[n])
    slopes_by_complex_step(spec, x, duals, rng)


def test_rope_of_the_least_integer(rng):
    """−128 has no negative in int8."""
    spec, x, _ = integers(Problem(ra.SDPA(rotary=ra.RoPE(pairing="interleaved")), Sizes(D=4)), rng)
    x["k"][...] = -128
    expected = ra.evaluate(replace(spec, kv=None), plainly(x), want=WANT)
    for engine in ("reference", "cpu"):
        near(ra.evaluate(spec, x, engine=engine, dtype="float64", want=WANT).lse, expected.lse)


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e30])
def test_the_scale_of_a_slot_that_no_query_sees_changes_no_bit(engine, bad, rng):
    problem = Problem(ra.SDPA(causal="bottom_right"), Sizes(B=3, Lq=2), ("kv_lengths",))
    spec, x, duals = integers(problem, rng)
    x["kv_lengths"] = np.array([7, 0, 4])
    clean = everything(spec, x, duals, engine)
    for n in ("k_scale", "v_scale"):
        for b, length in enumerate(x["kv_lengths"]):
            x[n][b, :, length:] = bad
    found = everything(spec, x, duals, engine)
    for n in clean:
        same(found[n], clean[n])
    for b, length in enumerate(x["kv_lengths"]):
        assert not found["dk_scale"][b, :, length:].any()


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_a_live_scale_that_is_no_number_reaches_the_rows_that_read_it(engine, rng):
    spec, x, duals = integers(Problem(ra.SDPA(causal="top_left"), Sizes(Lq=6, Lk=6)), rng)
    clean = everything(spec, x, duals, engine)
    x["k_scale"][0, 1, 3] = np.nan
    with np.errstate(invalid="ignore"):
        found = everything(spec, x, duals, engine)
    hit = np.zeros((2, 4, 6), bool)
    hit[0, 2:, 3:] = True
    same(np.isnan(found["lse"]), hit)
    same(np.isnan(found["dq"]), np.repeat(hit[..., None], 3, -1))
    same(found["dq"][~hit], clean["dq"][~hit])
    seen = np.zeros((2, 2, 6), bool)
    seen[0, 1] = True
    same(np.isnan(found["dk_scale"]), seen)


def test_any_number_of_threads_gives_the_same_bits(rng, monkeypatch):
    spec, x, duals = integers(PROBLEMS["everything"], rng, np.float32)
    monkeypatch.setattr(pool, "_SMALL", 0)
    found = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv(pool.VARIABLE, threads)
        checked = api.build(spec, x, None, WANT)
        found.append(dict(cpu.run(checked)) | dict(cpu.vjp(checked, duals, tuple(checked.real_inputs()))))
    for other in found[1:]:
        for n in other:
            same(other[n], found[0][n])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_decode_gives_the_dtype_of_q_and_reads_integers_as_they_are(dtype, rng):
    problem = Problem(ra.SDPA(causal="bottom_right"), Sizes(B=2, Hq=8, Hkv=2, Lq=1, Lk=70, D=16, Dv=8))
    spec, x, _ = integers(problem, rng, np.float32, "a head")
    x["q"] = x["q"].astype(format_of(dtype).numpy)
    found = ra.evaluate(spec, x, engine="cpu", want=WANT)
    assert found.out.dtype == x["q"].dtype
    assert found.lse.dtype == np.float32
    plan = unread.plan(api.build(spec, x, None, WANT))
    assert plan.k is x["k"]
    assert plan.v is x["v"]


def test_what_is_not_int8_is_refused(rng):
    spec, x, _ = integers(PROBLEMS["plain"], rng)
    with pytest.raises(DTypeError, match="k is int64, where int8 is expected"):
        ra.evaluate(spec, x | {"k": x["k"].astype(np.int64)})
    with pytest.raises(DTypeError, match="v is float64, where an integer dtype is expected"):
        ra.evaluate(spec, x | {"v": x["v"].astype(np.float64)})
    with pytest.raises(ShapeError, match="missing array 'v_scale'"):
        ra.evaluate(spec, {n: a for n, a in x.items() if n != "v_scale"})
    with pytest.raises(ShapeError, match=r"k_scale .* does not broadcast"):
        ra.evaluate(spec, x | {"k_scale": np.ones((3, 2, 7))})
    with pytest.raises(SpecError, match="wrt names"):
        ra.vjp(spec, x, {"out": np.zeros((2, 4, 5, 5))}, wrt=("k",))
    with pytest.raises(SpecError, match="kv is 'int8', or None"):
        ra.SDPA(kv="int4")
    with pytest.raises(DTypeError, match="k is int8, where a floating-point dtype"):
        ra.evaluate(ra.SDPA(), {n: x[n] for n in "qkv"})
