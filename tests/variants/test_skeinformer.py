"""Skeinformer against numbers worked by hand, plain loops, exact attention with mean keys, and complex step."""

import math
from itertools import product

import numpy as np
import plain_loops as loops
import pytest
from checks import near

import refattn as ra
from refattn import api
from refattn.engines.certified import ENCLOSED
from refattn.errors import ShapeError, SpecError

SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "Lq": 5, "Lk": 7, "P": 3, "C": 3, "D": 3, "Dv": 2}
SPECS = [
    ra.Skeinformer(normalisation=n, reuse_pilot=r) for n, r in product(("adaptive", "simple", "none"), (True, False))
]
EVERY = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda s: f"{s.normalisation}-{'pilot' if s.reuse_pilot else 'no pilot'}"
)
LENGTHS = pytest.mark.parametrize("lengths", [None, (7, 4), (0, 1)], ids=str)
BOTH = ("out", "column_scores")


def arrays(rng, lengths=None, **changed):
    """Inputs, and cotangents of both outputs."""
    n = SIZES | changed
    shapes = {"q": ("Hq", "Lq", "D"), "k": ("Hkv", "Lk", "D"), "v": ("Hkv", "Lk", "Dv")}
    shapes |= {"out": ("Hq", "Lq", "Dv"), "column_scores": ("Hq", "Lk")}
    made = {name: rng.standard_normal((n["B"], *(n[d] for d in dims))) for name, dims in shapes.items()}
    duals = {name: made.pop(name) for name in BOTH}
    made["pilot"] = rng.integers(0, n["Lq"], (n["B"], n["P"]))
    drawn = [[rng.permutation(n["Lk"])[: n["C"]] for _ in range(n["Hq"])] for _ in range(n["B"])]
    made["columns"] = np.array(drawn)
    return made if lengths is None else made | {"kv_lengths": np.array(lengths)}, duals


def line(*numbers):
    return np.array(numbers, float).reshape(1, 1, -1, 1)


# Numbers worked by hand

# Logits of query 1: ln 1, ln 2, ln 8, ln 16 (scale ln 2 times 0, 1, 3, 4); keys 0 and 3 drawn: γ = √(1·16) = 4.
BY_HAND = {
    "q": line(1, 2), "k": line(0, 1, 3, 4), "v": line(3, 6, 12, 24),
    "pilot": np.array([[1]]), "columns": np.array([[[0, 3]]]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("normalisation", "expected"),
    [
        ("adaptive", (1 * 3 + 16 * 24 + 4 * (6 + 12)) / (1 + 16 + 2 * 4)),
        ("simple", (1 * 3 + 16 * 24) / (1 + 16)),
        ("none", (1 * 3 + 16 * 24) / (1 + 2 + 8 + 16)),
    ],
)
def test_one_query_by_each_normalisation(normalisation, expected):
    spec = ra.Skeinformer(normalisation=normalisation, scale=math.log(2))
    exact = (1 * 3 + 4 * 6 + 64 * 12 + 256 * 24) / 325
    near(ra.evaluate(spec, BY_HAND).out.ravel(), [expected, exact])


def test_the_scores_of_the_columns():
    """Pilot rows 0, 0, 1: weights 1, 2, 8, 16 over 27, twice, and 1, 4, 64, 256 over 325; norms of the values."""
    x = BY_HAND | {"pilot": np.array([[0, 0, 1]]), "v": -BY_HAND["v"]}
    found = ra.evaluate(ra.Skeinformer(scale=math.log(2)), x, want=("column_scores",)).column_scores
    pairs = zip((1, 2, 8, 16), (1, 4, 64, 256), (3, 6, 12, 24), strict=True)
    near(found.ravel(), [math.sqrt(2 * (a / 27) ** 2 + (b / 325) ** 2) * v for a, b, v in pairs])


def test_a_shorter_sequence_and_a_column_beyond_it():
    """Of keys 0, 1, 2 only key 0 is drawn, for column 3 is padding: γ = 1, so the mean of 3, 6, 12."""
    x = BY_HAND | {"kv_lengths": np.array([3])}
    near(ra.evaluate(ra.Skeinformer(reuse_pilot=False, scale=math.log(2)), x).out.ravel(), [7.0, 7.0])


@pytest.mark.parametrize(("normalisation", "expected"), [("adaptive", 11.25), ("simple", 0.0), ("none", 0.0)])
def test_without_any_column(normalisation, expected):
    x = BY_HAND | {"columns": np.zeros((1, 1, 0), int)}
    near(ra.evaluate(ra.Skeinformer(normalisation=normalisation, reuse_pilot=False), x).out.ravel(), [expected] * 2)


# Plain loops


@EVERY
@LENGTHS
def test_against_plain_loops(spec, lengths, rng):
    x, _ = arrays(rng, lengths)
    q, k, v, columns, pilot = (x[n].tolist() for n in ("q", "k", "v", "columns", "pilot"))
    found = ra.evaluate(spec, x, want=BOTH)
    for b, h, i in np.ndindex(2, 4, 5):
        n, g = (7, 7)[b] if lengths is None else lengths[b], h // 2
        e = [math.exp(3**-0.5 * loops.dot(q[b][h][i], k[b][g][j])) for j in range(n)]
        drawn = {j for j in columns[b][h] if j < n}
        weight = {j: e[j] for j in drawn}
        if spec.reuse_pilot and i in pilot[b]:
            weight = dict(enumerate(e))
        elif spec.normalisation == "adaptive":
            weight |= dict.fromkeys(set(range(n)) - drawn, math.prod(e[j] for j in drawn) ** (1 / max(len(drawn), 1)))
        whole = math.fsum(weight.values())
        if spec.normalisation == "none" and not (spec.reuse_pilot and i in pilot[b]):
            whole = math.fsum(e)
        near(found.out[b, h, i], [
            math.fsum(w * v[b][g][j][d] for j, w in weight.items()) / (whole or 1.0) for d in range(2)
        ])  # fmt: skip
    for b, h, j in np.ndindex(2, 4, 7):
        n, g, squares = (7, 7)[b] if lengths is None else lengths[b], h // 2, 0.0
        for i in pilot[b] if j < n else ():
            e = [math.exp(3**-0.5 * loops.dot(q[b][h][i], k[b][g][m])) for m in range(n)]
            squares += (e[j] / math.fsum(e)) ** 2
        near(found.column_scores[b, h, j], math.sqrt(squares * loops.dot(v[b][g][j], v[b][g][j])))


@EVERY
def test_the_certified_engine_finds_the_same(spec, rng):
    x, _ = arrays(rng, (7, 4))
    expected, found = (ra.evaluate(spec, x, want=BOTH, engine=e) for e in ("reference", "certified"))
    for name in BOTH:
        near(found[name], expected[name])
        assert (found.status[name] != ENCLOSED).all()


# Identities


@EVERY
@pytest.mark.parametrize("lengths", [None, (7, 4)], ids=str)
def test_every_key_drawn_is_exact_attention(spec, lengths, rng):
    x, duals = arrays(rng, lengths, C=7)
    exact = {n: x[n] for n in ("q", "k", "v", "kv_lengths") if n in x}
    near(ra.evaluate(spec, x).out, ra.evaluate(ra.SDPA(), exact).out)
    expected = ra.vjp(ra.SDPA(), exact, {"out": duals["out"]})
    for name, value in ra.vjp(spec, x, {"out": duals["out"]}).items():
        near(value, expected[name], 1e-11)


def test_every_row_in_the_pilot_is_exact_attention_whatever_is_drawn(rng):
    x, _ = arrays(rng, P=5)
    x["pilot"] = np.array([rng.permutation(5) for _ in range(2)])
    for n in ("adaptive", "simple", "none"):
        near(ra.evaluate(ra.Skeinformer(normalisation=n), x).out, ra.evaluate(ra.SDPA(), {m: x[m] for m in "qkv"}).out)


@LENGTHS
def test_the_adaptive_form_is_exact_attention_to_keys_of_which_the_others_are_their_mean(lengths, rng):
    """exp(mean_S q·k_j) = exp(q·mean_S k_j): a second derivation, of out and of every gradient."""
    x, duals = arrays(rng, lengths)
    n = np.array(lengths or (7, 7))[:, None, None]
    drawn = (x["columns"][..., None] == np.arange(7)).any(2) & (np.arange(7) < n)
    each = {m: np.repeat(x[m], 2, 1) for m in "kv"}
    share = (drawn / np.maximum(drawn.sum(-1, keepdims=True), 1))[:, :, None, :]
    turn = np.where(drawn[..., None], np.eye(7), share)
    exact = {"q": x["q"], "k": turn @ each["k"], "v": each["v"]} | {m: x[m] for m in x if m == "kv_lengths"}
    spec = ra.Skeinformer(reuse_pilot=False)
    near(ra.evaluate(spec, x).out, ra.evaluate(ra.SDPA(), exact).out)
    found, expected = (ra.vjp(s, a, {"out": duals["out"]}) for s, a in ((spec, x), (ra.SDPA(), exact)))
    near(found.dq, expected.dq, 1e-11)
    near(found.dk, (np.swapaxes(turn, 2, 3) @ expected.dk).reshape(2, 2, 2, 7, 3).sum(2), 1e-11)
    near(found.dv, expected.dv.reshape(2, 2, 2, 7, 2).sum(2), 1e-11)


def test_columns_are_a_set(rng):
    x, _ = arrays(rng)
    twice = x | {"columns": np.concatenate([x["columns"][..., ::-1], x["columns"][..., :2]], -1)}
    for spec in SPECS:
        near(ra.evaluate(spec, twice).out, ra.evaluate(spec, x).out, 0)


def test_the_scores_do_not_hang_on_the_columns(rng):
    x, _ = arrays(rng)
    other = x | {"columns": (x["columns"] + 1) % 7}
    one, two = (ra.evaluate(ra.Skeinformer(), a, want=BOTH) for a in (x, other))
    near(one.column_scores, two.column_scores, 0)
    assert np.abs(one.out - two.out).max() > 0.01


# Padding, and what is not finite


@EVERY
def test_what_is_padded_is_never_read(spec, rng):
    x, duals = arrays(rng, (7, 4))
    clean = dict(ra.evaluate(spec, x, want=BOTH)) | dict(ra.vjp(spec, x, duals))
    x["k"][1, :, 4:], x["v"][1, :, 4:] = np.nan, np.inf
    for name, value in (dict(ra.evaluate(spec, x, want=BOTH)) | dict(ra.vjp(spec, x, duals))).items():
        near(value, clean[name], 0)


@EVERY
def test_a_nan_in_a_key_reaches_the_rows_that_read_it(spec, rng):
    """Rows of the pilot, and any row whose mean or sum holds the key; its head's scores; no gradient besides."""
    x, duals = arrays(rng)
    x["columns"][1, :2] = [[0, 4, 6], [1, 2, 3]]
    clean, gradient = ra.evaluate(spec, x, want=BOTH), ra.vjp(spec, x, {"out": duals["out"]})
    x["k"][1, 0, 4, 1] = np.nan
    found = ra.evaluate(spec, x, want=BOTH)
    hit = np.zeros((2, 4, 5), bool)
    hit[1, 0] = True
    hit[1, 1] = spec.normalisation == "none"
    if spec.reuse_pilot:
        hit[1, 1, x["pilot"][1]] = True
    assert np.isnan(found.out[hit]).all()
    near(found.out[~hit], clean.out[~hit], 0)
    assert np.isnan(found.column_scores[1, :2]).all()
    near(found.column_scores[0], clean.column_scores[0], 0)
    dq = ra.vjp(spec, x, {"out": duals["out"]}).dq
    assert np.isnan(dq[hit]).any(-1).all()
    near(dq[~hit], gradient.dq[~hit])


# Gradients by what shares nothing with the tape


@EVERY
@pytest.mark.parametrize("lengths", [None, (7, 4)], ids=str)
def test_gradients_by_complex_step(spec, lengths, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape; column scores included."""
    x, duals = arrays(rng, lengths)
    problem = api.build(spec, x, "float64", ("out",))
    gradients = ra.vjp(spec, x, duals)
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.variant.reference(problem.spec, x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-11)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"normalisation": "full"}, "normalisation is one of 'adaptive', 'simple', 'none'; given: 'full'"),
        ({"normalisation": None}, "normalisation is one of"),
        ({"reuse_pilot": 1}, "reuse_pilot is True or False; given: 1"),
        ({"scale": math.inf}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Skeinformer(**options)


def test_indices_that_do_not_fit(rng):
    x, _ = arrays(rng)
    with pytest.raises(ShapeError, match=r"(?s)columns has Hq=2, but .* Hq=4.*columns \(B, Hq, C\) int"):
        ra.evaluate(ra.Skeinformer(), x | {"columns": x["columns"][:, :2]})
    with pytest.raises(ShapeError, match="columns must lie between 0 and Lk - 1 = 6"):
        ra.evaluate(ra.Skeinformer(), x | {"columns": x["columns"] + 7})
    with pytest.raises(ShapeError, match="pilot must lie between 0 and Lq - 1 = 4"):
        ra.evaluate(ra.Skeinformer(), x | {"pilot": x["pilot"] - 5})


def test_operations_count_the_pilot_and_the_drawn_columns():
    """2 B Hq (P Lk + Lq C) (D + Dv), and for "none" 2 B Hq Lq Lk D more."""
    one, two = (ra.explain(ra.Skeinformer(normalisation=n), SIZES) for n in ("adaptive", "none"))
    assert one["operations"] == 2 * 2 * 4 * (3 * 7 + 5 * 3) * 5
    assert two["operations"] == one["operations"] + 2 * 2 * 4 * 5 * 7 * 3
    assert one["engines"]["cpu"].startswith("skeinformer has no plan: a plan has no columns drawn for each head")
