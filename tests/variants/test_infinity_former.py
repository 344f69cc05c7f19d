"""∞-former: numbers worked by hand, plain loops, the closed-form Jacobians, and what a continuous memory must keep."""

import math
import tracemalloc

import numpy as np
import pytest
from checks import near, same
from infinity_former_loops import loops
from infinity_former_problems import BASE, SIZES, arrays

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError
from refattn.plan import execute
from refattn.tape import Tape
from refattn.variants import _densities as densities
from refattn.variants import infinity_former as module

OPTIONS = {
    "contracted": {},
    "bounded": {"contraction": None},
    "odd segment": {"segment": 3, "samples": 4},
    "segments of one": {"segment": 1, "contraction": 0.5, "ridge": 0.5},
    "l over L": {"positions": "i_over_L", "ridge": 2.0},
    "sparsemax": {"density": "sparsemax", "prior_deviation": 0.5, "prior_mean": 0.25},
    "bias": {"bias": True, "least_variance": 0.5},
    "moments": {"parameters": "moments", "scale": 1.5, "prior_mean": 0.5},
    "sticky": {"sticky": True, "bins": 16},
    "sticky, bounded": {"sticky": True, "bins": 4, "contraction": None},
    "mask net": {"mask": True},
    "everything": {"sticky": True, "bins": 8, "mask": True, "bias": True, "density": "sparsemax", "segment": 5},
}
EVERY = pytest.mark.parametrize("spec", [ra.InfinityFormer(**BASE | o) for o in OPTIONS.values()], ids=OPTIONS)


def wanted(spec):
    return (*module.outputs(spec), "state")


# Worked by hand


def test_the_mean_of_a_basis_function_under_a_gaussian():
    """N(μ; μ_j, σ² + σ_j²): with variances that sum to 1/2π it is exp(−π (μ − μ_j)²)."""
    half = np.array(1 / (4 * math.pi))
    found = densities.softmax_mean(np.array(0.25), half, np.array([0.25, 1.25, -0.25]), np.sqrt(half))
    near(found, [1.0, math.exp(-math.pi), math.exp(-math.pi / 4)])


def test_one_coefficient_fitted_once_and_then_contracted():
    """N = L = M = 1, σ_1 = 1/√2π, so that ψ(t) = exp(−πt²); points at 1, and then at ½ for what was and 1 for what is.

    B = ψ(1) x / (ψ(1)² + λ), then (ψ(½) ψ(1) B + ψ(1) x) / (ψ(½)² + ψ(1)² + λ); out = N(μ; 0, σ² + σ_1²) B.
    """
    sigma, one, half = (2 * math.pi) ** -0.5, math.exp(-math.pi), math.exp(-math.pi / 4)
    spec = ra.InfinityFormer(
        segment=1, basis=1, sigmas=(sigma,), samples=1, contraction=0.5, ridge=0.25, positions="i_over_L"
    )
    unit = np.ones((1, 1, 1))
    x = {"x": np.array([3.0, 5, 7]).reshape(1, 3, 1), "q": np.zeros((1, 1, 3, 1)), "wk": unit, "wv": unit}
    found = ra.evaluate(spec, x | {"w_mu": np.ones(1), "w_sigma": np.ones(1)}, want=("out", "kl", "state"))
    first = one * 3 / (one**2 + 0.25)
    second = (half * one * first + one * 5) / (half**2 + one**2 + 0.25)
    # A query of 0 has μ = σ(0) = ½ and σ² = softplus(0) = log 2.
    variance = math.log(2) + sigma**2
    r = math.exp(-(0.25) / (2 * variance)) / math.sqrt(2 * math.pi * variance)
    near(found.out.ravel(), [0, r * first, r * second])
    near(found.state["memory"].ravel(), [second])
    same(np.asarray(found.state["x"]).ravel(), np.array([7.0]))
    ratio = math.log(2) / 0.05**2
    near(found.kl.ravel(), [0.0] + 2 * [(ratio - math.log(ratio) - 1) / 2])


def test_moments_of_two_basis_functions():
    """Weights ¼ and ¾ at 0 and 1, widths ½: μ = ¾, σ² = ¾·¼ + ¼ = 7/16."""
    spec = ra.InfinityFormer(segment=1, basis=2, sigmas=(0.5,), parameters="moments", scale=1.0)
    x = {"wk": np.ones((1, 1, 1))}
    memory = np.array([0.0, math.log(3)]).reshape(1, 2, 1)
    mu, variance = module._parameters(spec, x, np.ones((1, 1, 1, 1)), memory)
    near(mu, np.array([[[0.75]]]))
    near(variance, np.array([[[7 / 16]]]))


def test_the_divergence_of_a_prior():
    """From itself it is 0; twice the variance gives (2 − ln 2 − 1) / 2; a mean one deviation off adds ½."""
    s = 0.25
    found = [densities.divergence(np.array(0.5), np.array(v), s, m) for v, m in ((s * s, None), (2 * s * s, 0.5))]
    near(found, [0.0, (1 - math.log(2)) / 2])
    near(densities.divergence(np.array(0.75), np.array(s * s), s, 0.5), 0.5)


# Plain loops


@EVERY
def test_against_plain_loops(spec, rng):
    x = arrays(spec, rng)
    found, expected = ra.evaluate(spec, x, want=wanted(spec)), loops(spec, x)
    for name in module.outputs(spec):
        near(found[name], expected[name], 1e-10)
    near(found.state["memory"], expected["memory"], 1e-11)


# The plan, and gradients by what shares nothing with the tape


@EVERY
@pytest.mark.parametrize("length", [0, 3, 13])
def test_the_plan_means_what_the_reference_says(spec, length, rng):
    x = arrays(spec, rng, L=length)
    near(execute(api.build(spec, x, "float64", ("out",)).plan)["out"], ra.evaluate(spec, x).out, 1e-10)


@EVERY
@pytest.mark.parametrize("done", [2, 4, 7, 12])
def test_the_plan_goes_on_from_a_state(spec, done, rng):
    x = arrays(spec, rng)
    parts = [{n: cut(spec, n, a, part) for n, a in x.items()} for part in (slice(0, done), slice(done, 13))]
    after = ra.evaluate(spec, parts[0], want=("state",)).state
    carried = {f"state_{name}": np.asarray(a) for name, a in after.items()}
    problem = api.build(spec, parts[1] | carried, "float64", ("out",), done)
    near(execute(problem.plan)["out"], ra.evaluate(spec, x).out[:, :, done:], 1e-10)


def cut(spec, name, array, part):
    dims = module.signature(spec)[name].dims.split()
    return array[tuple(part if d == "L" else slice(None) for d in dims)]


@EVERY
def test_gradients_by_complex_step(spec, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x = arrays(spec, rng)
    problem = api.build(spec, x, "float64", ("out",))
    real = problem.real_inputs()
    duals = {n: rng.standard_normal(a.shape(SIZES)) for n, a in module.outputs(spec).items()}
    gradients = ra.vjp(spec, x, duals)
    for name in real:
        u = rng.standard_normal(x[name].shape)
        moved = problem.text(x | {name: x[name] + 1e-30j * u})
        forward = sum((np.imag(moved[n]) / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-10)


def taped(mean, mu, variance, basis, weight):
    tape = Tape()
    leaves = [tape.variable(np.asarray(v)) for v in (mu, variance)]
    out = mean(*leaves, *basis)
    return tape.gradients([(out, weight)], leaves)


def test_the_jacobian_of_the_continuous_softmax(rng):
    """By θ = (μ/σ², −1/2σ²) it is E[φψ] − E[φ]E[ψ], φ = (t, t²), E[tψ_j] = S μ̃, E[t²ψ_j] = S (μ̃² + σ̃²) (paper, 3)."""
    mu, v = 0.4, 0.03
    c, s2, weight = np.array([0.0, 0.3, 0.9]), np.array([0.01, 0.04, 0.09]), rng.standard_normal(3)
    size = np.exp(-((mu - c) ** 2) / (2 * (v + s2))) / np.sqrt(2 * np.pi * (v + s2))
    centre, spread = (c * v + mu * s2) / (v + s2), v * s2 / (v + s2)
    by_first = size * centre - mu * size
    by_second = size * (centre**2 + spread) - (mu**2 + v) * size
    expected = [by_first / v, -by_first * mu / v**2 + by_second / (2 * v**2)]
    found = taped(densities.softmax_mean, mu, v, (c, np.sqrt(s2)), weight)
    near(found, [e @ weight for e in expected])


def test_the_jacobian_of_the_continuous_sparsemax(rng):
    """By θ it is ∫φψ − ∫φ ∫ψ / 2a over the support, here by a quadrature."""
    mu, v, c, s, weight = 0.4, 0.03, np.array([0.0, 0.3, 0.9]), np.array([0.1, 0.2, 0.3]), rng.standard_normal(3)
    a = (1.5 * v) ** (1 / 3)
    nodes, weights = np.polynomial.legendre.leggauss(80)
    t, w = mu + a * nodes, a * weights
    psi = np.exp(-(((t[:, None] - c) / s) ** 2) / 2) / (s * np.sqrt(2 * np.pi))
    phi = np.stack([t, t * t])
    by = (phi * w) @ psi - np.outer(phi @ w, w @ psi) / (2 * a)
    expected = [by[0] / v, -by[0] * mu / v**2 + by[1] / (2 * v**2)]
    near(taped(densities.sparsemax_mean, mu, v, (c, s), weight), [e @ weight for e in expected], 1e-11)


def test_no_gradient_goes_through_the_memory_that_was(rng):
    spec = ra.InfinityFormer(**BASE)
    x = arrays(spec, rng)
    for row, reached in ((7, slice(0, 4)), (11, slice(4, 8)), (12, slice(8, 12))):
        dout = np.zeros((2, 4, 13, 3))
        dout[:, :, row] = 1.0
        hit = ra.vjp(spec, x, {"out": dout}, wrt=("x",)).dx.any((0, 2))
        expected = np.zeros(13, bool)
        expected[reached] = True
        same(hit, expected)


# What the densities are


@pytest.mark.parametrize("mean", [densities.softmax_mean, densities.sparsemax_mean])
@pytest.mark.parametrize("variance", [1e-3, 0.04, 0.7])
def test_densities_have_mass_1(mean, variance):
    """Gaussians of width w at a spacing of w / 2 sum to 2/w everywhere, so their means do."""
    width = 0.02
    centres = np.arange(-6, 7, width / 2)
    near(mean(np.array(0.3), np.array(variance), centres, width).sum() * width / 2, 1.0, 1e-11)


def test_the_parabola_ends_where_it_should():
    """Half width (3σ²/2)^⅓: at σ² = 2/3 · 0.001, 0.1, where the density is a²/2σ² = 7.5 in the middle."""
    variance, narrow = np.array(0.002 / 3), 1e-5
    near(densities.half_width(variance), 0.1)
    at = np.array([0.5, 0.55, 0.599, 0.601, 0.399, 0.9])
    expected = [7.5, 7.5 * 0.75, 7.5 * (1 - 0.99**2), 0, 0, 0]
    near(densities.sparsemax_mean(np.array(0.5), variance, at, narrow), expected, 1e-6)


def test_a_histogram_is_of_all_queries_of_the_segment_so_far(rng):
    spec = ra.InfinityFormer(**BASE | {"sticky": True, "bins": 16})
    x = arrays(spec, rng)
    found = ra.evaluate(spec, x, want=wanted(spec))
    assert not found.histogram[:, :4].any()
    near(found.histogram[:, 4:].sum(-1), np.ones((2, 9)))
    # The mass of a token alone: what is not normalised grows by at most one for each head.
    mass = np.asarray(found.state["histogram"])
    near(mass / mass.sum(-1, keepdims=True), found.histogram[:, -1])
    assert (mass.sum(-1) <= 4).all()


def test_a_query_that_is_no_number_spoils_no_histogram_before_it(rng):
    spec = ra.InfinityFormer(**BASE, sticky=True, bins=7)
    x = arrays(spec, rng)
    clean = ra.evaluate(spec, x, want=("histogram",)).histogram
    x["q"][0, 0, 6] = np.nan
    found = ra.evaluate(spec, x, want=("histogram",)).histogram
    assert np.isnan(found[0, 6:8]).all()
    found[0, 6:8] = clean[0, 6:8]
    near(found, clean)


def test_a_first_segment_finds_nothing(rng):
    spec = ra.InfinityFormer(**BASE | {"sticky": True, "bins": 4})
    found = ra.evaluate(spec, arrays(spec, rng, L=4), want=wanted(spec))
    for name, array in found.items():
        if name != "state":
            assert not array.any(), name
    assert found.state["x"].shape == (2, 4, 3)
    assert not found.state["memory"].any()


# Engines, and what is refused


def test_the_certified_engine_agrees(rng):
    spec = ra.InfinityFormer(**BASE | {"sticky": True, "bins": 4, "density": "sparsemax"})
    x = arrays(spec, rng, B=1, L=11)
    found = ra.evaluate(spec, x, want=("out", "kl", "histogram"), engine="certified")
    for name, array in ra.evaluate(spec, x, want=("out", "kl", "histogram")).items():
        near(found[name], array, 1e-11)
        assert not (found.status[name] == 3).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment is an integer from 1 on; given: 0"),
        ({"basis": 5}, r"sigmas is a tuple whose length divides basis=5; given: \(0.01, 0.05\)"),
        ({"sigmas": (0.5, -0.5)}, "sigmas, ridge, least_variance, prior_deviation are positive"),
        ({"sigmas": [0.5]}, "sigmas is a tuple"),
        ({"ridge": 0.0}, "are positive"),
        ({"contraction": 1.0}, "contraction lies between 0 and 1, or is None; given: 1.0"),
        ({"density": "entmax"}, "density is one of 'softmax', 'sparsemax'; given: 'entmax'"),
        ({"positions": None}, "positions is one of 'centre_padded', 'i_over_L'"),
        ({"sticky": 1}, "sticky is True or False; given: 1"),
        ({"parameters": "moments", "bias": True}, "bias=True adds to affine parameters"),
        ({"prior_deviation": None}, "prior_deviation is a finite number"),
        ({"scale": math.nan}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.InfinityFormer(**{"segment": 4} | options)


def test_a_bin_that_is_none_and_weights_for_another_basis_are_refused(rng):
    spec = ra.InfinityFormer(**BASE | {"sticky": True, "bins": 16})
    x = arrays(spec, rng)
    x["drawn"][1, 2, 3] = 16
    with pytest.raises(ShapeError, match="drawn must lie between 0 and 16 - 1 = 15"):
        ra.evaluate(spec, x)
    with pytest.raises(ShapeError, match=r"(?s)w_mu has size 7 where 6 is expected.*w_mu \(6\) real"):
        ra.evaluate(spec, arrays(spec, rng) | {"w_mu": np.ones(7)})


def test_a_plan_holds_one_memory_for_each_segment_and_not_for_each_token():
    spec, sizes = ra.InfinityFormer(segment=64, basis=64, samples=64), SIZES | {"L": 512, "E": 128}
    # What is imported when it is first asked for does not count.
    ra.explain(spec, SIZES)
    tracemalloc.start()
    ra.explain(spec, sizes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < sizes["B"] * sizes["L"] * spec.basis * sizes["E"] * 8 / 2


def test_operations_of_reading_do_not_grow_with_what_went_before():
    spec = ra.InfinityFormer(**BASE)
    one, two = (ra.explain(spec, SIZES | {"L": 4 * n}) for n in (10, 20))
    assert two["operations"] == 2 * one["operations"]
