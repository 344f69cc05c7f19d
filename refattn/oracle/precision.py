"""Errors that have the size of a rounding: inputs cut short, or sums kept in a short type."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refattn.dtypes import format_of, round_to
from refattn.oracle.alternatives import Alternative, Failure, Floats

# Types shorter than the arithmetic that a case's dtype asks for: shorter inputs are summed in float32.
SHORT = {
    "float64": ("float32", "bfloat16", "float16"),
    "float32": ("bfloat16", "float16"),
    "bfloat16": ("bfloat16",),
    "float16": ("float16", "bfloat16"),
    "float8_e4m3fn": ("float16", "bfloat16"),
    "float8_e5m2": ("float16", "bfloat16"),
}
BLOCKS = (1, 8, 16, 32, 64, 128)


def rounded_inputs(f: Failure) -> Iterator[Alternative]:
    """Queries, keys and values cut to a shorter significand (TF32 keeps 11 bits)."""
    precision = format_of(f.golden.dtype).precision
    for name, bits in (("bfloat16", 8), ("TF32 or float16", 11)):
        if bits >= precision:
            continue
        for which in (("q", "k"), ("q", "k", "v")):
            arrays = {n: _cut(f.arrays[n].astype(np.float64), bits) for n in which}
            words = f"{', '.join(which)} rounded to {name} before use"
            yield Alternative(key="rounded_inputs", words=words, arrays=arrays, only=("out", "lse"))


def accumulator(f: Failure) -> str:
    """The short type whose rounding after every block of keys gives errors of out like these, else "".

    The order of a backend's sum is not known, so the judgement is by size: a root mean square within a factor 2 of
    what blocks of 1 to 128 keys give, no element beyond eight of their worst, and errors all over the array.
    """
    if "out" not in f.results:
        return ""
    exact, result = f.golden.expected["out"], f.results["out"]
    ok = np.isfinite(exact)
    if not np.isfinite(result[ok]).all():
        return ""
    error = np.where(ok, result - np.where(ok, exact, 0.0), 0.0)
    live = np.abs(exact) > 0
    if not live.any():
        return ""
    for name in SHORT[f.golden.dtype]:
        simulated = [_summed(f, name, size) - np.where(ok, exact, 0.0) for size in BLOCKS]
        if np.mean(error[live] != 0) < max(np.mean(s[live] != 0) for s in simulated) / 2:
            continue
        spread = [float(np.sqrt(np.mean(s[live] ** 2))) for s in simulated]
        largest = max(float(np.abs(s[live]).max()) for s in simulated)
        size = float(np.sqrt(np.mean(error[live] ** 2)))
        if min(spread) / 2 <= size <= 2 * max(spread) and np.abs(error[live]).max() <= 8 * largest:
            return name
    return ""


def _summed(f: Failure, name: str, size: int) -> Floats:
    """Out with the running sum rounded to a short type after every block of keys."""
    values = f.problem.inputs["v"].astype(np.float64)
    values = np.where(np.isfinite(values), values, 0.0)
    weights = f.weights
    if "keep" in f.problem.inputs:
        spec: Any = f.problem.spec
        weights = weights * f.problem.inputs["keep"] / spec.keep_probability
    weights = weights.reshape(*values.shape[:2], -1, *weights.shape[2:])
    total = np.zeros((*weights.shape[:4], values.shape[3]))
    for j in range(0, values.shape[2], size):
        part = np.einsum("bgrij,bgjd->bgrid", weights[..., j : j + size], values[:, :, j : j + size])
        total = round_to(total + part, name).astype(np.float64)
    return total.reshape(f.golden.expected["out"].shape)


def _cut(x: Floats, bits: int) -> Floats:
    """Round to so many significant bits."""
    m, e = np.frexp(np.where(np.isfinite(x), x, 0.0))
    return np.where(np.isfinite(x), np.ldexp(np.rint(np.ldexp(m, bits)), e - bits), x)


PRECISION = (rounded_inputs,)
