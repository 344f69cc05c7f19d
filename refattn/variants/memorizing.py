r"""Memorizing attention: softmax inside a segment, and over the nearest of the keys that earlier segments have left.

    found[h,i]  = the `top` largest of q[h,i]·m[g,t] over the keys m[g,t] of the memory,     g = h // (Hq / Hkv)
    near[h,i]   = Σ_j softmax_j(a[h] q[h,i]·k[g,j] + bias) v[g,j]     over the keys of the segment up to i
    far[h,i]    = Σ_t softmax_t(a[h] q[h,i]·m[g,t]) u[g,t]            over found[h,i], m and u the keys and values kept
    out[h,i]    = σ(gate[h]) far[h,i] + (1 − σ(gate[h])) near[h,i]                            combine="gated"
    out[h,i], lse[h,i] = one softmax over the keys of far and of near together                combine="joint"

q (B,Hq,L,D); k (B,Hkv,L,D); v (B,Hkv,L,Dv); gate (Hq,). Where a segment of `segment` tokens ends, its keys and values,
which all of its queries have not seen in the memory, go there; of more than `memory` tokens the oldest leave. Written
keys and values are detached: no gradient reaches the token that left them, though one reaches a given state. Nothing
found gives far 0, so that the first segment has (1 − σ(gate)) near, or in the joint form near.

a is `scale`. normalise: q and k are divided by √(|·|² + epsilon) first, in both parts, a[h] = scale |sharpness[h]|, or
scale e^sharpness[h] (temperature="exponential"), sharpness (Hq,), and the scale is 1 unless given. The choice is made
by products before a. bias: terms such as T5 in the near part; what was retrieved has no position.
selection="bucketed": token t of the stream lies in bucket t mod top, and each bucket gives its largest.

indices (B,Hq,L,top): the tokens found, by their place in the stream from 0, the largest product first, of equals the
oldest (bucketed: by bucket); −1 where there are fewer. margin (B,Hq,L): the least product found minus the largest left
(the least margin of a bucket), 0 where none is left; a kernel may find another key only where it is off by so much.
State: memory_k and memory_v, at most `memory` tokens, and k, v of the unfinished segment; keys normalised.

Source: Wu et al., arXiv 2203.08913, section 3; there top is 32, or 128. Normalisation, |sharpness|, epsilon 1e-6 in the
root, detached writes, the gate's bias and the buckets: the authors' code, google-research/meliad at cc1aef5 (read).

Differs from: that code, which also lets the near part see the segment before, counts slots not yet written as keys of
logit 0 and value 0, and where products tie averages them; the package memorizing-transformers-pytorch 0.4.1
(combine="joint", temperature="exponential", one key head), whose search is approximate and whose memory empties when it
is full; memories shared by the sequences of a batch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import (
    absolute,
    concatenate,
    exp,
    extend,
    real,
    reshape,
    sigmoid,
    sqrt,
    stop,
    stored,
    total,
)
from refattn.plan import Merge, Mix, Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants._nearest import Chosen, above_threshold, nearest, nearest_of_buckets, products
from refattn.variants._place import place
from refattn.variants._segments import pieces
from refattn.variants.sdpa import SDPA

_CHOICES = {
    "combine": ("gated", "joint"),
    "selection": ("exact", "bucketed"),
    "temperature": ("absolute", "exponential"),
}


@dataclass(frozen=True, kw_only=True)
class Memorizing(Spec):
    """Segments of softmax attention beside the nearest of the keys before them.

    segment: tokens in one. memory: tokens kept. top: how many are found. combine: "gated" or "joint". selection:
    "exact" or "bucketed". normalise: keys and queries, with a learned temperature, "absolute" or "exponential";
    epsilon: what is added under the root. bias: terms of the near part. scale: None is D^-1/2, or 1 if normalised.
    """

    segment: int
    memory: int
    top: int
    combine: Literal["gated", "joint"] = "gated"
    selection: Literal["exact", "bucketed"] = "exact"
    normalise: bool = False
    temperature: Literal["absolute", "exponential"] = "absolute"
    epsilon: float = 1e-6
    bias: tuple[Spec, ...] = ()
    scale: float | None = None

    def __post_init__(self) -> None:
        for name in ("segment", "memory", "top"):
            given = getattr(self, name)
            if type(given) is not int or given < 1:
                raise SpecError(f"{name} is a number of tokens from 1 on; given: {given!r}")
        for name, known in _CHOICES.items():
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise SpecError(f"{name} is one of {', '.join(map(repr, known))}; given: {given!r}")
        if type(self.normalise) is not bool:
            raise SpecError(f"normalise is False or True; given: {self.normalise!r}")
        object.__setattr__(self, "epsilon", dyadic("epsilon", self.epsilon))
        if self.epsilon < 0:
            raise SpecError(f"epsilon is a number from 0 on; given: {self.epsilon}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))
        object.__setattr__(self, "bias", _near(self).bias)


def _near(spec: Memorizing) -> SDPA:
    """What happens inside a segment."""
    return SDPA(causal="bottom_right", scale=spec.scale, bias=spec.bias)


def signature(spec: Memorizing) -> dict[str, Array]:
    """q, k, v, the gate or not, the temperatures or not, and what the bias takes."""
    own = {"q": Array("B Hq L D"), "k": Array("B Hkv L D"), "v": Array("B Hkv L Dv")}
    learned = {"gate": spec.combine == "gated", "sharpness": spec.normalise}
    own |= {name: Array("Hq", role="learned") for name, there in learned.items() if there}
    taken = sdpa.signature(_near(spec)).items()
    return own | {name: array for name, array in taken if name not in sdpa.signature(SDPA())}


def outputs(spec: Memorizing) -> dict[str, Array]:
    """The attention, the tokens found, and by how much."""
    own = {"out": Array("B Hq L Dv")} | ({"lse": Array("B Hq L")} if spec.combine == "joint" else {})
    return own | {"indices": Array(f"B Hq L {spec.top}", "int"), "margin": Array("B Hq L")}


def state(spec: Memorizing, length: int) -> dict[str, Array]:
    """The memory, and the unfinished segment."""
    open_ = length % spec.segment
    kept = min(spec.memory, length - open_)
    return {
        "memory_k": Array(f"B Hkv {kept} D"),
        "memory_v": Array(f"B Hkv {kept} Dv"),
        "k": Array(f"B Hkv {open_} D"),
        "v": Array(f"B Hkv {open_} Dv"),
    }


def resolve(spec: Memorizing, sizes: Mapping[str, int]) -> Memorizing:
    """The scale as a definite value; heads that do not divide are refused."""
    inside = {**sizes, "Lq": spec.segment, "Lk": spec.segment}
    bias = sdpa.resolve(_near(spec), inside).bias
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] and not spec.normalise else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale, bias=bias)


def validate(spec: Memorizing, x: Mapping[str, Any]) -> None:
    """Only finite products have a rank, and only what has a length a direction."""
    for name in ("q", "k", "state_k", "state_memory_k"):
        if name not in x:
            continue
        rows = np.asarray(x[name], np.float64)
        if not np.isfinite(rows).all():
            raise ShapeError(f"{name} must hold finite numbers, for keys are ranked by their products with queries")
        if spec.normalise and not spec.epsilon and name in ("q", "k") and not np.any(rows, -1).all():
            raise ShapeError(f"{name} holds a row of zeros, which has no direction: give an epsilon above 0")
    sdpa.validate(_near(spec), x)


def _scored(spec: Memorizing, x: Mapping[str, Any]) -> tuple[Any, Any, Any, Any]:
    """Queries and keys as they are scored, the length of queries (B,Hq,L,1) and the temperature of each head, or 1."""
    if not spec.normalise:
        return x["q"], x["k"], 1, 1
    q_size, k_size = (
        sqrt(total(rows * rows, -1, keepdims=True) + real(spec.epsilon, rows)) for rows in (x["q"], x["k"])
    )
    sharpness = reshape(x["sharpness"], (x["q"].shape[1], 1, 1))
    heat = absolute(sharpness) if spec.temperature == "absolute" else exp(sharpness)
    return x["q"] / q_size, x["k"] / k_size, q_size, heat


def _kept(spec: Memorizing, rows: Any) -> Any:
    """A kernel may keep normalised rows in its storage type, and backwards their gradients; it ranks them before."""
    return stored(stored(rows), cotangent=True) if spec.normalise else rows


def reference(spec: Memorizing, x: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Piece by piece, none of which crosses a segment's end."""
    batch, heads, count, _ = x["q"].shape
    q, k, size, heat = _scored(spec, x)
    memory_k, memory_v, keys, values = (state[name] for name in ("memory_k", "memory_v", "k", "v"))
    learned = {name: array for name, array in x.items() if name not in ("q", "k", "v")}

    found: dict[str, list[Any]] = {name: [] for name in outputs(spec)}
    # No token at all is one piece too, of none.
    for new, there in list(pieces(state["length"], count, spec.segment)) or [(slice(0, 0), keys.shape[2])]:
        keys, values = extend(keys, k[:, :, new], 2), extend(values, x["v"][:, :, new], 2)
        first = state["length"] + new.stop - there - memory_k.shape[2]
        # A query's length ranks nothing: without it, equal products of given keys are equal to the last bit.
        s = products(x["q"][:, :, new], memory_k)
        chosen = nearest(s, spec.top) if spec.selection == "exact" else nearest_of_buckets(s, spec.top, first)
        near = learned | {"q": _kept(spec, q[:, :, new]) * heat, "k": _kept(spec, keys), "v": values}
        answer = _combined(spec, near, _kept(spec, memory_k), memory_v, chosen)
        answer |= {"indices": np.where(chosen.indices < 0, -1, chosen.indices + first), "margin": chosen.margin}
        for name, part in answer.items():
            found[name].append(part)
        if there == spec.segment:
            memory_k, memory_v = extend(memory_k, stop(keys), 2), extend(memory_v, stop(values), 2)
            over = max(memory_k.shape[2] - spec.memory, 0)
            memory_k, memory_v = memory_k[:, :, over:], memory_v[:, :, over:]
            keys, values = keys[:, :, there:], values[:, :, there:]
    carried = {"memory_k": memory_k, "memory_v": memory_v, "k": keys, "v": values}
    whole = {name: concatenate(parts, 2) for name, parts in found.items()}
    if spec.normalise:
        whole["margin"] = whole["margin"] / reshape(size, whole["margin"].shape)
    return whole | {"state": carried}


def _combined(spec: Memorizing, near: dict[str, Any], far_k: Any, far_v: Any, chosen: Chosen) -> dict[str, Any]:
    """Both parts by the gate, or one softmax over both."""
    if spec.combine == "gated":
        far = {"q": near["q"], "k": far_k, "v": far_v, "mask": chosen.live}
        g = reshape(sigmoid(near["gate"]), (1, chosen.live.shape[1], 1, 1))
        local = sdpa.reference(_near(spec), near)["out"]
        return {"out": (1 - g) * local + g * sdpa.reference(SDPA(scale=spec.scale), far)["out"]}
    at = place("bottom_right", near)
    shape = (*chosen.live.shape[:3], near["k"].shape[2])
    seen, bias = np.broadcast_to(at.j <= at.i, shape), real(np.zeros(shape), near["q"])
    for term in spec.bias:
        logits, allowed = sys.modules[type(term).__module__].term(term, near, at)
        bias = bias if logits is None else bias + logits
        seen = seen if allowed is None else seen & allowed
    both = {
        "q": near["q"],
        "k": concatenate([far_k, near["k"]], 2),
        "v": concatenate([far_v, near["v"]], 2),
        "mask": np.concatenate([chosen.live, seen], -1),
    }
    if spec.bias:
        both["bias"] = concatenate([real(np.zeros(chosen.live.shape), bias), bias], 3)
    return sdpa.reference(SDPA(scale=spec.scale), both)


def lower(spec: Memorizing, x: Mapping[str, Any], state: Mapping[str, Any]) -> Mix | Merge:
    """No loop: attention masked by the segments' numbers, and over all keys by who is found among those in reach."""
    q, k, _, heat = _scored(spec, x)
    ahead, behind = state["k"].shape[2], state["memory_k"].shape[2]
    begin = state["length"] - ahead - behind
    token = begin + np.arange(behind + ahead + q.shape[2])
    rows, number = token[behind + ahead :], token // spec.segment
    rest = {name: array for name, array in x.items() if name not in ("q", "k", "v")}
    rest |= {"q": q * heat, "k": concatenate([state["k"], k], 2), "v": concatenate([state["v"], x["v"]], 2)}
    rest |= {"q_segment_ids": number[behind + ahead :], "k_segment_ids": number[behind:]}
    near = sdpa.lower(_near(spec), rest | {"q_positions": rows, "k_positions": token[behind:]})

    far_k = concatenate([state["memory_k"], stop(rest["k"])], 2)
    far_v = concatenate([state["memory_v"], stop(rest["v"])], 2)
    start = (rows - rows % spec.segment)[:, None]
    reach = (token < start) & (token >= start - spec.memory)
    keys = np.repeat(np.asarray(stop(far_k)), q.shape[1] // max(far_k.shape[1], 1), 1)
    s = np.asarray(stop(x["q"])) @ np.swapaxes(keys, 2, 3)
    if spec.selection == "exact":
        found = above_threshold(s, np.broadcast_to(reach, s.shape), spec.top)
    else:
        found = np.zeros(s.shape, bool)
        for bucket in range(spec.top):
            found |= above_threshold(s, np.broadcast_to(reach & (token % spec.top == bucket), s.shape), 1)
    nowhere = np.zeros((1, len(rows)), np.int64), np.zeros((1, len(token)), np.int64)
    far = Score(q=rest["q"], k=far_k, v=far_v, scale=spec.scale or 0.0, positions=nowhere, mask=found)
    if spec.combine == "joint":
        return Merge(parts=(near, far))
    g = reshape(sigmoid(x["gate"]), (q.shape[1], 1, 1))
    return Mix(parts=(near, far), weights=(1 - g, g))


def operations(spec: Memorizing, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of products with segment and memory, and of values; bytes of one segment's scores."""
    inside, kept = min(spec.segment, sizes["L"]), min(spec.memory, sizes["L"])
    rows, found = sizes["B"] * sizes["Hq"] * sizes["L"], min(spec.top, kept)
    work = 2 * rows * ((inside + kept) * sizes["D"] + (inside + found) * sizes["Dv"])
    return work, 8 * sizes["B"] * sizes["Hq"] * inside * (inside + kept)
