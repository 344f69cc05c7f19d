"""Axial attention against numbers worked by hand, plain loops, exact attention, its plan, and complex step."""

import math
from itertools import product

import numpy as np
import plain_loops as loops
import pytest
from checks import near

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError, Unsupported
from refattn.plan import Mix, execute

AXES = [("height",), ("width",), ("height", "width")]
EVERY = pytest.mark.parametrize("axes", AXES, ids="+".join)


def arrays(rng, height=3, width=4, heads=(4, 2), batch=2):
    """q, k, v and cotangents of out and lse."""
    (hq, hkv), n = heads, height * width
    shapes = {"q": (batch, hq, n, 3), "k": (batch, hkv, n, 3), "v": (batch, hkv, n, 2)}
    x = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    return x, {"out": rng.standard_normal((batch, hq, n, 2)), "lse": rng.standard_normal((batch, hq, n))}


def answers(spec, x, duals):
    """Every output that the spec has, and the gradients for their cotangents."""
    offered = ra.variants()["axial"].module.outputs(spec)
    found = ra.evaluate(spec, x, want=tuple(offered))
    return dict(found) | dict(ra.vjp(spec, x, {name: duals[name] for name in offered}))


# Numbers worked by hand


def test_equal_scores_give_the_mean_of_the_row_and_that_of_the_column():
    """Values 1 2 3 / 4 5 6: row means 2 and 5, column means 5/2, 7/2, 9/2."""
    zero, v = np.zeros((1, 1, 6, 1)), np.arange(1.0, 7).reshape(1, 1, 6, 1)
    x = {"q": zero, "k": zero, "v": v}
    rows, columns = [2, 2, 2, 5, 5, 5], [2.5, 3.5, 4.5, 2.5, 3.5, 4.5]
    near(ra.evaluate(ra.Axial(width=3, axes=("width",)), x).out.ravel(), rows)
    near(ra.evaluate(ra.Axial(width=3, axes=("height",)), x).out.ravel(), columns)
    near(ra.evaluate(ra.Axial(width=3), x).out.ravel(), np.add(rows, columns))
    near(ra.evaluate(ra.Axial(width=3, axes=("width",)), x, want=("lse",)).lse.ravel(), np.full(6, math.log(3)))


def test_scores_weigh_along_each_line():
    """Image 2×2, k = 0, ln 3 / ln 2, 0, q = 1 at the first pixel: weights 1:3 on its row and 1:2 on its column."""
    k, v = (np.array(a, float).reshape(1, 1, 4, 1) for a in ([0, math.log(3), math.log(2), 0], [8, 4, 2, 100]))
    q = np.array([1.0, 0, 0, 0]).reshape(1, 1, 4, 1)
    out = ra.evaluate(ra.Axial(width=2, scale=1.0), {"q": q, "k": k, "v": v}).out.ravel()
    near(out[0], (8 + 3 * 4) / 4 + (8 + 2 * 2) / 3)
    near(out[3], (2 + 100) / 2 + (4 + 100) / 2)


def test_gradient_of_the_values_counts_each_pixel_s_row_and_column():
    """Equal scores on a 2×3 image, dout = 1 at the first pixel: 1/3 to its row, 1/2 to its column, both to itself."""
    zero, dout = np.zeros((1, 1, 6, 1)), np.zeros((1, 1, 6, 1))
    dout[0, 0, 0] = 1
    found = ra.vjp(ra.Axial(width=3), dict.fromkeys("qkv", zero), {"out": dout}).dv.ravel()
    near(found, [1 / 3 + 1 / 2, 1 / 3, 1 / 3, 1 / 2, 0, 0])


# Plain loops


@EVERY
@pytest.mark.parametrize(("height", "width"), [(3, 4), (1, 5), (5, 1), (2, 2)])
def test_against_plain_loops_over_all_pixels(axes, height, width, rng):
    x, duals = arrays(rng, height, width)
    found = answers(ra.Axial(width=width, axes=axes), x, duals)
    sees = {
        "height": lambda b, h, i, j: i % width == j % width,
        "width": lambda b, h, i, j: i // width == j // width,
    }
    lists = [x[name].tolist() for name in "qkv"] + [duals["out"].tolist()]
    dlse = duals["lse"].tolist() if len(axes) == 1 else None
    parts = [loops.attention(*lists, dlse, scale=3**-0.5, sees=sees[axis]) for axis in axes]
    assert set(found) == {"out", "dq", "dk", "dv"} | ({"lse"} if len(axes) == 1 else set())
    for name, value in found.items():
        near(value, sum(np.array(part[name]) for part in parts), 1e-11)


# Identities


@pytest.mark.parametrize(("axis", "width"), [("height", 1), ("width", 12)])
def test_an_image_of_one_line_is_exact_attention(axis, width, rng):
    x, duals = arrays(rng)
    expected = dict(ra.evaluate(ra.SDPA(), x, want=("out", "lse"))) | dict(ra.vjp(ra.SDPA(), x, duals))
    for name, value in answers(ra.Axial(width=width, axes=(axis,)), x, duals).items():
        near(value, expected[name])


def test_the_image_turned_exchanges_the_axes(rng):
    x, _ = arrays(rng)
    turned = np.arange(12).reshape(3, 4).T.ravel()
    along = ra.evaluate(ra.Axial(width=4, axes=("height",)), x).out[:, :, turned]
    near(ra.evaluate(ra.Axial(width=3, axes=("width",)), {n: a[:, :, turned] for n, a in x.items()}).out, along)


def test_the_order_of_the_axes_does_not_matter():
    assert ra.Axial(width=2, axes=("width", "height")) == ra.Axial(width=2)


def test_a_pixel_that_is_nan_reaches_its_row_and_column_and_no_other(rng):
    x, _ = arrays(rng)
    expected = ra.evaluate(ra.Axial(width=4), x).out
    x["k"][1, 0, 6, 1] = np.nan
    found = ra.evaluate(ra.Axial(width=4), x).out
    hit = np.zeros(found.shape, bool)
    hit[1, :2, [4, 5, 6, 7, 2, 10]] = True
    assert np.isnan(found[hit]).all()
    near(found[~hit], expected[~hit], 0)


# The plan, and gradients by what shares nothing with the tape


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@pytest.mark.parametrize(("height", "width", "batch"), [(3, 4, 2), (1, 3, 1), (0, 2, 1), (2, 3, 0)])
def test_the_plan_means_what_the_reference_says(axes, height, width, batch, rng):
    x, _ = arrays(rng, height, width, batch=batch)
    spec = ra.Axial(width=width, axes=axes)
    found = execute(built(spec, x).plan)
    assert set(found) == ({"out", "lse"} if len(axes) == 1 else {"out"})
    for name, value in found.items():
        near(value, ra.evaluate(spec, x, want=(name,))[name])


@pytest.mark.parametrize("axis", ["height", "width"])
def test_the_kernels_agree_along_one_axis(axis, rng):
    x, duals = arrays(rng)
    spec = ra.Axial(width=4, axes=(axis,))
    expected = answers(spec, x, duals)
    near(ra.evaluate(spec, x, engine="cpu").out, expected["out"], 1e-11)
    for name, value in ra.vjp(spec, x, duals, engine="cpu").items():
        near(value, expected[name], 1e-11)


def test_the_cpu_engine_says_that_it_runs_no_mix(rng):
    x, duals = arrays(rng)
    for call in (
        lambda: ra.evaluate(ra.Axial(width=4), x, engine="cpu"),
        lambda: ra.vjp(ra.Axial(width=4), x, {"out": duals["out"]}, engine="cpu"),
    ):
        with pytest.raises(Unsupported, match="the cpu engine runs Score plans, and axial lowers to Mix"):
            call()
    with pytest.raises(Unsupported, match="axial lowers to Mix, where a Score is needed"):
        assert built(ra.Axial(width=4), x).score


@EVERY
def test_gradients_by_complex_step(axes, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, duals = arrays(rng)
    problem = built(ra.Axial(width=4, axes=axes), x)
    duals = {name: w for name, w in duals.items() if len(axes) == 1 or name == "out"}
    gradients = ra.vjp(problem.spec, x, duals)
    for name in "qkv":
        u = rng.standard_normal(x[name].shape)
        moved = problem.variant.reference(problem.spec, x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-11)


def test_explain_shows_both_scores_and_counts_lines_only():
    """L (height + width) pairs a head: 2 heads, 12 pixels, lines of 3 and 4, widths 3 + 2."""
    sizes = {"B": 1, "Hq": 2, "Hkv": 2, "Lq": 12, "Lk": 12, "D": 3, "Dv": 2}
    shown = ra.explain(ra.Axial(width=4), sizes)
    assert [list(part) for part in shown["plan"]["parts"]] == [["Score"], ["Score"]]
    assert shown["operations"] == 2 * 2 * 12 * (3 + 4) * 5
    assert shown["score_matrix_bytes"] == 8 * 2 * 12 * (3 + 4)
    assert shown["engines"]["cpu"] == "the cpu engine runs Score plans, and axial lowers to Mix"
    assert isinstance(built(ra.Axial(width=4), {n: np.zeros((1, 1, 4, 1)) for n in "qkv"}).plan, Mix)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [({"width": w}, "width is the number of pixels in a row") for w in (0, -2, 2.0, True, None)]
    + [({"width": 2, "axes": a}, "axes is ") for a in ((), "width", ("width", "width"), ("depth",), (["width"],))]
    + [({"width": 2, "scale": math.nan}, "scale is a finite number")],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Axial(**options)


@pytest.mark.parametrize(("queries", "keys"), [pair for pair in product((8, 9), (8, 9)) if pair != (8, 8)])
def test_pixels_that_fill_no_image(queries, keys):
    q, k = np.ones((1, 1, queries, 2)), np.ones((1, 1, keys, 2))
    with pytest.raises(ShapeError, match=rf"rows of width 4: .*given: Lq={queries}, Lk={keys}"):
        ra.evaluate(ra.Axial(width=4), {"q": q, "k": k, "v": k})


def test_the_sum_of_two_softmaxes_has_no_lse(rng):
    x, duals = arrays(rng)
    with pytest.raises(SpecError, match="want names 'lse'; axial offers out"):
        ra.evaluate(ra.Axial(width=4), x, want=("out", "lse"))
    with pytest.raises(ShapeError, match="cotangent of 'lse'"):
        ra.vjp(ra.Axial(width=4), x, duals)
