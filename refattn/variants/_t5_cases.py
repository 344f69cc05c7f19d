"""Golden cases of T5's bias."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe, Rows
from refattn.variants._case_parts import NAN, edited, flagged, integers, numbers, rows_of, scaled, sizes
from refattn.variants._sdpa_cases import option_flags
from refattn.variants.sdpa import SDPA
from refattn.variants.t5 import T5

FLAGS: Mapping[str, Flag] = {
    "t5": Flag("A learned bias for each bucket of distances, with its gradient.", ("TensorRT-LLM#1343", "candle#727")),
    "t5_bidirectional": Flag("Buckets on both sides of the query."),
}


def cases() -> Iterator[Case]:
    """Both directions and three sets of buckets; lengths and positions that reach their edges."""
    for case in flagged(_cases()):
        whole: Any = SDPA(causal=True, bias=(case.spec,)) if isinstance(case.spec, T5) else case.spec
        (term,) = whole.bias
        own = ("t5", "t5_bidirectional") if term.bidirectional else ("t5",)
        flags = (*case.flags, *option_flags(whole, case.sizes), *own)
        yield replace(case, flags=flags)


def _cases() -> Iterator[Case]:
    yield Case(
        name="t5/causal",
        spec=SDPA(causal=True, scale=1.0, bias=(T5(buckets=8, max_distance=20),)),
        sizes=sizes((24, 24), (4, 2), (4, 4)),
        inputs={"q": Recipe(exp2=-9), "t5_table": Recipe(exp2=-9)},
        cotangents={"dlse": Recipe()},
        catches="scores scaled by D^-1/2, where T5's scale is 1; or a bias that is scaled with them",
    )
    yield Case(
        name="t5/bidirectional",
        spec=SDPA(bias=(T5(buckets=12, max_distance=9, bidirectional=True),)),
        sizes=sizes((23, 23), (2, 2), (8, 4)),
        catches="r = q − k for k − q, which exchanges the sides; r ≥ 0 for r > 0, which moves the diagonal",
    )
    yield Case(
        name="t5/bidirectional_9x20",
        spec=SDPA(bias=(T5(buckets=8, max_distance=5, bidirectional=True),)),
        sizes=sizes((9, 20), (4, 1), (4, 8)),
        dtype="bfloat16",
        cotangents={"dlse": Recipe()},
        catches="distances counted from the top left; the table read by key head instead of query head",
    )
    yield Case(
        name="t5/boundaries_257",
        spec=T5(max_distance=256),
        sizes=sizes((257, 257), (2, 1), (8, 4)),
        dtype="bfloat16",
        # Large values stand 76, 90, 127, 152, 181 and 215 keys before the last query.
        inputs={"v": edited(NORMAL, scaled((None, None, (41, 75, 104, 129, 166, 180), None), 256.0))},
        rows=Rows(q=(0, 15, 16, 20, 91, 216, 256), k=(0, 40, 41, 148, 237, 256)),
        flags=("position_edges",),
        catches="buckets in bfloat16, which puts 13 distances just below an edge into the next bucket",
    )
    yield Case(
        name="t5/defaults_150",
        spec=SDPA(causal=True, bias=(T5(),)),
        sizes=sizes((150, 150), (3, 3), (4, 4)),
        dtype="float16",
        inputs={"sink": numbers(0.5, -1.0, 2.0)},
        rows=Rows(q=(0, 16, 113, 149), k=(0, 36, 37, 133, 149)),
        catches="distances from 113 on without the last bucket, or without any beyond max_distance",
    )
    yield Case(
        name="t5/decode_300",
        spec=SDPA(causal="bottom_right", bias=(T5(buckets=64, max_distance=256),)),
        sizes=sizes((1, 300), (4, 2), (8, 4)),
        dtype="bfloat16",
        rows=Rows(q=(0,), k=(0, 59, 60, 267, 268, 299)),
        catches="the bias of query 0 for a decode step that stands at position 299",
    )
    far = 2**24
    yield Case(
        name="t5/far_positions",
        spec=SDPA(bias=(T5(buckets=16, max_distance=2**20, bidirectional=True),)),
        sizes=sizes((5, 8), (2, 2), (8, 4), batch=2),
        inputs={
            "q_positions": integers(0, 1, far, far + 1, far - 7),
            "k_positions": Recipe(kind="values", shape=(2, 8), values=(
                0, 1, far, far + 1, far + 2, far + 4, far + 8, far + 9,
                far, far - 1, far - 3, far - 9, 4, 2**20 + 1, 2**20 - 1, 2**12,
            )),
        },
        flags=("position_edges",),
        catches="positions in float32 beyond 2^24, or distances beyond the last bucket's edge read outside the table",
    )  # fmt: skip
    yield Case(
        name="t5/padding",
        spec=SDPA(causal="bottom_right", softcap=2.0, bias=(T5(buckets=6, max_distance=7),)),
        sizes=sizes((4, 12), (2, 1), (8, 4), batch=2),
        dtype="float16",
        inputs={
            "kv_lengths": integers(12, 7),
            "q": Recipe(exp2=-7),
            "k": rows_of(NORMAL, (7, 11), NAN, batch=1),
            "v": rows_of(NORMAL, (7, 11), NAN, batch=1),
        },
        flags=("poison",),
        catches="distances counted from the end of the array; the bias capped with the scores",
    )
    yield Case(
        name="t5/float64",
        spec=T5(buckets=6, max_distance=8),
        sizes=sizes((10, 10), (2, 2), (5, 4)),
        dtype="float64",
        seed=2,
        catches="a bias gathered in float32 beside double-precision scores",
    )
    yield Case(
        name="t5/bidirectional_300",
        spec=SDPA(bias=(T5(buckets=16, max_distance=200, bidirectional=True),)),
        sizes=sizes((300, 300), (2, 2), (4, 4)),
        rows=Rows(q=(0, 150, 299), k=(0, 149, 151, 299)),
        catches="distances beyond a tile clipped to it",
    )
