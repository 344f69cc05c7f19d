r"""Linformer: attention over r learned mixtures of the keys, at a cost linear in the length.

    K' = E K,     V' = F V,     out[h,i] = Σ_a softmax_a(scale q[h,i]·K'[g,a]) V'[g,a],     g = h // (Hq / Hkv)
    lse[h,i] = log Σ_a exp(scale q[h,i]·K'[g,a])

q (B,Hq,Lq,D); k (B,Hkv,Lk,D); v (B,Hkv,Lk,Dv); E, F (r,Lk), one for all heads, or (Hkv,r,Lk), one for each key head
(heads="per_head"); with sharing="kv" F is E and is no input. Every query sees all r mixtures, which hold keys of every
position: there is no causal form. E the identity, r = Lk, is exact attention.

Padding: where kv_lengths is given, keys and values beyond a sequence's length are set to 0 before they are mixed,
which equals to use the first columns of E and F; the mixtures stay r, and one that holds nothing still takes part in
the softmax with logit 0. A sequence of length 0 so gives out 0 and lse = log r, not −∞. Without kv_lengths nothing is
masked, as in the paper; inputs shorter than a trained E take its first Lk columns.

Source: Wang et al., arXiv 2006.04768, section 4, equation 7; sharing between heads and between keys and values: the
paragraph on parameter sharing there. Zeroed padding and E per head, shared by keys and values: the Long Range Arena
code of Skeinformer's and Nyströmformer's authors. Equation numbers and that code are recalled, not looked up.

Differs from: the package linformer, whose matrix is stored as Eᵀ (length, r) and whose share_kv takes the projected
keys themselves for values (here: pass k for v as well); a key mask, which cannot act once keys are mixed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import broadcast, concatenate, einsum, stored, transpose, where
from refattn.plan import Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants.sdpa import SDPA


@dataclass(frozen=True, kw_only=True)
class Linformer(Spec):
    """Attention over learned mixtures of keys and values.

    sharing: "none", or "kv" where values are mixed by E as well. heads: "shared", one matrix for all heads, or
    "per_head", one for each key head. scale: None is D^-1/2.
    """

    sharing: Literal["none", "kv"] = "none"
    heads: Literal["shared", "per_head"] = "shared"
    scale: float | None = None

    def __post_init__(self) -> None:
        for name, known in (("sharing", ("none", "kv")), ("heads", ("shared", "per_head"))):
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise SpecError(f"{name} is {known[0]!r} or {known[1]!r}; given: {given!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: Linformer) -> dict[str, Array]:
    """q, k, v, the mixing matrices, and the lengths of padded sequences."""
    matrix = Array("R Lk" if spec.heads == "shared" else "Hkv R Lk", role="learned")
    return {
        "q": Array("B Hq Lq D"),
        "k": Array("B Hkv Lk D"),
        "v": Array("B Hkv Lk Dv"),
        **dict.fromkeys(("E",) if spec.sharing == "kv" else ("E", "F"), matrix),
        "kv_lengths": Array("B", "int", "choice", "lengths:Lk", optional=True),
    }


def outputs(spec: Linformer) -> dict[str, Array]:
    """The mean of the mixed values, and the natural logarithm of the softmax's denominator."""
    return {"out": Array("B Hq Lq Dv"), "lse": Array("B Hq Lq")}


def resolve(spec: Linformer, sizes: Mapping[str, int]) -> Linformer:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: Linformer, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def reference(spec: Linformer, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Mixtures of the keys and values that are there, then attention over them."""
    lk = x["k"].shape[2]
    there = np.ones((1, lk), bool)
    if "kv_lengths" in x:
        there = np.arange(lk) < np.asarray(x["kv_lengths"], np.int64)[:, None]
    letters = "aj,bgjd->bgad" if spec.heads == "shared" else "gaj,bgjd->bgad"

    def mixed(matrix: Any, rows: Any) -> Any:
        found = einsum(letters, matrix, where(there[:, None, :, None], rows, 0))
        # A kernel may keep the mixtures in its storage type, and backwards their gradients.
        return stored(stored(found), cotangent=True)

    keys, values = mixed(x["E"], x["k"]), mixed(x["E" if spec.sharing == "kv" else "F"], x["v"])
    return sdpa.reference(SDPA(scale=spec.scale), {"q": x["q"], "k": keys, "v": values})


def lower(spec: Linformer, x: Mapping[str, Any], state: Any = None) -> Score:
    """Sequence by sequence the first columns of E and F times as many keys and values, then scores."""
    batch, groups, lk, _ = x["k"].shape
    lengths = np.asarray(x.get("kv_lengths", np.full(batch, lk)), np.int64)

    def mixed(matrix: Any, rows: Any) -> Any:
        columns = transpose(matrix, (1, 0) if spec.heads == "shared" else (0, 2, 1))
        columns = broadcast(columns, (groups, *columns.shape[-2:]))
        # No sequence at all is one piece too, of a batch of 0.
        pieces = list(enumerate(lengths)) or [(0, lk)]
        return concatenate(
            [einsum("bgjd,gja->bgad", rows[b : b + 1, :, :n], columns[:, :n]) for b, n in pieces], axis=0
        )

    k, v = mixed(x["E"], x["k"]), mixed(x["E" if spec.sharing == "kv" else "F"], x["v"])
    q_place, k_place = (np.zeros((1, a.shape[2]), np.int64) for a in (x["q"], k))
    return Score(q=x["q"], k=k, v=v, scale=spec.scale or 0.0, positions=(q_place, k_place))


def restrict(spec: Linformer, x: Mapping[str, Any], rows: tuple[int, ...]) -> dict[str, Any]:
    """The same problem for some query rows only."""
    return dict(x) | {"q": x["q"][:, :, list(rows)]}


def operations(spec: Linformer, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of mixing and of the two products, forward, and bytes of one float64 score matrix."""
    mixing = sizes["B"] * sizes["Hkv"] * sizes["R"] * sizes["Lk"]
    pairs = sizes["B"] * sizes["Hq"] * sizes["Lq"] * sizes["R"]
    return 2 * (mixing + pairs) * (sizes["D"] + sizes["Dv"]), 8 * pairs
