"""Golden cases of softmax attention: heads, widths and lengths here, the rest from the modules beside."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any

from refattn.case import Case, Recipe, Rows
from refattn.variants import (
    _sdpa_cases_float8,
    _sdpa_cases_inner,
    _sdpa_cases_kept,
    _sdpa_cases_large,
    _sdpa_cases_long,
    _sdpa_cases_masks,
    _sdpa_cases_numerics,
    _sdpa_cases_places,
    _sdpa_cases_scores,
    _sdpa_cases_sigmoid,
)
from refattn.variants._case_parts import flagged, head_marks, sizes
from refattn.variants.sdpa import SDPA

_BESIDE: tuple[Any, ...] = (
    _sdpa_cases_masks,
    _sdpa_cases_places,
    _sdpa_cases_scores,
    _sdpa_cases_sigmoid,
    _sdpa_cases_kept,
    _sdpa_cases_numerics,
    _sdpa_cases_float8,
    _sdpa_cases_inner,
    _sdpa_cases_long,
    _sdpa_cases_large,
)


def cases() -> Iterator[Case]:
    """Every case, topic by topic, with the flags that its form tells."""
    for case in flagged(chain(heads(), lengths(), *(topic.cases() for topic in _BESIDE))):
        yield replace(case, flags=(*case.flags, *option_flags(case.spec, case.sizes)))


def option_flags(spec: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """What an SDPA's own fields say of a case."""
    present = {
        "causal": bool(spec.causal),
        "causal_top_left": spec.causal == "top_left",
        "causal_bottom_right": spec.causal == "bottom_right",
        "fully_masked_rows": spec.causal == "bottom_right" and sizes["Lq"] > sizes.get("Lk", sizes["Lq"]),
        "window": spec.window is not None,
        "softcap": spec.softcap is not None,
        "scale": spec.scale is not None,
        "keep_mask": spec.keep_probability is not None,
        "sigmoid": spec.normalizer == "sigmoid",
        "paged": spec.paged,
        "int8_kv": spec.kv == "int8",
    }
    return (name for name, holds in present.items() if holds)


def heads() -> Iterator[Case]:
    """Which key head a query head reads, and which width the scale is taken from."""
    yield Case(
        name="heads/four_heads",
        spec=SDPA(),
        sizes=sizes((12, 12), (4, 4)),
        flags=("normal",),
        catches="a scale that is missing, squared, or split with a rounding in between",
    )
    yield Case(
        name="heads/six_over_two",
        spec=SDPA(),
        sizes=sizes((17, 23), (6, 2), (8, 5)),
        dtype="float16",
        inputs={"v": head_marks(2)},
        flags=("distinct_heads",),
        catches="query head h reading key head h mod Hkv instead of h // (Hq/Hkv)",
    )
    yield Case(
        name="heads/five_over_one",
        spec=SDPA(),
        sizes=sizes((16, 33), (5, 1), (16, 7)),
        dtype="bfloat16",
        catches="dk and dv of the shared head taken from one query head instead of summed over all five",
    )
    yield Case(
        name="heads/four_over_two_causal",
        spec=SDPA(causal=True),
        sizes=sizes((33, 33), (4, 2), (4, 4)),
        dtype="bfloat16",
        inputs={"v": head_marks(2)},
        cotangents={"dlse": Recipe()},
        flags=("distinct_heads",),
        catches="grouped heads and a causal mask right alone, wrong together; dlse left out of dq and dk",
    )
    yield Case(
        name="heads/batch_of_three",
        spec=SDPA(),
        sizes=sizes((5, 7), (6, 6), (5, 3), batch=3),
        catches="batch and head strides exchanged, which equal sizes hide",
    )
    yield Case(
        name="heads/values_wider_than_keys",
        spec=SDPA(),
        sizes=sizes((7, 15), (2, 2), (4, 40)),
        catches="scale taken from Dv instead of D, or output columns cut at D",
    )
    yield Case(
        name="heads/keys_wider_than_values",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((4, 6), (2, 1), (96, 80)),
        dtype="bfloat16",
        catches="scale rounded to bfloat16 at D = 96, or padded widths that leak into the product",
    )
    yield Case(
        name="heads/width_one",
        spec=SDPA(),
        sizes=sizes((16, 16), (2, 2), (1, 1)),
        dtype="float16",
        catches="vector loads that assume a width of at least 4",
    )
    yield Case(
        name="heads/float64",
        spec=SDPA(causal=True),
        sizes=sizes((16, 16), (2, 1), (8, 8)),
        dtype="float64",
        cotangents={"dlse": Recipe()},
        catches="double precision in name only: a float32 table, exponential or accumulator inside",
    )


def lengths() -> Iterator[Case]:
    """One row, one key, and both sides of the powers of two at which kernels cut their tiles."""
    yield Case(
        name="lengths/1x1",
        spec=SDPA(),
        sizes=sizes((1, 1), (2, 2), (4, 4)),
        cotangents={"dlse": Recipe()},
        catches="anything but out = v, lse = s, dq = dlse·scale·k",
    )
    yield Case(
        name="lengths/1x16",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((1, 16), (4, 2)),
        dtype="float16",
        catches="a decode step that sees key 0 alone because the mask is aligned at the top left",
    )
    yield Case(
        name="lengths/16x1",
        spec=SDPA(),
        sizes=sizes((16, 1), (2, 2)),
        dtype="bfloat16",
        catches="padding keys of a tile that count in the denominator: every weight is exactly 1",
    )
    for lq, lk, dtype, what in (
        (63, 63, "float32", "a last tile of 63 keys taken as full"),
        (65, 65, "float16", "the one key beyond a tile of 64 dropped"),
        (65, 63, "bfloat16", "tile counts taken from Lq for the keys"),
        (31, 129, "float32", "the one key beyond a tile of 128 dropped"),
    ):
        yield Case(
            name=f"lengths/{lq}x{lk}",
            spec=SDPA(),
            sizes=sizes((lq, lk), (1, 1), (8, 4)),
            dtype=dtype,
            catches=what,
        )
    for lq, lk, dtype, heads, what in (
        (127, 127, "bfloat16", (2, 1), "one padding key of a tile of 128 let in"),
        (129, 129, "float32", (1, 1), "the one key beyond a tile of 128 dropped"),
        (255, 255, "float16", (2, 2), "one padding key of a tile of 256 let in"),
        (257, 257, "bfloat16", (2, 2), "the one key and the one query beyond a tile of 256 dropped"),
        (7, 511, "float32", (2, 1), "keys split over workers and merged with weights that are not by lse"),
        (513, 65, "float32", (2, 2), "dk and dv summed over 513 queries with the last one lost"),
        (257, 1, "float16", (1, 1), "dv of the only key, the sum of 257 cotangents, accumulated in 16 bits"),
    ):
        few = tuple(i for i in (0, 1, 63, 64, 126, 127, 128, 254, 255, 256, 510, 512) if i < lq)
        keys = tuple(j for j in (0, 1, 63, 64, 126, 127, 128, 254, 255, 256, 510, 512) if j < lk)
        yield Case(
            name=f"lengths/{lq}x{lk}",
            spec=SDPA(),
            sizes=sizes((lq, lk), heads, (8, 4)),
            dtype=dtype,
            rows=Rows(q=few, k=keys),
            catches=what,
        )
