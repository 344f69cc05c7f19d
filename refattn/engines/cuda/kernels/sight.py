"""Which tiles of keys a tile of rows sees, by the least and greatest positions and segments of both."""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from typing import Any, NamedTuple

from refattn.engines.cuda.kernels.form import Form

NOTHING, ALL, SOME = -1, 0, 1


class Sight(NamedTuple):
    """Device functions."""

    see: Any
    following: Any


def make(ops: Any, form: Form) -> Sight:
    """`see(x, b, t, n)`: NOTHING, ALL or SOME of what rows of tile t see of keys of tile n.

    `following(x, b, t, n, end)`: the first tile of keys from n to `end` of which they see anything, else `end`.
    """
    keys, positions, segments, mask = form.keys, form.positions, form.segments, form.mask

    @ops.device
    def see(x, b, t, n, q_tiles, k_tiles):
        rows, columns = 4 * (b * q_tiles + t), 4 * (b * k_tiles + n)
        least, greatest = ops.read(x.q_ends, rows), ops.read(x.q_ends, rows + 1)
        near, far = ops.read(x.k_ends, columns), ops.read(x.k_ends, columns + 1)
        if least > greatest or near > far:
            return NOTHING
        found = SOME if mask or (n + 1) * keys > ops.read(x.k_length, b) else ALL
        if positions:
            if far - least < x.span[0] or near - greatest > x.span[1]:
                return NOTHING
            if near - greatest < x.span[0] or far - least > x.span[1]:
                found = SOME
        if segments:
            low, high = ops.read(x.q_ends, rows + 2), ops.read(x.q_ends, rows + 3)
            first, last = ops.read(x.k_ends, columns + 2), ops.read(x.k_ends, columns + 3)
            if last < low or first > high:
                return NOTHING
            if first != high or last != low:
                found = SOME
        return found

    @ops.device
    def following(x, b, t, n, end, q_tiles, k_tiles):
        while n < end and see(x, b, t, n, q_tiles, k_tiles) == NOTHING:
            n += 1
        return n

    return Sight(see, following)
