"""The fast forward kernels: tile edges, what they leave to the slow ones, and their cache."""
# ruff: noqa: PLR0917

import itertools
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest
from checks import OUTPUTS as WANT
from checks import same, within

import refattn as ra
from refattn import api, jit, unread
from refattn.engines import cpu
from refattn.engines.cpu import (
    bounds,
    fast,
    forward,
    logits,
    pool,
    sight,
    skipping,
    storage,
    tiles,
    tuples,
    vectors,
    work,
)


def qkv(rng, batch, heads, groups, lq, lk, depth, width):
    shapes = {"q": (batch, heads, lq, depth), "k": (batch, groups, lk, depth), "v": (batch, groups, lk, width)}
    return {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}


EDGES = (1, 15, 16, 17, 63, 64, 65, 127, 128, 129)


@pytest.mark.parametrize("lq", EDGES)
def test_edges_of_tiles(lq, rng):
    for lk in EDGES:
        within(ra.SDPA(), qkv(rng, 1, 1, 1, lq, lk, 8, 8))
        if lk >= lq:
            within(ra.SDPA(causal="bottom_right", window=(70, None)), qkv(rng, 1, 1, 1, lq, lk, 8, 8))


@pytest.mark.parametrize("depth", [1, 2, 3, 15, 16, 17, 31, 33, 65])
def test_widths_that_fill_no_vector(depth, rng):
    for width in (1, 5, 6, 7, 12, 13, 32, 47):
        within(ra.SDPA(causal="top_left"), qkv(rng, 2, 2, 1, 20, 70, depth, width))


@pytest.mark.parametrize(("heads", "groups", "lq"), [(8, 1, 1), (8, 2, 3), (6, 2, 40), (4, 1, 63), (6, 3, 70)])
def test_heads_that_share_keys(heads, groups, lq, rng):
    inputs = qkv(rng, 2, heads, groups, lq, 150, 16, 16)
    within(ra.SDPA(causal="bottom_right"), inputs)
    within(ra.SDPA(causal="bottom_right", bias=ra.ALiBi()), inputs)
    table = {"t5_table": rng.standard_normal((32, heads)).astype(np.float32)}
    within(ra.SDPA(bias=ra.T5()), inputs | table)
    within(ra.SDPA(), inputs | {"sink": np.ones(heads, np.float32)})


OPTIONS = {
    "slopes": (ra.SDPA(bias=ra.ALiBi()), ()),
    "table": (ra.SDPA(bias=ra.T5()), ("t5_table",)),
    "dense": (ra.SDPA(causal="top_left"), ("bias",)),
    "of a key": (ra.SDPA(), ("key bias",)),
    "of a row": (ra.SDPA(), ("row bias",)),
    "mask": (ra.SDPA(), ("mask",)),
    "segments": (ra.SDPA(causal="top_left"), ("q_segment_ids", "k_segment_ids")),
    "softcap": (ra.SDPA(softcap=2.5), ()),
    "negative scale": (ra.SDPA(scale=-0.75, softcap=1.5), ()),
    "scale 0": (ra.SDPA(scale=0.0), ("bias",)),
    "sigmoid": (ra.SDPA(causal="top_left", normalizer="sigmoid", sigmoid_bias="keys"), ()),
    "sigmoid of all": (
        ra.SDPA(normalizer="sigmoid", sigmoid_bias=-1.5, softcap=4.0, window=(40, 9), bias=(ra.ALiBi(), ra.T5())),
        ("t5_table", "bias", "mask", "q_segment_ids", "k_segment_ids"),
    ),
    "all": (
        ra.SDPA(causal="top_left", window=(100, None), softcap=5.0, bias=(ra.ALiBi(), ra.T5())),
        ("t5_table", "bias", "mask", "sink", "q_segment_ids", "k_segment_ids"),
    ),
}


def extras(rng, heads, lq, lk):
    """What the options read; every row sees its own key."""
    mask = rng.random((lq, lk)) < 0.5
    mask[np.arange(lq), np.arange(lq)] = True
    real = {
        "t5_table": rng.standard_normal((32, heads)),
        "bias": np.where(mask, rng.standard_normal((heads, lq, lk)), -np.inf),
        "key bias": rng.standard_normal((heads, 1, lk)),
        "row bias": rng.standard_normal((lq, 1)),
        "sink": rng.standard_normal(heads),
    }
    ids = np.arange(lk) // 40
    whole = {"mask": mask, "q_segment_ids": ids[:lq], "k_segment_ids": ids}
    return {n: a.astype(np.float32) for n, a in real.items()} | whole


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("lq", "lk"), [(130, 130), (37, 70)])
def test_each_option_over_several_tiles(name, lq, lk, rng):
    spec, names = OPTIONS[name]
    given = extras(rng, 2, lq, lk)
    chosen = {n if " bias" not in n else "bias": given[n] for n in names}
    within(spec, qkv(rng, 2, 2, 1, lq, lk, 16, 8) | chosen)


def test_lengths_at_the_edges_of_tiles(rng):
    lengths = np.array([0, 1, 63, 64, 65, 127, 128])
    inputs = qkv(rng, 7, 2, 1, 128, 128, 8, 8)
    found = within(ra.SDPA(), inputs | {"kv_lengths": lengths[::-1].copy(), "q_lengths": lengths}, alone=False)
    for b, length in enumerate(lengths):
        assert not found["out"][b, :, length:].any()
        assert np.isneginf(found["lse"][b, :, length:]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
def test_rows_of_doubt_are_made_again(bad, rng):
    inputs = qkv(rng, 1, 2, 2, 80, 80, 16, 16)
    clean = cpu.run(api.build(ra.SDPA(causal="top_left"), inputs, None, WANT))
    for n in "qkv":
        dirty = {m: a.copy() for m, a in inputs.items()}
        dirty[n][0, 0, 70, 3] = bad
        found = cpu.run(api.build(ra.SDPA(causal="top_left"), dirty, None, WANT))
        reached = slice(70, 71) if n == "q" else slice(70, 80)
        if not np.isfinite(bad):
            assert np.isnan(found["out"][0, 0, reached]).any(1).all()
            assert not np.isnan(found["out"][0, 1]).any()
        same(found["out"][0, :, :70], clean["out"][0, :, :70])
        same(found["lse"][0, :, :70], clean["lse"][0, :, :70])


def test_threads_share_out_tasks_and_change_no_bit(rng, monkeypatch):
    monkeypatch.setattr(pool, "_SMALL", 0)
    inputs = qkv(rng, 2, 4, 2, 200, 300, 24, 40)
    found = []
    for threads, _ in itertools.product(("1", "2", "3"), range(3)):
        monkeypatch.setenv(pool.VARIABLE, threads)
        found.append(cpu.run(api.build(ra.SDPA(causal="bottom_right"), inputs, None, WANT)))
    for other, n in itertools.product(found[1:], WANT):
        same(other[n], found[0][n])


@pytest.mark.parametrize("cpu_name", ["haswell", "x86-64"])
def test_shorter_vectors_give_results_within_the_bound(cpu_name, tmp_path):
    if not vectors_of_x86():
        pytest.skip("the processor is no x86-64")
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import numpy as np, refattn as ra, test_fast_kernels as t\n"
        "rng = np.random.default_rng(0)\n"
        "t.within(ra.SDPA(causal='top_left', softcap=3.0), t.qkv(rng, 1, 2, 1, 50, 70, 17, 9))\n"
        "t.within(ra.SDPA(), t.qkv(rng, 1, 2, 1, 2, 70, 17, 9))\n"
        "print(t.forward.shape_for(1, 50).width)"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": cpu_name, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == {"haswell": "8\n", "x86-64": "4\n"}[cpu_name]


def vectors_of_x86():
    return os.uname().machine == "x86_64" if hasattr(os, "uname") else False


def test_an_edited_file_is_another_stamp(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text("x = 1")
    second.write_text("x = 2")
    a, b = SimpleNamespace(__file__=str(first)), SimpleNamespace(__file__=str(second))
    assert len({jit.stamp(a), jit.stamp(b), jit.stamp(a, b), jit.stamp()}) == 4
    assert jit.stamp(a) == jit.stamp(a)
    kernel = forward.kernel(forward.shape_for(1, 1))
    read = jit.stamp(bounds, logits, sight, skipping, tiles, tuples, vectors, work)
    assert read in {cell.cell_contents for cell in kernel.py_func.__closure__}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf, -np.inf])
def test_finite_finds_one_number_among_many(bad, dtype, rng):
    numbers = rng.standard_normal(1000).astype(dtype)
    numbers[500] = -ml_dtypes.finfo(dtype).max
    assert storage.finite(numbers)
    for place in (0, 501, 999):
        changed = numbers.copy()
        changed[place] = bad
        assert not storage.finite(changed)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize(("heads", "groups", "lq", "lk"), [(2, 2, 130, 70), (4, 1, 5, 131), (3, 3, 200, 1)])
def test_the_forward_kernel_examines_every_number_of_k(heads, groups, lq, lk, dtype, rng):
    """Whatever the tasks are, their shares of k leave out none: one infinity anywhere is found."""
    inputs = qkv(rng, 2, heads, groups, lq, lk, 9, 8)
    k, v = inputs["k"].astype(dtype), inputs["v"].astype(dtype)
    plan = api.build(ra.SDPA(), inputs | {"k": k, "v": v}, None, WANT).score
    storage_code = storage.storage_of(k)
    assert fast._tiled(fast.arrays(plan, inputs["q"], k, v), storage_code)[3]
    for place in {*range(0, k.size, 61), k.size - 1}:
        changed = k.copy()
        changed.reshape(-1)[place] = -np.inf
        assert not fast._tiled(fast.arrays(plan, inputs["q"], changed, v), storage_code)[3], place


def test_q_k_and_v_enter_the_plan_as_they_are(rng):
    inputs = qkv(rng, 1, 2, 1, 5, 7, 8, 8) | {"bias": rng.standard_normal((5, 7)).astype(np.float32)}
    problem = api.build(ra.SDPA(causal="top_left"), inputs, None, WANT)
    plan = unread.plan(problem)
    assert all(getattr(plan, n) is inputs[n] for n in "qkv")
    same(plan.bias[0].values, inputs["bias"].astype(np.float64))


@pytest.mark.parametrize(
    "lower",
    [
        lambda lower, spec, x: lower(spec, x | {"q": x["q"] * 2}),
        lambda lower, spec, x: lower(spec, x | {"q": np.asarray(x["q"])}),
        lambda lower, spec, x: lower(spec, x | {"bias": x["v"]}),
        lambda lower, spec, x: lower(spec, x | {"k": x["k"][..., ::-1]}),
        lambda lower, spec, x: lower(spec, x | {"k": np.zeros((1, 1, 7, 8))}),
    ],
)
def test_a_lowering_that_reads_q_k_or_v_is_given_numbers(lower, rng):
    problem = api.build(ra.SDPA(), qkv(rng, 1, 2, 1, 5, 7, 8, 8), None, WANT)
    own = SimpleNamespace(lower=lambda spec, x: lower(problem.variant.lower, spec, x))
    assert unread.plan(replace(problem, variant=problem.variant)) is not None
    changed = SimpleNamespace(**{n: getattr(problem, n) for n in ("spec", "inputs", "real_inputs")}, variant=own)
    assert unread.plan(changed) is None


HALVES = [np.float16, ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", HALVES)
def test_every_16_bit_number_is_widened(dtype):
    numbers = np.arange(1 << 16, dtype=np.uint16).view(dtype)
    finite = np.isfinite(numbers.astype(np.float32))
    same(storage.widened(numbers)[finite], numbers.astype(np.float32)[finite])
    same(storage.widened(numbers[:7]), numbers[:7].astype(np.float32))


@pytest.mark.parametrize("dtype", HALVES)
def test_numbers_are_rounded_to_nearest_and_ties_to_even(dtype, rng):
    """At 16-bit numbers, half way between two of them, and one float32 to either side."""
    steps = np.arange(1 << 16, dtype=np.uint32)
    if dtype == ml_dtypes.bfloat16:
        near = ((steps[:, None] << 16) + np.array([0, 1, 0x7FFF, 0x8000, 0x8001], np.uint32)).view(np.float32).ravel()
    else:
        held = steps.astype(np.uint16).view(dtype).astype(np.float64)
        held = np.sort(held[np.isfinite(held)])
        middle = ((held[1:] + held[:-1]) / 2).astype(np.float32)
        near = np.concatenate([middle, np.nextafter(middle, np.float32(9e9)), np.nextafter(middle, np.float32(-9e9))])
        near = np.concatenate([near, np.array([65519.0, 65520.0, 1e30, -65520.0], np.float32)])
    near = near[np.isfinite(near)]
    with np.errstate(over="ignore"):
        same(storage.narrowed(near, np.dtype(dtype)), near.astype(dtype))
    same(storage.narrowed(near[:9], np.dtype(dtype)), near[:9].astype(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("lq", "lk", "depth", "width"), [(1, 65, 8, 8), (70, 130, 17, 9), (130, 129, 64, 33)])
def test_keys_and_values_of_16_bits_are_read_as_they_are(dtype, lq, lk, depth, width, rng):
    """The same bits as from float32 arrays of the same numbers, and out rounded once."""
    short = {n: a.astype(dtype) for n, a in qkv(rng, 2, 4, 2, lq, lk, depth, width).items()}
    long = {n: a.astype(np.float32) for n, a in short.items()}
    for spec in (ra.SDPA(), ra.SDPA(causal="bottom_right", softcap=2.0), ra.SDPA(causal="top_left", bias=ra.ALiBi())):
        plan = api.build(spec, short, None, WANT).score
        found = fast.run(plan, long["q"], short["k"], short["v"])
        for a, b in zip(found, fast.run(plan, long["q"], long["k"], long["v"]), strict=True):
            same(a, b)
        out = ra.evaluate(spec, short, engine="cpu")["out"]
        same(out, ra.evaluate(spec, short, engine="cpu", dtype="float32")["out"].astype(dtype))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_16_bit_number_that_is_not_finite_reaches_its_rows_and_no_others(dtype, name, rng):
    inputs = {n: a.astype(dtype) for n, a in qkv(rng, 1, 2, 2, 70, 70, 8, 8).items()}
    spec = ra.SDPA(causal="top_left")
    clean = ra.evaluate(spec, inputs, engine="cpu")["out"]
    inputs[name][0, 1, 66, 3] = np.inf
    found = ra.evaluate(spec, inputs, engine="cpu")["out"]
    assert found.dtype == dtype
    reached = np.isnan(found.astype(np.float32)).any(-1)[0]
    assert reached[1].sum() == (1 if name == "q" else 4)
    same(found[0][~reached], clean[0][~reached])


def test_a_mask_of_blocks_is_skipped_or_left_out_where_it_says_nothing(rng):
    """Tiles of which all, some and no pair may be seen, and NaN in the keys that nobody sees."""
    inputs = qkv(rng, 2, 4, 2, 200, 330, 16, 8)
    mask = np.zeros((2, 1, 200, 330), bool)
    mask[0, :, :, :64], mask[0, :, :130, 128:192], mask[0, :, 70, 200] = True, True, True
    mask[1, :, :, 128:], mask[1, :, 3, 128:140] = True, False
    for n in "kv":
        inputs[n][0, :, 64:128], inputs[n][1, :, :128] = np.nan, np.inf
    clean = {n: np.nan_to_num(a, nan=0.0, posinf=0.0) for n, a in inputs.items()}
    for given, causal in ((clean, False), (clean, "top_left"), (inputs, False)):
        within(ra.SDPA(causal=causal), given | {"mask": mask}, alone=given is clean and not causal)
    for axes in (np.s_[:1, :, :, :], np.s_[:, :, :1, :]):
        within(ra.SDPA(), clean | {"mask": mask[axes]})
    within(ra.SDPA(), clean | {"mask": mask[:, :, :, 200:201]}, alone=False)


@pytest.mark.parametrize("lq", [1, 20, 65])
def test_a_sigmoid_of_large_logits_and_of_rows_that_see_nothing(lq, rng):
    """Weights from 0 to 1, some below every float32, and a row without a key is 0."""
    inputs = qkv(rng, 1, 2, 1, lq, 70, 8, 8)
    inputs["q"] *= 60
    mask = rng.random((lq, 70)) < 0.5
    mask[0] = False
    found = within(ra.SDPA(normalizer="sigmoid", sigmoid_bias=0.25), inputs | {"mask": mask}, alone=False)
    assert not found["out"][:, :, 0].any()


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_number_that_is_not_finite_under_a_sigmoid(name, rng):
    inputs = qkv(rng, 1, 2, 2, 70, 70, 8, 8)
    inputs[name][0, 1, 66, 3] = np.inf
    spec = ra.SDPA(causal="top_left", normalizer="sigmoid", sigmoid_bias=0.0)
    wide = {n: a.astype(np.float64) for n, a in inputs.items()}
    same(np.isnan(ra.evaluate(spec, inputs, engine="cpu")["out"]), np.isnan(ra.evaluate(spec, wide)["out"]))
