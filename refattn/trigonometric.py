r"""Our own float64 sine and cosine, with a bound proved from IEEE arithmetic alone.

    x = n π/2 + r, |r| < 0.7855
    sin r = r Σ_{k=0}^{8} (−1)^k r^2k / (2k + 1)!,      cos r = Σ_{k=0}^{9} (−1)^k r^2k / (2k)!

Every step is one correctly rounded operation, so the bits are the same on every IEEE machine. Both results are within
CIRCULAR_ERROR = 2^-50 of the exact ones, absolutely, for |x| ≤ REACH = 2^20; beyond it, they are NaN.

Proof, with u = 2^-53. π/2 is h₁ + h₂ + h₃ + a rest below 2^-122: 33 bits each, rounded down, and a double.

1. n = rint(x · (2/π)), |n| < 2^20. The product is off by less than 2^-32, so |x − n π/2| < π/4 + 2^-31 < 0.7855.
2. n h₁ and n h₂ have at most 53 bits: exact. x − n h₁ is exact: for n = 0 trivially, else by Sterbenz's lemma, for
   x / (n h₁) lies in [½, 2] (h₁ < (1 − 2^-36) π/2, which at n = 1 is more than the roundings of step 1 take).
3. The subtractions of n h₂ and of n h₃ round results below 1: 2^-54 each; n h₃ < 2^-48 itself rounds by less than
   2^-101, and n times the rest is below 2^-102. So r is off by less than 1.01u, and so is either function of it.
4. The series stop after r^17 and r^18: the rests are below 0.7855^19 / 19! < 0.001u and 0.7855^20 / 20! < 0.0001u.
5. Horner in z = fl(r²), z ≤ 0.6171, coefficients 1/k! rounded (factorials to 18! exact; 1 and ½ exact):
   E_k ≤ z E_k+1 + u(2 |z y_k+1| + |y_k| + [rounded] c_k), the 2 for z and for the product. It gives E₀ ≤ 1.7u for
   either sum; tests/test_trigonometric.py evaluates it over the interval. The product by r makes of the sine's sum
   0.7855 · 1.7u + 0.71u < 2.1u.
6. 2.1u and 1.7u, with 1.1u for steps 3 and 4, are below 3.2u < 8u = 2^-50.

π times an exact rational t, `half_turns`, is reduced exactly instead, to |t − n/2| ≤ ¼. Its rounding, that of π and
that of their product move the argument by less than 2.5u · 0.7855 < 2u: with steps 3 to 5, below 5.2u.

The bound is absolute: near a multiple of π the sine is as small as what step 3 loses. sin 0 = 0 and cos 0 = 1 exactly.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.exponential import horner

CIRCULAR_ERROR = 2.0**-50
REACH = 2.0**20
PI = math.pi
_HALF_PI = (
    float.fromhex("0x1.921fb544p+0"),
    float.fromhex("0x1.0b4611a6p-34"),
    float.fromhex("0x1.3198a2e037073p-69"),
)
_TWO_OVER_PI = float.fromhex("0x1.45f306dc9c883p-1")
_FACTORIAL = [1.0]
for _k in range(1, 19):
    _FACTORIAL.append(_FACTORIAL[-1] * _k)
_SIN = [(-1.0) ** k / _FACTORIAL[2 * k + 1] for k in range(9)]
_COS = [(-1.0) ** k / _FACTORIAL[2 * k] for k in range(10)]


def sin64(x: Any) -> NDArray[np.float64]:
    """Sine within CIRCULAR_ERROR, absolute, for |x| ≤ REACH; NaN beyond."""
    return _quarter_turns(x, 0)


def cos64(x: Any) -> NDArray[np.float64]:
    """Cosine within CIRCULAR_ERROR, absolute, for |x| ≤ REACH; NaN beyond."""
    return _quarter_turns(x, 1)


def half_turns(turns: Any, ahead: int) -> NDArray[np.float64]:
    """Sine of π (t + ahead / 2) for an array of Fractions t, within CIRCULAR_ERROR; 0, 1 and −1 exactly."""
    turns = np.asarray(turns, object)
    nearest = [round(2 * t) for t in turns.flat]
    rests = [float(t - Fraction(n, 2)) for t, n in zip(turns.flat, nearest, strict=True)]
    rest = np.asarray(rests, np.float64).reshape(turns.shape) * PI
    quarter = np.asarray([(n + ahead) % 4 for n in nearest], np.int64).reshape(turns.shape)
    y = np.where(quarter & 1, cos64(rest), sin64(rest))
    return np.where(quarter & 2, -y, y)


def _quarter_turns(x: Any, ahead: int) -> NDArray[np.float64]:
    """Sine of x + ahead · π/2."""
    x = np.asarray(x, np.float64)
    inside = np.abs(x) <= REACH
    x = np.where(inside, x, 0.0)
    n = np.rint(x * _TWO_OVER_PI)
    r = x
    for part in _HALF_PI:
        r = r - n * part
    z = r * r
    quarter = n.astype(np.int64) + ahead
    y = np.where(quarter & 1, horner(_COS, z), r * horner(_SIN, z))
    return np.where(inside, np.where(quarter & 2, -y, y), np.nan)
