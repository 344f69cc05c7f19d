"""Pairs of doubles with radii: every enclosure holds Arb's value, and what is broken on purpose is seen."""

import operator
from fractions import Fraction
from itertools import product

import flint
import numpy as np
import pytest
from flint import arb

import refattn as ra
from refattn import api, numeric
from refattn.engines import certified
from refattn.engines.certified import pairs, pairs_functions, pairs_kernels, pairs_products
from refattn.engines.certified import pairs_arithmetic as arithmetic
from refattn.engines.certified.balls import BALLS
from refattn.engines.certified.pairs import PAIRS, Pairs
from refattn.engines.certified.pairs_arithmetic import Triple
from refattn.engines.certified.pairs_products import matmul
from refattn.engines.certified.rounding import ENCLOSED, IDENTITY, round_enclosed
from refattn.errors import DTypeError, Undecided
from refattn.golden import inputs as recipes
from refattn.golden import suite
from refattn.golden.build import problem_of

COUNT = 2000


def some(rng, spread=30, positive=False, tails=True, count=COUNT):
    """Pairs of many sizes, half of them with a tail."""
    h = rng.standard_normal(count) * 2.0 ** rng.integers(-spread, spread + 1, count)
    h = np.abs(h) if positive else h
    low = h * 2.0**-54 * rng.uniform(-1, 1, count) * (rng.random(count) < 0.5) * tails
    return Triple(*arithmetic.two_sum(h, low), np.zeros(count))


def on_arb(x):
    return [arb(float(h)) + arb(float(low)) for h, low in zip(np.ravel(x.h), np.ravel(x.low), strict=True)]


def outside(found, exact):
    """How many intervals do not hold the exact value: balls of 600 bits."""
    parts = zip(*(np.ravel(part).tolist() for part in found), exact, strict=True)
    return sum(not abs(arb(h) + arb(low) - value).lower() <= arb(e) for h, low, e, value in parts)


def middling(found):
    """Median radius, in bits below the value."""
    chosen = (found.e > 0) & (found.h != 0)
    return -np.log2(np.median(found.e[chosen] / np.abs(found.h[chosen])))


@pytest.fixture(autouse=True)
def bits():
    with flint.ctx.workprec(600):
        yield


def in_numpy(name):
    rules = arithmetic if hasattr(arithmetic, name) else pairs_functions

    def run(*operands):
        with np.errstate(all="ignore"):
            return getattr(rules, name)(*operands)

    return run


def in_numba(name):
    return lambda *operands: pairs_kernels.elementwise(name, *operands)


TWO = {"add": operator.add, "mul": operator.mul, "div": operator.truediv}
ONE = {
    "sqrt": arb.sqrt,
    "exp": arb.exp,
    "expm1": arb.expm1,
    "log": arb.log,
    "tanh": arb.tanh,
}


@pytest.mark.parametrize("run", [in_numpy, in_numba])
@pytest.mark.parametrize("name", TWO)
def test_two_operands(rng, name, run):
    a, b = some(rng), some(rng)
    near = Triple(-a.h * (1 + 2.0 ** -rng.integers(1, 52, COUNT)), b.low * 2.0**-60, a.e)
    for left, right in ((a, b), (a, near), (some(rng, 500), some(rng, 300))):
        found = run(name)(left, right)
        exact = [TWO[name](x, y) for x, y in zip(on_arb(left), on_arb(right), strict=True)]
        assert outside(found, exact) == 0
    assert middling(found) > 100
    assert (np.abs(found.low) <= np.spacing(np.abs(found.h)) / 2).all()


@pytest.mark.parametrize("run", [in_numpy, in_numba])
@pytest.mark.parametrize("name", TWO)
def test_radii_spread_as_far_as_they_must(rng, name, run):
    a, b = some(rng, 4), some(rng, 4)
    a, b = (Triple(x.h, x.low, np.abs(x.h) * 2.0 ** -rng.integers(5, 100, COUNT)) for x in (a, b))
    found = run(name)(a, b)
    for i, j in ((1, 1), (1, -1), (-1, 1), (-1, -1)):
        corner = [
            TWO[name](x + i * arb(float(d)), y + j * arb(float(e)))
            for x, y, d, e in zip(on_arb(a), on_arb(b), a.e, b.e, strict=True)
        ]
        assert outside(found, corner) == 0


def tricky(rng, count):
    """Subnormal numbers, powers of two and their neighbours, small integers, 1 ± a step; ties of tails; wide radii."""
    sign = rng.choice([-1, 1], count)
    kinds = [
        sign * 2.0 ** rng.integers(-1074, 1000, count),
        rng.integers(-9, 9, count) * 5e-324 * 2.0 ** rng.integers(0, 60, count),
        rng.standard_normal(count) * 2.0 ** rng.integers(-1000, 1000, count),
        rng.integers(-4, 4, count).astype(np.float64),
        np.nextafter(1.0, 1.0 + sign) * 2.0 ** rng.integers(-5, 5, count),
    ]
    h = np.choose(rng.integers(0, 5, count), kinds)
    h, low = arithmetic.two_sum(h, h * 2.0**-53 * rng.choice([0, 0, 0.5, -0.5, 0.25, 1e-20, -0.4999], count))
    e = np.abs(h) * rng.choice([0, 0, 2.0**-100, 2.0**-30, 1.5], count)
    return Triple(h, low, e)


@pytest.mark.parametrize("run", [in_numpy, in_numba])
@pytest.mark.parametrize("name", TWO)
def test_exact_rationals_at_the_edges(rng, name, run):
    """All nine corners and middles of the operands; ∞ is an answer where something overflows or a divisor may be 0."""
    a, b = tricky(rng, COUNT), tricky(rng, COUNT)
    found = run(name)(a, b)
    bounded = np.isfinite(found.h + found.low + found.e)
    assert bounded.mean() > 0.6
    for i in np.flatnonzero(bounded):
        (x, dx), (y, dy), (z, e) = ((Fraction(t.h[i]) + Fraction(t.low[i]), Fraction(t.e[i])) for t in (a, b, found))
        for one, other in product((-1, 0, 1), repeat=2):
            assert abs(TWO[name](x + one * dx, y + other * dy) - z) <= e


@pytest.mark.parametrize("name", ONE)
@pytest.mark.parametrize("radius", [0.0, 2.0**-60])
def test_functions(rng, name, radius):
    positive = name in ("sqrt", "log")
    for spread in (2, 9, 40):
        x = some(rng, spread, positive)
        if name not in ("sqrt", "log"):
            x = Triple(*(np.where(np.abs(x.h) < 290, part, 0.0) for part in x))
        x = Triple(x.h, x.low, np.abs(x.h) * radius)
        found = in_numpy(name)(x)
        for side in (1, -1) if radius else (1,):
            exact = [ONE[name](v + side * arb(float(e))) for v, e in zip(on_arb(x), x.e, strict=True)]
            assert outside(found, exact) == 0
    assert radius or middling(found) > 100


def test_exponentials_compiled(rng):
    x = Triple(
        *arithmetic.two_sum(rng.uniform(-640, 640, COUNT), rng.uniform(-1, 1, COUNT) * 2.0**-50), np.zeros(COUNT)
    )
    found = pairs_kernels.elementwise("exp", x)
    assert outside(found, [v.exp() for v in on_arb(x)]) == 0
    assert middling(found) > 100
    x = Triple(x.h, x.low, np.full(COUNT, 2.0**-30))
    for side in (1, -1):
        found = pairs_kernels.elementwise("exp", x)
        assert outside(found, [(v + side * arb(2.0**-30)).exp() for v in on_arb(x)]) == 0


@pytest.mark.parametrize("name", ["add", "mul", "div"])
def test_compiled_rules_give_the_bits_of_numpy(rng, name):
    a, b = some(rng, 480), some(rng, 480)
    a, b = (Triple(x.h, x.low, np.abs(x.h) * 2.0**-90 * (rng.random(COUNT) < 0.5)) for x in (a, b))
    for one, other in zip(in_numpy(name)(a, b), in_numba(name)(a, b), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("shape", [(2, 3, 40, 5), (1, 30, 300, 10)])
@pytest.mark.parametrize("spread", [3, 250])
def test_products(rng, shape, spread):
    n, m, k, p = shape
    a, b = some(rng, spread, count=n * m * k), some(rng, spread, count=n * k * p)
    a = Triple(*(part.reshape(n, m, k) for part in (a.h, a.low, np.abs(a.h) * 2.0**-100)))
    b = Triple(*(part.reshape(n, k, p) for part in b))
    found = matmul(a, b)
    assert found.h.size * k > 1 << 16 or found.h.size * k < 1 << 15
    for side in (1, -1):
        left, right = (np.array(on_arb(x), object).reshape(x.h.shape) for x in (a, b))
        left = left + side * np.array([arb(float(e)) for e in a.e.ravel()], object).reshape(a.e.shape)
        assert outside(found, np.ravel(left @ right)) == 0
    np.testing.assert_array_equal(matmul(a, Triple(*(0 * part for part in b))).e, 0.0)


def test_compiled_products_give_the_bits_of_numpy(rng):
    a, b = (some(rng, count=2 * 12 * 12) for _ in range(2))
    a, b = (Triple(*(part.reshape(2, 12, 12) for part in (x.h, x.low, np.abs(x.h) * 2.0**-99))) for x in (a, b))
    a.h[:, 3] = a.low[:, 3] = a.e[:, 3] = 0.0
    for one, other in zip(pairs_products._product(a, b), pairs_kernels.product(a, b), strict=True):
        np.testing.assert_array_equal(one, other)


def test_sums(rng):
    for count in (1, 2, 3, 64, 1000):
        x = some(rng, 20, count=count)
        assert outside(Triple(*(part[None] for part in arithmetic.total(x))), [sum(on_arb(x), arb(0))]) == 0


def test_what_is_exact_has_no_radius(rng):
    a, b = (PAIRS.real(rng.integers(-999, 999, (8, 8)).astype(np.float64)) for _ in range(2))
    for found in (a + b, a - b, a * b, PAIRS.einsum("ij,jk->ik", a, b), PAIRS.sum(a, 0, False), (a * 8) / 8):
        assert not found.at.e.any() and not found.at.low.any()
    third = PAIRS.real(Fraction(1, 3))
    assert 0 < third.at.e < 2.0**-105
    assert (PAIRS.exp(a - a).at.h == 1).all() and not PAIRS.exp(a - a).at.e.any()
    assert PAIRS.log(PAIRS.real(1.0)).at == (0.0, 0.0, 0.0)


def test_constants_are_those_of_arb():
    c = pairs_functions.constants()
    ln2 = arb.const_log2()
    assert outside(c.ln2, [ln2]) == 0
    assert outside(c.powers, [arb(2) ** (arb(j) / 64) for j in range(64)]) == 0
    assert (
        outside(Triple(*map(np.array, zip(*c.inverse, strict=True))), [1 / arb(flint.fmpz.fac_ui(k)) for k in range(7)])
        == 0
    )
    # 2^17 multiples of ln 2 / 64, the product with the third part rounded.
    left = abs(ln2 / 64 - sum(map(arb, c.parts))) + abs(arb(c.parts[2])) * arb(2.0**-53)
    assert left * 2**17 < arb(pairs_functions._REDUCTION)
    assert all(
        Fraction(part) * 2**k == int(Fraction(part) * 2**k) for part, k in zip(c.parts[:2], (42, 78), strict=True)
    )
    reach = arb(pairs_functions._REACH)
    assert ln2 / 128 < reach
    assert reach**11 / flint.fmpz.fac_ui(12) * reach.exp() < arb(pairs_functions._SERIES)
    # Horner's last sum and coefficient, and 1% for the rest: two units of 2^-53.
    assert arb(2.05) * arb(2.0**-53) < arb(pairs_functions._TAIL)
    assert arb(pairs_functions.LEAST).exp() < arb(pairs_functions.BELOW)


def smallest():
    """Of every variant the case with the fewest numbers."""
    best = {}
    for case in suite.cases():
        count = sum(a.size for a in recipes.inputs(case).values())
        if case.spec.variant not in best or count < best[case.spec.variant][0]:
            best[case.spec.variant] = (count, case)
    return [case for _, case in best.values()]


def problem_and_cotangents(case):
    arrays, weights = recipes.inputs(case), recipes.cotangents(case)
    problem = problem_of(case, arrays)
    return problem, weights, tuple(problem.real_inputs()) if weights else ()


# Its ridge systems are solved by balls of 128 bits, and lose what their condition takes.
ILL_CONDITIONED = {"infinity_former": 65}


@pytest.mark.parametrize("case", smallest(), ids=operator.attrgetter("name"))
def test_every_variant(case):
    asked = problem_and_cotangents(case)
    wide = asked[0].dtype == np.float64
    found = pairs.enclose(*asked)
    with flint.ctx.workprec(512):
        balls = asked[0].differentiate(BALLS.real, *asked[1:])
    decided = 0
    for name, (t, d, r) in found.items():
        known = np.isfinite(t) & np.isfinite(r)
        assert outside(Triple(*(part[known] for part in (t, d, r))), balls[name]._balls[known].tolist()) == 0, name
        one, other = round_enclosed(found[name], wide), round_enclosed(balls[name], wide)
        both = (one.status != ENCLOSED) & (other.status != ENCLOSED)
        decided += both.sum() / max(both.size, 1)
        np.testing.assert_array_equal(one.odd[both], other.odd[both])
        if wide:
            np.testing.assert_array_equal(one.nearest[both], other.nearest[both])
        sized = known & (r > 0) & (np.abs(t) > 2.0**-400)
        if sized.any():
            assert np.median(r[sized] / np.abs(t[sized])) < 2.0 ** -ILL_CONDITIONED.get(case.spec.variant, 85)
    assert decided > 0.9 * len(found)


@pytest.mark.parametrize("special", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["add", "sub", "mul", "div", "maximum", "minimum", "exp", "tanh"])
def test_what_is_no_number_is_what_it_is_on_balls(name, special):
    x, y = np.array([special, special, 1.0, 0.0]), np.array([2.0, np.inf, special, special])
    operands = (x,) if name in ("exp", "tanh") else (x, y)
    found = getattr(PAIRS, name)(*map(PAIRS.real, operands)).at
    t, _, r = getattr(BALLS, name)(*map(BALLS.real, operands)).enclosure()
    sure = ~np.isinf(found.e)
    np.testing.assert_array_equal(found.h[sure & (r == 0)], t[sure & (r == 0)])
    np.testing.assert_array_equal(np.isnan(found.h) | ~sure, np.isnan(t) | ~sure)
    assert sure.any()


def test_a_lost_bound_is_undecided_and_no_number_stays_none():
    x = PAIRS.real(np.array([1.0, 0.0]))
    lost = x / PAIRS.real(np.zeros(2))
    assert np.isinf(lost.at.e).all() and (lost.at.h == 0).all()
    with pytest.raises(Undecided):
        numeric.finite(lost)
    assert (round_enclosed(lost.enclosure(), False).status == ENCLOSED).all()
    a = PAIRS.real(np.array([[1.0, np.nan], [2.0, 3.0]]))
    assert np.isnan(PAIRS.einsum("ij,jk->ik", a, a).at.h).tolist() == [[True, True], [False, True]]
    huge = PAIRS.real(np.full(3, 1e300))
    assert np.isinf((huge * huge).at.e).all() and np.isinf(PAIRS.exp(huge).at.e).all()


def test_choices():
    x = Pairs(Triple(np.array([[1.0, 1.0, 2.0, 2.0]]), np.zeros((1, 4)), np.array([[0.0, 2.0**-60, 0.0, 0.0]])))
    live = np.array([[True, True, False, False]])
    np.testing.assert_array_equal(PAIRS.peak(x, live).at.e, [[0.5, 0.5, 0.0, 0.0]])
    np.testing.assert_array_equal(PAIRS.peak(x, ~live).at.h, [[0.0, 0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(PAIRS.top_k(x, 2), [[2, 3]])
    with pytest.raises(Undecided):
        PAIRS.top_k(x, 3)
    assert PAIRS.amax(x, live).at == ([1.0], [0.0], [2.0**-60])
    np.testing.assert_array_equal(PAIRS.step(x - 1, 0.5).at.h, [[0.5, 0.5, 1.0, 1.0]])
    np.testing.assert_array_equal(PAIRS.step(x - 1, 0.5).at.e, [[0.0, 0.5, 0.0, 0.0]])


def test_python_floats_and_numpy_stay_out():
    with pytest.raises(DTypeError):
        PAIRS.real(1.0) + 0.5
    with pytest.raises(TypeError):
        np.exp(PAIRS.real(np.ones(3)))


def halved(rule):
    def broken(*operands):
        found = rule(*operands)
        return Triple(found.h, found.low, found.e / 2)

    return broken


def test_half_the_bound_of_a_sum_is_seen(rng):
    a, b = some(rng), some(rng)
    assert outside(halved(arithmetic.add)(a, b), [x + y for x, y in zip(on_arb(a), on_arb(b), strict=True)]) > 0


def test_a_wrong_constant_of_the_exponential_is_seen(rng, monkeypatch):
    right = pairs_functions.constants()
    powers = Triple(right.powers.h, right.powers.low * (1 + 2.0**-45), right.powers.e)
    monkeypatch.setattr(pairs_functions, "constants", lambda: right._replace(powers=powers))
    x = some(rng, 3)
    assert outside(pairs_functions.exp(x), [v.exp() for v in on_arb(x)]) > COUNT / 2
    with pytest.raises(AssertionError):
        test_constants_are_those_of_arb()


def ties():
    """Causal attention whose first five values are equal: so are, exactly, the first five rows; the rest is generic."""
    rng = np.random.default_rng(5)
    x = {name: rng.standard_normal((1, 1, 64, 8)) for name in "qkv"}
    x["v"][:, :, :5] = x["v"][:, :, :1]
    problem = api.build(ra.SDPA(causal=True), x, "float64", ("out",), 0)
    return problem, {"out": rng.standard_normal((1, 1, 64, 8))}, ("q", "k", "v")


def test_balls_are_asked_for_the_rows_that_are_open_and_say_the_same(monkeypatch):
    asked = []

    def recorded(task, bits, in_balls=certified._in_balls):
        asked.append((task.problem.sizes["Lq"], task.wrt))
        return in_balls(task, bits)

    monkeypatch.setattr(certified, "_in_balls", recorded)
    whole = certified.certify(*ties(), bits=(128, 256))
    assert asked[0] == (64, ("q", "k", "v"))
    asked.clear()
    monkeypatch.setattr(certified, "PAIRS_FROM", 0)
    found = certified.certify(*ties(), bits=(128, 256))
    assert asked == [(4, ("q",)), (4, ("q",))]
    for name, one in whole.items():
        np.testing.assert_array_equal(found[name].value, one.value)
        np.testing.assert_array_equal(found[name].rne, one.rne)
        np.testing.assert_array_equal(found[name].status == IDENTITY, one.status == IDENTITY)
        np.testing.assert_array_equal(found[name].width, one.width)
    np.testing.assert_array_equal(np.any(found["out"].status[0, 0] == IDENTITY, -1), [1 <= i < 5 for i in range(64)])


def test_nothing_is_asked_of_balls_where_nothing_is_open(monkeypatch, rng):
    monkeypatch.setattr(certified, "_in_balls", lambda *_, bits: pytest.fail("balls have been asked"))
    monkeypatch.setattr(certified, "PAIRS_FROM", 0)
    x = {name: rng.standard_normal((1, 2, 16, 8)).astype(np.float32) for name in "qkv"}
    problem = api.build(ra.SDPA(causal=True), x, "float32", ("out",), 0)
    found = certified.certify(problem, {"out": x["q"]}, ("q", "k", "v"))
    assert not any((c.status == ENCLOSED).any() for c in found.values())


LARGE = {
    "plain": (ra.SDPA(causal=True), 1.0, {}),
    "softcap and a sink": (ra.SDPA(softcap=5.0), 3.0, {"sink": np.array([0.3, -2.0])}),
    "weights that underflow": (ra.SDPA(), 60.0, {}),
    "what is no number": (ra.SDPA(causal=True), 1.0, {"spoil": True}),
}


@pytest.mark.parametrize("name", LARGE)
def test_large_problems_get_the_certificates_of_balls(rng, name, monkeypatch):
    """Compiled: 96 queries, 2 heads, inputs of 24 bits; the tier is chosen as it is for everyone."""
    spec, size, extras = LARGE[name]
    x = {n: rng.standard_normal((1, 2, 96, 40)).astype(np.float32) for n in "qkv"}
    x["q"] *= np.float32(size)
    extras = dict(extras)
    if extras.pop("spoil", False):
        x["k"][0, 0, 90, 3], x["v"][0, 1, 70, 0] = np.nan, np.inf
    problem = api.build(spec, x | extras, "float32", ("out",), 0)
    asked = problem, {"out": rng.standard_normal((1, 2, 96, 40)).astype(np.float32)}, tuple(problem.real_inputs())
    monkeypatch.setattr(certified, "LARGE", 1 << 60)
    given = []
    monkeypatch.setattr(pairs, "enclose", lambda *a, f=pairs.enclose: given.append(f(*a)) or given[-1])
    found = certified.certify(*asked)
    left = sum(int(np.sum(round_enclosed(e, False).status == ENCLOSED)) for e in given[0].values())
    total = sum(c.value.size for c in found.values())
    assert left == 0 or (name == "weights that underflow" and left < total / 2)
    monkeypatch.setattr(certified, "PAIRS_FROM", 1 << 60)
    for output, one in certified.certify(*asked).items():
        np.testing.assert_array_equal(found[output].value, one.value)
        np.testing.assert_array_equal(found[output].status == ENCLOSED, one.status == ENCLOSED)
        np.testing.assert_array_equal(np.isnan(found[output].value), np.isnan(one.value))
    assert len(given) == 1


def test_an_open_choice_goes_to_balls(monkeypatch):
    def open_(x):
        raise Undecided("open")

    monkeypatch.setattr(type(PAIRS), "finite", lambda space, x: open_(x))
    monkeypatch.setattr(certified, "PAIRS_FROM", 0)
    assert pairs.enclose(*ties()) is None
    assert not (certified.certify(*ties(), bits=(128, 256))["dv"].status == ENCLOSED).any()
