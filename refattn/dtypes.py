"""The floating-point formats, and one exact rounding into each of them.

A format is the set of ±m·2^e with integers 0 ≤ m < 2^precision and e ≥ `quantum`, up to `max_finite` (IEEE 754-2019,
section 3.3; the 8-bit formats: OCP 8-bit Floating Point Specification, revision 1.0). Library casts from float64 to
bfloat16 and to the 8-bit formats go through float32 and so round twice: 1 + 2^−8 + 2^−40 becomes the bfloat16 1.0,
where 1.0078125 is nearer. They are never asked to round here, only to store what is already representable.

Vectorised and exact on float64: `round_to`, `round_up_bfloat16`, `ulp`, `significand_bits`. Exact on rationals of any
size, one at a time, in integers alone: `nearest`, `odd`, `odd_fraction`, `root_of_two`, `sqrt_reciprocal`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, NDArray

from refattn.errors import DTypeError, SpecError

Floats = NDArray[np.float64]
Overflow = Literal["nonsaturate", "saturate"]


@dataclass(frozen=True)
class Format:
    """A binary floating-point format with subnormals, signed zero and NaN.

    `precision` counts the bits of the significand with the hidden one; 2^`emin` is the smallest normal number. Without
    infinities (`has_inf` False) an overflow that does not saturate is NaN.
    """

    numpy: np.dtype[Any]
    precision: int
    emin: int
    max_finite: float
    has_inf: bool = True

    @property
    def name(self) -> str:
        """NumPy's name of the format."""
        return self.numpy.name

    @property
    def quantum(self) -> int:
        """Exponent of the smallest subnormal number, of which every finite number is a multiple."""
        return self.emin - self.precision + 1

    @property
    def beyond(self) -> float:
        """What a number that overflows becomes unless it saturates."""
        return math.inf if self.has_inf else math.nan


FORMATS = {
    f.name: f
    for f in (
        Format(np.dtype(np.float64), 53, -1022, sys.float_info.max),
        Format(np.dtype(np.float32), 24, -126, float.fromhex("0x1.fffffep127")),
        Format(np.dtype(ml_dtypes.bfloat16), 8, -126, float.fromhex("0x1.fep127")),
        Format(np.dtype(np.float16), 11, -14, 65504.0),
        Format(np.dtype(ml_dtypes.float8_e4m3fn), 4, -6, 448.0, has_inf=False),
        Format(np.dtype(ml_dtypes.float8_e5m2), 3, -14, 57344.0),
    )
}


def format_of(dtype: object) -> Format:
    """Return the format of a dtype, a scalar type or a name, of either byte order.

    Raises
    ------
    DTypeError
        The dtype is none of the six in `FORMATS`.
    """
    try:
        name = None if dtype is None else np.dtype(dtype).name  # type: ignore[call-overload]
    except (TypeError, ValueError):
        name = None
    if name not in FORMATS:
        raise DTypeError(f"dtype is {dtype!r}; allowed are {', '.join(FORMATS)}")
    return FORMATS[name]


def round_to(x: ArrayLike, dtype: object, overflow: Overflow = "nonsaturate") -> NDArray[Any]:
    """Round float64 to a format, once, to nearest, ties to even.

    Magnitudes from max_finite + ½ulp on, and infinities, become infinite (NaN where the format has no infinity), or
    ±max_finite under "saturate". The sign of zero is kept; every NaN becomes the positive quiet one, because the sign
    of a computed NaN differs between processors.

    Parameters
    ----------
    x : array, any shape, float64
    dtype : one of the six formats
    overflow : "nonsaturate" or "saturate"

    Returns
    -------
    numpy.ndarray
        The shape of x, in that dtype.

    Raises
    ------
    DTypeError
        x is not float64, or dtype is none of the six.
    SpecError
        overflow is another word.
    """
    to, x = format_of(dtype), _float64(x)
    y = _on_grid(x, to.precision, to.quantum, np.rint)
    limit = _limit(to, overflow)
    y = np.where(np.abs(y) > to.max_finite, np.copysign(limit, y), y)
    return np.where(np.isnan(y), np.nan, y).astype(to.numpy)


def round_up_bfloat16(x: ArrayLike) -> NDArray[Any]:
    """Round bounds, float64 and not negative, to bfloat16 toward +∞: never below x; NaN stays NaN.

    Raises
    ------
    DTypeError
        x is not float64.
    SpecError
        A bound is negative.
    """
    to, x = FORMATS["bfloat16"], _float64(x)
    if np.any(x < 0):
        raise SpecError(f"bounds must not be negative; the least given is {np.nanmin(x)}")
    y = _on_grid(x, to.precision, to.quantum, np.ceil)
    return np.where(y > to.max_finite, np.inf, y).astype(to.numpy)


def ulp(x: ArrayLike, dtype: object) -> Floats:
    """Return the spacing of a format's numbers from |x| upwards, as float64 in the shape of x.

    Below the smallest normal number it is the smallest subnormal, beyond max_finite the spacing just below that; of
    infinity and NaN it is NaN, as in numpy.spacing.

    Raises
    ------
    DTypeError
        x is not float64, or dtype is none of the six.
    """
    of, x = format_of(dtype), _float64(x)
    _, exponent = np.frexp(np.clip(np.abs(x), 2.0**of.emin, of.max_finite))
    return np.where(np.isfinite(x), np.ldexp(1.0, exponent - of.precision), np.nan)


def significand_bits(k: ArrayLike, bits: int) -> NDArray[np.int64]:
    """Round integers to `bits` significant bits, ties to even: 8 make them exact in bfloat16, 11, 4, 3 in the others.

    Parameters
    ----------
    k : integer array, any shape, |k| < 2^53
    bits : int, at least 1

    Returns
    -------
    numpy.ndarray
        int64, the shape of k.

    Raises
    ------
    DTypeError
        k is not of an integer dtype.
    SpecError
        |k| ≥ 2^53, which float64 may not hold, or bits < 1.
    """
    k = np.asarray(k)
    if k.dtype.kind not in "iu":
        raise DTypeError(f"k is {k.dtype}; expected integers")
    x = k.astype(np.float64)
    largest = np.abs(x).max(initial=0)
    if bits < 1 or largest >= 2.0**53:
        raise SpecError(f"expected |k| < 2^53 and bits ≥ 1; given |k| up to {largest:.17g}, bits {bits}")
    return _on_grid(x, bits, 0, np.rint).astype(np.int64)


def nearest(q: Fraction, dtype: object, overflow: Overflow = "nonsaturate") -> float:
    """Round a rational to a format, to nearest, ties to even, as a Python float, which holds the result exactly.

    Overflow and the sign of a result that vanishes follow `round_to`; 0 is +0.

    Raises
    ------
    DTypeError
        dtype is none of the six.
    SpecError
        overflow is another word.
    """
    to, limit = format_of(dtype), _limit(format_of(dtype), overflow)
    sign = -1.0 if q < 0 else 1.0
    n, d = abs(q.numerator), q.denominator
    exponent = n.bit_length() - d.bit_length()  # 2^(exponent−1) < |q| < 2^(exponent+1)
    exponent -= abs(q) < Fraction(2) ** exponent
    unit = Fraction(2) ** max(exponent - to.precision + 1, to.quantum)
    rounded = round(abs(q) / unit) * unit  # Python rounds a Fraction to the even integer on a tie
    return math.copysign(limit if rounded > to.max_finite else float(rounded), sign)


def odd(man: int, exp: int) -> float:
    """Round man·2^exp to float64, to odd: any later rounding to a format of at most 51 bits is then the only one.

    The value itself if it is a double, else the one of its two neighbours whose significand is odd. 0 is +0; a nonzero
    value below every double is ±2^−1074; beyond the largest double it is that one, whose significand is odd. See
    Boldo and Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to odd", 2008.
    """
    n = abs(man)
    top = n.bit_length() + exp
    quantum = max(top - 53, -1074)
    if n and top > 1024:
        value = sys.float_info.max
    elif quantum <= exp:
        value = math.ldexp(n, exp)
    else:
        kept = n >> quantum - exp
        value = math.ldexp(kept | (kept << quantum - exp != n), quantum)
    return -value if man < 0 else value


def odd_fraction(q: Fraction) -> float:
    """Round a rational to float64, to odd, as `odd` does."""
    n, d = abs(q.numerator), q.denominator
    shift = max(0, d.bit_length() - n.bit_length() + 55)
    # At least 55 bits of the quotient, then one that tells whether anything follows: never a double if something does.
    quotient, rest = divmod(n << shift, d)
    value = odd(2 * quotient + (rest > 0), -shift - 1)
    return -value if q < 0 else value


def root_of_two(e: Fraction, precision: int = 24) -> Fraction:
    """Return 2^e rounded to nearest to `precision` significant bits; exact where e is an integer.

    With e = i + p/r and 0 ≤ p < r: the integer r-th root of 2^(p + r·precision) holds precision + 1 bits of 2^(p/r),
    and no tie exists, since 2^(p/r) is irrational unless p = 0. The cost grows with the denominator r.

    Raises
    ------
    SpecError
        precision < 1.
    """
    if precision < 1:
        raise SpecError(f"precision must be at least 1 bit; given {precision}")
    i, f = math.floor(e), e - math.floor(e)
    root = _integer_root(1 << f.numerator + f.denominator * precision, f.denominator)
    return (root + 1 >> 1) * Fraction(2) ** (i - precision + 1)


def sqrt_reciprocal(d: int) -> float:
    """Return 1/√d, correctly rounded to float64: the default scale of heads of size d.

    Raises
    ------
    SpecError
        d < 1.
    """
    if d < 1:
        raise SpecError(f"1/√d needs an integer d ≥ 1; given {d}")
    shift = 56 + d.bit_length()
    root = math.isqrt((1 << 2 * shift) // d)
    # An odd last bit stands for all that follows; with more than 54 bits before it, no tie is mistaken.
    return float(Fraction(2 * root + (root * root * d != 1 << 2 * shift), 1 << shift + 1))


def _float64(x: ArrayLike) -> Floats:
    x = np.asarray(x)
    if x.dtype != np.float64:
        raise DTypeError(f"x is {x.dtype}; expected float64, the one type that is rounded here")
    return x


def _limit(to: Format, overflow: str) -> float:
    if overflow not in ("nonsaturate", "saturate"):
        raise SpecError(f"overflow is {overflow!r}; expected 'nonsaturate' or 'saturate'")
    return to.max_finite if overflow == "saturate" else to.beyond


def _on_grid(x: Floats, precision: int, quantum: int, rule: Callable[[Floats], Floats]) -> Floats:
    """Apply a rule for integers to x in units of its last place; both scalings by powers of two are exact."""
    with np.errstate(over="ignore", invalid="ignore"):  # a carry into 2^1024; a signalling NaN
        _, exponent = np.frexp(x)
        unit = np.maximum(exponent - precision, quantum)
        return np.asarray(np.ldexp(rule(np.ldexp(x, -unit)), unit))


def _integer_root(n: int, r: int) -> int:
    """Return ⌊n^(1/r)⌋ for n ≥ 1 by Newton's iteration, which falls until it is there."""
    x = 1 << -(-n.bit_length() // r)
    while (y := ((r - 1) * x + n // x ** (r - 1)) // r) < x:
        x = y
    return x
