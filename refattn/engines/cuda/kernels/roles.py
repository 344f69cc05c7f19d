"""The kernels by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from refattn.engines.cuda.kernels import backward, decode, forward, recurrent
from refattn.engines.cuda.kernels.cotangents import Cotangents
from refattn.engines.cuda.kernels.form import Arguments


class Role(NamedTuple):
    """`make(ops, form)` gives a kernel and its words of shared memory; it takes these named tuples.

    products: how many of D and of Dv it takes of each pair of tiles.
    """

    make: Any
    takes: tuple[Any, ...]
    products: tuple[int, int]


ROLES = {
    "forward": Role(forward.make, (Arguments,), (1, 1)),
    "combine": Role(decode.make, (decode.Parts,), (0, 0)),
    "rows": Role(backward.make_rows, (Arguments, Cotangents), (2, 1)),
    "recur": Role(recurrent.make, (recurrent.Recurrence,), (0, 0)),
    "keys": Role(backward.make_keys, (Arguments, Cotangents), (2, 2)),
}
