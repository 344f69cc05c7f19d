"""A backend's numbers against certified ones, element by element."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.arrays import to_numpy
from refattn.dtypes import format_of, ulp
from refattn.errors import ShapeError
from refattn.golden.inputs import FLOAT32_INPUTS
from refattn.golden.load import Golden
from refattn.problem import WIDE

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Comparison:
    """One output of one case.

    worst_ulp: largest error in units of the output dtype's spacing, over exact values that are normal numbers of it.
    worst_ratio: largest |error| / hard bound, infinite where a rule about NaN or infinity is broken. index: where that
    is, in the full-size array. verdict: "pass" or "fail"; why: in words where it fails.
    """

    name: str
    worst_ulp: float
    worst_ratio: float
    index: tuple[int, ...]
    verdict: str
    why: str = ""


def compare(golden: Golden, results: Mapping[str, Any]) -> list[Comparison]:
    """Compare results, full size or the published rows only, with a case's values and bounds, output by output.

    The error is taken against the float64 value rounded to odd, which is within 2^−53 of the exact one. Where NaN is
    expected any number that is not finite passes; lse −∞ must be −∞; a value that may lie beyond the dtype's largest
    may be what the case's overflow rule makes of it: infinite (NaN where the dtype has no infinity), or that largest
    number; the sign of zero is ignored. Outputs that are missing are not compared.

    Raises
    ------
    ShapeError
        An output has another shape than the case says.
    DTypeError
        An output is not an array of numbers.
    """
    return [_compare(golden, name, results[name]) for name in golden.expected if name in results]


def output_dtype(golden: Golden, name: str) -> str:
    """The dtype an output is rounded to: lse and the gradients of scores and slopes stay wide, integers are whole."""
    if golden.manifest["outputs"][name].get("kind") == "int":
        return "float64"
    wide = name in WIDE or name[1:] in FLOAT32_INPUTS
    return "float32" if wide and golden.dtype != "float64" else golden.dtype


def published(golden: Golden, name: str, given: Any) -> Floats:
    """A result as float64, the published rows of it."""
    array = to_numpy(given, name).astype(np.float64)
    expected = golden.expected[name].shape
    if array.shape == expected:
        return array
    full = full_shape(golden, name)
    if array.shape != full:
        raise ShapeError(f"{name} has shape {array.shape}; expected {full}{_hint(array.shape, full)}")
    return golden.published(name, array)


def full_shape(golden: Golden, name: str) -> tuple[int, ...]:
    """Shape of an output of all rows."""
    shape = list(golden.expected[name].shape)
    if golden.rows is not None and name in ("out", "lse", "dq", "dk", "dv"):
        shape[2] = golden.sizes["Lk" if name in ("dk", "dv") else "Lq"]
    return tuple(shape)


def ratios(golden: Golden, name: str, result: Floats) -> Floats:
    """|error| / bound of published results; 0 where both are 0, infinite where NaN or infinity is out of place."""
    exact, bound = golden.expected[name], golden.bound[name]
    fmt = format_of(output_dtype(golden, name))
    with np.errstate(invalid="ignore", divide="ignore", over="ignore"):
        error = np.abs(result - exact)
        ratio = np.where(error == 0, 0.0, error / bound)
        may_overflow = np.abs(exact) + bound > fmt.max_finite
    ratio = np.where(np.isnan(ratio), np.inf, ratio)
    same_sign = np.signbit(result) == np.signbit(exact)
    if golden.overflow == "saturate":
        overflown = (np.abs(result) == fmt.max_finite) & same_sign
    else:
        overflown = np.isinf(result) & same_sign if fmt.has_inf else np.isnan(result)
    ratio = np.where((overflown & may_overflow) | (np.isinf(result) & (result == exact)), 0.0, ratio)
    return np.where(np.isnan(exact), np.where(np.isfinite(result), np.inf, 0.0), ratio)


def _compare(golden: Golden, name: str, given: Any) -> Comparison:
    result, exact = published(golden, name, given), golden.expected[name]
    if not result.size:
        return Comparison(name, 0.0, 0.0, (), "pass")
    ratio = ratios(golden, name, result)
    dtype = output_dtype(golden, name)
    normal = np.isfinite(exact) & np.isfinite(result) & (np.abs(exact) >= 2.0 ** format_of(dtype).emin)
    with np.errstate(invalid="ignore", over="ignore"):
        in_ulp = np.where(normal, np.abs(result - exact) / ulp(exact, dtype), 0.0)
    at = np.unravel_index(int(np.argmax(ratio)), ratio.shape)
    worst = float(ratio[at])
    index = _full_index(golden, name, tuple(int(i) for i in at))
    if worst <= 1:
        return Comparison(name, float(in_ulp.max()), worst, index, "pass")
    why = f"{name}{list(index)} is {result[at]:.9g}; expected {_expectation(exact[at], golden.bound[name][at])}"
    return Comparison(name, float(in_ulp.max()), worst, index, "fail", why)


def _expectation(exact: float, bound: float) -> str:
    if np.isnan(exact):
        return "NaN or infinity"
    return f"{exact:.9g}" if np.isinf(exact) else f"{exact:.9g} within {bound:.2g}"


def _full_index(golden: Golden, name: str, at: tuple[int, ...]) -> tuple[int, ...]:
    if golden.rows is None or name not in ("out", "lse", "dq", "dk", "dv"):
        return at
    rows = golden.rows.k if name in ("dk", "dv") else golden.rows.q
    return (*at[:2], rows[at[2]], *at[3:])


def _hint(given: tuple[int, ...], full: tuple[int, ...]) -> str:
    if len(given) == 4 and (given[0], given[2], given[1], given[3]) == full:
        return ": the layout is (batch, heads, length, width); yours has heads and length swapped"
    return ""
