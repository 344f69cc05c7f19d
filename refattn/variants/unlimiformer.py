r"""Unlimiformer: cross-attention in which each query of each head reads its `top` nearest of all encoded tokens.

    found[h,i]  = the `top` largest of q[h,i]·k[g,j] over j < kv_lengths,     g = h // (Hq / Hkv)
    out[h,i]    = Σ_j softmax_j(scale q[h,i]·k[g,j]) v[g,j],   lse[h,i] = log Σ_j exp(scale q[h,i]·k[g,j])   over found

q (B,Hq,Lq,D); k (B,Hkv,Lk,D); v (B,Hkv,Lk,Dv). Every query sees every token; top of Lk or more is exact attention.
Padding leaves before the choice. No position is added to what was found.

score="hidden" never makes a key: one store of encoded tokens serves the heads of all layers.

    q[h,i] = hidden[i] Wq[h] + bq[h],     u[h,i] = q[h,i] Wk[g]ᵀ,     q[h,i]·k[g,j] = u[h,i]·encoded[j] + q[h,i]·bk[g]

hidden (B,Lq,E), encoded (B,Lk,E); w_q (Hq,E,D), w_k (Hkv,E,D), w_v (Hkv,E,Dv); b_q (Hq,D), b_k (Hkv,D), b_v (Hkv,Dv)
if given. The choice is by u·encoded, which b_k, the same for all tokens, cannot change; it does enter lse. The numbers
are those of score="keys" with projected q, k, v, but for the roundings of a kernel that keeps u and no k.

indices (B,Hq,Lq,top): the tokens found, the largest product first, of equals the lowest; −1 where there are fewer.
margin (B,Hq,Lq): the least product found minus the largest left, 0 where none is left; a kernel may find another token
only where it is off by so much. The choice is constant in gradients.

Inputs longer than an encoder are encoded by `chunks`, each of which keeps its middle half.

Source: Bertsch et al., arXiv 2305.01625, sections 2 and 3; choice before the scale, chunks (from SLED): the authors'
code, github.com/abertsch72/unlimiformer at e38b014 (read), whose default overlaps no chunks.

Differs from: that code where it searches a store, which holds padding as encoded tokens of zeros that may be found, and
whose index is approximate; its forms for decoders alone, which turn keys by their rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import broadcast, concatenate, einsum, real, reshape, stop, stored, where
from refattn.plan import Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants._nearest import above_threshold, nearest, products
from refattn.variants.sdpa import SDPA


@dataclass(frozen=True, kw_only=True)
class Unlimiformer(Spec):
    """Attention over the nearest keys of all.

    top: how many each query finds. score: from "keys", or from the "hidden" states that would be projected to them.
    scale: None is D^-1/2.
    """

    top: int
    score: Literal["keys", "hidden"] = "keys"
    scale: float | None = None

    def __post_init__(self) -> None:
        if type(self.top) is not int or self.top < 1:
            raise SpecError(f"top is a number of tokens from 1 on; given: {self.top!r}")
        if not isinstance(self.score, str) or self.score not in ("keys", "hidden"):
            raise SpecError(f"score is 'keys' or 'hidden'; given: {self.score!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


class Chunk(NamedTuple):
    """Tokens `begin` to `end` − 1 are encoded together, and `first` to `last` − 1 of them are kept."""

    begin: int
    end: int
    first: int
    last: int


def chunks(length: int, window: int) -> list[Chunk]:
    """Stretches of `window` tokens, half overlapping, that keep their middle half; those at the ends keep theirs too.

    A quarter of the window, rounded down, is left at either side; the last stretch ends with the input.
    """
    if type(window) is not int or type(length) is not int or window < 1 or length < 0:
        raise SpecError(f"chunks takes a length from 0 on and a window from 1 on; given: {length!r}, {window!r}")
    side = window // 4
    begins = [*range(0, max(length - window, 0), window - 2 * side), max(length - window, 0)]
    edges = [0, *(begin + window - side for begin in begins[:-1]), length]
    return [Chunk(b, min(b + window, length), edges[n], edges[n + 1]) for n, b in enumerate(begins)]


def signature(spec: Unlimiformer) -> dict[str, Array]:
    """Queries, keys and values, or what they are projected from and by; the lengths of padded sequences."""
    lengths = {"kv_lengths": Array("B", "int", "choice", "lengths:Lk", optional=True)}
    if spec.score == "keys":
        return {"q": Array("B Hq Lq D"), "k": Array("B Hkv Lk D"), "v": Array("B Hkv Lk Dv")} | lengths
    weights = {"w_q": "Hq E D", "w_k": "Hkv E D", "w_v": "Hkv E Dv"}
    biases = {"b_q": "Hq D", "b_k": "Hkv D", "b_v": "Hkv Dv"}
    return {
        "hidden": Array("B Lq E"),
        "encoded": Array("B Lk E"),
        **{name: Array(dims, role="learned") for name, dims in weights.items()},
        **{name: Array(dims, role="learned", optional=True) for name, dims in biases.items()},
        **lengths,
    }


def outputs(spec: Unlimiformer) -> dict[str, Array]:
    """The attention, the tokens found, and by how much."""
    own = {"out": Array("B Hq Lq Dv"), "lse": Array("B Hq Lq")}
    return own | {"indices": Array(f"B Hq Lq {spec.top}", "int"), "margin": Array("B Hq Lq")}


def resolve(spec: Unlimiformer, sizes: Mapping[str, int]) -> Unlimiformer:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: Unlimiformer, x: Mapping[str, Any]) -> None:
    """Only finite products have a rank; padding may hold anything."""
    ranked = ("q", "k") if spec.score == "keys" else ("hidden", "encoded", "w_q", "w_k", "b_q", "b_k")
    plain = {name: np.asarray(a, np.float64) if name in ranked else a for name, a in x.items()}
    there = _without_padding(plain, ("k", "encoded"))
    for name in ranked:
        if name in there and not np.isfinite(there[name]).all():
            raise ShapeError(f"{name} must hold finite numbers, for tokens are ranked by their products with queries")


def _without_padding(x: Mapping[str, Any], names: tuple[str, ...] = ("k", "v", "encoded")) -> dict[str, Any]:
    """Zeros for what stands beyond a sequence's length."""
    if "kv_lengths" not in x:
        return dict(x)
    found = dict(x)
    for name in set(names) & set(x):
        rows = x[name]
        there = np.arange(rows.shape[-2]) < np.asarray(x["kv_lengths"], np.int64)[:, None]
        found[name] = where(there.reshape(there.shape[0], *(1,) * (rows.ndim - 3), there.shape[1], 1), rows, 0)
    return found


def reference(spec: Unlimiformer, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Rank all tokens, attend to the first."""
    x = _without_padding(x)
    if spec.score == "keys":
        rows, keys = x["q"], x["k"]
        near = {"q": rows, "k": keys, "v": x["v"]}
    else:
        rows, keys, near = _by_hidden(spec, x)
    batch, lk = keys.shape[0], keys.shape[2]
    parts = [slice(b, b + 1) for b in range(batch)] if "kv_lengths" in x else [slice(0, batch)]
    counts = np.asarray(x.get("kv_lengths", [lk]), np.int64)
    # No sequence at all is one piece too, of a batch of 0.
    pieces = list(zip(parts, counts, strict=True)) or [(slice(0, 0), lk)]
    found = [nearest(products(rows[part], keys[part, :, :n]), spec.top) for part, n in pieces]
    live = np.zeros((batch, *rows.shape[1:3], lk), bool)
    for (part, n), chosen in zip(pieces, found, strict=True):
        live[part, ..., :n] = chosen.live
    attended = sdpa.reference(SDPA(scale=spec.scale), near | {"mask": live})
    if "b_v" in x:
        # Weights sum to 1: what every value has is added to their mean, and its gradient is then exact.
        own = _kept(_of_heads(x["b_v"], rows.shape))
        attended["out"] = attended["out"] + where(np.any(live, -1, keepdims=True), own, 0)
    indices = np.concatenate([chosen.indices for chosen in found])
    return attended | {"indices": indices, "margin": concatenate([chosen.margin for chosen in found], 0)}


def _by_hidden(spec: Unlimiformer, x: Mapping[str, Any]) -> tuple[Any, Any, dict[str, Any]]:
    """What is ranked, u and the encoded tokens as keys of every group, and the arrays of attention over these."""
    q = _projected(x, "hidden", "q")
    batch, heads, lq, width = q.shape
    groups, size = x["w_k"].shape[:2]
    by_group = reshape(q, (batch, groups, heads // groups, lq, width))
    u = reshape(einsum("bgrid,ged->bgrie", by_group, x["w_k"]), (batch, heads, lq, size))
    tokens = reshape(x["encoded"], (batch, 1, *x["encoded"].shape[1:]))
    keys = broadcast(tokens, (batch, groups, *x["encoded"].shape[1:]))
    near = {"q": _kept(u), "k": keys, "v": _kept(einsum("ble,hed->bhld", x["encoded"], x["w_v"]))}
    if "b_k" in x:
        constant = reshape(einsum("bgrid,gd->bgri", by_group, x["b_k"]), (batch, heads, lq, 1))
        near["bias"] = real(spec.scale, constant) * constant
    return u, keys, near


def _of_heads(bias: Any, shape: tuple[int, ...]) -> Any:
    """A row (Hkv,Dv) of each key head for every row of its query heads, (B,Hq,Lq,Dv)."""
    (batch, heads, lq), (groups, dv) = shape[:3], bias.shape
    rows = broadcast(reshape(bias, (1, groups, 1, 1, dv)), (batch, groups, heads // groups, lq, dv))
    return reshape(rows, (batch, heads, lq, dv))


def _projected(x: Mapping[str, Any], source: str, name: str) -> Any:
    """Rows (B,H,L,·) of the hidden states that the weights w_<name> and the bias b_<name>, if any, make."""
    rows = einsum("ble,hed->bhld", x[source], x[f"w_{name}"])
    bias = x.get(f"b_{name}")
    return rows if bias is None else rows + reshape(bias, (1, bias.shape[0], 1, bias.shape[1]))


def _kept(rows: Any) -> Any:
    """A kernel may keep what it projects in its storage type, and backwards the gradients; it ranks before."""
    return stored(stored(rows), cotangent=True)


def lower(spec: Unlimiformer, x: Mapping[str, Any], state: Any = None) -> Score:
    """Queries, keys and values, and a mask of the tokens above each row's threshold."""
    x = _without_padding(x)
    if spec.score == "keys":
        q, k, v = x["q"], x["k"], x["v"]
    else:
        q, k, v = _projected(x, "hidden", "q"), _projected(x, "encoded", "k"), _projected(x, "encoded", "v")
    lk = k.shape[2]
    keys = np.repeat(np.asarray(stop(k)), q.shape[1] // max(k.shape[1], 1), 1)
    s = np.asarray(stop(q)) @ np.swapaxes(keys, 2, 3)
    there = np.arange(lk) < np.asarray(x.get("kv_lengths", [lk]), np.int64).reshape(-1, 1, 1, 1)
    found = above_threshold(s, np.broadcast_to(there, s.shape), spec.top)
    nowhere = np.zeros((1, q.shape[2]), np.int64), np.zeros((1, lk), np.int64)
    return Score(q=q, k=k, v=v, scale=spec.scale or 0.0, positions=nowhere, mask=found)


def restrict(spec: Unlimiformer, x: Mapping[str, Any], rows: tuple[int, ...]) -> dict[str, Any]:
    """The same problem for some query rows only."""
    if spec.score == "keys":
        return dict(x) | {"q": x["q"][:, :, list(rows)]}
    return dict(x) | {"hidden": x["hidden"][:, list(rows)]}


def operations(spec: Unlimiformer, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of projections, products and values, forward; bytes of one float64 score matrix."""
    rows, pairs = sizes["B"] * sizes["Hq"] * sizes["Lq"], sizes["B"] * sizes["Hq"] * sizes["Lq"] * sizes["Lk"]
    work = rows * min(spec.top, sizes["Lk"]) * sizes["Dv"]
    if spec.score == "keys":
        return 2 * (work + pairs * sizes["D"]), 8 * pairs
    values = sizes["B"] * sizes["Hkv"] * sizes["Lk"] * sizes["E"] * sizes["Dv"]
    return 2 * (work + pairs * sizes["E"] + 2 * rows * sizes["E"] * sizes["D"] + values), 8 * pairs
