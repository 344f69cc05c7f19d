"""Linformer against numbers worked by hand, plain loops, exact attention, its plan, and complex step."""

import math

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, slopes_by_complex_step

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError
from refattn.plan import execute

SIZES = {"B": 3, "Hq": 4, "Hkv": 2, "Lq": 5, "Lk": 7, "R": 4, "D": 3, "Dv": 2}
SPECS = [ra.Linformer(sharing=s, heads=h) for s in ("none", "kv") for h in ("shared", "per_head")]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.sharing}-{s.heads}")
LENGTHS = pytest.mark.parametrize("lengths", [None, (7, 0, 3)], ids=["full", "padded"])


def arrays(spec, rng, lengths=None, **changed):
    """Inputs and cotangents of out and lse."""
    sizes, module = SIZES | changed, ra.variants()["linformer"].module
    made = {
        name: rng.standard_normal(a.shape(sizes))
        for name, a in (module.signature(spec) | module.outputs(spec)).items()
        if a.kind == "real"
    }
    duals = {name: made.pop(name) for name in ("out", "lse")}
    return made if lengths is None else made | {"kv_lengths": np.array(lengths, np.int64)}, duals


# Numbers worked by hand


def test_two_mixtures_of_three_keys():
    """E = F = [[1, 1, 0], [0, 1, 1]], k = (0, ln 2, ln 3): K' = (ln 2, ln 6), so q = 1 weighs V' = (3, 6) as 2 : 6."""
    e = np.array([[1.0, 1, 0], [0, 1, 1]])
    q, k, v = (np.array(a, float).reshape(1, 1, -1, 1) for a in ([1, 0], [0, math.log(2), math.log(3)], [1, 2, 4]))
    found = ra.evaluate(ra.Linformer(), {"q": q, "k": k, "v": v, "E": e, "F": e}, want=("out", "lse"))
    near(found.out.ravel(), [(2 * 3 + 6 * 6) / 8, (3 + 6) / 2])
    near(found.lse.ravel(), [math.log(8), math.log(2)])


def test_gradients_of_that_problem():
    """At q = 0 the weights are halves: dF = ½ v, dv = ½ Σ_a F; dK' = 0, so dE = dk = 0, and dq = Σ p (V' − out) K'."""
    e = np.array([[1.0, 1, 0], [0, 1, 1]])
    k, v = (np.array(a, float).reshape(1, 1, 3, 1) for a in ([0, math.log(2), math.log(3)], [1, 2, 4]))
    x = {"q": np.zeros((1, 1, 1, 1)), "k": k, "v": v, "E": e, "F": e}
    found = ra.vjp(ra.Linformer(), x, {"out": np.ones((1, 1, 1, 1))})
    near(found.dF, [[0.5, 1, 2], [0.5, 1, 2]])
    near(found.dv.ravel(), [0.5, 1, 0.5])
    near(found.dq.ravel(), [0.5 * 1.5 * (math.log(6) - math.log(2))])
    near(found.dE, np.zeros((2, 3)))
    near(found.dk.ravel(), np.zeros(3))


def test_a_sequence_of_length_0_sees_mixtures_of_nothing(rng):
    """All R logits are 0: lse = log R, out = 0, and no gradient reaches anything."""
    x, duals = arrays(ra.Linformer(), rng, (0, 0, 0))
    found = forward_and_gradients(ra.Linformer(), x, duals["out"], duals["lse"])
    near(found["lse"], np.full((3, 4, 5), math.log(4)))
    for name in ("out", "dq", "dk", "dv", "dE", "dF"):
        assert not found[name].any(), name


# Plain loops


def mixed(matrix, rows, length):
    """Σ_{j < length} matrix[a][j] rows[j], in lists."""
    return [[math.fsum(w[j] * rows[j][d] for j in range(length)) for d in range(len(rows[0]))] for w in matrix]


@EVERY
@LENGTHS
def test_against_plain_loops(spec, lengths, rng):
    x, duals = arrays(spec, rng, lengths)
    found = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    e, f = x["E"], x["E"] if spec.sharing == "kv" else x["F"]
    e, f = (np.broadcast_to(m, (2, 4, 7)).tolist() for m in (e, f))
    n, k, v = lengths or (7, 7, 7), x["k"].tolist(), x["v"].tolist()
    keys = [[mixed(e[g], k[b][g], n[b]) for g in range(2)] for b in range(3)]
    values = [[mixed(f[g], v[b][g], n[b]) for g in range(2)] for b in range(3)]
    dout, dlse = duals["out"].tolist(), duals["lse"].tolist()
    plain = loops.attention(x["q"].tolist(), keys, values, dout, dlse, scale=3**-0.5, sees=lambda *_: True)
    expected = {name: plain[name] for name in ("out", "lse", "dq")}
    there = np.arange(7) < np.array(n)[:, None, None, None]
    dkeys, dvalues = np.array(plain["dk"]), np.array(plain["dv"])
    k, v = (np.where(np.swapaxes(there, 2, 3), x[name], 0) for name in "kv")
    expected["dk"] = np.swapaxes(np.swapaxes(dkeys, 2, 3) @ np.array(e) * there, 2, 3)
    expected["dv"] = np.swapaxes(np.swapaxes(dvalues, 2, 3) @ np.array(f) * there, 2, 3)
    de, df = (d @ np.swapaxes(rows, 2, 3) for d, rows in ((dkeys, k), (dvalues, v)))
    over = 0 if spec.heads == "per_head" else (0, 1)
    expected |= {"dE": (de + df).sum(over)} if spec.sharing == "kv" else {"dE": de.sum(over), "dF": df.sum(over)}
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        near(found[name], value, 1e-11)


# Identities


@EVERY
def test_the_identity_for_e_is_exact_attention(spec, rng):
    x, duals = arrays(spec, rng, R=7)
    eye = {name: np.broadcast_to(np.eye(7), x[name].shape) for name in ("E", "F") if name in x}
    found = forward_and_gradients(spec, x | eye, duals["out"], duals["lse"])
    expected = forward_and_gradients(ra.SDPA(), {n: x[n] for n in "qkv"}, duals["out"], duals["lse"])
    for name, value in expected.items():
        near(found[name], value)


@EVERY
def test_padding_is_the_first_columns_for_each_sequence_alone(spec, rng):
    x, _ = arrays(spec, rng, (7, 2, 5))
    found = ra.evaluate(spec, x, want=("out", "lse"))
    for b, n in enumerate((7, 2, 5)):
        alone = {name: x[name][b : b + 1, :, : None if name == "q" else n] for name in "qkv"}
        alone |= {name: x[name][..., :n] for name in ("E", "F") if name in x}
        expected = ra.evaluate(spec, alone, want=("out", "lse"))
        near(found.out[b : b + 1], expected.out)
        near(found.lse[b : b + 1], expected.lse)


def test_what_is_padded_is_never_read(rng):
    spec = ra.Linformer()
    x, duals = arrays(spec, rng, (7, 0, 3))
    clean = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name, bad in (("k", np.nan), ("v", np.inf)):
        x[name][1], x[name][2, :, 3:] = bad, bad
    found = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name, value in clean.items():
        near(found[name], value, 0)


def test_a_nan_in_a_key_reaches_the_queries_of_its_head_and_no_other(rng):
    spec = ra.Linformer()
    x, _ = arrays(spec, rng)
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    x["k"][1, 1, 2, 0] = np.nan
    found = ra.evaluate(spec, x, want=("out", "lse"))
    hit = np.zeros((3, 4, 5), bool)
    hit[1, 2:] = True
    for name in ("out", "lse"):
        assert np.isnan(found[name][hit]).all()
        near(found[name][~hit], expected[name][~hit], 0)


# The plan, and gradients by what shares nothing with the tape


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@LENGTHS
@pytest.mark.parametrize("batch", [3, 0])
def test_the_plan_means_what_the_reference_says(spec, lengths, batch, rng):
    x, _ = arrays(spec, rng, None if lengths is None else lengths[:batch], B=batch)
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    found = execute(built(spec, x).plan)
    near(found["out"], expected.out)
    near(found["lse"], expected.lse)


@EVERY
@LENGTHS
def test_the_kernels_agree(spec, lengths, rng):
    x, duals = arrays(spec, rng, lengths)
    expected = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name, value in forward_and_gradients(spec, x, duals["out"], duals["lse"], engine="cpu").items():
        near(value, expected[name], 1e-11)


@EVERY
@LENGTHS
def test_gradients_by_complex_step(spec, lengths, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, duals = arrays(spec, rng, lengths)
    slopes_by_complex_step(spec, x, duals, rng)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sharing": "layer"}, "sharing is 'none' or 'kv'; given: 'layer'"),
        ({"heads": None}, "heads is 'shared' or 'per_head'; given: None"),
        ({"scale": math.inf}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Linformer(**options)


def test_a_matrix_for_another_length_is_refused_with_the_signature(rng):
    x, _ = arrays(ra.Linformer(), rng)
    with pytest.raises(ShapeError, match=r"(?s)E has Lk=9, but .* Lk=7.*E \(R, Lk\) real"):
        ra.evaluate(ra.Linformer(), x | {"E": np.ones((4, 9))})


def test_f_is_no_input_where_it_is_shared(rng):
    x, _ = arrays(ra.Linformer(sharing="kv"), rng)
    with pytest.raises(ShapeError, match="unknown array 'F'"):
        ra.evaluate(ra.Linformer(sharing="kv"), x | {"F": x["E"]})


def test_operations_are_linear_in_the_length():
    """2 (B Hkv R Lk + B Hq Lq R) (D + Dv); the score matrix has B Hq Lq R doubles."""
    one, two = (ra.explain(ra.Linformer(), SIZES | {"Lq": 8 * n, "Lk": 8 * n}) for n in (1, 2))
    assert one["operations"] == 2 * (3 * 2 * 4 * 8 + 3 * 4 * 8 * 4) * 5
    assert two["operations"] == 2 * one["operations"]
    assert one["score_matrix_bytes"] == 8 * 3 * 4 * 8 * 4
