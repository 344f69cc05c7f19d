"""The prime field that an exactness test runs in, drawn from the identity of its problem."""

from __future__ import annotations

from hashlib import shake_256
from itertools import count
from math import gcd
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

    A prime `order` gives every rational power of the base a meaning, and 1 only to its own multiples. The base proves p
    prime as well (Pocklington): order² > p, base^order = 1, and base − 1 has no factor of p.
    """
    order = next(
        n for n in (_word(seed, f"order {i}", bits) | 1 << bits - 1 | 1 for i in count())
        if fmpz(n).is_probable_prime() and fmpz(n).is_prime()
    )  # fmt: skip
    for c in count(1):
        prime = 2 * c * order + 1
        base = pow(_word(seed, f"base {c}", bits + 64), 2 * c, prime)
        if fmpz(prime).is_probable_prime() and pow(base, order, prime) == 1 and gcd(base - 1, prime) == 1:
            return Modulus(prime, order, base, bits, seed)
    raise AssertionError("every arithmetic progression of this kind holds primes (Dirichlet)")


def symbol(modulus: Modulus, name: str, argument: int) -> int:
    """The residue that stands for `name` of an argument which is no rational: the same for equal residues."""
    return _word(modulus.seed, f"{modulus.bits} {name} {argument:x}", modulus.bits + 64) % modulus.prime


def _word(seed: bytes, about: str, bits: int) -> int:
    return int.from_bytes(shake_256(seed + about.encode()).digest(bits // 8), "big")
