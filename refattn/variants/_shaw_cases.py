"""Golden cases of Shaw's vectors by relative position."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe, Rows
from refattn.variants._case_parts import NAN, edited, flagged, integers, numbers, rows_of, scaled, sizes
from refattn.variants._sdpa_cases import option_flags
from refattn.variants.sdpa import SDPA
from refattn.variants.shaw import Shaw

FLAGS: Mapping[str, Flag] = {
    "shaw": Flag("A learned vector for each clipped difference of positions, met by the query, with its gradient."),
    "shaw_values": Flag("A vector by relative position that is added to the value."),
    "shaw_per_head": Flag("Tables of its own for every query head."),
}


def cases() -> Iterator[Case]:
    """With and without a table for values, shared and per head; differences within the clip, at it and beyond."""
    for case in flagged(_cases()):
        whole: Any = SDPA(causal=True, content=(case.spec,)) if isinstance(case.spec, Shaw) else case.spec
        (term,) = whole.content
        own = {"shaw": True, "shaw_values": term.values, "shaw_per_head": term.heads == "per_head"}
        flags = (*case.flags, *option_flags(whole, case.sizes), *(name for name, holds in own.items() if holds))
        yield replace(case, flags=flags)


def _cases() -> Iterator[Case]:
    yield Case(
        name="shaw/causal",
        spec=Shaw(clip=4),
        sizes=sizes((11, 11), (4, 2), (4, 3)),
        inputs={"shaw_k": Recipe(exp2=-9), "shaw_v": Recipe(exp2=-9)},
        cotangents={"dlse": Recipe()},
        catches="the table counted from its end: a row for i − j instead of j − i, which causal attention never reads",
    )
    yield Case(
        name="shaw/both_sides",
        spec=SDPA(scale=0.75, content=(Shaw(clip=3),)),
        sizes=sizes((9, 13), (2, 1), (4, 4)),
        dtype="bfloat16",
        catches="the relative part left out of the scale, or positions counted from the top left",
    )
    yield Case(
        name="shaw/keys_only_per_head",
        spec=SDPA(causal="top_left", content=(Shaw(clip=2, values=False, heads="per_head"),)),
        sizes=sizes((8, 10), (4, 2), (3, 5)),
        dtype="float16",
        inputs={"sink": numbers(0.5, -1.0, 2.0, 0.25)},
        catches="the table of key head h // 2 for that of query head h; a window where the paper clips",
    )
    yield Case(
        name="shaw/per_head",
        spec=SDPA(content=(Shaw(clip=5, heads="per_head"),)),
        sizes=sizes((7, 7), (3, 3), (4, 2), batch=2),
        inputs={"shaw_v": edited(NORMAL, scaled((1, None, None), 16.0), scaled((2, None, None), 64.0))},
        cotangents={"dlse": Recipe()},
        catches="one head's table for values added in all heads; a clip that no difference exceeds",
    )
    yield Case(
        name="shaw/clip_0",
        spec=SDPA(content=(Shaw(clip=0),)),
        sizes=sizes((5, 6), (2, 2), (4, 4)),
        inputs={"shaw_k": Recipe(exp2=-7), "sink": numbers(1.0, -0.5)},
        cotangents={"dlse": Recipe()},
        catches="the one row's value added outside the softmax, where the sink leaves it the mass of the keys alone",
    )
    yield Case(
        name="shaw/padding",
        spec=SDPA(causal="bottom_right", softcap=2.0, content=(Shaw(clip=3),)),
        sizes=sizes((4, 12), (2, 1), (4, 4), batch=2),
        dtype="float16",
        inputs={
            "kv_lengths": integers(12, 7),
            "q": Recipe(exp2=-7),
            "k": rows_of(NORMAL, (7, 11), NAN, batch=1),
            "v": rows_of(NORMAL, (7, 11), NAN, batch=1),
        },
        flags=("poison",),
        catches="differences counted from the end of the array; a relative part that escapes the softcap",
    )
    yield Case(
        name="shaw/table_decides",
        spec=SDPA(content=(Shaw(clip=2),)),
        sizes=sizes((6, 6), (2, 2), (8, 4)),
        inputs={
            "k": edited(Recipe(exp2=-10), Edit(at=(None, None, None, None), op="add", value=8.0)),
            "v": edited(Recipe(exp2=-10), Edit(at=(None, None, None, None), op="add", value=8.0)),
        },
        catches="k + shaw_k or v + shaw_v rounded to 16 bits, where the keys are nearly equal and the table decides",
    )
    yield Case(
        name="shaw/decode_300",
        spec=SDPA(causal="bottom_right", content=(Shaw(clip=16),)),
        sizes=sizes((1, 300), (4, 2), (8, 4)),
        dtype="bfloat16",
        rows=Rows(q=(0,), k=(0, 282, 283, 284, 299)),
        catches="the rows of query 0 for a decode step that stands at position 299",
    )
    yield Case(
        name="shaw/clip_15_257",
        spec=SDPA(causal=True, content=(Shaw(clip=15),)),
        sizes=sizes((257, 257), (2, 1), (4, 4)),
        dtype="float16",
        rows=Rows(q=(0, 14, 15, 16, 256), k=(0, 1, 240, 241, 242, 256)),
        catches="values summed row by row only within a tile, where row 0 gathers the weights of 241 keys",
    )
    yield Case(
        name="shaw/both_sides_513",
        spec=SDPA(content=(Shaw(clip=100, values=False, heads="per_head"),)),
        sizes=sizes((513, 300), (2, 2), (4, 2)),
        rows=Rows(q=(0, 213, 313, 412, 512), k=(0, 1, 100, 101, 299)),
        catches="queries before the first key, whose every difference is clipped to the last row",
    )
    yield Case(
        name="shaw/window_2049",
        spec=SDPA(causal=True, window=(40, None), content=(Shaw(clip=31),)),
        sizes=sizes((2049, 2049), (2, 2), (4, 2)),
        dtype="bfloat16",
        rows=Rows(q=(0, 31, 32, 41, 2048), k=(0, 1, 9, 10, 2008, 2017, 2048)),
        catches="a table cut at the window, or the window at the clip",
    )
    yield Case(
        name="shaw/float64",
        spec=Shaw(clip=2, heads="per_head"),
        sizes=sizes((7, 7), (2, 2), (5, 4)),
        dtype="float64",
        catches="tables in float32 beside double-precision scores",
    )
