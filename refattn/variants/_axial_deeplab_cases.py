"""Golden cases of Axial-DeepLab's position-sensitive attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe
from refattn.variants._case_parts import edited, flagged, scaled, set_, sizes
from refattn.variants.axial_deeplab import AxialDeepLab

FLAGS: Mapping[str, Flag] = {
    "axial_deeplab": Flag("Relative positions read by queries, keys and values along one axis of an image."),
    "axial_deeplab_norm": Flag("A gain and an offset for each term of the logits and of the output."),
    "axial_deeplab_terms": Flag("Some of the three tables left out."),
}


def cases() -> Iterator[Case]:
    """Both axes, every subset of tables that the ablations use, normalisation, and terms that cancel."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "axial_deeplab": True,
        "axial_deeplab_norm": spec.norm,
        "axial_deeplab_terms": len(spec.terms) < 3,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def image(height: int, width: int, *given: Any, **options: Any) -> dict[str, int]:
    """Sizes of an image."""
    return sizes((height * width, height * width), *given, **options)


# The gradient of an offset in a logit is the sum of these: a few tiny ones keep it from being a double itself, which no
# ball around it could tell from its neighbours.
UNEVEN = edited(NORMAL, scaled((None, None, (0, 3)), 2.0**-50))


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    half = Recipe(exp2=-9)
    logits = dict.fromkeys(("q", "k"), half)
    yield Case(
        name="axial_deeplab/columns_4x3",
        spec=AxialDeepLab(span=4),
        sizes=image(4, 3, (4, 2), (4, 8)),
        inputs=logits,
        cotangents={"dlse": Recipe()},
        catches="scores divided by √D; height taken for width; tables for each head of its own",
    )
    yield Case(
        name="axial_deeplab/rows_3x5",
        spec=AxialDeepLab(span=5, axis="width"),
        sizes=image(3, 5, (2, 2), (4, 6), batch=2),
        dtype="bfloat16",
        inputs=logits | {"rq": half, "rk": half},
        catches="rq or rv at key minus query, or rk at query minus key; pixels read column by column",
    )
    yield Case(
        name="axial_deeplab/norm_rows_3x4",
        spec=AxialDeepLab(span=4, axis="width", norm=True),
        sizes=image(3, 4, (4, 2), (4, 4)),
        inputs={
            "qk_gain": edited(half, set_((1,), -0.5)),
            "qr_gain": Recipe(kind="values", values=(0.5, 2.0, -1.0, 0.25)),
            "kr_gain": Recipe(kind="values", values=(1.5, 0.75, 1.0, -2.0)),
        },
        cotangents={"dlse": UNEVEN},
        catches="one gain for the three logits; offsets of logits left out of lse; gains of the key head",
    )
    yield Case(
        name="axial_deeplab/norm_columns_5x2",
        spec=AxialDeepLab(span=5, norm=True, terms=("query", "value"), scale=0.3),
        sizes=image(5, 2, (2, 1), (5, 4)),
        dtype="float16",
        inputs=dict.fromkeys(("qk_gain", "qr_gain"), half),
        cotangents={"dlse": Recipe()},
        catches="gains and offsets of sv and sve exchanged channel by channel; the scale applied before the offsets",
    )
    yield Case(
        name="axial_deeplab/query_table_7x4",
        spec=AxialDeepLab(span=7, terms=("query",)),
        sizes=image(7, 4, (3, 3), (4, 4)),
        dtype="float16",
        inputs=logits,
        catches="the key's or the value's table required where the query's alone is used",
    )
    yield Case(
        name="axial_deeplab/key_table_4x6",
        spec=AxialDeepLab(span=6, axis="width", terms=("key",), scale=0.75),
        sizes=image(4, 6, (2, 1), (3, 5)),
        dtype="bfloat16",
        inputs=logits,
        cotangents={"dlse": Recipe()},
        catches="the key's table transposed: k_j·rk[i − j]; the scale on q·k alone",
    )
    yield Case(
        name="axial_deeplab/value_table_3x4",
        spec=AxialDeepLab(span=3, terms=("value",)),
        sizes=image(3, 4, (2, 2), (4, 3), batch=2),
        inputs=logits,
        catches="the value's table added to v once a key, not once a pair",
    )
    yield Case(
        name="axial_deeplab/no_table_5x3",
        spec=AxialDeepLab(span=5, terms=()),
        sizes=image(5, 3, (2, 2), (4, 4)),
        dtype="float16",
        inputs=logits,
        catches="anything but plain attention along the axis without a scale, which this is",
    )
    yield Case(
        name="axial_deeplab/cancelling_tables_3x9",
        spec=AxialDeepLab(span=9, axis="width"),
        sizes=image(3, 9, (2, 2), (4, 4)),
        # 64 Σ_d q_d in every logit of a row; values of −192 at every other pixel, which a table of 192 meets or misses.
        inputs={
            "rq": Recipe(kind="constant", value=64.0),
            "rk": Recipe(exp2=-10),
            "rv": edited(NORMAL, *(set_((n, None), 192.0) for n in range(0, 17, 2))),
            "v": edited(NORMAL, set_((None, None, tuple(range(0, 27, 2)), None), -192.0)),
        },
        flags=("large_scores", "cancelling_values"),
        catches="logits of hundreds that one row shares exponentiated without its maximum; values of opposite signs",
    )
    yield Case(
        name="axial_deeplab/lines_65x4",
        spec=AxialDeepLab(span=4, axis="width"),
        sizes=image(65, 4, (1, 1), (2, 2)),
        dtype="bfloat16",
        inputs=logits | {"k": edited(half, scaled((None, None, (7, 258), None), 8.0))},
        catches="a pixel of large score heard beyond its line; the last lines of many left out",
    )
    yield Case(
        name="axial_deeplab/float64_3x2",
        spec=AxialDeepLab(span=3, norm=True),
        sizes=image(3, 2, (2, 2), (4, 3)),
        dtype="float64",
        cotangents={"dlse": UNEVEN},
        catches="tables or gains in float32 beside double-precision scores",
    )
    yield Case(
        name="axial_deeplab/columns_17x17",
        spec=AxialDeepLab(span=17),
        sizes=image(17, 17, (1, 1), (3, 2)),
        dtype="bfloat16",
        inputs=logits,
        catches="tables cut to 32 rows, where 33 differences occur",
    )
    yield Case(
        name="axial_deeplab/rows_9x29",
        spec=AxialDeepLab(span=29, axis="width"),
        sizes=image(9, 29, (1, 1), (2, 2)),
        dtype="float16",
        inputs=logits,
        catches="tables of 2·9 − 1 rows, of the other axis",
    )
