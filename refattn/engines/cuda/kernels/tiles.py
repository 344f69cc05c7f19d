"""Rows of a matrix on their way from global to shared memory."""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from itertools import accumulate
from typing import Any

from refattn.engines.cuda.kernels.form import Form


def places(*sizes: int) -> list[int]:
    """Where in shared memory each part but the first begins, and where the last ends."""
    return list(accumulate(sizes))


def make(ops: Any, form: Form, base: int, rows: int, columns: int, stride: int, *, kind: str = "plain") -> Any:
    """`fill(p, strides, near, pages, first, length)`: asynchronous copies of rows from `first` on, 0 from `length` on.

    p points to row 0, rows lie strides[2] elements apart, `columns` long. Of kind "grouped", `near` of them belong to
    one head, and the next ones to the next, strides[1] elements on; "paged", to one block, the n-th of which is block
    pages[n], blocks lying strides[0] elements apart. In shared memory the first is at word `base`, and
    rows lie `stride` words apart and are filled with 0 up to the last 4 of those words, which nobody reads: they make
    rows that are a power of 2 long begin in different banks.
    """
    narrow, wide, threads = form.storage != "float32", form.wide, form.threads
    chunk = 8 if narrow else 4  # elements in 16 bytes
    count = (stride - 4) // 4
    across = min(1 << (count - 1).bit_length(), threads)
    shift, rest, down = across.bit_length() - 1, across - 1, threads // across

    @ops.device
    def copied(word, p, element, column, live):
        """16 bytes, in one piece or as many as their alignment asks."""
        if wide:
            ops.copy16(word, p, element, live and column < columns)
        elif narrow:
            for n in range(4):
                low = ops.read(p, element + 2 * n) if live and column + 2 * n < columns else 0
                high = ops.read(p, element + 2 * n + 1) if live and column + 2 * n + 1 < columns else 0
                ops.put_bits(word + n, ops.join(low, high))
        else:
            for n in range(4):
                ops.copy4(word + n, p, element + n, live and column + n < columns)

    grouped, paged = kind == "grouped", kind == "paged"

    @ops.device
    def begins(row, strides, near):
        if grouped:
            return row // near * strides[1] + row % near * strides[2]
        return (row % near if paged else row) * strides[2]

    @ops.device
    def block(p, row, strides, near, pages, length):
        return ops.past(p, ops.read(pages, row // near) * strides[0]) if paged and row < length else p

    @ops.device
    def fill(p, strides, near, pages, first, length):
        t = ops.thread()
        r = t >> shift
        while r < rows:
            c, begin = t & rest, begins(first + r, strides, near)
            source = block(p, first + r, strides, near, pages, length)
            while c < count:
                copied(base + r * stride + 4 * c, source, begin + chunk * c, chunk * c, first + r < length)
                c += across
            r += down

    return fill
