"""What golden cases are written with: sizes, recipes that several share, and the flags that a case's form tells."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import replace

from refattn.case import Case, Edit, Recipe

# Exact in every storage type but float16, and as good as 1e30 for the mistake it stands for.
HUGE = 2.0**100
NAN, INF = float("nan"), float("inf")


def sizes(
    lengths: tuple[int, int], heads: tuple[int, int] = (2, 2), widths: tuple[int, int] = (8, 8), batch: int = 1
) -> dict[str, int]:
    """Sizes by name from (Lq, Lk), (Hq, Hkv), (D, Dv) and B."""
    (lq, lk), (hq, hkv), (d, dv) = lengths, heads, widths
    return {"B": batch, "Hq": hq, "Hkv": hkv, "Lq": lq, "Lk": lk, "D": d, "Dv": dv}


def attend(*shape: int, true: int = 192, hidden: Iterable[tuple[int | tuple[int, ...] | None, ...]] = ()) -> Recipe:
    """Boolean mask that is True with probability true/256 (256: everywhere), but never at the `hidden` indices."""
    edits = tuple(Edit(at=at, op="set", value=0.0) for at in hidden)
    if true == 256:
        return Recipe(kind="constant", value=1.0, shape=shape, edits=edits)
    return Recipe(kind="bernoulli", true=true, shape=shape, edits=edits)


def integers(*values: int) -> Recipe:
    """One integer array: lengths, positions or segment ids of every sequence alike."""
    return Recipe(kind="values", values=values, shape=(len(values),))


def numbers(*values: float) -> Recipe:
    """One number a head: sinks or slopes."""
    return Recipe(kind="values", values=values)


def rows_of(array: Recipe, rows: int | tuple[int, ...], value: float, batch: int | None = None) -> Recipe:
    """The recipe with whole rows (keys or queries) set to a value."""
    return edited(array, Edit(at=(batch, None, rows, None), op="set", value=value))


def edited(array: Recipe, *edits: Edit) -> Recipe:
    """The recipe with further edits."""
    return Recipe(**{**array.__dict__, "edits": (*array.edits, *edits)})


def set_(at: tuple[int | tuple[int, ...] | None, ...], value: float) -> Edit:
    """Edit that writes a value."""
    return Edit(at=at, op="set", value=value)


def scaled(at: tuple[int | tuple[int, ...] | None, ...], value: float) -> Edit:
    """Edit that multiplies by a power of two, or its negative."""
    return Edit(at=at, op="scale", value=value)


def head_marks(heads: int) -> Recipe:
    """Normal values, those of head g larger by 4^g: a result shows which head it read."""
    return Recipe(edits=tuple(scaled((None, g, None, None), 4.0**g) for g in range(1, heads)))


def flagged(cases: Iterable[Case]) -> Iterator[Case]:
    """The cases with the flags that their sizes and arrays tell added to those written by hand."""
    for case in cases:
        yield replace(case, flags=(*case.flags, *shape_flags(case)))


def shape_flags(case: Case) -> Iterator[str]:
    """What sizes, dtype, arrays and cotangents say of a case; a size that a variant has not is 0."""
    size = defaultdict(int, case.sizes)
    widths, lengths = (size["D"], size["Dv"]), (size["Lq"], size["Lk"])
    present = {
        "batch": size["B"] > 1,
        "mqa": 1 == size["Hkv"] < size["Hq"],
        "gqa": 1 < size["Hkv"] < size["Hq"],
        "different_widths": size["D"] != size["Dv"],
        "odd_width": any(d % 2 for d in widths),
        "odd_length": any((n >= 7 and (n - 1) & (n - 2) == 0) or (n >= 7 and n & (n + 1) == 0) for n in lengths),
        "more_queries_than_keys": size["Lq"] > size["Lk"],
        "single_query": size["Lq"] == 1,
        "single_key": size["Lk"] == 1,
        "chosen_rows": case.rows is not None,
        "lse_cotangent": "dlse" in case.cotangents,
        "float64": case.dtype == "float64",
        "inner": "scores" in case.want,
        "float8": case.dtype.startswith("float8"),
        "mask": "mask" in case.inputs,
        "bias": "bias" in case.inputs,
        "sink": "sink" in case.inputs,
        "padding": not {"q_lengths", "kv_lengths"}.isdisjoint(case.inputs),
        "segments": "q_segment_ids" in case.inputs,
        "positions": "q_positions" in case.inputs,
    }
    return (name for name, holds in present.items() if holds)
