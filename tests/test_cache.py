"""Arrays that grow in place: what is there already is never moved but to a larger buffer, and never changed."""

import numpy as np
import pytest
from checks import same

from refattn.cache import Grown, extend


def rows(rng, count, shape=(2, 0, 3), axis=1):
    return rng.standard_normal([count if i == axis else n for i, n in enumerate(shape)])


@pytest.mark.parametrize("axis", [0, 1, 2, -1])
def test_it_is_concatenation(axis, rng):
    array = expected = rng.standard_normal((2, 3, 4))
    for count in (1, 0, 5, 2, 40, 1):
        new = rows(rng, count, (2, 3, 4), axis % 3)
        array, expected = extend(array, new, axis), np.concatenate([expected, new], axis)
        same(np.asarray(array), expected)


def test_a_thousand_steps_move_it_ten_times_at_most(rng):
    array, moved = np.zeros((2, 0, 3)), 0
    for _ in range(1000):
        longer = extend(array, rows(rng, 1), 1)
        moved += array.size > 0 and not np.shares_memory(array, longer)
        array = longer
    assert array.shape == (2, 1000, 3)
    assert moved <= 10


def test_two_continuations_of_one_array_do_not_meet(rng):
    array = extend(np.zeros((2, 0, 3)), rows(rng, 3), 1)
    before, one, other = np.array(array), rows(rng, 2), rows(rng, 2)
    first, second = extend(array, one, 1), extend(array, other, 1)
    same(np.asarray(first), np.concatenate([before, one], 1))
    same(np.asarray(second), np.concatenate([before, other], 1))
    same(np.asarray(array), before)
    assert np.shares_memory(array, first)
    assert not np.shares_memory(array, second)


def test_a_stretch_of_it_that_ends_where_it_does_grows_too(rng):
    array = extend(np.zeros((2, 0, 3)), rows(rng, 5), 1)
    new = rows(rng, 2)
    for begin in (0, 2, 5):
        longer = extend(array[:, begin:], new, 1)
        same(np.asarray(longer), np.concatenate([np.asarray(array)[:, begin:], new], 1))


@pytest.mark.parametrize(
    "cut",
    [
        lambda a: a[:, :3],
        lambda a: a[:1],
        lambda a: a[:, ::2],
        lambda a: a[..., :2],
        lambda a: a[:, ::-1],
        lambda a: a * 2,
    ],
)
def test_any_other_part_of_it_is_copied(cut, rng):
    array = extend(np.zeros((2, 0, 3)), rows(rng, 4), 1)
    part = cut(array)
    new = rng.standard_normal((part.shape[0], 2, part.shape[2]))
    longer = extend(part, new, 1)
    same(np.asarray(longer), np.concatenate([np.asarray(part), new], 1))
    assert not np.shares_memory(array, longer)


def test_another_dtype_is_a_copy(rng):
    array = extend(np.zeros((2, 0, 3), np.float32), rows(rng, 4).astype(np.float32), 1)
    assert isinstance(array, Grown)
    longer = extend(array, rows(rng, 1), 1)
    assert longer.dtype == np.float64
    assert longer.shape == (2, 5, 3)
