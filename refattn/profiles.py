"""Precision profiles: what a kernel of a precision may do, as the numbers that `refattn.bound` computes with."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

UNIT64 = 2.0**-53


@dataclass(frozen=True, kw_only=True)
class Profile:
    """What a kernel may do; docs/tolerance.md says it in words.

    unit: roundoff of products, quotients and sums; accumulation: of sums of products (2·unit where they may truncate);
    tiny: what a flushed result loses; largest: magnitude from which a kernel may overflow. exponential, logarithm,
    hyperbolic, circular: relative errors of those functions. In units of roundoff: term, of each addend of a sum of
    two, which may be converted to base 2 and added in any order; argument, of an exponent; shift, of the row maximum or
    log-sum-exp subtracted; extra, per sum; rescale, per sixteen keys, for a running maximum; saved, per power of two of
    the terms of a sum whose logarithm is saved and read back. storage, storage_tiny, storage_largest: roundoff,
    underflow and overflow of what may be kept in the storage type (numeric.stored).
    """

    name: str
    unit: float
    accumulation: float
    tiny: float
    largest: float
    exponential: float = 0.0
    logarithm: float = 0.0
    hyperbolic: float = 0.0
    circular: float = 0.0
    term: int = 0
    argument: int = 0
    shift: int = 0
    extra: int = 0
    rescale: int = 0
    saved: int = 0
    storage: float = 0.0
    storage_tiny: float = 0.0
    storage_largest: float = np.inf


_FLUSH32 = 2.0**-126

# This module's own evaluation; the subnormal quantum 32 times over, for what underflows in computing a bound.
FLOAT64 = Profile(
    name="float64-own", unit=UNIT64, accumulation=UNIT64, tiny=2.0**-1069, largest=float(np.finfo(np.float64).max)
)


def _kernel(name: str, unit: float, tiny: float, **storage: float) -> Profile:
    """Functions within 2 ulp; results below the smallest normal may be flushed; a split or online softmax."""
    error = 4 * unit
    return Profile(
        name=name,
        unit=unit,
        **{"accumulation": unit} | storage,
        tiny=tiny,
        largest=1 / tiny,
        exponential=error,
        logarithm=error,
        hyperbolic=error,
        circular=error,
        term=3,
        argument=2,
        shift=2,
        extra=12,
        rescale=6,
        saved=5,
    )


def _flash(name: str, **storage: float) -> Profile:
    """Short products accumulated in float32, truncated as tensor cores do; weights and score gradients kept short."""
    return _kernel(name, 2.0**-24, _FLUSH32, accumulation=2.0**-23, **storage)


FLOAT32 = _kernel("float32", 2.0**-24, _FLUSH32)
FLASH_BF16 = _flash("flash-bf16", storage=2.0**-8, storage_tiny=_FLUSH32)
FLASH_F16 = _flash("flash-f16", storage=2.0**-11, storage_tiny=2.0**-25, storage_largest=65519.0)
# 464 lies halfway between 448 and what would be the next number, and rounds to 448.
FLASH_E4M3 = _flash("flash-e4m3", storage=2.0**-4, storage_tiny=2.0**-10, storage_largest=464.0)
FLASH_E5M2 = _flash("flash-e5m2", storage=2.0**-3, storage_tiny=2.0**-17, storage_largest=61439.0)
FLASH = (FLASH_BF16, FLASH_F16, FLASH_E4M3, FLASH_E5M2)
PROFILES = {p.name: p for p in (_kernel("float64", UNIT64, 2.0**-1022), FLOAT32, *FLASH)}
# The profile of a case that stores its inputs in a dtype.
PROFILE_OF = {
    "float64": "float64",
    "float32": "float32",
    "bfloat16": "flash-bf16",
    "float16": "flash-f16",
    "float8_e4m3fn": "flash-e4m3",
    "float8_e5m2": "flash-e5m2",
}
