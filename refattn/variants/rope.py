r"""RoPE: queries and keys turned by their positions, so that their product tells how far apart they stand.

    (a, b) of x at position p  →  (a cos pw_t − b sin pw_t,  a sin pw_t + b cos pw_t),     w_t = base^(−2t/width)

x is each head's q, and its k; t = 0 .. width/2 − 1 counts pairs of channels; values are not turned. A turn by p met by
a turn by p' leaves p − p': scores depend on distances, and lengths of q and k stay. Positions are those of SDPA: key j
at j, query i at i + Lk − Lq, or as q_positions and k_positions say.

pairing: which channels are a pair, "half" (t, t + width/2) or "interleaved" (2t, 2t + 1). The one is the other after
a permutation of channels, and a checkpoint is trained with one of the two; nothing in its shapes tells which.
width, part: how many channels turn, an even number, and whether they are the first or the last of D; others stay.
angles: "exact", the real numbers p w_t; "float32", those of models that compute them in float32: with each operation
rounded to nearest, the exponent 2t/width, the power base^exponent, its reciprocal, and the product of this frequency by
the position, rounded before and after; cosine and sine are then exact, of that angle. "table": cosines and sines are
inputs, rope_cos and rope_sin (P, width/2), a row for each position from 0; they have gradients, and need not lie on a
circle.

In float64 the exact angles are off by about p·2⁻⁵², as any double-precision code is: 10⁻¹⁰ at p = 2²⁰. Certified
values have no such error. A kernel is taken to be handed exact cosines and sines, rounded once, so one that multiplies
positions by frequencies in float32 or bfloat16 lies outside the bound far out; "float32" is the case for the former.
Turned queries and keys may be kept in the storage type. Beyond angles of 2²⁰ the bound promises nothing.

Source: Su et al., arXiv 2104.09864, section 3.2.2, whose equation 34 pairs neighbours; halves: GPT-NeoX and
transformers' Llama. Equation number recalled, not looked up. float32 angles: transformers' LlamaRotaryEmbedding, whose
power comes from a vendor's function and so may differ in the last bit.

Differs from: transformers for 16-bit models, whose cosines and sines are rounded to the model's dtype (feed them as a
table); interpolated frequencies (PI, NTK, YaRN, Llama 3); xPos, which scales as well; turned hidden states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np

from refattn.dtypes import nearest, round_to
from refattn.errors import ShapeError, SpecError
from refattn.numeric import concatenate, constant, cos, exp, finite, log, real, reshape, sin, stored, take, where
from refattn.spec import Array, Spec, dyadic
from refattn.variants._frequencies import float32_frequencies, frequencies
from refattn.variants._place import Integers, Place, lengths

_WORDS = {"angles": ("exact", "float32", "table"), "part": ("first", "last"), "pairing": ("half", "interleaved")}


@dataclass(frozen=True, kw_only=True)
class RoPE(Spec):
    """Rotary position embedding: the term of SDPA's field `rotary`.

    pairing: "half" or "interleaved", which must be said. base: of the frequencies. angles: "exact", "float32" or
    "table". width: number of channels that turn, None all D; part: whether those are the "first" or the "last".
    """

    pairing: Literal["half", "interleaved"] = None  # type: ignore[assignment]
    base: float = 10000.0
    angles: Literal["exact", "float32", "table"] = "exact"
    width: int | None = None
    part: Literal["first", "last"] = "first"

    def __post_init__(self) -> None:
        if self.pairing is None:
            raise SpecError(
                "pairing has no default, for checkpoints differ: 'half' pairs channel t with t + width/2 (Llama, "
                "GPT-NeoX), 'interleaved' 2t with 2t + 1 (GPT-J, RoFormer)"
            )
        for name, known in _WORDS.items():
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise SpecError(f"{name} is one of {', '.join(map(repr, known))}; given: {given!r}")
        object.__setattr__(self, "base", dyadic("base", self.base))
        if self.base <= 1:
            raise SpecError(f"base is a number above 1, so that frequencies fall; given: {self.base}")
        if self.angles == "float32" and nearest(Fraction(self.base), "float32") != self.base:
            raise SpecError(f"base is a number that float32 holds where angles='float32'; given: {self.base}")
        if self.width is not None and (type(self.width) is not int or self.width < 0 or self.width % 2):
            raise SpecError(f"width is an even number of channels, two a pair, or None for all; given: {self.width!r}")


def signature(spec: RoPE) -> dict[str, Array]:
    """Cosines and sines where a table holds them."""
    if spec.angles != "table":
        return {}
    pairs = "R" if spec.width is None else spec.width // 2
    return dict.fromkeys(("rope_cos", "rope_sin"), Array(f"P {pairs}"))


def resolve(spec: RoPE, sizes: Mapping[str, int]) -> RoPE:
    """The width as a number; one that the head does not have is refused."""
    head = sizes["D"]
    if spec.width is None and head % 2:
        raise SpecError(f"channels turn in pairs, and D={head} is odd: say width, an even number below it")
    width = head if spec.width is None else spec.width
    if width > head:
        raise SpecError(f"width={width} channels are to turn, but the head has D={head}")
    if 2 * sizes.get("R", width // 2) != width:
        raise ShapeError(f"rope_cos has {sizes['R']} columns, where {width} channels have {width // 2} pairs")
    return replace(spec, width=width)


def validate(spec: RoPE, x: Mapping[str, Any], at: Place) -> None:
    """Every position that is not padding has a row in the table."""
    if spec.angles != "table":
        return
    rows, ragged = x["rope_cos"].shape[0], lengths(x)
    for side, places in zip(("queries", "keys"), _positions(at), strict=True):
        count = places.shape[1]
        there = np.ones((1, count), bool) if ragged is None else np.arange(count) < ragged[side == "keys"][:, None]
        stand = np.where(there, places, 0)
        low, high = stand.min(initial=0), stand.max(initial=0)
        if stand.size and (low < 0 or high >= rows):
            raise ShapeError(f"rope_cos has {rows} rows, for positions from 0 on; the {side} stand at {low} to {high}")


def rotate(spec: RoPE, x: Mapping[str, Any], at: Place) -> tuple[Any, Any]:
    """The formula, pair by pair."""
    q, k = (_turned(spec, a, *_circle(spec, x, p)) for a, p in zip((x["q"], x["k"]), _positions(at), strict=True))
    return q, k


def _turned(spec: RoPE, x: Any, cosines: Any, sines: Any) -> Any:
    batch, heads, length, head = x.shape
    start, end = _part(spec, head)
    n, half = (end - start) // 2, spec.pairing == "half"
    pairs = reshape(x[..., start:end], (batch, heads, length, *((2, n) if half else (n, 2))))
    a, b = (pairs[:, :, :, 0], pairs[:, :, :, 1]) if half else (pairs[..., 0], pairs[..., 1])
    c, s = (reshape(table, (table.shape[0], 1, length, n)) for table in (cosines, sines))
    one = (batch, heads, length, *((1, n) if half else (n, 1)))
    both = concatenate([reshape(a * c - b * s, one), reshape(a * s + b * c, one)], 3 if half else 4)
    # A kernel may keep turned queries and keys in its storage type, and backwards their gradients.
    turned = stored(stored(reshape(both, (batch, heads, length, end - start))), cotangent=True)
    return concatenate([x[..., :start], turned, x[..., end:]], 3)


def _part(spec: RoPE, head: int) -> tuple[int, int]:
    """First channel that turns, and the first after those."""
    width = spec.width or 0
    return (0, width) if spec.part == "first" else (head - width, head)


def _positions(at: Place) -> tuple[Integers, Integers]:
    return at.i[:, 0, :, 0], at.j[:, 0, 0, :]


def _circle(spec: RoPE, x: Mapping[str, Any], positions: Integers) -> tuple[Any, Any]:
    """Cosines and sines (1 or B, L, width/2)."""
    width = spec.width or 0
    if spec.angles == "table":
        return _rows(x["rope_cos"], positions), _rows(x["rope_sin"], positions)
    if spec.angles == "float32":
        places = round_to(positions.astype(np.float64), np.float32).astype(np.float64)
        products = places[..., None] * float32_frequencies(spec.base, width).astype(np.float64)
        angles = real(round_to(products, np.float32).astype(np.float64), x["q"])
        return cos(angles), sin(angles)

    def angle(like: Any) -> Any:
        return real(positions[..., None], like) * frequencies(spec.base, range(width // 2), width, like)

    return constant(lambda like: cos(angle(like)), x["q"]), constant(lambda like: sin(angle(like)), x["q"])


def _rows(table: Any, positions: Integers) -> Any:
    """The rows of a table for positions; padding, which may stand beyond it, reads any."""
    inside = np.clip(positions, 0, table.shape[0] - 1)
    return reshape(take(table, inside.reshape(-1), 0), (*positions.shape, table.shape[1]))


def lower_rotate(spec: RoPE, x: Mapping[str, Any], at: Place) -> tuple[Any, Any]:
    """Every channel times its cosine, and its partner times the sine, whose sign tells which of the two it is."""
    start, end = _part(spec, x["q"].shape[3])
    channel = np.arange(end - start)
    if spec.pairing == "half":
        n = channel.size // 2
        partner, pair, ahead = np.roll(channel, n), channel % max(n, 1), channel < n
    else:
        partner, pair, ahead = channel ^ 1, channel // 2, channel % 2 == 0
    sign = np.where(ahead, -1, 1)

    def turned(a: Any, positions: Integers) -> Any:
        cosines, sines = (
            reshape(take(table, pair, 2), (table.shape[0], 1, table.shape[1], pair.size))
            for table in _lowered_circle(spec, x, positions)
        )
        held = where(finite(a), a, real(np.nan, a))
        own = held[..., start:end]
        own = own * cosines + take(own, partner, 3) * (real(sign, a) * sines)
        return concatenate([held[..., :start], own, held[..., end:]], 3)

    q, k = (turned(a, p) for a, p in zip((x["q"], x["k"]), _positions(at), strict=True))
    return q, k


def _lowered_circle(spec: RoPE, x: Mapping[str, Any], positions: Integers) -> tuple[Any, Any]:
    width, q = spec.width or 0, x["q"]
    if spec.angles == "table":
        return _rows(x["rope_cos"], positions), _rows(x["rope_sin"], positions)
    if spec.angles == "float32":
        angles = real(positions.astype(np.float32)[..., None] * float32_frequencies(spec.base, width), q)
    else:
        # Wavelengths in place of frequencies.
        angles = real(positions[..., None], q) / exp(log(real(spec.base, q)) * real(np.arange(0, width, 2), q) / width)
    return cos(angles), sin(angles)
