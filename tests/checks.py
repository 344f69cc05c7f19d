"""Comparisons and inputs that several test files use."""

import numpy as np

import refattn as ra
from refattn import api
from refattn.bound import BoundSpace
from refattn.engines import cpu
from refattn.engines.cpu import fast
from refattn.profiles import FLOAT32

OUTPUTS = ("out", "lse")


def near(found, expected, relative=1e-12):
    """Both are infinite, zero or NaN alike, else they differ by the rounding of some hundred operations at most."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0.0)
    np.testing.assert_allclose(found, expected, rtol=relative, atol=relative * size, strict=True)


def same(found, expected):
    """The same bits, NaN included."""
    np.testing.assert_array_equal(found, expected, strict=True)


def within(spec, inputs, alone=True, stored=np.float32):
    """Out and lse of the cpu engine lie inside the published bound, and no row is made twice.

    `stored`: what the kernel is given k and v in, if alone; their numbers must be the same in it.
    """
    names = OUTPUTS if spec.normalizer == "softmax" else ("out",)
    checked = api.build(spec, inputs, None, names)
    found = cpu.run(checked)
    assert set(found) == set(names)
    if alone:
        plan = checked.score
        assert fast.takes(plan)
        kinds = {"q": np.float32, "k": stored, "v": stored}
        q, k, v = (np.ascontiguousarray(getattr(plan, n), kind) for n, kind in kinds.items())
        out, lse, redo = fast.run(plan, q, k, v)
        assert not redo.any()
        found = {"out": out, "lse": lse}
    expected = checked.evaluate(BoundSpace(FLOAT32).real)
    for n in names:
        live = ~np.isneginf(expected[n].x)
        same(np.isneginf(found[n]), ~live)
        assert (np.abs(found[n][live] - expected[n].x[live]) <= expected[n].e[live]).all(), n
    return found


def qkv(rng, sizes, dtype=np.float64):
    """Arrays q, k, v, dout and dlse of the sizes (B, Hq, Hkv, Lq, Lk, D, Dv)."""
    batch, heads, groups, lq, lk, width, dv = sizes
    shapes = {
        "q": (batch, heads, lq, width),
        "k": (batch, groups, lk, width),
        "v": (batch, groups, lk, dv),
        "dout": (batch, heads, lq, dv),
        "dlse": (batch, heads, lq),
    }
    return {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}


def forward_and_gradients(spec, inputs, dout, dlse=None, engine="reference"):
    """One dictionary of out, lse and the gradients of every real input."""
    weights = {"out": dout} if dlse is None else {"out": dout, "lse": dlse}
    outputs = ra.evaluate(spec, inputs, want=("out", "lse"), engine=engine)
    return dict(outputs) | dict(ra.vjp(spec, inputs, weights, engine=engine))


def slopes_by_complex_step(spec, x, duals, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    problem = api.build(spec, x, "float64", ("out",))
    gradients = ra.vjp(spec, x, duals)
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.text(x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-11)
