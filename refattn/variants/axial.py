r"""Axial attention: a pixel attends to the pixels of its column and to those of its row, each by a softmax of its own.

    out[h,p] = Σ_axis Σ_{p' on p's line} softmax_p'(scale q[h,p]·k[g,p']) v[g,p'],     g = h // (Hq / Hkv)

q (B,Hq,L,D); k (B,Hkv,L,D); v (B,Hkv,L,Dv); the L = height · width pixels row by row, p = y · width + x. Axis "height"
attends along a column, over all y; axis "width" along a row, over all x. Cost O(L (height + width)), not O(L²).

With one axis lse[h,p] is the natural logarithm of the softmax's denominator; the sum of two softmaxes has no lse, so
with both axes out is the only output. A pixel is among its own keys on both axes.

Only the sum of axes that share q, k and v lies between the projections and W_O. Where each axis has projections of its
own, the sum follows W_O: evaluate one axis at a time. Axes one after the other project anew in between: likewise.

Source: Ho et al., arXiv 1912.12180, section 3; Wang et al., arXiv 2003.07853, section 3.2 (both recalled, not looked
up); the package axial-attention, whose sum_axial_out adds the axes and otherwise applies one after the other.

Differs from: criss-cross attention, one softmax over row and column together; Axial-DeepLab's position-sensitive form,
which adds relative terms to q, k and v and has no scale; that package's layers, which project for each axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import reshape, transpose
from refattn.plan import Mix, Plan, Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import sdpa
from refattn.variants.sdpa import SDPA

_AXES = ("height", "width")


@dataclass(frozen=True, kw_only=True)
class Axial(Spec):
    """Attention along the axes of an image.

    width: pixels in a row, which the number of pixels does not tell. axes: ("height",), ("width",) or both, summed.
    scale: None is D^-1/2.
    """

    width: int
    axes: tuple[Literal["height", "width"], ...] = ("height", "width")
    scale: float | None = None

    def __post_init__(self) -> None:
        if type(self.width) is not int or self.width < 1:
            raise SpecError(f"width is the number of pixels in a row, an integer from 1 on; given: {self.width!r}")
        axes = self.axes
        if not isinstance(axes, tuple) or not axes or any(axes.count(a) > 1 or a not in _AXES for a in axes):
            raise SpecError(f"axes is ('height',), ('width',) or both in a tuple; given: {axes!r}")
        object.__setattr__(self, "axes", tuple(a for a in _AXES if a in axes))
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: Axial) -> dict[str, Array]:
    """q, k and v of the same pixels, row by row."""
    return {"q": Array("B Hq Lq D"), "k": Array("B Hkv Lk D"), "v": Array("B Hkv Lk Dv")}


def outputs(spec: Axial) -> dict[str, Array]:
    """The sum of the axes' means; for one axis the logarithm of its softmax's denominator."""
    out = {"out": Array("B Hq Lq Dv")}
    return out | {"lse": Array("B Hq Lq")} if len(spec.axes) == 1 else out


def resolve(spec: Axial, sizes: Mapping[str, int]) -> Axial:
    """The scale as a definite value; pixels that fill no image are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    if sizes["Lq"] != sizes["Lk"] or sizes["Lq"] % spec.width:
        raise ShapeError(
            f"queries and keys are the same pixels, rows of width {spec.width}: Lq = Lk = height · {spec.width}; "
            f"given: Lq={sizes['Lq']}, Lk={sizes['Lk']}"
        )
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: Axial, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates along its lines."""


def reference(spec: Axial, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
    """Every line of the image as a sequence of its own."""
    found = [_along(axis, spec, x) for axis in spec.axes]
    if len(found) == 1:
        return found[0]
    return {"out": found[0]["out"] + found[1]["out"]}


def _along(axis: str, spec: Axial, x: Mapping[str, Any]) -> dict[str, Any]:
    """Out and lse of one axis: its lines join the batch, and come back."""
    batch, heads, pixels, _ = x["q"].shape
    height = pixels // spec.width
    # Of (batch, heads, y, x, ...): a row keeps y beside the batch, a column x.
    order = (0, 3, 1, 2) if axis == "height" else (0, 2, 1, 3)

    def lines(a: Any) -> Any:
        image = transpose(reshape(a, (*a.shape[:2], height, spec.width, a.shape[3])), (*order, 4))
        return reshape(image, (image.shape[0] * image.shape[1], *image.shape[2:]))

    def pixelwise(a: Any) -> Any:
        rest = a.shape[3:]
        whole = (batch, heads, height, spec.width)
        image = reshape(a, (*(whole[n] for n in order), *rest))
        back = [int(n) for n in np.argsort(order)] + [4] * len(rest)
        return reshape(transpose(image, back), (batch, heads, pixels, *rest))

    found = sdpa.reference(SDPA(scale=spec.scale), {name: lines(x[name]) for name in "qkv"})
    return {name: pixelwise(a) for name, a in found.items()}


def lower(spec: Axial, x: Mapping[str, Any], state: Any = None) -> Plan:
    """All pixels at once, those of one line told apart from others by its number as a segment; the axes' sum."""
    pixel = np.arange(x["q"].shape[2])[None]
    line = {"height": pixel % spec.width, "width": pixel // spec.width}
    parts = tuple(
        Score(
            q=x["q"],
            k=x["k"],
            v=x["v"],
            scale=spec.scale or 0.0,
            positions=(pixel, pixel),
            segments=(line[axis], line[axis]),
        )
        for axis in spec.axes
    )
    return parts[0] if len(parts) == 1 else Mix(parts=parts, weights=(np.ones(()), np.ones(())))


def operations(spec: Axial, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of the products, forward, and bytes of the axes' float64 scores: O(L (height + width)).

    The reference needs as much; a plan's segments leave it to a kernel to skip what lies outside a line.
    """
    length = {"height": sizes["Lq"] // spec.width, "width": spec.width}
    pairs = sizes["B"] * sizes["Hq"] * sizes["Lq"] * sum(length[axis] for axis in spec.axes)
    return 2 * pairs * (sizes["D"] + sizes["Dv"]), 8 * pairs
