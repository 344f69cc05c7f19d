"""The prime field that an exactness test runs in, drawn from the identity of its problem."""

from __future__ import annotations

from hashlib import shake_256
from itertools import count
from typing import NamedTuple

from flint import fmpz


class Modulus(NamedTuple):
    """A prime p = 2c·order + 1, the prime `order` of `bits` bits, and an element of that order for e to stand at.

    `seed` is what symbols are drawn from as well.
    """

    prime: int
    order: int
    base: int
    bits: int
    seed: bytes


def draw(seed: bytes, bits: int) -> Modulus:
    """Order and base as good as uniform among the primes of `bits` bits and the elements of that order.

    A multiple of `order` in p − 1 gives every rational power of the base a meaning, and no small power of it is 1.
    """
    order = next(n for n in (_word(seed, f"order {i}", bits) | 1 << bits - 1 | 1 for i in count()) if _is_prime(n))
    prime = next(n for n in (2 * c * order + 1 for c in count(1)) if _is_prime(n))
    powers = (pow(_word(seed, f"base {i}", bits + 64), (prime - 1) // order, prime) for i in count())
    return Modulus(prime, order, next(g for g in powers if g > 1), bits, seed)


def symbol(modulus: Modulus, name: str, argument: int) -> int:
    """The residue that stands for `name` of an argument which is no rational: the same for equal residues."""
    return _word(modulus.seed, f"{modulus.bits} {name} {argument:x}", modulus.bits + 64) % modulus.prime


def _word(seed: bytes, about: str, bits: int) -> int:
    return int.from_bytes(shake_256(seed + about.encode()).digest(bits // 8), "big")


def _is_prime(n: int) -> bool:
    return bool(fmpz(n).is_probable_prime() and fmpz(n).is_prime())
