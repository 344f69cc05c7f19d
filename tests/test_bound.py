"""The rules of refattn.bound: sound at the corners of what they allow, sound against balls, and not far from tight."""

import ast
import inspect
from itertools import product

import flint
import numpy as np
import pytest
from problems import PROBLEMS, arrays
from scipy.special import erf

import refattn as ra
from refattn import api, bound, error_function, exponential, numeric, ordered, trigonometric
from refattn.bound import Bounded, BoundSpace
from refattn.engines.certified.balls import BALLS
from refattn.golden import build
from refattn.profiles import FLASH_BF16, FLASH_F16, FLOAT32, FLOAT64, PROFILES

KERNELS = [FLOAT32, FLASH_BF16, FLASH_F16]


def corners(rng, profile, shape=(4, 500)):
    """Centres, an exact value within e of each, and what an evaluation may have found, within e of that."""
    e = 2.0 ** rng.uniform(-30, -6, shape) * rng.choice([0, 1], shape, p=[0.1, 0.9])
    x = rng.standard_normal(shape) + 2 * rng.choice([-1, 1], shape)
    exact = x + e * rng.choice([-1, 1], shape)
    return Bounded(BoundSpace(profile), x, e), exact, exact + e * rng.choice([-1, 1], shape)


BINARY = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.true_divide}
UNARY = {"exp": np.exp, "log": np.log, "tanh": np.tanh, "sin": np.sin, "cos": np.cos, "sqrt": np.sqrt, "erf": erf}


def admissible(found, exact, got):
    """The result is within its bound of the exact one, and so is the centre; float64 noise is far below."""
    assert (np.abs(got - exact) <= found.e * (1 + 1e-9)).all()
    assert (np.abs(found.x - exact) <= found.e * (1 + 1e-9) + 1e-15 * np.abs(exact)).all()


@pytest.mark.parametrize("name", BINARY)
def test_a_rule_for_two_holds_at_its_corners(rng, name):
    profile, op = FLOAT32, BINARY[name]
    (a, a_exact, a_got), (b, b_exact, b_got) = corners(rng, profile), corners(rng, profile)
    if name == "div":
        b, b_exact, b_got = Bounded(b.space, b.x + 8, b.e), b_exact + 8, b_got + 8
    found = getattr(BoundSpace(profile), name)(a, b)
    for sign in (-1, 1):
        admissible(found, op(a_exact, b_exact), op(a_got, b_got) * (1 + sign * profile.unit))


@pytest.mark.parametrize("name", UNARY)
def test_a_rule_for_one_holds_at_its_corners(rng, name):
    profile, f = FLOAT32, UNARY[name]
    a, exact, got = corners(rng, profile)
    if name in ("log", "sqrt"):
        a, exact, got = Bounded(a.space, a.x + 8, a.e), exact + 8, got + 8
    found = getattr(BoundSpace(profile), name)(a)
    for argument, function in product((-2, 2), (-4, 4)):
        moved = got * (1 + argument * profile.unit) if name == "exp" else got
        admissible(found, f(exact), f(moved) * (1 + function * profile.unit))


@pytest.mark.parametrize("profile", KERNELS, ids=lambda p: p.name)
def test_sums_hold_in_the_worst_order_of_roundings(rng, profile):
    """Each product rounded up, each partial sum rounded up, and a rescale every sixteen terms."""
    (a, a_exact, a_got), (b, b_exact, b_got) = corners(rng, profile), corners(rng, profile)
    space, u = BoundSpace(profile), profile.accumulation
    got = np.zeros(len(a_got))
    for k in range(a_got.shape[1]):
        term = np.abs(a_got[:, k] * b_got[:, k]) * (1 + u)
        got = (got + term) * (1 + u) * (1 + 5 * profile.unit * (k % 16 == 15))
    size = lambda x: Bounded(space, np.abs(x.x), x.e)  # noqa: E731
    admissible(space.einsum("ik,ik->i", size(a), size(b)), (np.abs(a_exact) * np.abs(b_exact)).sum(1), got)
    exact, total = np.abs(a_exact).sum(1), np.zeros(len(a_got))
    for k in range(a_got.shape[1]):
        total = (total + np.abs(a_got[:, k])) * (1 + profile.unit)
    admissible(space.sum(size(a), 1, False), exact, total)


@pytest.mark.parametrize("profile", [FLASH_BF16, FLASH_F16], ids=lambda p: p.name)
def test_storage_rounds_once_and_underflows_before_or_after_normalising(rng, profile):
    a, exact, got = corners(rng, profile)
    for sign in (-1, 1):
        admissible(BoundSpace(profile).stored(a, False), exact, got * (1 + sign * profile.storage))
    weights = Bounded(a.space, np.array([[2.0**-20, 1.0, 0.75]]), 0.0)
    lost = profile.storage_tiny * 1.75
    assert (BoundSpace(profile).stored(weights, False).e >= lost).all()


def test_numbers_a_kernel_does_not_hold_are_rounded_and_subnormal_ones_may_be_flushed():
    space = BoundSpace(FLOAT32)
    x = np.array([0.5, 0.1, float(np.float32(0.1)), 2.0**-130, 0.0])
    np.testing.assert_array_equal(space.real(x).e, [0, 0.1 * 2.0**-24, 0, 2.0**-130, 0])
    assert not BoundSpace(FLOAT64).real(x).e.any()


@pytest.mark.parametrize("profile", [*KERNELS, PROFILES["float64"], FLOAT64], ids=lambda p: p.name)
def test_a_constant_is_handed_over_rounded_once_however_long_its_formula(profile):
    """The cosine of 100003/10, which float32 arithmetic of a kernel's own may find off by 1e-4, as its bound says."""
    space, formula = BoundSpace(profile), lambda like: numeric.cos(numeric.real(np.array([100003, 0]), like) / 10)
    found = numeric.constant(formula, space.real(0))
    with flint.ctx.workprec(200):
        exact = float((flint.arb(100003) / 10).cos())
    handed = float(np.float32(exact)) if profile.unit > 2.0**-53 else exact
    assert abs(handed - exact) <= found.e[0]
    assert abs(found.x[0] - exact) <= found.e[0] <= 1.01 * profile.unit * abs(exact) + 2.0**-38
    assert (found.x[1], found.e[1]) == (1, 0)
    if profile.unit > 2.0**-53:
        assert formula(space.real(0)).e[0] > 1e-4


def test_overflow_promises_nothing_and_never_a_nan():
    space = BoundSpace(FLASH_F16)
    big, zero = space.real(np.array([[1e30, 3e38]])), space.real(np.zeros((2, 1)))
    with np.errstate(all="ignore"):
        assert np.isinf((big * big).e).all()
        assert np.isinf(numeric.einsum("ik,kj->ij", big * big, zero + 1).e).all()
        assert np.isinf(space.stored(space.real(np.array([65520.0])), False).e).all()
        assert np.isinf(numeric.exp(Bounded(space, 0.0, 701.0)).e)
        assert np.isinf((big * big - big * big).e).all()


def test_without_a_tape_scores_are_not_stored():
    space, x = BoundSpace(FLASH_BF16), np.linspace(-1, 1, 9)
    assert not numeric.stored(space.real(x), cotangent=True).e.any()
    assert (numeric.stored(space.real(x)).e[x != 0] > 0).all()


def test_tanh_is_right_within_eight_units(rng):
    x = np.concatenate([rng.uniform(-20, 20, 4000), 2.0 ** rng.uniform(-60, 2, 4000), [0.0, 400.0, -400.0]])
    found = BoundSpace(FLOAT64).tanh(BoundSpace(FLOAT64).real(x))
    with flint.ctx.workprec(120):
        pairs = zip(x.tolist(), found.x.tolist(), found.e.tolist(), strict=True)
        assert all(abs(flint.arb(y) - flint.arb(a).tanh()) <= e for a, y, e in pairs)


def ratio(problem, weights, wrt, bits=200):
    """Largest distance of the float64 evaluation from the balls, in units of its bound, per output."""
    with flint.ctx.workprec(bits), np.errstate(all="ignore"):
        exact = problem.differentiate(BALLS.real, weights, wrt)
        own = problem.differentiate(BoundSpace(FLOAT64).real, weights, wrt)
        found = {}
        for name, balls in exact.items():
            t, d, r = balls.enclosure()
            x, e = own[name].x, own[name].e
            np.testing.assert_array_equal(np.isfinite(x), np.isfinite(t))
            np.testing.assert_array_equal(x[~np.isfinite(x)], t[~np.isfinite(t)])
            gap = np.where(np.isfinite(x), np.abs((x - t) - d) - r, 0.0).clip(0)
            assert (gap <= e).all(), (name, np.max(gap / e))
            found[name] = np.max(gap / np.where(e > 0, e, 1.0), initial=0.0)
    return found


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_bound_of_its_own_evaluation_holds_against_balls(rng, name):
    inputs, weights = arrays(PROBLEMS[name], rng)
    problem = api.build(PROBLEMS[name].spec, inputs, np.float64, ("out",))
    ratio(problem, weights, tuple(problem.real_inputs()))


@pytest.mark.parametrize("amplitude", [2.0**-40, 1.0, 30.0, 1e4])
@pytest.mark.parametrize("spec", [ra.SDPA(), ra.ALiBi(direction="two_sided"), ra.SDPA(softcap=3.0)], ids=repr)
def test_the_bound_holds_at_every_amplitude_and_is_not_absurdly_loose(rng, spec, amplitude):
    shapes = {"q": (1, 2, 6, 8), "k": (1, 1, 40, 8), "v": (1, 1, 40, 4)}
    inputs = {n: rng.standard_normal(shape) * (amplitude if n == "q" else 1) for n, shape in shapes.items()}
    spec = ra.SDPA(causal="bottom_right", bias=spec) if isinstance(spec, ra.ALiBi) else spec
    problem = api.build(spec, inputs, np.float64, ("out",))
    weights = {"out": rng.standard_normal((1, 2, 6, 4)), "lse": rng.standard_normal((1, 2, 6))}
    found = ratio(problem, weights, ("q", "k", "v"))
    # Some 40 roundings reach an output. A bound counts each at its worst and all in one direction: 40 times what one
    # element sees and, over 48 elements, some 10 times what the worst of them does; 1000 leaves room, not more.
    assert found["out"] > 1e-3 or amplitude > 100


def closed_form(q, k, v, scale, p):
    """The running bound of out for plain attention, first order in every unit: docs/tolerance.md, section 4."""
    u, length, width = p.unit, k.shape[0], q.shape[-1]

    def gamma(n, unit, saved=0):
        return (n + p.rescale * min(n, n // 16) + p.extra + saved) * unit

    s, absolute = scale * q @ k.T, scale * np.abs(q) @ np.abs(k).T
    m = s.max(-1, keepdims=True)
    weights = np.exp(s - m) / np.exp(s - m).sum(-1, keepdims=True)
    z = np.exp(s - m).sum(-1, keepdims=True)
    out, size = weights @ v, weights @ np.abs(v)
    scores = gamma(width, p.accumulation) * absolute + 2 * u * np.abs(s)
    scores = scores + p.shift * u * np.abs(m) + p.term * u * (np.abs(s) + np.abs(m)) + u * np.abs(s - m)
    delta = weights * (scores + p.argument * u * np.abs(s - m) + p.exponential)
    saved = p.saved * (1 + int(length).bit_length())
    terms = {
        "weights stored": p.storage * size + p.storage_tiny * (1 + 1 / z) * np.abs(v).sum(0),
        "scores": delta @ np.abs(v) + np.abs(out) * delta.sum(-1, keepdims=True),
        "sums": gamma(length, p.accumulation) * size + gamma(length, u, saved) * np.abs(out),
        "out": (u + (p.storage or u)) * np.abs(out),
    }
    return terms, weights, s, absolute, out


@pytest.mark.parametrize("shape", [(5, 17, 4), (4, 257, 16), (3, 2049, 8)])
@pytest.mark.parametrize("amplitude", [0.25, 1.0, 6.0])
@pytest.mark.parametrize("profile", KERNELS, ids=lambda p: p.name)
def test_the_running_bound_is_the_closed_form(rng, shape, amplitude, profile):
    lq, lk, width = shape
    dtype = {"float32": "float32", "flash-bf16": "bfloat16", "flash-f16": "float16"}[profile.name]
    # Odd multiples of 1/16, so that no product is exactly 0, and a scale that float32 does not hold.
    q, k, v = (np.floor(rng.standard_normal((n, width)) * 8) / 8 + 1 / 16 for n in (lq, lk, lk))
    inputs = {"q": q * amplitude, "k": k, "v": v}
    problem = api.build(ra.SDPA(scale=0.3), {n: a[None, None] for n, a in inputs.items()}, dtype, ("out",))
    found = build.bounds(problem, {}, (), profile)["out"][0, 0]
    terms, weights, s, absolute, out = closed_form(q * amplitude, k, v, 0.3, profile)
    total = sum(terms.values())
    # Above the closed form by what is of second order only: products of two units, of which bfloat16's is 2^-8.
    second = 4 * (profile.storage + 2 * np.max(total / np.maximum(np.abs(out), weights @ np.abs(v))))
    assert (found >= total * (1 - 1e-9)).all()
    assert (found <= total * (1 + second) + 2.0**-120 + (2.0**-24 if profile is FLASH_F16 else 0)).all()

    # And above every term of the formula the tolerance was designed from (golden references, study): u per term.
    u, size = profile.unit, weights @ np.abs(v)
    designed = [
        profile.storage * size,
        u * ((weights * np.abs(s)) @ np.abs(v) + np.abs(out) * (weights * np.abs(s)).sum(-1, keepdims=True)),
        width * u * ((weights * absolute) @ np.abs(v) + np.abs(out) * (weights * absolute).sum(-1, keepdims=True)),
        (lk + 12) * u * (size + np.abs(out)),
        (profile.storage or u) * np.abs(out),
    ]
    assert (found >= sum(designed)).all()


def test_bounds_come_from_operations_that_every_machine_rounds_alike(monkeypatch):
    """No vendor's function, no reduction whose order is free: the text of these modules names none."""
    allowed = {
        *("abs", "maximum", "minimum", "clip", "where", "isfinite", "isnan", "isneginf", "rint", "ldexp", "frexp"),
        *("copysign", "nan_to_num", "asarray", "atleast_1d", "ascontiguousarray", "broadcast_to", "take", "full"),
        *("arange", "zeros", "delete", "concatenate", "errstate", "inf", "nan", "finfo", "float32", "float64"),
        *("int64", "intp", "prod", "add", "max", "sqrt", "heaviside", "sum", "flip", "take_along_axis"),
    }
    for module in (bound, ordered, exponential, trigonometric, error_function):
        tree = ast.parse(inspect.getsource(module))
        used = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute) and getattr(n.value, "id", "") == "np"}
        assert used <= allowed, used - allowed
    products = [n for n in ast.walk(ast.parse(inspect.getsource(bound))) if isinstance(n, ast.MatMult)]
    assert len(products) == 1  # of zeros and ones: an exact count in any order


def test_profiles_are_found_by_their_names():
    assert list(PROFILES) == ["float64", "float32", "flash-bf16", "flash-f16", "flash-e4m3", "flash-e5m2"]
    assert all(name == profile.name for name, profile in PROFILES.items())
