"""Perceiver against numbers worked by hand, plain loops, plain SDPA, exact identities, its plan, and complex step."""

import math
from dataclasses import replace

import numpy as np
import pytest
from checks import forward_and_gradients, near

import refattn as ra
from refattn import api
from refattn.engines import certified
from refattn.engines.certified.balls import BALLS
from refattn.errors import ShapeError, SpecError
from refattn.plan import Mix, Score, execute
from refattn.variants.perceiver import features

SIZES = {"B": 3, "Hq": 2, "Lq": 5, "Lk": 6, "E": 4, "C": 3, "D": 3, "Dv": 2}
SPECS = [
    ra.Perceiver(),
    ra.Perceiver(norm="layer", eps=0.25),
    ra.Perceiver(axes=(2, 3), bands=2, scale=0.5),
    ra.Perceiver(norm="layer", axes=(6,), bands=1),
    ra.Perceiver(norm="layer", axes=(1, 6, 1), bands=3, max_frequency=7.5, inverted=True),
    ra.Perceiver(inverted=True, floor=1.25),
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=str)
MASKS = pytest.mark.parametrize("masked", [False, True])


def sizes_of(spec, **changed):
    sizes = SIZES | changed
    return sizes if spec.axes is None else sizes | {"F": sizes["C"] + spec.channels}


def arrays(spec, rng, masked=False, **changed):
    """Inputs and cotangents of out and lse; masked, the second sequence sees nothing."""
    sizes, module = sizes_of(spec, **changed), ra.variants()["perceiver"].module
    made = {
        name: rng.standard_normal(a.shape(sizes))
        for name, a in (module.signature(spec) | module.outputs(spec)).items()
        if a.kind == "real"
    }
    duals = {name: made.pop(name) for name in ("out", "lse")}
    if masked:
        made["mask"] = rng.random((sizes["B"], sizes["Lk"])) < 0.6
        made["mask"][1:2] = False
    return made, duals


def single(*, latents, array, **options):
    """One head of width 1 whose projections are 1: s_ij = latent_i · pixel_j and v_j = pixel_j."""
    one = np.ones((1, 1, 1))
    x = {"latents": np.array(latents, float), "array": np.array(array, float)}
    x = {name: a.reshape(1, -1, 1) for name, a in x.items()} | {"wq": one, "wk": one, "wv": one}
    return ra.evaluate(ra.Perceiver(scale=1.0, **options), x, want=("out", "lse"))


# Numbers worked by hand


def test_two_latents_over_three_pixels():
    """Latent 1 weighs the pixels ln 1, ln 2, ln 4 as 1 : 2 : 4, latent 0 alike."""
    pixels = np.log([1, 2, 4])
    found = single(latents=[1, 0], array=pixels)
    near(found.out.ravel(), [(2 * pixels[1] + 4 * pixels[2]) / 7, pixels.mean()])
    near(found.lse.ravel(), [math.log(7), math.log(3)])


def test_inverted_the_latents_share_each_pixel():
    """Pixels ln 1 and ln 3: latents 1 and 0 share them 1 : 1 and 3 : 1, so their masses are 5/4 and 3/4."""
    a = math.log(3)
    found = single(latents=[1, 0], array=[0, a], inverted=True)
    near(found.out.ravel(), [3 / 4 * a / (5 / 4), 1 / 4 * a / (3 / 4)])
    near(found.lse.ravel(), [math.log(5 / 4), math.log(3 / 4)])


def test_a_floor_divides_the_lesser_of_the_two():
    a = math.log(3)
    found = single(latents=[1, 0], array=[0, a], inverted=True, floor=1.0)
    near(found.out.ravel(), [3 / 4 * a / (5 / 4), 1 / 4 * a])
    near(found.lse.ravel(), [math.log(5 / 4), math.log(3 / 4)])


def test_features_of_three_pixels():
    """K = 2, μ = 3: f = 1, 3/2; p = −1, 0, 1: sin πp is 0, sin 3πp/2 is 1, 0, −1, cos πp is −1, 1, −1."""
    found = features(ra.Perceiver(axes=(3,), bands=2, max_frequency=3.0), np.zeros(1))
    assert found.tolist() == [[0, 1, -1, 0, -1], [0, 0, 1, 1, 0], [0, -1, -1, 0, 1]]


def test_axes_row_by_row_and_an_axis_of_one_pixel():
    """K = 1: f = 1 whatever μ; one pixel stands at −1."""
    found = features(ra.Perceiver(axes=(2, 1, 2), bands=1), np.zeros(1))
    plain = found[:, 2::3]
    assert plain.tolist() == [[-1, -1, -1], [-1, -1, 1], [1, -1, -1], [1, -1, 1]]
    near(found[:, 0::3], 0 * plain)
    near(found[:, 1::3], np.full((4, 3), -1.0))


@pytest.mark.parametrize(("bands", "mu"), [(1, 10.0), (2, 10.0), (5, 7.25), (64, 224.0), (3, 0.5)])
@pytest.mark.parametrize("size", [1, 2, 5, 224])
def test_features_against_the_c_library(bands, mu, size):
    found = features(ra.Perceiver(axes=(size,), bands=bands, max_frequency=mu), np.zeros(1))
    f = np.linspace(1, mu / 2, bands) if bands > 1 else np.ones(1)
    p = np.linspace(-1, 1, size)[:, None] if size > 1 else -np.ones((1, 1))
    near(found, np.concatenate([np.sin(np.pi * p * f), np.cos(np.pi * p * f), p], -1))


def test_features_on_balls_are_those():
    spec = ra.Perceiver(axes=(4, 7), bands=3)
    t, _, r = features(spec, BALLS.real(np.zeros(1))).enclosure()
    near(t, features(spec, np.zeros(1)), 1e-15)
    assert r.max() < 2.0**-50


# Plain loops


def softmax(logits):
    top = max(logits)
    weights = [math.exp(s - top) for s in logits]
    return [w / math.fsum(weights) for w in weights], top + math.log(math.fsum(weights))


def norm(row, gain, bias, eps):
    mean = math.fsum(row) / len(row)
    deviation = math.sqrt(math.fsum((a - mean) ** 2 for a in row) / len(row) + eps)
    return [(a - mean) / deviation * g + b for a, g, b in zip(row, gain, bias, strict=True)]


def encoding(spec, pixel):
    """Features of one pixel, its coordinates counted off from the last axis."""
    row = []
    for axis, size in enumerate(spec.axes or ()):
        at = pixel // math.prod(spec.axes[axis + 1 :]) % size
        p = -1 + 2 * at / (size - 1) if size > 1 else -1.0
        f = [1 + k * (spec.max_frequency / 2 - 1) / max(spec.bands - 1, 1) for k in range(spec.bands)]
        row += [math.sin(math.pi * a * p) for a in f] + [math.cos(math.pi * a * p) for a in f] + [p]
    return row


def by_loops(spec, x, b, h):
    """Out and lse of one sequence and one head."""
    rows = [list(row) + encoding(spec, j) for j, row in enumerate(x["array"][b])]
    latents = [list(row) for row in x["latents"][b]]
    if spec.norm:
        latents = [norm(row, x["latent_gain"], x["latent_bias"], spec.eps) for row in latents]
        rows = [norm(row, x["array_gain"], x["array_bias"], spec.eps) for row in rows]
    seen = [j for j in range(len(rows)) if "mask" not in x or x["mask"][b, j]]
    q, k, v = (np.array(a) @ x[w][h] for a, w in ((latents, "wq"), (rows, "wk"), (rows, "wv")))
    scale = spec.scale or q.shape[1] ** -0.5
    s = [[scale * math.fsum(q[i] * k[j]) for j in seen] for i in range(len(latents))]
    if not seen:
        return np.zeros((len(latents), v.shape[1])), np.full(len(latents), -math.inf)
    if not spec.inverted:
        found = [softmax(row) for row in s]
        return np.array([w for w, _ in found]) @ v[seen], np.array([lse for _, lse in found])
    shares = np.array([softmax(column)[0] for column in zip(*s, strict=True)]).T
    mass = [math.fsum(row) for row in shares]
    out = [shares[i] @ v[seen] / max(m, spec.floor) for i, m in enumerate(mass)]
    return np.array(out), np.log(mass)


@EVERY
@MASKS
def test_against_plain_loops(spec, masked, rng):
    x, _ = arrays(spec, rng, masked)
    found = ra.evaluate(spec, x, want=("out", "lse"))
    for b, h in np.ndindex(3, 2):
        out, lse = by_loops(spec, x, b, h)
        near(found.out[b, h], out)
        near(found.lse[b, h], lse)


# Identities


@MASKS
def test_without_options_it_is_plain_attention_over_the_projections(masked, rng):
    x, duals = arrays(ra.Perceiver(), rng, masked)
    rows = {"q": ("latents", "wq"), "k": ("array", "wk"), "v": ("array", "wv")}
    inputs = {n: np.einsum("ble,hed->bhld", x[a], x[w]) for n, (a, w) in rows.items()}
    mask = {"mask": x["mask"][:, None, None]} if masked else {}
    expected = forward_and_gradients(ra.SDPA(), inputs | mask, duals["out"], duals["lse"])
    found = forward_and_gradients(ra.Perceiver(), x, duals["out"], duals["lse"])
    for name in ("out", "lse"):
        near(found[name], expected[name])
    for n, (a, w) in rows.items():
        near(found[f"d{w}"], np.einsum("ble,bhld->hed", x[a], expected[f"d{n}"]), 1e-11)
    near(found["dlatents"], np.einsum("bhld,hed->ble", expected["dq"], x["wq"]), 1e-11)


@MASKS
def test_inverted_masses_are_the_number_of_pixels(masked, rng):
    """Every visible pixel is shared out wholly: Σ_i mass_i is their count."""
    spec = SPECS[4]
    x, _ = arrays(spec, rng, masked)
    count = x["mask"].sum(1) if masked else np.full(3, 6)
    near(np.exp(ra.evaluate(spec, x, want=("lse",)).lse).sum(-1), np.repeat(count[:, None], 2, 1).astype(float))


def test_inverted_with_one_latent_is_the_mean(rng):
    spec = ra.Perceiver(inverted=True)
    x, _ = arrays(spec, rng, Lq=1)
    values = np.einsum("ble,hed->bhld", x["array"], x["wv"])
    near(ra.evaluate(spec, x).out, values.mean(2, keepdims=True))


def test_inverted_what_all_latents_share_has_no_gradient(rng):
    """A vector added to every query adds the same to all that compete for a pixel."""
    spec = ra.Perceiver(inverted=True, norm="layer")
    x, duals = arrays(spec, rng)
    found = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    moved = ra.evaluate(spec, x | {"latent_bias": x["latent_bias"] + 2}, want=("out", "lse"))
    assert np.abs(found["dlatent_bias"]).max() < 1e-13
    for name in ("out", "lse"):
        near(moved[name], found[name])


def test_a_floor_below_every_mass_does_nothing(rng):
    spec = ra.Perceiver(inverted=True)
    x, duals = arrays(spec, rng)
    expected = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    floor = 0.99 * float(np.exp(expected["lse"].min()))
    for name, value in forward_and_gradients(replace(spec, floor=floor), x, duals["out"], duals["lse"]).items():
        near(value, expected[name])


def test_latents_that_win_next_to_nothing_keep_their_digits():
    """Masses of e^−800: shares underflow, their logarithms do not."""
    found = single(latents=[0, 800], array=[1, 1.001, 1.002], inverted=True)
    near(found.lse[0, 0], [math.log(math.fsum(math.exp(-0.8 * n) for n in range(3))) - 800, math.log(3)])
    weights = np.exp(-0.8 * np.arange(3))
    near(found.out[0, 0, 0], weights @ [[1], [1.001], [1.002]] / weights.sum())


@EVERY
def test_what_is_masked_is_never_read(spec, rng):
    x, duals = arrays(spec, rng, True)
    clean = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    assert not clean["out"][1].any() and np.isneginf(clean["lse"][1]).all()
    assert not clean["darray"][~x["mask"]].any()
    x["array"][~x["mask"]] = np.nan
    for name, value in forward_and_gradients(spec, x, duals["out"], duals["lse"]).items():
        near(value, clean[name], 0)


@pytest.mark.parametrize("spec", [SPECS[0], SPECS[1], SPECS[5]], ids=str)
def test_a_nan_in_a_visible_pixel_reaches_every_latent_of_its_sequence_and_no_other(spec, rng):
    x, _ = arrays(spec, rng)
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    x["array"][2, 4, 0] = np.nan
    found = ra.evaluate(spec, x, want=("out", "lse"))
    for name in ("out", "lse"):
        assert np.isnan(found[name][2]).all()
        near(found[name][:2], expected[name][:2], 0)


# The plan, and gradients by what shares nothing with the tape


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@MASKS
@pytest.mark.parametrize("changed", [{}, {"B": 0}, {"Lq": 0}, {"Lq": 1}], ids=str)
def test_the_plan_means_what_the_reference_says(spec, masked, changed, rng):
    x, _ = arrays(spec, rng, masked, **changed)
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    plan = built(spec, x).plan
    assert type(plan) is (Mix if spec.floor else Score)
    found = execute(plan)
    near(found["out"], expected.out)
    if not spec.floor:
        near(found["lse"], expected.lse)


@pytest.mark.parametrize("spec", SPECS[:5], ids=str)
@MASKS
def test_the_kernels_agree(spec, masked, rng):
    x, duals = arrays(spec, rng, masked)
    expected = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    found = forward_and_gradients(spec, x, duals["out"], duals["lse"], engine="cpu")
    assert np.abs(found.pop("dlatent_bias", np.zeros(1)) - expected.pop("dlatent_bias", np.zeros(1))).max() < 1e-11
    for name, value in found.items():
        near(value, expected[name], 1e-11)


def test_the_kernels_refuse_a_floor():
    assert "lowers to Mix" in ra.explain(SPECS[5], SIZES)["engines"]["cpu"]


@EVERY
@MASKS
def test_gradients_by_complex_step(spec, masked, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, duals = arrays(spec, rng, masked)
    problem = built(spec, x)
    gradients = ra.vjp(spec, x, duals)
    size = max(np.abs(g).max() for g in gradients.values())
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.variant.reference(problem.spec, x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        assert abs((gradients[f"d{name}"] * u).sum() - forward) <= 1e-11 * size


def test_the_text_runs_on_balls(rng):
    x, duals = arrays(SPECS[4], rng, True, B=2)
    problem = built(SPECS[4], x)
    proved = certified.certify(problem, duals, tuple(problem.real_inputs()), bits=(128,))
    for name, value in forward_and_gradients(SPECS[4], x, duals["out"], duals["lse"]).items():
        differ = value != proved[name].value
        assert np.abs(value[differ] - proved[name].value[differ]).max() < 1e-11


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "rms"}, "norm is 'layer' or None; given: 'rms'"),
        ({"norm": True}, "norm is 'layer' or None; given: True"),
        ({"eps": 0}, "eps is a positive number; given: 0"),
        ({"eps": None}, "eps is a finite number"),
        ({"axes": ()}, "axes is a tuple of sizes from 1 on, or None"),
        ({"axes": [3]}, "axes is a tuple of sizes"),
        ({"axes": (3, 0)}, "axes is a tuple of sizes"),
        ({"bands": 0}, "bands is an integer from 1 on; given: 0"),
        ({"bands": 2.0}, "bands is an integer"),
        ({"max_frequency": -1}, "max_frequency is a positive number; given: -1"),
        ({"inverted": 1}, "inverted is True or False; given: 1"),
        ({"floor": 1e-8}, "floor is 0, or a positive number where inverted=True"),
        ({"inverted": True, "floor": -1.0}, "floor is 0, or a positive number"),
        ({"scale": math.inf}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Perceiver(**options)


def test_axes_that_are_not_the_array_s(rng):
    spec = ra.Perceiver(axes=(2, 2), bands=1)
    x, _ = arrays(spec, rng)
    with pytest.raises(ShapeError, match=r"axes \(2, 2\) have 4 pixels in all; given: Lk=6"):
        ra.evaluate(spec, x)


def test_weights_without_the_features(rng):
    spec = ra.Perceiver(axes=(2, 3), bands=2)
    x, _ = arrays(spec, rng)
    with pytest.raises(ShapeError, match=r"10 features, 2·2 \+ 1 for each axis: F = 13; given: F=3"):
        ra.evaluate(spec, x | {name: x[name][:, :3] for name in ("wk", "wv")})


def test_gains_are_inputs_of_a_norm_alone(rng):
    x, _ = arrays(SPECS[1], rng)
    with pytest.raises(ShapeError, match="unknown array 'latent_gain'"):
        ra.evaluate(ra.Perceiver(), x)


def test_operations_are_linear_in_the_pixels():
    """2 (B Hq (Lq E D + Lk C (D + Dv)) + B Hq Lq Lk (D + Dv)); the score matrix has B Hq Lq Lk doubles."""
    told = ra.explain(ra.Perceiver(), SIZES)
    assert told["operations"] == 2 * (3 * 2 * (5 * 4 * 3 + 6 * 3 * 5) + 3 * 2 * 5 * 6 * 5)
    assert told["score_matrix_bytes"] == 8 * 3 * 2 * 5 * 6
