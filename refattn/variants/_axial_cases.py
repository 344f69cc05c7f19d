"""Golden cases of axial attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe
from refattn.variants._case_parts import edited, flagged, scaled, sizes
from refattn.variants.axial import Axial

FLAGS: Mapping[str, Flag] = {
    "axial": Flag("Attention along the rows and columns of an image."),
    "axial_one_axis": Flag("Along one axis alone, which has an lse."),
}


def cases() -> Iterator[Case]:
    """One axis and both, images of one row and of odd sides, a pixel that dominates its lines."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {"axial": True, "axial_one_axis": len(spec.axes) == 1, "scale": spec.scale is not None}
    return (name for name, holds in present.items() if holds)


def image(height: int, width: int, *given: Any, **options: Any) -> dict[str, int]:
    """Sizes of an image."""
    return sizes((height * width, height * width), *given, **options)


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="axial/3x4",
        spec=Axial(width=4),
        sizes=image(3, 4, (4, 2), (8, 4)),
        catches="height and width exchanged; one axis left out; one softmax over row and column together",
    )
    yield Case(
        name="axial/rows_5x7",
        spec=Axial(width=7, axes=("width",)),
        sizes=image(5, 7, (2, 1), (4, 3), batch=2),
        dtype="bfloat16",
        cotangents={"dlse": Recipe()},
        catches="attention down the columns where it is asked along the rows; pixels read column by column",
    )
    yield Case(
        name="axial/columns_7x3",
        spec=Axial(width=3, axes=("height",), scale=0.25),
        sizes=image(7, 3, (2, 2), (5, 4)),
        dtype="float16",
        cotangents={"dlse": Recipe()},
        catches="attention along the rows where it is asked down the columns; the default scale",
    )
    yield Case(
        name="axial/one_row_1x9",
        spec=Axial(width=9),
        sizes=image(1, 9, (2, 2), (8, 4)),
        dtype="float16",
        catches="an axis of length 1 left out, whose output is the pixel's own value",
    )
    yield Case(
        name="axial/dominant_pixel",
        spec=Axial(width=5),
        sizes=image(5, 5, (2, 2), (8, 4)),
        inputs={
            "k": edited(NORMAL, scaled((None, None, 12, None), 32.0)),
            "v": edited(NORMAL, scaled((None, None, 12, None), 2.0**10)),
        },
        flags=("large_scores",),
        catches="a pixel of huge score and value heard beyond its own row and column",
    )
    yield Case(
        name="axial/cancelling_17x19",
        spec=Axial(width=19),
        sizes=image(17, 19, (1, 1), (2, 1)),
        dtype="float16",
        inputs={"v": Recipe(alternate=True)},
        flags=("cancelling_values",),
        catches="the axes' outputs, of opposite signs in places, rounded to 16 bits before they are added",
    )
    yield Case(
        name="axial/float64_4x2",
        spec=Axial(width=2),
        sizes=image(4, 2, (3, 3), (5, 4)),
        dtype="float64",
        catches="one of the two axes in float32",
    )
