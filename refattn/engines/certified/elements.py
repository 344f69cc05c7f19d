"""Arrays of elements of a prime field, and what is done to them entry by entry."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flint import fmpq
from numpy.typing import NDArray

from refattn.engines.certified.balls import Balls
from refattn.space import Bools, Value

_known = np.frompyfunc(lambda q: q is not None, 1, 1)
_nonzero = np.frompyfunc(lambda q: q is None or q != 0, 1, 1)
_ZERO: Any = fmpq(0)


class Field(Value):
    """An array of elements: each a rational number while it is one, a residue always, and a ball.

    rational: fmpq, or None where none is known; residue: fmpz_mod; balls: those of the certified engine; weight: bounds
    the degree over N, and the bits, of the element's numerator and denominator. An infinite one proves nothing.
    """

    __slots__ = ("balls", "rational", "residue", "space", "weight")
    rational: Any
    residue: Any

    def __init__(self, space: Any, rational: Any, residue: Any, weight: Any, balls: Balls) -> None:
        self.space = space
        self.rational, self.residue = array(rational), array(residue)
        self.weight, self.balls = np.asarray(weight, np.float64), balls

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the array."""
        return tuple(self.residue.shape)

    def known(self) -> Bools:
        """Which elements are known to be rational."""
        return np.asarray(_known(self.rational), bool)

    def finite(self) -> Bools:
        """Of which elements anything is proved by a residue."""
        return np.isfinite(self.weight)

    def each(self, move: Callable[[Any], Any]) -> Field:
        """The elements moved, repeated or chosen as `move` does it to any array."""
        balls = Balls(array(move(self.balls._balls)))
        return Field(self.space, move(self.rational), move(self.residue), move(self.weight), balls)

    def doubtful(self, where: Bools, balls: Balls) -> Field:
        """Nothing known of the elements there but their balls, which are given for all."""
        weight = np.where(where, np.inf, self.weight)
        return Field(self.space, np.where(where, None, self.rational), self.residue, weight, balls)


def array(result: Any) -> NDArray[np.object_]:
    """Object ufuncs return the bare object for a scalar; arrays stay arrays."""
    return result if isinstance(result, np.ndarray) else np.asarray(result, object)


def filled(values: Sequence[Any], shape: tuple[int, ...]) -> NDArray[np.object_]:
    """Objects in an array of that shape."""
    out = np.empty(len(values), dtype=object)
    out[:] = values
    return out.reshape(shape)


def exact(number: Any) -> Any:
    """A Python number as an fmpq; None for a float that is not finite."""
    if isinstance(number, float) and not math.isfinite(number):
        return None
    return fmpq(*number.as_integer_ratio())


def height(q: Any) -> float:
    """Bits of a rational; infinite for None."""
    return math.inf if q is None else float(max(int(q.p).bit_length(), int(q.q).bit_length()))


def root(q: Any) -> Any:
    """The rational square root of an fmpq, or None."""
    if q is None or q < 0:
        return None
    above, below = math.isqrt(int(q.p)), math.isqrt(int(q.q))
    return fmpq(above, below) if above**2 == q.p and below**2 == q.q else None


def zeros_for_none(rational: NDArray[np.object_]) -> list[Any]:
    """The entries in order, 0 where nothing is known, for sums that are thrown away there."""
    return [_ZERO if q is None else q for q in rational.ravel()]


def irrational_sums(a: Field, b: Field) -> Bools:
    """Entries of a batched product a b in which a term is not known to be rational: 0 times anything is."""
    unknown, other = (~x.known() * 1.0 for x in (a, b))
    nonzero, not_zero = (np.asarray(_nonzero(x.rational), np.float64) for x in (a, b))
    found: Bools = unknown @ not_zero + nonzero @ other > 0
    return found


def _both(of: Callable[[Any, Any], Any]) -> Any:
    return np.frompyfunc(lambda a, b: None if a is None or b is None else of(a, b), 2, 1)


def _times(a: Any, b: Any, number: bool) -> Any:
    if a is not None and b is not None:
        return a * b
    return _ZERO if number and (a == _ZERO if b is None else b == _ZERO) else None


def _over(a: Any, b: Any, number: bool) -> Any:
    if a is None or not number:
        return None
    return a / b if b is not None else _ZERO if a == 0 else None


plus, minus = _both(lambda a, b: a + b), _both(lambda a, b: a - b)
times, over = np.frompyfunc(_times, 3, 1), np.frompyfunc(_over, 3, 1)
