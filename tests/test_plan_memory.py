"""Merge and Recurrent: their plain meaning against what it is made of, and numbers worked by hand."""

from dataclasses import replace

import numpy as np
import pytest
from checks import near

import refattn as ra
from refattn import api
from refattn.plan import Merge, Recurrent, execute, leaves, map_leaves


def score(rng, keys, **options):
    x = {n: rng.standard_normal((2, 2, 5 if n == "q" else keys, 3)) for n in "qkv"}
    return api.build(ra.SDPA(**options), x, "float64", ("out",)).plan


@pytest.mark.parametrize("cut", [0, 1, 4, 7])
def test_a_merge_is_one_softmax_over_all_the_keys(cut, rng):
    whole = score(rng, 7)
    one, other = (
        replace(whole, k=whole.k[:, :, part], v=whole.v[:, :, part], positions=tuple(p[:, :7] for p in whole.positions))
        for part in (slice(0, cut), slice(cut, 7))
    )
    found, expected = execute(Merge(parts=(one, other))), execute(whole)
    for name in ("out", "lse"):
        near(found[name], expected[name])


def test_rows_that_see_nothing_in_any_part_are_empty(rng):
    whole = score(rng, 0)
    found = execute(Merge(parts=(whole, whole)))
    assert not found["out"].any()
    assert np.isneginf(found["lse"]).all()


def memory(**changed):
    """One head, features of width 1 equal to 1, values 3, 5, 7, 9."""
    arrays = {"q": np.ones((1, 1, 4, 1)), "k": np.ones((1, 1, 4, 1)), "v": np.array([3.0, 5, 7, 9]).reshape(1, 1, 4, 1)}
    zeros = {"memory": np.zeros((1, 1, 1, 1)), "weight": np.zeros((1, 1, 1))}
    return Recurrent(**({"segment": 2} | arrays | zeros | changed))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, [0, 0, 4, 4]),
        ({"segment": 1}, [0, 3, 4, 5]),
        ({"weight": None}, [0, 0, 8, 8]),
        ({"weight": None, "transition": np.full((1, 1), 0.5), "segment": 1}, [0, 3, 6.5, 10.25]),
        # The delta rule: 3 is written, then 5 − 3, then 7 − 5/2, ... and z counts.
        ({"delta": True, "segment": 1}, [0, 3, 2.5, 19 / 6]),
        ({"delta": True, "segment": 1, "weighed": False}, [0, 3, 5, 7]),
        ({"clamp": 4.0}, [0, 0, 2, 2]),
        ({"add": 2.0}, [0, 0, 2, 2]),
        ({"q": np.ones((1, 1, 1, 1))}, [4]),
        ({"q": np.ones((1, 2, 3, 1))}, [[0, 4, 4]] * 2),
        ({"memory": np.full((1, 1, 1, 1), 6.0), "weight": np.full((1, 1, 1), 2.0)}, [3, 3, 3.5, 3.5]),
    ],
)
def test_a_memory_worked_by_hand(changed, expected):
    """Segments of two: the first reads 0, the second (3 + 5) / 2."""
    near(execute(memory(**changed))["out"][0, :, :, 0], np.atleast_2d(np.array(expected, float)))


def test_their_leaves_have_names_and_map(rng):
    plan = Merge(parts=(score(rng, 3), memory()))
    assert list(leaves(plan)) == ["0.q", "0.k", "0.v", "1.q", "1.k", "1.v", "1.memory", "1.weight"]
    doubled = leaves(map_leaves(plan, lambda a: 2 * a))
    for name, leaf in leaves(plan).items():
        near(doubled[name], 2 * leaf)
