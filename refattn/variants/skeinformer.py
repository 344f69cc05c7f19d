r"""Skeinformer: attention of every query to a few drawn keys, the others taken for their geometric mean.

    a[h,i,j] = scale q[h,i]·k[g,j],     S = the keys in columns[h],  d = |S|,  n keys in all,     g = h // (Hq / Hkv)
    γ[h,i] = (Π_S exp a_ij)^(1/d) = exp(mean_S a_ij)
    out[h,i] = (Σ_S exp(a_ij) v[g,j] + γ_i Σ_not S v[g,j]) / (Σ_S exp(a_ij) + (n − d) γ_i)

q (B,Hq,Lq,D); k (B,Hkv,Lk,D); v (B,Hkv,Lk,Dv). columns (B,Hq,C), drawn outside: read as a set, so that a key named
twice counts once and a shorter set is written by repeating one of its keys. pilot (B,P): query rows drawn with
replacement, the same for all heads of a sequence. Their exact rows give the scores by which the columns are to be drawn

    column_scores[h,j] = √(Σ_p B[h,pilot_p,j]²) ‖v[g,j]‖,     B = softmax of a over all n keys

without replacement, each in proportion to what is left (`refattn.draws.columns`): evaluate once for the scores, draw,
evaluate again. A row drawn twice counts twice. With reuse_pilot=True the pilot's queries keep those exact rows.
The scores are an output like out and have gradients, save for a value of norm 0, where √ has none; that the columns
were drawn by them has no gradient.

normalisation="adaptive" is the formula above: the softmax of a with the mean of the drawn logits in the place of each
logit that was not drawn. "simple": the softmax over S alone. "none": Σ_S exp(a_ij) v_j over the exact Σ_j exp(a_ij) of
all keys, the columns S of exact attention and nothing else. Every key drawn, all three are exact attention; none drawn,
γ = 1 and "adaptive" is the mean of the values, the other two are 0.

With kv_lengths n is the sequence's own length, and what lies beyond it is never read; a column there is none of S.

Source: Chen, Zeng, Hakkani-Tur, Jin, Ji, Yang, arXiv 2112.05359: column sampling, adaptive row normalization, pilot
sampling reutilization. Read off the authors' code, github.com/pkuzengqi/Skeinformer at 8b9ac6b,
src/models/attention_skeinformer.py, where "simple" and "none" are ablations; given its draws, the numbers here are its
own in float64 (compared once, for it is on no index). Section numbers are not given, for they were not looked up.

Differs from: that code, which splits the scale as D^-1/4 over q and k, sets padded queries to 0 and takes exponentials
without their maximum; its ablations never reuse the pilot rows.
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
    broadcast,
    clean,
    einsum,
    exp,
    finite,
    real,
    reshape,
    softmax_attend,
    sqrt,
    stored,
    total,
    where,
)
from refattn.spec import Array, Spec, dyadic

Bools = NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class Skeinformer(Spec):
    """Attention to drawn key columns.

    normalisation: "adaptive", "simple" or "none". reuse_pilot: exact rows for the pilot queries. scale: None is D^-1/2.
    """

    normalisation: Literal["adaptive", "simple", "none"] = "adaptive"
    reuse_pilot: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        known = ("adaptive", "simple", "none")
        if not isinstance(self.normalisation, str) or self.normalisation not in known:
            raise SpecError(f"normalisation is one of {', '.join(map(repr, known))}; given: {self.normalisation!r}")
        if type(self.reuse_pilot) is not bool:
            raise SpecError(f"reuse_pilot is True or False; given: {self.reuse_pilot!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: Skeinformer) -> dict[str, Array]:
    """q, k, v, the drawn rows and columns, and the lengths of padded sequences."""
    return {
        "q": Array("B Hq Lq D"),
        "k": Array("B Hkv Lk D"),
        "v": Array("B Hkv Lk Dv"),
        "pilot": Array("B P", "int", "choice", "indices:Lq"),
        "columns": Array("B Hq C", "int", "choice", "indices:Lk"),
        "kv_lengths": Array("B", "int", "choice", "lengths:Lk", optional=True),
    }


def outputs(spec: Skeinformer) -> dict[str, Array]:
    """The attention, and by what the columns are to be drawn."""
    return {"out": Array("B Hq Lq Dv"), "column_scores": Array("B Hq Lk")}


def resolve(spec: Skeinformer, sizes: Mapping[str, int]) -> Skeinformer:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: Skeinformer, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def reference(spec: Skeinformer, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Exact rows for the pilot and its scores, sketched rows for the others."""
    there, drawn, times = choices(x)
    k, v = (where(there[:, None, :, None], x[name], 0) for name in "kv")
    a = logits(spec, x["q"], k)
    piloted = (times > 0)[:, None, :, None]
    live = np.broadcast_to(there[:, None, None, :], a.shape)

    exact, lse = softmax_attend(a, live & piloted, v)
    if spec.normalisation == "adaptive":
        count = np.maximum(drawn.sum(-1, keepdims=True), 1)
        mean = total(where(drawn, a, 0), -1, keepdims=True) / real(count, a)
        out, _ = softmax_attend(where(drawn, a, mean), live, v)
    elif spec.normalisation == "simple":
        out, _ = softmax_attend(a, live & drawn, v)
    else:
        out, _ = softmax_attend(a, live, v, keep=real(drawn.astype(np.int64), a))
    if spec.reuse_pilot:
        out = where(piloted, exact, out)
    return {"out": out, "column_scores": column_scores(a, lse, live & piloted, times, v)}


def choices(x: Mapping[str, Any]) -> tuple[Bools, Bools, NDArray[np.int64]]:
    """Which keys are there (B,Lk), which are drawn (B,Hq,1,Lk), and how often each row is in the pilot (B,Lq)."""
    (batch, heads, lq, _), lk = x["q"].shape, x["k"].shape[2]
    there = np.ones((batch, lk), bool)
    if "kv_lengths" in x:
        there = np.arange(lk) < np.asarray(x["kv_lengths"], np.int64)[:, None]
    drawn = np.zeros((batch, heads, lk), bool)
    np.put_along_axis(drawn, np.asarray(x["columns"], np.int64), True, -1)
    times = np.sum(np.asarray(x["pilot"], np.int64)[:, None, :] == np.arange(lq)[:, None], -1)
    return there, (drawn & there[:, None, :])[:, :, None, :], times


def logits(spec: Skeinformer, q: Any, k: Any) -> Any:
    """Scale q·k (B,Hq,Lq,Lk), NaN for a pair with a number that is not finite."""
    (batch, heads, lq, width), (groups, lk) = q.shape, k.shape[1:3]
    rows = reshape(clean(q), (batch, groups, heads // groups, lq, width))
    a = reshape(einsum("bgrid,bgjd->bgrij", rows, clean(k)), (batch, heads, lq, lk))
    a = real(spec.scale, a) * a
    q_ok, k_ok = np.all(finite(q), -1), np.repeat(np.all(finite(k), -1), heads // groups, axis=1)
    ok = q_ok[..., :, None] & k_ok[..., None, :]
    return a if ok.all() else where(ok, a, real(np.nan, a))


def column_scores(a: Any, lse: Any, live: Bools, times: NDArray[np.int64], v: Any) -> Any:
    """Norm of each key's column of the pilot's weights times that of its value, (B,Hq,Lk); 0 where no key is."""
    (batch, heads, _, lk), groups = a.shape, v.shape[1]
    lse = where(np.any(live, -1), lse, 0)
    # A kernel may keep these weights in its storage type.
    weights = stored(where(live, exp(where(live, a - reshape(lse, (*lse.shape, 1)), 0)), 0))
    columns = einsum("bi,bhij->bhj", real(times, a), weights * weights)
    values = reshape(total(v * v, -1), (batch, groups, 1, lk))
    values = reshape(broadcast(values, (batch, groups, heads // groups, lk)), (batch, heads, lk))
    read = np.any(live, 2)
    return where(read, sqrt(where(read, columns * values, 1)), 0)


lower = "a plan has no columns drawn for each head: it would attend to every key, which this method is there to spare"


def operations(spec: Skeinformer, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of the pilot's rows and the drawn columns, bytes of their scores.

    "none" takes the products of all pairs besides, for the exact sums of its rows.
    """
    heads = sizes["B"] * sizes["Hq"]
    pairs = heads * (sizes["P"] * sizes["Lk"] + sizes["Lq"] * sizes["C"])
    sums = heads * sizes["Lq"] * sizes["Lk"] if spec.normalisation == "none" else 0
    return 2 * pairs * (sizes["D"] + sizes["Dv"]) + 2 * sums * sizes["D"], 8 * pairs
