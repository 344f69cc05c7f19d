"""Golden cases of Skeinformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe
from refattn.variants._case_parts import INF, NAN, edited, flagged, integers, rows_of, scaled, sizes
from refattn.variants.skeinformer import Skeinformer

FLAGS: Mapping[str, Flag] = {
    "skeinformer": Flag("Attention to drawn key columns, with the scores by which they are drawn."),
    "skeinformer_adaptive": Flag("Keys that are not drawn stand for the geometric mean of those that are."),
    "skeinformer_simple": Flag("The softmax over the drawn columns alone."),
    "skeinformer_none": Flag("The drawn columns of exact attention, divided by the sums of all keys."),
    "skeinformer_pilot": Flag("Pilot queries keep their exact rows."),
}
PUBLISHED = ("out", "column_scores", "vjp")


def cases() -> Iterator[Case]:
    """Each normalisation with and without the pilot's rows, padding, keys drawn twice, all of them or one."""
    for case in flagged(listed()):
        yield replace(case, want=PUBLISHED, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "skeinformer": True,
        f"skeinformer_{spec.normalisation}": True,
        "skeinformer_pilot": spec.reuse_pilot,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def sketch(pilots: int, columns: int, *given: Any, **options: Any) -> dict[str, int]:
    """Sizes with as many pilot rows and drawn columns."""
    return sizes(*given, **options) | {"P": pilots, "C": columns}


def indices(*values: int) -> Recipe:
    """Indices one by one."""
    return Recipe(kind="values", values=values)


def drawn(count: int) -> Recipe:
    """Indices below an odd count, drawn with replacement."""
    half = count // 2
    at: tuple[None, ...] = (None, None, None)
    return edited(Recipe(kind="integers", exp2=0, limit=half), Edit(at=at, op="add", value=float(half)))


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="skeinformer/adaptive",
        spec=Skeinformer(),
        sizes=sketch(3, 4, (9, 12), (4, 2), (8, 6)),
        inputs={
            "pilot": indices(7, 2, 7),
            "columns": indices(0, 3, 5, 11, 2, 3, 8, 9, 1, 4, 6, 10, 11, 9, 7, 5),
        },
        catches="columns of key head h // (Hq / Hkv) instead of query head h; the pilot's rows not written back",
    )
    yield Case(
        name="skeinformer/adaptive_without_pilot",
        spec=Skeinformer(reuse_pilot=False, scale=0.5),
        sizes=sketch(4, 3, (10, 17), (2, 1), (5, 4), batch=2),
        dtype="bfloat16",
        inputs={"pilot": indices(0, 9, 4, 4, 1, 2, 3, 3), "columns": indices(0, 8, 16, 5, 6, 7, 16, 1, 2, 9, 3, 12)},
        catches="the arithmetic mean of the drawn exponentials, or their geometric mean with n for n − d",
    )
    yield Case(
        name="skeinformer/column_scores",
        spec=Skeinformer(),
        sizes=sketch(5, 2, (7, 9), (4, 2)),
        inputs={"pilot": indices(1, 1, 1, 6, 0), "columns": indices(3, 8, 0, 1, 5, 4, 2, 7)},
        cotangents={"dcolumn_scores": Recipe()},
        catches="a pilot row drawn three times counted once; norms of columns without their values'",
    )
    yield Case(
        name="skeinformer/simple",
        spec=Skeinformer(normalisation="simple"),
        sizes=sketch(2, 5, (8, 14), (2, 2)),
        dtype="float16",
        inputs={"pilot": indices(3, 5), "columns": indices(0, 2, 5, 9, 13, 1, 3, 4, 8, 12)},
        catches="the keys that were not drawn counted in the sum, or their number",
    )
    yield Case(
        name="skeinformer/none",
        spec=Skeinformer(normalisation="none", reuse_pilot=False),
        sizes=sketch(2, 6, (6, 11), (6, 2), (4, 5)),
        inputs={"pilot": indices(0, 4), "columns": drawn(11)},
        catches="a sum over the drawn keys where that of all keys is asked; a key drawn twice counted twice",
    )
    yield Case(
        name="skeinformer/padding",
        spec=Skeinformer(),
        sizes=sketch(2, 3, (6, 9), (2, 2), (8, 4), batch=3),
        dtype="bfloat16",
        inputs={
            "kv_lengths": integers(9, 5, 1),
            "pilot": indices(2, 5, 0, 1, 3, 4),
            "columns": indices(0, 4, 8, 1, 5, 6, 0, 2, 4, 1, 3, 8, 0, 0, 0, 0, 5, 7),
            "k": edited(rows_of(NORMAL, (5, 6, 7, 8), NAN, batch=1), *rows_of(NORMAL, (1, 2), INF, batch=2).edits),
            "v": edited(rows_of(NORMAL, (5, 6, 7, 8), INF, batch=1), *rows_of(NORMAL, (1, 2), NAN, batch=2).edits),
        },
        flags=("poison",),
        catches="padding taken for keys that were not drawn; a column beyond its sequence's length counted as drawn",
    )
    yield Case(
        name="skeinformer/every_key_257",
        spec=Skeinformer(reuse_pilot=False),
        sizes=sketch(2, 257, (3, 257), (1, 1), (4, 4)),
        inputs={"pilot": indices(0, 2), "columns": indices(*range(256, -1, -1))},
        catches="anything but exact attention, where every key is drawn",
    )
    yield Case(
        name="skeinformer/large_logits_513",
        spec=Skeinformer(),
        sizes=sketch(1, 4, (4, 513), (2, 1), (2, 2)),
        inputs={
            # Not the pilot's row: squares of weights that small underflow in float32, and their roots have no bound.
            "q": edited(NORMAL, scaled((None, None, (0, 2, 3), None), 64.0)),
            "pilot": indices(1),
            "columns": indices(0, 127, 128, 512, 5, 255, 256, 511),
        },
        flags=("large_scores",),
        catches="exponentials without their row's maximum, drawn and geometric mean alike",
    )
    yield Case(
        name="skeinformer/float64",
        spec=Skeinformer(),
        sizes=sketch(2, 3, (5, 7), (3, 3), (5, 4)),
        dtype="float64",
        inputs={"pilot": indices(4, 1), "columns": indices(0, 1, 2, 6, 4, 2, 3, 5, 1)},
        catches="a geometric mean in float32 beside double-precision logits",
    )
    yield Case(
        name="skeinformer/keys_513",
        spec=Skeinformer(reuse_pilot=False),
        sizes=sketch(2, 4, (3, 513), (1, 1), (2, 2)),
        inputs={"pilot": indices(2, 0), "columns": indices(512, 0, 255, 256)},
        catches="513 − d keys that stand for the undrawn counted in 8 bits; the last column taken for padding",
    )
