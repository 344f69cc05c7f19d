r"""Causal Transformer's attention: every stream attends to its own past, then to what each other stream was before.

    y[s]   = N(A[s,s](x[s], x[s]), x[s])                         causal self-attention of stream s
    out[s] = Σ_{t≠s} N(A[s,t](y[s], x[t]), y[s])                 keys and values: the other stream's input, not y[t]
    A[s,t](a, c)[i] = heads h side by side of  Σ_j softmax_j(scale q_i·(k_j + shaw_k[r])) (v_j + shaw_v[r]),   j ≤ i
    q = a wq[s,t,h] + bq[s,t,h],   k = c wk[s,t,h],   v = c wv[s,t,h] + bv[s,t,h],   r = clip(j − i, ±L) + L

x (B,S,Lq,E), S streams of one length; out as x; wq, wk (S,S,Hq,E,D), wv (S,S,Hq,E,Dv): [s,s] is stream s's
self-attention, [s,t] its attention to stream t; biases bq (S,S,Hq,D), bv (S,S,Hq,Dv), or absent (one of the keys would
move all scores of a row alike, which changes nothing); shaw_k (2L+1,D), shaw_v (2L+1,Dv), shared by all heads and
attentions. Heads side by side make Hq Dv = E; with final_layer=True they are projected, Σ_h · wo[s,t,h] + bo[s,t], wo
(S,S,Hq,Dv,E), bo (S,S,E) or absent, and E is free. One stream alone has out = y.

residual: N(u, a) = u + a, the query's input unprojected; else N(u, a) = u. With norm="code" too, N(u, a) is
gain[s,t] (w − mean w) / (std w + 10⁻⁶) + shift[s,t] of w = u + a, where std divides by E − 1; gain, shift (S,S,E).

active (B,S,Lq), True where a stream has an entry: its False hide query rows (active="queries": of s), key columns
("keys": of t) or both. A row that sees nothing is 0 with mask="exact". With mask="minus_1e9" all its scores are −10⁹
alike, so it is the mean over all keys, later ones included, and has no gradient through its scores; any other row gives
the masked keys e^(−10⁹), which no number format tells from the 0 that is taken here.

Source: Melnychuk, Frauen, Feuerriegel, arXiv 2204.07120, section 4 (recalled); the authors' code
Valentyn1997/CausalTransformer at 67f8789, src/models/utils_transformer.py (read): three streams or two, clip 15,
mask="minus_1e9", residual=True, norm="code", no final layer. Shaw's vectors: arXiv 1803.02155, see `shaw`.

Differs from: that code, where treatments and outcomes share one `active`, which hides query rows only, while attention
to or from the vitals hides rows by the one and columns by the other: "both" gives all of these where entries are active
up to a length. Outside: dropout, static features added to the sum, feed-forward, the mean over streams; EDCT's decoder,
whose cross-attention is not causal and counts distances (Lk − 1 − j) + i. torch's LayerNorm divides by E, eps in the
root.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import concatenate, einsum, real, reshape, sqrt, stored, total, transpose, where
from refattn.plan import Mix
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants.sdpa import SDPA
from refattn.variants.shaw import Shaw

EPS = Fraction(1, 10**6)


@dataclass(frozen=True, kw_only=True)
class CausalTransformer(Spec):
    """Attention of several streams to themselves and to each other.

    clip: the difference of positions from which on vectors are alike. mask: "exact", or "minus_1e9" where a row that
    sees nothing sees everything. active: whether entries that are not active hide "queries", "keys" or "both".
    residual, norm: what follows each attention. final_layer: heads projected instead of side by side. scale: None is
    D^-1/2.
    """

    clip: int = 15
    mask: Literal["exact", "minus_1e9"] = "exact"
    active: Literal["queries", "keys", "both"] = "queries"
    residual: bool = False
    norm: Literal["code"] | None = None
    final_layer: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        if type(self.clip) is not int or self.clip < 0:
            raise SpecError(f"clip is the largest difference told apart, an integer from 0 on; given: {self.clip!r}")
        for name, known in (("mask", ("exact", "minus_1e9")), ("active", ("queries", "keys", "both"))):
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise SpecError(f"{name} is one of {', '.join(map(repr, known))}; given: {given!r}")
        for name in ("residual", "final_layer"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"{name} is True or False; given: {getattr(self, name)!r}")
        if self.norm is not None and not (isinstance(self.norm, str) and self.norm == "code"):
            raise SpecError(f"norm is None or 'code'; given: {self.norm!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: CausalTransformer) -> dict[str, Array]:
    """The streams, their projections and tables, and which entries are active."""

    def learned(dims: str, optional: bool = False) -> Array:
        return Array(dims, role="learned", optional=optional)

    arrays = {"x": Array("B S Lq E")}
    arrays |= {f"w{name}": learned(f"S S Hq E {'Dv' if name == 'v' else 'D'}") for name in "qkv"}
    rows = 2 * spec.clip + 1
    arrays |= {"shaw_k": learned(f"{rows} D"), "shaw_v": learned(f"{rows} Dv")}
    arrays |= {"wo": learned("S S Hq Dv E"), "bo": learned("S S E", True)} if spec.final_layer else {}
    arrays |= {"gain": learned("S S E"), "shift": learned("S S E")} if spec.norm else {}
    arrays |= {"bq": learned("S S Hq D", True), "bv": learned("S S Hq Dv", True)}
    return arrays | {"active": Array("B S Lq", "bool", "choice", optional=True, broadcast=True)}


def outputs(spec: CausalTransformer) -> dict[str, Array]:
    """Every stream after both attentions; a sum of softmaxes has no lse."""
    return {"out": Array("B S Lq E")}


def resolve(spec: CausalTransformer, sizes: Mapping[str, int]) -> CausalTransformer:
    """The scale as a definite value; a norm without its sum, or of a single number, is refused."""
    if spec.norm and not spec.residual:
        raise SpecError("norm='code' normalises the sum with the query's input: set residual=True as well")
    if spec.norm and sizes["E"] < 2:
        raise ShapeError(f"norm='code' divides by E − 1, so E is 2 or more; given: E={sizes['E']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: CausalTransformer, x: Mapping[str, Any]) -> None:
    """Heads that do not make a stream's width are refused, and tables that are not finite."""
    (_, _, heads, width, dv) = x["wv"].shape
    if not spec.final_layer and width != heads * dv:
        raise ShapeError(
            f"heads side by side are a stream's width, E = Hq · Dv; given: E={width}, Hq={heads}, Dv={dv}; "
            "final_layer=True projects them to any E"
        )
    for name in ("shaw_k", "shaw_v"):
        if not np.isfinite(np.asarray(x[name], np.float64)).all():
            raise ShapeError(f"{name} must hold finite numbers; given: {x[name]}")


def reference(spec: CausalTransformer, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Stream by stream: its self-attention, then the sum over the other streams as they came in."""
    streams = range(x["x"].shape[1])
    if not streams:
        return {"out": x["x"]}
    before = [x["x"][:, s] for s in streams]
    own = [_attention(spec, x, (s, s), before[s], before[s]) for s in streams]
    found = []
    for s in streams:
        crossed = [_attention(spec, x, (s, t), own[s], before[t]) for t in streams if t != s]
        summed = sum(crossed[1:], crossed[0]) if crossed else own[s]
        found.append(reshape(summed, (summed.shape[0], 1, *summed.shape[1:])))
    return {"out": concatenate(found, axis=1)}


def _attention(spec: CausalTransformer, x: Mapping[str, Any], pair: tuple[int, int], rows: Any, read: Any) -> Any:
    """Multi-head attention of one pair of streams, and what follows it: (B,Lq,E)."""
    asks, told = (_active(x, stream) for stream in pair)
    live = np.tril(np.ones((rows.shape[1],) * 2, bool))[None, None]
    asking, reading = rows, read
    # What is hidden is never read, whatever it holds.
    if spec.active != "keys":
        live, asking = live & asks[:, None, :, None], where(asks[..., None], rows, 0)
    if spec.active != "queries":
        live = live & told[:, None, None, :]
        reading = where(told[..., None], read, 0) if spec.mask == "exact" else read

    def projected(name: str, given: Any) -> Any:
        found = einsum("ble,hed->bhld", given, x[f"w{name}"][pair])
        if f"b{name}" in x:
            bias = x[f"b{name}"][pair]
            found = found + reshape(bias, (bias.shape[0], 1, bias.shape[1]))
        # A kernel may keep projections in its storage type, and backwards their gradients.
        return stored(stored(found), cotangent=True)

    q = projected("q", asking)
    if spec.mask == "minus_1e9":
        # Scores that are all alike, of no query, over every key.
        empty = ~np.any(live, -1, keepdims=True)
        q, live = where(empty, 0, q), live | empty
    given = {"q": q, "k": projected("k", reading), "v": projected("v", reading), "mask": live}
    given |= {name: x[name] for name in ("shaw_k", "shaw_v")}
    heads = sdpa.reference(SDPA(scale=spec.scale, content=(Shaw(clip=spec.clip),)), given)["out"]
    if spec.final_layer:
        out = einsum("bhld,hde->ble", heads, x["wo"][pair])
        out = out + x["bo"][pair] if "bo" in x else out
    else:
        out = reshape(transpose(heads, (0, 2, 1, 3)), rows.shape)
    out = stored(out + rows if spec.residual else out)
    return _normed(out, x["gain"][pair], x["shift"][pair]) if spec.norm else out


def _active(x: Mapping[str, Any], stream: int) -> NDArray[np.bool_]:
    """Which entries of a stream are there, (B,Lq)."""
    return np.asarray(np.broadcast_to(x.get("active", np.True_), x["x"].shape[:3])[:, stream])


def _normed(rows: Any, gain: Any, shift: Any) -> Any:
    """Layer norm as the authors' code has it."""
    width = rows.shape[-1]
    apart = rows - total(rows, -1, keepdims=True) / width
    std = sqrt(total(apart * apart, -1, keepdims=True) / (width - 1))
    return stored(gain * (apart / (std + real(EPS, std))) + shift)


def lower(spec: CausalTransformer, x: Mapping[str, Any], state: Any = None) -> Mix:
    """The attention to other streams as a sum of scores; that of the streams to themselves is evaluated on the way."""
    from refattn.variants._causal_transformer_plan import lowered

    return lowered(spec, x)


def operations(spec: CausalTransformer, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of projections and products of S² attentions, and bytes of their float64 scores."""
    attentions, width = sizes["S"] ** 2 * sizes["B"] * sizes["Hq"] * sizes["Lq"], 2 * sizes["D"] + sizes["Dv"]
    pairs = attentions * sizes["Lq"]
    last = sizes["Dv"] if spec.final_layer else 0
    return 2 * attentions * sizes["E"] * (width + last) + 2 * pairs * (sizes["D"] + sizes["Dv"]), 8 * pairs
