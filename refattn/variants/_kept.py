"""Keys and values as a cache keeps them: what arrays they take, and the numbers that they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refattn.errors import ShapeError, SpecError
from refattn.numeric import broadcast
from refattn.spec import Array
from refattn.unpack import dequantised, in_a_row

Arrays = dict[str, Array]

_INT8 = {
    "k": Array("B Hkv Lk D", "int", domain="int8"),
    "v": Array("B Hkv Lk Dv", "int", domain="int8"),
    "k_scale": Array("B Hkv Lk", broadcast=True),
    "v_scale": Array("B Hkv Lk", broadcast=True),
}


def check(kv: Any, paged: Any) -> None:
    """Refuse what no cache is.

    Raises
    ------
    SpecError
        Naming the option.
    """
    if kv is not None and not (isinstance(kv, str) and kv == "int8"):
        raise SpecError(f"kv is 'int8', or None for real numbers; given: {kv!r}")
    if not isinstance(paged, bool):
        raise SpecError(f"paged is True or False; given: {paged!r}")


def signature(arrays: Arrays, kv: str | None, paged: bool) -> Arrays:
    """The arrays of attention with keys as they are kept: in int8, or in N blocks of S slots, at most M a sequence."""
    arrays = arrays | (_INT8 if kv == "int8" else {})
    if not paged:
        return arrays
    found = {}
    for name, array in arrays.items():
        if name in _INT8:
            found[name] = replace(array, dims=array.dims.replace("B", "N").replace("Lk", "S"))
        else:
            one = replace(array, dims=array.dims.replace("Lk", "M*S"), domain=array.domain.replace("Lk", "M*S"))
            found[name] = replace(one, optional=False) if name == "kv_lengths" else one
        if name == "v":
            found["block_table"] = Array("B M", "int", "choice")
    return found


def key_count(x: Mapping[str, Any]) -> int:
    """Lk, the places for keys that a sequence has."""
    return int(x["k"].shape[2] * (x["block_table"].shape[1] if "block_table" in x else 1))


def check_blocks(x: Mapping[str, Any]) -> None:
    """Refuse a table that names a block which is not there, if a key stands in it.

    Raises
    ------
    ShapeError
        Naming the first such entry.
    """
    if "block_table" not in x:
        return
    table, (blocks, _, size) = x["block_table"], x["k"].shape[:3]
    used = np.arange(table.shape[1]) * size < x["kv_lengths"][:, None]
    wrong = np.argwhere(used & ((table < 0) | (table >= blocks)))
    if len(wrong):
        b, m = (int(i) for i in wrong[0])
        raise ShapeError(
            f"block_table[{b}, {m}] is {table[b, m]}, but there are N = {blocks} blocks, 0 to N - 1, and the "
            f"kv_lengths[{b}] = {x['kv_lengths'][b]} keys of its sequence reach into it"
        )


def unpacked(x: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with real k (B,Hkv,Lk,D) and v (B,Hkv,Lk,Dv), one key after another.

    Key j of sequence b is slot j mod S of block block_table[b, j div S]; k = k_scale · k_int, and v likewise.
    """
    found = dict(x)
    table = found.pop("block_table", None)
    for name in ("k", "v"):
        kept, scale = x[name], found.pop(f"{name}_scale", None)
        if table is not None:
            scale = None if scale is None else in_a_row(broadcast(scale, kept.shape[:3]), table, x["kv_lengths"])
            kept = in_a_row(kept, table, x["kv_lengths"])
        found[name] = kept if scale is None else dequantised(kept, scale, x["q"])
    return found
