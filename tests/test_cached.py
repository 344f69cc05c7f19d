"""Caches that `refattn.extend` grows: decode reads them in place, and what it leaves out by their norms."""

import itertools

import ml_dtypes
import numpy as np
import pytest
from checks import OUTPUTS, same, within
from test_skipping import exact

import refattn as ra
from refattn import api
from refattn.cache import whole
from refattn.engines import cpu
from refattn.engines.cpu import cached, decode, fast, pool, remote, skipping
from refattn.engines.cpu.work import KEYS

UNIT = 2.0**-24


def falling(heads, **options):
    return ra.SDPA(bias=ra.ALiBi(slopes=(0.25, *[0.125] * (heads - 1))), **{"causal": "bottom_right"} | options)


AHEAD = {"q_positions": np.array([700]), "k_positions": np.arange(1500)}


def inputs_of(rng, heads=4, lk=1500, *, lq=1, depth=16, width=16, groups=None, kind=np.float32):
    shapes = {"q": (1, heads, lq, depth), "k": (1, groups or heads, lk, depth), "v": (1, groups or heads, lk, width)}
    return {n: rng.standard_normal(shape).astype(kind) for n, shape in shapes.items()}


def grown(inputs, *, by=None):
    """The inputs with k and v in buffers: half of them first, then `by` at a time."""
    found, lk = dict(inputs), inputs["k"].shape[2]
    edges = [0, lk // 2, *range(lk // 2 + (by or lk), lk, by or lk), lk]
    for n in "kv":
        cache = inputs[n][:, :, :0]
        for first, last in itertools.pairwise(edges):
            cache = ra.extend(cache, inputs[n][:, :, first:last], 2)
        found[n] = cache
    return found


def run(spec, inputs):
    return cpu.run(api.build(spec, inputs, None, OUTPUTS))


@pytest.fixture
def left(monkeypatch):
    """The tiles that were left out, one array for each call."""
    found = []

    def told(*given):
        found.append(remote.left_out(*given))
        return found[-1]

    monkeypatch.setattr(decode, "left_out", told)
    return found


def poison(array, tiles):
    """NaN behind the norms' back."""
    memory = whole(array, 2).memory
    for t, n in np.argwhere(tiles):
        memory[t // memory.shape[1], t % memory.shape[1], n * KEYS : (n + 1) * KEYS] = np.nan


KINDS = ["normal", "zero column", "zero at first", "large value", "long key", "grouped", "off centre", "rows", "ahead"]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_not_read_and_weighs_less_than_its_share(kind, rng, left):
    rows = {"rows": {"lq": 3}, "grouped": {"groups": 2}}.get(kind, {})
    inputs, spec = inputs_of(rng, **rows), falling(4)
    if kind == "zero column":
        inputs["v"][..., 3] = 0.0
    if kind == "zero at first":
        inputs["v"][:, :, :300] = 0.0
    if kind == "large value":
        inputs["v"][:, 0, 1250, 5] = 1e30
    if kind == "long key":
        inputs["k"][:, 0, 1250] *= 100.0
    if kind == "off centre":
        inputs["k"] += 5 * rng.standard_normal(inputs["k"].shape[-1]).astype(np.float32)
    if kind == "ahead":
        inputs, spec = inputs | AHEAD, falling(4, causal=False)
    cache = grown(inputs)
    found = run(spec, cache)
    (gone,) = left
    assert gone[0].mean() > 0.4
    if kind in {"large value", "long key"}:
        assert not gone[0, 1250 // KEYS]
        assert gone[0, 1250 // KEYS - 1] and gone[0, 1250 // KEYS + 1]
    if kind == "ahead":
        assert gone[0, :7].any() and gone[0, 15:].any()

    plan = api.build(spec, inputs, None, OUTPUTS).score
    by_key = np.repeat(gone, KEYS, -1)[:, : inputs["k"].shape[2]]
    hidden = np.repeat(by_key, len(plan.q[0]) // len(plan.k[0]), 0)[:, None, :]
    out, lse, size = exact(plan)
    less, less_lse, _ = exact(plan, hidden)
    assert (np.abs(less - out) <= skipping.EPSILON * 12 * UNIT * size).all()
    assert (np.abs(less_lse - lse) <= skipping.EPSILON * 4 * UNIT).all()
    # A value of 1e30 has a weight of 0 in float32 and not in float64.
    assert (np.abs(found["out"][0] - out) <= 60 * UNIT * (size + 1e-30)).all() or kind == "large value"
    assert (np.abs(found["lse"][0] - lse) <= 60 * UNIT * (1 + np.abs(lse))).all()

    for n in "kv":
        poison(cache[n], gone)
    again = run(spec, cache)
    for n in OUTPUTS:
        same(again[n], found[n])


@pytest.mark.parametrize("kind", [np.float32, ml_dtypes.bfloat16, np.float16])
@pytest.mark.parametrize("options", [{}, {"softcap": 3.0}, {"scale": -0.3}, {"window": (900, None)}, {"sink": True}])
def test_results_lie_inside_the_bound(options, kind, rng, left):
    inputs = {n: a.astype(np.float32) for n, a in inputs_of(rng, heads=6, groups=2, kind=kind).items()}
    if options == {"sink": True}:
        options, inputs = {}, inputs | {"sink": rng.standard_normal(6).astype(np.float32)}
    spec = falling(6, **options)
    within(spec, inputs, stored=kind)
    assert not left
    cache = grown(inputs | {n: inputs[n].astype(kind) for n in "kv"})
    within(spec, cache, alone=False)
    assert left[0].any()


@pytest.mark.parametrize("name", ["k", "v"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_far_number_that_is_not_finite_reaches_the_row(name, bad, rng, left):
    inputs = inputs_of(rng, heads=2)
    inputs[name][0, 0, 70, 2] = bad
    found, expected = run(falling(2), grown(inputs)), run(falling(2), inputs)
    assert left[0].any(1).all()
    assert not left[0][0, 1]
    for n in OUTPUTS:
        same(np.isnan(found[n]), np.isnan(expected[n]))
    assert np.isnan(found["out"][0, 0]).any()
    assert not np.isnan(found["out"][0, 1]).any()


def test_a_query_that_is_not_finite_leaves_nothing_out(rng, left):
    inputs = inputs_of(rng, heads=2)
    inputs["q"][0, 0, 0, 3] = np.nan
    assert np.isnan(run(falling(2), grown(inputs))["out"][0, 0]).all()
    assert not left[0][0].any()
    assert left[0][1].any()


def test_nothing_is_known_of_values_that_cancel(rng, left):
    inputs = inputs_of(rng, heads=1)
    inputs["k"][:], inputs["v"][:, :, 1::2] = 0.0, -inputs["v"][:, :, ::2]
    inputs["v"][..., 1:] = inputs["v"][..., :1]
    spec = ra.SDPA(causal="bottom_right", bias=ra.ALiBi(slopes=(2.0**-30,)))
    run(spec, grown(inputs))
    assert not left[0].any()


def test_a_far_key_that_weighs_most_is_read(rng):
    inputs = inputs_of(rng)
    inputs["k"][0, :, 40] = inputs["q"][0, :, 0] * 500.0
    found, (out, lse, _) = run(falling(4), grown(inputs)), exact(api.build(falling(4), inputs, None, OUTPUTS).score)
    np.testing.assert_allclose(found["out"][0], out, rtol=1e-5)
    np.testing.assert_allclose(found["lse"][0], lse, rtol=1e-6)


def test_lengths_of_their_own(rng, left):
    one = inputs_of(rng, heads=2)
    inputs = {n: np.repeat(a, 3, 0) for n, a in one.items()} | {"kv_lengths": np.array([1500, 700, 0])}
    inputs |= {"q_positions": np.array([[1499], [699], [0]]), "k_positions": np.arange(1500)}
    for n in "kv":
        inputs[n][1, :, 700:] = np.nan
    found = run(falling(2, causal="top_left"), grown(inputs))
    assert left[0].reshape(3, 2, -1)[:2, 0, :4].all()
    short = {"q": one["q"]} | {n: one[n][:, :, :700] for n in "kv"}
    for row, (out, lse, _) in enumerate(exact(api.build(falling(2), x, None, OUTPUTS).score) for x in (one, short)):
        np.testing.assert_allclose(found["out"][row], out, rtol=2e-5, atol=1e-6)
        np.testing.assert_allclose(found["lse"][row], lse, rtol=1e-6)
    same(found["out"][2], np.zeros_like(found["out"][2]))


def test_results_do_not_depend_on_what_was_asked_before(rng):
    """Nor on how the cache has grown, nor on threads: norms are functions of the numbers in the cache."""
    inputs = inputs_of(rng, heads=3)
    cache = grown(inputs, by=1)
    parts = {n: [cache[n][:, :, :lk] for lk in (600, 1000, 1500)] for n in "kv"}

    def at(n):
        return run(falling(3), {"q": inputs["q"], "k": parts["k"][n], "v": parts["v"][n]})

    last, middle, first = at(2), at(1), at(0)
    for lk, expected in ((600, first), (1000, middle), (1500, last)):
        fresh = grown({"q": inputs["q"]} | {n: inputs[n][:, :, :lk] for n in "kv"})
        for n in OUTPUTS:
            same(run(falling(3), fresh)[n], expected[n])


def test_threads_change_no_bit(rng, monkeypatch, left):
    monkeypatch.setattr(pool, "_SMALL", 0)
    inputs, found = inputs_of(rng, heads=3, lk=4000), []
    for threads, _ in itertools.product(("1", "2", "3"), range(3)):
        monkeypatch.setenv(pool.VARIABLE, threads)
        found.append(run(falling(3), grown(inputs)))
    for other, n in itertools.product(found[1:], OUTPUTS):
        same(other[n], found[0][n])
    assert left[0].any()


def test_a_whole_tile_is_measured_once(rng, monkeypatch):
    stretches, measure = [], cached.spread

    def told(kernel, arguments, *sizes):
        stretches.append(arguments[-2:])
        measure(kernel, arguments, *sizes)

    monkeypatch.setattr(cached, "spread", told)
    cache = grown(inputs_of(rng, heads=2, lk=640))
    for _ in range(66):
        run(falling(2), cache)
        new = inputs_of(rng, heads=2, lk=1)
        cache = {"q": new["q"]} | {n: ra.extend(cache[n], new[n], 2) for n in "kv"}
    assert stretches == [(0, 10)] * 4 + [(10, 11)] * 2  # the first row more moves both to larger buffers


def test_a_cache_is_read_without_a_copy(rng, monkeypatch):
    inputs = inputs_of(rng)
    cache, given, kernel = grown(inputs), [], decode.kernel

    def told(*options):
        return lambda x, *rest: (given.append((x.k.ctypes.data, x.v.ctypes.data)), kernel(*options)(x, *rest))

    monkeypatch.setattr(decode, "kernel", told)
    run(falling(4), cache)
    short = grown(inputs | {n: np.rint(30 * inputs[n]).astype(np.int8) for n in "kv"})
    run(ra.SDPA(kv="int8"), short | {"k_scale": np.float32(0.1), "v_scale": np.float32(0.1)})
    found = run(ra.SDPA(), cache)
    assert set(given) == {tuple(whole(x[n], 2).memory.ctypes.data for n in "kv") for x in (cache, short)}
    expected = run(ra.SDPA(), inputs)
    for n in OUTPUTS:
        same(found[n], expected[n])


@pytest.mark.parametrize("cut", [lambda a: a[:, :, 5:], lambda a: a[:, 1:], lambda a: a[..., ::-1]])
def test_another_part_of_a_cache_is_an_array_like_any(cut, rng, left):
    cache = grown(inputs_of(rng))
    parts = {n: cut(cache[n]) for n in "kv"} | {"q": cache["q"]}
    parts["q"] = parts["q"][:, -parts["k"].shape[1] :]
    plain = {n: np.array(a) for n, a in parts.items()}
    spec = falling(parts["q"].shape[1])
    found, expected = run(spec, parts), run(spec, plain)
    for n in OUTPUTS:
        same(found[n], expected[n])
    assert not left


def test_what_a_cache_holds_cannot_be_changed(rng):
    cache = grown(inputs_of(rng))
    with pytest.raises(ValueError, match="read-only"):
        cache["k"][0, 0, 0] = 1.0


@pytest.mark.parametrize("other", ["bias", "t5", "rising", "off", "integers"])
def test_where_nothing_is_left_out(other, rng, left, monkeypatch):
    inputs, spec = inputs_of(rng, heads=2), falling(2)
    if other == "bias":
        inputs["bias"] = rng.standard_normal((2, 1, 1500)).astype(np.float32)
    if other == "t5":
        spec = ra.SDPA(bias=(ra.ALiBi(), ra.T5()))
        inputs["t5_table"] = rng.standard_normal((32, 2)).astype(np.float32)
    if other == "rising":
        spec = ra.SDPA(bias=ra.ALiBi(slopes=(0.5, -0.001)))
    if other == "off":
        monkeypatch.setenv(skipping.VARIABLE, "0")
    if other == "integers":
        inputs |= {n: rng.integers(-9, 9, inputs[n].shape, np.int8) for n in "kv"}
        inputs |= {"k_scale": np.float32(0.1), "v_scale": np.float32(0.1)}
        spec = ra.SDPA(bias=ra.ALiBi(), kv="int8")
    found, expected = run(spec, grown(inputs)), run(spec, inputs)
    for n in OUTPUTS:
        same(found[n], expected[n])
    assert not left


def test_explain_says_what_decode_leaves_out():
    sizes = {"B": 1, "Hq": 8, "Hkv": 8, "Lq": 1, "Lk": 4096, "D": 64, "Dv": 64}
    assert "refattn.extend" in ra.explain(falling(8), sizes)["skipping"]["cpu"]
    assert "refattn.extend" not in ra.explain(falling(8), sizes | {"Lq": 4096})["skipping"]["cpu"]
    assert not ra.explain(ra.SDPA(), sizes)["skipping"]
    assert not ra.explain(falling(8), sizes | {"Lq": 20})["skipping"]


def test_no_row_is_made_again(rng):
    inputs = grown(inputs_of(rng))
    plan = api.build(falling(4), inputs, None, OUTPUTS).score
    assert not fast.run(plan, *(inputs[n] for n in "qkv"))[2].any()
