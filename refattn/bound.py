r"""Running error bounds: float64 values, each with a bound on how far a finite-precision evaluation may stray.

One space with two uses. Under the profile FLOAT64 it bounds the float64 evaluation itself, in an arithmetic that
shares nothing with balls: its own exponential, no vendor's function trusted. Under a kernel's profile (float32,
flash-bf16, flash-f16) it is the published hard bound: what any kernel of that precision may be off by, whatever its
order of summation. docs/tolerance.md derives every rule below.

Every operation is elementwise or a sum in index order, so the same bits come out on every IEEE machine.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.errors import DTypeError
from refattn.exponential import EXP_ERROR, exp64
from refattn.numeric import Bools, Value, contraction

Floats = NDArray[np.float64]

# The bounds themselves are computed in float64; sums of up to 2^24 nonnegative terms lose less than this.
_SLACK = 1 + 2.0**-26
_U64 = 2.0**-53


@dataclass(frozen=True, kw_only=True)
class Profile:
    """A declared precision.

    unit: roundoff of products, sums and quotients; tiny: absolute error of a result that underflows; exponential,
    logarithm, hyperbolic: relative errors of those functions; storage, storage_tiny: roundoff and underflow of results
    that a kernel may keep in its storage type (numeric.stored); rescale: roundings per term beyond the sum's own, for
    a running maximum; shift: roundings of the row maximum or log-sum-exp that is subtracted.
    """

    name: str
    unit: float
    tiny: float
    exponential: float
    logarithm: float
    hyperbolic: float
    storage: float = 0.0
    storage_tiny: float = 0.0
    rescale: float = 0.0
    extra: float = 0.0
    shift: float = 0.0


class Bounded(Value):
    """Values x (float64) with bounds e ≥ 0: an evaluation under the profile lies within e of the exact value.

    `settled` results have been rounded to the storage type already.
    """

    __slots__ = ("e", "settled", "space", "x")

    def __init__(self, space: BoundSpace, x: Any, e: Any, settled: bool = False) -> None:
        self.space, self.x, self.settled = space, np.asarray(x, np.float64), settled
        self.e = np.broadcast_to(np.asarray(e, np.float64), self.x.shape)

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
        """Doubles and integers below 2^53 are exact; a Fraction is rounded once."""
        if isinstance(value, Fraction):
            x = value.numerator / value.denominator
            return Bounded(self, x, 0.0 if Fraction(x) == value else abs(x) * self.profile.unit)
        return Bounded(self, np.asarray(value).astype(np.float64), 0.0)

    def _rounded(self, x: Floats, e: Any) -> Bounded:
        """One more rounding of x: the unit relative, or the underflow."""
        return Bounded(self, x, (e + self.profile.unit * (np.abs(x) + e) + self.profile.tiny) * _SLACK)

    def add(self, a: Bounded, b: Bounded) -> Bounded:
        """Errors add, then one rounding; adding an exact 0 is exact."""
        x = a.x + b.x
        kept = ((a.x == 0) & (a.e == 0)) | ((b.x == 0) & (b.e == 0))
        full = self._rounded(x, a.e + b.e)
        return Bounded(self, x, np.where(kept, a.e + b.e, full.e))

    def sub(self, a: Bounded, b: Bounded) -> Bounded:
        """As a sum."""
        return self.add(a, Bounded(self, -b.x, b.e))

    def mul(self, a: Bounded, b: Bounded) -> Bounded:
        """|a| e_b + |b| e_a + e_a e_b, then one rounding; a product by an exact 0, 1 or −1 is exact."""
        x = a.x * b.x
        e = np.abs(a.x) * b.e + np.abs(b.x) * a.e + a.e * b.e
        kept = _unit_factor(a) | _unit_factor(b)
        return Bounded(self, x, np.where(kept, e * _SLACK, self._rounded(x, e).e))

    def div(self, a: Bounded, b: Bounded) -> Bounded:
        """(e_a + |a/b| e_b) / (|b| − e_b), then one rounding; division by an exact 1 is exact."""
        with np.errstate(divide="ignore", invalid="ignore"):
            x = a.x / b.x
            room = np.maximum(np.abs(b.x) - b.e, 0.0)
            e = np.where((a.e == 0) & (b.e == 0), 0.0, (a.e + np.abs(x) * b.e) / room)
        kept = (np.abs(b.x) == 1) & (b.e == 0)
        return Bounded(self, x, np.where(kept, a.e, self._rounded(x, e * _SLACK).e))

    def exp(self, x: Bounded) -> Bounded:
        """E^x (e^e_x − 1), the error of the function, and one rounding of its argument."""
        y = exp64(np.minimum(x.x, 709.0))
        stray = x.e + self.profile.unit * np.abs(x.x)
        grow = exp64(np.minimum(stray, 700.0)) * (1 + EXP_ERROR)
        growth = np.where(stray < 0.5, stray * (1 + stray), grow - 1)  # noqa: PLR2004
        e = y * (1 + EXP_ERROR) * (growth + (1 + growth) * self.profile.exponential) + y * EXP_ERROR + self.profile.tiny
        exact = (x.x == 0) & (x.e == 0)
        return Bounded(self, np.where(exact, 1.0, y), np.where(exact, 0.0, e * _SLACK))

    def log(self, x: Bounded) -> Bounded:
        """A guess y from NumPy, mended by log x = y + log(x e^−y); its error is bounded by what the mending shows."""
        guess = np.log(x.x)
        rest = x.x * exp64(-guess) - 1
        own = rest * rest + 4 * EXP_ERROR
        e = x.e / np.maximum(x.x - x.e, 0.0) if np.any(x.e) else np.zeros(x.shape)
        y = guess + rest
        total = e + own + (self.profile.logarithm + _U64) * (np.abs(y) + 1)
        exact = (x.x == 1) & (x.e == 0)
        return Bounded(self, np.where(exact, 0.0, y), np.where(exact, 0.0, total * _SLACK))

    def tanh(self, x: Bounded) -> Bounded:
        """1 − 2/(e^2x + 1) with |tanh'| ≤ 1; absolute errors, as a cap needs them."""
        size = np.abs(x.x)
        y = np.copysign(1 - 2 / (exp64(2 * np.minimum(size, 350.0)) + 1), x.x)
        y = np.where(size < 2.0**-28, x.x, y)
        e = x.e + self.profile.hyperbolic * np.abs(y) + np.where(size < 2.0**-28, size * 2.0**-56, 8 * _U64) * (size > 0)
        return Bounded(self, y, e * _SLACK)

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
        return Bounded(self, *(np.concatenate([getattr(p, side) for p in parts], axis) for side in ("x", "e")))

    def where(self, condition: Bools, a: Bounded, b: Bounded) -> Bounded:
        """Entry and bound of the side chosen."""
        return Bounded(self, np.where(condition, a.x, b.x), np.where(condition, a.e, b.e))

    def finite(self, x: Bounded) -> Bools:
        """Of the values."""
        return np.isfinite(x.x)

    def minus_infinite(self, x: Bounded) -> Bools:
        """Of the values."""
        return np.isneginf(x.x)

    def _gamma(self, terms: Floats | int) -> Any:
        """Relative error of a sum of so many rounded terms, in any order."""
        roundings = (1 + self.profile.rescale) * np.asarray(terms, np.float64) + self.profile.extra
        n = roundings * self.profile.unit
        return np.where(n < 0.5, n / np.maximum(1 - n, 0.5), np.inf)  # noqa: PLR2004

    def sum(self, x: Bounded, axis: Any, keepdims: bool) -> Bounded:
        """Errors add; γ of the count of terms that are not exactly 0, times the sum of magnitudes."""
        axes = sorted(int(i) for i in np.arange(x.ndim)[np.atleast_1d(axis)])
        terms = _ordered_sum(((x.x != 0) | (x.e != 0)).astype(np.float64), axes)
        magnitude = _ordered_sum(np.abs(x.x) + x.e, axes)
        gamma = np.where(terms > 1, self._gamma(terms), 0.0)
        total = _ordered_sum(x.x, axes)
        e = (_ordered_sum(x.e, axes) + gamma * magnitude + np.where(terms > 1, terms, 0) * self.profile.tiny) * _SLACK
        shape = tuple(1 if i in axes else n for i, n in enumerate(x.shape)) if keepdims else total.shape
        return Bounded(self, total.reshape(shape), e.reshape(shape))

    def einsum(self, letters: str, a: Bounded, b: Bounded) -> Bounded:
        """Errors of the factors, and γ of the count of products that are not exactly 0, times Σ |a| |b|."""
        c = contraction(letters, a.shape, b.shape)

        def left(array: Any) -> Any:
            return np.ascontiguousarray(array.transpose(c.a_axes).reshape(c.a_shape))

        def right(array: Any) -> Any:
            return np.ascontiguousarray(array.transpose(c.b_axes).reshape(c.b_shape))

        ax, ae, bx, be = left(a.x), left(a.e), right(b.x), right(b.e)
        x = _ordered_matmul(ax, bx)
        size_a, size_b = np.abs(ax), np.abs(bx)
        e = np.zeros(x.shape)
        if be.any():
            e = e + _ordered_matmul(size_a + ae, be)
        if ae.any():
            e = e + _ordered_matmul(ae, size_b)
        terms = ((ax != 0) | (ae != 0)).astype(np.float64) @ ((bx != 0) | (be != 0)).astype(np.float64)
        magnitude = _ordered_matmul(size_a + ae, size_b + be) if ae.any() or be.any() else _ordered_matmul(size_a, size_b)
        e = (e + self._gamma(terms) * magnitude * (terms > 0) + terms * self.profile.tiny) * _SLACK
        return Bounded(self, x.reshape(c.shape).transpose(c.axes), e.reshape(c.shape).transpose(c.axes))

    def row_max(self, x: Bounded, live: Bools) -> Bounded:
        """The largest live value; a kernel subtracts it as rounded as its profile says."""
        top = np.max(np.where(live, x.x, -np.inf), axis=-1, keepdims=True, initial=-np.inf)
        top = np.where(np.isneginf(top), 0.0, top)
        return Bounded(self, top, self.profile.shift * self.profile.unit * np.abs(top))

    def stored(self, x: Bounded, cotangent: bool) -> Bounded:
        """One rounding to the storage type."""
        p = self.profile
        if not p.storage:
            return x
        e = x.e + p.storage * (np.abs(x.x) + x.e) + p.storage_tiny
        return Bounded(self, x.x, np.where((x.x == 0) & (x.e == 0), 0.0, e * _SLACK), settled=True)

    def stop(self, x: Bounded) -> Bounded:
        """The same."""
        return x


def _unit_factor(a: Bounded) -> Bools:
    found: Bools = ((a.x == 0) | (np.abs(a.x) == 1)) & (a.e == 0)
    return found


def _ordered_sum(x: Floats, axes: Sequence[int]) -> Floats:
    """Sum in index order, last axis first: accumulate has no freedom that a reduction has."""
    for axis in reversed(axes):
        x = np.take(np.add.accumulate(x, axis), -1, axis) if x.shape[axis] else np.zeros(np.delete(x.shape, axis))
    return x


def _ordered_matmul(a: Floats, b: Floats) -> Floats:
    """(n, m, k) @ (n, k, p), each entry summed in index order of k."""
    out = np.zeros((a.shape[0], a.shape[1], b.shape[2]))
    for k in range(a.shape[2]):
        out += a[:, :, k, None] * b[:, k, None, :]
    return out


_FLUSH32 = 2.0**-126

FLOAT64 = Profile(
    name="float64",
    unit=_U64,
    tiny=2.0**-1074,
    exponential=EXP_ERROR,
    logarithm=0.0,
    hyperbolic=2.0**-52,
)
# A float32 kernel: functions within 2 ulp, results below the smallest normal may be flushed, the running maximum
# moves at most once in sixteen keys.
FLOAT32 = Profile(
    name="float32",
    unit=2.0**-24,
    tiny=_FLUSH32,
    exponential=2.0**-22,
    logarithm=2.0**-22,
    hyperbolic=2.0**-22,
    rescale=1 / 4,
    extra=8,
    shift=2,
)


def _flash(name: str, storage: float, storage_tiny: float) -> Profile:
    """float32 accumulation of 16-bit products, weights and score gradients stored in 16 bits."""
    return Profile(**{**FLOAT32.__dict__, "name": name, "storage": storage, "storage_tiny": storage_tiny})


FLASH_BF16 = _flash("flash-bf16", 2.0**-8, _FLUSH32)
FLASH_F16 = _flash("flash-f16", 2.0**-11, 2.0**-25)
PROFILES = {p.name: p for p in (FLOAT64, FLOAT32, FLASH_BF16, FLASH_F16)}
