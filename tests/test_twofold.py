"""Double-double arithmetic: exact transformations and proved bounds against Arb, and the proof of the exponential."""
# ruff: noqa: PLR0917, E741

import flint
import numpy as np
import pytest
from flint import arb

from refattn.engines.certified import twofold as tf
from refattn.jit import inlined

U2 = 2.0**-106
COUNT = 4000


@pytest.fixture(autouse=True)
def many_bits():
    before, flint.ctx.prec = flint.ctx.prec, 400
    yield
    flint.ctx.prec = before


@inlined
def each(operation, xh, xl, yh, yl, zh, zl):
    for i in range(xh.shape[0]):
        zh[i], zl[i] = operation(xh[i], xl[i], yh[i], yl[i])


@inlined
def with_double(operation, xh, xl, y, zh, zl):
    for i in range(xh.shape[0]):
        zh[i], zl[i] = operation(xh[i], xl[i], y[i])


@inlined
def of_one(function, xh, xl, zh, zl):
    for i in range(xh.shape[0]):
        zh[i], zl[i] = function(xh[i], xl[i])


def pairs(rng, count=COUNT):
    """Pairs of all sizes and signs, some with l = 0, l = ±ulp/2 and heads of few bits."""
    h = rng.choice([-1.0, 1.0], count) * np.ldexp(1 + rng.random(count), rng.integers(-40, 40, count))
    few = rng.random(count) < 0.2
    h[few] = np.ldexp(np.rint(np.ldexp(h[few], -np.frexp(h[few])[1] + 4)), np.frexp(h[few])[1])
    part = rng.choice([-0.5, 0.0, 0.5, 1.0], count) * rng.choice([1.0, 1 - 2.0**-52], count)
    part = np.where(part == 1, rng.uniform(-0.5, 0.5, count), part)
    l = np.spacing(np.abs(h)) * part
    return tf.two_sum.py_func(h, l)


def exact(h, l):
    return [arb(a) + arb(b) for a, b in zip(h.tolist(), l.tolist(), strict=True)]


def worst(found, expected):
    """Largest relative error, in units of u²; 0/0 counts as 0."""
    gaps = [abs(f - e) if e == 0 else abs((f - e) / e) for f, e in zip(found, expected, strict=True)]
    return max(float(g.upper()) for g in gaps) / U2


OPERATIONS = {
    "add": (tf.add, lambda x, y: x + y, tf.ADD, 3),
    "mul": (tf.mul, lambda x, y: x * y, tf.MUL, 7),
    "div": (tf.div, lambda x, y: x / y, tf.DIV, 15),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_keep_their_bounds(rng, name):
    operation, meaning, bound, proved = OPERATIONS[name]
    (xh, xl), (yh, yl) = pairs(rng), pairs(rng)
    if name == "add":
        # Sums that cancel to the last bits, where a sloppy sum has no relative bound.
        half = COUNT // 2
        yh[:half], yl[:half] = -xh[:half], -xl[:half] * rng.choice([1.0, 0.5, 0.75, 1 - 2.0**-40], half)
        yh[: half // 2] = -np.nextafter(xh[: half // 2], np.inf)
    zh, zl = np.empty(COUNT), np.empty(COUNT)
    each(operation, xh, xl, yh, yl, zh, zl)
    error = worst(exact(zh, zl), [meaning(a, b) for a, b in zip(exact(xh, xl), exact(yh, yl), strict=True)])
    assert 0.5 < error < proved * (1 + 2.0**-40)
    assert (proved + 1) * U2 <= bound
    np.testing.assert_array_equal(zh + zl, zh)


@pytest.mark.parametrize("name", ["add_double", "mul_double"])
def test_operations_with_a_double_keep_their_bounds(rng, name):
    (xh, xl), (y, _) = pairs(rng), pairs(rng)
    if name == "add_double":
        y[::2] = -xh[::2]
    zh, zl = np.empty(COUNT), np.empty(COUNT)
    with_double(getattr(tf, name), xh, xl, y, zh, zl)
    meaning = (lambda a, b: a + arb(b)) if name == "add_double" else (lambda a, b: a * arb(b))
    error = worst(exact(zh, zl), [meaning(a, b) for a, b in zip(exact(xh, xl), y.tolist(), strict=True)])
    assert 0.25 < error < 2
    assert tf.ADD_DOUBLE == tf.MUL_DOUBLE == 2 * U2
    np.testing.assert_array_equal(zh + zl, zh)


def arguments(rng):
    """All over the reach, small ones, halfway between multiples of ln 2, and those multiples."""
    n = rng.integers(-860, 860, COUNT)
    every = [rng.uniform(-600, 600, COUNT), rng.uniform(-1, 1, COUNT), np.ldexp(rng.uniform(-1, 1, COUNT), -n % 300)]
    every += [n * np.log(2.0), (n + 0.5) * np.log(2.0), np.array([0.0, 600.0, -600.0, 2.0**-1000])]
    h = np.clip(np.concatenate(every), -600, 600)
    return tf.two_sum.py_func(h, np.spacing(h) * rng.uniform(-0.5, 0.5, h.size) * (np.abs(h) < 600))


def test_the_exponential_keeps_its_bound(rng):
    xh, xl = arguments(rng)
    zh, zl = np.empty_like(xh), np.empty_like(xh)
    of_one(tf.exp, xh, xl, zh, zl)
    error = worst(exact(zh, zl), [x.exp() for x in exact(xh, xl)])
    assert 0.5 < error < 0.7 * tf.EXP / U2
    np.testing.assert_array_equal(zh + zl, zh)


def test_the_logarithm_keeps_its_bound(rng):
    h = np.concatenate([np.exp(rng.uniform(-500, 500, COUNT)), 1 + np.ldexp(rng.uniform(-1, 1, COUNT), -20), [1.0]])
    l = np.spacing(h) * rng.uniform(-0.5, 0.5, h.size)
    zh, zl = np.empty_like(h), np.empty_like(h)
    of_one(tf.log, h, l, zh, zl)
    for found, x in zip(exact(zh, zl), exact(h, l), strict=True):
        assert abs(found - x.log()) <= tf.LOG_ABSOLUTE + tf.LOG * abs(x.log())


def test_a_guess_that_is_far_off_gives_no_logarithm(monkeypatch):
    monkeypatch.setattr(np, "log", lambda x: np.float64(0.7))
    functions = {n: getattr(tf, n).py_func for n in ("two_sum", "fast_two_sum", "two_prod", "add", "add_double", "mul")}
    for name, function in functions.items():
        monkeypatch.setattr(tf, name, function)
    monkeypatch.setattr(tf, "exp", lambda h, l: (np.exp(h), 0.0))
    assert np.isnan(tf.log.py_func(np.float64(2.0), 0.0)).all()


def test_the_parts_of_ln_2():
    first, second, third = tf._LN2
    for part in (first, second):
        assert (np.ldexp(part, 40 - np.frexp(part)[1])).is_integer()
    exact_ln2 = arb(2).log()
    assert abs(exact_ln2 - arb(first) - arb(second) - arb(third)) < 2.0**-134
    # Rounded down: x / (n first) is at least ½ for the least x that n ln 2 is taken off, as Sterbenz's lemma needs.
    assert 2.0**-45 < exact_ln2 - arb(first) < 2.0**-40


def test_the_factorials_are_rounded_once():
    for k, (head, tail) in enumerate(zip(tf._HEADS, tf._TAILS, strict=False)):
        assert abs(arb(head) + arb(tail) - 1 / arb(k + 1).gamma()) < 2.0**-106 * head
    assert len(tf._TAILS) == 14 and len(tf._HEADS) == 24


def test_the_proof_of_the_exponential():
    """The recursion of docs/certification.md over the whole interval of r, everything relative to e^r, in u²."""
    add, add_double, mul, mul_double = 3.01, 2.01, 7.01, 1.51
    for r in np.linspace(-0.3466, 0.3466, 2001):
        size = abs(r)
        y = [0.0] * 25
        for k in reversed(range(24)):
            y[k] = tf._HEADS[k] + r * y[k + 1]
        # In double: the error of y_14 in units of u, r itself being rounded too.
        e = tf._HEADS[23]
        for k in reversed(range(14, 23)):
            e = size * e + 3 * size * abs(y[k + 1]) + tf._HEADS[k] + abs(y[k])
        assert e < 3 * y[14]
        e = 2.0**53 * size * e + mul_double * size * y[14]
        e += add * y[13] + tf._HEADS[13]
        for k in reversed(range(13)):
            exact_constant = k < 3
            e = size * e + mul * size * y[k + 1]
            e += add_double * y[k] if exact_constant else add * y[k] + tf._HEADS[k]
        rest = 1.02 * size**24 * tf._HEADS[23] / 24 / U2
        reduction = 4.1 * size
        total = (e + rest) / np.exp(r) + reduction
        assert total < 0.7 * tf.EXP / U2, (r, total)
