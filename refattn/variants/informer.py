r"""Informer's ProbSparse attention: softmax for the u queries that look most peaked, a plain mean for the others.

    M[h,i] = max_n p_n − (Σ_n p_n) / N,     p_n = q[h,i]·k[g,sample[i,n]],  n = 1..U,     g = h // (Hq / Hkv)
    out[h,i] = Σ_j softmax_j(scale q[h,i]·k[g,j]) v[g,j]    for the u largest M[h,·], else  lazy[g,i]

q (B,Hq,Lq,D); k (B,Hkv,Lk,D); v (B,Hkv,Lk,Dv). sample (Lq,U): the keys by which query i is measured, drawn outside
(`refattn.draws.sampled_keys`), one draw for every sequence and head; a key that occurs twice counts twice. Products in
the measure are not scaled, which changes no ranking. u = `queries`, or min(factor ⌈ln Lq⌉, Lq): 0 where Lq = 1.

measure="max_mean" is M above; N is Lk with divisor="keys", as the authors compute it although they sum U products, and
U with divisor="samples". measure="lse_mean" is the paper's own, log Σ_n exp(scale p_n) − scale (Σ_n p_n) / N: exact
where the sample holds every key once, elsewhere estimated from it.

lazy="mean" is the mean of all values. With causal=True (Lq = Lk) a chosen query sees the keys up to its own position,
and lazy is "cummean", the mean of the values up to it, or "cumsum", their sum, as the authors have it. A causal output
still hangs on what comes later, for sample and ranking are over the whole sequence; so there is no streaming form.

indices (B,Hq,u): the chosen queries, the largest M first, of equals the lowest index. margin (B,Hq): the least chosen M
minus the largest not chosen, 0 where all or none are chosen. A kernel may choose otherwise than this text only where
its error in M reaches the margin. Gradients: the choice is constant; margin itself has the gradient of its products.

Source: Zhou et al., arXiv 2012.07436, section 3: equations 2 (lse_mean) and 4 (max_mean), algorithm 1, numbers recalled
and not looked up. Sampling, the divisor Lk and cumsum: the authors' code, github.com/zhouhaoyi/Informer2020 at 29f2a73,
models/attn.py; given its draws, the numbers here are its own in float64 (compared once, for it is on no index).

Differs from: transformers, which draws one sample of min(factor Lq ⌈ln(1 + Lk)⌉, Lk) keys for all queries together
(here: equal rows of sample), so that in self-attention U = Lk and both divisors agree; takes
u = min(factor ⌈ln(1 + Lq)⌉, Lq) (here: `queries`); and in its decoder uses cumsum with or without a causal mask.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import (
    amax,
    broadcast,
    clean,
    einsum,
    exp,
    finite,
    log,
    real,
    reshape,
    row_max,
    take,
    top_k,
    total,
    where,
)
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants.sdpa import SDPA

_CHOICES = {
    "measure": ("max_mean", "lse_mean"),
    "divisor": ("keys", "samples"),
    "lazy": ("mean", "cumsum", "cummean"),
}


@dataclass(frozen=True, kw_only=True)
class Informer(Spec):
    """Softmax attention for the u most peaked queries.

    queries: u, or None for min(factor ⌈ln Lq⌉, Lq). measure: "max_mean" or "lse_mean". divisor: "keys" or "samples".
    lazy: "mean", or where causal "cumsum" or "cummean". scale: None is D^-1/2.
    """

    queries: int | None = None
    factor: int = 5
    measure: Literal["max_mean", "lse_mean"] = "max_mean"
    divisor: Literal["keys", "samples"] = "keys"
    lazy: Literal["mean", "cumsum", "cummean"] = "mean"
    causal: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise SpecError(f"{name} is one of {', '.join(map(repr, known))}; given: {given!r}")
        if type(self.factor) is not int or self.factor < 1:
            raise SpecError(f"factor is a positive integer; given: {self.factor!r}")
        if self.queries is not None and (type(self.queries) is not int or self.queries < 0):
            raise SpecError(f"queries is a count of queries, or None; given: {self.queries!r}")
        if type(self.causal) is not bool:
            raise SpecError(f"causal is False or True; given: {self.causal!r}")
        if self.causal == (self.lazy == "mean"):
            fitting = "'cumsum' (the authors' code) or 'cummean'" if self.causal else "'mean'"
            raise SpecError(f"with causal={self.causal} lazy is {fitting}; given: {self.lazy!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: Informer) -> dict[str, Array]:
    """q, k, v, and the keys each query is measured by."""
    return {
        "q": Array("B Hq Lq D"),
        "k": Array("B Hkv Lk D"),
        "v": Array("B Hkv Lk Dv"),
        "sample": Array("Lq U", "int", "choice", "indices:Lk"),
    }


def outputs(spec: Informer) -> dict[str, Array]:
    """The attention, which queries were chosen, and by how much."""
    count = "u" if spec.queries is None else str(spec.queries)
    return {"out": Array("B Hq Lq Dv"), "indices": Array(f"B Hq {count}", "int"), "margin": Array("B Hq")}


def resolve(spec: Informer, sizes: Mapping[str, int]) -> Informer:
    """Scale and u as definite values; lengths and heads that do not fit are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    length = sizes["Lq"]
    if spec.causal and length != sizes["Lk"]:
        raise SpecError(f"causal=True needs as many queries as keys; given: Lq={length}, Lk={sizes['Lk']}")
    if spec.queries is not None and spec.queries > length:
        raise SpecError(f"queries counts some of the Lq={length} queries; given: {spec.queries}")
    queries = min(spec.factor * math.ceil(math.log(max(length, 1))), length) if spec.queries is None else spec.queries
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, queries=queries, scale=default if spec.scale is None else spec.scale)


def validate(spec: Informer, x: Mapping[str, Any]) -> None:
    """Only finite products have a rank."""
    for name in ("q", "k"):
        if not np.isfinite(np.asarray(x[name], np.float64)).all():
            raise ShapeError(f"{name} must hold finite numbers, for queries are ranked by their products with keys")


def reference(spec: Informer, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Measure every query, choose, attend."""
    q, k, v = x["q"], x["k"], x["v"]
    batch, heads, lq, _ = q.shape
    count = max(k.shape[2] if spec.divisor == "keys" else x["sample"].shape[1], 1)
    measure = measured(spec, x, count)
    indices = top_k(measure, spec.queries or 0)
    chosen = np.zeros(measure.shape, bool)
    np.put_along_axis(chosen, indices, True, -1)

    exact = SDPA(causal=spec.causal and "top_left", scale=spec.scale)
    attended = sdpa.reference(exact, {"q": q, "k": k, "v": v, "mask": chosen[..., None]})
    rest = lazily(spec, v, lq)
    groups, width = rest.shape[1], rest.shape[-1]
    rest = broadcast(reshape(rest, (batch, groups, 1, lq, width)), (batch, groups, heads // groups, lq, width))
    out = where(chosen[..., None], attended["out"], reshape(rest, (batch, heads, lq, width)))
    some = np.any(chosen, -1) & ~np.all(chosen, -1)
    margin = where(some, (-amax(-measure, chosen) - amax(measure, ~chosen)) / count, 0)
    return {"out": out, "indices": indices, "margin": margin}


def measured(spec: Informer, x: Mapping[str, Any], count: int) -> Any:
    """M (B,Hq,Lq) times N: where nothing is divided, exact balls stay exact and so decide ties."""
    q, k, sample = x["q"], x["k"], np.asarray(x["sample"], np.int64)
    batch, heads, lq, width = q.shape
    groups, samples = k.shape[1], sample.shape[1]
    keys = reshape(take(k, sample.reshape(-1), 2), (batch, groups, lq, samples, width))
    rows = reshape(q, (batch, groups, heads // groups, lq, width))
    p = reshape(einsum("bgrid,bgiud->bgriu", rows, keys), (batch, heads, lq, samples))
    if spec.measure == "max_mean":
        top = amax(p, np.ones(p.shape, bool))
    else:
        p = real(spec.scale, p) * p
        shift = row_max(p, np.ones(p.shape, bool))
        top = reshape(shift, p.shape[:-1]) + log(where(np.array(samples > 0), total(exp(p - shift), -1), 1))
    return count * top - total(p, -1)


def lazily(spec: Informer, v: Any, lq: int) -> Any:
    """What a query that is not chosen gets, (B,Hkv,Lq,Dv)."""
    lk = v.shape[2]
    reach = np.tril(np.ones((lq, lk), np.int64)) if spec.causal else np.ones((lq, lk), np.int64)
    sums = einsum("ij,bgjd->bgid", real(reach, v), clean(v))
    if spec.lazy != "cumsum":
        sums = sums / real(np.maximum(reach.sum(-1), 1)[:, None], v)
    spoiled: NDArray[np.bool_] = np.einsum("ij,bgjd->bgid", reach, ~finite(v)) > 0
    return sums + where(spoiled, real(np.nan, v), 0)


lower = "a plan has no rows chosen by rank: it would compute every row in full, which this method is there to spare"


def operations(spec: Informer, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of the sampled products and of the chosen rows; bytes of the chosen rows' scores."""
    heads = sizes["B"] * sizes["Hq"]
    sampled, pairs = heads * sizes["Lq"] * sizes["U"], heads * (spec.queries or 0) * sizes["Lk"]
    return 2 * sampled * sizes["D"] + 2 * pairs * (sizes["D"] + sizes["Dv"]), 8 * pairs
