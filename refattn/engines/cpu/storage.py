"""Numbers of 16 bits in memory: kernels widen keys and values tile by tile, results are rounded once at the end."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import ml_dtypes
import numpy as np

from refattn.engines.cpu import tiles, vectors
from refattn.engines.cpu.operands import Array
from refattn.engines.cpu.tiles import narrow, widen
from refattn.engines.cpu.vectors import BFLOAT16, FLOAT16, FLOAT32
from refattn.jit import bare, halves, lanes, stamp

_CODES = {np.dtype(np.float32): FLOAT32, np.dtype(ml_dtypes.bfloat16): BFLOAT16, np.dtype(np.float16): FLOAT16}


# Unsigned integers of that size, and the exponent of infinity in them.
_WORDS: dict[Any, tuple[Any, int]] = {
    np.dtype(np.float32): (np.dtype(np.uint32), 0x7F800000),
    np.dtype(ml_dtypes.bfloat16): (np.dtype(np.uint16), 0x7F80),
    np.dtype(np.float16): (np.dtype(np.uint16), 0x7C00),
}


def storage_of(array: Array) -> int | None:
    """How an array is stored, as `Lanes` names it; None for what kernels do not read."""
    code = _CODES.get(array.dtype)
    return None if code == FLOAT16 and not halves() else code


def bits(array: Array) -> Array:
    """The array flat, 16-bit numbers as uint16."""
    return (array.view(np.uint16) if array.itemsize == 2 else array).reshape(-1)


def finite(array: Array) -> bool:
    """Whether all numbers are; of float32, bfloat16 and float16."""
    words, exponent = _WORDS[array.dtype]
    return bool(_greatest(array.reshape(-1).view(words)) < 2 * exponent)


@bare
def _greatest(words: Array) -> int:
    """Without the sign, in the highest bits: infinity and NaN are greater than all numbers."""
    greatest = words.dtype.type(0)
    for word in words:
        greatest = max(greatest, words.dtype.type(word << words.dtype.type(1)))
    return int(greatest)


def widened(array: Array) -> Array:
    """As float32."""
    if array.dtype == np.float32:
        return array
    code = storage_of(array)
    if not code:
        with np.errstate(over="ignore"):
            return array.astype(np.float32)
    found = np.empty(array.shape, np.float32)
    _converter(lanes() << 16 | code << 24, True)(found.reshape(-1), bits(np.ascontiguousarray(array)))
    return found


def narrowed(array: Array, dtype: np.dtype[Any]) -> Array:
    """Finite float32 numbers rounded to nearest, ties to even, to float16 or bfloat16; too large ones to infinity."""
    found = np.empty(array.shape, dtype)
    code = storage_of(found)
    if code is None:
        with np.errstate(over="ignore"):
            return array.astype(dtype)
    _converter(lanes() << 16 | code << 24, False)(bits(found), array.reshape(-1))
    return found


@cache
def _converter(literal: int, widening: bool) -> Callable[[Array, Array], int]:
    LITERAL, WIDENING, VERSION = literal, widening, stamp(tiles, vectors)

    @bare
    def convert(to: Array, source: Array) -> int:
        if WIDENING:
            widen(LITERAL, to.ctypes.data, source.ctypes.data, to.size)
        else:
            narrow(LITERAL, to.ctypes.data, source.ctypes.data, to.size)
        return VERSION

    return convert
