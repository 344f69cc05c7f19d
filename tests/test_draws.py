"""Draws against plain Python, the distributions they claim, and what they refuse."""

import math
from fractions import Fraction
from itertools import permutations

import numpy as np
import pytest
from checks import near, same

import refattn as ra
from refattn import draws
from refattn.errors import ShapeError, SpecError
from refattn.philox import words


def blocks(seed, name, tensor, count):
    """Words of each element, as Python integers."""
    return list(zip(*(w.tolist() for w in words(seed, name, tensor, count)), strict=True))


# Plain Python


def test_sampled_keys():
    found = draws.sampled_keys(7, 20, count=4, seed=3, name="x")
    expected = [w[3] * 20 // 2**32 for w in blocks(3, "x", "sample", 28)]
    same(found, np.array(expected).reshape(7, 4))


def test_pilot_rows_by_the_length_of_each_sequence():
    found = draws.pilot_rows((9, 1, 30), 5, seed=2**40, name="y")
    drawn = blocks(2**40, "y", "pilot", 15)
    same(found, np.array([[drawn[5 * b + p][3] * n // 2**32 for p in range(5)] for b, n in enumerate((9, 1, 30))]))
    assert not found[1].any()


def test_columns_by_a_race(rng):
    scores = rng.random((2, 3, 11)) * (rng.random((2, 3, 11)) < 0.7)
    found = draws.columns(scores, 4, seed=1, name="z")
    drawn = blocks(1, "z", "columns", 66)
    for row, (b, h) in enumerate(np.ndindex(2, 3)):
        time = {}
        for j, score in enumerate(scores[b, h].tolist()):
            w = drawn[11 * row + j]
            u = (w[0] * 2**20 + w[1] // 2**12 + Fraction(1, 2)) / 2**52
            if score:
                time[j] = -math.log(u) / score
        assert found[b, h].tolist() == sorted(time, key=time.get)[:4]


@pytest.mark.parametrize(("keys", "factor", "count"), [(1, 5, 0), (2, 5, 2), (20, 5, 15), (96, 5, 25), (96, 30, 96)])
def test_the_default_count_of_sampled_keys(keys, factor, count):
    assert draws.sampled_keys(3, keys, factor=factor).shape == (3, count)


# What is claimed of them


def test_the_draws_are_these_forever():
    """Written down once: another language or a later version that gives other integers is wrong."""
    assert draws.sampled_keys(2, 100, count=3).tolist() == [[51, 92, 30], [55, 18, 32]]
    assert draws.pilot_rows((100, 50), 3).tolist() == [[79, 83, 83], [13, 41, 24]]
    assert draws.columns(np.arange(10.0), 9).tolist() == [1, 2, 6, 8, 7, 5, 3, 9, 4]


def test_seeds_names_and_kinds_give_other_draws():
    found = [draws.sampled_keys(1, 2**31 - 1, count=9, seed=s, name=n)[0] for s in (0, 1) for n in ("a", "b")]
    found += [draws.pilot_rows((2**31 - 1,), 9, name="a")[0]]
    assert len({a.tobytes() for a in found}) == 5


def test_every_key_is_drawn_as_often():
    """60000 draws of 7: the χ² of 6 degrees of freedom exceeds 22.5 once in a thousand."""
    count = np.bincount(draws.sampled_keys(600, 7, count=100).ravel(), minlength=7)
    assert ((count - 60000 / 7) ** 2 / (60000 / 7)).sum() < 22.5


def test_columns_fall_in_proportion_at_each_step():
    """Ordered pairs of weights 1, 2, 3, 4: P(i, j) = w_i / 10 · w_j / (10 − w_i); χ² of 11 degrees, 31.3 at 0.1 %."""
    pairs = draws.columns(np.broadcast_to([1.0, 2, 3, 4], (40000, 4)), 2).tolist()
    chi = 0.0
    for i, j in permutations(range(4), 2):
        expected = 40000 * Fraction(i + 1, 10) * Fraction(j + 1, 10 - (i + 1))
        chi += float((pairs.count([i, j]) - expected) ** 2 / expected)
    assert chi < 31.3


@pytest.mark.parametrize("size", [1e-300, 1.0, 1e300])
def test_columns_are_distinct_and_never_of_score_0(size):
    scores = size * np.array([0, 1, 0, 1e-12, 3, 0, 1.0])
    for seed in range(50):
        found = draws.columns(scores, 4, seed=seed)
        assert sorted(found.tolist()) == [1, 3, 4, 6]
        assert found[3] == 3


def test_a_score_next_to_nothing_comes_before_one_of_0():
    assert draws.columns(np.array([0.0, 5e-324, 1.0]), 2).tolist() == [2, 1]


def test_rows_without_elements():
    assert draws.columns(np.ones((0, 5)), 3).shape == (0, 3)
    assert draws.sampled_keys(0, 0).shape == (0, 0)
    assert draws.pilot_rows((), 3).shape == (0, 3)


# With the variants they are for


def test_an_informer_takes_the_sample(rng):
    q, k, v = (rng.standard_normal((2, 2, n, 3)) for n in (9, 12, 12))
    x = {"q": q, "k": k, "v": v, "sample": ra.draws.sampled_keys(9, 12, factor=2)}
    assert ra.evaluate(ra.Informer(factor=2), x, want=("indices",)).indices.shape == (2, 2, 6)


def test_a_skeinformer_is_evaluated_for_its_scores_and_again_for_its_columns(rng):
    """Columns beyond a sequence's length score 0 and are not drawn; with all that are there the result is exact."""
    q, k, v = (rng.standard_normal((2, 2, 8, 3)) for _ in range(3))
    x = {"q": q, "k": k, "v": v, "kv_lengths": np.array([8, 5])}
    x["pilot"] = ra.draws.pilot_rows((8, 5), 4)
    x["columns"] = np.zeros((2, 2, 0), int)
    scores = ra.evaluate(ra.Skeinformer(), x, want=("column_scores",)).column_scores
    x["columns"] = ra.draws.columns(scores, 5)
    assert (x["columns"][1] < 5).all()
    out = ra.evaluate(ra.Skeinformer(), x).out
    exact = ra.attention(q, k, v, kv_lengths=x["kv_lengths"])
    near(out[1], exact[1])
    assert np.abs(out[0] - exact[0]).max() > 1e-3


# What is refused


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: draws.sampled_keys(-1, 3), SpecError, "queries is an integer from 0 to 2.31 − 1; given: -1"),
        (lambda: draws.sampled_keys(1, 3.0), SpecError, "keys is an integer"),
        (lambda: draws.sampled_keys(1, 3, count=True), SpecError, "count is an integer .* given: True"),
        (lambda: draws.sampled_keys(1, 3, factor="5"), SpecError, "factor is an integer .* given: '5'"),
        (lambda: draws.sampled_keys(1, 0, count=1), SpecError, "nothing to draw from: a length is 0"),
        (lambda: draws.sampled_keys(1, 3, seed=-1), SpecError, "seed must be an integer in"),
        (lambda: draws.sampled_keys(1, 3, seed="1"), SpecError, "seed must be an integer in .* given '1'"),
        (lambda: draws.sampled_keys(1, 3, name=1), SpecError, "name is a string; given: 1"),
        (lambda: draws.pilot_rows(3, 1), SpecError, "one integer for each sequence, such as .* given: 3"),
        (lambda: draws.pilot_rows((3, 0), 1), SpecError, "nothing to draw from: a length is 0"),
        (lambda: draws.pilot_rows((3, None), 1), SpecError, "length is an integer .* given: None"),
        (lambda: draws.columns(np.ones(3), -1), SpecError, "count is an integer"),
        (lambda: draws.columns(np.ones(3), 4), ShapeError, "4 columns to draw .* a row has 3 scores above 0"),
        (lambda: draws.columns(np.array([[1.0, 2], [0, 1]]), 2), ShapeError, "a row has 1 scores above 0"),
        (lambda: draws.columns(np.array([1.0, -1]), 1), ShapeError, "scores are finite numbers from 0 on"),
        (lambda: draws.columns(np.array([1.0, np.nan]), 1), ShapeError, "scores are finite numbers from 0 on"),
        (lambda: draws.columns(1.0, 0), ShapeError, "scores are finite numbers from 0 on"),
    ],
)
def test_what_is_no_draw(call, error, message):
    with pytest.raises(error, match=message):
        call()
