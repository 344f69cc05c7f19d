r"""Infini-attention: softmax attention inside a segment, and a memory of constant size for everything before it.

    far[h,i]   = f(q[h,i]) S[g] / (f(q[h,i])·z[g]),     f(x) = elu(x) + 1,     g = h // (Hq / Hkv)
    near[h,i]  = Σ_j softmax_j(scale q[h,i]·k[g,j]) v[g,j]          over the keys of the segment up to i
    out[h,i]   = σ(gate[h]) far[h,i] + (1 − σ(gate[h])) near[h,i]

where a segment of `segment` tokens ends, its keys and values K, V are written into the memory that all of its queries
have read:

    linear     S' = S + f(K)ᵀ V,                              z' = z + Σ_t f(k_t)
    delta      S' = S + f(K)ᵀ (V − f(K) S / (f(K) z)),        z' the same

q (B,Hq,L,D); k (B,Hkv,L,D); v (B,Hkv,L,Dv); gate (Hq,). State: memory S (B,Hkv,D,Dv), weight z (B,Hkv,D), and the keys
and values of the unfinished segment, not rotated. Both are 0 at first, and an empty memory reads 0, so that the first
segment gives (1 − σ(gate)) near. The delta rule measures every error against the memory at the segment's beginning.
z grows at each repetition even where the delta rule leaves S alone, so that what is read of a binding written twice is
V, then V/2; z_update="linear_only" leaves z alone under the delta rule once the first segment has been weighed.

Neither the scale nor `rotary`, which acts inside the segment by positions that begin with it, touches what the memory
sees. Source: Munkhdalai et al., arXiv 2404.07143, equations 3 to 10 (numbers recalled, not looked up).

Differs from: the package infini-transformer-pytorch 0.2.1, whose gate weighs the local part (weighs="local"), which
returns the local part alone while the memory is empty (first="skip"), divides by at least 1e-10 (divisor="clamp"), and
can learn what share of each value is written; implementations that add to the divisor (divisor="add"), that retrieve
after the update, or that take the whole input for one segment.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import concatenate, einsum, elu1, extend, maximum, real, reshape, sigmoid, total
from refattn.plan import Mix, Recurrent
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants._segments import pieces
from refattn.variants.sdpa import SDPA

_CHOICES = {
    "update": ("linear", "delta"),
    "first": ("zero_memory", "skip"),
    "divisor": ("exact", "clamp", "add"),
    "weighs": ("memory", "local"),
    "z_update": ("always", "linear_only"),
}


@dataclass(frozen=True, kw_only=True)
class InfiniAttention(Spec):
    """Segments of softmax attention over a compressive memory.

    segment: tokens in one. update: "linear" or "delta". first: of the first segment "zero_memory", which the gate
    weighs, or "skip", the local part alone. divisor: "exact", "clamp" (at least `epsilon`) or "add" (`epsilon`).
    weighs: what σ(gate) is the share of, the "memory" or the "local" part. z_update: "always" or "linear_only".
    rotary: a term such as RoPE inside the segment. scale: None is D^-1/2.
    """

    segment: int
    update: Literal["linear", "delta"] = "linear"
    first: Literal["zero_memory", "skip"] = "zero_memory"
    divisor: Literal["exact", "clamp", "add"] = "exact"
    epsilon: float = 1e-10
    weighs: Literal["memory", "local"] = "memory"
    z_update: Literal["always", "linear_only"] = "always"
    rotary: Spec | None = None
    scale: float | None = None

    def __post_init__(self) -> None:
        if type(self.segment) is not int or self.segment < 1:
            raise SpecError(f"segment is a number of tokens from 1 on; given: {self.segment!r}")
        for name, known in _CHOICES.items():
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise SpecError(f"{name} is one of {', '.join(map(repr, known))}; given: {given!r}")
        for name in ("epsilon", "scale"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, dyadic(name, getattr(self, name)))
        if self.epsilon is None or self.epsilon <= 0:
            raise SpecError(f"epsilon is a positive number; given: {self.epsilon}")
        _local(self)


def _local(spec: InfiniAttention) -> SDPA:
    """What happens inside a segment."""
    return SDPA(causal="bottom_right", scale=spec.scale, rotary=spec.rotary)


def signature(spec: InfiniAttention) -> dict[str, Array]:
    """q, k, v, the gate, and what the rotation takes."""
    own = {"q": Array("B Hq L D"), "k": Array("B Hkv L D"), "v": Array("B Hkv L Dv")}
    own |= {"gate": Array("Hq", role="learned")}
    turned = sdpa.signature(_local(spec)).keys() - sdpa.signature(SDPA()).keys()
    return own | {name: array for name, array in sdpa.signature(_local(spec)).items() if name in turned}


def outputs(spec: InfiniAttention) -> dict[str, Array]:
    """The gated sum; there is no log-sum-exp of both parts."""
    return {"out": Array("B Hq L Dv")}


def state(spec: InfiniAttention, length: int) -> dict[str, Array]:
    """The memory, and the unfinished segment."""
    open_ = length % spec.segment
    return {
        "memory": Array("B Hkv D Dv"),
        "weight": Array("B Hkv D"),
        "k": Array(f"B Hkv {open_} D"),
        "v": Array(f"B Hkv {open_} Dv"),
    }


def resolve(spec: InfiniAttention, sizes: Mapping[str, int]) -> InfiniAttention:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    inside = {**sizes, "Lq": spec.segment, "Lk": spec.segment}
    rotary = sdpa.resolve(_local(spec), inside).rotary
    return replace(spec, scale=default if spec.scale is None else spec.scale, rotary=rotary)


def validate(spec: InfiniAttention, x: Mapping[str, Any]) -> None:
    """As for plain attention, at positions inside segments."""
    ahead = x["state_k"].shape[2] if "state_k" in x else 0
    places = (ahead + np.arange(x["q"].shape[2])) % spec.segment
    sdpa.validate(_local(spec), dict(x) | {"q_positions": places, "k_positions": places})


def _retrieve(spec: InfiniAttention, f: Any, memory: Any, weight: Any, empty: bool) -> Any:
    """What features f (B,Hkv,R,n,D) read of the memory, (B,Hkv,R,n,Dv)."""
    found = einsum("bgrid,bgdv->bgriv", f, memory)
    size = einsum("bgrid,bgd->bgri", f, weight)
    if spec.divisor == "clamp":
        size = maximum(size, real(spec.epsilon, size))
    elif spec.divisor == "add":
        size = size + real(spec.epsilon, size)
    elif empty:
        return found
    return found / reshape(size, (*size.shape, 1))


def reference(spec: InfiniAttention, x: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Piece by piece, none of which crosses a segment's end."""
    q, rest = x["q"], {name: array for name, array in x.items() if name not in ("q", "k", "v", "gate")}
    batch, heads, count, width = q.shape
    groups, dv = x["v"].shape[1], x["v"].shape[3]
    memory, weight, keys, values = (state[name] for name in ("memory", "weight", "k", "v"))
    g = reshape(sigmoid(x["gate"]), (1, heads, 1, 1))
    near_share, far_share = (1 - g, g) if spec.weighs == "memory" else (g, 1 - g)

    outs = []
    for new, there in pieces(state["length"], count, spec.segment):
        empty = state["length"] + new.stop <= spec.segment
        keys, values = extend(keys, x["k"][:, :, new], 2), extend(values, x["v"][:, :, new], 2)
        near = sdpa.reference(_local(spec), rest | {"q": q[:, :, new], "k": keys, "v": values})["out"]
        f = reshape(elu1(q[:, :, new]), (batch, groups, heads // groups, near.shape[2], width))
        far = reshape(_retrieve(spec, f, memory, weight, empty), near.shape)
        outs.append(near if empty and spec.first == "skip" else near_share * near + far_share * far)
        if there == spec.segment:
            f = elu1(keys)
            written = values
            if spec.update == "delta":
                read = _retrieve(spec, reshape(f, (batch, groups, 1, there, width)), memory, weight, empty)
                written = values - reshape(read, values.shape)
            memory = memory + einsum("bgid,bgiv->bgdv", f, written)
            if spec.update == "linear" or spec.z_update == "always" or empty:
                weight = weight + total(f, 2)
            keys, values = keys[:, :, there:], values[:, :, there:]
    carried = {"memory": memory, "weight": weight, "k": keys, "v": values}
    return {"out": concatenate(outs or [real(np.zeros((batch, heads, 0, dv)), q)], 2), "state": carried}


def lower(spec: InfiniAttention, x: Mapping[str, Any], state: Mapping[str, Any]) -> Mix:
    """No loop: attention masked by the segments' numbers, and one recurrence over the keys that are there."""
    k, v = (concatenate([state[name], x[name]], 2) for name in ("k", "v"))
    count, ahead = x["q"].shape[2], state["k"].shape[2]
    place = np.arange(ahead + count)
    number, inside = place // spec.segment, place % spec.segment
    rest = {name: array for name, array in x.items() if name not in ("q", "k", "v", "gate")}
    rest |= {"q": x["q"], "k": k, "v": v, "q_segment_ids": number[ahead:], "k_segment_ids": number}
    near = sdpa.lower(_local(spec), rest | {"q_positions": inside[ahead:], "k_positions": inside})
    far = Recurrent(
        q=elu1(x["q"]),
        k=elu1(k),
        v=v,
        memory=state["memory"],
        weight=state["weight"],
        segment=spec.segment,
        delta=spec.update == "delta",
        weighed=spec.update == "linear" or spec.z_update == "always",
        clamp=spec.epsilon if spec.divisor == "clamp" else 0.0,
        add=spec.epsilon if spec.divisor == "add" else 0.0,
    )
    g = reshape(sigmoid(x["gate"]), (x["gate"].shape[0], 1, 1))
    shares = (1 - g, g) if spec.weighs == "memory" else (g, 1 - g)
    if spec.first == "skip":
        alone = real(((state["length"] + np.arange(count))[:, None] < spec.segment) * 1, g)
        shares = (alone + (1 - alone) * shares[0], (1 - alone) * shares[1])
    return Mix(parts=(near, far), weights=shares)


def operations(spec: InfiniAttention, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of scores, reading and writing, forward; bytes of one segment's float64 scores."""
    rows = sizes["B"] * sizes["Hq"] * sizes["L"]
    width, inside = sizes["D"] + sizes["Dv"], min(spec.segment, sizes["L"])
    writing = 2 * sizes["B"] * sizes["Hkv"] * sizes["L"] * sizes["D"] * sizes["Dv"]
    return 2 * rows * (inside * width + sizes["D"] * sizes["Dv"]) + writing, 8 * sizes["B"] * sizes["Hq"] * inside**2
