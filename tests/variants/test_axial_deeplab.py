"""Axial-DeepLab against numbers worked by hand, plain loops, the layout of checkpoints, its plan, and complex step."""

import math
from itertools import combinations, product

import numpy as np
import pytest
from checks import near, slopes_by_complex_step

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError, Unsupported
from refattn.plan import execute

MODULE = ra.variants()["axial_deeplab"].module
SUBSETS = [c for n in range(4) for c in combinations(("query", "key", "value"), n)]
SPECS = [
    ra.AxialDeepLab(span=3, axis=axis, terms=terms, norm=norm, scale=0.75 if norm and len(terms) == 1 else None)
    for axis, terms, norm in product(("height", "width"), SUBSETS, (False, True))
]
EVERY = pytest.mark.parametrize(
    "spec", SPECS, ids=lambda s: f"{s.axis}-{'+'.join(s.terms) or 'none'}-{'norm' if s.norm else 'plain'}"
)


def arrays(spec, rng, other=4, heads=(4, 2), batch=2):
    """Inputs of an image of `other` lines, and cotangents of out and lse."""
    n, (hq, hkv) = spec.span * other, heads
    sizes = {"B": batch, "Hq": hq, "Hkv": hkv, "Lq": n, "Lk": n, "D": 3, "Dv": 2}
    made = {n: rng.standard_normal(a.shape(sizes)) for n, a in (MODULE.signature(spec) | MODULE.outputs(spec)).items()}
    duals = {name: made.pop(name) for name in ("out", "lse")}
    return made, duals


def both(spec, x, **options):
    return dict(ra.evaluate(spec, x, want=("out", "lse"), **options))


# Numbers worked by hand

LN2, LN3 = math.log(2), math.log(3)


def column(*values):
    return np.array(values, float).reshape(-1, 1)


def pixels(*values):
    return column(*values)[None, None]


TWO = {  # Two pixels of width 1; the tables' rows are those of i − j = −1, 0, 1.
    "q": pixels(1, 0),
    "k": pixels(0, LN2),
    "v": pixels(2, 4),
    "rq": column(LN3, 0, 5),
    "rk": column(7, 0, 1),
    "rv": column(10, 100, 1000),
}


@pytest.mark.parametrize("axis", ["height", "width"])
def test_two_pixels(axis):
    """s_00 = 0, s_01 = ln 2 + rq[−1] + ln 2 · rk[1] = ln 12; pixel 1 has q = 0, k_1 reads rk[0] = 0: equal scores.

    Values: 2 + rv[0] and 4 + rv[−1] for pixel 0, 2 + rv[1] and 4 + rv[0] for pixel 1.
    """
    found = both(ra.AxialDeepLab(span=2, axis=axis), TWO)
    near(found["out"].ravel(), [(102 + 12 * 14) / 13, (1002 + 104) / 2])
    near(found["lse"].ravel(), [math.log(13), LN2])


def test_two_pixels_with_gains_and_offsets():
    """Gains 2, 1, 0: s_01 = 2 ln 2 + ln 3 = ln 12; offsets ln 5 − ln 3 + ln 3 in lse; out = 3 sv − sve + 1 + 2."""
    gains = {"qk_gain": 2, "qr_gain": 1, "kr_gain": 0, "qk_offset": math.log(5), "qr_offset": -LN3, "kr_offset": LN3}
    x = TWO | {name: np.array([value], float) for name, value in gains.items()}
    x |= {n: column(value) for n, value in {"sv_gain": 3, "sv_offset": 1, "sve_gain": -1, "sve_offset": 2}.items()}
    found = both(ra.AxialDeepLab(span=2, norm=True), x)
    near(found["out"].ravel(), [3 * 50 / 13 + 3 - 220 / 13, 3 * 3 + 3 - 550])
    near(found["lse"].ravel(), [math.log(13 * 5), math.log(2 * 5)])


def test_gradients_of_the_tables_by_hand():
    """q = k = 0 on three pixels: p = 1/3; drv[n] is 1/3 for each pair at i − j = n, and dq = drq = 0 for dout = 1."""
    zero, tables = np.zeros((1, 1, 3, 1)), {"rq": column(1, 2, 3, 4, 5), "rk": column(5, 1, 4, 2, 3)}
    x = {"q": zero, "k": zero, "v": zero, **tables, "rv": np.zeros((5, 1))}
    found = ra.vjp(ra.AxialDeepLab(span=3), x, {"out": np.ones((1, 1, 3, 1))})
    near(found.drv.ravel(), np.array([1, 2, 3, 2, 1]) / 3)
    near(found.drq, np.zeros((5, 1)))
    near(found.dv.ravel(), np.ones(3))


# Plain loops


def plainly(spec, x):
    """The formula over Python floats, pair by pair; tables are read by a dictionary of i − j."""
    a, x = spec.span, {name: array.tolist() for name, array in x.items()}
    tables = {n: dict(zip(range(1 - a, a), x.get(n, []), strict=False)) for n in ("rq", "rk", "rv")}
    scale = 1.0 if spec.scale is None else spec.scale
    batch, heads, n = len(x["q"]), len(x["q"][0]), len(x["q"][0][0])
    repeat, width = heads // len(x["k"][0]), a if spec.axis == "width" else n // a
    out, lse = np.zeros((batch, heads, n, 2)), np.zeros((batch, heads, n))

    def dot(one, two):
        return math.fsum(s * t for s, t in zip(one, two, strict=True))

    def normal(name, value, *at):
        if not spec.norm:
            return value
        gain, offset = x[f"{name}_gain"], x[f"{name}_offset"]
        for index in at:
            gain, offset = gain[index], offset[index]
        return gain * value + offset

    for b, h, pixel in product(range(batch), range(heads), range(n)):
        k, v, q = x["k"][b][h // repeat], x["v"][b][h // repeat], x["q"][b][h][pixel]
        (row, col), line = divmod(pixel, width), []
        for r, c in ((r, c) for r in range(n // width) for c in range(width)):
            if spec.axis == "height" and c == col:
                line.append((row - r, r * width + c))
            if spec.axis == "width" and r == row:
                line.append((col - c, r * width + c))
        s = []
        for behind, j in line:
            logit = normal("qk", dot(q, k[j]), h)
            logit += normal("qr", dot(q, tables["rq"][behind]), h) if "query" in spec.terms else 0
            logit += normal("kr", dot(k[j], tables["rk"][-behind]), h) if "key" in spec.terms else 0
            s.append(scale * logit)
        z = math.fsum(map(math.exp, s))
        lse[b, h, pixel] = math.log(z)
        for d in range(2):
            sv = math.fsum(math.exp(t) * v[j][d] for t, (_, j) in zip(s, line, strict=True)) / z
            out[b, h, pixel, d] = normal("sv", sv, h, d)
            if "value" in spec.terms:
                sve = math.fsum(math.exp(t) * tables["rv"][n][d] for t, (n, _) in zip(s, line, strict=True)) / z
                out[b, h, pixel, d] += normal("sve", sve, h, d)
    return {"out": out, "lse": lse}


@EVERY
def test_against_plain_loops(spec, rng):
    x, _ = arrays(spec, rng)
    expected = plainly(spec, x)
    for name, value in both(spec, x).items():
        near(value, expected[name], 1e-11)


# The layout of the authors' checkpoints


def test_a_checkpoint_s_table_and_batch_normalisations(rng):
    """Groups of 2 channels for q and k and 4 for v; one table (2·4, 2A − 1); bn_output has sv, sve, sv, sve, ..."""
    lines, groups, a, eps = 5, 3, 4, 1e-5
    q, k, v = (rng.standard_normal((lines, groups, c, a)) for c in (2, 2, 4))
    table = rng.standard_normal((8, 2 * a - 1))
    of_logits, of_outputs = (
        {n: rng.random(size) + 0.5 if n in ("weight", "var") else rng.standard_normal(size)
         for n in ("weight", "bias", "mean", "var")}
        for size in (3 * groups, 2 * 4 * groups)
    )  # fmt: skip

    def bn(p, t):
        p = {n: array.reshape(1, -1, *(1,) * (t.ndim - 2)) for n, array in p.items()}
        return (t - p["mean"]) / np.sqrt(p["var"] + eps) * p["weight"] + p["bias"]

    row, col = np.mgrid[:a, :a]
    rq, rk, rv = np.split(table[:, row - col + a - 1], [2, 4])
    qk = np.einsum("bgci,bgcj->bgij", q, k)
    qr = np.einsum("bgci,cij->bgij", q, rq)
    kr = np.einsum("bgcj,cji->bgij", k, rk)
    s = bn(of_logits, np.concatenate([qk, qr, kr], 1)).reshape(lines, 3, groups, a, a).sum(1)
    p = np.exp(s) / np.exp(s).sum(-1, keepdims=True)
    sv, sve = np.einsum("bgij,bgcj->bgci", p, v), np.einsum("bgij,cij->bgci", p, rv)
    by_turns = np.stack([sv, sve], 3).reshape(lines, 2 * 4 * groups, a)
    expected = bn(of_outputs, by_turns).reshape(lines, groups, 4, 2, a).sum(3)

    def affine(p):
        gain = p["weight"] / np.sqrt(p["var"] + eps)
        return gain, p["bias"] - p["mean"] * gain

    x = {name: array.transpose(0, 1, 3, 2) for name, array in zip("qkv", (q, k, v), strict=True)}
    x |= zip(("rq", "rk", "rv"), (part.T for part in np.split(table, [2, 4])), strict=True)
    for part, logit, output in zip(("gain", "offset"), affine(of_logits), affine(of_outputs), strict=True):
        x |= zip((f"qk_{part}", f"qr_{part}", f"kr_{part}"), logit.reshape(3, groups), strict=True)
        pairs = output.reshape(groups, 4, 2)
        x |= {f"sv_{part}": pairs[..., 0], f"sve_{part}": pairs[..., 1]}
    found = ra.evaluate(ra.AxialDeepLab(span=a, axis="width", norm=True), x).out
    near(found.transpose(0, 1, 3, 2), expected, 1e-11)


# Identities


@pytest.mark.parametrize("axis", ["height", "width"])
@pytest.mark.parametrize("scale", [None, 0.5])
def test_tables_of_zeros_are_axial_attention_along_that_axis(axis, scale, rng):
    spec = ra.AxialDeepLab(span=3, axis=axis, scale=scale)
    x, duals = arrays(spec, rng)
    plain = {name: x[name] for name in "qkv"}
    zeros = {name: np.zeros_like(x[name]) for name in ("rq", "rk", "rv")}
    axial = ra.Axial(width=4 if axis == "height" else 3, axes=(axis,), scale=scale or 1.0)
    expected = both(axial, plain) | dict(ra.vjp(axial, plain, duals))
    for given in (spec, ra.AxialDeepLab(span=3, axis=axis, scale=scale, terms=())):
        inputs = plain | (zeros if given.terms else {})
        found = both(given, inputs) | dict(ra.vjp(given, inputs, duals))
        for name, value in expected.items():
            near(found[name], value)


@EVERY
def test_terms_left_out_have_tables_of_zeros(spec, rng):
    whole = ra.AxialDeepLab(**(vars(spec) | {"terms": ("query", "key", "value")}))
    x, _ = arrays(whole, rng)
    gone = {n for t, n in (("query", "rq"), ("key", "rk"), ("value", "rv")) if t not in spec.terms}
    silent = {n: np.zeros_like(a) for n, a in x.items() if n in gone | {"qr_offset", "kr_offset", "sve_offset"}}
    expected = both(whole, x | silent)
    there = {n: a for n, a in (x | silent).items() if n in MODULE.signature(spec)}
    for name, value in both(spec, there).items():
        near(value, expected[name])


def test_gains_of_1_and_offsets_of_0_change_nothing(rng):
    spec = ra.AxialDeepLab(span=3, norm=True)
    x, _ = arrays(spec, rng)
    given = {n: np.ones_like(a) if n.endswith("gain") else np.zeros_like(a) for n, a in x.items() if "_" in n}
    expected = both(ra.AxialDeepLab(span=3), {n: a for n, a in x.items() if "_" not in n})
    for name, value in both(spec, x | given).items():
        near(value, expected[name])


def test_offsets_of_logits_add_to_lse_times_the_scale_and_reach_nothing_else(rng):
    spec = ra.AxialDeepLab(span=3, norm=True, scale=0.5)
    x, duals = arrays(spec, rng)
    plain = both(spec, x)
    moved = both(spec, x | {"kr_offset": x["kr_offset"] + np.array([1.0, -2, 3, 0])})
    near(moved["out"], plain["out"])
    near(moved["lse"], plain["lse"] + 0.5 * np.array([1.0, -2, 3, 0])[:, None])
    for name in ("dqk_offset", "dqr_offset", "dkr_offset"):
        near(ra.vjp(spec, x, duals)[name], 0.5 * duals["lse"].sum((0, 2)))


@pytest.mark.parametrize("norm", [False, True])
def test_the_image_turned_exchanges_the_axes(norm, rng):
    spec = ra.AxialDeepLab(span=3, norm=norm)
    x, _ = arrays(spec, rng)
    turned = np.arange(12).reshape(3, 4).T.ravel()
    expected = both(spec, x)
    rows = both(ra.AxialDeepLab(span=3, axis="width", norm=norm), x | {n: x[n][:, :, turned] for n in "qkv"})
    for name, value in rows.items():
        near(value, expected[name][:, :, turned])


def test_the_line_reversed_reverses_the_tables(rng):
    spec = ra.AxialDeepLab(span=3, axis="width")
    x, _ = arrays(spec, rng)
    mirror = np.arange(12).reshape(4, 3)[:, ::-1].ravel()
    other = {n: a[::-1] if n.startswith("r") else a[:, :, mirror] for n, a in x.items()}
    near(both(spec, other)["out"], both(spec, x)["out"][:, :, mirror])


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_pixel_that_is_nan_reaches_its_line_and_no_other(name, rng):
    spec = ra.AxialDeepLab(span=3)
    x, _ = arrays(spec, rng)
    expected = ra.evaluate(spec, x).out
    x[name][1, 0, 5, 1] = np.nan
    found, hit = ra.evaluate(spec, x).out, np.zeros(expected.shape, bool)
    at = {"q": (1, 0, 5), "k": (1, slice(0, 2), [1, 5, 9]), "v": (1, slice(0, 2), [1, 5, 9], 1)}[name]
    hit[at] = True
    assert np.isnan(found[hit]).all()
    near(found[~hit], expected[~hit], 0)


def test_the_order_of_the_terms_does_not_matter():
    assert ra.AxialDeepLab(span=2, terms=("value", "key", "query")) == ra.AxialDeepLab(span=2)


# The plan, and gradients by what shares nothing with the tape


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@pytest.mark.parametrize(("other", "batch"), [(4, 2), (1, 1), (0, 1), (4, 0)])
def test_the_plan_means_what_the_reference_says(spec, other, batch, rng):
    x, _ = arrays(spec, rng, other, batch=batch)
    found, expected = execute(built(spec, x).plan), both(spec, x)
    for name, value in expected.items():
        near(found[name], value)


def test_the_kernels_agree_without_tables_and_say_that_they_have_none_for_tables(rng):
    for norm in (False, True):
        spec = ra.AxialDeepLab(span=3, terms=(), norm=norm)
        x, duals = arrays(spec, rng)
        expected = both(spec, x) | dict(ra.vjp(spec, x, duals))
        for name, value in (both(spec, x, engine="cpu") | dict(ra.vjp(spec, x, duals, engine="cpu"))).items():
            near(value, expected[name], 1e-11)
    spec = ra.AxialDeepLab(span=3)
    x, _ = arrays(spec, rng)
    with pytest.raises(Unsupported, match="no kernel yet for vectors by relative position"):
        ra.evaluate(spec, x, engine="cpu")


@EVERY
def test_gradients_by_complex_step(spec, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, duals = arrays(spec, rng)
    slopes_by_complex_step(spec, x, duals, rng)


def test_operations_count_lines_only():
    """12 pixels in lines of 3, 2 heads: 72 pairs; three products of width 3 and two of width 2 each."""
    sizes = {"B": 1, "Hq": 2, "Hkv": 2, "Lq": 12, "Lk": 12, "D": 3, "Dv": 2}
    shown = ra.explain(ra.AxialDeepLab(span=3), sizes)
    assert shown["operations"] == 2 * 72 * (3 * 3 + 2 * 2)
    assert shown["score_matrix_bytes"] == 8 * 72
    assert ra.explain(ra.AxialDeepLab(span=3, terms=()), sizes)["operations"] == 2 * 72 * (3 + 2)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [({"span": s}, "span is the number of pixels along the axis") for s in (0, -2, 2.0, True, None)]
    + [({"span": 2, "axis": a}, "axis is 'height' or 'width'; given: ") for a in ("depth", None, ("height",))]
    + [({"span": 2, "terms": t}, "terms is a tuple of some of") for t in ("key", ("key", "key"), ("rq",), (["key"],))]
    + [({"span": 2, "norm": n}, "norm is True or False") for n in (1, None, "batch")]
    + [({"span": 2, "scale": math.inf}, "scale is a finite number")],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.AxialDeepLab(**options)


@pytest.mark.parametrize(("queries", "keys"), [(8, 12), (12, 8), (8, 8)])
def test_pixels_that_fill_no_image(queries, keys, rng):
    spec = ra.AxialDeepLab(span=3)
    x, _ = arrays(spec, rng)
    x |= {"q": np.ones((1, 1, queries, 3)), "k": np.ones((1, 1, keys, 3)), "v": np.ones((1, 1, keys, 2))}
    with pytest.raises(ShapeError, match=f"lines of 3 along the height.*given: Lq={queries}, Lk={keys}"):
        ra.evaluate(spec, x)


def test_a_table_of_another_span_is_refused_with_the_signature(rng):
    spec = ra.AxialDeepLab(span=3)
    x, _ = arrays(spec, rng)
    with pytest.raises(ShapeError, match=r"(?s)rq has size 7 where 5 is expected.*rq \(5, D\) real"):
        ra.evaluate(spec, x | {"rq": np.ones((7, 3))})
    with pytest.raises(ShapeError, match="unknown array 'sv_gain'"):
        ra.evaluate(spec, x | {"sv_gain": np.ones((4, 2))})


def test_a_table_that_is_not_finite_is_refused(rng):
    spec = ra.AxialDeepLab(span=3)
    x, _ = arrays(spec, rng)
    x["rk"][1, 0] = np.inf
    with pytest.raises(ShapeError, match="rk must hold finite numbers"):
        ra.evaluate(spec, x)
