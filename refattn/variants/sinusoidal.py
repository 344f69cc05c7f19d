r"""Sinusoidal embeddings: sines and cosines of the position, added to what is projected to q, k and v.

    h_l = m x_l + P[offset + l],     P[p, sine i] = sin(p w_i),     P[p, cosine i] = cos(p w_i)
    w_i = base^(−i / (E/2)),         or base^(−i / (⌊E/2⌋ − 1))                        (denominator="half_minus_one")
    q = h W_q,  k = h W_k,  v = h W_v,     out[h,i] = Σ_j softmax_j(scale q[h,i]·k[g,j]) v[g,j],     g = h // (Hq / Hkv)

x (B,L,E); W_q (Hq,E,D); W_k (Hkv,E,D); W_v (Hkv,E,Dv); out (B,Hq,L,Dv); lse (B,Hq,L). Sine i and cosine i stand in
columns 2i and 2i + 1 (layout="interleaved"), or all sines before all cosines ("concatenated"). m is `multiplier`: 1
where None, √E where "sqrt", or a number. The first position is `offset`. Exactly P_p·P_p' = Σ_i cos((p − p') w_i), in
either layout and wherever positions begin; the projections lie between, so the output knows both.

An odd E lacks the last cosine; with "half_minus_one" it has ⌊E/2⌋ of both and a last column of 0, and where ⌊E/2⌋ = 1,
so that the exponent would be 0/0, w₀ = 1. kv_lengths, where given, hide the keys beyond them; the padded rows remain
queries. Query l sees keys 0 to l if causal, padded or not.

Source: Vaswani et al., arXiv 1706.03762, section 3.5 (interleaved, half, from position 0) and 3.4 (√E), as recalled.
"half_minus_one" and "concatenated" are tensor2tensor's (recalled) and fairseq's, whose positions begin at padding_idx +
1; transformers keeps both (M2M100, Speech2Text), and in its Marian "half" with "concatenated".

Differs from: all of these in that the table is the exact real, where they round the angles p w_i to float32 and so lose
digits as p grows (Marian rounds sines and cosines alone); fairseq, whose padding has an embedding of 0 and where
⌊E/2⌋ = 1 is a division by 0; a learned table; rotary embeddings, which turn q and k and leave v.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import concatenate, cos, einsum, exp, log, real, reshape, sin, sqrt, stored, take
from refattn.plan import Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants._frequencies import frequencies
from refattn.variants.sdpa import SDPA

# Positions within this are exact in float64.
_FARTHEST = 2**52


@dataclass(frozen=True, kw_only=True)
class Sinusoidal(Spec):
    """Attention over inputs to which sines and cosines of their positions are added.

    layout: "interleaved" columns, or "concatenated" halves. denominator: of the exponents, "half" of E, or
    "half_minus_one". offset: the first position. multiplier: of the inputs; None is 1, "sqrt" the root of E. base: the
    largest wavelength over 2π. causal: a query sees no later key. scale: None is D^-1/2.
    """

    layout: Literal["interleaved", "concatenated"] = "interleaved"
    denominator: Literal["half", "half_minus_one"] = "half"
    offset: int = 0
    multiplier: float | Literal["sqrt"] | None = None
    base: float = 10000.0
    causal: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        choices = {"layout": ("interleaved", "concatenated"), "denominator": ("half", "half_minus_one")}
        for name, known in choices.items():
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise SpecError(f"{name} is {known[0]!r} or {known[1]!r}; given: {given!r}")
        if type(self.offset) is not int or abs(self.offset) > _FARTHEST:
            raise SpecError(f"offset is the first position, an integer within ±2^52; given: {self.offset!r}")
        if type(self.causal) is not bool:
            raise SpecError(f"causal is True or False; given: {self.causal!r}")
        if not (self.multiplier is None or (isinstance(self.multiplier, str) and self.multiplier == "sqrt")):
            object.__setattr__(self, "multiplier", dyadic("multiplier, where not 'sqrt',", self.multiplier))
        object.__setattr__(self, "base", dyadic("base", self.base))
        if self.base <= 0:
            raise SpecError(f"base is a positive number; given: {self.base}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: Sinusoidal) -> dict[str, Array]:
    """The embeddings and the projections."""
    return {
        "x": Array("B L E"),
        "wq": Array("Hq E D", role="learned"),
        "wk": Array("Hkv E D", role="learned"),
        "wv": Array("Hkv E Dv", role="learned"),
        "kv_lengths": Array("B", "int", "choice", "lengths:L", optional=True),
    }


def outputs(spec: Sinusoidal) -> dict[str, Array]:
    """The mean of the values, and the natural logarithm of the softmax's denominator."""
    return {"out": Array("B Hq L Dv"), "lse": Array("B Hq L")}


def resolve(spec: Sinusoidal, sizes: Mapping[str, int]) -> Sinusoidal:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: Sinusoidal, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def reference(spec: Sinusoidal, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """The formula."""
    length, width = x["x"].shape[1:]
    # A kernel may keep what is added, and what is projected, in its storage type.
    hidden = stored(_multiplied(spec, x["x"]) + stored(table(spec, length, width, x["x"])))
    projected = {
        name: stored(stored(einsum("ble,hed->bhld", hidden, x[f"w{name}"])), cotangent=True) for name in ("q", "k", "v")
    }
    lengths = {name: x[name] for name in ("kv_lengths",) if name in x}
    # Lengths shorten the keys alone: top-left is what keeps query l at position l.
    attention = SDPA(causal="top_left" if spec.causal else False, scale=spec.scale)
    return sdpa.reference(attention, projected | lengths)


def table(spec: Sinusoidal, length: int, width: int, like: Any) -> Any:
    """P (length, width) of the positions from `offset` on, in the space of `like`."""
    sines, denominator = _exponents(spec, width)
    w = frequencies(spec.base, range(sines), denominator, like)
    angles = reshape(real(spec.offset + np.arange(length), like), (length, 1)) * w
    if spec.layout == "concatenated":
        columns = concatenate([sin(angles), cos(angles)[:, : width // 2]], -1)
    else:
        pairs = [reshape(f(angles), (length, sines, 1)) for f in (sin, cos)]
        columns = reshape(concatenate(pairs, -1), (length, 2 * sines))[:, :width]
    missing = width - columns.shape[-1]
    return columns if not missing else concatenate([columns, real(np.zeros((length, missing)), like)], -1)


def _exponents(spec: Sinusoidal, width: int) -> tuple[int, int]:
    """How many sines there are, and d of their exponents −2i/d."""
    if spec.denominator == "half":
        return (width + 1) // 2, max(width, 1)
    return width // 2, 2 * max(width // 2 - 1, 1)


def _multiplied(spec: Sinusoidal, x: Any) -> Any:
    if spec.multiplier is None:
        return x
    return stored(x * (sqrt(real(x.shape[-1], x)) if spec.multiplier == "sqrt" else real(spec.multiplier, x)))


def lower(spec: Sinusoidal, x: Mapping[str, Any], state: Any = None) -> Score:
    """Inputs and positions projected apart, and their projections added: W (m x + P) = m W x + W P."""
    batch, length, width = x["x"].shape
    n, denominator = _exponents(spec, width)
    at, like = np.arange(length), x["x"]
    wavelengths = exp(log(real(spec.base, like)) * real(2 * np.arange(n), like) / denominator)
    angles = reshape(real(spec.offset + at, like), (length, 1)) / wavelengths
    column = np.arange(width)
    odd, i = (column % 2, column // 2) if spec.layout == "interleaved" else (column >= n, column - n * (column >= n))
    # The functions side by side, then 0: each column of P is one of these.
    choices = concatenate([sin(angles), cos(angles), real(np.zeros((length, 1)), like)], -1)
    places = take(choices, np.where(i < n, i + n * odd, 2 * n), 1)
    factor = 1 if spec.multiplier is None else real(width if spec.multiplier == "sqrt" else spec.multiplier, like)
    factor = sqrt(factor) if spec.multiplier == "sqrt" else factor

    def projected(name: str) -> Any:
        matrix = x[name]
        return einsum("ble,hed->bhld", like, matrix) * factor + einsum("le,hed->hld", places, matrix)

    full = np.full(batch, length)
    return Score(
        q=projected("wq"),
        k=projected("wk"),
        v=projected("wv"),
        scale=spec.scale or 0.0,
        positions=(at[None], at[None]),
        causal=spec.causal,
        lengths=(full, np.asarray(x["kv_lengths"], np.int64)) if "kv_lengths" in x else None,
    )


def operations(spec: Sinusoidal, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of the projections and of the two products, forward, and bytes of a score matrix."""
    rows, pairs = sizes["B"] * sizes["L"], sizes["B"] * sizes["Hq"] * sizes["L"] ** 2
    columns = sizes["Hq"] * sizes["D"] + sizes["Hkv"] * (sizes["D"] + sizes["Dv"])
    return 2 * (rows * sizes["E"] * columns + pairs * (sizes["D"] + sizes["Dv"])), 8 * pairs
