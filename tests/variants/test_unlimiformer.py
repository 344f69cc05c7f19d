"""Unlimiformer against numbers worked by hand, plain loops, exact attention, its plan, and complex step."""

import math
from itertools import pairwise, product

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, same

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError
from refattn.golden import build
from refattn.golden import inputs as recipes
from refattn.plan import execute

MODULE = ra.variants()["unlimiformer"].module
SIZES = {"B": 3, "Hq": 4, "Hkv": 2, "Lq": 5, "Lk": 9, "D": 3, "Dv": 2, "E": 5}
BIASES = ("b_q", "b_k", "b_v")
FORMS = {"keys": ("keys", ()), "hidden": ("hidden", ()), "biased": ("hidden", BIASES), "b_k": ("hidden", ("b_k",))}
EVERY = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
LENGTHS = pytest.mark.parametrize("lengths", [None, (9, 0, 2)], ids=["full", "padded"])


def arrays(form, rng, lengths=None, **changed):
    """A Spec, and inputs."""
    score, biases = form
    spec = ra.Unlimiformer(top=3, score=score)
    signature = MODULE.signature(spec)
    x = {
        n: rng.standard_normal(a.shape(SIZES | changed)) for n, a in signature.items() if not a.optional or n in biases
    }
    return spec, x if lengths is None else x | {"kv_lengths": np.array(lengths, np.int64)}


def projected(x):
    """q, k and v as a layer computes them."""
    if "q" in x:
        return {name: x[name] for name in "qkv"}
    made = {}
    for name, source in (("q", "hidden"), ("k", "encoded"), ("v", "encoded")):
        rows = np.einsum("ble,hed->bhld", x[source], x[f"w_{name}"])
        made[name] = rows + x[f"b_{name}"][:, None] if f"b_{name}" in x else rows
    return made


def everything(spec, x):
    return ra.evaluate(spec, x, want=tuple(MODULE.outputs(spec)))


def line(*numbers):
    return np.array(numbers, float).reshape(1, 1, -1, 1)


def logs(*numbers):
    return [math.log(n) for n in numbers]


# Numbers worked by hand


def test_two_of_four_keys():
    """e^k of 1, 4, 2, 3: q = 1 finds keys 1 and 3, 4 : 3; q = −1 finds 0 and 2, 1 : ½; q = 0 the first two, 1 : 1."""
    x = {"q": line(1, -1, 0), "k": line(*logs(1, 4, 2, 3)), "v": line(7, 5, 10, 2)}
    found = everything(ra.Unlimiformer(top=2), x)
    near(found.out.ravel(), [(5 * 4 + 2 * 3) / 7, (7 + 10 / 2) / 1.5, (7 + 5) / 2])
    near(found.lse.ravel(), logs(7, 1.5, 2))
    same(found.indices[0, 0], np.array([[1, 3], [0, 2], [0, 1]]))
    near(found.margin.ravel(), [math.log(3 / 2), math.log(3 / 2), 0])


def test_the_scale_acts_after_the_choice():
    """Even a scale of 0 leaves the largest products in, and a negative one: q = 1 finds keys 1 and 3, ¼ : ⅓."""
    x = {"q": line(1), "k": line(*logs(1, 4, 2, 3)), "v": line(7, 5, 10, 2)}
    near(everything(ra.Unlimiformer(top=2, scale=0.0), x).out.ravel(), [(5 + 2) / 2])
    near(everything(ra.Unlimiformer(top=2, scale=-1.0), x).out.ravel(), [(5 / 4 + 2 / 3) / (1 / 4 + 1 / 3)])


def test_padding_leaves_before_the_choice():
    """Of 4 keys 2 are there: they are all that is found, though the others have larger products."""
    x = {"q": line(1), "k": line(*logs(1, 2, 9, 9)), "v": line(7, 5, 10, 2), "kv_lengths": np.array([2])}
    found = everything(ra.Unlimiformer(top=3), x)
    near(found.out.ravel(), [(7 + 5 * 2) / 3])
    same(found.indices.ravel(), np.array([1, 0, -1]))
    near(found.margin.ravel(), [0])


def test_a_hidden_state_of_two_heads():
    """Wq = 1, 2 and Wk = 3, bk = 1, bq = 0: hidden 1 meets encoded 0, ln 2: logits 1, 1 + 3 ln 2; 2, 2 + 6 ln 2."""
    x = {
        "hidden": np.ones((1, 1, 1)), "encoded": np.array([0, math.log(2), -1]).reshape(1, 3, 1),
        "w_q": np.array([1.0, 2.0]).reshape(2, 1, 1), "w_k": np.full((1, 1, 1), 3.0), "w_v": np.ones((1, 1, 1)),
        "b_k": np.ones((1, 1)), "b_v": np.full((1, 1), 5.0),
    }  # fmt: skip
    found = everything(ra.Unlimiformer(top=2, score="hidden", scale=1.0), x)
    near(found.lse.ravel(), [1 + math.log(1 + 2**3), 2 + math.log(1 + 2**6)])
    near(found.out.ravel(), [5 + math.log(2) * 8 / 9, 5 + math.log(2) * 64 / 65])
    same(found.indices.ravel(), np.array([1, 0, 1, 0]))
    near(found.margin.ravel(), [3, 6])


def test_gradients_of_two_of_four_keys():
    """Weights 4/7 and 3/7 of values 5 and 2, mean 26/7: ds = ±36/49; keys 0 and 2 hear nothing."""
    x = {"q": line(1), "k": line(*logs(1, 4, 2, 3)), "v": line(7, 5, 10, 2)}
    found = ra.vjp(ra.Unlimiformer(top=2), x, {"out": line(1)})
    near(found.dv.ravel(), [0, 4 / 7, 0, 3 / 7])
    near(found.dk.ravel(), [0, 36 / 49, 0, -36 / 49])
    near(found.dq.ravel(), [36 / 49 * math.log(4 / 3)])


# Plain loops


@EVERY
@LENGTHS
def test_against_plain_loops(form, lengths, rng):
    spec, x = arrays(form, rng, lengths)
    made = {name: a.tolist() for name, a in projected(x).items()}
    found = everything(spec, x)
    seen = {}
    for b, h, i in np.ndindex(3, 4, 5):
        n = (lengths or (9, 9, 9))[b]
        products = [loops.dot(made["q"][b][h][i], made["k"][b][h // 2][j]) for j in range(n)]
        ranked = sorted(range(n), key=lambda j, products=products: (-products[j], j))
        seen[b, h, i] = set(ranked[:3])
        same(found.indices[b, h, i], np.array((ranked + [-1] * 3)[:3]))
        margin = products[ranked[2]] - products[ranked[3]] if n > 3 else 0
        assert abs(found.margin[b, h, i] - margin) < 1e-11
    dout, dlse = rng.standard_normal(found.out.shape), rng.standard_normal(found.lse.shape)
    plain = loops.attention(
        *(made[name] for name in "qkv"), dout.tolist(), dlse.tolist(), scale=3**-0.5,
        sees=lambda b, h, i, j: j in seen[b, h, i],
    )  # fmt: skip
    gradients = ra.vjp(spec, x, {"out": dout, "lse": dlse})
    near(found.out, plain["out"], 1e-11)
    near(found.lse, plain["lse"], 1e-11)
    if spec.score == "keys":
        for name in ("dq", "dk", "dv"):
            near(gradients[name], plain[name], 1e-11)
        return
    there = (np.arange(9) < np.array(lengths or (9, 9, 9))[:, None])[..., None]
    encoded = np.where(there, x["encoded"], 0)
    dq, dk, dv = (np.array(plain[name]) for name in ("dq", "dk", "dv"))
    expected = {
        "dw_q": np.einsum("ble,bhld->hed", x["hidden"], dq), "dw_k": np.einsum("ble,bhld->hed", encoded, dk),
        "dw_v": np.einsum("ble,bhld->hed", encoded, dv), "dhidden": np.einsum("bhld,hed->ble", dq, x["w_q"]),
        "dencoded": np.einsum("bhld,hed->ble", dk, x["w_k"]) + np.einsum("bhld,hed->ble", dv, x["w_v"]),
        "db_q": dq.sum((0, 2)), "db_k": dk.sum((0, 2)), "db_v": dv.sum((0, 2)),
    }  # fmt: skip
    for name in gradients:
        near(gradients[name], expected[name], 1e-10)


# Identities


@LENGTHS
@pytest.mark.parametrize("top", [9, 30])
def test_everything_found_is_exact_attention(lengths, top, rng):
    _, x = arrays(FORMS["keys"], rng, lengths)
    spec = ra.Unlimiformer(top=top)
    dout, dlse = rng.standard_normal((3, 4, 5, 2)), rng.standard_normal((3, 4, 5))
    found = forward_and_gradients(spec, x, dout, dlse)
    expected = forward_and_gradients(ra.SDPA(), x, dout, dlse)
    for name, value in expected.items():
        near(found[name], value)


@LENGTHS
@pytest.mark.parametrize("biases", list(product((False, True), repeat=3)), ids=str)
def test_hidden_states_give_what_keys_give(biases, lengths, rng):
    given = tuple(name for name, there in zip(BIASES, biases, strict=True) if there)
    spec, x = arrays(("hidden", given), rng, lengths)
    found = everything(spec, x)
    made = projected(x) | ({} if lengths is None else {"kv_lengths": x["kv_lengths"]})
    expected = everything(ra.Unlimiformer(top=3), made)
    same(found.indices, expected.indices)
    for name in ("out", "lse", "margin"):
        near(found[name], expected[name], 1e-11)


@EVERY
def test_the_bias_of_keys_moves_lse_alone(form, rng):
    spec, x = arrays(form, rng)
    if spec.score == "keys":
        shift = rng.standard_normal((3, 2, 1, 3))
        moved, constant = x | {"k": x["k"] + shift}, np.einsum("bhid,bhd->bhi", x["q"], np.repeat(shift[:, :, 0], 2, 1))
    else:
        shift = rng.standard_normal((2, 3))
        moved = x | {"b_k": x.get("b_k", 0) + shift}
        constant = np.einsum("bhid,hd->bhi", projected(x)["q"], np.repeat(shift, 2, 0))
    found, expected = everything(spec, moved), everything(spec, x)
    same(found.indices, expected.indices)
    near(found.out, expected.out, 1e-11)
    near(found.lse, expected.lse + 3**-0.5 * constant, 1e-11)


@EVERY
def test_padding_is_the_first_tokens_for_each_sequence_alone(form, rng):
    spec, x = arrays(form, rng, (9, 1, 4))
    found = everything(spec, x)
    signature = MODULE.signature(spec)
    for b, n in enumerate((9, 1, 4)):
        alone = {m: a[b : b + 1] if "B" in signature[m].names else a for m, a in x.items() if m != "kv_lengths"}
        alone |= {m: alone[m][..., :n, :] for m in ("k", "v", "encoded") if m in alone}
        for name, value in everything(spec, alone).items():
            near(found[name][b : b + 1], value)


@EVERY
def test_what_is_padded_is_never_read(form, rng):
    spec, x = arrays(form, rng, (9, 0, 3))
    duals = {"out": rng.standard_normal((3, 4, 5, 2)), "lse": rng.standard_normal((3, 4, 5))}
    expected = dict(everything(spec, x)) | dict(ra.vjp(spec, x, duals))
    for name in {"k", "v", "encoded"} & set(x):
        x[name][1], x[name][2, ..., 3:, :] = np.nan, np.inf
    found = dict(everything(spec, x)) | dict(ra.vjp(spec, x, duals))
    for name, value in expected.items():
        near(found[name], value, 0)
    near(execute(built(spec, x).plan)["out"], expected["out"])


def test_equal_products_go_to_the_lowest_index_in_reference_and_plan(rng):
    _, x = arrays(FORMS["keys"], rng, (9, 5, 7))
    x |= {name: rng.integers(-1, 2, x[name].shape).astype(float) for name in "qk"}
    spec = ra.Unlimiformer(top=3)
    found = everything(spec, x)
    products = np.einsum("bhid,bhjd->bhij", x["q"], np.repeat(x["k"], 2, 1))
    for b, h, i in np.ndindex(3, 4, 5):
        n = x["kv_lengths"][b]
        same(found.indices[b, h, i], np.array(sorted(range(n), key=lambda j: (-products[b, h, i, j], j))[:3]))
    assert (found.margin == 0).any()
    near(execute(built(spec, x).plan)["out"], found.out)


def test_ranks_by_products_of_16_bits_fail_the_case_that_is_there_for_them():
    case = next(c for c in ra.variants()["unlimiformer"].cases() if c.name == "unlimiformer/faint_differences")
    x = recipes.inputs(case)
    expected = build.problem_of(case, x).evaluate(lambda a: a)["indices"]
    s = np.einsum("bhid,bhjd->bhij", x["q"].astype(float), x["k"].astype(float))
    exact, rounded = (np.argsort(-a, -1, kind="stable")[..., :3] for a in (s, s.astype(np.float16)))
    same(np.sort(exact, -1), np.sort(expected, -1))
    assert (np.sort(rounded, -1) != np.sort(expected, -1)).any()


# The plan, kernels, and gradients by what shares nothing with the tape


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@LENGTHS
@pytest.mark.parametrize("batch", [3, 0])
def test_the_plan_means_what_the_reference_says(form, lengths, batch, rng):
    spec, x = arrays(form, rng, None if lengths is None else lengths[:batch], B=batch)
    expected, found = everything(spec, x), execute(built(spec, x).plan)
    near(found["out"], expected.out, 1e-11)
    near(found["lse"], expected.lse, 1e-11)


@EVERY
@LENGTHS
def test_the_kernels_agree(form, lengths, rng):
    spec, x = arrays(form, rng, lengths)
    duals = rng.standard_normal((3, 4, 5, 2)), rng.standard_normal((3, 4, 5))
    expected = forward_and_gradients(spec, x, *duals)
    for name, value in forward_and_gradients(spec, x, *duals, engine="cpu").items():
        near(value, expected[name], 1e-10)


@EVERY
@LENGTHS
def test_gradients_by_complex_step(form, lengths, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    spec, x = arrays(form, rng, lengths)
    problem = built(spec, x)
    duals = {n: rng.standard_normal(a.shape(SIZES)) for n, a in MODULE.outputs(spec).items() if a.kind == "real"}
    gradients = ra.vjp(spec, x, duals)
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.text(x | {name: x[name] + 1e-30j * u})
        forward = sum((np.where(w == 0, 0, np.imag(moved[n]) / 1e-30 * w)).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-10)


# Chunks


def test_chunks_of_the_paper_s_figure():
    """A window of 8 leaves 2 tokens at either side and moves by 4; the last one ends with the input."""
    assert MODULE.chunks(18, 8) == [(0, 8, 0, 6), (4, 12, 6, 10), (8, 16, 10, 14), (10, 18, 14, 18)]
    assert MODULE.chunks(16, 8) == [(0, 8, 0, 6), (4, 12, 6, 10), (8, 16, 10, 16)]
    assert MODULE.chunks(8, 8) == [(0, 8, 0, 8)]
    assert MODULE.chunks(3, 8) == [(0, 3, 0, 3)]
    assert MODULE.chunks(0, 8) == [(0, 0, 0, 0)]
    assert MODULE.chunks(3, 1) == [(0, 1, 0, 1), (1, 2, 1, 2), (2, 3, 2, 3)]


@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 7, 8, 16])
def test_every_token_is_kept_once_and_lies_inside_its_chunk(window):
    for length in range(60):
        found = MODULE.chunks(length, window)
        kept = [t for c in found for t in range(c.first, c.last)]
        assert kept == list(range(length))
        for c in found:
            assert c.end - c.begin == min(window, length)
            assert c.first - c.begin >= window // 4 or c.begin == 0
            assert c.end - c.last >= window // 4 or c.end == length
        assert all(a.begin < b.begin for a, b in pairwise(found))


@pytest.mark.parametrize(("length", "window"), [(4, 0), (-1, 4), (4.0, 4), (4, None)])
def test_chunks_refuse_what_is_no_length(length, window):
    with pytest.raises(SpecError, match="chunks takes a length from 0 on and a window from 1 on; given: "):
        MODULE.chunks(length, window)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"top": 0}, "top is a number of tokens from 1 on; given: 0"),
        ({"top": 2.0}, "top is a number of tokens from 1 on; given: 2.0"),
        ({"score": "values"}, "score is 'keys' or 'hidden'; given: 'values'"),
        ({"score": None}, "score is 'keys' or 'hidden'; given: None"),
        ({"scale": math.nan}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Unlimiformer(**({"top": 4} | options))


@EVERY
def test_what_has_no_rank_is_refused(form, rng):
    spec, x = arrays(form, rng, (9, 9, 3))
    for name in set(x) & {"q", "k", "hidden", "encoded", "w_q", "w_k", "b_q", "b_k"}:
        bad = x[name].copy()
        bad.flat[0] = np.nan
        with pytest.raises(ShapeError, match=f"^{name} must hold finite numbers, for tokens are ranked"):
            ra.evaluate(spec, x | {name: bad})


def test_heads_that_do_not_divide_and_arrays_of_the_other_form(rng):
    with pytest.raises(ShapeError, match="Hq must be a multiple of Hkv; given: Hq=3, Hkv=2"):
        ra.evaluate(*arrays(FORMS["hidden"], rng, Hq=3))
    spec, x = arrays(FORMS["keys"], rng)
    with pytest.raises(ShapeError, match=r"(?s)unknown array 'hidden'.*q \(B, Hq, Lq, D\) real"):
        ra.evaluate(spec, x | {"hidden": x["q"][:, 0]})


def test_operations_are_told():
    """Products with all Lk tokens, values of `top`; by hidden states q, u and v are made as well."""
    keys, hidden = (ra.explain(ra.Unlimiformer(top=3, score=s), SIZES) for s in ("keys", "hidden"))
    pairs, rows = 3 * 4 * 5 * 9, 3 * 4 * 5
    assert keys["operations"] == 2 * (pairs * 3 + rows * 3 * 2)
    assert hidden["operations"] == 2 * (pairs * 5 + rows * 3 * 2 + 2 * rows * 5 * 3 + 3 * 2 * 9 * 5 * 2)
    assert keys["score_matrix_bytes"] == 8 * pairs
