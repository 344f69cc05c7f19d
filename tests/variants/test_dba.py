"""DBA as reconstructed against numbers worked by hand, plain loops, exact attention, its plan, and complex step."""

import math

import numpy as np
import pytest
from checks import forward_and_gradients, near, slopes_by_complex_step

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError
from refattn.plan import execute

MODULE = ra.variants()["dba"].module
SIZES = {"B": 3, "Hq": 4, "Hkv": 2, "Lq": 5, "Lk": 7, "P": 4, "D": 3, "Dr": 2, "Dv": 2}
SPECS = [ra.DBA(form=form, scale=scale) for form in ("key_side", "two_sided") for scale in (None, 0.75)]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.form}-{s.scale}")
LENGTHS = pytest.mark.parametrize("lengths", [None, (7, 0, 3)], ids=["full", "padded"])


def arrays(rng, lengths=None, **changed):
    """Inputs and cotangents of out and lse."""
    spec, sizes = ra.DBA(), SIZES | changed
    made = {
        name: rng.standard_normal(a.shape(sizes))
        for name, a in (MODULE.signature(spec) | MODULE.outputs(spec)).items()
        if a.kind == "real"
    }
    duals = {name: made.pop(name) for name in ("out", "lse")}
    return made if lengths is None else made | {"kv_lengths": np.array(lengths, np.int64)}, duals


def both(spec, x):
    return dict(ra.evaluate(spec, x, want=("out", "lse")))


# What it is not


def test_the_docs_and_every_manifest_say_that_it_is_a_reconstruction():
    assert "RECONSTRUCTION" in ra.variants()["dba"].title
    assert "Confidence is low" in MODULE.__doc__
    for case in ra.variants()["dba"].cases():
        assert case.spec.to_json()["convention"] == "dba_recon_v1"
        assert "dba_recon_v1" in case.flags


# Numbers worked by hand

SMALL = {
    "q": np.array([0, math.log(3)]).reshape(1, 1, 2, 1),
    "k": np.array([0, math.log(2)]).reshape(1, 1, 2, 1),
    "v": np.array([1.0, 4]).reshape(1, 1, 2, 1),
    "Z": np.array([0.0, 1]).reshape(1, 2, 1),
    "R": np.ones((1, 1)),
}


def test_two_latents_of_two_keys_key_side():
    """z = 0 weighs the keys as 1 : 1, z = 1 as 1 : 2, so K' = (½, ⅔) ln 2 and V' = (2½, 3); q = 0 and q = 6."""
    found = both(ra.DBA(), SMALL | {"q": np.array([0.0, 6]).reshape(1, 1, 2, 1)})
    near(found["out"].ravel(), [2.75, (8 * 2.5 + 16 * 3) / 24])
    near(found["lse"].ravel(), [math.log(2), math.log(24)])


def test_two_latents_of_two_keys_two_sided():
    """Latents find 2.75 and (√2 · 2.5 + 2^⅔ · 3) / (√2 + 2^⅔); q = 0 weighs them as 1 : 1, q = ln 3 as 1 : 3."""
    found = both(ra.DBA(form="two_sided"), SMALL)
    first, a, b = 2.75, 2**0.5, 2 ** (2 / 3)
    second = (a * 2.5 + b * 3) / (a + b)
    near(found["out"].ravel(), [(first + second) / 2, (first + 3 * second) / 4])
    near(found["lse"].ravel(), [math.log(2), math.log(4)])


def test_the_projection_and_the_scale_by_hand():
    """x R = 3 x_0 + 4 x_1: z = 2, q = 2, and with scale ½ keys of 0 and ln 4 weigh 1 : 4, so that K'R = 0.8 ln 4."""

    def row(*values):
        return np.array(values, float).reshape(1, 1, -1, 2)

    x = {
        "q": row(2 / 3, 0),
        "k": row(0, 0, math.log(4) / 3, 0),
        "v": np.array([1.0, 6]).reshape(1, 1, 2, 1),
        "Z": row(0, 0.5)[0],
        "R": np.array([[3.0], [4]]),
    }
    found = both(ra.DBA(scale=0.5), x)
    near(found["out"].ravel(), [(1 + 4 * 6) / 5])
    near(found["lse"].ravel(), [0.5 * 2 * 0.8 * math.log(4)])


# Plain loops


def attend(q, k, v, scale):
    """Softmax attention over lists of rows, and its lse; with no key, rows of zeros."""
    out, lse = [], []
    for row in q:
        e = [math.exp(scale * math.fsum(a * b for a, b in zip(row, key, strict=True))) for key in k]
        lse.append(math.log(math.fsum(e)) if e else -math.inf)
        out.append(
            [math.fsum(w * r[d] for w, r in zip(e, v, strict=True)) / (math.fsum(e) or 1) for d in range(v.width)]
        )
    return Rows(out), lse


class Rows(list):
    """Rows that know their width where there is none."""

    width = 0


def rows(array):
    made = Rows(array.tolist())
    made.width = array.shape[-1]
    return made


def times(one, matrix):
    made = Rows([[math.fsum(a * b for a, b in zip(r, c, strict=True)) for c in matrix.T.tolist()] for r in one])
    made.width = matrix.shape[1]
    return made


@EVERY
@LENGTHS
def test_against_plain_loops(spec, lengths, rng):
    x, _ = arrays(rng, lengths)
    found, scale = both(spec, x), spec.scale or 2**-0.5
    for b, h in np.ndindex(3, 4):
        n, r = (lengths or (7, 7, 7))[b], x["R"]
        k, v, z, q = x["k"][b, h // 2, :n], x["v"][b, h // 2, :n], x["Z"][h // 2], x["q"][b, h]
        zr, qr, kr = times(z, r), times(q, r), times(k, r)
        k2, v2 = attend(zr, kr, rows(k), scale)[0], attend(zr, kr, rows(v), scale)[0]
        k2, v2 = times(k2, r), rows(np.array(v2))
        if spec.form == "key_side":
            out, lse = attend(qr, k2, v2, scale)
        else:
            out, lse = attend(qr, zr, rows(np.array(attend(zr, k2, v2, scale)[0])), scale)
        near(found["out"][b, h], np.array(out), 1e-11)
        near(found["lse"][b, h], np.array(lse), 1e-11)


# Identities


def far_apart(rng):
    """Orthonormal keys, latents ten thousand times them: P_k is the identity to the last bit."""
    x, duals = arrays(rng, B=1, Lk=3, P=3)
    x["k"] = np.linalg.qr(rng.standard_normal((1, 2, 3, 3)))[0]
    return x | {"Z": 1e4 * x["k"][0], "R": np.eye(3)}, duals


def test_latents_far_apart_are_exact_attention_key_side(rng):
    x, duals = far_apart(rng)
    found = forward_and_gradients(ra.DBA(), x, duals["out"], duals["lse"])
    expected = forward_and_gradients(ra.SDPA(), {n: x[n] for n in "qkv"}, duals["out"], duals["lse"])
    for name, value in expected.items():
        near(found[name], value)
    near(1 + found["dZ"], np.ones(x["Z"].shape))


def test_latents_far_apart_are_exact_attention_two_sided_of_smaller_queries(rng):
    x, _ = far_apart(rng)
    expected = both(ra.SDPA(), {n: x[n] for n in "qkv"})
    for name, value in both(ra.DBA(form="two_sided"), x | {"q": x["q"] / 1e4}).items():
        near(value, expected[name])


@EVERY
def test_a_projection_that_keeps_all_products_changes_nothing_but_the_default_scale(spec, rng):
    """R Rᵀ = I, even where Dr > D."""
    x, _ = arrays(rng, Dr=5)
    turned = np.linalg.qr(rng.standard_normal((5, 3)))[0].T
    given = ra.DBA(form=spec.form, scale=0.5)
    expected = both(given, x | {"R": np.eye(3)})
    for name, value in both(given, x | {"R": turned}).items():
        near(value, expected[name])


def test_johnson_and_lindenstrauss(rng):
    """R of N(0, 1/Dr): (qR)(kR)ᵀ has mean q·k and variance (|q|²|k|² + (q·k)²) / Dr. One key, one latent: lse is it."""
    q, k = rng.standard_normal((1, 1, 40, 8)), rng.standard_normal((1, 1, 1, 8))
    q, k = (a / np.linalg.norm(a, axis=-1, keepdims=True) for a in (q, k))
    product = (q * k).sum(-1)
    for reduced in (4, 16, 64):
        error = []
        for _ in range(300):
            r = rng.standard_normal((8, reduced)) / math.sqrt(reduced)
            x = {"q": q, "k": k, "v": k, "Z": k[0], "R": r}
            error.append(ra.evaluate(ra.DBA(scale=1.0), x, want=("lse",)).lse - product)
        measured, expected = np.mean(np.square(error)), np.mean(1 + product**2) / reduced
        assert abs(measured / expected - 1) < 0.15
        assert abs(np.mean(error)) < 4 * math.sqrt(expected / 300)


@EVERY
def test_neither_the_order_of_the_latents_nor_that_of_the_keys_matters(spec, rng):
    x, _ = arrays(rng)
    keys, latents = rng.permutation(7), rng.permutation(4)
    other = x | {"k": x["k"][:, :, keys], "v": x["v"][:, :, keys], "Z": x["Z"][:, latents]}
    expected = both(spec, x)
    for name, value in both(spec, other).items():
        near(value, expected[name])


@EVERY
def test_one_latent_gives_its_mean_to_every_query(spec, rng):
    x, _ = arrays(rng, P=1)
    query = {
        "q": np.repeat(np.broadcast_to(x["Z"], (3, 2, 1, 3)) @ x["R"], 2, axis=1),
        "k": x["k"] @ x["R"],
        "v": x["v"],
    }
    mean = ra.evaluate(ra.SDPA(scale=spec.scale), query).out
    near(ra.evaluate(spec, x).out, np.broadcast_to(mean, (3, 4, 5, 2)))


# Padding


@EVERY
def test_padding_is_each_sequence_alone(spec, rng):
    x, _ = arrays(rng, (7, 2, 5))
    found = both(spec, x)
    for b, n in enumerate((7, 2, 5)):
        alone = {name: x[name][b : b + 1, :, : None if name == "q" else n] for name in "qkv"}
        expected = both(spec, alone | {"Z": x["Z"], "R": x["R"]})
        for name, value in expected.items():
            near(found[name][b : b + 1], value)


def test_a_sequence_without_keys_is_0_and_its_lse_that_of_latents_which_are_0(rng):
    x, duals = arrays(rng, (0, 0, 0))
    found = forward_and_gradients(ra.DBA(), x, duals["out"], duals["lse"])
    near(found["lse"], np.full((3, 4, 5), math.log(4)))
    for name in ("out", "dq", "dk", "dv", "dZ", "dR"):
        assert not found[name].any(), name
    two = ra.DBA(form="two_sided")
    near(both(two, x)["lse"], both(two, {n: a for n, a in x.items() if n != "kv_lengths"})["lse"])
    assert not both(two, x)["out"].any()


@EVERY
def test_what_is_padded_is_never_read(spec, rng):
    x, duals = arrays(rng, (7, 0, 3))
    clean = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name, bad in (("k", np.nan), ("v", np.inf)):
        x[name][1], x[name][2, :, 3:] = bad, bad
    found = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name, value in clean.items():
        near(found[name], value, 0)


@EVERY
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_key_that_is_no_number_reaches_the_queries_of_its_head_and_no_other(spec, bad, rng):
    x, _ = arrays(rng)
    expected = both(spec, x)
    x["k"][1, 1, 2, 0] = bad
    found, hit = both(spec, x), np.zeros((3, 4, 5), bool)
    hit[1, 2:] = True
    assert np.isnan(found["out"][hit]).all()
    near(found["out"][~hit], expected["out"][~hit], 0)
    # The queries' softmax of the two-sided form reads no key.
    hit &= spec.form == "key_side"
    assert np.isnan(found["lse"][hit]).all()
    near(found["lse"][~hit], expected["lse"][~hit], 0)


# The plan, and gradients by what shares nothing with the tape


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@LENGTHS
@pytest.mark.parametrize("batch", [3, 0])
def test_the_plan_means_what_the_reference_says(spec, lengths, batch, rng):
    x, _ = arrays(rng, None if lengths is None else lengths[:batch], B=batch)
    found, expected = execute(built(spec, x).plan), both(spec, x)
    for name, value in expected.items():
        near(found[name], value)


@EVERY
@LENGTHS
def test_the_kernels_agree(spec, lengths, rng):
    x, duals = arrays(rng, lengths)
    expected = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name, value in forward_and_gradients(spec, x, duals["out"], duals["lse"], engine="cpu").items():
        near(value, expected[name], 1e-11)


@EVERY
@LENGTHS
def test_gradients_by_complex_step(spec, lengths, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, duals = arrays(rng, lengths)
    slopes_by_complex_step(spec, x, duals, rng)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"convention": "dba"}, "convention is 'dba_recon_v1', a reconstruction; .*given: 'dba'"),
        ({"convention": None}, "convention is 'dba_recon_v1'"),
        ({"form": "query_side"}, "form is 'key_side' or 'two_sided'; given: 'query_side'"),
        ({"form": None}, "form is 'key_side' or 'two_sided'; given: None"),
        ({"scale": math.inf}, "scale is a finite number"),
        ({"causal": True}, "dba has no option 'causal'; its options are convention, form, scale"),
    ],
    ids=str,
)
def test_options_out_of_range_and_a_causal_form(options, message):
    with pytest.raises(SpecError, match=message):
        ra.spec("dba", **options)


def test_latents_of_another_width_or_head_are_refused_with_the_signature(rng):
    x, _ = arrays(rng)
    with pytest.raises(ShapeError, match=r"(?s)Z has D=4, but .* D=3.*Z \(Hkv, P, D\) real"):
        ra.evaluate(ra.DBA(), x | {"Z": np.ones((2, 4, 4))})
    with pytest.raises(ShapeError, match=r"(?s)Z has Hkv=4, but .* Hkv=2"):
        ra.evaluate(ra.DBA(), x | {"Z": np.ones((4, 4, 3))})


@pytest.mark.parametrize("form", ["key_side", "two_sided"])
def test_operations_are_linear_in_the_length(form):
    """Of q and k alike: the difference of lengths 16 and 8 is that of 24 and 16."""
    one, two, three = (
        ra.explain(ra.DBA(form=form), SIZES | {"Lq": 8 * n, "Lk": 8 * n})["operations"] for n in (1, 2, 3)
    )
    assert three - two == two - one == 2 * 3 * 8 * ((4 + 2) * 3 * 2 + 2 * 4 * (2 + 3 + 2) + 4 * 4 * (2 + 2))
