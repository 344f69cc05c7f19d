"""The kernels by name."""

from __future__ import annotations

from typing import Any, NamedTuple

from refattn.engines.cuda.kernels import backward, decode, forward, recurrent
from refattn.engines.cuda.kernels.cotangents import Cotangents
from refattn.engines.cuda.kernels.form import Arguments


class Role(NamedTuple):
    """`make(ops, form)` gives a kernel and its words of shared memory; it takes these named tuples."""

    make: Any
    takes: tuple[Any, ...]


ROLES = {
    "forward": Role(forward.make, (Arguments,)),
    "combine": Role(decode.make, (decode.Parts,)),
    "rows": Role(backward.make_rows, (Arguments, Cotangents)),
    "recur": Role(recurrent.make, (recurrent.Recurrence,)),
    "keys": Role(backward.make_keys, (Arguments, Cotangents)),
}
