"""Keys and values as a cache keeps them, and as the numbers that they mean."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from refattn.numeric import real, reshape
from refattn.spec import Array

INT8 = {
    "k": Array("B Hkv Lk D", "int", domain="int8"),
    "v": Array("B Hkv Lk Dv", "int", domain="int8"),
    "k_scale": Array("B Hkv Lk", broadcast=True),
    "v_scale": Array("B Hkv Lk", broadcast=True),
}


def unpacked(x: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs with real k (B,Hkv,Lk,D), v (B,Hkv,Lk,Dv): k[b,g,j] = k_scale[b,g,j] k_int[b,g,j], v likewise."""
    found = dict(x)
    for name in ("k", "v"):
        scale = found.pop(f"{name}_scale", None)
        if scale is not None:
            found[name] = real(x[name], x["q"]) * reshape(scale, (*scale.shape, 1))
    return found
