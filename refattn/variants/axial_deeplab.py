r"""Axial-DeepLab: attention along one axis of an image whose queries, keys and values all read relative positions.

    s[h,i,j] = scale (N(q[h,i]·k[g,j]) + N(q[h,i]·rq[i−j]) + N(k[g,j]·rk[j−i])),     g = h // (Hq / Hkv)
    out[h,i] = N(Σ_j p[h,i,j] v[g,j]) + N(Σ_j p[h,i,j] rv[i−j]),     p[h,i,j] = exp(s[h,i,j] − lse[h,i])
    lse[h,i] = log Σ_j exp(s[h,i,j])

q (B,Hq,L,D); k (B,Hkv,L,D); v (B,Hkv,L,Dv); i and j run over the A = `span` pixels of one line, and every line is a
sequence of its own. The L pixels stand row by row, p = y · width + x: along "width" a line is a row and width = A;
along "height" it is a column and width = L / A. Tables rq, rk (2A − 1, D) and rv (2A − 1, Dv) are shared by the heads
and begin at the difference 1 − A: rq[n] here is row n + A − 1, so that a query reads rq at row i − j + A − 1, a value
rv likewise, and a key reads rk at row j − i + A − 1. There is no 1/√D: the default scale is 1.

N is the identity, or with norm=True a batch normalisation at inference, N(t) = gain t + offset: one gain and offset for
each head in the three logits (qk, qr, kr: (Hq,)), one for each head and channel in the two outputs (sv, sve: (Hq,Dv)).
From a checkpoint gain = weight / √(var + ε) and offset = bias − mean · gain. Offsets of logits reach lse alone.

`terms` keeps some of rq, rk and rv ("query", "key", "value"); with none of them and norm=False it is plain axial
attention along that axis, without its scale.

A checkpoint of the authors' code: its one table `relative` (2 Dv, 2A − 1) is rqᵀ, rkᵀ, rvᵀ one below the other, of D,
D and Dv = 2D rows; `bn_similarity` holds the heads' qk, then qr, then kr; `bn_output` sv and sve by turns, channel by
channel. Its convolutions and the batch normalisation of q, k and v come before, pooling by a stride after.

Source: Wang et al., arXiv 2003.07853, section 3 (recalled: equations 3 and 4); the authors' code, AxialAttention in
lib/models/axialnet.py of csrhddlam/axial-deeplab, which was read for the order of the tables and the normalisations.

Differs from: the paper's notation, which writes all three tables at p − o, key minus query (recalled), so that its rq
and rv run the other way; Axial, which has a scale and sums both axes (Axial-DeepLab takes one after the other, each
with projections of its own); Shaw, whose logits have no key term and whose table is clipped, where this span is a line.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.errors import ShapeError, SpecError
from refattn.numeric import concatenate, einsum, finite, real, reshape, softmax_attend, take, transpose
from refattn.plan import Dense, Relative, Score, ValueTable
from refattn.spec import Array, Spec, dyadic

_TABLES = {"query": "rq", "key": "rk", "value": "rv"}
# What N acts on, and the table that it reads.
_TERMS = {"qk": None, "qr": "query", "kr": "key", "sv": None, "sve": "value"}


@dataclass(frozen=True, kw_only=True)
class AxialDeepLab(Spec):
    """Position-sensitive attention along one axis of an image.

    span: pixels of a line along the axis, A. axis: "height" or "width". terms: which of "query", "key" and "value" have
    a table. norm: an affine map, which is batch normalisation at inference, of each term. scale: None is 1.
    """

    span: int
    axis: Literal["height", "width"] = "height"
    terms: tuple[Literal["query", "key", "value"], ...] = ("query", "key", "value")
    norm: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        if type(self.span) is not int or self.span < 1:
            raise SpecError(f"span is the number of pixels along the axis, an integer from 1 on; given: {self.span!r}")
        if not isinstance(self.axis, str) or self.axis not in ("height", "width"):
            raise SpecError(f"axis is 'height' or 'width'; given: {self.axis!r}")
        terms = self.terms
        if not isinstance(terms, tuple) or any(terms.count(t) > 1 or t not in tuple(_TABLES) for t in terms):
            raise SpecError(f"terms is a tuple of some of 'query', 'key' and 'value', once each; given: {terms!r}")
        object.__setattr__(self, "terms", tuple(t for t in _TABLES if t in terms))
        if type(self.norm) is not bool:
            raise SpecError(f"norm is True or False; given: {self.norm!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))

    @property
    def normed(self) -> tuple[str, ...]:
        """Names of the terms that N acts on."""
        return tuple(name for name, term in _TERMS.items() if term is None or term in self.terms)


def signature(spec: AxialDeepLab) -> dict[str, Array]:
    """q, k and v of the same pixels, row by row; the tables; gains and offsets."""
    arrays = {"q": Array("B Hq Lq D"), "k": Array("B Hkv Lk D"), "v": Array("B Hkv Lk Dv")}
    for term in spec.terms:
        arrays[_TABLES[term]] = Array(f"{2 * spec.span - 1} {'Dv' if term == 'value' else 'D'}", role="learned")
    for name in spec.normed if spec.norm else ():
        affine = Array("Hq Dv" if name.startswith("sv") else "Hq", role="learned")
        arrays |= {f"{name}_gain": affine, f"{name}_offset": affine}
    return arrays


def outputs(spec: AxialDeepLab) -> dict[str, Array]:
    """The sum of the two normalised means, and the natural logarithm of the softmax's denominator."""
    return {"out": Array("B Hq Lq Dv"), "lse": Array("B Hq Lq")}


def resolve(spec: AxialDeepLab, sizes: Mapping[str, int]) -> AxialDeepLab:
    """The scale as a definite value; pixels that fill no image are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    if sizes["Lq"] != sizes["Lk"] or sizes["Lq"] % spec.span:
        raise ShapeError(
            f"queries and keys are the same pixels, in lines of {spec.span} along the {spec.axis}: Lq = Lk, a multiple "
            f"of {spec.span}; given: Lq={sizes['Lq']}, Lk={sizes['Lk']}"
        )
    return replace(spec, scale=1.0 if spec.scale is None else spec.scale)


def validate(spec: AxialDeepLab, x: Mapping[str, Any]) -> None:
    """What is learned is finite; q, k and v that are not propagate along their lines."""
    for name, array in signature(spec).items():
        if array.role == "learned" and not np.isfinite(np.asarray(x[name], np.float64)).all():
            raise ShapeError(f"{name} must hold finite numbers; given: {x[name]}")


def reference(spec: AxialDeepLab, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Every line of the image as a sequence of its own, each term through its own normalisation."""
    heads, span = x["q"].shape[1], spec.span
    own = np.arange(heads) // max(1, heads // x["k"].shape[1])
    q, k, v = (_lines(spec, a) for a in (x["q"], take(x["k"], own, 1), take(x["v"], own, 1)))
    place = np.arange(span)
    behind = place[:, None] - place + span - 1

    def normal(name: str, term: Any) -> Any:
        if not spec.norm:
            return term
        gain, offset = (x[f"{name}_{part}"] for part in ("gain", "offset"))
        shape = (1, heads, 1, *(gain.shape[1:] or (1,)))
        return reshape(gain, shape) * term + reshape(offset, shape)

    def vectors(name: str, rows: Any) -> Any:
        return reshape(take(x[name], rows.reshape(-1), 0), (span, span, x[name].shape[1]))

    s = normal("qk", einsum("bhid,bhjd->bhij", q, k))
    if "query" in spec.terms:
        s = s + normal("qr", einsum("bhid,ijd->bhij", q, vectors("rq", behind)))
    if "key" in spec.terms:
        s = s + normal("kr", einsum("bhjd,ijd->bhij", k, vectors("rk", behind.T)))
    s = real(spec.scale, s) * s

    width = v.shape[3]
    spoiled = ~np.all(finite(q), -1)[..., :, None] | ~np.all(finite(k), -1)[..., None, :]
    live, relative = np.ones(s.shape, bool), []
    if "value" in spec.terms:
        # Two means by the same weights side by side, for each has a normalisation of its own.
        rv, nothing = x["rv"], [real(np.zeros(a.shape, np.int64), s) for a in (v, x["rv"])]
        v, relative = concatenate([v, nothing[0]], -1), [(behind[None], concatenate([nothing[1], rv], -1))]
    means, lse = softmax_attend(s, live, v, spoiled=spoiled, relative=relative)
    out = normal("sv", means[..., :width])
    if "value" in spec.terms:
        out = out + normal("sve", means[..., width:])
    lse = reshape(lse, (*lse.shape, 1))
    return {"out": _pixels(spec, out, x["q"]), "lse": _pixels(spec, lse, x["q"])[..., 0]}


def _lines(spec: AxialDeepLab, a: Any) -> Any:
    """(B,H,L,W) as lines beside the batch, (B·L/A,H,A,W)."""
    batch, heads, pixels, width = a.shape
    count = pixels // spec.span
    if spec.axis == "width":
        image = transpose(reshape(a, (batch, heads, count, spec.span, width)), (0, 2, 1, 3, 4))
    else:
        image = transpose(reshape(a, (batch, heads, spec.span, count, width)), (0, 3, 1, 2, 4))
    return reshape(image, (batch * count, heads, spec.span, width))


def _pixels(spec: AxialDeepLab, a: Any, like: Any) -> Any:
    """Lines beside the batch, (B·L/A,H,A,W), back as (B,H,L,W), the pixels of `like`."""
    (batch, heads, pixels, _), width = like.shape, a.shape[3]
    image = reshape(a, (batch, pixels // spec.span, heads, spec.span, width))
    image = transpose(image, (0, 2, 1, 3, 4) if spec.axis == "width" else (0, 2, 3, 1, 4))
    return reshape(image, (batch, heads, pixels, width))


def lower(spec: AxialDeepLab, x: Mapping[str, Any], state: Any = None) -> Score:
    """All pixels at once, lines as segments; gains folded into what they multiply, offsets into a bias and the values.

    As the weights of a row sum to 1, the outputs' offsets may stand in every value.
    """
    heads, groups, pixels = x["q"].shape[1], x["k"].shape[1], x["q"].shape[2]
    q, k, v, scale, end = x["q"], x["k"], x["v"], real(spec.scale, x["q"]), spec.span - 1
    if spec.norm:
        own = np.repeat(np.arange(groups), heads // groups)
        k, v = take(k, own, 1), take(v, own, 1)

    def affine(name: str, part: str, without: int) -> Any:
        """A gain or offset as (Hq,1,1) or (Hq,1,Dv); without normalisation the integer that changes nothing."""
        found = x.get(f"{name}_{part}")
        return without if found is None else reshape(found, (heads, 1, *(found.shape[1:] or (1,))))

    def table(name: str, rows: slice) -> Any:
        """A table in a new order of its rows, for all heads or with a gain for each."""
        turned = take(x[name], np.arange(2 * end + 1)[rows], 0)
        return reshape(turned, (1, *turned.shape))

    backwards, relative, v_table = slice(None, None, -1), [], []
    # Plans count key minus query, as rk does.
    if "query" in spec.terms:
        rows = scale * q * affine("qr", "gain", 1)
        relative.append(Relative(rows=rows, values=table("rq", backwards), offset=end))
    if "key" in spec.terms:
        values = scale * table("rk", slice(None)) * affine("kr", "gain", 1)
        relative.append(Relative(rows=k, values=values, offset=end, side="k"))
    if "value" in spec.terms:
        v_table.append(ValueTable(values=table("rv", backwards) * affine("sve", "gain", 1), offset=end))
    offset = {name: affine(name, "offset", 0) for name in _TERMS}
    bias = (Dense(values=scale * (offset["qk"] + offset["qr"] + offset["kr"])),) if spec.norm else ()
    y, x_ = np.divmod(np.arange(pixels)[None], spec.span if spec.axis == "width" else max(1, pixels // spec.span))
    along, line = (x_, y) if spec.axis == "width" else (y, x_)
    return Score(
        q=q * affine("qk", "gain", 1),
        k=k,
        v=v * affine("sv", "gain", 1) + (offset["sv"] + offset["sve"]),
        scale=spec.scale or 0.0,
        positions=(along, along),
        segments=(line, line),
        relative=tuple(relative),
        bias=bias,
        v_table=tuple(v_table),
    )


def operations(spec: AxialDeepLab, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of the products, forward, each table's for every pair, and bytes of float64 scores."""
    pairs = sizes["B"] * sizes["Hq"] * sizes["Lq"] * spec.span
    logits, values = (sum(n.startswith("sv") == sv for n in spec.normed) for sv in (False, True))
    return 2 * pairs * (logits * sizes["D"] + values * sizes["Dv"]), 8 * pairs
