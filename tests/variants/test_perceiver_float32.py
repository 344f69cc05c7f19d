"""What the golden cases of Perceiver let pass: an honest float32 kernel, its features formed as kernels form them."""

import math

import numpy as np
import pytest

import refattn as ra
from refattn.golden import inputs as recipes
from refattn.golden.build import bounds, problem_of
from refattn.profiles import PROFILE_OF, PROFILES


def in_float32(case):
    """Out and lse as a float32 kernel finds them, features of unreduced angles and a position by steps among it."""
    problem = problem_of(case, recipes.inputs(case))
    spec, x, f = problem.spec, problem.inputs, np.float32
    rows, latents = x["array"], x["latents"]
    if spec.axes:
        grids = np.meshgrid(*(f(-1) + f(2 / max(n - 1, 1)) * np.arange(n, dtype=f) for n in spec.axes), indexing="ij")
        steps = np.linspace(1, spec.max_frequency / 2, spec.bands).astype(f)
        angles = [g.reshape(-1, 1) * steps * f(math.pi) for g in grids]
        made = [m for g, a in zip(grids, angles, strict=True) for m in (np.sin(a), np.cos(a), g.reshape(-1, 1))]
        rows = np.concatenate(
            [rows, np.broadcast_to(np.concatenate(made, -1), (len(rows), len(made[0]), spec.channels))], -1
        )
    if spec.norm:
        sides = ((latents, "latent"), (rows, "array"))
        latents, rows = (
            (a - a.mean(-1, keepdims=True)) / np.sqrt(a.var(-1, keepdims=True) + f(spec.eps)) * x[f"{side}_gain"]
            + x[f"{side}_bias"]
            for a, side in sides
        )
    q, k, v = (np.einsum("ble,hed->bhld", a, x[w]) for a, w in ((latents, "wq"), (rows, "wk"), (rows, "wv")))
    s = f(spec.scale) * (q @ k.swapaxes(2, 3))
    s = np.where(x.get("mask", np.ones(rows.shape[:2], bool))[:, None, None], s, f(-np.inf))
    assert s.dtype == f
    return problem, s, v


@pytest.mark.parametrize(
    "case", [c for c in ra.variants()["perceiver"].cases() if c.dtype == "float32"], ids=lambda c: c.name
)
def test_a_float32_kernel_is_within_the_bound(case):
    problem, s, v = in_float32(case)
    top = s.max(2 if problem.spec.inverted else 3, keepdims=True)
    p = np.exp(s - np.where(np.isneginf(top), np.float32(0), top))
    if problem.spec.inverted:
        p = p / p.sum(2, keepdims=True)
    mass = np.maximum(p.sum(-1, keepdims=True), np.float32(problem.spec.floor))
    out = (p @ v) / np.where(mass == 0, np.float32(1), mass)
    assert out.dtype == np.float32
    limit = bounds(problem, {}, (), PROFILES[PROFILE_OF[case.dtype]])["out"]
    assert (np.abs(out - problem.evaluate(np.asarray)["out"]) <= limit).all()
