"""Indices for the variants that take drawn ones as inputs: the same integers on every machine, in any language.

Each draw reads the Philox words (`refattn.philox`) of a seed, a name and the kind of draw, element by element in C
order. Whoever wants other draws takes another seed or name; whoever wants their own passes any integers to the variant.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.arrays import to_numpy
from refattn.errors import ShapeError, SpecError
from refattn.exponential import log64
from refattn.philox import words

Integers = NDArray[np.int64]


def sampled_keys(
    queries: int, keys: int, *, factor: int = 5, count: int | None = None, seed: int = 0, name: str = "draw"
) -> Integers:
    """Keys for Informer's measure: for each query U of them, uniform and with replacement.

    Element n is ⌊w Lk / 2^32⌋ with w word 3 of block n, tensor "sample": each key has its share within 2^-32.

    Parameters
    ----------
    queries, keys : int
        Lq and Lk.
    factor, count : int
        U is `count`, or min(factor ⌈ln Lk⌉, Lk) as the authors have it.
    seed, name
        Which words.

    Returns
    -------
    numpy.ndarray
        int64, (Lq, U).

    Raises
    ------
    SpecError
        A count is negative, or there is no key to draw.
    """
    _counts(queries=queries, keys=keys, factor=factor)
    if count is None:
        count = min(factor * math.ceil(math.log(max(keys, 1))), keys)
    _counts(count=count)
    return _uniform(np.full((queries, count), keys), seed, name, "sample")


def pilot_rows(lengths: Sequence[int], count: int, *, seed: int = 0, name: str = "draw") -> Integers:
    """Query rows for Skeinformer's pilot: for each sequence `count` below its length, uniform and with replacement.

    Element n is ⌊w length / 2^32⌋ with w word 3 of block n, tensor "pilot".

    Parameters
    ----------
    lengths : B integers
        Lengths of the sequences, all Lq where nothing is padded.
    count : int
        Rows of each.
    seed, name
        Which words.

    Returns
    -------
    numpy.ndarray
        int64, (B, count).

    Raises
    ------
    SpecError
        A count is negative, there is no row to draw, or lengths is no sequence.
    """
    if np.ndim(lengths) != 1:
        raise SpecError(f"lengths holds one integer for each sequence, such as [Lq] * B; given: {lengths!r}")
    for length in lengths:
        _counts(length=length)
    _counts(count=count)
    each = np.array(lengths, np.int64).reshape(-1, 1)
    return _uniform(np.broadcast_to(each, (each.size, count)), seed, name, "pilot")


def columns(scores: Any, count: int, *, seed: int = 0, name: str = "draw") -> Integers:
    """Key columns for Skeinformer: without replacement, each step in proportion to the scores of those that are left.

    By a race of exponentials: key j arrives at time −ln(u_j) / score_j, and the first to arrive are drawn, in the order
    of arrival; the least of independent exponential times falls to j in proportion to its rate, and what is left
    forgets the time gone by. u_j = (2^20 w + ⌊w' / 2^12⌋ + ½) / 2^52 with w and w' words 0 and 1 of block j of the
    array, tensor "columns". The logarithm is refattn's own, so that no vendor's rounding decides. A score of 0 is
    never drawn.

    Parameters
    ----------
    scores : (..., Lk)
        Numbers from 0 on, of any sum: the output `column_scores` of a Skeinformer.
    count : int
        Columns of each row of scores.
    seed, name
        Which words.

    Returns
    -------
    numpy.ndarray
        int64, (..., count).

    Raises
    ------
    SpecError
        count is negative.
    ShapeError
        A score is negative or not finite, or a row has fewer scores above 0 than are to be drawn.
    """
    _counts(count=count)
    rates = to_numpy(scores, "scores").astype(np.float64)
    if not rates.ndim or not np.isfinite(rates).all() or (rates < 0).any():
        raise ShapeError(f"scores are finite numbers from 0 on, (..., Lk); given: {scores!r}")
    there = np.count_nonzero(rates, -1)
    if there.size and count > there.min():
        raise ShapeError(f"{count} columns to draw without replacement, but a row has {there.min()} scores above 0")
    high, low = (w.astype(np.uint64).reshape(rates.shape) for w in words(seed, name, "columns", rates.size)[:2])
    u = np.ldexp(((high << np.uint64(20)) + (low >> np.uint64(12))).astype(np.float64) + 0.5, -52)
    with np.errstate(divide="ignore", over="ignore"):
        arrival = -log64(u) / rates
    # Scores of 0 last, even after one so small that its time overflows; of equal times the lower index.
    order: Integers = np.lexsort((arrival, rates == 0))[..., :count].astype(np.int64)
    return order


def _uniform(below: Integers, seed: int, name: str, tensor: str) -> Integers:
    """For each element a number from 0 to one less than it."""
    if below.size and not below.min():
        raise SpecError("nothing to draw from: a length is 0, but the count of draws is not")
    word = words(seed, name, tensor, below.size)[3].astype(np.uint64).reshape(below.shape)
    return ((word * below.astype(np.uint64)) >> np.uint64(32)).astype(np.int64)


def _counts(**given: Any) -> None:
    for what, number in given.items():
        if not isinstance(number, int | np.integer) or isinstance(number, bool) or not 0 <= number < 2**31:
            raise SpecError(f"{what} is an integer from 0 to 2^31 − 1; given: {number!r}")
