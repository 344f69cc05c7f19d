"""The tape's gradients against complex step, which shares nothing with it but the formula: f(x + ihv) = f + ihJv.

Plain finite differences would go through `stop` and mislead; a complex step leaves the real part as it is, so that
h = 1e-30 costs no digits.
"""

from functools import partial

import flint
import numpy as np
import pytest
from checks import near, same
from problems import PROBLEMS, arrays

import refattn as ra
from refattn import api, numeric
from refattn.engines import certified
from refattn.engines.certified.balls import BALLS, Balls
from refattn.golden import inputs as recipes
from refattn.golden.build import problem_of as problem_of_case
from refattn.golden.suite import work
from refattn.tape import Tape

H = 1e-30
HALF = np.arange(12).reshape(3, 4) % 2 == 0


def normal(*shape):
    return lambda rng: rng.standard_normal(shape)


def positive(*shape):
    return lambda rng: rng.random(shape) + 0.5


def definite(n):
    def symmetric(rng):
        a = rng.standard_normal((n, n))
        return a @ a.T + np.eye(n)

    return symmetric


A, B = normal(3, 4), normal(3, 4)
# Each primitive as a function of its inputs, with the inputs.
PRIMITIVES = {
    "add": (lambda x, y: x + y, A, B),
    "add_a_row": (lambda x, y: x + y, A, normal(4)),
    "add_a_column": (lambda x, y: x + y, normal(3, 1), B),
    "add_outer": (lambda x, y: x + y, normal(3, 1), normal(1, 4)),
    "add_an_integer": (lambda x: 3 + x + 2, A),
    "sub": (lambda x, y: x - y, A, normal(2, 3, 4)),
    "sub_from_an_integer": (lambda x: 1 - x, A),
    "neg": (lambda x: -x, A),
    "mul": (lambda x, y: x * y, A, B),
    "mul_by_a_scalar": (lambda x, y: x * y, A, normal()),
    "square": (lambda x: x * x, A),
    "div": (lambda x, y: x / y, A, positive(3, 1)),
    "div_of_an_integer": (lambda x: 2 / x, positive(3, 4)),
    "exp": (numeric.exp, A),
    "log": (numeric.log, positive(3, 4)),
    "tanh": (numeric.tanh, A),
    "sin": (numeric.sin, A),
    "cos": (numeric.cos, A),
    "sqrt": (numeric.sqrt, positive(3, 4)),
    "erf": (numeric.erf, A),
    "pi": (lambda x: x * numeric.pi(x), A),
    "solve": (lambda a, b: numeric.solve(a, b, 0.5), definite(3), normal(3, 2)),
    "constant": (lambda x: x * numeric.constant(lambda like: numeric.cos(numeric.real(3, like)), x), A),
    "maximum": (numeric.maximum, A, B),
    "maximum_of_a_row": (numeric.maximum, A, normal(4)),
    "minimum": (numeric.minimum, A, B),
    "clip": (lambda x: numeric.clip(x, 0, 1), A),
    "absolute": (numeric.absolute, A),
    "sigmoid": (numeric.sigmoid, A),
    "softplus": (numeric.softplus, A),
    "elu1": (numeric.elu1, A),
    "step": (lambda x: x * numeric.step(x, 0.5), A),
    "amax": (lambda x: numeric.amax(x, HALF), A),
    "peak": (lambda x: x * numeric.peak(x, HALF), A),
    "reshape": (lambda x: numeric.reshape(x, (2, 6)), A),
    "transpose": (lambda x: numeric.transpose(x, (2, 0, 1)), normal(2, 3, 4)),
    "broadcast": (lambda x: numeric.broadcast(x, (2, 3, 4)), normal(3, 1)),
    "index_a_row": (lambda x: x[1], A),
    "index_a_slice": (lambda x: x[..., 1:3], A),
    "index_nothing": (lambda x: x[:0], A),
    "index_a_new_axis": (lambda x: x[:, None, ::-2], A),
    "take_each_once": (lambda x: numeric.take(x, np.array([2, 0]), 0), A),
    "take_some_twice": (lambda x: numeric.take(x, np.array([3, 1, 3, 3]), 1), A),
    "concatenate": (lambda x, y: numeric.concatenate([x, y, x], 1), A, normal(3, 2)),
    "concatenate_from_behind": (lambda x, y: numeric.concatenate([x, y], -1), A, normal(3, 1)),
    "total_of_an_axis": (lambda x: numeric.total(x, -1), A),
    "total_kept": (lambda x: numeric.total(x, 0, keepdims=True), A),
    "total_of_axes": (lambda x: numeric.total(x, (0, 2)), normal(2, 3, 4)),
    "einsum_matrix": (lambda x, y: numeric.einsum("ij,jk->ik", x, y), A, normal(4, 2)),
    "einsum_grouped": (
        lambda x, y: numeric.einsum("bgrid,bgjd->bgrij", x, y),
        normal(2, 2, 3, 2, 4),
        normal(2, 2, 3, 4),
    ),
    "einsum_turned": (lambda x, y: numeric.einsum("ij,kj->ki", x, y), A, normal(2, 4)),
    "einsum_with_itself": (lambda x: numeric.einsum("ij,kj->ik", x, x), A),
    "where_two": (lambda x, y: numeric.where(HALF, x, y), A, B),
    "where_a_row": (lambda x, y: numeric.where(HALF, x, y), A, normal(4)),
    "where_an_integer": (lambda x: numeric.where(HALF, 0, x), A),
    "clean": (numeric.clean, A),
    "stop": (lambda x: x * numeric.stop(x), A),
    "row_max": (lambda x: x * numeric.row_max(x, HALF), A),
    "used_twice": (lambda x: numeric.exp(x) + x * numeric.tanh(x), A),
}


def gradients(f, inputs, weight, lift=np.asarray):
    """Gradients of Σ weight · f by the tape, in the space that `lift` lifts into."""
    tape = Tape()
    leaves = [tape.variable(lift(x)) for x in inputs]
    return tape.gradients([(f(*leaves), lift(weight))], leaves)


def along(f, inputs, n, direction):
    """Derivative of f at the inputs when the n-th moves in a direction."""
    return f(*(x + 1j * H * direction if i == n else x for i, x in enumerate(inputs))).imag / H


def by_entry(f, inputs, n, weight):
    """Gradient of Σ weight · f by the n-th input, an entry at a time."""
    found = np.zeros(inputs[n].shape)
    for at in np.ndindex(found.shape):
        unit = np.zeros(found.shape)
        unit[at] = 1.0
        found[at] = (weight * along(f, inputs, n, unit)).sum()
    return found


@pytest.mark.parametrize("name", PRIMITIVES)
def test_a_primitive(name, rng):
    f, *makers = PRIMITIVES[name]
    inputs = [make(rng) for make in makers]
    weight = rng.standard_normal(f(*inputs).shape)
    found = gradients(f, inputs, weight)
    on_balls = gradients(f, inputs, weight, BALLS.real)
    for n, x in enumerate(inputs):
        near(found[n], by_entry(f, inputs, n, weight), 1e-14)
        direction = rng.standard_normal(x.shape)
        near((weight * along(f, inputs, n, direction)).sum(), (found[n] * direction).sum(), 1e-13)
        near(on_balls[n].enclosure()[0], found[n], 1e-14)


def test_an_output_that_a_leaf_does_not_reach_gives_it_zeros():
    tape = Tape()
    x, y = tape.variable(np.ones(3)), tape.variable(np.ones((2, 2)))
    dx, dy = tape.gradients([(x * 2, np.ones(3))], [x, y])
    same(dx, np.full(3, 2.0))
    same(dy, np.zeros((2, 2)))


def test_a_constant_output_and_an_output_given_twice():
    tape = Tape()
    x = tape.variable(np.ones(3))
    (dx,) = tape.gradients([(np.ones(3), np.ones(3)), (x, np.ones(3)), (x, np.ones(3))], [x])
    same(dx, np.full(3, 2.0))


def test_the_same_tape_runs_backwards_again():
    tape = Tape()
    x = tape.variable(np.array([2.0]))
    y = x * x
    for weight in (1.0, 3.0):
        (dx,) = tape.gradients([(y, np.array([weight]))], [x])
        same(dx, np.array([4.0 * weight]))


def test_clean_puts_0_in_the_place_and_lets_the_cotangent_through():
    tape = Tape()
    x = tape.variable(np.array([np.nan, np.inf, 3.0]))
    y = numeric.clean(x)
    same(y.value, np.array([0.0, 0.0, 3.0]))
    same(tape.gradients([(y, np.array([5.0, 6.0, 7.0]))], [x])[0], np.array([5.0, 6.0, 7.0]))


def problem_of(name, rng):
    inputs, weights = arrays(PROBLEMS[name], rng)
    return api.build(PROBLEMS[name].spec, inputs, "float64", ("out",)), weights


def outputs_of(problem, names, values):
    """Out and lse in one vector, as a function of some inputs; lse of a row that sees nothing is a constant."""
    found = problem.variant.reference(problem.spec, dict(problem.inputs) | dict(zip(names, values, strict=True)))
    lse = np.where(np.isneginf(found["lse"].real), 0.0, found["lse"])
    return np.concatenate([found["out"].ravel(), lse.ravel()])


@pytest.mark.parametrize("name", PROBLEMS)
def test_every_gradient_of_masked_attention(name, rng):
    """Two random directions of each real input: ⟨w, Jv⟩ = ⟨Jᵀw, v⟩ in the terms of the sum, not only in its value."""
    problem, weights = problem_of(name, rng)
    names = list(problem.real_inputs())
    found = problem.differentiate(np.asarray, weights, names)
    inputs, weight = (
        [problem.inputs[n] for n in names],
        np.concatenate([weights["out"].ravel(), weights["lse"].ravel()]),
    )
    f = partial(outputs_of, problem, names)
    for n, x in enumerate(inputs):
        for _ in range(2):
            direction = rng.standard_normal(x.shape)
            terms = weight * along(lambda *v: f(v), inputs, n, direction)
            near((found[f"d{names[n]}"] * direction).sum(), terms.sum(), 1e-12 * max(1.0, condition(terms)))


def condition(terms):
    """By how much rounding in the terms is magnified in their sum."""
    total = abs(terms.sum())
    return np.abs(terms).sum() / total if total else 1.0


@pytest.mark.parametrize("name", ["one key", "bias of a head", "biases of all kinds", "softcap", "sink", "segments"])
def test_every_entry_of_every_gradient(name, rng):
    problem, weights = problem_of(name, rng)
    names = list(problem.real_inputs())
    found = problem.differentiate(np.asarray, weights, names)
    inputs, weight = (
        [problem.inputs[n] for n in names],
        np.concatenate([weights["out"].ravel(), weights["lse"].ravel()]),
    )
    for n, name_ in enumerate(names):
        near(found[f"d{name_}"], by_entry(lambda *v: outputs_of(problem, names, v), inputs, n, weight))


def agrees_with_balls(problem, weights, names):
    """Every output and gradient in float64 lies within 1e-13 of the balls, which are narrow.

    Where differences cancel by design, within float64's own running bound.
    """
    plain = problem.differentiate(np.asarray, weights, names)
    bounded = certified._in_float64(problem, weights, names)
    on_balls = problem.differentiate(BALLS.real, weights, names)
    assert on_balls.keys() == plain.keys()
    for key, balls in on_balls.items():
        assert isinstance(balls, Balls)
        value, rest, radius = balls.enclosure()
        live = np.isfinite(value)
        gap = np.abs(plain[key][live] - value[live])
        if not (gap <= bounded[key].e[live] + np.spacing(np.abs(value[live]))).all() or (~live).any():
            near(plain[key], value, 1e-13)
        assert (np.abs(rest) + radius <= 2.0**-52 * np.abs(value) + 2.0**-100)[live].all()


@pytest.fixture
def bits():
    before, flint.ctx.prec = flint.ctx.prec, 128
    yield
    flint.ctx.prec = before


@pytest.mark.parametrize("name", PROBLEMS)
def test_the_same_text_on_balls(name, rng, bits):
    """The lint of the design: a reference that uses anything but the vocabulary raises here."""
    problem, weights = problem_of(name, rng)
    agrees_with_balls(problem, weights, list(problem.real_inputs()))


def small_cases(count=4):
    """The cheapest golden cases of every variant and term."""
    return [c for info in ra.variants().values() for c in sorted(info.cases(), key=work)[:count]]


@pytest.mark.parametrize("case", small_cases(), ids=lambda case: case.name)
def test_every_variant_of_the_registry_on_balls(case, bits):
    problem, weights = problem_of_case(case, recipes.inputs(case)), recipes.cotangents(case)
    agrees_with_balls(problem, weights, list(problem.real_inputs()) if weights else [])
