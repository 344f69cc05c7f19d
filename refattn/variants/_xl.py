"""Attention over hidden states with Transformer-XL's relative positions, for it and for what is built on it.

    s[h,i,j] = scale ((q[h,i] + u[h])·k[g,j] + (q[h,i] + w[h])·r[h, min(i − j, clamp)]),     r[h,d] = PE(d) wr[h]

of the hidden states of one segment and all that it sees, in one row, so that distances are differences of indices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import concatenate, cos, einsum, exp, log, real, reshape, sin, stop, stored, take
from refattn.spec import Array
from refattn.variants.sinusoidal import Sinusoidal, table

_SINES_FIRST = Sinusoidal(layout="concatenated")


def signature() -> dict[str, Array]:
    """The hidden states, the projections, and what stands in for a query where it asks for contents and positions."""
    return {
        "x": Array("B L E"),
        "wq": Array("Hq E D", role="learned"),
        "wk": Array("Hkv E D", role="learned"),
        "wv": Array("Hkv E Dv", role="learned"),
        "wr": Array("Hq R D", role="learned"),
        "u": Array("Hq D", role="learned"),
        "w": Array("Hq D", role="learned"),
    }


def count(name: str, given: Any, least: int) -> None:
    """Refuse what is no integer from `least` on."""
    if type(given) is not int or given < least:
        raise SpecError(f"{name} is an integer from {least} on; given: {given!r}")


def scale_of(scale: float | None, sizes: Mapping[str, int]) -> float:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return default if scale is None else scale


def project(hidden: Any, matrix: Any) -> Any:
    """Rows (B,n,E) by a matrix for each head (H,E,D): (B,H,n,D)."""
    # A kernel may keep projections in its storage type, and backwards their gradients.
    return stored(stored(einsum("bne,hed->bhnd", hidden, matrix)), cotangent=True)


def detached(hidden: Any, old: int) -> Any:
    """The same hidden states, of which the first `old` hand no gradient on."""
    return concatenate([stop(hidden[:, :old]), hidden[:, old:]], 1) if old else hidden


def scores(x: Mapping[str, Any], seen: Any, rows: int, scale: Any, clamp: int | None = None) -> dict[str, Any]:
    """What plain attention takes: the last `rows` of the hidden states `seen` (B,n,E), each before all up to itself."""
    q, keys = project(seen[:, seen.shape[1] - rows :], x["wq"]), seen.shape[1]
    heads, width = x["u"].shape
    by_content, by_position = (stored(stored(q + reshape(x[n], (heads, 1, width))), cotangent=True) for n in "uw")

    ahead = np.arange(keys - rows, keys)[:, None] - np.arange(keys)
    farthest = keys - 1 if clamp is None else min(keys - 1, clamp)
    vectors = einsum("dr,hre->hde", stored(table(_SINES_FIRST, farthest + 1, x["wr"].shape[1], q)), x["wr"])
    which = np.clip(ahead, 0, farthest)
    met = take(stored(stored(vectors), cotangent=True), which.reshape(-1), 1)
    positions = einsum("bhid,hijd->bhij", by_position, reshape(met, (heads, rows, keys, width)))

    k, v = project(seen, x["wk"]), project(seen, x["wv"])
    return {"q": by_content, "k": k, "v": v, "bias": real(scale, q) * positions}


def vectors_by_distance(wr: Any, distances: Any) -> Any:
    """r of the distances again, (Hq,n,D): angles by division, and the halves of wr by sines and cosines apart."""
    width = wr.shape[1]
    sines = (width + 1) // 2
    wavelengths = exp(log(real(10000, wr)) * real(2 * np.arange(sines), wr) / max(width, 1))
    angles = reshape(real(distances, wr), (len(distances), 1)) / wavelengths
    by_sines = einsum("nr,hrd->hnd", sin(angles), wr[:, :sines])
    return by_sines + einsum("nr,hrd->hnd", cos(angles)[:, : width - sines], wr[:, sines:])


def operations(sizes: Mapping[str, int], keys: int) -> tuple[int, int]:
    """Floating-point operations, forward, where a row sees so many keys, and bytes of the float64 scores."""
    widths = sizes["D"] + sizes["Dv"]
    projecting = sizes["L"] * sizes["E"] * (sizes["Hq"] * sizes["D"] + sizes["Hkv"] * widths)
    pairs = sizes["B"] * sizes["Hq"] * sizes["L"] * keys
    return 2 * (sizes["B"] * projecting + pairs * (widths + sizes["D"])), 8 * pairs
