r"""Attention alignment: T5's logits divided by a temperature, so that a longer context is not attended to more flatly.

    s[h,i,j] = scale q[h,i]·k[g,j] + bias[h,i,j],    l = s / tau[h],    p = softmax_j l,    g = h // (Hq / Hkv)
    out[h,i] = Σ_j p[h,i,j] v[g,j],        lse[h,i] = log Σ_j exp(l[h,i,j])
    max_prob[h,i] = max_j p[h,i,j],        entropy[h,i] = −Σ_j p ln p, in nats

q (B,Hq,Lq,D); k (B,Hkv,Lk,D); v (B,Hkv,Lk,Dv); temperature tau (Hq,), positive; t5_table or what other bias the spec
names takes. T5 has no scale, so scale is 1 unless given. The last two outputs are the statistics that a temperature is
chosen by: at a longer length, with tau, they are to be what they were at the training length with tau = 1
(`refattn.alignment` solves for it). A row that sees nothing gives out 0, lse −∞, and 0 for both statistics.

divide="logits" divides the whole logit, as the paper does; "scores" divides q·k alone, a common mistake that is here to
be recognised: the bias then outweighs the contents the more, the larger tau. Of exactly equal logits the first has the
gradient of max_prob. Logits are shifted by their row's maximum before they are divided, and entropy is taken of the
shifted ones: log z − Σ p (l − m) is lse − Σ p l without the digits that cancel.

Source: Chi, Fan, Rudnicky, arXiv 2311.00684, whose abstract was looked up (two alignments of T5's attention, by
temperature, without training). That they are of the maximal probability and of the entropy, that bias is divided too,
and natural logarithms: recalled; the paper searches a grid of temperatures for what is solved for here.

Differs from: SDPA's scale, which does not reach the bias; scalings by log n, which need no statistic. There is no
package to compare with; at tau = 1 it is T5's attention, which `t5` holds against transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.errors import SpecError
from refattn.numeric import (
    amax,
    broadcast,
    clean,
    einsum,
    exp,
    finite,
    log,
    minus_infinite,
    real,
    reshape,
    row_max,
    softmax_attend,
    stored,
    total,
    where,
)
from refattn.plan import Bias, Score, Slope
from refattn.spec import Array, Spec
from refattn.variants import sdpa
from refattn.variants._place import place, visible
from refattn.variants.sdpa import SDPA
from refattn.variants.t5 import T5

_T5 = T5()


@dataclass(frozen=True, kw_only=True)
class AttentionAlignment(Spec):
    """Softmax attention at a temperature for each head.

    bias: T5(), another bias term such as ALiBi(), or None. divide: "logits", or "scores" for q·k alone. causal: as
    SDPA's. scale: 1, as T5; None is D^-1/2.
    """

    bias: Spec | None = _T5
    divide: Literal["logits", "scores"] = "logits"
    causal: bool | Literal["top_left", "bottom_right"] = False
    scale: float | None = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.divide, str) or self.divide not in ("logits", "scores"):
            raise SpecError(f"divide is 'logits' or 'scores'; given: {self.divide!r}")
        if self.bias is not None and not isinstance(self.bias, Spec):
            raise SpecError(f"bias takes one Spec such as T5(), or None; given: {self.bias!r}")
        object.__setattr__(self, "scale", _undivided(self).scale)


def _undivided(spec: AttentionAlignment) -> SDPA:
    """The attention whose logits are divided, which also refuses what is out of range."""
    return SDPA(causal=spec.causal, scale=spec.scale, bias=() if spec.bias is None else (spec.bias,))


def signature(spec: AttentionAlignment) -> dict[str, Array]:
    """q, k, v, a temperature for each head, the arrays of the bias, and where padding ends and queries stand."""
    whole, plain = sdpa.signature(_undivided(spec)), sdpa.signature(SDPA())
    return {
        **{name: whole[name] for name in "qkv"},
        "temperature": Array("Hq", role="learned", domain="positive"),
        **{name: array for name, array in whole.items() if name not in plain},
        **{name: whole[name] for name in ("kv_lengths", "q_positions")},
    }


def outputs(spec: AttentionAlignment) -> dict[str, Array]:
    """The mean of the values, the divided logits' log-sum-exp, and two statistics of every row's weights."""
    return {"out": Array("B Hq Lq Dv"), **dict.fromkeys(("lse", "max_prob", "entropy"), Array("B Hq Lq"))}


def resolve(spec: AttentionAlignment, sizes: Mapping[str, int]) -> AttentionAlignment:
    """Scale, causal alignment and the bias as definite values; what contradicts the sizes is refused."""
    plain = sdpa.resolve(_undivided(spec), sizes)
    return replace(spec, causal=plain.causal, scale=plain.scale, bias=next(iter(plain.bias), None))


def validate(spec: AttentionAlignment, x: Mapping[str, Any]) -> None:
    """The arrays of the bias are finite."""
    sdpa.validate(_undivided(spec), x)


def reference(spec: AttentionAlignment, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """The formula, shifted first: so a single key has weight 1 exactly, and equal logits stay equal."""
    batch, heads, lq, width = x["q"].shape
    groups, lk = x["k"].shape[1:3]
    at = place(spec.causal, x)
    shape = (batch, heads, lq, lk)
    live = np.broadcast_to(visible(_undivided(spec), x, at), shape)

    q_ok, k_ok = np.all(finite(x["q"]), -1), np.all(finite(x["k"]), -1)
    rows = reshape(clean(x["q"]), (batch, groups, heads // groups, lq, width))
    product = reshape(einsum("bgrid,bgjd->bgrij", rows, clean(x["k"])), shape)
    product = real(spec.scale, product) * product
    spoiled = ~finite(product) | ~q_ok[..., None] | ~np.repeat(k_ok, heads // groups, axis=1)[:, :, None, :]
    product = clean(product)
    logits, allowed = (None, None) if spec.bias is None else _term(spec.bias, x, at)
    live = live if allowed is None else live & allowed
    bias = 0 if logits is None else broadcast(logits, shape)

    divided = product if spec.divide == "scores" else product + bias
    tau = reshape(x["temperature"], (1, heads, 1, 1))
    m = row_max(divided, live)
    s, m = where(live, divided - m, 0) / tau, m / tau
    if spec.divide == "scores":
        s = where(live, s + bias, 0)
        top = row_max(s, live)
        s, m = where(live, s - top, 0), m + top
    s = stored(s, cotangent=True)

    out, lse = softmax_attend(s, live, x["v"], spoiled=spoiled)
    empty, bad = ~np.any(live, -1), np.any(live & spoiled, -1)
    lse = where(empty, lse, where(empty, 0, lse) + reshape(m, empty.shape))
    weights = where(live, exp(s), 0)
    z = where(empty, 1, total(weights, -1))
    p = weights / reshape(z, (*empty.shape, 1))
    lost = where(bad, real(np.nan, s), real(1, s))
    max_prob = where(empty, 0, exp(amax(s, live)) / z) * lost
    entropy = (log(z) - total(p * s, -1)) * lost
    return {"out": out, "lse": lse, "max_prob": max_prob, "entropy": entropy}


def _term(term: Any, x: Mapping[str, Any], at: Any) -> Any:
    return sdpa._module(term).term(term, x, at)


def lower(spec: AttentionAlignment, x: Mapping[str, Any], state: Any = None) -> Score:
    """Queries over the temperature, and with them the bias: plain attention, whose out and lse are these."""
    tau, plan = x["temperature"], sdpa.lower(_undivided(spec), x)
    bias = plan.bias if spec.divide == "scores" else tuple(_over(tau, b) for b in plan.bias)
    return replace(plan, q=plan.q / reshape(tau, (1, tau.shape[0], 1, 1)), bias=bias)


def _over(tau: Any, bias: Any) -> Bias:
    """A bias divided by its head's temperature; a table's −∞ stays what it is."""
    if isinstance(bias, Slope):
        return replace(bias, slopes=bias.slopes / tau)
    masked = minus_infinite(bias.values)
    values = where(masked, 0, bias.values) / reshape(tau, (tau.shape[0], 1))
    found: Bias = replace(bias, values=where(masked, real(-np.inf, values), values))
    return found


def restrict(spec: AttentionAlignment, x: Mapping[str, Any], rows: tuple[int, ...]) -> dict[str, Any]:
    """The same problem for some query rows only: each keeps the position it had."""
    chosen = np.asarray(rows)
    return dict(x) | {"q": x["q"][:, :, chosen], "q_positions": place(spec.causal, x).i[:, 0, :, 0][:, chosen]}


def operations(spec: AttentionAlignment, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Those of the attention that is divided."""
    return sdpa.operations(_undivided(spec), sizes)
