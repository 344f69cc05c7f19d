r"""Scaled dot-product attention with everything that masks it, biases it or shifts it.

    s[h,i,j] = softcap(scale (q[h,i]·k[g,j] + content[h,i,j])) + bias[h,i,j],     g = h // (Hq / Hkv)
    p[h,i,j] = exp(s[h,i,j]) / (exp(sink[h]) + Σ_j' exp(s[h,i,j']))      over the pairs that are visible
    softcap(s) = c tanh(s / c)
    out[h,i] = Σ_j keep p[h,i,j] v[g,j],     lse[h,i] = log(exp(sink[h]) + Σ_j exp(s[h,i,j]))

normalizer="sigmoid" weighs each key by itself, with no normaliser, so without lse and without a sink:

    p[h,i,j] = 1 / (1 + exp(−s[h,i,j] − b)),     b the sigmoid_bias, such as −ln n where n keys are seen

kv="int8" is given integers for k and v, and what each token's are to be multiplied by, in exact arithmetic:

    k[g,j] = k_scale[g,j] k_int[g,j],   v[g,j] = v_scale[g,j] v_int[g,j],     k_scale, v_scale (B,Hkv,Lk) or broadcast

paged=True is given N blocks of S slots, k (N,Hkv,S,D) and v (N,Hkv,S,Dv), kv_lengths (B,) and block_table (B,M): key j
of sequence b stands in slot j mod S of block block_table[b, j div S], and Lk is M S; scales likewise, (N,Hkv,S). What
stands in slots and entries beyond a sequence's length does not matter.

q (B,Hq,Lq,D); k (B,Hkv,Lk,D); v (B,Hkv,Lk,Dv); out (B,Hq,Lq,Dv); lse (B,Hq,Lq), natural. The order of operations is
fixed: rotation of q and k, their product, content terms, scale, softcap, bias, mask, sink, normaliser, keep-mask,
values (content terms may add to the value that a pair reads). A row that sees nothing gives 0 and lse −∞.

Source: Vaswani et al., arXiv 1706.03762, equation 1; grouped heads: Ainslie et al., arXiv 2305.13245; softcap: Gemma 2,
arXiv 2408.00118, section 2; sinks: gpt-oss, and Miller's softmax-off-by-one, which is a sink of logit 0; sigmoid:
Ramapuram et al., arXiv 2409.04431, where b = −ln n.

Differs from: torch's is_causal (top-left only); flash-attention's window_size (the same inclusive pair, −1 for None);
transformers' sliding_window (a count of keys, self included: window = (n − 1, 0)); ONNX Attention, which scales q and
k by √scale each; Apple's FlashSigmoid, which finds the sigmoid as (1 + tanh(x/2))/2: the same number, but a weight of
1/n then has an error of the size of a unit roundoff of 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import (
    broadcast,
    clean,
    einsum,
    finite,
    minus_infinite,
    real,
    reshape,
    softmax_attend,
    stored,
    tanh,
    where,
)
from refattn.plan import Dense, Score
from refattn.spec import Array, Spec, added, dyadic
from refattn.variants import _kept, _sigmoid
from refattn.variants._place import lengths, per_sequence, place, segments, visible

_ALIGNMENTS = ("top_left", "bottom_right")


@dataclass(frozen=True, kw_only=True)
class SDPA(Spec):
    """Masked attention, by softmax or by sigmoid.

    causal: False; "top_left" (query i at key position i), "bottom_right" (at i + Lk − Lq), or True, allowed only
    where the two agree. window: (left, right), both inclusive, None unbounded. scale: None is D^-1/2. softcap: the
    cap c > 0. rotary: a term that turns q and k, such as RoPE; content: terms that read them, such as Shaw; bias: terms
    such as ALiBi. keep_probability: by which kept weights are divided. normalizer: "softmax" or "sigmoid".
    sigmoid_bias: the b of sigmoid attention, which has no default: a number, or "keys" for −ln Lk in float32, Lk being
    the size of the arrays, whatever lengths and masks leave of it. kv: None, or "int8" for integers with scales.
    paged: whether keys and values stand in blocks, which a block_table names for each sequence.
    """

    causal: bool | Literal["top_left", "bottom_right"] = False
    window: tuple[int | None, int | None] | None = None
    scale: float | None = None
    softcap: float | None = None
    rotary: Spec | None = None
    content: tuple[Spec, ...] = ()
    bias: tuple[Spec, ...] = ()
    keep_probability: float | None = None
    normalizer: Literal["softmax", "sigmoid"] = added("softmax")
    sigmoid_bias: float | Literal["keys"] | None = None
    kv: Literal["int8"] | None = None
    paged: bool = added(False)

    def __post_init__(self) -> None:
        for name in ("content", "bias"):
            if isinstance(getattr(self, name), Spec):
                object.__setattr__(self, name, (getattr(self, name),))
        if not isinstance(self.bias, tuple) or not all(_offers(term, "term") for term in self.bias):
            raise SpecError(f"bias takes Specs such as ALiBi(), the input 'bias' an array; given: {self.bias!r}")
        if not isinstance(self.content, tuple) or not all(_offers(term, "content") for term in self.content):
            raise SpecError(f"content takes Specs such as Shaw(); given: {self.content!r}")
        if self.rotary is not None and not _offers(self.rotary, "rotate"):
            raise SpecError(f"rotary takes a Spec such as RoPE(pairing='half'), or None; given: {self.rotary!r}")
        if not (isinstance(self.causal, bool) or (isinstance(self.causal, str) and self.causal in _ALIGNMENTS)):
            raise SpecError(f"causal is False, True, 'top_left' or 'bottom_right'; given: {self.causal!r}")
        if self.window is not None:
            _check_window(self.window)
        for name in ("scale", "softcap", "keep_probability"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, dyadic(name, getattr(self, name)))
        if self.softcap is not None and self.softcap <= 0:
            raise SpecError(f"softcap is a positive number or None; given: {self.softcap}")
        if self.keep_probability is not None and not 0 < self.keep_probability <= 1:
            raise SpecError(f"keep_probability lies in (0, 1]; given: {self.keep_probability}")
        _kept.check(self.kv, self.paged)
        object.__setattr__(self, "sigmoid_bias", _sigmoid.checked(self.normalizer, self.sigmoid_bias))

    @property
    def terms(self) -> tuple[Spec, ...]:
        """All term Specs, in the order in which they act."""
        return (*(() if self.rotary is None else (self.rotary,)), *self.content, *self.bias)


def _check_window(window: Any) -> None:
    if not isinstance(window, tuple) or len(window) != 2 or not all(w is None or type(w) is int for w in window):
        raise SpecError(f"window is (left, right), integers or None, both ends inclusive; given: {window!r}")
    if any(w is not None and w < 0 for w in window):
        raise SpecError(f"window counts keys to the left and right, so neither may be negative; given: {window!r}")


_PAIRS = "B Hq Lq Lk"
_ARRAYS = {
    "q": Array("B Hq Lq D"),
    "k": Array("B Hkv Lk D"),
    "v": Array("B Hkv Lk Dv"),
    "bias": Array(_PAIRS, optional=True, broadcast=True),
    "mask": Array(_PAIRS, "bool", "choice", optional=True, broadcast=True),
    "sink": Array("Hq", role="learned", optional=True),
    "q_lengths": Array("B", "int", "choice", "lengths:Lq", optional=True),
    "kv_lengths": Array("B", "int", "choice", "lengths:Lk", optional=True),
    "q_positions": Array("B Lq", "int", "choice", "positions", optional=True, broadcast=True),
    "k_positions": Array("B Lk", "int", "choice", "positions", optional=True, broadcast=True),
    "q_segment_ids": Array("B Lq", "int", "choice", "segments", optional=True, broadcast=True),
    "k_segment_ids": Array("B Lk", "int", "choice", "segments", optional=True, broadcast=True),
}


def signature(spec: SDPA) -> dict[str, Array]:
    """q, k, v and what the options and the terms add."""
    arrays = dict(_own_arrays(spec.normalizer == "sigmoid", spec.keep_probability is not None, spec.kv, spec.paged))
    for term in spec.terms:
        own = _module(term).signature(term)
        other = next((name for name in own if arrays.get(name, own[name]) != own[name]), None)
        if other is not None:
            sizes = f"{arrays[other]} to one of these terms and {own[other]} to another"
            raise SpecError(f"{other} is {sizes}: {spec.terms}")
        arrays |= own
    return arrays


@cache
def _own_arrays(sigmoid: bool, dropped: bool, kv: str | None, paged: bool) -> dict[str, Array]:
    """All but those of terms; sigmoid attention has no normaliser for a sink to stand in."""
    arrays = {name: array for name, array in _ARRAYS.items() if not (sigmoid and name == "sink")}
    if dropped:
        arrays["keep"] = Array(_PAIRS, "bool", "choice", broadcast=True)
    return _kept.signature(arrays, kv, paged)


def outputs(spec: SDPA) -> dict[str, Array]:
    """The weighted sum of the values, and the natural logarithm of the softmax's denominator."""
    out = {"out": Array("B Hq Lq Dv")}
    return out if spec.normalizer == "sigmoid" else out | {"lse": Array("B Hq Lq")}


def resolve(spec: SDPA, sizes: Mapping[str, int]) -> SDPA:
    """Scale, slopes, sigmoid bias and alignment as definite values; what contradicts the sizes is refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    causal, lk = spec.causal, _keys(sizes)
    if causal is True:
        if sizes["Lq"] != lk:
            raise SpecError(
                f"causal=True is ambiguous where Lq={sizes['Lq']} differs from Lk={lk}: say causal='top_left' "
                "(query i sees keys 0..i) or causal='bottom_right' (query i sees keys 0..i + Lk − Lq)"
            )
        causal = "bottom_right"
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    scale = default if spec.scale is None else spec.scale

    def definite(term: Spec) -> Any:
        return _module(term).resolve(term, sizes)

    rotary = spec.rotary and definite(spec.rotary)
    content, bias = tuple(map(definite, spec.content)), tuple(map(definite, spec.bias))
    own = _sigmoid.minus_log(max(lk, 1)) if spec.sigmoid_bias == "keys" else spec.sigmoid_bias
    return replace(spec, causal=causal, scale=scale, rotary=rotary, content=content, bias=bias, sigmoid_bias=own)


def validate(spec: SDPA, x: Mapping[str, Any]) -> None:
    """What only the arrays together tell."""
    _kept.check_blocks(x)
    for one, other in (("q_segment_ids", "k_segment_ids"), ("k_segment_ids", "q_segment_ids")):
        if one in x and other not in x:
            raise ShapeError(f"{one} needs {other}: give both")
    for name in ("bias", "sink"):
        if name in x and np.isposinf(np.asarray(x[name], np.float64)).any():
            raise ShapeError(f"{name} holds +∞, which is no logit: −∞ masks, a finite number biases")
    for term in spec.terms:
        for name in _module(term).signature(term):
            if not np.isfinite(np.asarray(x[name], np.float64)).all():
                raise ShapeError(f"{name} must hold finite numbers; given: {x[name]}")
        if hasattr(_module(term), "validate"):
            _module(term).validate(term, x, place(spec.causal, x))


def inner_outputs(spec: SDPA) -> dict[str, Array]:
    """What stands inside, for problems small enough: final logits, −∞ where a pair is masked, and weights of values."""
    return {"scores": Array(_PAIRS), "probs": Array(_PAIRS)}


def reference(spec: SDPA, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """The formula, in its fixed order."""
    x = _kept.unpacked(x)
    s, live, spoiled, relative = _logits(spec, x)
    keep = None
    if spec.keep_probability is not None:
        keep = real(x["keep"].astype(np.int64), s) / real(spec.keep_probability, s)
    return _attended(spec, s, live, x["v"], sink=x.get("sink"), keep=keep, spoiled=spoiled, relative=relative)


def inner_reference(spec: SDPA, x: Mapping[str, Any]) -> dict[str, Any]:
    """Scores and, before the keep-mask, probs: the out of values that are the unit vectors."""
    x = _kept.unpacked(x)
    s, live, spoiled, _ = _logits(spec, x)
    scores = where(live & (spoiled | ~finite(s)), real(np.nan, s), where(live, s, real(-np.inf, s)))
    (batch, groups, lk), unit = x["k"].shape[:3], np.eye(x["k"].shape[2])
    values = real(np.broadcast_to(unit, (batch, groups, lk, lk)), s)
    probs = _attended(spec, s, live, values, sink=x.get("sink"), keep=None, spoiled=spoiled, relative=())["out"]
    return {"scores": scores, "probs": probs}


def _attended(spec: SDPA, s: Any, live: Any, v: Any, *, sink: Any, **options: Any) -> dict[str, Any]:
    """The outputs of the spec's normaliser."""
    if spec.normalizer == "sigmoid":
        return {"out": _sigmoid.sigmoid_attend(s, live, v, **options)}
    out, lse = softmax_attend(s, live, v, sink=sink, **options)
    return {"out": out, "lse": lse}


def _logits(spec: SDPA, x: Mapping[str, Any]) -> tuple[Any, Any, Any, list[Any]]:
    """Final logits, which pairs are live, which come from what is not finite, and what content adds to values."""
    batch, heads, lq, width = x["q"].shape
    groups, lk = x["k"].shape[1:3]
    at = place(spec.causal, x)
    live = visible(spec, x, at)

    q_ok, k_ok = finite(x["q"]), finite(x["k"])
    turned = dict(x) | {"q": clean(x["q"]), "k": clean(x["k"])}
    if spec.rotary is not None:
        turned["q"], turned["k"] = _module(spec.rotary).rotate(spec.rotary, turned, at)
    rows = reshape(turned["q"], (batch, groups, heads // max(groups, 1), lq, width))
    s = reshape(einsum("bgrid,bgjd->bgrij", rows, turned["k"]), (batch, heads, lq, lk))
    relative = []
    for term in spec.content:
        logits, values = _module(term).content(term, turned, at)
        s = s + logits
        relative += [] if values is None else [values]
    s = real(spec.scale, s) * s
    s_ok, s = finite(s), clean(s)
    if spec.softcap is not None:
        cap = real(spec.softcap, s)
        s = cap * tanh(stored(s, cotangent=True) / cap)
    for term in spec.bias:
        logits, allowed = _module(term).term(term, x, at)
        s = s if logits is None else s + logits
        live = live if allowed is None else live & allowed
    if "bias" in x:
        masked = minus_infinite(x["bias"])
        s, live = s + where(masked, 0, x["bias"]), live & ~masked

    spoiled = ~s_ok
    if not (q_ok.all() and k_ok.all()):
        bad_k = np.repeat(~np.all(k_ok, -1), heads // groups, axis=1)
        spoiled = spoiled | ~np.all(q_ok, -1)[..., :, None] | bad_k[..., None, :]
    if spec.normalizer == "sigmoid":
        s = s + real(spec.sigmoid_bias, s)
    return s, live, spoiled, relative


def lower(spec: SDPA, x: Mapping[str, Any], state: Any = None) -> Score:
    """The same problem as data: positions, bounds and biases instead of formulas."""
    at = place(spec.causal, x)
    if spec.rotary is not None or spec.content:
        # What turns or reads keys needs them as numbers.
        x = _kept.unpacked(x)
    q, k = x["q"], x["k"]
    scales = {n: broadcast(x[n], x["k"].shape[:3]) for n in ("k_scale", "v_scale") if n in x}
    if spec.rotary is not None:
        q, k = _module(spec.rotary).lower_rotate(spec.rotary, x, at)
    lowered = [_module(term).lower_content(term, dict(x) | {"q": q, "k": k}, at, spec.scale) for term in spec.content]
    bias = [b for term in spec.bias for b in _module(term).lower_term(term, x, at)]
    if "bias" in x:
        bias.append(Dense(values=x["bias"]))
    return Score(
        q=q,
        k=k,
        v=x["v"],
        scale=spec.scale or 0.0,
        relative=tuple(r for relative, _ in lowered for r in relative),
        v_table=tuple(table for _, table in lowered if table is not None),
        positions=(at.i[:, 0, :, 0], at.j[:, 0, 0, :]),
        causal=bool(spec.causal),
        window=spec.window or (None, None),
        softcap=spec.softcap,
        bias=tuple(bias),
        mask=x.get("mask"),
        lengths=lengths(x),
        segments=segments(x),
        sink=x.get("sink"),
        keep=None if spec.keep_probability is None else (x["keep"], spec.keep_probability),
        normalizer=spec.normalizer,
        sigmoid_bias=float(spec.sigmoid_bias or 0.0),
        pages=None if "block_table" not in x else np.asarray(x["block_table"], np.int64),
        **scales,
    )


def restrict(spec: SDPA, x: Mapping[str, Any], rows: tuple[int, ...]) -> dict[str, Any]:
    """The same problem for some query rows only: each keeps the position it had."""
    at, chosen = place(spec.causal, x), np.asarray(rows)
    lq = x["q"].shape[2]
    short = dict(x) | {"q_positions": at.i[:, 0, :, 0][:, chosen], "q": x["q"][:, :, chosen]}
    if "q_segment_ids" in x:
        short["q_segment_ids"] = per_sequence(x["q_segment_ids"], lq)[:, chosen]
    for name in ("bias", "mask", "keep"):
        if name in x and x[name].ndim > 1 and x[name].shape[-2] == lq:
            short[name] = x[name][..., chosen, :]
    ragged = lengths(x)
    if ragged is not None:
        inside = (chosen < ragged[0][:, None])[:, None, :, None]
        short["mask"] = short.get("mask", np.ones((1, 1), bool)) & inside
        short.pop("q_lengths", None)
        short["kv_lengths"] = ragged[1]
    return short


def operations(spec: SDPA, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of the two products, forward, and bytes of one float64 score matrix."""
    pairs = sizes["B"] * sizes["Hq"] * sizes["Lq"] * _keys(sizes)
    return 2 * pairs * (sizes["D"] + sizes["Dv"]), 8 * pairs


def _keys(sizes: Mapping[str, int]) -> int:
    """Lk, which for keys in blocks is M S."""
    return sizes["Lk"] if "Lk" in sizes else sizes["M"] * sizes["S"]


def _offers(term: Any, function: str) -> bool:
    return isinstance(term, Spec) and hasattr(_module(term), function)


def _module(term: Spec) -> Any:
    """The module a term's Spec stands in."""
    import sys

    return sys.modules[type(term).__module__]

