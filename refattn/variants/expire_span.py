r"""Expire-Span: every token decides how long it is remembered, and what has expired takes no part.

    e_j = max_span σ(w·hidden_j / divisor + b)                              span of token j, between 0 and max_span
    r_tj = e_j − (t − j),     m_tj = clip(r_tj / ramp + 1, 0, 1)            what is left of it at token t; its weight
    p[h,t,j] = softmax_j(scale q[h,t]·(k[g,j] + c_{t−j})) over the j that precede t with m_tj > 0,   g = h // (Hq / Hkv)
    out[h,t] = Σ_j p m v[g,j] / (Σ_j p m + epsilon),     lse[h,t] = log of that divisor, of weights not divided yet:
    lse[h,t] = log(Σ_j m_tj e^s + epsilon Σ_j [m_tj > 0] e^s),     s the logits of the softmax
    loss_t = coefficient Σ_j min(r_tj, 0) / ramp over the same j

q (B,Hq,L,D); k (B,Hkv,L,D); v (B,Hkv,L,Dv); hidden (B,L,E); span_weight w (E,), span_bias b (1,), a span for all heads.
c: `lags` learned vectors position_keys (lags,D), that of the nearest key first; farther keys have none. Spans e (B,L)
are an output too. A token precedes itself where own="included"; the default is the paper's and the code's,
"excluded", so that the first token sees nothing: its out is 0, its lse −∞. A row whose last key expires does the same;
out jumps there where epsilon = 0, and nowhere else, while epsilon > 0 lets it fade and instead moves out by the order
of epsilon where any key expires.

The loss counts the tokens on the ramp, where 0 < m < 1. Its value is negative, its slope 1/ramp for each of them, so a
step downhill shortens their spans. It is that of each token: the code's is the mean of it over a block.

State: keys, values and spans of the last max_span + ramp − 1 tokens; whatever is older has m = 0 for sure. This bounds
the memory; how far below the bound it can be kept, by dropping what has expired, is the caller's gain and changes no
output. The paper stores hidden states and projects them again, which is the same while the projections stay.

Slopes: m has none where r ≤ −ramp, and that of the ramp at r = 0; the loss half of its own there.

Source: Sukhbaatar et al., arXiv 2105.06548, "Not All Memories are Created Equal: Learning to Forget by Expiring"; the
formulas after the authors' code (models/expire_span.py of transformer-sequential, read), whose ramp is 32 and whose
epsilon is 1e-8.

Differs from: that code, where a row with nothing left is NaN, a block's loss is divided by the block's length, and
position keys stand with the farthest first; spans shortened at random while training, which are not offered.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import (
    clip,
    concatenate,
    einsum,
    extend,
    log,
    minimum,
    real,
    reshape,
    sigmoid,
    softmax_attend,
    take,
    tanh,
    top_k,
    total,
    where,
)
from refattn.plan import Dense, Merge, Relative, Score
from refattn.spec import Array, Spec, dyadic


@dataclass(frozen=True, kw_only=True)
class ExpireSpan(Spec):
    """Attention over tokens that expire.

    max_span: tokens, the longest span. ramp: tokens over which a weight falls to 0. divisor: of w·hidden. own: whether
    a token sees itself. epsilon: added to the sum of the weights; 0 is exact. lags: count of keys nearest to a query
    that have a learned vector. coefficient: of the loss. scale: None is D^-1/2.
    """

    max_span: int
    ramp: int = 32
    divisor: float = 1.0
    own: Literal["excluded", "included"] = "excluded"
    epsilon: float = 0.0
    lags: int = 0
    coefficient: float = 1.0
    scale: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("max_span", 1), ("ramp", 1), ("lags", 0)):
            if type(getattr(self, name)) is not int or getattr(self, name) < least:
                raise SpecError(f"{name} is a number of tokens from {least} on; given: {getattr(self, name)!r}")
        if not isinstance(self.own, str) or self.own not in ("excluded", "included"):
            raise SpecError(f"own is 'excluded' or 'included'; given: {self.own!r}")
        for name in ("divisor", "epsilon", "coefficient", "scale"):
            if name != "scale" or self.scale is not None:
                object.__setattr__(self, name, dyadic(name, getattr(self, name)))
        if self.divisor <= 0 or self.epsilon < 0:
            raise SpecError(f"divisor is positive, epsilon is not negative; given: {self.divisor}, {self.epsilon}")

    @property
    def nearest(self) -> int:
        """Distance of the nearest token that one sees."""
        return int(self.own == "excluded")

    @property
    def reach(self) -> int:
        """Distance at which every token has expired."""
        return self.max_span + self.ramp


def signature(spec: ExpireSpan) -> dict[str, Array]:
    """q, k, v, what the spans are made of, and the learned vectors."""
    own = {"q": Array("B Hq L D"), "k": Array("B Hkv L D"), "v": Array("B Hkv L Dv"), "hidden": Array("B L E")}
    own |= {"span_weight": Array("E", role="learned"), "span_bias": Array("1", role="learned")}
    return own | ({"position_keys": Array(f"{spec.lags} D", role="learned")} if spec.lags else {})


def outputs(spec: ExpireSpan) -> dict[str, Array]:
    """The mean of what is left, the logarithm of its divisor, the spans, and each token's share of the loss."""
    return {"out": Array("B Hq L Dv"), "lse": Array("B Hq L"), "spans": Array("B L"), "loss": Array("B L")}


def state(spec: ExpireSpan, length: int) -> dict[str, Array]:
    """What may have a weight at the next token."""
    kept = min(length, spec.reach - 1)
    return {"k": Array(f"B Hkv {kept} D"), "v": Array(f"B Hkv {kept} Dv"), "spans": Array(f"B {kept}")}


def resolve(spec: ExpireSpan, sizes: Mapping[str, int]) -> ExpireSpan:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: ExpireSpan, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def _logit(spec: ExpireSpan, x: Mapping[str, Any]) -> Any:
    """What the sigmoid of the spans is taken of, (B,L)."""
    z = einsum("ble,e->bl", x["hidden"], x["span_weight"])
    return z / real(spec.divisor, z) + reshape(x["span_bias"], (1, 1))


def _positive(x: Any) -> NDArray[np.bool_]:
    """Which entries are above 0, or are no number."""
    pairs = concatenate([reshape(-x, (*x.shape, 1)), real(np.zeros((*x.shape, 1)), x)], -1)
    found: NDArray[np.bool_] = top_k(pairs, 1)[..., 0] == 1
    return found


def reference(spec: ExpireSpan, x: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """The softmax, its weights times m, and these divided by their sum."""
    q = x["q"]
    batch, heads, count, width = q.shape
    spans = spec.max_span * sigmoid(_logit(spec, x))
    k, v = extend(state["k"], x["k"], 2), extend(state["v"], x["v"], 2)
    ends = extend(state["spans"], spans, 1)
    groups, there = k.shape[1], k.shape[2]
    lag = (there - count) + np.arange(count)[:, None] - np.arange(there)

    left = reshape(ends, (batch, 1, 1, there)) - real(lag, ends)
    seen = (lag >= spec.nearest) & (lag < spec.reach)
    # A distance below the ramp decides by itself: spans are positive.
    live = seen & ((lag < spec.ramp) | _positive(where(seen & (lag >= spec.ramp), left + spec.ramp, 1)))
    m = where(live, clip((left + spec.ramp) / spec.ramp, 0, 1), 0)

    s = einsum("bgrid,bgjd->bgrij", reshape(q, (batch, groups, heads // groups, count, width)), k)
    s = reshape(s, (batch, heads, count, there))
    if spec.lags:
        near = (lag >= spec.nearest) & (lag - spec.nearest < spec.lags)
        c = take(x["position_keys"], np.where(near, lag - spec.nearest, 0).reshape(-1), 0)
        s = s + where(near, einsum("bhid,ijd->bhij", q, reshape(c, (count, there, width))), 0)
    ones = real(np.ones((*v.shape[:3], 1), np.int64), v)
    s = real(spec.scale or 0.0, s) * s
    both, lse = softmax_attend(s, live, concatenate([v, ones], 3), keep=m)

    epsilon, empty = real(spec.epsilon, both), ~np.any(np.broadcast_to(live, s.shape), -1)
    divisor = where(empty[..., None], 1, both[..., -1:] + epsilon)
    fallen = where(live[:, 0], minimum(left[:, 0], 0), 0)
    kept = slice(max(there - (spec.reach - 1), 0), None)
    return {
        "out": both[..., :-1] / divisor,
        "lse": where(empty, lse, where(empty, 0, lse) + reshape(log(divisor), lse.shape)),
        "spans": spans,
        "loss": real(spec.coefficient, left) * total(fallen, -1) / spec.ramp,
        "state": {"k": k[:, :, kept], "v": v[:, :, kept], "spans": ends[:, kept]},
    }


def lower(spec: ExpireSpan, x: Mapping[str, Any], state: Mapping[str, Any]) -> Merge:
    """One softmax with the logarithms of m as a bias; epsilon gives each key that is left a twin without a value."""
    k, v = concatenate([state["k"], x["k"]], 2), concatenate([state["v"], x["v"]], 2)
    half = real(0.5, x["hidden"])
    spans = concatenate([state["spans"], real(spec.max_span, half) * half * (1 + tanh(half * _logit(spec, x)))], 1)
    count, there = x["q"].shape[2], k.shape[2]
    place = np.arange(there)[None]
    ahead = place[:, None] - place[:, there - count :, None]
    share = minimum(1 + (reshape(spans, (*spans.shape[:1], 1, there)) + real(ahead, spans)) / spec.ramp, 1)
    live = (ahead <= -spec.nearest) & (ahead > -spec.reach) & _positive(where(ahead > -spec.reach, share, 1))
    live = live[:, None]
    masked, m = real(-np.inf, spans), reshape(share, live.shape)
    options: dict[str, Any] = {"scale": spec.scale or 0.0, "positions": (place[:, there - count :], place)}
    if spec.lags:
        # Row n of the table stands for keys n − there before the query.
        table, first = x["position_keys"], there - spec.nearest
        rows = take(table, np.arange(spec.lags)[::-1][max(spec.lags - first - 1, 0) :], 0)
        above = first + 1 - rows.shape[0]
        zeros = [real(np.zeros((n, table.shape[1])), table) for n in (above, there + spec.nearest)]
        values = concatenate([zeros[0], rows, zeros[1]], 0)
        values = reshape(values, (1, *values.shape))
        turned = real(spec.scale or 0.0, x["q"]) * x["q"]
        options["relative"] = (Relative(rows=turned, values=values, offset=there),)
    bias = Dense(values=where(live, log(where(live, m, 1)), masked))
    parts = [Score(q=x["q"], k=k, v=v, bias=(bias,), **options)]
    if spec.epsilon:
        alike = where(live, log(real(spec.epsilon, spans)), masked)
        parts.append(Score(q=x["q"], k=k, v=real(np.zeros(v.shape), v), bias=(Dense(values=alike),), **options))
    return Merge(parts=tuple(parts))


def operations(spec: ExpireSpan, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of spans and the two products, forward; bytes of one float64 score matrix."""
    pairs = sizes["B"] * sizes["Hq"] * sizes["L"] * min(sizes["L"], spec.reach)
    return 2 * (pairs * (sizes["D"] + sizes["Dv"]) + sizes["B"] * sizes["L"] * sizes["E"]), 8 * pairs
