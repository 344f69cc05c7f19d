r"""Our own float64 exponential, with a bound proved from IEEE arithmetic alone.

    x = n ln 2 + r, |r| ≤ 0.3466;   e^x = 2^n Σ_{k=0}^{17} r^k / k!

ln 2 is split into a head of 32 bits, so that n·head is exact for |n| < 2^20, and a tail. With u = 2^-53:
r carries |r − r*| ≤ u |r*| + u |n| tail + 2^-90 |n| < 3u, which moves e^r by less than 3u relative; truncation after
r^17 is below 0.3466^18 / 18! < 2^-80; Horner's scheme in which |r| < 0.35 damps every earlier error by r/k costs less
than 4u relative (1u for the last sum, 0.6u for the last product, the rest below 1u, e^-0.35 > 0.7 dividing them). The
sum stays below 8u = EXP_ERROR. Scaling by 2^n is exact until the result is subnormal, where it errs by at most 2^-1075.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

EXP_ERROR = 2.0**-50
_LN2_HEAD = float.fromhex("0x1.62e42fefp-1")
_LN2_TAIL = float.fromhex("0x1.473de6af278edp-34")
_RECIPROCAL_LN2 = float.fromhex("0x1.71547652b82fep+0")
_FACTORIALS = [1.0]
for _k in range(1, 18):
    _FACTORIALS.append(_FACTORIALS[-1] * _k)


def exp64(x: Any) -> NDArray[np.float64]:
    """e^x within EXP_ERROR relative (and 2^-1074 absolute) for x ≤ 709; 0 below −745.2; NaN stays NaN."""
    x = np.asarray(x, np.float64)
    n = np.rint(np.clip(x, -1100.0, 710.0) * _RECIPROCAL_LN2)
    r = (x - n * _LN2_HEAD) - n * _LN2_TAIL
    r = np.clip(r, -0.5, 0.5)
    y = np.full(x.shape, 1.0 / _FACTORIALS[17])
    for k in range(16, -1, -1):
        y = y * r + 1.0 / _FACTORIALS[k]
    return np.ldexp(y, np.nan_to_num(n).astype(np.int64))
