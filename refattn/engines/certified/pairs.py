"""Pairs of doubles as a space: every number is h + low with a radius e that provably holds the exact value.

Between float64, whose error is a step, and balls, which are slow: about 104 bits on arrays. Every entry that has lost
its bound is undecided, and goes to the balls; so does a problem in which a choice stays open here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.engines.certified import pairs_arithmetic as arithmetic
from refattn.engines.certified import pairs_choices as choices
from refattn.engines.certified import pairs_functions as functions
from refattn.engines.certified.enclosure import Enclosure
from refattn.engines.certified.pairs_arithmetic import Floats, Triple
from refattn.engines.certified.pairs_functions import rational
from refattn.engines.certified.pairs_products import matmul
from refattn.errors import DTypeError, Undecided
from refattn.problem import Problem
from refattn.space import Bools, Integers, Value, contraction

# Arrays of so many entries stay in the cache for the eighty passes of a product.
_CHUNK = 1 << 13
# Entries from which on compiling pays, and what is compiled.
_LARGE = 1 << 12
_COMPILED = {"add", "mul", "div", "exp"}


class Pairs(Value):
    """An array of pairs with radii."""

    __slots__ = ("at",)

    def __init__(self, at: Triple) -> None:
        self.at = at

    @property
    def space(self) -> PairSpace:
        """The one space of pairs."""
        return PAIRS

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the array."""
        shape: tuple[int, ...] = self.at.h.shape
        return shape

    def enclosure(self) -> Enclosure:
        """What `rounding` decides from."""
        return Enclosure(self.at.h, self.at.low, self.at.e)


class PairSpace:
    """The operations of `numeric` on pairs."""

    def coerce(self, value: Any) -> Pairs:
        """Pairs pass and integers are exact; anything else needs `numeric.real`, in sight."""
        if isinstance(value, Pairs):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return Pairs(rational(Fraction(value)))
        raise DTypeError(f"a {type(value).__name__} in a formula on pairs: lift exact numbers with numeric.real")

    def real(self, value: Any) -> Pairs:
        """Exact lift; a Fraction becomes the pair nearest to it."""
        if isinstance(value, Fraction):
            return Pairs(rational(value))
        array = np.asarray(value)
        h = array.astype(np.float64)
        if array.dtype.kind in "iu" and (np.abs(h) >= 2.0**53).any():
            return self._each(array, lambda n: rational(Fraction(int(n))))
        return Pairs(arithmetic.exact(h))

    def _each(self, values: NDArray[Any], make: Callable[[Any], Triple]) -> Pairs:
        made = [make(v) for v in values.ravel()]
        return Pairs(Triple(*(np.array(column).reshape(values.shape) for column in zip(*made, strict=True))))

    def add(self, a: Pairs, b: Pairs) -> Pairs:
        """Sum."""
        return _elementwise(arithmetic.add, np.add, a, b)

    def sub(self, a: Pairs, b: Pairs) -> Pairs:
        """Difference."""
        return self.add(a, Pairs(arithmetic.negative(b.at)))

    def mul(self, a: Pairs, b: Pairs) -> Pairs:
        """Product."""
        return _elementwise(arithmetic.mul, np.multiply, a, b)

    def div(self, a: Pairs, b: Pairs) -> Pairs:
        """Quotient; by what may be 0, unbounded."""
        return _elementwise(arithmetic.div, np.true_divide, a, b)

    def exp(self, x: Pairs) -> Pairs:
        """Exponential."""
        return _elementwise(functions.exp, np.exp, x)

    def log(self, x: Pairs) -> Pairs:
        """Logarithm; of what may be 0, unbounded."""
        return _elementwise(functions.log, np.log, x)

    def tanh(self, x: Pairs) -> Pairs:
        """Hyperbolic tangent."""
        return _elementwise(functions.tanh, np.tanh, x)

    def sqrt(self, x: Pairs) -> Pairs:
        """Square root; of what may be below 0, unbounded."""
        return _elementwise(arithmetic.sqrt, np.sqrt, x)

    def sin(self, x: Pairs) -> Pairs:
        """By balls."""
        return _by_balls("sin", x)

    def cos(self, x: Pairs) -> Pairs:
        """By balls."""
        return _by_balls("cos", x)

    def erf(self, x: Pairs) -> Pairs:
        """By balls."""
        return _by_balls("erf", x)

    def sin_pi(self, turns: Any) -> Pairs:
        """By balls, which reduce exact turns exactly."""
        return _by_balls("sin_pi", turns)

    def cos_pi(self, turns: Any) -> Pairs:
        """By balls likewise."""
        return _by_balls("cos_pi", turns)

    def pi(self) -> Pairs:
        """By balls."""
        return _by_balls("pi")

    def solve(self, a: Pairs, b: Pairs, least: float) -> Pairs:
        """By balls, which prove that the matrix is regular."""
        return _by_balls("solve", a, b, least)

    def maximum(self, a: Pairs, b: Pairs) -> Pairs:
        """The larger, decided or not."""
        return Pairs(choices.larger(*_broadcast(a, b)))

    def minimum(self, a: Pairs, b: Pairs) -> Pairs:
        """The smaller likewise."""
        first, second = (arithmetic.negative(x) for x in _broadcast(a, b))
        return Pairs(arithmetic.negative(choices.larger(first, second)))

    def step(self, x: Pairs, at_zero: float) -> Pairs:
        """All of [0, 1] where the interval holds 0 and more."""
        return Pairs(choices.step(x.at, at_zero))

    def peak(self, x: Pairs, live: Bools) -> Pairs:
        """All of [0, 1] for entries that may be the largest where none surely is."""
        return Pairs(choices.peak(x.at, live)) if x.shape[-1] else x

    def amax(self, x: Pairs, live: Bools) -> Pairs:
        """The largest of the live."""
        return Pairs(choices.amax(x.at, live)) if x.shape[-1] else self.real(np.zeros(x.shape[:-1]))

    def top_k(self, x: Pairs, k: int) -> Integers:
        """The order of the centres, where the radii leave no doubt of the first k."""
        return choices.top_k(x.at, k)

    def reshape(self, x: Pairs, shape: tuple[int, ...]) -> Pairs:
        """Another shape."""
        return _each_part(lambda part: part.reshape(shape), x)

    def transpose(self, x: Pairs, axes: Sequence[int]) -> Pairs:
        """Another order of axes."""
        return _each_part(lambda part: part.transpose(axes), x)

    def broadcast(self, x: Pairs, shape: tuple[int, ...]) -> Pairs:
        """Repeated entries."""
        return _each_part(lambda part: np.broadcast_to(part, shape), x)

    def index(self, x: Pairs, key: Any) -> Pairs:
        """Basic indexing."""
        return _each_part(lambda part: part[key], x)

    def take(self, x: Pairs, indices: NDArray[np.intp], axis: int) -> Pairs:
        """Entries of one axis."""
        return _each_part(lambda part: np.take(part, indices, axis), x)

    def concatenate(self, parts: Sequence[Pairs], axis: int) -> Pairs:
        """Joined along an axis."""
        return Pairs(Triple(*(np.concatenate(same, axis) for same in zip(*(p.at for p in parts), strict=True))))

    def where(self, condition: Bools, a: Pairs, b: Pairs) -> Pairs:
        """Entries of a where the condition holds, else of b."""
        return Pairs(Triple(*(np.where(condition, x, y) for x, y in zip(a.at, b.at, strict=True))))

    def sum(self, x: Pairs, axis: Any, keepdims: bool) -> Pairs:
        """Sum over axes, halves first."""
        axes = sorted(int(i) for i in np.arange(x.ndim)[np.atleast_1d(axis)])
        rest = [i for i in range(x.ndim) if i not in axes]
        shape = tuple(x.shape[i] for i in rest)
        count = int(np.prod([x.shape[i] for i in axes], dtype=np.int64))
        flat = Triple(*(part.transpose(rest + axes).reshape((*shape, count)) for part in x.at))
        spoiled = ~np.isfinite(flat.h)
        with np.errstate(all="ignore"):
            found = arithmetic.total(Triple(*(np.where(spoiled, 0.0, part) for part in flat)), _added)
            special = np.sum(np.where(spoiled, flat.h, 0.0), -1)
        found = _settled(found, ~spoiled.any(-1), special, np.isfinite(found.e))
        kept = tuple(1 if i in axes else n for i, n in enumerate(x.shape))
        return Pairs(Triple(*(part.reshape(kept if keepdims else shape) for part in found)))

    def einsum(self, letters: str, a: Pairs, b: Pairs) -> Pairs:
        """A batched matrix product."""
        c = contraction(letters, a.shape, b.shape)
        left = Triple(*(part.transpose(c.a_axes).reshape(c.a_shape) for part in a.at))
        right = Triple(*(part.transpose(c.b_axes).reshape(c.b_shape) for part in b.at))
        with np.errstate(all="ignore"):
            if np.isfinite(left.h).all() and np.isfinite(right.h).all():
                found = _settled(matmul(left, right), True)
            else:
                found = _spoiled_product(left, right)
        return Pairs(Triple(*(part.reshape(c.shape).transpose(c.axes) for part in found)))

    def finite(self, x: Pairs) -> Bools:
        """Which are numbers.

        Raises
        ------
        Undecided
            One has no bound: it may be one or not.
        """
        if np.isinf(x.at.e).any():
            raise Undecided("a pair without a bound: balls will tell whether it is a number")
        found: Bools = np.isfinite(x.at.h)
        return found

    def minus_infinite(self, x: Pairs) -> Bools:
        """Which are exactly −∞."""
        found: Bools = np.isneginf(x.at.h)
        return found

    def row_max(self, x: Pairs, live: Bools) -> Pairs:
        """Centre of a largest entry; any choice is sound, for the shift cancels."""
        if not x.shape[-1]:
            return self.real(np.zeros((*x.shape[:-1], 1)))
        near = np.where(live & ~np.isnan(x.at.h), x.at.h, -np.inf)
        best = np.argmax(near, -1)[..., None]
        none = np.isneginf(np.take_along_axis(near, best, -1))
        h, low = (np.where(none, 0.0, np.take_along_axis(part, best, -1)) for part in x.at[:2])
        return Pairs(Triple(h, low, np.zeros_like(h)))

    def stored(self, x: Pairs, cotangent: bool) -> Pairs:
        """Pairs are stored as they are."""
        return x

    def stop(self, x: Pairs) -> Pairs:
        """The same."""
        return x


PAIRS = PairSpace()


def enclose(
    problem: Problem, cotangents: Mapping[str, NDArray[Any]], wrt: Sequence[str]
) -> dict[str, Enclosure] | None:
    """Every output and gradient of a problem; None where a choice stays open in pairs."""
    try:
        found = problem.differentiate(PAIRS.real, cotangents, wrt)
    except Undecided:
        return None
    return {name: pairs.enclosure() for name, pairs in found.items()}


def _each_part(change: Callable[[Floats], Floats], x: Pairs) -> Pairs:
    return Pairs(Triple(*(change(part) for part in x.at)))


def _broadcast(*operands: Pairs) -> list[Triple]:
    shape = np.broadcast_shapes(*(x.shape for x in operands))
    return [Triple(*(np.broadcast_to(part, shape) for part in x.at)) for x in operands]


def _spoiled_product(a: Triple, b: Triple) -> Triple:
    """A product where a factor is no number: NaN makes NaN, an infinity leaves open what it makes."""
    clean = (Triple(*(np.where(np.isfinite(x.h), part, 0.0) for part in x)) for x in (a, b))
    whole = [np.ones(x.h.shape) for x in (a, b)]
    proper = ~(_any(~np.isfinite(a.h), whole[1]) | _any(whole[0], ~np.isfinite(b.h)))
    nan = _any(np.isnan(a.h), whole[1]) | _any(whole[0], np.isnan(b.h))
    return _settled(matmul(*clean), proper, np.nan, nan)


def _any(a: Any, b: Any) -> Bools:
    found: Bools = np.asarray(a, np.float64) @ np.asarray(b, np.float64) > 0
    return found


def _settled(found: Triple, proper: Any, special: Any = 0.0, known: Any = False) -> Triple:
    """What has lost its bound says so, and entries that are not `proper` are `special` where that is `known`."""
    fine = np.isfinite(found.h + found.low + found.e) & proper
    if fine.all():
        return found
    exact = np.logical_not(proper) & known
    h = np.where(fine, found.h, np.where(exact, special, 0.0))
    return Triple(h, np.where(fine, found.low, 0.0), np.where(fine, found.e, np.where(exact, 0.0, np.inf)))


def _elementwise(rule: Callable[..., Triple], plain: Any, *operands: Pairs) -> Pairs:
    """A rule on finite entries; where one is infinite or NaN, IEEE's answer, if the radii leave that open to none."""
    parts = _broadcast(*operands)
    shape, chunk = parts[0].h.shape, _CHUNK
    flat = [Triple(*(np.reshape(part, -1) for part in x)) for x in parts]
    if flat[0].h.size >= _LARGE and rule.__name__ in _COMPILED:
        from refattn.engines.certified import pairs_kernels

        rule, chunk = partial(pairs_kernels.elementwise, rule.__name__), flat[0].h.size
    out = Triple(*(np.empty(flat[0].h.size) for _ in range(3)))
    with np.errstate(all="ignore"):
        for start in range(0, out.h.size, chunk):
            at = slice(start, start + chunk)
            here = [Triple(*(part[at] for part in x)) for x in flat]
            found = rule(*here)
            proper = np.logical_and.reduce([np.isfinite(x.h) for x in here])
            if not (proper.all() and np.isfinite(found.h + found.low + found.e).all()):
                special = plain(*(x.h for x in here))
                nan = np.logical_or.reduce([np.isnan(x.h) for x in here])
                sure = np.logical_and.reduce([(choices.least_magnitude(x) > x.e) | (x.e == 0) for x in here])
                known = nan | (sure & ~np.isnan(special))
                found = _settled(found, proper, special, known)
            for target, part in zip(out, found, strict=True):
                target[at] = part
    return Pairs(Triple(*(part.reshape(shape) for part in out)))


def _added(a: Triple, b: Triple) -> Triple:
    """A sum of finite numbers, compiled if it is long."""
    if a.h.size < _LARGE:
        plain: Triple = arithmetic.add(a, b)
        return plain
    from refattn.engines.certified import pairs_kernels

    found = pairs_kernels.elementwise("add", *(Triple(*(part.reshape(-1) for part in x)) for x in (a, b)))
    return Triple(*(part.reshape(a.h.shape) for part in found))


def _by_balls(name: str, *operands: Any) -> Pairs:
    """An operation of the balls at their first precision: for what is asked of few entries."""
    from flint import ctx

    from refattn.engines.certified.balls import BALLS

    with ctx.workprec(128):
        given = [BALLS.within(x.enclosure()) if isinstance(x, Pairs) else x for x in operands]
        t, d, r = getattr(BALLS, name)(*given).enclosure()
    return Pairs(_settled(Triple(t, d, r), np.isfinite(t), t, np.isnan(t)))
