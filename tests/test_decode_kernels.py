"""The decode kernel: few rows and many keys, shares and their merging, what it reads of k and v, and its cache."""
# ruff: noqa: PLR0917

import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import ml_dtypes
import numpy as np
import pytest
from checks import OUTPUTS, same, within

import refattn as ra
from refattn import api, jit
from refattn.engines import cpu
from refattn.engines.cpu import (
    blocks,
    columns,
    decode,
    dots,
    fast,
    lines,
    pool,
    shares,
    sight,
    tiles,
    tuples,
    vectors,
    work,
)

STORED = (np.float32, ml_dtypes.bfloat16, np.float16)


def qkv(rng, batch, heads, groups, lq, lk, depth, width):
    """Normal numbers that every storage holds exactly."""
    shapes = {"q": (batch, heads, lq, depth), "k": (batch, groups, lk, depth), "v": (batch, groups, lk, width)}
    return {n: rng.standard_normal(shape).astype(ml_dtypes.bfloat16).astype(np.float32) for n, shape in shapes.items()}


def run(spec, inputs):
    return cpu.run(api.build(spec, inputs, None, OUTPUTS))


@pytest.fixture
def poisoned(monkeypatch):
    """Memory that `decode` is handed out empty holds NaN; NumPy itself stays, for Numba knows its functions by it."""

    def filled(shape, dtype=float):
        array = np.empty(shape, dtype)
        array.view(np.uint8).fill(0xFF)
        return array

    other = ModuleType("numpy")
    other.__dict__.update(np.__dict__ | {"empty": filled})
    monkeypatch.setattr(decode, "np", other)
    monkeypatch.setattr(shares, "np", other)


@pytest.mark.parametrize("lk", [1, 15, 16, 17, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1025, 4100])
def test_edges_of_tiles_and_shares(lk, rng, poisoned):
    for stored in STORED:
        within(ra.SDPA(), qkv(rng, 1, 1, 1, 1, lk, 16, 16), stored=stored)
        within(ra.SDPA(), qkv(rng, 2, 4, 1, 1, lk, 40, 24), stored=stored)
    if lk >= 7:
        within(ra.SDPA(causal="bottom_right", window=(70, None)), qkv(rng, 1, 2, 2, 7, lk, 8, 8))


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(rows, stored, rng, poisoned):
    within(ra.SDPA(), qkv(rng, 1, 1, 1, rows, 513, 24, 40), stored=stored)
    within(ra.SDPA(), qkv(rng, 1, rows, 1, 1, 513, 40, 24), stored=stored)
    within(ra.SDPA(causal="bottom_right"), qkv(rng, 2, 2, 2, rows, 530, 5, 3), stored=stored)


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("depth", [1, 2, 15, 16, 17, 31, 32, 33, 64, 65, 128, 130, 257])
def test_widths_that_fill_no_line(depth, stored, rng, poisoned):
    for width in (1, 7, 16, 33, 48, 127, 240, 300):
        within(ra.SDPA(), qkv(rng, 1, 3, 1, 1, 70, depth, width), stored=stored)


def test_few_rows_are_taken_and_with_few_keys_fewer():
    assert decode.suits(4, 1)
    assert decode.suits(8, 128)
    assert decode.suits(16, 512)
    assert not decode.suits(16, 511)
    assert not decode.suits(17, 1 << 20)


def test_no_keys(rng):
    found = run(ra.SDPA(), qkv(rng, 1, 2, 1, 1, 0, 8, 8))
    same(found["out"], np.zeros((1, 2, 1, 8), np.float32))
    same(found["lse"], np.full((1, 2, 1), -np.inf, np.float32))


@pytest.mark.parametrize("share", [1, 2, 4, 8])
def test_heads_that_share_keys(share, rng, poisoned):
    inputs = qkv(rng, 2, 2 * share, 2, 2, 600, 16, 16)
    within(ra.SDPA(causal="bottom_right", bias=ra.ALiBi()), inputs)
    table = {"t5_table": rng.standard_normal((32, 2 * share)).astype(np.float32)}
    within(ra.SDPA(bias=ra.T5()), inputs | table)
    within(ra.SDPA(), inputs | {"sink": rng.standard_normal(2 * share).astype(np.float32)})
    bias = rng.standard_normal((2, 2 * share, 2, 600)).astype(np.float32)
    within(ra.SDPA(), inputs | {"bias": bias})


OPTIONS = {
    "slopes": (ra.SDPA(bias=ra.ALiBi()), ()),
    "table": (ra.SDPA(bias=ra.T5()), ("t5_table",)),
    "dense": (ra.SDPA(causal="bottom_right"), ("bias",)),
    "of a key": (ra.SDPA(), ("key bias",)),
    "of a row": (ra.SDPA(), ("row bias",)),
    "mask": (ra.SDPA(), ("mask",)),
    "mask of heads": (ra.SDPA(), ("head mask",)),
    "segments": (ra.SDPA(), ("q_segment_ids", "k_segment_ids")),
    "positions": (ra.SDPA(causal="top_left", bias=ra.ALiBi()), ("q_positions", "k_positions")),
    "softcap": (ra.SDPA(softcap=2.5), ()),
    "negative scale": (ra.SDPA(scale=-0.75, softcap=1.5), ()),
    "scale 0": (ra.SDPA(scale=0.0), ("bias",)),
    "window": (ra.SDPA(window=(33, 20)), ()),
    "all": (
        ra.SDPA(causal="bottom_right", window=(1500, None), softcap=5.0, bias=(ra.ALiBi(), ra.T5())),
        ("t5_table", "bias", "mask", "sink", "q_segment_ids", "k_segment_ids"),
    ),
}


def extras(rng, heads, lq, lk):
    """What the options read; every row sees a key."""
    mask = rng.random((lq, lk)) < 0.5
    mask[:, lk - lq :] |= np.eye(lq, dtype=bool)
    mask[:, 128:256] = False
    places = rng.permutation(lk)
    real = {
        "t5_table": rng.standard_normal((32, heads)),
        "bias": np.where(mask, rng.standard_normal((heads, lq, lk)), -np.inf),
        "key bias": rng.standard_normal((heads, 1, lk)),
        "row bias": rng.standard_normal((lq, 1)),
        "sink": rng.standard_normal(heads),
    }
    whole = {
        "mask": mask,
        "head mask": np.stack([mask[:, ::-1]] * heads) | np.eye(1, lk, dtype=bool),
        "q_segment_ids": np.full(lq, lk // 200),
        "k_segment_ids": np.arange(lk) // 200,
        "q_positions": places[:lq] + 1,
        "k_positions": places,
    }
    return {n: a.astype(np.float32) for n, a in real.items()} | whole


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("lq", "lk"), [(1, 1300), (3, 1111), (2, 70)])
def test_each_option_over_several_shares(name, lq, lk, rng, poisoned):
    spec, names = OPTIONS[name]
    given = extras(rng, 4, lq, lk)
    chosen = {{"key bias": "bias", "row bias": "bias", "head mask": "mask"}.get(n, n): given[n] for n in names}
    within(spec, qkv(rng, 1, 4, 2, lq, lk, 24, 8) | chosen)


def test_lengths(rng, poisoned):
    lengths = np.array([0, 1, 63, 64, 512, 513, 1100])
    inputs = qkv(rng, 7, 2, 1, 2, 1100, 8, 8) | {"kv_lengths": lengths, "q_lengths": np.array([2, 1, 0, 2, 1, 2, 2])}
    found = within(ra.SDPA(), inputs)
    assert not found["out"][[0, 2]].any()
    assert not found["out"][1, :, 1].any()
    assert np.isneginf(found["lse"][[0, 2]]).all()
    within(ra.SDPA(), inputs | {"sink": np.ones(2, np.float32)})


def test_a_row_that_sees_nothing_is_not_made_twice(rng):
    mask = np.ones((2, 600), bool)
    mask[0] = False
    found = within(ra.SDPA(), qkv(rng, 1, 2, 1, 2, 600, 8, 8) | {"mask": mask})
    assert not found["out"][:, :, 0].any()
    assert np.isneginf(found["lse"][:, :, 0]).all()


@pytest.mark.parametrize("dtype", STORED)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", "qkv")
def test_what_is_not_finite_reaches_the_rows_that_see_it(name, bad, dtype, rng):
    inputs = {n: a.astype(dtype) for n, a in qkv(rng, 1, 2, 2, 2, 600, 24, 24).items()}
    spec = ra.SDPA(causal="bottom_right")
    clean = run(spec, inputs)
    inputs[name][0, 0, -1, 3] = bad
    found = run(spec, inputs)["out"].astype(dtype)
    assert np.isnan(found[0, 0, 1]).any()
    same(found[0, 0, 0], clean["out"][0, 0, 0])
    same(found[0, 1], clean["out"][0, 1])


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38])
@pytest.mark.parametrize("hidden", ["mask", "bias", "k_segment_ids", "kv_lengths", "causal"])
def test_what_a_masked_slot_holds_does_not_matter(hidden, bad, rng):
    inputs, slots = qkv(rng, 1, 4, 2, 1, 600, 24, 24), slice(580, 600)
    seen = np.ones(600, bool)
    seen[slots] = False
    inputs |= {
        "mask": {"mask": seen},
        "bias": {"bias": np.where(seen, np.float32(0.5), np.float32(-np.inf))},
        "k_segment_ids": {"k_segment_ids": seen.astype(int), "q_segment_ids": np.ones(1, int)},
        "kv_lengths": {"kv_lengths": np.array([580])},
        "causal": {"q_positions": np.array([579]), "k_positions": np.arange(600)},
    }[hidden]
    spec = ra.SDPA(causal="top_left") if hidden == "causal" else ra.SDPA()
    clean = run(spec, inputs)
    for name in "kv":
        dirty = inputs[name].copy()
        dirty[0, :, slots] = bad
        found = run(spec, inputs | {name: dirty})
        for n in OUTPUTS:
            same(found[n], clean[n])
        if name == "k":
            problem = api.build(spec, inputs | {name: dirty}, None, OUTPUTS)
            assert not fast.run(problem.score, inputs["q"], dirty, inputs["v"])[2].any()


def test_products_that_overflow_are_made_again(rng):
    inputs = qkv(rng, 1, 1, 1, 1, 70, 16, 16)
    inputs["k"][0, 0, 69] = -np.copysign(np.float32(3e38), inputs["q"][0, 0, 0])
    assert np.isnan(run(ra.SDPA(), inputs)["out"]).all()


def test_keys_that_no_row_sees_are_not_read(rng):
    inputs = qkv(rng, 1, 2, 1, 1, 1300, 16, 16)
    inputs["k"][0, 0, :1024] = inputs["v"][0, 0, :1024] = np.nan
    problem = api.build(ra.SDPA(causal="bottom_right", window=(200, None)), inputs, None, OUTPUTS)
    assert not fast.run(problem.score, *(inputs[n] for n in "qkv"))[2].any()


@pytest.mark.parametrize(("heads", "groups", "lk"), [(4, 2, 5000), (1, 1, 131072)])
def test_threads_share_out_tasks_and_change_no_bit(heads, groups, lk, rng, monkeypatch):
    monkeypatch.setattr(pool, "_SMALL", 0)
    inputs = qkv(rng, 1, heads, groups, 1, lk, 24, 40)
    found = []
    for threads, _ in itertools.product(("1", "2", "3"), range(3)):
        monkeypatch.setenv(pool.VARIABLE, threads)
        found.append(run(ra.SDPA(), inputs))
    for other, n in itertools.product(found[1:], OUTPUTS):
        same(other[n], found[0][n])


def test_one_long_sequence_has_several_shares_and_many_have_one_each():
    assert -(-131072 // shares.share_of(1, 131072)) >= 16
    assert shares.share_of(4096, 1000) >= 1000
    for heads, lk in itertools.product((1, 8, 33), (1, 700, 99999)):
        assert shares.share_of(heads, lk) % work.KEYS == 0


@pytest.mark.parametrize("cpu_name", ["haswell", "x86-64"])
def test_shorter_vectors_give_results_within_the_bound(cpu_name, tmp_path):
    if not (hasattr(os, "uname") and os.uname().machine == "x86_64"):
        pytest.skip("the processor is no x86-64")
    script = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import ml_dtypes, numpy as np, refattn as ra, test_decode_kernels as t\n"
        "rng = np.random.default_rng(0)\n"
        "for rows in (1, 2, 4, 7):\n"
        "    t.within(ra.SDPA(softcap=3.0), t.qkv(rng, 1, rows, 1, 1, 530, 37, 21))\n"
        "    x = t.qkv(rng, 1, rows, 1, 1, 530, 37, 21)\n"
        "    t.within(ra.SDPA(bias=ra.ALiBi()), x, stored=ml_dtypes.bfloat16)\n"
        "print(t.jit.lanes())"
    )
    environment = os.environ | {"NUMBA_CPU_NAME": cpu_name, "NUMBA_CPU_FEATURES": "", "NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == {"haswell": "8\n", "x86-64": "4\n"}[cpu_name]


def test_the_kernel_is_stamped_with_what_it_calls():
    closed = {cell.cell_contents for cell in decode.kernel(jit.lanes(), 0).py_func.__closure__}
    assert jit.stamp(blocks, columns, lines, dots, shares, sight, tiles, tuples, vectors, work) in closed
