r"""DBA, dynamic bilinear low-rank attention: a RECONSTRUCTION from its abstract, not the authors' own method.

Confidence is low. No public implementation was found, and of the paper only the abstract was read. That says: the
sequence is compressed by matrices that depend on the input, the width by a projection in the manner of Johnson and
Lindenstrauss, the two are joined bilinearly, time and memory are linear in the length. Everything else is this
project's convention "dba_recon_v1", which the option `convention` names so that no file can be taken for the authors':

    A(x, y) = softmax over the rows of y of  scale (x R)(y R)ᵀ
    P_k = A(Z, k),   K' = P_k k,   V' = P_k v                           for each key head, over the keys that are there
    form="key_side":   out = A(q, K') V'
    form="two_sided":  out = A(q, Z) A(Z, K') V'
    lse[h,i] = log of the denominator of row i of A(q, ·), the softmax that is the query's own

q (B,Hq,Lq,D); k (B,Hkv,Lk,D); v (B,Hkv,Lk,Dv); latents Z (Hkv,P,D), one set for each key head, which compress its keys;
R (D,Dr), shared by all heads, learned or drawn with entries N(0, 1/Dr); query head h reads key head h // (Hq / Hkv).
The scale is Dr^-1/2 unless given. Cost O((Lq + Lk) P (D + Dv)).

Padding: keys beyond kv_lengths have no weight in P_k. Where a sequence has no key at all, K' and V' are 0, so that out
is 0; lse is then log P for key_side, and for two_sided what it always is, for there it reads q, Z and R alone.
There is no causal form: every latent holds keys of all positions.

R = I and latents so far apart that P_k is the identity give exact attention for key_side.

Source: Qin et al., arXiv 2211.16368, abstract only. The form with latents, both sides of it, the shared R and the place
of the scale are recalled from no text: they are this project's own.

Differs from: in all likelihood, the authors' DBA; Linformer, whose matrices are parameters and depend on no input;
Perceiver, whose latents are updated and then attended to without returning to the queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import broadcast, concatenate, einsum, exp, real, row_max, stored, total, where
from refattn.plan import Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants.sdpa import SDPA


@dataclass(frozen=True, kw_only=True)
class DBA(Spec):
    """A reconstruction of dynamic bilinear low-rank attention.

    convention: "dba_recon_v1", the only one, says that it is one. form: "key_side" compresses keys and values,
    "two_sided" queries too. scale: None is Dr^-1/2.
    """

    convention: Literal["dba_recon_v1"] = "dba_recon_v1"
    form: Literal["key_side", "two_sided"] = "key_side"
    scale: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.convention, str) or self.convention != "dba_recon_v1":
            raise SpecError(
                f"convention is 'dba_recon_v1', a reconstruction; the authors' form is not known; "
                f"given: {self.convention!r}"
            )
        if not isinstance(self.form, str) or self.form not in ("key_side", "two_sided"):
            raise SpecError(f"form is 'key_side' or 'two_sided'; given: {self.form!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: DBA) -> dict[str, Array]:
    """q, k, v, the latents, the projection, and the lengths of padded sequences."""
    return {
        "q": Array("B Hq Lq D"),
        "k": Array("B Hkv Lk D"),
        "v": Array("B Hkv Lk Dv"),
        "Z": Array("Hkv P D", role="learned"),
        "R": Array("D Dr", role="learned"),
        "kv_lengths": Array("B", "int", "choice", "lengths:Lk", optional=True),
    }


def outputs(spec: DBA) -> dict[str, Array]:
    """The mean of means, and the natural logarithm of the denominator of the query's softmax."""
    return {"out": Array("B Hq Lq Dv"), "lse": Array("B Hq Lq")}


def resolve(spec: DBA, sizes: Mapping[str, int]) -> DBA:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["Dr"]) if sizes["Dr"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: DBA, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def reference(spec: DBA, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Attention from latents to keys, from latents or queries to what they found, and from queries to latents."""
    (batch, groups, lk, width), latents = x["k"].shape, x["Z"].shape[1]
    padding = {"kv_lengths": x["kv_lengths"]} if "kv_lengths" in x else {}
    there = np.arange(lk) < np.asarray(x.get("kv_lengths", [lk]), np.int64)[:, None]
    k, v = (where(there[:, None, :, None], x[name], 0) for name in "kv")

    def kept(rows: Any) -> Any:
        # A kernel may keep what is projected or compressed in its storage type, and backwards its gradient.
        return stored(stored(rows), cotangent=True)

    def projected(rows: Any) -> Any:
        return kept(einsum("bhid,de->bhie", rows, x["R"]))

    def attend(q: Any, k: Any, v: Any, **more: Any) -> dict[str, Any]:
        return sdpa.reference(SDPA(scale=spec.scale), {"q": q, "k": k, "v": v} | more)

    q, z = projected(x["q"]), projected(broadcast(x["Z"], (batch, groups, latents, width)))
    compressed = kept(attend(z, projected(k), concatenate([k, v], -1), **padding)["out"])
    k, v = projected(compressed[..., :width]), compressed[..., width:]
    if spec.form == "key_side":
        return attend(q, k, v)
    return attend(q, z, kept(attend(z, k, v)["out"]))


def lower(spec: DBA, x: Mapping[str, Any], state: Any = None) -> Score:
    """Sequence by sequence weights of the keys that are there; P_k (k R) for (P_k k) R; then scores."""
    (batch, groups, lk, _), latents = x["k"].shape, x["Z"].shape[1]
    lengths = np.asarray(x.get("kv_lengths", np.full(batch, lk)), np.int64)
    zr = einsum("gad,de->gae", x["Z"], x["R"])

    def weights(keys: Any) -> Any:
        """Of each latent on projected keys (B,Hkv,L,Dr)."""
        s = real(spec.scale, zr) * einsum("gae,bgje->bgaj", zr, keys)
        e = exp(s - row_max(s, np.ones(s.shape, bool)))
        return e / total(e, -1, keepdims=True)

    pieces = []
    # No sequence at all is one piece too, of a batch of 0.
    for b, n in list(enumerate(lengths)) or [(0, lk)]:
        keys = einsum("bgjd,de->bgje", x["k"][b : b + 1, :, :n], x["R"])
        rows = concatenate([keys, x["v"][b : b + 1, :, :n]], -1)
        pieces.append(einsum("bgaj,bgjd->bgad", weights(keys), rows))
    compressed, reduced = concatenate(pieces, 0), x["R"].shape[1]
    k, v = compressed[..., :reduced], compressed[..., reduced:]
    if spec.form == "two_sided":
        k, v = broadcast(zr, (batch, groups, latents, reduced)), einsum("bgaj,bgjd->bgad", weights(k), v)
    q = einsum("bhid,de->bhie", x["q"], x["R"])
    q_place, k_place = (np.zeros((1, a.shape[2]), np.int64) for a in (q, k))
    return Score(q=q, k=k, v=v, scale=spec.scale or 0.0, positions=(q_place, k_place))


def restrict(spec: DBA, x: Mapping[str, Any], rows: tuple[int, ...]) -> dict[str, Any]:
    """The same problem for some query rows only."""
    return dict(x) | {"q": x["q"][:, :, list(rows)]}


def operations(spec: DBA, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of projections and products, forward, and bytes of the larger float64 score matrix."""
    batch, queries, keys = sizes["B"], sizes["Hq"] * sizes["Lq"], sizes["Hkv"] * sizes["Lk"]
    latents, width, reduced, dv = (sizes[name] for name in ("P", "D", "Dr", "Dv"))
    of_latents = sizes["Hkv"] * latents
    projections = (batch * (queries + keys + of_latents) + of_latents) * width * reduced
    products = keys * latents * (reduced + width + dv) + queries * latents * (reduced + dv)
    if spec.form == "two_sided":
        products += of_latents * latents * (reduced + dv)
    return 2 * (projections + batch * products), 8 * batch * latents * max(queries, keys)
