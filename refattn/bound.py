r"""Running error bounds: float64 values, each with a bound on how far a finite-precision evaluation may stray.

One space with two uses. Under the profile FLOAT64 it bounds its own float64 evaluation, in an arithmetic that shares
nothing with balls: its own exponential and logarithm, no vendor's function trusted. Under a kernel's profile (float32,
flash-bf16, flash-f16) it is the published hard bound: what any kernel of that precision may be off by, whatever its
order of summation. docs/tolerance.md derives every rule below.

The invariant of every rule: the exact value, and what an evaluation under the profile may find, are at most e apart;
and so are the exact value and the centre x, which is such an evaluation.

Every operation is elementwise or a sum in index order, so the same bits come out on every IEEE machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.error_function import ERF_ERROR, erf64
from refattn.errors import DTypeError, Undecided
from refattn.exponential import EXP_ERROR, LOG_ERROR, exp64, log64
from refattn.ordered import eliminate, ordered_matmul, ordered_sum
from refattn.profiles import FLOAT64, UNIT64, Profile
from refattn.space import FLOAT64 as SPACE64
from refattn.space import Bools, Integers, Value, contraction
from refattn.trigonometric import CIRCULAR_ERROR, PI, REACH, cos64, half_turns, sin64

Floats = NDArray[np.float64]

# The bounds themselves are computed in float64; sums of up to 2^24 nonnegative terms lose less than this.
_SLACK = 1 + 2.0**-26


class Bounded(Value):
    """Values x (float64) with bounds e ≥ 0: an evaluation under the profile lies within e of the exact value.

    `settled` results have been rounded to the storage type already.
    """

    __slots__ = ("e", "settled", "space", "x")

    def __init__(self, space: BoundSpace, x: Any, e: Any, settled: bool = False) -> None:
        self.space, self.x, self.settled = space, np.asarray(x, np.float64), settled
        e = np.asarray(e, np.float64)
        # Only infinite bounds make a NaN here: nothing is promised any more.
        self.e = np.broadcast_to(np.where(np.isnan(e), np.inf, e), self.x.shape)

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the values."""
        return self.x.shape


class BoundSpace:
    """The operations of `numeric` with their error rules."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile

    def coerce(self, value: Any) -> Bounded:
        """Bounded values pass and integers are exact."""
        if isinstance(value, Bounded):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            return Bounded(self, float(value), 0.0)
        raise DTypeError(f"a {type(value).__name__} in a bounded formula: lift exact numbers with numeric.real")

    def real(self, value: Any) -> Bounded:
        """Exact where the kernel's format holds the number, else one rounding; subnormal numbers may be flushed."""
        p = self.profile
        if isinstance(value, Fraction):
            quotient = value.numerator / value.denominator
            return Bounded(self, quotient, 0.0 if Fraction(quotient) == value else abs(quotient) * p.unit + p.tiny)
        x = np.asarray(value).astype(np.float64)
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            held = x if p.unit <= UNIT64 else x.astype(np.float32).astype(np.float64)
        e = np.where(held == x, 0.0, np.abs(x) * p.unit)
        return Bounded(self, x, np.where(np.abs(x) < p.tiny, np.abs(x), e))

    def constant(self, formula: Callable[[Any], Any]) -> Bounded:
        """Evaluated in float64, whose own bound counts, and rounded once; exact where the format holds an exact one."""
        own = formula(BoundSpace(FLOAT64).real(0))
        return Bounded(self, own.x, np.where(own.e == 0, self.real(own.x).e, self._rounded(own.x, own.e)))

    def _rounded(self, x: Floats, e: Any) -> Floats:
        """The bound after one more rounding: the unit relative, or the underflow, or an overflow."""
        p, size = self.profile, np.abs(x) + 2 * e
        return np.where(size > p.largest, np.inf, (e + p.unit * size + p.tiny) * _SLACK)

    def add(self, a: Bounded, b: Bounded) -> Bounded:
        """Errors add, then the roundings of both terms and of the sum; adding an exact 0 is exact."""
        x, e = a.x + b.x, a.e + b.e
        kept = _zero(a) | _zero(b)
        terms = self.profile.term * self.profile.unit * (np.abs(a.x) + np.abs(b.x) + 2 * e)
        return Bounded(self, x, np.where(kept, e, self._rounded(x, e + terms)))

    def sub(self, a: Bounded, b: Bounded) -> Bounded:
        """As a sum."""
        return self.add(a, Bounded(self, -b.x, b.e))

    def mul(self, a: Bounded, b: Bounded) -> Bounded:
        """|a| e_b + |b| e_a + 3 e_a e_b, then one rounding; a product by an exact 0, 1 or −1 is exact."""
        x = a.x * b.x
        e = np.abs(a.x) * b.e + np.abs(b.x) * a.e + 3 * a.e * b.e
        kept = _zero(a) | _zero(b) | _one(a) | _one(b)
        return Bounded(self, x, np.where(kept, e * _SLACK, self._rounded(x, e)))

    def div(self, a: Bounded, b: Bounded) -> Bounded:
        """(e_a + |a/b| e_b) / |b| with the least |b|, then one rounding; 0 divided and division by 1 are exact."""
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
            x = a.x / b.x
            quotient = (np.abs(a.x) + a.e) / np.maximum(np.abs(b.x) - b.e, 0.0)
            room = np.maximum(np.abs(b.x) - 2 * b.e, 0.0)
            e = np.where((a.e == 0) & (b.e == 0), 0.0, (a.e + quotient * b.e) / room)
        kept = _one(b) | (_zero(a) & (room > 0))
        return Bounded(self, x, np.where(kept, a.e, self._rounded(x, e * _SLACK)))

    def exp(self, x: Bounded) -> Bounded:
        """E^x e^e_x (e^t (1 + ε) − 1), where t holds e_x and the roundings of the argument, ε the function's error."""
        p = self.profile
        y = exp64(np.minimum(x.x, 709.0))
        stray = x.e + p.argument * p.unit * (np.abs(x.x) + 2 * x.e)
        growth = _growth(stray)
        relative = (1 + _growth(x.e)) * (growth + (1 + growth) * p.exponential)
        e = (y * (1 + EXP_ERROR) * relative + y * EXP_ERROR + p.tiny) * _SLACK
        e = np.where((x.x > 709.0) | (stray > 700.0), np.inf, e)
        # A finite −1e30 for a mask strays by far more than 700, and yet no exponential of it is above 2^-1074.
        e = np.where(x.x + x.e + stray < -745.0, p.tiny + 2.0**-1074, e)
        exact = _zero(x)
        return Bounded(self, np.where(exact, 1.0, y), np.where(exact, 0.0, e))

    def log(self, x: Bounded) -> Bounded:
        """E / (x − 2e), and the function's error, which near x = 1 may be absolute; log 1 is exact."""
        p = self.profile
        y = log64(x.x)
        with np.errstate(divide="ignore", invalid="ignore"):
            e = np.where(x.e == 0, 0.0, x.e / np.maximum(x.x - 2 * x.e, 0.0))
        total = e + LOG_ERROR * np.abs(y) + p.logarithm * (np.abs(y) + 2 * e + 1)
        return Bounded(self, y, np.where(_one(x) & (x.x > 0), 0.0, total * _SLACK))

    def tanh(self, x: Bounded) -> Bounded:
        """1 − 2/(e^2x + 1), which is right within 8 units; |tanh'| ≤ 1; absolute errors, as a cap needs them."""
        p, size = self.profile, np.abs(x.x)
        small = size < 2.0**-28
        y = np.where(small, x.x, np.copysign(1 - 2 / (exp64(2 * np.minimum(size, 350.0)) + 1), x.x))
        e = x.e + np.where(small, size * 2.0**-56, 8 * UNIT64)
        e = (e + p.hyperbolic * np.minimum(np.abs(y) + 2 * e, 1.0) + p.tiny) * _SLACK
        return Bounded(self, y, np.where(_zero(x), 0.0, e))

    def sin(self, x: Bounded) -> Bounded:
        """|sin'| ≤ 1; sin 0 = 0 exactly."""
        return self._circular(x, sin64(x.x))

    def cos(self, x: Bounded) -> Bounded:
        """|cos'| ≤ 1; cos 0 = 1 exactly."""
        return self._circular(x, cos64(x.x))

    def _circular(self, x: Bounded, y: Floats) -> Bounded:
        """E, and the function's error; where our own functions do not reach, a centre 0 and all of [−1, 1] around it.

        Two numbers in [−1, 1] are at most 2 apart, so no argument makes e larger, however far it strays.
        """
        p = self.profile
        y = np.where(np.isfinite(x.x) & (np.abs(x.x) > REACH), 0.0, y)
        e = np.where(np.abs(x.x) > REACH, 2.0, np.minimum(x.e + CIRCULAR_ERROR, 2.0))
        e = (e + p.circular * np.minimum(np.abs(y) + 2 * e, 1.0) + p.tiny) * _SLACK
        return Bounded(self, y, np.where(_zero(x), 0.0, e))

    def sin_pi(self, turns: Any) -> Bounded:
        """An argument π t formed by four roundings at most, not reduced; then as `sin`."""
        return self._half_turns(turns, 0)

    def cos_pi(self, turns: Any) -> Bounded:
        """As `sin_pi`."""
        return self._half_turns(turns, 1)

    def _half_turns(self, turns: Any, ahead: int) -> Bounded:
        p, y = self.profile, half_turns(turns, ahead)
        argument = np.asarray(turns, np.float64) * PI
        e = np.minimum(4 * p.unit * np.abs(argument) * _SLACK + CIRCULAR_ERROR, 2.0)
        e = (e + p.circular * np.minimum(np.abs(y) + 2 * e, 1.0) + p.tiny) * _SLACK
        return Bounded(self, y, np.where(argument == 0, 0.0, e))

    def sqrt(self, x: Bounded) -> Bounded:
        """E / (√(x − e) + √(x − 2e)), and the function's error; where x may be below 0, no promise; √0 = 0 exactly."""
        p = self.profile
        with np.errstate(invalid="ignore", divide="ignore"):
            y = np.sqrt(x.x)
            e = np.where(x.e == 0, 0.0, x.e / (np.sqrt(x.x - x.e) + np.sqrt(x.x - 2 * x.e)))
            e = np.where(x.x - 2 * x.e < 0, np.inf, (e + (p.unit + p.exponential) * (y + 2 * e) + p.tiny) * _SLACK)
        return Bounded(self, y, np.where(_zero(x), 0.0, e))

    def erf(self, x: Bounded) -> Bounded:
        """|erf'| ≤ 2/√π < 1.1284, and the function's error; erf 0 = 0 exactly."""
        p, y = self.profile, erf64(x.x)
        e = np.minimum(1.1284 * x.e, 2.0) + ERF_ERROR * np.abs(y)
        e = (e + p.hyperbolic * np.minimum(np.abs(y) + 2 * e, 1.0) + p.tiny) * _SLACK
        return Bounded(self, y, np.where(_zero(x), 0.0, e))

    def pi(self) -> Bounded:
        """Rounded once."""
        return Bounded(self, math.pi, self._rounded(np.asarray(math.pi), 2.0**-53))

    def solve(self, a: Bounded, b: Bounded, least: float) -> Bounded:
        """‖x − x̂‖ ≤ ‖b − a x̂‖ / least for each column; of a kernel that solves for itself nothing is promised."""
        x = eliminate(a.x, b.x)
        rest = self.sub(b, self.einsum("ij,jk->ik", a, Bounded(self, x, 0.0)))
        size = np.abs(rest.x) + rest.e
        e = np.sqrt(ordered_sum(size * size, [0])) / least * _SLACK
        return Bounded(self, x, np.where(self.profile is FLOAT64, e, np.inf))

    def maximum(self, a: Bounded, b: Bounded) -> Bounded:
        """The larger moves no further than either; no rounding."""
        return Bounded(self, np.maximum(a.x, b.x), np.maximum(a.e, b.e))

    def minimum(self, a: Bounded, b: Bounded) -> Bounded:
        """As the larger."""
        return Bounded(self, np.minimum(a.x, b.x), np.maximum(a.e, b.e))

    def step(self, x: Bounded, at_zero: float) -> Bounded:
        """Off by 1 at most, where an evaluation may stand on the other side of 0."""
        sure = (np.abs(x.x) > 2 * x.e) | (x.e == 0)
        return Bounded(self, np.heaviside(x.x, at_zero), np.where(sure, 0.0, 1.0))

    def peak(self, x: Bounded, live: Bools) -> Bounded:
        """Off by 1 at most, where an evaluation may find another entry the largest."""
        centre = SPACE64.peak(x.x, live)
        low = np.max(np.where(live, x.x - 2 * x.e, -np.inf), -1, keepdims=True, initial=-np.inf)
        may = live & (x.x + 2 * x.e >= low)
        # Exact equals are no doubt: the first is taken by every evaluation.
        sure = (np.sum(may & (x.e > 0), -1, keepdims=True) == 0) | (np.sum(may, -1, keepdims=True) < 2)
        return Bounded(self, centre, np.where(may & ~sure, 1.0, 0.0))

    def amax(self, x: Bounded, live: Bools) -> Bounded:
        """The largest moves no further than any live entry."""
        return Bounded(self, SPACE64.amax(x.x, live), np.max(np.where(live, x.e, 0.0), -1, initial=0.0))

    def top_k(self, x: Bounded, k: int) -> Integers:
        """The order of the centres, if no evaluation may find another for the first k.

        Raises
        ------
        Undecided
            One may.
        """
        order = SPACE64.top_k(x.x, x.shape[-1])
        found, error = np.take_along_axis(x.x, order, -1), np.take_along_axis(2 * x.e, order, -1)
        best_after = np.flip(np.maximum.accumulate(np.flip(found + error, -1), -1), -1)[..., 1 : k + 1]
        here, stray = found[..., : best_after.shape[-1]], error[..., : best_after.shape[-1]]
        # Exact equals have an order, the first first.
        doubt = np.flip(np.maximum.accumulate(np.flip(error, -1), -1), -1)[..., : here.shape[-1]]
        tied = (doubt == 0) & (best_after == here)
        if ((here - stray <= best_after) & ~tied).any():
            raise Undecided("two entries closer than what an evaluation may be off by: which is larger is open")
        return order[..., :k]

    def reshape(self, x: Bounded, shape: tuple[int, ...]) -> Bounded:
        """Another shape."""
        return Bounded(self, x.x.reshape(shape), x.e.reshape(shape))

    def transpose(self, x: Bounded, axes: Sequence[int]) -> Bounded:
        """Another order of axes."""
        return Bounded(self, x.x.transpose(axes), x.e.transpose(axes))

    def broadcast(self, x: Bounded, shape: tuple[int, ...]) -> Bounded:
        """Repeated entries."""
        return Bounded(self, np.broadcast_to(x.x, shape), np.broadcast_to(x.e, shape))

    def index(self, x: Bounded, key: Any) -> Bounded:
        """Basic indexing."""
        return Bounded(self, x.x[key], x.e[key])

    def take(self, x: Bounded, indices: NDArray[np.intp], axis: int) -> Bounded:
        """Entries of one axis."""
        return Bounded(self, np.take(x.x, indices, axis), np.take(x.e, indices, axis))

    def concatenate(self, parts: Sequence[Bounded], axis: int) -> Bounded:
        """Joined along an axis."""
        return Bounded(self, np.concatenate([p.x for p in parts], axis), np.concatenate([p.e for p in parts], axis))

    def where(self, condition: Bools, a: Bounded, b: Bounded) -> Bounded:
        """Entry and bound of the side chosen."""
        return Bounded(self, np.where(condition, a.x, b.x), np.where(condition, a.e, b.e))

    def finite(self, x: Bounded) -> Bools:
        """Of the values."""
        return np.isfinite(x.x)

    def minus_infinite(self, x: Bounded) -> Bools:
        """Of the values."""
        return np.isneginf(x.x)

    def _gamma(self, terms: Floats, length: int, unit: float, saved: Any = 0.0) -> Floats:
        """Relative error of a sum of so many rounded terms out of a length, in any order."""
        p = self.profile
        n = (terms + p.rescale * np.minimum(terms, length // 16) + p.extra + saved) * unit
        return np.where(n < 0.5, n / np.maximum(1 - n, 0.5), np.inf)

    def sum(self, x: Bounded, axis: Any, keepdims: bool) -> Bounded:
        """Errors add; γ of the count of terms that are not exactly 0, times the sum of magnitudes."""
        p = self.profile
        axes = sorted(int(i) for i in np.arange(x.ndim)[np.atleast_1d(axis)])
        length = int(np.prod([x.shape[i] for i in axes], dtype=np.int64))
        terms = ordered_sum((~_zero(x)).astype(np.float64), axes)
        total, strayed = ordered_sum(x.x, axes), ordered_sum(x.e, axes)
        size = ordered_sum(np.abs(x.x), axes) + 2 * strayed
        gamma = self._gamma(terms, length, p.unit, p.saved * (1 + np.frexp(terms)[1]))
        e = (strayed + gamma * size + 3 * terms * p.tiny) * _SLACK
        e = np.where(terms > 1, np.where(size > p.largest, np.inf, e), strayed)
        shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape)) if keepdims else total.shape
        return Bounded(self, total.reshape(shape), e.reshape(shape))

    def einsum(self, letters: str, a: Bounded, b: Bounded) -> Bounded:
        """Errors of the factors, and γ of the count of products that are not exactly 0, times Σ |a| |b|."""
        p = self.profile
        c = contraction(letters, a.shape, b.shape)

        def left(array: Any) -> Any:
            return np.ascontiguousarray(array.transpose(c.a_axes).reshape(c.a_shape))

        def right(array: Any) -> Any:
            return np.ascontiguousarray(array.transpose(c.b_axes).reshape(c.b_shape))

        ax, ae, bx, be = left(a.x), left(a.e), right(b.x), right(b.e)
        x = ordered_matmul(ax, bx)
        most_a, most_b = np.abs(ax) + ae, np.abs(bx) + be
        e = np.zeros(x.shape)
        if be.any():
            e = e + ordered_matmul(most_a, be)
        if ae.any():
            e = e + ordered_matmul(ae, most_b + be)
        # Counts below 2^53 are exact whatever the order in which a matrix product adds them.
        terms = ((ax != 0) | (ae != 0)).astype(np.float64) @ ((bx != 0) | (be != 0)).astype(np.float64)
        size = ordered_matmul(most_a + ae, most_b + be)
        gamma = np.where(terms > 0, self._gamma(terms, c.a_shape[2], p.accumulation), 0.0)
        e = (e + gamma * size + 3 * terms * p.tiny) * _SLACK
        e = np.where(size > p.largest, np.inf, e)
        return Bounded(self, x.reshape(c.shape).transpose(c.axes), e.reshape(c.shape).transpose(c.axes))

    def row_max(self, x: Bounded, live: Bools) -> Bounded:
        """The largest live value; a kernel subtracts it as rounded as its profile says."""
        top = np.max(np.where(live, x.x, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        top = np.where(np.isneginf(top), 0.0, top)
        return Bounded(self, top, self.profile.shift * self.profile.unit * np.abs(top))

    def certain(self, x: Bounded, alone: Bools) -> Bools:
        """None: a kernel's backward pass finds the weight from a score and a log-sum-exp, each rounded."""
        return np.zeros(alone.shape, bool)

    def stored(self, x: Bounded, cotangent: bool) -> Bounded:
        """One rounding to the storage type; what is asked of the cotangent alone does nothing to the value.

        A weight may underflow before or after its division by the sum of its row, in which a sink is at most 1.
        """
        p = self.profile
        if cotangent or not p.storage:
            return x
        size = np.abs(x.x) + 2 * x.e
        underflow = p.storage_tiny * (1 + ordered_sum(size, [size.ndim - 1])[..., None])
        e = np.where(size > p.storage_largest, np.inf, (x.e + p.storage * size + underflow) * _SLACK)
        return Bounded(self, x.x, np.where(_zero(x), 0.0, e), settled=True)

    def stop(self, x: Bounded) -> Bounded:
        """The same."""
        return x


def _zero(a: Bounded) -> Bools:
    """Where a is 0 with no error at all."""
    found: Bools = (a.x == 0) & (a.e == 0)
    return found


def _one(a: Bounded) -> Bools:
    """Where a is 1 or −1 with no error at all."""
    found: Bools = (np.abs(a.x) == 1) & (a.e == 0)
    return found


def _growth(t: Any) -> Floats:
    """E^t − 1 from above, for 0 ≤ t ≤ 700."""
    return np.where(t < 0.5, t * (1 + t), exp64(np.minimum(t, 700.0)) * (1 + EXP_ERROR) - 1)
