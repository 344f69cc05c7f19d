"""Every kernel of the forward pass in the simulator: every problem, odd shapes, several schedulers."""

import numpy as np
import pytest
from problems import PROBLEMS, Problem, Sizes, arrays
from simulating import run

import refattn as ra
from refattn import api
from refattn.bound import BoundSpace
from refattn.dtypes import round_to
from refattn.engines.cuda import operands
from refattn.engines.cuda.kernels.form import tiled
from refattn.plan import Dense, Score
from refattn.profiles import PROFILES

# Of two warps.
TILES = {"float32": {"rows": 16, "keys": 16, "threads": 64, "lanes": 8}, "bfloat16": {}, "float16": {}}
PROFILE = {"float32": "float32", "bfloat16": "flash-bf16", "float16": "flash-f16"}
WANT = ("out", "lse")


def checked(problem, inputs, dtype, **options):
    """Asserts that out and lse are within the published bound of each element of the exact result."""
    inputs = {n: round_to(a.astype(np.float64), dtype) if n in "qkv" else a for n, a in inputs.items()}
    built = api.build(problem.spec, inputs, None, WANT)
    plan = built.plan
    wide = {n: np.asarray(a, np.float64) if n in "qkv" else a for n, a in inputs.items()}
    expected = ra.evaluate(problem.spec, wide, want=WANT, dtype="float64")
    bounds = built.evaluate(BoundSpace(PROFILES[PROFILE[dtype]]).real)
    q, k, v = (inputs[n] for n in "qkv")
    if built.outline is None:
        q, k, v = (getattr(plan, n).astype(np.float32) for n in "qkv")
    out, lse = run(plan, q, k, v, **options)
    for n, found in (("out", out), ("lse", lse)):
        hidden = np.isneginf(expected[n])
        assert np.array_equal(np.isneginf(found), hidden), n
        off = np.abs(np.where(hidden, 0, found.astype(np.float64)) - np.where(hidden, 0, expected[n]))
        assert (off <= np.where(hidden, 0, bounds[n].e)).all(), (n, off.max())


def features(name):
    """What a kernel can tell a problem by; None of one that the engine does not take."""
    problem = PROBLEMS[name]
    if 0 in problem.sizes:
        return None
    plan = api.build(problem.spec, arrays(problem, np.random.default_rng(0))[0], None, WANT).plan
    if not isinstance(plan, Score) or operands.refuses(plan) is not None:
        return None
    given = (plan.sink, plan.lengths, plan.segments, plan.mask)
    each = [a.shape[0] > 1 for a in (*plan.positions, *(plan.segments or ()))]
    dense = [b.values.shape for b in plan.bias if isinstance(b, Dense)]
    shapes = problem.sizes, tuple(each), str(dense), plan.mask is not None and plan.mask.shape
    return operands.form_of(plan, "float32", False), shapes, plan.causal, plan.window, tuple(a is None for a in given)


# One of those that are the same to a kernel, whatever term they come from.
TAKEN = sorted({features(name): name for name in reversed(PROBLEMS) if features(name)}.values())


@pytest.mark.parametrize("name", TAKEN)
def test_every_problem_in_float32(name, rng):
    problem = PROBLEMS[name]
    checked(problem, arrays(problem, rng, np.float32)[0], "float32")


SIXTEEN = ("plain", "lengths around 16", "softcap", "sink", "ragged ALiBi", "biases of all kinds", "mask of nothing")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", SIXTEEN)
def test_problems_in_16_bits(name, dtype, rng):
    problem = PROBLEMS[name]
    checked(problem, arrays(problem, rng)[0], dtype)


CAUSAL = ra.SDPA(causal="bottom_right")
ODD = {
    "one row": (CAUSAL, Sizes(1, 2, 1, 1, 37, 5, 3)),
    "several tiles": (CAUSAL, Sizes(1, 2, 1, 37, 50, 20, 33)),
    "rows without keys": (CAUSAL, Sizes(1, 1, 1, 70, 20, 8, 16)),
    "a window": (ra.SDPA(causal="bottom_right", window=(5, None)), Sizes(1, 1, 1, 40, 61, 9, 8)),
}


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", PROFILE)
@pytest.mark.parametrize("name", ODD)
def test_odd_shapes_under_several_schedulers(name, dtype, seed, rng):
    spec, sizes = ODD[name]
    checked(Problem(spec, sizes), arrays(Problem(spec, sizes), rng)[0], dtype, seed=seed, **TILES[dtype])


FEW = {
    "one query of four heads": (CAUSAL, Sizes(2, 4, 1, 1, 61, 6, 5)),
    "three queries of two": (ra.SDPA(causal="bottom_right", window=(40, None)), Sizes(1, 4, 2, 3, 61, 8, 8)),
    "parts without keys": (CAUSAL, Sizes(1, 2, 2, 2, 20, 8, 8)),
}


@pytest.mark.parametrize("dtype", PROFILE)
@pytest.mark.parametrize("splits", [1, 3, 5])
@pytest.mark.parametrize("name", FEW)
def test_keys_in_parts(name, splits, dtype, rng):
    spec, sizes = FEW[name]
    checked(Problem(spec, sizes), arrays(Problem(spec, sizes), rng)[0], dtype, splits=splits, seed=splits)


PARTED = ("sink", "q_lengths", "kv_lengths", "ragged ALiBi", "nothing live, a sink", "biases of all kinds")


@pytest.mark.parametrize("name", PARTED)
def test_problems_with_keys_in_parts(name, rng):
    problem = PROBLEMS[name]
    checked(problem, arrays(problem, rng)[0], "float32", splits=2, keys=4, lanes=4, threads=64)


@pytest.mark.parametrize("splits", [0, 2])
@pytest.mark.parametrize("dtype", PROFILE)
def test_tiles_as_a_device_has_them(dtype, splits, rng):
    """Of the sizes that `tiled` chooses: two tiles of rows, the last with few of them, by two of keys."""
    problem = Problem(CAUSAL, Sizes(1, 1, 1, 3 if splits else 67, 70, 6, 5))
    inputs, _ = arrays(problem, rng)
    chosen = tiled(depth=6, width=5, storage=dtype, wide=False, split=splits > 0)
    sizes = {n: getattr(chosen, n) for n in ("rows", "keys", "threads", "lanes")}
    checked(problem, inputs, dtype, splits=splits, **sizes)


@pytest.mark.parametrize(("splits", "lq"), [(0, 19), (2, 2)])
@pytest.mark.parametrize("dtype", PROFILE)
def test_keys_in_blocks(dtype, splits, lq, rng):
    """The same bits as in a row; blocks out of order, what is not used full of NaN and of nonsense."""
    spec, sizes = CAUSAL, Sizes(2, 2, 1, lq, 28, 8, 8)
    x = {n: a.astype(dtype) for n, a in arrays(Problem(spec, sizes), rng)[0].items()}
    lengths, table = np.array([28, 9]), np.full((2, 7), -(2**40))
    blocks = {n: np.full((11, 1, 4, 8), np.nan, dtype) for n in "kv"}
    order = iter(rng.permutation(11))
    for b, m in [(b, m) for b, length in enumerate(lengths) for m in range(-(-length // 4))]:
        table[b, m] = next(order)
        for n in "kv":
            there = x[n][b, :, 4 * m : min(4 * m + 4, lengths[b])]
            blocks[n][table[b, m], :, : there.shape[1]] = there
    plan = api.build(spec, x | {"kv_lengths": lengths}, None, WANT).plan
    paged = x | blocks | {"block_table": table, "kv_lengths": lengths}
    paged_plan = api.build(ra.SDPA(causal="bottom_right", paged=True), paged, None, WANT).plan
    expected = run(plan, x["q"], x["k"], x["v"], splits=splits)
    found = run(paged_plan, x["q"], blocks["k"], blocks["v"], splits=splits)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert np.isfinite(found[0].astype(float)).all()


@pytest.mark.parametrize("dtype", PROFILE)
def test_rows_that_are_aligned_are_copied_16_bytes_at_a_time(dtype, rng):
    problem = Problem(CAUSAL, Sizes(1, 2, 1, 19, 35, 16, 8))
    checked(problem, arrays(problem, rng)[0], dtype, wide=True)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_that_lie_apart_are_read_where_they_are(dtype, rng):
    """As (B,L,H,D) and with room behind each row; the row is what is dense."""
    q, k, v = (rng.standard_normal((2, length, heads, 7)).astype(dtype) for length, heads in ((5, 4), (9, 2), (9, 2)))
    q, k, v = (a.swapaxes(1, 2)[..., :5] for a in (q, k, v))
    plan = api.build(CAUSAL, {"q": q, "k": k, "v": v}, None, WANT).plan
    expected = run(plan, *map(np.ascontiguousarray, (q, k, v)))
    for found, same in zip(run(plan, q, k, v), expected, strict=True):
        np.testing.assert_array_equal(found, same)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", "qkv")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_not_finite_spoils_the_rows_that_see_it(dtype, name, bad, rng):
    """The rules of docs/design.md: nothing of a pair that is masked, NaN where a live one is not finite."""
    problem = Problem(CAUSAL, Sizes(1, 2, 1, 20, 20, 8, 6))
    inputs, _ = arrays(problem, rng)
    inputs[name][0, 0, [3, 17], 2] = bad
    inputs = {n: round_to(a, dtype) for n, a in inputs.items()}
    wide = {n: a.astype(np.float64) for n, a in inputs.items()}
    expected = ra.evaluate(CAUSAL, wide, want=WANT)
    out, lse = run(api.build(CAUSAL, inputs, None, WANT).plan, *(inputs[n] for n in "qkv"))
    assert np.isnan(expected["out"]).any()
    np.testing.assert_allclose(out.astype(np.float64), expected["out"], atol=0.02)
    np.testing.assert_allclose(lse, expected["lse"], atol=1e-5)
