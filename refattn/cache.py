"""Arrays that grow at the end of one axis without being copied: the caches of decoding.

A grown array is a read-only view into a buffer with room to spare. What is appended goes behind the view, where no
older array can see it, so older arrays stay as they are; if that room is taken already, by another continuation, the
buffer is copied, and so it is when it is full, to one of twice the length. So a slot is written once, and what an
engine has found out about it stays true as long as the buffer is there.
"""

from __future__ import annotations

from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray


class Buffer:
    """Memory, the axis along which it fills, and how far it is taken."""

    def __init__(self, memory: NDArray[Any], axis: int, used: int) -> None:
        self.memory, self.axis, self.used, self.lock = memory, axis, used, Lock()


class Grown(np.ndarray[Any, Any]):
    """A view into a buffer that it may be extended in."""

    buffer: Buffer | None

    def __array_finalize__(self, source: Any) -> None:
        self.buffer = getattr(source, "buffer", None)


def extend(array: NDArray[Any], rows: NDArray[Any], axis: int) -> NDArray[Any]:
    """The array with rows behind it along an axis, in place where the room is free: a cache of keys or values.

    Both of any dtype and of the same shape but for that axis, of keys (B,Hkv,L,D) axis 2; the result is read-only, and
    the array stays as it is. `engine="cpu"` reads such k and v without a copy, and remembers the norms of their keys.

    Raises
    ------
    ValueError
        The shapes do not fit.
    """
    axis, count = axis % array.ndim, rows.shape[axis]
    buffer = getattr(array, "buffer", None)
    if not count and buffer is not None:
        return array
    start = None if buffer is None else _offset(array, buffer, axis)
    if buffer is not None and start is not None and rows.dtype == array.dtype:
        end = start + array.shape[axis]
        with buffer.lock:
            free = buffer.used == end and end + count <= buffer.memory.shape[axis]
            if free:
                buffer.used = end + count
        if free:
            ahead = (slice(None),) * axis
            buffer.memory[(*ahead, slice(end, end + count))] = rows
            return _view(buffer, start, end + count)
    length = array.shape[axis]
    shape = list(array.shape)
    shape[axis] = max(16, 2 * (length + count))
    fresh = Buffer(np.empty(shape, np.result_type(array, rows)), axis, length + count)
    ahead = (slice(None),) * axis
    fresh.memory[(*ahead, slice(0, length))] = array
    fresh.memory[(*ahead, slice(length, length + count))] = rows
    return _view(fresh, 0, length + count)


def _view(buffer: Buffer, start: int, end: int) -> NDArray[Any]:
    ahead = (slice(None),) * buffer.axis
    view = buffer.memory[(*ahead, slice(start, end))].view(Grown)
    view.buffer, view.flags.writeable = buffer, False
    return view


def whole(array: NDArray[Any], axis: int) -> Buffer | None:
    """The buffer of a grown array that begins where its buffer does; None for any other."""
    buffer = getattr(array, "buffer", None)
    return buffer if buffer is not None and _offset(array, buffer, axis) == 0 else None


def _offset(array: NDArray[Any], buffer: Buffer, axis: int) -> int | None:
    """Where along the axis a view begins in its buffer; None where it is no plain stretch of it."""
    memory = buffer.memory
    others = [n for i, n in enumerate(array.shape) if i != axis] == [n for i, n in enumerate(memory.shape) if i != axis]
    if buffer.axis != axis or not others or array.strides != memory.strides or array.dtype != memory.dtype:
        return None
    gap = array.__array_interface__["data"][0] - memory.__array_interface__["data"][0]
    start, rest = divmod(gap, memory.strides[axis]) if memory.size else (0, 1)
    return start if rest == 0 and 0 <= start and start + array.shape[axis] <= memory.shape[axis] else None
