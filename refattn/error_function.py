r"""Our own float64 error function, with a bound proved from IEEE arithmetic alone.

    erf x = (2/√π) x e^−z S(z),     S(z) = Σ_{n=0}^{140} c_n z^n,     c_n = 2^n / (1·3·5···(2n + 1)),     z = x²

All terms are positive, so nothing cancels; beyond |x| = 6 the result is ±1. It is within ERF_ERROR = 2^-45, relative.

Proof, with u = 2^-53, for |x| ≤ 6, z ≤ 36.

1. Differentiating h = x S(x²) = (√π/2) e^(x²) erf x gives h' = 1 + 2xh, so that 2zS' = 1 + 2zS − S, and as S ≥ 1,
   zS' ≤ zS: weighted by the terms of S, n is 36 on average at most.
2. Horner's scheme rounds term n at most 2n + 1 times, c_n once more, and z, itself rounded, enters n times: 3n + 2
   roundings, so by step 1 at most (3·36 + 2)u = 110u of the sum. The series' rest is below 1e-24 of it.
3. e^−z: 36u for the rounding of z, and EXP_ERROR = 8u. The constant and three products: 4u.
4. 158u, and of second order less than u, are below 256u = 2^-45.
5. Beyond 6, 1 − |erf| < 2.2e-17 < u. Results below 2^-1022 may lose 2^-1074, which `tiny` of refattn.bound covers.
"""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.exponential import exp64, horner

ERF_ERROR = 2.0**-45
_REACH = 6.0
_TWO_OVER_ROOT_PI = float.fromhex("0x1.20dd750429b6dp+0")
_ODD = [Fraction(1)]
for _n in range(1, 141):
    _ODD.append(_ODD[-1] * Fraction(2, 2 * _n + 1))
_SERIES = [float(c) for c in _ODD]


def erf64(x: Any) -> NDArray[np.float64]:
    """Error function within ERF_ERROR, relative; NaN stays NaN."""
    x = np.asarray(x, np.float64)
    near = np.clip(x, -_REACH, _REACH)
    z = near * near
    y = (_TWO_OVER_ROOT_PI * near) * (exp64(-z) * horner(_SERIES, z))
    far: NDArray[np.float64] = np.where(np.abs(x) > _REACH, np.copysign(1.0, x), y)
    return far
