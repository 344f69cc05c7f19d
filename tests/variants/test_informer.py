"""Informer against numbers worked by hand, plain loops, exact attention, a plan built here, and complex step."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import plain_loops as loops
import pytest
from checks import near, same

import refattn as ra
from refattn import api
from refattn.case import Recipe
from refattn.engines.certified import ENCLOSED, EXACT
from refattn.errors import ShapeError, SpecError
from refattn.golden import inputs as recipes
from refattn.golden.build import build
from refattn.plan import Mix, Score, execute

SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "Lq": 7, "Lk": 7, "U": 4, "D": 3, "Dv": 2}
LAZY = [("mean", False), ("cumsum", True), ("cummean", True)]
SPECS = [
    ra.Informer(queries=3, measure=m, divisor=d, lazy=lazy, causal=causal)
    for m, d, (lazy, causal) in product(("max_mean", "lse_mean"), ("keys", "samples"), LAZY)
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.measure}-{s.divisor}-{s.lazy}")
ALL = ("out", "indices", "margin")


def arrays(rng, **changed):
    """Inputs, and cotangents of out and margin."""
    n = SIZES | changed
    shapes = {"q": ("Hq", "Lq", "D"), "k": ("Hkv", "Lk", "D"), "v": ("Hkv", "Lk", "Dv"), "out": ("Hq", "Lq", "Dv")}
    made = {name: rng.standard_normal((n["B"], *(n[d] for d in dims))) for name, dims in shapes.items()}
    duals = {"out": made.pop("out"), "margin": rng.standard_normal((n["B"], n["Hq"]))}
    return made | {"sample": rng.integers(0, n["Lk"], (n["Lq"], n["U"]))}, duals


def line(*numbers):
    return np.array(numbers, float).reshape(1, 1, -1, 1)


# Numbers worked by hand

# Four queries, three keys k = (1, 2, 4), each query measured by keys 0 and 2: products q and 4q, so the sum is 5q.
# M = max − 5q/3: q = 3 gives 12 − 5 = 7, q = −3 gives −3 + 5 = 2, q = 6 gives 24 − 10 = 14, q = 0 gives 0.
BY_HAND = {"q": line(3, -3, 6, 0), "k": line(1, 2, 4), "v": line(3, 6, 12), "sample": np.array([[0, 2]] * 4)}


def test_the_measure_divides_by_the_keys_and_ranks_by_it():
    found = ra.evaluate(ra.Informer(queries=2, scale=math.log(2)), BY_HAND, want=ALL)
    same(found.indices, np.array([[[2, 0]]]))
    near(found.margin, [[5.0]])
    # Row 0: weights 2^3, 2^6, 2^12 = 1 : 8 : 512; row 2: 2^6, 2^12, 2^24 = 1 : 64 : 2^18; the others the mean, 7.
    first = (3 + 8 * 6 + 512 * 12) / 521
    third = (3 + 64 * 6 + 2**18 * 12) / (65 + 2**18)
    near(found.out.ravel(), [first, 7, third, 7])


def test_the_measure_by_the_count_of_samples():
    """M = max − 5q/2: 4.5, 4.5, 9, 0. Rows 0 and 1 tie, and the lower index is chosen, by balls as well."""
    spec = ra.Informer(queries=2, divisor="samples")
    for engine in ("reference", "certified"):
        found = ra.evaluate(spec, BY_HAND, want=ALL, engine=engine)
        same(found.indices, np.array([[[2, 0]]]))
        near(found.margin, [[0.0]])


def test_the_log_sum_exp_measure_is_of_scaled_products():
    """Scale ln 2: M = log(2^q + 2^4q) − (5q/3) ln 2, about 14, 7, 2 and 1 times ln 2 for q = 6, 3, −3 and 0."""
    found = ra.evaluate(ra.Informer(queries=3, measure="lse_mean", scale=math.log(2)), BY_HAND, want=ALL)
    m = [math.log(2.0**q + 2.0 ** (4 * q)) - 5 * q / 3 * math.log(2) for q in (3, -3, 6, 0)]
    assert sorted(m, reverse=True) == [m[2], m[0], m[1], m[3]]
    same(found.indices, np.array([[[2, 0, 1]]]))
    near(found.margin, [[m[1] - m[3]]])


@pytest.mark.parametrize(("lazy", "expected"), [("cumsum", [3, 9, 21]), ("cummean", [3, 4.5, 7])])
def test_what_is_not_chosen_in_the_causal_form(lazy, expected):
    """Queries 0, 0, 1: the last is chosen and sees all keys, 2 : 4 : 16 by scale ln 2."""
    x = BY_HAND | {"q": line(0, 0, 1), "sample": np.array([[0, 2]] * 3)}
    found = ra.evaluate(ra.Informer(queries=1, causal=True, lazy=lazy, scale=math.log(2)), x, want=ALL)
    same(found.indices, np.array([[[2]]]))
    near(found.out.ravel(), [*expected[:2], (2 * 3 + 4 * 6 + 16 * 12) / 22])
    x["q"] = line(1, 0, 0)
    found = ra.evaluate(ra.Informer(queries=1, causal=True, lazy=lazy, scale=math.log(2)), x)
    near(found.out.ravel(), expected)


def test_a_key_drawn_twice_counts_twice():
    """Products 3, 3, 12 of sample (0, 0, 2): 12 − 18/3 = 6 for q = 3; 6·2 for q = 6; −3 + 18/3 = 3 for q = −3."""
    x = BY_HAND | {"sample": np.array([[0, 0, 2]] * 4)}
    near(ra.evaluate(ra.Informer(queries=1), x, want=("margin",)).margin, [[12.0 - 6.0]])
    near(ra.evaluate(ra.Informer(queries=2), x, want=("margin",)).margin, [[6.0 - 3.0]])


@pytest.mark.parametrize(("length", "factor", "u"), [(1, 5, 0), (2, 5, 2), (20, 1, 3), (21, 1, 4), (96, 5, 25)])
def test_the_default_count_of_queries(length, factor, u):
    """⌈ln 2⌉ = 1, ⌈ln 20⌉ = 3, ⌈ln 21⌉ = 4, ⌈ln 96⌉ = 5."""
    x = {"q": np.ones((1, 1, length, 1)), "k": line(1, 2, 4), "v": line(1, 2, 3), "sample": np.zeros((length, 2), int)}
    assert ra.evaluate(ra.Informer(factor=factor), x, want=("indices",)).indices.shape == (1, 1, u)


# Plain loops


def plainly(spec, x, dout):
    """out, indices, margin and the gradients of out, in lists: every row of plain attention, or sums of values."""
    q, k, v, sample = (x[n].tolist() for n in ("q", "k", "v", "sample"))
    scale, (lq, lk) = 3**-0.5, (len(sample), len(k[0][0]))
    count = lk if spec.divisor == "keys" else len(sample[0])
    chosen, margin = {}, np.zeros(x["q"].shape[:2])
    for b, h in np.ndindex(margin.shape):
        m = []
        for i in range(lq):
            p = [loops.dot(q[b][h][i], k[b][h // 2][j]) for j in sample[i]]
            if spec.measure == "max_mean":
                m.append(max(p) - math.fsum(p) / count)
            else:
                p = [scale * one for one in p]
                m.append(math.log(math.fsum(map(math.exp, p))) - math.fsum(p) / count)
        order = sorted(range(lq), key=lambda i, m=m: (-m[i], i))
        chosen[b, h] = order[: spec.queries]
        margin[b, h] = m[order[spec.queries - 1]] - m[order[spec.queries]]
    kept = np.zeros(dout.shape)
    for (b, h), order in chosen.items():
        kept[b, h, order] = dout[b, h, order]
    seen = (lambda b, h, i, j: j <= i) if spec.causal else (lambda *_: True)
    found = loops.attention(q, k, v, kept.tolist(), scale=scale, sees=seen)
    for b, h, i in np.ndindex(dout.shape[:3]):
        if i in chosen[b, h]:
            continue
        sees = [j for j in range(lk) if seen(b, h, i, j)]
        share = 1.0 if spec.lazy == "cumsum" else 1 / len(sees)
        for d in range(dout.shape[3]):
            found["out"][b][h][i][d] = share * math.fsum(v[b][h // 2][j][d] for j in sees)
            for j in sees:
                found["dv"][b][h // 2][j][d] += share * dout[b, h, i, d]
    indices = np.array([[chosen[b, h] for h in range(margin.shape[1])] for b in range(margin.shape[0])])
    return {n: np.array(found[n]) for n in ("out", "dq", "dk", "dv")} | {"indices": indices, "margin": margin}


@EVERY
def test_against_plain_loops(spec, rng):
    x, duals = arrays(rng)
    expected = plainly(spec, x, duals["out"])
    found = dict(ra.evaluate(spec, x, want=ALL)) | dict(ra.vjp(spec, x, {"out": duals["out"]}))
    same(found.pop("indices"), expected.pop("indices"))
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        near(found[name], value, 1e-11)


@EVERY
def test_the_certified_engine_finds_the_same(spec, rng):
    x, _ = arrays(rng)
    expected, found = (ra.evaluate(spec, x, want=ALL, engine=e) for e in ("reference", "certified"))
    same(found.indices, expected.indices)
    assert (found.status["indices"] == EXACT).all()
    for name in ("out", "margin"):
        near(found[name], expected[name])
        assert (found.status[name] != ENCLOSED).all()


# Identities


@pytest.mark.parametrize("spec", SPECS[:6], ids=lambda s: f"{s.divisor}-{s.lazy}")
def test_all_queries_chosen_is_exact_attention(spec, rng):
    x, duals = arrays(rng)
    whole = ra.Informer(queries=7, divisor=spec.divisor, lazy=spec.lazy, causal=spec.causal)
    exact = ra.SDPA(causal=spec.causal)
    near(ra.evaluate(whole, x).out, ra.evaluate(exact, {n: x[n] for n in "qkv"}).out, 0)
    near(ra.evaluate(whole, x, want=("margin",)).margin, np.zeros((2, 4)))
    expected = ra.vjp(exact, {n: x[n] for n in "qkv"}, {"out": duals["out"]})
    for name, value in ra.vjp(whole, x, duals).items():
        near(value, expected[name])


@pytest.mark.parametrize("divisor", ["keys", "samples"])
def test_every_key_sampled_once_gives_the_paper_s_measure(divisor, rng):
    """log Σ_j exp s_j is attention's own lse, and the mean product is that with the mean key."""
    x, _ = arrays(rng, Lq=5, U=7)
    x["sample"] = np.array([rng.permutation(7) for _ in range(5)])
    qkv = {n: x[n] for n in "qkv"}
    mean = np.einsum("bhid,bhd->bhi", x["q"], np.repeat(x["k"].mean(2), 2, 1)) * 3**-0.5
    m = ra.evaluate(ra.SDPA(), qkv, want=("lse",)).lse - mean
    order = np.argsort(-m, axis=-1)
    found = ra.evaluate(ra.Informer(queries=2, measure="lse_mean", divisor=divisor), x, want=ALL)
    same(found.indices, order[..., :2])
    ranked = np.take_along_axis(m, order, -1)
    near(found.margin, ranked[..., 1] - ranked[..., 2], 1e-11)


def test_scaling_the_queries_of_a_head_changes_no_choice(rng):
    x, _ = arrays(rng)
    spec = ra.Informer(queries=3)
    one, two = (ra.evaluate(spec, x | {"q": c * x["q"]}, want=ALL) for c in (1.0, 8.0))
    same(one.indices, two.indices)
    near(two.margin, 8 * one.margin)


@EVERY
def test_a_plan_that_computes_every_row_means_the_same(spec, rng):
    """Scores for the chosen rows and, with queries of 0, the mean of what a row sees, mixed by 0 and 1."""
    x, _ = arrays(rng)
    found = ra.evaluate(spec, x, want=ALL)
    chosen = np.zeros((2, 4, 7, 1))
    np.put_along_axis(chosen, found.indices[..., None], 1.0, 2)
    at = np.arange(7)[None]
    score = {"k": x["k"], "v": x["v"], "scale": 3**-0.5, "positions": (at, at), "causal": spec.causal}
    parts = (Score(q=x["q"], **score), Score(q=0 * x["q"], **score))
    times = np.arange(1.0, 8)[:, None] if spec.lazy == "cumsum" else 1.0
    near(found.out, execute(Mix(parts=parts, weights=(chosen, (1 - chosen) * times)))["out"])


# Gradients by what shares nothing with the tape


@EVERY
def test_gradients_by_complex_step(spec, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape; margin included."""
    x, duals = arrays(rng)
    problem = api.build(spec, x, "float64", ("out",))
    gradients = ra.vjp(spec, x, duals)
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.variant.reference(problem.spec, x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-11)


def test_queries_that_are_not_chosen_have_no_gradient(rng):
    x, duals = arrays(rng)
    spec = ra.Informer(queries=2)
    dq, indices = ra.vjp(spec, x, {"out": duals["out"]}).dq, ra.evaluate(spec, x, want=("indices",)).indices
    touched = np.any(dq != 0, -1)
    assert touched.sum() == indices.size
    assert np.take_along_axis(touched, indices, -1).all()


# What is not finite


@pytest.mark.parametrize(("lazy", "causal"), LAZY)
def test_a_nan_among_the_values_reaches_the_rows_that_read_it(lazy, causal, rng):
    x, duals = arrays(rng)
    spec = ra.Informer(queries=3, lazy=lazy, causal=causal)
    clean, gradient = ra.evaluate(spec, x).out, ra.vjp(spec, x, {"out": duals["out"]})
    x["v"][1, 0, 4, 1] = np.nan
    found = ra.evaluate(spec, x).out
    hit = np.zeros(found.shape, bool)
    hit[1, :2, 4 * causal :, 1] = True
    assert np.isnan(found[hit]).all()
    near(found[~hit], clean[~hit], 0)
    found, rows = ra.vjp(spec, x, {"out": duals["out"]}), ra.evaluate(spec, x, want=("indices",)).indices[1, :2]
    near(found.dv, gradient.dv)
    spoiled = np.zeros((2, 4, 7), bool)
    np.put_along_axis(spoiled[1, :2], rows, hit[1, :2].any(-1)[0][rows], -1)
    same(np.isnan(found.dq).any(-1), spoiled)
    near(found.dq[~spoiled], gradient.dq[~spoiled])


@pytest.mark.parametrize("name", ["q", "k"])
def test_queries_without_a_rank_are_refused(name, rng):
    x, _ = arrays(rng)
    x[name][0, 0, 0, 0] = np.inf
    with pytest.raises(ShapeError, match=f"{name} must hold finite numbers, for queries are ranked"):
        ra.evaluate(ra.Informer(), x)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"measure": "max"}, "measure is one of 'max_mean', 'lse_mean'; given: 'max'"),
        ({"divisor": None}, "divisor is one of 'keys', 'samples'; given: None"),
        ({"lazy": "sum"}, "lazy is one of 'mean', 'cumsum', 'cummean'; given: 'sum'"),
        ({"lazy": "cumsum"}, "with causal=False lazy is 'mean'; given: 'cumsum'"),
        ({"causal": True}, r"with causal=True lazy is 'cumsum' \(the authors' code\) or 'cummean'; given: 'mean'"),
        ({"causal": "top_left"}, "causal is False or True; given: 'top_left'"),
        ({"factor": 0}, "factor is a positive integer; given: 0"),
        ({"factor": 2.5}, "factor is a positive integer; given: 2.5"),
        ({"queries": -1}, "queries is a count of queries, or None; given: -1"),
        ({"queries": True}, "queries is a count of queries, or None; given: True"),
        ({"scale": math.nan}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Informer(**options)


def test_lengths_that_do_not_fit(rng):
    x, _ = arrays(rng, Lk=9)
    with pytest.raises(SpecError, match="causal=True needs as many queries as keys; given: Lq=7, Lk=9"):
        ra.evaluate(ra.Informer(causal=True, lazy="cumsum"), x)
    with pytest.raises(SpecError, match="queries counts some of the Lq=7 queries; given: 8"):
        ra.evaluate(ra.Informer(queries=8), x)
    with pytest.raises(ShapeError, match=r"(?s)sample has Lq=6, but .* Lq=7.*sample \(Lq, U\) int"):
        ra.evaluate(ra.Informer(), x | {"sample": np.zeros((6, 4), int)})
    with pytest.raises(ShapeError, match="sample must lie between 0 and Lk - 1 = 8"):
        ra.evaluate(ra.Informer(), x | {"sample": np.full((7, 4), 9)})


# The golden cases


CASES = {case.name: case for case in ra.variants()["informer"].cases()}


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("lse_mean", {"measure": "max_mean"}),
        ("divisor_decides", {"divisor": "samples"}),
        ("causal_cummean", {"divisor": "keys"}),
    ],
)
def test_a_case_chooses_otherwise_by_another_measure_or_divisor(name, other):
    case = CASES[f"informer/{name}"]
    one, two = (
        ra.evaluate(s, recipes.inputs(case), want=("indices",)) for s in (case.spec, replace(case.spec, **other))
    )
    assert not np.array_equal(one.indices, two.indices)


def test_a_choice_within_a_kernel_s_error_makes_no_case():
    """Equal queries of equal samples tie: balls decide that, but no kernel in float32 must."""
    case = CASES["informer/mean"]
    equal = {"q": Recipe(kind="constant", value=1.0), "sample": Recipe(kind="constant", value=2.0)}
    with pytest.raises(SpecError, match="a choice in this informer problem hangs on less than what"):
        build(replace(case, inputs=equal))


def test_operations_count_the_sample_and_the_chosen_rows():
    """2 B Hq (Lq U D + u Lk (D + Dv)); B Hq u Lk doubles of scores."""
    told = ra.explain(ra.Informer(queries=3), SIZES)
    assert told["operations"] == 2 * 2 * 4 * (7 * 4 * 3 + 3 * 7 * 5)
    assert told["score_matrix_bytes"] == 8 * 2 * 4 * 3 * 7
    assert told["plan"].startswith("informer has no plan: a plan has no rows chosen by rank")
    assert told["engines"]["cpu"] == told["plan"]
