"""Linear systems, π and the error function in every space: values, and bounds that hold against balls."""

import math

import flint
import numpy as np
import pytest
from checks import near
from test_numeric import LIFTS, plain

from refattn import numeric
from refattn.bound import Bounded, BoundSpace
from refattn.engines.certified.balls import BALLS
from refattn.errors import Undecided
from refattn.ordered import eliminate
from refattn.profiles import FLOAT32, FLOAT64, PROFILES

SPACES = pytest.mark.parametrize("lift", LIFTS.values(), ids=LIFTS)
SPACE = BoundSpace(FLOAT64)


def ridge(rng, n, points, penalty):
    """F Fᵀ + λI with condition up to |F|²/λ, exact in float64, and n columns to solve for."""
    f = np.round(rng.standard_normal((n, points)) * 64) / 64
    return f @ f.T + penalty * np.eye(n), np.round(rng.standard_normal((n, 3)) * 1024) / 1024


@SPACES
def test_values(lift):
    """[[2, 1], [1, 2]] x = (3, 0) has x = (2, −1); erf of multiples of ½ from a table (Abramowitz and Stegun, 7.1)."""
    a, b = lift(np.array([[2.0, 1], [1, 2]])), lift(np.array([[3.0], [0.0]]))
    near(plain(numeric.solve(a, b, 1.0)), np.array([[2.0], [-1.0]]), 1e-15)
    near(plain(numeric.pi(a)), math.pi, 1e-15)
    x = lift(np.array([0.0, 0.5, -1.0, 2.0]))
    near(plain(numeric.erf(x)), np.array([0.0, 0.5204998778, -0.8427007929, 0.9953222650]), 1e-9)
    assert plain(numeric.erf(x))[0] == 0


@pytest.mark.parametrize("penalty", [2.0**-20, 1.0, 64.0])
@pytest.mark.parametrize("n", [1, 5, 16])
def test_a_solution_is_as_near_as_its_residual_proves(rng, n, penalty):
    a, b = ridge(rng, n, 3 if penalty < 1 else 40, penalty)
    found = SPACE.solve(SPACE.real(a), SPACE.real(b), penalty)
    with flint.ctx.workprec(300):
        t, d, r = BALLS.solve(BALLS.real(a), BALLS.real(b), penalty).enclosure()
    gap = np.abs((found.x - t) - d) - r
    assert (gap <= found.e).all()
    assert found.e.max() <= 1e-12 * np.abs(a).max() * np.abs(found.x).max() / penalty


def test_a_matrix_known_within_a_bound(rng):
    """Every matrix and right side within their bounds is covered: here those at the corners."""
    a, b = ridge(rng, 4, 20, 1.0)
    e = 2.0**-20
    found = SPACE.solve(Bounded(SPACE, a, e), Bounded(SPACE, b, e), 0.5)
    for _ in range(50):
        move = e * rng.choice([-1, 1], a.shape)
        corner = np.linalg.solve(a + np.triu(move) + np.triu(move, 1).T, b + e * rng.choice([-1, 1], b.shape))
        assert (np.abs(corner - found.x) <= found.e).all()


def test_a_kernel_that_solves_for_itself_has_no_bound_but_a_constant_has(rng):
    a, b = ridge(rng, 4, 20, 1.0)
    for profile in (FLOAT32, *PROFILES.values()):
        space = BoundSpace(profile)
        assert np.isinf(space.solve(space.real(a), space.real(b), 1.0).e).all()
        handed = numeric.constant(
            lambda like: numeric.solve(*(numeric.real(m, like) for m in (a, b)), 1.0), space.real(0)
        )
        assert (handed.e <= 1.1 * profile.unit * np.abs(handed.x) + 1e-12).all()


def test_elimination_is_a_solution_and_a_wrong_one_is_seen(rng, monkeypatch):
    a, b = ridge(rng, 8, 30, 1.0)
    near(a @ eliminate(a, b), b, 1e-12)
    monkeypatch.setattr("refattn.bound.eliminate", lambda a, b: eliminate(a, b) + 0.25)
    found = SPACE.solve(SPACE.real(a), SPACE.real(b), 1.0)
    assert (found.e >= 0.25).all()


def test_a_matrix_that_may_be_singular_is_undecided():
    flat = BALLS.real(np.ones((2, 2)))
    with pytest.raises(Undecided, match="prove regular"):
        numeric.solve(flat, BALLS.real(np.ones((2, 1))), 1.0)


def test_the_error_function_far_out():
    x = np.array([-40.0, 40.0])
    for lift in (np.asarray, BALLS.real, BoundSpace(FLOAT32).real):
        near(plain(numeric.erf(lift(x))), np.array([-1.0, 1.0]), 1e-15)
    wide = numeric.erf(Bounded(BoundSpace(FLOAT32), np.array([0.5]), np.array([100.0])))
    assert 1 < wide.e[0] <= 2.1
