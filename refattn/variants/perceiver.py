r"""Perceiver: a few latents attend to a large array, whose positions are Fourier features.

    y_j = array_j ++ γ(j),    γ(j) = for each axis: sin(π f_1 p), ..., sin(π f_K p), cos(π f_1 p), ..., cos(π f_K p), p
    f_k linear from 1 to μ/2,     p linear from −1 to 1 along the axis
    q = LN(latents) W_q,  k = LN(y) W_k,  v = LN(y) W_v,     out[h,i] = Σ_j softmax_j(scale q[h,i]·k[h,j]) v[h,j]

latents (B,Lq,E); array (B,Lk,C), pixels of the `axes` row by row; W_q (Hq,E,D); W_k (Hq,F,D); W_v (Hq,F,Dv); F is C and
the features, 2K + 1 for each axis; without axes there are none and F is C. mask (B,Lk): True may be attended to. out
(B,Hq,Lq,Dv); lse (B,Hq,Lq). An axis of one pixel has p = −1, and one band f = 1. The arguments are rational multiples
of π and reduced as such. LN, where norm="layer", is (y − mean) / √(variance + eps) · gain + bias over channels, with
gains and biases of its own on either side: latent_gain, latent_bias (E) and array_gain, array_bias (F).

inverted: the latents compete for each pixel, as the slots of slot attention do, and each latent's weights are then
divided by their sum:

    a_ij = exp(s_ij) / Σ_i' exp(s_i'j),   mass_i = Σ_j a_ij,   out_i = Σ_j a_ij v_j / max(mass_i, floor),  lse = ln mass

With floor 0 this is the softmax over j of s_ij − c_j, c_j the log-sum-exp of pixel j over the latents: attention with a
bias for each key. What is masked is 0 before it is projected; latents that see nothing have out 0 and lse −∞.

Source: Jaegle et al., arXiv 2103.03206, sections 3.1 and 3.2 (as recalled); the order of the features, K = 6, μ = 10
and the inverted form: the package perceiver-pytorch; Locatello et al., arXiv 2006.15055 (slot attention, as recalled).

Differs from: perceiver-pytorch's inverted form, whose sum is at least 1e-8 (floor=1e-8), and its plain one, where a
latent that sees nothing has the mean of all values; transformers' Perceiver, whose features are p of every axis first,
then all sines, then all cosines, with μ the size of each axis; slot attention's code, which adds 1e-8 to each a_ij.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from math import prod
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import (
    broadcast,
    concatenate,
    cos_pi,
    einsum,
    exp,
    log,
    minimum,
    real,
    reshape,
    row_max,
    sin_pi,
    softmax_attend,
    sqrt,
    stored,
    take,
    total,
    transpose,
    where,
)
from refattn.plan import Dense, Mix, Plan, Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants.sdpa import SDPA


@dataclass(frozen=True, kw_only=True)
class Perceiver(Spec):
    """Cross-attention from latents to an array.

    norm: None, or "layer" on both sides, with `eps` in the root. axes: sizes of the array's axes, whose positions are
    appended as Fourier features of so many `bands` up to half of `max_frequency`; None appends nothing. inverted:
    softmax over the latents, then weights that sum to 1 over the keys, their sum no less than `floor`. scale: None is
    D^-1/2.
    """

    norm: Literal["layer"] | None = None
    eps: float = 1e-5
    axes: tuple[int, ...] | None = None
    bands: int = 6
    max_frequency: float = 10.0
    inverted: bool = False
    floor: float = 0.0
    scale: float | None = None

    def __post_init__(self) -> None:
        if self.norm is not None and not (isinstance(self.norm, str) and self.norm == "layer"):
            raise SpecError(f"norm is 'layer' or None; given: {self.norm!r}")
        if self.axes is not None and not (
            isinstance(self.axes, tuple) and self.axes and all(type(n) is int and n > 0 for n in self.axes)
        ):
            raise SpecError(f"axes is a tuple of sizes from 1 on, or None; given: {self.axes!r}")
        if type(self.bands) is not int or self.bands < 1:
            raise SpecError(f"bands is an integer from 1 on; given: {self.bands!r}")
        if type(self.inverted) is not bool:
            raise SpecError(f"inverted is True or False; given: {self.inverted!r}")
        for name in ("eps", "max_frequency", "floor", "scale"):
            if getattr(self, name) is not None or name != "scale":
                object.__setattr__(self, name, dyadic(name, getattr(self, name)))
        for name in ("eps", "max_frequency"):
            if getattr(self, name) <= 0:
                raise SpecError(f"{name} is a positive number; given: {getattr(self, name)}")
        if self.floor < 0 or (self.floor and not self.inverted):
            raise SpecError(f"floor is 0, or a positive number where inverted=True; given: {self.floor}")

    @property
    def channels(self) -> int:
        """How many features are appended."""
        return len(self.axes or ()) * (2 * self.bands + 1)


def signature(spec: Perceiver) -> dict[str, Array]:
    """Latents, array and projections, and what the norm has learned."""
    full = "C" if spec.axes is None else "F"
    found = {
        "latents": Array("B Lq E"),
        "array": Array("B Lk C"),
        "wq": Array("Hq E D", role="learned"),
        "wk": Array(f"Hq {full} D", role="learned"),
        "wv": Array(f"Hq {full} Dv", role="learned"),
        "mask": Array("B Lk", "bool", "choice", optional=True),
    }
    if spec.norm is not None:
        sides = (("latent", "E"), ("array", full))
        found |= {f"{side}_{n}": Array(dim, role="learned") for side, dim in sides for n in ("gain", "bias")}
    return found


def outputs(spec: Perceiver) -> dict[str, Array]:
    """The mean of the values; the logarithm of the softmax's denominator or, inverted, of what a latent has won."""
    return {"out": Array("B Hq Lq Dv"), "lse": Array("B Hq Lq")}


def resolve(spec: Perceiver, sizes: Mapping[str, int]) -> Perceiver:
    """The scale as a definite value; axes that are not the array's, or features without weights, are refused."""
    if spec.axes is not None:
        if prod(spec.axes) != sizes["Lk"]:
            raise ShapeError(f"axes {spec.axes} have {prod(spec.axes)} pixels in all; given: Lk={sizes['Lk']}")
        if sizes["F"] != sizes["C"] + spec.channels:
            raise ShapeError(
                f"wk and wv take C channels and {spec.channels} features, 2·{spec.bands} + 1 for each axis: "
                f"F = {sizes['C'] + spec.channels}; given: F={sizes['F']}"
            )
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: Perceiver, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def reference(spec: Perceiver, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Features, norms and projections, then attention over the pixels or first over the latents."""
    batch, pixels = x["array"].shape[:2]
    mask = x.get("mask", np.ones((batch, pixels), bool))
    rows = where(mask[..., None], x["array"], 0)
    if spec.axes is not None:
        places = stored(features(spec, rows))
        rows = concatenate([rows, broadcast(places, (batch, *places.shape))], -1)
    latents = x["latents"]
    if spec.norm is not None:
        latents = _normalised(spec, latents, x["latent_gain"], x["latent_bias"])
        rows = _normalised(spec, rows, x["array_gain"], x["array_bias"])
    # A kernel may keep what is projected in its storage type.
    q, k, v = (
        stored(stored(einsum("ble,hed->bhld", a, x[w])), cotangent=True)
        for a, w in ((latents, "wq"), (rows, "wk"), (rows, "wv"))
    )
    live = mask[:, None, None]
    if not spec.inverted:
        return sdpa.reference(SDPA(scale=spec.scale), {"q": q, "k": k, "v": v, "mask": live})
    s = real(spec.scale, q) * einsum("bhid,bhjd->bhij", q, k)
    out, lse = softmax_attend(_log_shares(s, live), live, v)
    if spec.floor:
        mass = exp(where(np.any(live, -1), lse, 0))
        out = out * reshape(minimum(mass / real(spec.floor, mass), 1), (*mass.shape, 1))
    return {"out": out, "lse": lse}


def _log_shares(s: Any, live: Any) -> Any:
    """Logarithm of what each latent has of each pixel: s less its log-sum-exp over the latents."""
    batch, heads, latents, pixels = s.shape
    no_values = real(np.zeros((batch, heads, latents, 0)), s)
    _, lse = softmax_attend(transpose(s, (0, 1, 3, 2)), np.swapaxes(live, 2, 3), no_values)
    return s - reshape(where(live[:, :, 0], lse, 0), (batch, heads, 1, pixels))


def _normalised(spec: Perceiver, rows: Any, gain: Any, bias: Any) -> Any:
    """Layer norm over the last axis."""
    width = max(rows.shape[-1], 1)
    centred = rows - total(rows, -1, keepdims=True) / width
    variance = total(centred * centred, -1, keepdims=True) / width
    return stored(centred / sqrt(variance + real(spec.eps, rows)) * gain + bias)


def features(spec: Perceiver, like: Any) -> Any:
    """Fourier features (Lk, F − C) of every pixel, in the space of `like`."""
    axes = spec.axes or ()
    places = np.indices(axes).reshape(len(axes), -1)
    return concatenate([take(_axis(spec, n, like), at, 0) for n, at in zip(axes, places, strict=True)], -1)


def _axis(spec: Perceiver, size: int, like: Any) -> Any:
    """Features (size, 2K + 1) along one axis."""
    p = np.array([Fraction(2 * i, size - 1) - 1 if size > 1 else Fraction(-1) for i in range(size)], object)
    step = (Fraction(spec.max_frequency) / 2 - 1) / max(spec.bands - 1, 1)
    turns = np.multiply.outer(p, np.array([1 + k * step for k in range(spec.bands)], object))
    plain = real(2 * np.arange(size) - max(size - 1, 1), like) / max(size - 1, 1)
    return concatenate([sin_pi(turns, like), cos_pi(turns, like), reshape(plain, (size, 1))], -1)


def lower(spec: Perceiver, x: Mapping[str, Any], state: Any = None) -> Plan:
    """Norms folded into the projections; inverted, a log-sum-exp over the latents as a bias, the floor as a weight."""
    batch, pixels = x["array"].shape[:2]
    mask = x.get("mask", np.ones((batch, pixels), bool))
    pieces = [where(mask[..., None], x["array"], 0)]
    for axis, size in enumerate(spec.axes or ()):
        after = prod((spec.axes or ())[axis + 1 :])
        waves = _waves(spec, size, x["array"])
        pieces.append(reshape(take(waves, np.arange(pixels) // after % size, 0), (1, pixels, waves.shape[1])))
    q = _folded(spec, [x["latents"]], x, "latent", "wq")
    k, v = (_folded(spec, pieces, x, "array", w) for w in ("wk", "wv"))
    i, j = (np.zeros((1, a.shape[2]), np.int64) for a in (q, k))
    score = Score(q=q, k=k, v=v, scale=spec.scale or 0.0, positions=(i, j), mask=mask[:, None, None])
    if not spec.inverted:
        return score
    s = real(spec.scale, q) * einsum("bhjd,bhid->bhji", k, q)
    top = row_max(s, np.ones(s.shape, bool))
    # A pixel that no latent is there for has nothing to take the logarithm of.
    taken = log(total(exp(s - top), -1, keepdims=True) + int(s.shape[-1] == 0)) + top
    score = replace(score, bias=(Dense(values=transpose(-taken, (0, 1, 3, 2))),))
    if not spec.floor:
        return score
    mass = total(where(mask[:, None, :, None], exp(s - taken), 0), 2)
    weight = minimum(mass / real(spec.floor, mass), 1)
    return Mix(parts=(score,), weights=(reshape(weight, (*weight.shape, 1)),))


def _folded(spec: Perceiver, pieces: Sequence[Any], x: Mapping[str, Any], side: str, name: str) -> Any:
    """W (LN rows), rows in pieces: (W' rows − mean Σ W') / σ + W bias, where W' = gain W."""
    edges = np.cumsum([0, *(piece.shape[-1] for piece in pieces)]).tolist()

    def projected(matrix: Any) -> Any:
        parts = [einsum("ble,hed->bhld", a, matrix[:, m:n]) for a, m, n in zip(pieces, edges, edges[1:], strict=False)]
        return sum(parts[1:], parts[0])

    if spec.norm is None:
        return projected(x[name])
    width, heads = max(edges[-1], 1), x[name].shape[0]
    mean = sum((total(a, -1, keepdims=True) for a in pieces[1:]), total(pieces[0], -1, keepdims=True)) / width
    squares = [total((a - mean) * (a - mean), -1) for a in pieces]
    sigma = sqrt(sum(squares[1:], squares[0]) / width + real(spec.eps, mean))
    matrix = reshape(x[f"{side}_gain"], (1, edges[-1], 1)) * x[name]
    batch, length = sigma.shape
    middle = reshape(mean, (batch, 1, length, 1)) * reshape(total(matrix, 1), (1, heads, 1, matrix.shape[2]))
    constant = reshape(einsum("e,hed->hd", x[f"{side}_bias"], x[name]), (1, heads, 1, matrix.shape[2]))
    return (projected(matrix) - middle) / reshape(sigma, (batch, 1, length, 1)) + constant


def _waves(spec: Perceiver, size: int, like: Any) -> Any:
    """Features along one axis again: arguments over one denominator, sines as cosines a quarter turn back."""
    n, bands, mu = max(size - 1, 1), max(spec.bands - 1, 1), Fraction(spec.max_frequency)
    p, k = 2 * np.arange(size, dtype=object) - n, np.arange(spec.bands, dtype=object)
    turns = np.multiply.outer(p, 2 * (bands - k) + k * mu) / Fraction(2 * n * bands)
    half = Fraction(1, 2)
    plain = reshape(real(p.astype(np.int64), like), (size, 1)) / n
    return concatenate([cos_pi(turns - half, like), sin_pi(turns + half, like), plain], -1)


def operations(spec: Perceiver, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of the projections and of the two products, forward, and bytes of a score matrix."""
    widths, channels = sizes["D"] + sizes["Dv"], sizes["C"] + spec.channels
    projecting = sizes["Lq"] * sizes["E"] * sizes["D"] + sizes["Lk"] * channels * widths
    pairs = sizes["B"] * sizes["Hq"] * sizes["Lq"] * sizes["Lk"]
    return 2 * (sizes["B"] * sizes["Hq"] * projecting + pairs * widths), 8 * pairs
