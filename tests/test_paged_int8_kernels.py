"""The decode kernel on keys and values where a cache keeps them: in pages, in integers with scales, or both."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from checks import OUTPUTS, same
from test_decode_kernels import STORED, extras, qkv

import refattn as ra
from refattn import api, unread
from refattn.bound import BoundSpace
from refattn.engines import cpu
from refattn.engines.cpu import blocks, fast, pool, storage
from refattn.plan import keys
from refattn.profiles import FLOAT32

SCALES = {"a token": (2, 2, -1), "a head": (1, 2, 1), "a sequence": (2, 1, 1), "a key": (-1,), "all": ()}


def integers(rng, inputs, shape=(2, 2, -1)):
    """The inputs with int8 keys and values, and scales whose −1 is the number of keys."""
    lk, found = inputs["k"].shape[2], dict(inputs)
    for n in "kv":
        found[n] = rng.integers(-128, 128, inputs[n].shape, np.int8)
        found[f"{n}_scale"] = np.asarray((0.5 + rng.random([lk if s < 0 else s for s in shape])) / 64, np.float32)
    return found


def paged(rng, inputs, size, lengths):
    """The inputs in pages out of order among others; whatever is beyond a length, slots and entries, is nonsense."""
    batch, groups, lk, _ = inputs["k"].shape
    count = -(-lk // size)
    table, order = np.full((batch, count), -(2**40)), rng.permutation(batch * count + 2)
    for b, length in enumerate(lengths):
        used = -(-int(length) // size)
        table[b, :used] = order[b * count : b * count + used]
        table[b, used:] = [2**40, -1][b % 2]
    found = dict(inputs) | {"block_table": table, "kv_lengths": np.asarray(lengths)}
    for n in {"k", "v", "k_scale", "v_scale"} & set(inputs):
        whole = inputs[n] if n in "kv" else np.broadcast_to(inputs[n], inputs["k"].shape[:3])
        odd = 77 if whole.dtype == np.int8 else np.nan
        found[n] = np.full((len(order), groups, size, *whole.shape[3:]), odd, whole.dtype)
        for b, length in enumerate(lengths):
            for j in range(int(length)):
                found[n][table[b, j // size], :, j % size] = whole[b, :, j]
    return found


def problem(spec, inputs):
    return api.build(spec, inputs, None, OUTPUTS)


def alone(checked):
    """What the kernel gives from where keys and values stand; no row of it is made again."""
    plan = unread.plan(checked)
    assert blocks.packed(plan)
    assert fast.takes(plan)
    assert fast.few(plan, plan.q.shape[1] // plan.k.shape[1] * plan.q.shape[2], keys(plan))
    q, k, v = (np.ascontiguousarray(getattr(plan, n)) for n in "qkv")
    out, lse, redo = fast.run(plan, storage.widened(q), k, v)
    assert not redo.any()
    return {"out": out, "lse": lse}


def bounded(checked):
    """The kernel alone, inside the bound of each element."""
    found = alone(checked)
    with np.errstate(invalid="ignore"):
        expected = checked.evaluate(BoundSpace(FLOAT32).real)
    for n in OUTPUTS:
        live = ~np.isneginf(expected[n].x)
        same(np.isneginf(found[n]), ~live)
        assert (np.abs(found[n][live] - expected[n].x[live]) <= expected[n].e[live]).all(), n
    return found


def cut(inputs, lengths):
    return dict(inputs) | {"kv_lengths": np.asarray(lengths)}


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("size", [1, 3, 16, 64, 65, 130])
def test_pages_give_the_bits_of_a_row(size, stored, rng):
    for lq, lk in ((1, 590), (3, 131), (7, 400)):
        inputs = qkv(rng, 6, 4, 2, lq, lk, 24, 40) | {"sink": rng.standard_normal(4).astype(np.float32)}
        inputs |= {n: inputs[n].astype(stored) for n in "kv"}
        lengths = [0, 1, min(size, lk), min(size + 1, lk), lk - 1, lk]
        spec = ra.SDPA(causal="top_left", paged=True, bias=ra.ALiBi())
        inputs["q_positions"] = np.arange(lk - lq, lk)
        found = alone(problem(spec, paged(rng, inputs, size, lengths)))
        row = ra.SDPA(causal="top_left", bias=ra.ALiBi())
        expected = fast.run(unread.plan(problem(row, cut(inputs, lengths))), *(inputs[n] for n in "qkv"))
        same(found["out"], expected[0])
        same(found["lse"], expected[1])


@pytest.mark.parametrize("rows", range(1, 17))
def test_every_number_of_rows(rows, rng):
    for size, lengths in ((27, [513, 130]), (65, [200, 512])):
        heads = qkv(rng, 2, 2 * rows, 2, 1, 513, 37, 70)
        for inputs in (heads, qkv(rng, 2, 2, 2, rows, 513, 37, 70)):
            whole = integers(rng, inputs)
            spec = {"causal": "bottom_right", "kv": "int8"}
            expected = bounded(problem(ra.SDPA(**spec), cut(whole, lengths)))
            found = bounded(problem(ra.SDPA(paged=True, **spec), paged(rng, whole, size, lengths)))
            bounded(problem(ra.SDPA(paged=True), paged(rng, inputs, size, lengths)))
            if 513 % size == 0:
                same(found["out"], expected["out"])


@pytest.mark.parametrize("scales", SCALES)
@pytest.mark.parametrize("size", [None, 1, 3, 64])
def test_scales_of_every_shape(scales, size, rng):
    inputs = integers(rng, qkv(rng, 2, 4, 2, 2, 192, 65, 130), SCALES[scales])
    options = {"kv": "int8", "softcap": 3.0, "window": (150, None), "causal": "bottom_right"}
    expected = bounded(problem(ra.SDPA(**options), cut(inputs, [192, 100])))
    if size:
        found = bounded(problem(ra.SDPA(paged=True, **options), paged(rng, inputs, size, [192, 100])))
        for n in OUTPUTS:
            same(found[n], expected[n])


@pytest.mark.parametrize("depth", [1, 3, 4, 15, 16, 17, 63, 64, 65, 127, 128, 129, 257])
def test_widths_that_fill_no_line(depth, rng):
    for width in (1, 7, 64, 100, 193):
        bounded(problem(ra.SDPA(kv="int8"), integers(rng, qkv(rng, 2, 6, 2, 1, 70, depth, width))))


OPTIONS = {
    "slopes": (ra.ALiBi(), ()),
    "dense": ((), ("bias",)),
    "mask": ((), ("mask",)),
    "segments": ((), ("q_segment_ids", "k_segment_ids")),
    "sink": ((), ("sink",)),
    "table": (ra.T5(), ("t5_table",)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_each_option(name, rng):
    terms, names = OPTIONS[name]
    given = extras(rng, 4, 2, 1040)
    inputs = qkv(rng, 2, 4, 2, 2, 1040, 24, 8) | {n: given[n] for n in names}
    for kv, x in ((None, inputs), ("int8", integers(rng, inputs))):
        spec = {"bias": terms, "kv": kv, "softcap": 4.0}
        found = bounded(problem(ra.SDPA(paged=True, **spec), paged(rng, x, 16, [1040, 1040])))
        if kv:
            expected = bounded(problem(ra.SDPA(**spec), x))
            same(found["out"], expected["out"])


def test_a_scale_of_1_gives_the_bits_of_the_same_real_numbers(rng):
    inputs = integers(rng, qkv(rng, 2, 4, 2, 1, 300, 16, 24))
    inputs["q"] = np.rint(4 * inputs["q"])  # products of integers are exact in any order
    inputs |= {"k_scale": np.float32(1), "v_scale": np.float32(1)}
    found = alone(problem(ra.SDPA(kv="int8", scale=2.0**-9), inputs))
    real = {"q": inputs["q"]} | {n: inputs[n].astype(np.float32) for n in "kv"}
    out, lse, _ = fast.run(unread.plan(problem(ra.SDPA(scale=2.0**-9), real)), *(real[n] for n in "qkv"))
    same(found["out"], out)
    same(found["lse"], lse)


def test_sequences_that_share_a_page(rng):
    pages = qkv(rng, 5, 4, 2, 1, 16, 24, 24)
    table = np.array([[3, 1, 0], [3, 1, 4], [3, 3, 3]])
    row = {n: np.concatenate([pages[n][table[:, m]] for m in range(3)], 2) for n in "kv"} | {"q": pages["q"][:3]}
    lengths = {"kv_lengths": np.array([48, 47, 20])}
    found = bounded(problem(ra.SDPA(paged=True), row | {n: pages[n] for n in "kv"} | lengths | {"block_table": table}))
    expected = cpu.run(problem(ra.SDPA(), row | lengths))
    for n in OUTPUTS:
        same(found[n], expected[n])


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("size", [1, 7, 16])
def test_gradients_of_pages_are_those_of_a_row(size, kind, rng):
    lengths = np.array([40, 0, 33])
    row = {n: a.astype(kind) for n, a in qkv(rng, 3, 4, 2, 20, 40, 8, 8).items()}
    dout = {"out": rng.standard_normal((3, 4, 20, 8)).astype(kind)}
    inputs = paged(rng, row, size, lengths)
    found = ra.vjp(ra.SDPA(paged=True), inputs, dout, engine="cpu", wrt=("q", "k", "v"))
    expected = ra.vjp(ra.SDPA(), row | {"kv_lengths": lengths}, dout, engine="cpu", wrt=("q", "k", "v"))
    same(found["dq"], expected["dq"])
    for n in ("dk", "dv"):
        whole = np.zeros_like(found[n])
        for b, length in enumerate(lengths):
            for j in range(length):
                whole[inputs["block_table"][b, j // size], :, j % size] = expected[n][b, :, j]
        assert (found[n] == whole).all()


def test_gradients_of_a_page_that_sequences_share_add_up(rng):
    row = qkv(rng, 2, 2, 2, 5, 24, 8, 8)
    inputs = paged(rng, row, 8, np.array([24, 20]))
    inputs["block_table"][1, 0] = inputs["block_table"][0, 0]
    checked = problem(ra.SDPA(paged=True), inputs)
    cotangents = {"out": rng.standard_normal((2, 2, 5, 8)).astype(np.float32)}
    found = cpu.vjp(checked, cotangents, ("q", "k", "v"))
    expected = checked.differentiate(BoundSpace(FLOAT32).real, cotangents, ("q", "k", "v"))
    for n in ("dq", "dk", "dv"):
        assert (np.abs(found[n] - expected[n].x) <= expected[n].e).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
@pytest.mark.parametrize("size", [None, 16])
def test_a_scale_that_is_not_finite_reaches_the_rows_that_see_it_and_no_others(size, name, bad, rng):
    inputs = integers(rng, qkv(rng, 2, 4, 2, 2, 320, 24, 24))

    def run(x):
        x = paged(rng, x, size, [320, 320]) if size else x
        return problem(ra.SDPA(causal="bottom_right", kv="int8", paged=bool(size)), x)

    clean = cpu.run(run(inputs))
    dirty = inputs | {name: inputs[name].copy()}
    dirty[name][0, 0, -1] = bad
    found, expected = cpu.run(run(dirty)), run(dirty).evaluate(np.asarray)
    hit = np.zeros((2, 4, 2), bool)
    hit[0, :2, 1] = True
    same(np.isnan(found["out"]).all(-1), hit)
    same(np.isnan(found["lse"]), np.isnan(np.asarray(expected["lse"], np.float64)))
    same(found["out"][~hit], clean["out"][~hit])
    mask = np.arange(320) < 319
    same(alone(run(dirty | {"mask": mask}))["out"], alone(run(inputs | {"mask": mask}))["out"])


@pytest.mark.parametrize("lq", [1, 40])
@pytest.mark.parametrize("kv", [None, "int8", "bfloat16"])
def test_nan_in_unused_slots_makes_no_row_again(kv, lq, rng, monkeypatch):
    inputs = qkv(rng, 2, 4, 2, lq, 192, 24, 24)
    if kv == "bfloat16":
        inputs |= {n: a.astype(ml_dtypes.bfloat16) for n, a in inputs.items()}
    x = paged(rng, integers(rng, inputs) if kv == "int8" else inputs, 16, [100, 192])
    spec = ra.SDPA(paged=True, kv="int8" if kv == "int8" else None)
    seen, run = [], fast.run

    def told(plan, q, k, v):
        found = run(plan, q, k, v)
        seen.append((k.dtype, found[2].any()))
        return found

    monkeypatch.setattr(fast, "run", told)
    cpu.run(problem(spec, x))
    kind = {None: np.float32, "bfloat16": ml_dtypes.bfloat16, "int8": np.int8 if lq == 1 else np.float32}[kv]
    assert seen == [(np.dtype(kind), False)]


def test_what_lies_beyond_a_length_becomes_0_in_a_row(rng):
    inputs = integers(rng, qkv(rng, 2, 4, 2, 40, 65, 8, 8))
    plan = unread.plan(problem(ra.SDPA(paged=True, kv="int8"), paged(rng, inputs, 5, [0, 33])))
    row = blocks.in_a_row(plan, plan.k, plan.v)
    for n in "kv":
        found = getattr(row, n)
        assert found.dtype == np.float32
        assert not found[0].any()
        same(found[1, :, :33], (inputs[n] * inputs[f"{n}_scale"][..., None])[1, :, :33])
        assert not found[1, :, 33:].any()


@pytest.mark.parametrize("kv", [None, "int8"])
def test_threads_change_no_bit(kv, rng, monkeypatch):
    monkeypatch.setattr(pool, "_SMALL", 0)
    inputs = qkv(rng, 2, 4, 2, 1, 4096, 24, 40)
    x = paged(rng, integers(rng, inputs) if kv else inputs, 64, [4096, 3000])
    found = []
    for threads, _ in itertools.product(("1", "2", "3"), range(3)):
        monkeypatch.setenv(pool.VARIABLE, threads)
        found.append(alone(problem(ra.SDPA(paged=True, kv=kv), x)))
    for other, n in itertools.product(found[1:], OUTPUTS):
        same(other[n], found[0][n])


def test_what_is_repeated_of_a_scale_is_kept_once(rng):
    inputs = integers(rng, qkv(rng, 2, 4, 2, 1, 70, 8, 8), (1, 2, 1))
    kept = blocks.blocks(unread.plan(problem(ra.SDPA(kv="int8"), inputs)), 70)
    assert kept.k_scale.shape == (2,)
    same(kept.k_steps, np.array([0, 1, 0]))
