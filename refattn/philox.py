"""Philox4x32-10, the generator behind every input of a case: element i needs block i and nothing else.

A counter-based generator: ten rounds of 32-bit products scramble a counter of four words under a key of two, so that
any element is computed anywhere, in any order and in any language (Salmon, Moraes, Dror, Shaw, "Parallel random
numbers: as easy as 1, 2, 3", SC 2011; constants and known answers of their Random123 library). NumPy's own Philox is
the 64-bit one, and its distributions may change between versions.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.errors import SpecError

Words = tuple[NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32], NDArray[np.uint32]]

_MULTIPLIERS = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_KEY_STEPS = 0x9E3779B9, 0xBB67AE85  # the golden ratio and √3 − 1, as 32-bit fractions
_LOW, _32 = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: Sequence[ArrayLike], key: tuple[int, int]) -> Words:
    """Return the blocks of four words for counters of four words under a key of two.

    One round, (h, l) being the high and low word of a product: (h₀, l₀) = M₀·c₀, (h₁, l₁) = M₁·c₂,
    c ← (h₁ ⊕ c₁ ⊕ k₀, l₁, h₀ ⊕ c₃ ⊕ k₁, l₀), then k ← k + W modulo 2³².

    Parameters
    ----------
    counter : four integer arrays that broadcast together, each word below 2^32
    key : two integers below 2^32

    Returns
    -------
    tuple of four numpy.ndarray
        uint32, the broadcast shape.
    """
    c0, c1, c2, c3 = np.broadcast_arrays(*(np.asarray(c, np.uint64) for c in counter))
    k0, k1 = key
    m0, m1 = _MULTIPLIERS
    for _ in range(10):
        p0, p1 = m0 * c0, m1 * c2
        c0, c1 = (p1 >> _32) ^ c1 ^ np.uint64(k0), p1 & _LOW
        c2, c3 = (p0 >> _32) ^ c3 ^ np.uint64(k1), p0 & _LOW
        k0, k1 = (k0 + _KEY_STEPS[0]) % 2**32, (k1 + _KEY_STEPS[1]) % 2**32
    return _uint32(c0), _uint32(c1), _uint32(c2), _uint32(c3)


def identifier(name: str) -> int:
    """Return the 32-bit number of a case or tensor: the first 8 hex digits of the SHA-256 of its UTF-8 name."""
    import hashlib

    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")


def words(seed: int, case: str, tensor: str, count: int) -> Words:
    """Return the random words of a tensor's first `count` elements in C order.

    Element i is the block of the counter (i mod 2^32, ⌊i/2^32⌋, identifier(tensor), identifier(case)) under the key
    (seed mod 2^32, ⌊seed/2^32⌋).

    Returns
    -------
    tuple of four numpy.ndarray
        uint32, (count,).

    Raises
    ------
    SpecError
        seed is no integer in [0, 2^64), or case no string.
    """
    if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**64:
        raise SpecError(f"seed must be an integer in [0, 2^64); given {seed!r}")
    if not isinstance(case, str):
        raise SpecError(f"name is a string; given: {case!r}")
    index = np.arange(count, dtype=np.uint64)
    high, low = divmod(seed, 2**32)
    return philox4x32((index & _LOW, index >> _32, identifier(tensor), identifier(case)), (low, high))


def normal12(words: Words) -> NDArray[np.int64]:
    """Return integers k that are nearly normal: the sum of the 12 bytes of words 0 to 2, minus its mean 1530.

    |k| ≤ 1530, mean 0, variance 12·(256² − 1)/12 = 65535: k/256 has unit variance but for 1 part in 65536, an excess
    kurtosis of −0.1, and is exact in float16. Word 3 is spare.

    Returns
    -------
    numpy.ndarray
        int64, the shape of a word.
    """
    even_bytes = np.uint32(0x00FF00FF)
    # Two 16-bit lanes of sums, which never carry into each other: at most 6·255 each.
    lanes = sum(((w & even_bytes) + ((w >> np.uint32(8)) & even_bytes) for w in words[:3]), np.uint32(0))
    total: NDArray[np.int64] = np.asarray(lanes, np.int64)
    return (total & 0xFFFF) + (total >> 16) - 1530


def _uint32(c: NDArray[Any]) -> NDArray[np.uint32]:
    return np.asarray(c).astype(np.uint32)
