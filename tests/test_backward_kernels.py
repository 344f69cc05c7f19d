"""The fast backward kernels: edges of tiles, every option, shares of a head, what they leave to the slow ones."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from checks import same
from test_fast_kernels import EDGES, OPTIONS, extras, qkv, vectors_of_x86

import refattn as ra
from refattn import api, jit
from refattn.bound import BoundSpace
from refattn.engines import cpu, reference
from refattn.engines.cpu import (
    adjoint,
    backward,
    bounds,
    fast,
    gradients,
    logits,
    pool,
    sight,
    skipping,
    tiles,
    tuples,
    vectors,
    work,
)
from refattn.engines.cpu.forward import shape_for
from refattn.profiles import FLOAT32

WANT = ("out", "lse")


def problem_of(spec, inputs, rng):
    """A problem, and cotangents of out and lse."""
    checked = api.build(spec, inputs, None, WANT)
    shapes = {n: a.shape(checked.sizes) for n, a in checked.outputs.items()}
    return checked, {n: rng.standard_normal(shapes[n]).astype(np.float32) for n in WANT}


def within(spec, inputs, rng):
    """All gradients come from the fast kernels and lie inside the published bound."""
    checked, cotangents = problem_of(spec, inputs, rng)
    wrt = tuple(checked.real_inputs())
    with mock.patch.object(cpu, "_backward", None):
        found = cpu.vjp(checked, cotangents, wrt)
    expected = checked.differentiate(BoundSpace(FLOAT32).real, cotangents, wrt)
    for n in (f"d{name}" for name in wrt):
        assert found[n].shape == expected[n].x.shape
        assert (np.abs(found[n] - expected[n].x) <= expected[n].e).all(), n
    return found


@pytest.mark.parametrize("lq", EDGES)
def test_edges_of_tiles(lq, rng):
    for lk in EDGES:
        within(ra.SDPA(), qkv(rng, 1, 1, 1, lq, lk, 8, 8), rng)
        if lk >= lq:
            within(ra.SDPA(causal="bottom_right", window=(70, None)), qkv(rng, 1, 1, 1, lq, lk, 8, 8), rng)


@pytest.mark.parametrize("depth", [1, 2, 15, 16, 17, 33, 64, 65, 128])
def test_widths_that_fill_no_vector(depth, rng):
    for width in (1, 5, 12, 31, 48, 63, 64, 129):
        within(ra.SDPA(causal="top_left"), qkv(rng, 2, 2, 1, 20, 70, depth, width), rng)


@pytest.mark.parametrize(("heads", "groups", "lq"), [(8, 1, 1), (8, 2, 3), (6, 2, 40), (4, 1, 63), (6, 3, 70)])
def test_heads_that_share_keys(heads, groups, lq, rng):
    inputs = qkv(rng, 2, heads, groups, lq, 150, 16, 16)
    within(ra.SDPA(causal="bottom_right"), inputs, rng)
    slopes = {"slopes": rng.random(heads).astype(np.float32)}
    within(ra.SDPA(causal="bottom_right", bias=ra.ALiBi(slopes="learned")), inputs | slopes, rng)
    table = {"t5_table": rng.standard_normal((32, heads)).astype(np.float32)}
    within(ra.SDPA(bias=ra.T5()), inputs | table, rng)
    within(ra.SDPA(), inputs | {"sink": np.ones(heads, np.float32)}, rng)
    for shape in ((heads, lq, 150), (1, 150), (heads, 1, 1), (2, 1, lq, 1)):
        within(ra.SDPA(), inputs | {"bias": rng.standard_normal(shape).astype(np.float32)}, rng)


@pytest.mark.parametrize("name", [n for n, (spec, _) in OPTIONS.items() if spec.normalizer == "softmax"])
@pytest.mark.parametrize(("lq", "lk"), [(130, 130), (37, 70)])
def test_each_option_over_several_tiles(name, lq, lk, rng):
    spec, names = OPTIONS[name]
    given = extras(rng, 2, lq, lk)
    chosen = {n if " bias" not in n else "bias": given[n] for n in names}
    within(spec, qkv(rng, 2, 2, 1, lq, lk, 16, 8) | chosen, rng)


@pytest.mark.parametrize(
    "shape", [(), (1,), (70,), (66, 1), (66, 70), (2, 1, 1), (2, 66, 1), (3, 1, 66, 70), (3, 2, 1, 70), (3, 2, 66, 70)]
)
def test_a_bias_of_every_shape(shape, rng):
    inputs = qkv(rng, 3, 2, 1, 66, 70, 8, 8) | {"bias": rng.standard_normal(shape).astype(np.float32)}
    assert within(ra.SDPA(causal="top_left"), inputs, rng)["dbias"].shape == shape


def test_positions_in_any_order(rng):
    inputs = qkv(rng, 2, 2, 2, 70, 130, 8, 8) | {"t5_table": rng.standard_normal((32, 2)).astype(np.float32)}
    at = {"q_positions": rng.integers(0, 130, (2, 70)), "k_positions": rng.permutation(130)}
    slopes = {"slopes": np.array([0.5, 0.01], np.float32)}
    spec = ra.SDPA(causal="top_left", bias=(ra.T5(), ra.ALiBi(slopes="learned")))
    within(spec, inputs | at | slopes, rng)


def test_lengths_at_the_edges_of_tiles(rng):
    lengths = np.array([0, 1, 63, 64, 65, 127, 128])
    inputs = qkv(rng, 7, 2, 1, 128, 128, 8, 8)
    found = within(ra.SDPA(), inputs | {"kv_lengths": lengths[::-1].copy(), "q_lengths": lengths}, rng)
    for b, length in enumerate(lengths):
        assert not found["dq"][b, :, length:].any()
        assert not found["dk"][b, :, lengths[-1 - b] :].any()
        assert not found["dv"][b, :, lengths[-1 - b] :].any()
    sink = {"sink": np.array([1.0, -2.0], np.float32)}
    beyond = within(ra.SDPA(), inputs | {"q_lengths": lengths} | sink, rng)
    assert not any(beyond["dq"][b, :, length:].any() for b, length in enumerate(lengths))


HIDING = {
    "lengths": (ra.SDPA(), {"kv_lengths": np.array([40, 65]), "q_lengths": np.array([50, 3])}),
    "causal rows": (ra.SDPA(causal="bottom_right", softcap=2.0), {}),
    "segments": (ra.SDPA(), {"q_segment_ids": np.arange(90) // 40, "k_segment_ids": np.arange(70) // 50 + 1}),
    "mask": (ra.SDPA(), {"mask": np.outer(np.arange(90) < 40, np.arange(70) > 30)}),
    "bias": (ra.SDPA(), {"bias": np.where(np.outer(np.arange(90) < 40, np.arange(70) > 30), 0, -np.inf)}),
}


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("name", HIDING)
def test_what_no_pair_sees_changes_no_bit_and_costs_nothing(name, bad, rng):
    spec, options = HIDING[name]
    options = {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in options.items()}
    inputs = qkv(rng, 2, 4, 2, 90, 70, 16, 24)
    checked, cotangents = problem_of(spec, inputs | options, rng)
    clean = cpu.vjp(checked, cotangents, ("q", "k", "v"))
    blind, unseen = np.isneginf(clean["lse"]), ~clean["dv"].any(-1)
    assert blind.any()
    dirty = {n: a.copy() for n, a in (inputs | cotangents).items()}
    dirty["q"][blind], dirty["out"][blind] = bad, bad
    dirty["k"][unseen], dirty["v"][unseen] = bad, bad
    checked = api.build(spec, {n: dirty[n] for n in "qkv"} | options, None, WANT)
    saved = {n: clean[n] for n in WANT}
    with mock.patch.object(cpu, "_backward", None):
        found = cpu.vjp(checked, {n: dirty[n] for n in WANT}, ("q", "k", "v"), saved)
    for n in clean:
        same(found[n], clean[n])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "lse"])
def test_what_is_seen_and_not_finite_reaches_what_the_reference_says(name, bad, rng):
    inputs = qkv(rng, 1, 2, 1, 70, 70, 8, 8)
    checked, cotangents = problem_of(ra.SDPA(causal="top_left"), inputs, rng)
    given = inputs if name in inputs else cotangents
    given[name][0, 0, 66] = bad
    found, expected = (engine.vjp(checked, cotangents, ("q", "k", "v")) for engine in (cpu, reference))
    for n in found:
        same(np.isfinite(found[n]), np.isfinite(expected[n]))
    assert not np.isfinite(found["dq"]).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_cotangent_that_is_not_finite_reaches_the_keys_that_its_row_sees(bad, rng):
    checked, cotangents = problem_of(ra.SDPA(causal="top_left"), qkv(rng, 1, 2, 1, 70, 70, 8, 8), rng)
    cotangents["out"][0, 0, 66] = bad
    found = cpu.vjp(checked, cotangents, ("q", "k", "v"))
    rows, keys = np.zeros((1, 2, 70, 8), bool), np.zeros((1, 1, 70, 8), bool)
    rows[0, 0, 66], keys[0, 0, :67] = True, True
    same(~np.isfinite(found["dq"]), rows)
    for n in ("dk", "dv"):
        same(~np.isfinite(found[n]), keys)


def test_few_heads_are_shared_out_and_the_shares_add_up(rng, monkeypatch):
    inputs = qkv(rng, 1, 2, 1, 200, 700, 24, 40)
    inputs |= {"t5_table": rng.standard_normal((32, 2)).astype(np.float32), "slopes": np.ones(2, np.float32)}
    spec = ra.SDPA(causal="bottom_right", bias=(ra.T5(), ra.ALiBi(slopes="learned")))
    bias = {"bias": rng.standard_normal((200, 1)).astype(np.float32)}
    assert adjoint._shares(1, 11, 4 * 2 * 200 * 24) == (8, 1)
    shared = within(spec, inputs | bias, rng)
    monkeypatch.setattr(adjoint, "_TASKS", 1)
    alone = within(spec, inputs | bias, rng)
    assert not (shared["dq"] == alone["dq"]).all()


def test_shares_fit_into_memory():
    """dq of 32768 rows of one head of 128 numbers: at most 64 MiB beyond inputs and outputs."""
    for width in (64, 128):
        size = 4 * 32768 * width
        shares, step = adjoint._shares(1, 512, size)
        assert shares > 2
        assert step == 8
        assert (shares - 1) * size <= 48 << 20
    assert adjoint._shares(8, 512, 1) == (1, 8)
    assert adjoint._shares(1, 1, 1) == (1, 8)
    assert adjoint._shares(2, 32, 1) == (4, 4)


def test_threads_share_out_tasks_and_change_no_bit(rng, monkeypatch):
    monkeypatch.setattr(pool, "_SMALL", 0)
    inputs = qkv(rng, 2, 4, 2, 200, 600, 24, 40) | {"bias": rng.standard_normal((200, 600)).astype(np.float32)}
    inputs["slopes"] = np.ones(4, np.float32)
    spec = ra.SDPA(causal="bottom_right", bias=ra.ALiBi(slopes="learned"))
    checked, cotangents = problem_of(spec, inputs, rng)
    found = []
    for threads, _ in itertools.product(("1", "2", "3"), range(2)):
        monkeypatch.setenv(pool.VARIABLE, threads)
        found.append(cpu.vjp(checked, cotangents, tuple(checked.real_inputs())))
    for other in found[1:]:
        for n in other:
            same(other[n], found[0][n])


def poisoned(shape, dtype=np.float64, **_):
    return np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 1, dtype)


@pytest.mark.parametrize("name", ["softcap", "all", "dense"])
def test_every_element_is_written(name, rng, monkeypatch):
    spec, names = OPTIONS[name]
    given = extras(rng, 2, 70, 130)
    inputs = qkv(rng, 1, 2, 1, 70, 130, 17, 9) | {n: given[n] for n in names}
    checked, cotangents = problem_of(spec, inputs, rng)
    wrt = tuple(checked.real_inputs())
    expected = cpu.vjp(checked, cotangents, wrt)
    monkeypatch.setattr(np, "empty", poisoned)
    monkeypatch.setattr(np, "empty_like", lambda a: poisoned(a.shape, a.dtype))
    found = cpu.vjp(checked, cotangents, wrt)
    for n in expected:
        same(found[n], expected[n])


def test_outputs_saved_in_16_bits_are_made_again(rng):
    inputs = {n: a.astype(np.float16) for n, a in qkv(rng, 1, 1, 1, 20, 20, 8, 8).items()}
    weights = {"out": np.ones((1, 1, 20, 8), np.float16)}
    saved = ra.evaluate(ra.SDPA(), inputs, want=WANT, engine="cpu")
    assert saved.out.dtype == np.float16
    expected = ra.vjp(ra.SDPA(), inputs, weights, engine="cpu")
    found = ra.vjp(ra.SDPA(), inputs, weights, outputs=saved, engine="cpu")
    for n in expected:
        same(found[n], expected[n])


@pytest.mark.parametrize("cpu_name", ["haswell", "x86-64"])
def test_shorter_vectors_give_results_within_the_bound(cpu_name, tmp_path):
    if not vectors_of_x86():
        pytest.skip("the processor is no x86-64")
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import numpy as np, refattn as ra, test_backward_kernels as t\n"
        "rng = np.random.default_rng(0)\n"
        "t.within(ra.SDPA(causal='top_left', softcap=3.0), t.qkv(rng, 1, 2, 1, 50, 70, 17, 29), rng)\n"
        "t.within(ra.SDPA(), t.qkv(rng, 1, 2, 1, 2, 70, 17, 9), rng)\n"
        "print(t.shape_for(1, 50).width)"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": cpu_name, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == {"haswell": "8\n", "x86-64": "4\n"}[cpu_name]


@pytest.mark.parametrize("made", [backward.kernel, backward.by_pair])
def test_the_cache_key_holds_every_file_that_a_kernel_calls(made):
    closed = {cell.cell_contents for cell in made(shape_for(1, 1)).py_func.__closure__}
    assert jit.stamp(bounds, gradients, logits, sight, skipping, tiles, tuples, vectors, work) in closed


def test_float64_and_keep_masks_are_left_to_the_slow_kernels(rng):
    inputs = qkv(rng, 1, 1, 1, 5, 7, 8, 8)
    keep = ra.SDPA(keep_probability=0.5), inputs | {"keep": np.ones((5, 7), bool)}
    double = ra.SDPA(), {n: a.astype(np.float64) for n, a in inputs.items()}
    for spec, given in (keep, double):
        checked, cotangents = problem_of(spec, given, rng)
        with mock.patch.object(adjoint, "gradients", None):
            found = cpu.vjp(checked, cotangents, ("q",))
        assert found["dq"].dtype == np.float64
    assert not fast.takes(api.build(*keep, None, WANT).score)
