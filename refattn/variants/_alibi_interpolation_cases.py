"""Golden cases of position interpolation for ALiBi."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe, Rows
from refattn.variants._case_parts import NAN, edited, flagged, integers, numbers, rows_of, scaled, sizes
from refattn.variants._sdpa_cases import option_flags
from refattn.variants.alibi_interpolation import ALiBiInterpolation
from refattn.variants.sdpa import SDPA

FLAGS: Mapping[str, Flag] = {
    "alibi_dynamic_interpolation": Flag("Linear biases whose slopes shrink with the count of keys."),
    "alibi_static_interpolation": Flag("Linear biases whose slopes shrink for a length that is given."),
}


def cases() -> Iterator[Case]:
    """Both modes, on both sides of the trained length."""
    for case in flagged(_cases()):
        alone = isinstance(case.spec, ALiBiInterpolation)
        whole: Any = SDPA(causal=True, bias=(case.spec,)) if alone else case.spec
        flags = (*case.flags, *option_flags(whole, case.sizes), f"alibi_{whole.bias[0].mode}_interpolation")
        yield replace(case, flags=flags)


def _cases() -> Iterator[Case]:
    yield Case(
        name="alibi_interpolation/dynamic_40",
        spec=ALiBiInterpolation(train_length=10),
        sizes=sizes((40, 40), (4, 2), (8, 4)),
        cotangents={"dlse": Recipe()},
        rows=Rows(q=(0, 9, 10, 11, 26, 39), k=(0, 9, 10, 27, 39)),
        catches="the trained slopes; or L the position of the query, which leaves the first rows as trained",
    )
    yield Case(
        name="alibi_interpolation/dynamic_shorter",
        spec=ALiBiInterpolation(train_length=64),
        sizes=sizes((12, 12), (2, 2), (8, 5)),
        dtype="float16",
        catches="slopes that grow by L_train / L where the sequence is shorter than those trained on",
    )
    yield Case(
        name="alibi_interpolation/dynamic_decode_513",
        spec=SDPA(causal="bottom_right", bias=(ALiBiInterpolation(train_length=128),)),
        sizes=sizes((1, 513), (4, 2), (8, 4)),
        dtype="bfloat16",
        rows=Rows(q=(0,), k=(0, 1, 255, 256, 511, 512)),
        catches="L counted from the queries, of which a decode step has one",
    )
    yield Case(
        name="alibi_interpolation/dynamic_ragged",
        spec=SDPA(causal="bottom_right", bias=(ALiBiInterpolation(train_length=6),)),
        sizes=sizes((5, 20), (2, 1), (8, 4), batch=3),
        inputs={
            "kv_lengths": integers(20, 9, 5),
            "k": rows_of(NORMAL, tuple(range(9, 20)), NAN, batch=1),
            "v": rows_of(NORMAL, tuple(range(9, 20)), NAN, batch=1),
            "sink": numbers(0.5, -1.5),
        },
        flags=("poison",),
        catches="one L for the batch: the longest sequence's, or the padded length",
    )
    yield Case(
        name="alibi_interpolation/dynamic_1000",
        spec=ALiBiInterpolation(train_length=300, slopes=(0.0625, 0.0078125)),
        sizes=sizes((1000, 1000), (2, 2), (4, 4)),
        dtype="bfloat16",
        inputs={"v": edited(NORMAL, scaled((None, None, (0, 1, 400, 401), None), 64.0))},
        rows=Rows(q=(255, 299, 300, 999), k=(0, 1, 400, 997, 999)),
        flags=("position_edges",),
        catches="interpolated positions, i · 0.3, in bfloat16: they fall together",
    )
    yield Case(
        name="alibi_interpolation/static_36",
        spec=SDPA(
            causal=True,
            bias=(ALiBiInterpolation(train_length=12, mode="static", length=36, slopes="geometric"),),
        ),
        sizes=sizes((20, 20), (3, 3), (8, 4)),
        dtype="float16",
        catches="the 20 keys counted where the length is chosen; interleaved slopes where geometric ones are asked",
    )
    yield Case(
        name="alibi_interpolation/static_both_sides",
        spec=SDPA(
            softcap=2.0,
            bias=(ALiBiInterpolation(train_length=7, mode="static", length=11, slopes=(1.0, 0.25)),),
        ),
        sizes=sizes((9, 24), (2, 1), (8, 4)),
        dtype="bfloat16",
        inputs={"q": Recipe(exp2=-7)},
        cotangents={"dlse": Recipe()},
        catches="a bias that rewards keys after the query; a slope of 7/11 in bfloat16",
    )
    yield Case(
        name="alibi_interpolation/static_float64",
        spec=ALiBiInterpolation(train_length=3, mode="static", length=7),
        sizes=sizes((11, 11), (3, 1), (5, 4)),
        dtype="float64",
        seed=2,
        catches="slopes m · 3/7 rounded to float32 beside double-precision scores",
    )
