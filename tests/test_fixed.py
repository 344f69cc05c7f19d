"""Fixed-point slices: widths that leave sums exact, and numbers that do not fit."""

import numpy as np
import pytest

from refattn.engines.certified import fixed as fixed_module
from refattn.engines.certified.fixed import Fixed, fixed, whole
from refattn.errors import RefattnError


def test_integers_of_an_array(rng):
    a = np.ldexp(rng.integers(-1000, 1000, 50) * 2.0 + 1, -7)
    n, e = whole(a, np.zeros(3))
    assert e == -7 and n == np.abs(np.ldexp(a, 7)).max()
    assert whole(np.zeros(2)) == (0, 0) and whole(np.float64(6.0)) == (3, 1)
    assert whole(np.array([1.0, 2.0**-100]))[0] >= 2**100


@pytest.mark.parametrize("most, terms", [(1530, 4096), (1, 1), (1530, 10**6), (2**24, 64), (1531, 4097)])
def test_widths_leave_sums_exact(most, terms):
    found = fixed(most, terms)
    assert found.most * 2**found.bits * min(terms, fixed_module.BLOCK) <= 2**53
    assert found.bits == 48 or found.most * 2 ** (found.bits + 1) * min(terms, fixed_module.BLOCK) > 2**53
    assert found.bits * found.count >= 118


def test_widths_of_the_recipes():
    """Inputs |k| ≤ 1530 and 4096 keys: four slices of 30 bits."""
    assert fixed(1530, 4096) == Fixed(30, 4, 1530)
    assert fixed(2**40, 4096) is None


def test_a_number_above_its_unit_is_refused():
    x = fixed_module.zeros(2, 3)
    x.h[1, 1] = 1.5
    with pytest.raises(RefattnError, match="a slice of"):
        Fixed(30, 4, 1530).cut(x, 1.0)


def test_unblocked_sums_would_be_wrong(rng):
    """What the two refusals are for: 2^15 products of 30 bits by 1530 are no longer exact."""
    parts = np.full((1, 1 << 15), 2.0**30 - 1)
    matrix = np.where(np.arange(1 << 15)[:, None] % 3 == 0, 1529.0, 1530.0)
    exact = (2**30 - 1) * int(matrix.sum())
    assert int((parts @ matrix)[0, 0]) != exact and exact > 2**53
    blocks = sum(int((parts[:, i : i + 4096] @ matrix[i : i + 4096])[0, 0]) for i in range(0, 1 << 15, 4096))
    assert blocks == exact
