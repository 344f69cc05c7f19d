"""A prime field as a space: equality of what a formula gives, decided as an identity in e and in named unknowns.

e^a for a rational a is the a-th power of the field's base; every other irrational function of an argument is a symbol,
a residue drawn by a hash of the argument's. Theorem and chance of error: `docs/certification.md`, section 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from flint import fmpq, fmpq_mat, fmpz_mod_ctx, fmpz_mod_mat
from numpy.typing import NDArray

from refattn.engines.certified import elements
from refattn.engines.certified.balls import BALLS, Balls
from refattn.engines.certified.elements import Field, filled
from refattn.engines.certified.modulus import Modulus, symbol
from refattn.errors import DTypeError, Undecided
from refattn.space import Bools, Integers, contraction

# Where a function of a rational is rational: sin 0 = 0, cos 0 = 1, log 1 = 0.
_POINTS = {"exp": (0, 1), "sin": (0, 0), "cos": (0, 1), "tanh": (0, 0), "erf": (0, 0), "log": (1, 0), "sqrt": (0, 0)}
# f(−x) from f(x): an argument and its negative share a symbol.
_MIRRORED: dict[str, Callable[[Any], Any]] = {
    "exp": lambda y: 1 / y, "sin": lambda y: -y, "cos": lambda y: y, "tanh": lambda y: -y, "erf": lambda y: -y,
}  # fmt: skip
_ZERO: Any = fmpq(0)
_PARTS = ("rational", "residue", "weight")
_UNKNOWN = 2
# Exponents from here on have no prime tried that would do.
_HUGE = 2**1000


class FieldSpace:
    """The operations of `numeric` in one field.

    fineness: the N of which all exponents so far are multiples of 1/N; asked: how many residues were compared, or
    hashed to be; heaviest: the largest weight of these; chosen: whether a choice hung on one of them.
    """

    def __init__(self, modulus: Modulus) -> None:
        self.modulus = modulus
        self.context = fmpz_mod_ctx(modulus.prime)
        self.zero: Any = self.context(0)
        self.one: Any = self.context(1)
        self.fineness, self.asked, self.heaviest, self.chosen = 1, 0, 1.0, False
        self._inverses: dict[int, Any] = {}

    def chance(self, weight: float) -> float:
        """log2 of a bound on the chance that an element of this weight has residue 0 without being 0."""
        total = weight + self.asked**2 * (2 * self.heaviest + 1)
        bits = self.fineness.bit_length() - self.modulus.bits + 2
        return math.inf if math.isinf(total) else math.log2(total + 1) + bits

    def lift(self, q: fmpq) -> Any:
        """The residue of a rational."""
        below = int(q.q)
        if below not in self._inverses:
            self._inverses[below] = self.one / self.context(below)
        return self.context(q.p) * self._inverses[below]

    def coerce(self, value: Any) -> Field:
        """Elements pass and integers are exact; anything else needs `numeric.real`."""
        if isinstance(value, Field):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return self.real(value)
        raise DTypeError(f"a {type(value).__name__} in a formula on a field: lift exact numbers with numeric.real")

    def real(self, value: Any) -> Field:
        """Exact lift; what is not finite has no residue, and nothing is proved of what depends on it."""
        array = np.asarray(value)
        numbers = [elements.exact(number) for number in array.ravel().tolist()]
        residues = [self.zero if q is None else self.lift(q) for q in numbers]
        return Field(
            self,
            filled(numbers, array.shape),
            filled(residues, array.shape),
            np.array([elements.height(q) for q in numbers]).reshape(array.shape),
            BALLS.real(value),
        )

    def add(self, a: Field, b: Field) -> Field:
        """Sum."""
        rational, weight = elements.plus(a.rational, b.rational), a.weight + b.weight + 1
        return Field(self, rational, a.residue + b.residue, weight, BALLS.add(a.balls, b.balls))

    def sub(self, a: Field, b: Field) -> Field:
        """Difference."""
        rational, weight = elements.minus(a.rational, b.rational), a.weight + b.weight + 1
        return Field(self, rational, a.residue - b.residue, weight, BALLS.sub(a.balls, b.balls))

    def mul(self, a: Field, b: Field) -> Field:
        """Product; a rational 0 makes one of whatever else is a number."""
        weight = a.weight + b.weight
        rational = elements.times(a.rational, b.rational, np.isfinite(weight))
        return Field(self, rational, a.residue * b.residue, weight, BALLS.mul(a.balls, b.balls))

    def div(self, a: Field, b: Field) -> Field:
        """Quotient; nothing is known of one by residue 0."""
        by_zero = np.asarray(b.residue == self.zero, bool)
        below = np.where(by_zero, self.one, b.residue)
        weight = np.where(by_zero, np.inf, a.weight + b.weight)
        rational = elements.over(a.rational, b.rational, np.isfinite(weight))
        return Field(self, rational, a.residue / below, weight, BALLS.div(a.balls, b.balls))

    def exp(self, x: Field) -> Field:
        """Of a rational a: the base to the a; with n the common denominator, the power n·a of the n-th root of it."""
        known = x.known()
        made = self._symbols(self.where(known, self.real(0), x), "exp")
        exponents = [(int(q.p), int(q.q)) for q in x.rational[known]]
        n = math.lcm(*(below for _, below in exponents))
        self.fineness = math.lcm(self.fineness, n)
        root = self.context(self.modulus.base) ** pow(n, -1, self.modulus.order)
        made.residue[known] = filled([root ** (p * (n // below)) for p, below in exponents], (len(exponents),))
        made.rational[known] = filled([None if p else fmpq(1) for p, _ in exponents], (len(exponents),))
        sizes = [abs(Fraction(p, below)) for p, below in exponents]
        made.weight[known] = [float(size) if size < _HUGE else math.inf for size in sizes]
        return Field(self, made.rational, made.residue, made.weight, BALLS.exp(x.balls))

    def log(self, x: Field) -> Field:
        """Logarithm."""
        return self._symbols(x, "log")

    def tanh(self, x: Field) -> Field:
        """Hyperbolic tangent."""
        return self._symbols(x, "tanh")

    def sin(self, x: Field) -> Field:
        """Sine."""
        return self._symbols(x, "sin")

    def cos(self, x: Field) -> Field:
        """Cosine."""
        return self._symbols(x, "cos")

    def erf(self, x: Field) -> Field:
        """Error function."""
        return self._symbols(x, "erf")

    def sqrt(self, x: Field) -> Field:
        """Square root; rational of the square of a rational."""
        made = self._symbols(x, "sqrt")
        for at in np.ndindex(x.shape):
            root = elements.root(x.rational[at])
            if root is not None:
                made.rational[at], made.residue[at], made.weight[at] = root, self.lift(root), elements.height(root)
        return made

    def pi(self) -> Field:
        """A symbol."""
        return self._named(["pi"], (), BALLS.pi())

    def sin_pi(self, turns: Any) -> Field:
        """Sine of π times Fractions: rational for multiples of 1/2, else a symbol."""
        turns = np.asarray(turns, object)
        return self._turned([t - Fraction(1, 2) for t in turns.flat], turns.shape, BALLS.sin_pi(turns))

    def cos_pi(self, turns: Any) -> Field:
        """Cosine likewise."""
        turns = np.asarray(turns, object)
        return self._turned(list(turns.flat), turns.shape, BALLS.cos_pi(turns))

    def solve(self, a: Field, b: Field, least: float) -> Field:
        """By `fmpz_mod_mat`, and by `fmpq_mat` where all entries are rational; by Cramer's rule for the weight."""
        (n, m), known = b.shape, bool(a.known().all() and b.known().all())
        left, right = a.residue.ravel().tolist(), b.residue.ravel().tolist()
        try:
            residues = fmpz_mod_mat(n, n, left, self.context).solve(fmpz_mod_mat(n, m, right, self.context)).entries()
        except ZeroDivisionError:
            raise Undecided("a matrix that is singular in the field") from None
        rational: list[Any] = [None] * (n * m)
        if known:
            matrix = fmpq_mat(n, n, a.rational.ravel().tolist())
            rational = matrix.solve(fmpq_mat(n, m, b.rational.ravel().tolist())).entries()
        weight = np.full((n, m), (n + 1) * (a.weight.sum() + b.weight.sum() + n))
        balls = BALLS.solve(a.balls, b.balls, least)
        return Field(self, filled(rational, (n, m)), filled(residues, (n, m)), weight, balls)

    def maximum(self, a: Field, b: Field) -> Field:
        """The larger; nothing is known of it where rational, residue and ball do not tell which that is."""
        sign = self.signs(self.sub(a, b))
        return self.where(sign >= 0, a, b).doubtful(sign == _UNKNOWN, BALLS.maximum(a.balls, b.balls))

    def minimum(self, a: Field, b: Field) -> Field:
        """The smaller likewise."""
        sign = self.signs(self.sub(b, a))
        return self.where(sign >= 0, a, b).doubtful(sign == _UNKNOWN, BALLS.minimum(a.balls, b.balls))

    def step(self, x: Field, at_zero: float) -> Field:
        """1 above 0, 0 below; nothing is known of it where the sign is not."""
        sign = self.signs(x)
        made = self.real(np.where(sign == 1, 1.0, np.where(sign == 0, at_zero, 0.0)))
        return made.doubtful(sign == _UNKNOWN, BALLS.step(x.balls, at_zero))

    def peak(self, x: Field, live: Bools) -> Field:
        """1 at the first of the largest live entries; nothing is known of a row whose order is not."""
        rank, unsure = self._ranks(x, live)
        made = self.real(((rank == 0) & live).astype(np.int64))
        return made.doubtful(np.broadcast_to(unsure[..., None], x.shape), BALLS.peak(x.balls, live))

    def amax(self, x: Field, live: Bools) -> Field:
        """The largest live entry likewise."""
        rank, unsure = self._ranks(x, live)
        made = self.sum(self.where((rank == 0) & live, x, self.real(0)), -1, False)
        return made.doubtful(unsure, BALLS.amax(x.balls, live))

    def top_k(self, x: Field, k: int) -> Integers:
        """Every row sorted: rational and residue decide what is equal, rational and ball what is larger."""
        rank, unsure = self._ranks(x, np.ones(x.shape, bool))
        if unsure.any():
            raise Undecided("two entries too close to tell which is larger")
        return np.argsort(rank, axis=-1)[..., :k].astype(np.int64)

    def row_max(self, x: Field, live: Bools) -> Field:
        """A largest entry where all are rational, else 0: then equal scores have equal exponentials in all rows."""
        if not x.shape[-1]:
            return self.real(np.zeros((*x.shape[:-1], 1)))
        near = np.where(live, x.balls.enclosure()[0], -np.inf)
        best = np.argmax(near, axis=-1)[..., None]
        top = x.each(lambda part: np.take_along_axis(part, best, -1))
        rational = np.any(live, -1, keepdims=True) & np.all(x.known() | ~live, -1, keepdims=True)
        return self.where(rational, top, self.real(0))

    def reshape(self, x: Field, shape: tuple[int, ...]) -> Field:
        """Another shape."""
        return x.each(lambda part: part.reshape(shape))

    def transpose(self, x: Field, axes: Sequence[int]) -> Field:
        """Another order of axes."""
        return x.each(lambda part: part.transpose(axes))

    def broadcast(self, x: Field, shape: tuple[int, ...]) -> Field:
        """Repeated entries."""
        return x.each(lambda part: np.broadcast_to(part, shape))

    def index(self, x: Field, key: Any) -> Field:
        """Basic indexing."""
        return x.each(lambda part: part[key])

    def take(self, x: Field, indices: NDArray[np.intp], axis: int) -> Field:
        """Entries of one axis."""
        return x.each(lambda part: np.take(part, indices, axis))

    def concatenate(self, parts: Sequence[Field], axis: int) -> Field:
        """Joined along an axis."""
        rational, residue, weight = (np.concatenate([getattr(x, name) for x in parts], axis) for name in _PARTS)
        return Field(self, rational, residue, weight, BALLS.concatenate([x.balls for x in parts], axis))

    def sum(self, x: Field, axis: Any, keepdims: bool) -> Field:
        """Sum over axes, rational where every entry is."""
        known = x.known()
        options: dict[str, Any] = {"axis": axis, "keepdims": keepdims}
        rational: Any = elements.array(np.sum(np.where(known, x.rational, _ZERO), initial=_ZERO, **options))
        return Field(
            self,
            np.where(np.all(known, **options), rational, None),
            np.sum(x.residue, initial=self.zero, **options),
            np.sum(x.weight + 1, **options),
            BALLS.sum(x.balls, axis, keepdims),
        )

    def einsum(self, letters: str, a: Field, b: Field) -> Field:
        """Batched products by `fmpz_mod_mat`; rational where each term is, by `fmpq_mat`."""
        c = contraction(letters, a.shape, b.shape)
        left = a.each(lambda part: part.transpose(c.a_axes).reshape(c.a_shape))
        right = b.each(lambda part: part.transpose(c.b_axes).reshape(c.b_shape))
        batch, m, k, n = *c.a_shape, c.b_shape[2]
        weight = left.weight.sum(2)[:, :, None] + right.weight.sum(1)[:, None, :] + k
        residue, rational = np.full((batch, m, n), self.zero), np.full((batch, m, n), _ZERO)
        open_ = elements.irrational_sums(left, right) | ~np.isfinite(weight)
        for i in range(batch if m * k * n else 0):
            entries = left.residue[i].ravel().tolist(), right.residue[i].ravel().tolist()
            product: Any = fmpz_mod_mat(m, k, entries[0], self.context) * fmpz_mod_mat(k, n, entries[1], self.context)
            residue[i] = filled(product.entries(), (m, n))
            if not open_[i].all():
                entries = elements.zeros_for_none(left.rational[i]), elements.zeros_for_none(right.rational[i])
                product = fmpq_mat(m, k, entries[0]) * fmpq_mat(k, n, entries[1])
                rational[i] = filled(product.entries(), (m, n))
        rational[open_] = None

        def back(part: NDArray[Any]) -> NDArray[Any]:
            return part.reshape(c.shape).transpose(c.axes)

        return Field(self, back(rational), back(residue), back(weight), BALLS.einsum(letters, a.balls, b.balls))

    def where(self, condition: Bools, a: Field, b: Field) -> Field:
        """Entries of a where the condition holds, else of b."""
        rational, residue, weight = (np.where(condition, getattr(a, name), getattr(b, name)) for name in _PARTS)
        return Field(self, rational, residue, weight, BALLS.where(condition, a.balls, b.balls))

    def finite(self, x: Field) -> Bools:
        """Of the balls."""
        return BALLS.finite(x.balls)

    def minus_infinite(self, x: Field) -> Bools:
        """Of the balls."""
        return BALLS.minus_infinite(x.balls)

    def stored(self, x: Field, cotangent: bool) -> Field:
        """A field stores everything as it is."""
        return x

    def stop(self, x: Field) -> Field:
        """The same."""
        return x

    def signs(self, x: Field) -> Integers:
        """1, 0, −1, or 2 where neither rational, residue nor ball tells."""
        by_ball = BALLS.step(x.balls, 0.5).enclosure()[0]
        sign = np.where(by_ball == 1, 1, np.where(by_ball == 0, -1, _UNKNOWN))
        same = np.asarray(x.residue == self.zero, bool) & x.finite()
        known = x.known()
        if (same & ~known).any():
            self.chosen = True
            self._compared(x.weight[same])
        sign[same] = 0
        sign[known] = [(q > 0) - (q < 0) for q in x.rational[known]]
        return sign.astype(np.int64)

    def _ranks(self, x: Field, live: Bools) -> tuple[Integers, Bools]:
        """How many live entries of its row come before each, and which rows hold two whose order is not known."""
        shape, n = x.shape[:-1], x.shape[-1]
        difference = self.sub(self.reshape(x, (*shape, n, 1)), self.reshape(x, (*shape, 1, n)))
        sign, there = self.signs(difference), live[..., :, None] & live[..., None, :]
        earlier = np.arange(n)[:, None] < np.arange(n)
        before = there & ((sign == 1) | ((sign == 0) & earlier))
        return before.sum(-2), (there & (sign == _UNKNOWN)).any((-2, -1))

    def _symbols(self, x: Field, name: str) -> Field:
        """A symbol for the function of each entry, but at the points where its value is rational."""
        at, value = _POINTS[name]
        residues = np.full(x.shape, self.context(value))
        for i in np.ndindex(x.shape):
            if x.residue[i] != at:
                residues[i] = self._symbol(name, int(x.residue[i]))
        rational = [fmpq(value) if q == at else None for q in x.rational.ravel()]
        self._compared(x.weight[x.finite()])
        weight = np.where(x.finite(), 1.0, np.inf)
        return Field(self, filled(rational, x.shape), residues, weight, getattr(BALLS, name)(x.balls))

    def _symbol(self, name: str, argument: int) -> Any:
        if name in _MIRRORED and 2 * argument > self.modulus.prime:
            return _MIRRORED[name](self._symbol(name, self.modulus.prime - argument))
        return self.context(symbol(self.modulus, name, argument))

    def _compared(self, weights: Any) -> None:
        self.asked += weights.size
        self.heaviest = max(self.heaviest, float(weights.max(initial=0.0)))

    def _turned(self, cosines: list[Fraction], shape: tuple[int, ...], balls: Balls) -> Field:
        """cos(π t) of Fractions: by t within [0, 1], equal cosines have equal symbols."""
        within = [min(t % 2, 2 - t % 2) for t in cosines]
        made = self._named([f"cos pi {t}" for t in within], shape, balls)
        for at, t in zip(np.ndindex(shape), within, strict=True):
            if 2 * t in (0, 1, 2):
                made.rational[at], made.residue[at] = fmpq(1 - int(2 * t)), self.context(1 - int(2 * t))
        return made

    def _named(self, names: list[str], shape: tuple[int, ...], balls: Balls) -> Field:
        """Symbols of constants, whose names nothing has to be compared for."""
        residues = [self.context(symbol(self.modulus, name, 0)) for name in names]
        return Field(self, np.full(shape, None), filled(residues, shape), np.ones(shape), balls)
