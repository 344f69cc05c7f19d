"""The cpu engine against the reference: every problem, every gradient, both types it computes in."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from checks import near, same
from problems import PROBLEMS, Problem, Sizes, arrays

import refattn as ra
from refattn import api, registry
from refattn import problem as problems
from refattn.bound import BoundSpace
from refattn.dtypes import format_of, round_to
from refattn.engines import cpu, reference
from refattn.engines.cpu import pool, shares, work
from refattn.engines.cpu.operands import prepare
from refattn.errors import ShapeError, SpecError, Unsupported
from refattn.golden import build
from refattn.golden import inputs as recipes
from refattn.plan import Dense, Score, Table, sees
from refattn.profiles import FLOAT32, FLOAT64

WANT = ("out", "lse")


def everything(problem, inputs, cotangents, engine):
    outputs = ra.evaluate(problem.spec, inputs, want=WANT, engine=engine, dtype="float64")
    return dict(outputs) | dict(ra.vjp(problem.spec, inputs, cotangents, engine=engine, dtype="float64"))


def within(found, expected, allowed):
    """−∞ in the same places, every other element at most so far off (one number, or one for each)."""
    assert found.shape == expected.shape
    assert found.dtype in (np.float32, np.float64)
    hidden = np.isneginf(expected)
    same(np.isneginf(found), hidden)
    off = np.abs(np.where(hidden, 0, found) - np.where(hidden, 0, expected))
    assert (off <= np.where(hidden, 0, allowed)).all()


@pytest.mark.parametrize("name", PROBLEMS)
def test_float64_outputs_and_gradients_are_the_references(name, rng):
    problem = PROBLEMS[name]
    inputs, cotangents = arrays(problem, rng)
    expected = everything(problem, inputs, cotangents, "reference")
    found = everything(problem, inputs, cotangents, "cpu")
    assert list(found) == list(expected)
    for n in expected:
        within(found[n], expected[n], 1e-13 * max(1.0, np.abs(expected[n][np.isfinite(expected[n])]).max(initial=0.0)))


@pytest.mark.parametrize("name", PROBLEMS)
def test_float32_is_within_the_published_bound_of_each_element(name, rng):
    problem = PROBLEMS[name]
    inputs, cotangents = arrays(problem, rng, np.float32)
    checked = api.build(problem.spec, inputs, None, WANT)
    wrt = tuple(checked.real_inputs())
    wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in inputs.items()}
    expected = everything(problem, wide, cotangents, "reference")
    bounds = checked.differentiate(BoundSpace(FLOAT32).real, cotangents, wrt)
    found = cpu.vjp(checked, cotangents, wrt)
    for n in expected:
        within(found[n], expected[n], bounds[n].e)


@pytest.mark.parametrize("variant", registry.names())
def test_the_golden_cases_are_within_their_bounds(variant):
    """Of every golden case of moderate size out, lse and gradients; a float64 bound is counted twice, once each."""
    for case in registry.info(variant).cases():
        spec, module = registry.whole(case.spec)
        if module.operations(module.resolve(spec, case.sizes), case.sizes)[1] > 8 * case.sizes["B"] << 15:
            continue
        problem, weights = build.problem_of(case, recipes.inputs(case)), recipes.cotangents(case)
        if problem.unplanned or not isinstance(problem.plan, Score) or problem.plan.relative or problem.plan.v_table:
            assert cpu.refuses(problem), case.name
            continue
        if problem.no_gradient:
            with pytest.raises(Unsupported, match=problem.no_gradient):
                cpu.vjp(problem, weights, tuple(problem.real_inputs()))
            weights = {}
        wrt = tuple(problem.real_inputs()) if weights else ()
        wide = problem.dtype == np.float64
        weights = {n: w for n, w in weights.items() if n in WANT}
        bounds = build.bounds(problem, weights, wrt, FLOAT64 if wide else FLOAT32)
        expected, found = reference.vjp(problem, weights, wrt), cpu.vjp(problem, weights, wrt)
        for n in found:
            same(np.isnan(found[n]), np.isnan(expected[n]))
            same(np.isneginf(found[n]), np.isneginf(expected[n]))
            finite = np.isfinite(expected[n])
            off = np.abs(found[n][finite] - expected[n][finite])
            assert (off <= (1 + wide) * bounds[n][finite]).all(), (case.name, n)


def poisoned(shape, dtype=np.float64):
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else np.iinfo(dtype).max, dtype)


@pytest.mark.parametrize("name", ["everything", "biases of all kinds", "ragged", "mask", "sink", "no key", "no width"])
def test_every_element_is_written(name, rng, monkeypatch):
    """Fresh memory full of NaN gives the same bits as whatever was there before."""
    inputs, cotangents = arrays(PROBLEMS[name], rng)
    expected = everything(PROBLEMS[name], inputs, cotangents, "cpu")
    for kept in (work.scratch, shares.scratch):
        kept.last.__dict__.clear()
    monkeypatch.setattr(np, "empty", poisoned)
    monkeypatch.setattr(np, "empty_like", lambda a: poisoned(a.shape, a.dtype))
    found = everything(PROBLEMS[name], inputs, cotangents, "cpu")
    for n in expected:
        assert not np.isnan(found[n]).any()
        same(found[n], expected[n])


@pytest.mark.parametrize("name", ["everything", "biases of all kinds", "ragged", "lengths around 32"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_any_number_of_threads_gives_the_same_bits(name, dtype, rng, monkeypatch):
    inputs, cotangents = arrays(PROBLEMS[name], rng, dtype)
    monkeypatch.setattr(pool, "_SMALL", 0)
    found = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv(pool.VARIABLE, threads)
        checked = api.build(PROBLEMS[name].spec, inputs, None, WANT)
        found.append(cpu.vjp(checked, cotangents, tuple(checked.real_inputs())))
    for other in found[1:]:
        for n in other:
            same(other[n], found[0][n])


def test_the_number_of_threads_is_a_positive_integer(monkeypatch):
    for wrong in ("0", "-1", "two", ""):
        monkeypatch.setenv(pool.VARIABLE, wrong)
        with pytest.raises(SpecError, match=pool.VARIABLE):
            pool.threads()
    monkeypatch.delenv(pool.VARIABLE)
    assert pool.threads() == os.cpu_count()


# What a masked pair holds

HIDDEN = {
    "causal": Problem(ra.SDPA(causal="top_left"), Sizes(Lq=4, Lk=7)),
    "causal rows": Problem(ra.SDPA(causal="bottom_right"), Sizes(Lq=7, Lk=4)),
    "window": Problem(ra.SDPA(causal="top_left", window=(1, None)), Sizes(Lq=3, Lk=9)),
    "lengths": PROBLEMS["ragged"],
    "segments": Problem(ra.SDPA(softcap=3.0), Sizes(), ("segments", "sink")),
    "mask": Problem(ra.SDPA(), Sizes(), ("mask", "sink")),
    "bias": Problem(ra.SDPA(), Sizes(Hkv=4, Lq=2), ("bias of a head",)),
    "half ALiBi": Problem(ra.SDPA(bias=ra.ALiBi(direction="half"), causal="top_left"), Sizes(Hkv=4, Lq=3, Lk=9)),
    "nothing": PROBLEMS["mask of nothing"],
}


def visible(problem, inputs):
    """Which pairs are live, (B, Hq, Lq, Lk)."""
    lowered = api.build(problem.spec, inputs, "float64", ("out",)).plan
    s = problem.sizes
    pairs = [sees(lowered, *row) for row in np.ndindex(s.B, s.Hq, s.Lq)]
    return np.array(pairs).reshape(s.B, s.Hq, s.Lq, s.Lk)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 1e30])
@pytest.mark.parametrize("name", HIDDEN)
def test_what_no_query_sees_changes_no_bit(name, bad, rng):
    problem, s = HIDDEN[name], HIDDEN[name].sizes
    inputs, cotangents = arrays(problem, rng, np.float32)
    live = visible(problem, inputs)
    unseen = ~live.reshape(s.B, s.Hkv, s.Hq // s.Hkv, s.Lq, s.Lk).any((2, 3))
    blind = ~live.any(3)
    assert unseen.any() or blind.any()
    clean = everything(problem, inputs, cotangents, "cpu")
    dirty = {n: a.copy() for n, a in inputs.items()}
    dirty["q"][blind], dirty["k"][unseen], dirty["v"][unseen] = bad, bad, bad
    found = everything(problem, dirty, cotangents, "cpu")
    for n in clean:
        same(found[n], clean[n])
    assert not clean["out"][blind].any()
    assert not clean["dq"][blind].any()
    assert not clean["dk"][unseen].any()
    assert not clean["dv"][unseen].any()


def test_a_bias_of_a_masked_pair_is_never_added(rng):
    problem = Problem(ra.SDPA(), Sizes(), ("mask", "bias"))
    inputs, cotangents = arrays(problem, rng)
    clean = everything(problem, inputs, cotangents, "cpu")
    inputs["bias"] = np.where(inputs["mask"], inputs["bias"], np.nan)
    found = everything(problem, inputs, cotangents, "cpu")
    for n in clean:
        same(found[n], clean[n])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_live_number_that_is_not_finite_reaches_its_rows_and_no_others(name, bad, rng):
    problem = Problem(ra.SDPA(causal="top_left", softcap=4.0), Sizes(Lq=6, Lk=6))
    inputs, cotangents = arrays(problem, rng)
    clean = everything(problem, inputs, cotangents, "cpu")
    inputs[name][0, 1, 3, 2] = bad
    expected = everything(problem, inputs, cotangents, "reference")
    found = everything(problem, inputs, cotangents, "cpu")
    for n in expected:
        near(found[n], expected[n])
    rows = np.isnan(found["out"]).any(3)
    assert rows.sum() == (1 if name == "q" else 6)
    assert np.isnan(found["dq"][rows]).all()
    same(found["dq"][~rows], clean["dq"][~rows])


def test_a_sink_of_minus_infinity_is_no_sink(rng):
    problem = Problem(ra.SDPA(), Sizes(), ("mask",))
    inputs, cotangents = arrays(problem, rng)
    clean = everything(problem, inputs, cotangents, "cpu")
    found = everything(problem, inputs | {"sink": np.full(4, -np.inf)}, cotangents, "cpu")
    for n in clean:
        same(found[n], clean[n])
    same(found["dsink"], np.zeros(4))


# Outputs, cotangents and plans


def test_saved_outputs_spare_the_forward_pass_and_change_no_gradient(rng, monkeypatch):
    problem = PROBLEMS["everything"]
    inputs, cotangents = arrays(problem, rng, np.float32)
    saved = ra.evaluate(problem.spec, inputs, want=WANT, engine="cpu")
    expected = ra.vjp(problem.spec, inputs, cotangents, engine="cpu")
    monkeypatch.setattr(cpu, "_forward", None)
    found = ra.vjp(problem.spec, inputs, cotangents, outputs=saved, engine="cpu")
    for n in expected:
        same(found[n], expected[n])
    wrong = {"out": saved.out[..., :2], "lse": saved.lse}
    with pytest.raises(ShapeError, match=r"out of an earlier evaluate has shape \(2, 6, 9, 2\)"):
        ra.vjp(problem.spec, inputs, cotangents, outputs=wrong, engine="cpu")


@pytest.mark.parametrize("given", ["out", "lse"])
def test_an_absent_cotangent_is_zero(given, rng):
    problem = PROBLEMS["everything"]
    inputs, cotangents = arrays(problem, rng)
    other = {n: np.zeros_like(c) for n, c in cotangents.items()} | {given: cotangents[given]}
    found = ra.vjp(problem.spec, inputs, {given: cotangents[given]}, engine="cpu")
    expected = ra.vjp(problem.spec, inputs, other, engine="cpu")
    for n in expected:
        same(found[n], expected[n])


@pytest.mark.parametrize("wrt", [("bias",), ("slopes", "v"), ("sink",), ()])
def test_only_the_gradients_asked_for_come_back(wrt, rng):
    problem = PROBLEMS["everything"]
    inputs, cotangents = arrays(problem, rng)
    expected = ra.vjp(problem.spec, inputs, cotangents, engine="cpu")
    found = ra.vjp(problem.spec, inputs, cotangents, wrt=wrt, engine="cpu")
    assert list(found) == [f"d{n}" for n in wrt]
    for n in found:
        same(found[n], expected[n])


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn"])
def test_narrow_types_are_computed_in_float32_and_rounded_once(dtype, rng):
    problem = PROBLEMS["causal bottom right"]
    kind = format_of(dtype).numpy
    inputs = {n: round_to(a, kind) for n, a in arrays(problem, rng)[0].items()}
    wide = {n: a.astype(np.float32) for n, a in inputs.items()}
    found = ra.evaluate(problem.spec, inputs, engine="cpu", want=WANT)
    assert found.out.dtype == kind
    same(found.lse, ra.evaluate(problem.spec, wide, engine="cpu", want=("lse",)).lse)
    same(found.out, ra.evaluate(problem.spec, wide, engine="cpu", dtype=dtype).out)


def test_tables_add_up_and_masking_wins():
    """Differences −1, 0, 1 of two queries and two keys; one table masks 1, the other holds NaN there."""
    tables = (
        Table(values=np.array([[9.0, 1.0, 2.0, -np.inf]]), offset=2),
        Table(values=np.array([[10.0, 20.0, np.nan]]), offset=1),
    )
    ones, at = np.ones((1, 1, 2, 1)), np.arange(2)[None]
    plan = Score(q=ones, k=ones, v=ones, scale=1.0, positions=(at, at), bias=tables)
    x = prepare(plan, np.float64)
    same(x.table, np.array([[11.0, 22.0, -np.inf]]))
    assert x.low == -1
    short = replace(plan, bias=(Table(values=np.ones((1, 1)), offset=0),))
    with pytest.raises(ShapeError, match="covers the differences 0 to 0, but -1 to 1 occur"):
        prepare(short, np.float64)


def test_several_dense_biases_are_read_in_place():
    q, k = np.ones((2, 1, 4, 1)), np.ones((2, 1, 3, 1))
    biases = Dense(values=np.arange(3.0)), Dense(values=np.arange(8.0).reshape(2, 1, 4, 1))
    plan = Score(q=q, k=k, v=k, scale=1.0, positions=(np.arange(4)[None], np.arange(3)[None]), bias=biases)
    x = prepare(plan, np.float32)
    same(x.bias_strides, np.array([[0, 0, 0, 0, 1], [3, 4, 0, 1, 0]]))
    same(x.biases, np.array([0, 1, 2, *range(8)], np.float32))


def test_what_is_not_a_score_plan_is_refused_in_one_sentence():
    def problem(**functions):
        given = {"spec": SimpleNamespace(variant="ponder"), "inputs": {}, "sizes": {}, "dtype": np.dtype(np.float64)}
        return problems.Problem(variant=SimpleNamespace(signature=lambda spec: {}, **functions), **given)

    assert "ponder has no plan: its module offers no" in cpu.refuses(problem())
    assert "ponder has no plan: it thinks" in cpu.refuses(problem(lower="it thinks"))
    with pytest.raises(Unsupported, match="ponder has no plan: it thinks"):
        _ = problem(lower="it thinks").plan
    assert "ponder lowers to float" in cpu.refuses(problem(lower=lambda spec, x: 1.0))


# Processes and threads

PRELUDE = """
import json, os, sys, threading
import numpy as np
import refattn as ra
rng = np.random.default_rng(0)
x = {n: rng.standard_normal((1, 2, 96, 8)).astype(np.float32) for n in "qkv"}
spec = ra.ALiBi(slopes="learned")
x["slopes"] = np.ones(2, np.float32)
x["bias"] = np.zeros((96, 96), np.float32)

def gradients():
    found = ra.vjp(spec, x, {"out": x["q"]}, engine="cpu")
    return b"".join(np.ascontiguousarray(a).tobytes() for a in found.values())
"""


def process(script, **environment):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", PRELUDE + script],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not done.stderr
    return done.stdout


def test_a_second_process_finds_every_kernel_on_disk(tmp_path):
    script = """
gradients()
from refattn.engines.cpu import backward, forward
shape = forward.shape_for(1, 96)
kernels = (forward.kernel(shape), backward.kernel(shape), backward.by_pair(shape))
print(json.dumps([[sum(k.stats.cache_hits.values()), sum(k.stats.cache_misses.values())] for k in kernels]))
"""
    first, second = (json.loads(process(script, NUMBA_CACHE_DIR=str(tmp_path))) for _ in range(2))
    assert first == [[0, 1]] * 3
    assert second == [[1, 0]] * 3


def test_two_python_threads_may_call_at_once():
    script = """
from refattn.engines.cpu import pool
pool._SMALL = 0
expected, found = gradients(), []
callers = [threading.Thread(target=lambda: found.extend(gradients() for _ in range(5))) for _ in range(3)]
for caller in callers: caller.start()
for caller in callers: caller.join()
print(found == [expected] * 15)
"""
    assert process(script, REFATTN_NUM_THREADS="2") == "True\n"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_forked_child_has_threads_of_its_own():
    script = """
import warnings
from refattn.engines.cpu import pool
pool._SMALL = 0
expected = gradients()
warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of any fork of a process with threads
child = os.fork()
if child == 0:
    os._exit(0 if gradients() == expected else 3)
print(os.waitpid(child, 0)[1], gradients() == expected)
"""
    assert process(script, REFATTN_NUM_THREADS="2") == "0 True\n"


def test_the_reference_does_not_import_numba():
    script = 'ra.evaluate(spec, x)\nassert "refattn.engines.reference" in sys.modules\nprint("numba" in sys.modules)\n'
    assert process(script) == "False\n"


def test_gradients_of_a_variant_with_a_state_are_refused_for_its_plan_does_not_detach(rng):
    spec = ra.Compressive(segment=2, memory=2, compressed=2, rate=2)
    sizes = {"B": 1, "L": 7, "E": 3, "Hq": 2, "Hkv": 1, "D": 2, "Dv": 2, "R": 4}
    x = {n: rng.normal(size=a.shape(sizes)) for n, a in registry.info("compressive").module.signature(spec).items()}
    assert ra.evaluate(spec, x, engine="cpu")["out"].shape == (1, 2, 7, 2)
    with pytest.raises(Unsupported, match="no gradients of this compressive: what its plan holds"):
        ra.vjp(spec, x, {"out": np.ones((1, 2, 7, 2))}, engine="cpu")
