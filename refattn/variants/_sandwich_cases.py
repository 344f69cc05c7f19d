"""Golden cases of Sandwich.

Heads and dimensions make (d̄/2)/r_h, the bias of the query's own key, a dyadic number wherever a row sees that key
alone: the gradients that vanish there are then exact zeros, which balls decide. Seed 2 stands where seed 1 draws equal
components in the only two keys of a row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe, Rows
from refattn.variants._case_parts import NAN, edited, flagged, integers, numbers, rows_of, scaled, sizes
from refattn.variants._sdpa_cases import option_flags
from refattn.variants.sandwich import Sandwich
from refattn.variants.sdpa import SDPA

FLAGS: Mapping[str, Flag] = {
    "sandwich": Flag("A bias of cosines of the distance."),
    "sandwich_from_1": Flag("The cosines counted from t = 1."),
}


def cases() -> Iterator[Case]:
    """Both first indices, several dimensions, both alignments, beside other options."""
    for case in flagged(_cases()):
        whole: Any = SDPA(causal=True, bias=(case.spec,)) if isinstance(case.spec, Sandwich) else case.spec
        later = any(isinstance(term, Sandwich) and term.first for term in whole.bias)
        own = ("sandwich", "sandwich_from_1") if later else ("sandwich",)
        yield replace(case, flags=(*case.flags, *option_flags(whole, case.sizes), *own))


def _cases() -> Iterator[Case]:
    yield Case(
        name="sandwich/two_heads",
        spec=Sandwich(dimension=16),
        sizes=sizes((20, 20), (2, 2), (8, 4)),
        cotangents={"dlse": Recipe()},
        catches="ratios 8/h or in the other order: the last head has the smallest bias; the sum less d̄/2, seen in lse",
    )
    yield Case(
        name="sandwich/default_dimension",
        spec=Sandwich(),
        sizes=sizes((12, 12), (1, 1), (4, 4)),
        dtype="bfloat16",
        seed=2,
        catches="d̄ = 128 cosines instead of 64; frequencies of the head's width",
    )
    yield Case(
        name="sandwich/from_one",
        spec=Sandwich(dimension=8, first=1),
        sizes=sizes((17, 17), (3, 1), (8, 8)),
        dtype="float16",
        catches="t counted from 0 where 1 is asked, which adds cos(i − j) and drops the slowest cosine",
    )
    yield Case(
        name="sandwich/four_heads_over_two",
        spec=Sandwich(dimension=24),
        sizes=sizes((15, 15), (4, 2), (8, 5)),
        dtype="bfloat16",
        catches="ratios by key head; exponents −t/d̄ for −2t/d̄",
    )
    yield Case(
        name="sandwich/both_sides_9x24",
        spec=SDPA(bias=(Sandwich(dimension=32),)),
        sizes=sizes((9, 24), (2, 1), (8, 4)),
        inputs={"sink": numbers(1.0, 2.0)},
        cotangents={"dlse": Recipe()},
        catches="distances counted from the top left; the constant (d̄/2)/r_h dropped, which a sink sees",
    )
    yield Case(
        name="sandwich/top_left_12x7",
        spec=SDPA(causal="top_left", bias=(Sandwich(dimension=8),)),
        sizes=sizes((12, 7), (2, 2)),
        dtype="float16",
        cotangents={"dlse": Recipe()},
        catches="rows beyond the last key, whose distances go on growing; distances counted from the bottom right",
    )
    yield Case(
        name="sandwich/softcap",
        spec=SDPA(causal="bottom_right", softcap=1.5, scale=0.125, bias=(Sandwich(dimension=8),)),
        sizes=sizes((7, 12), (2, 2)),
        dtype="float16",
        inputs={"q": Recipe(exp2=-6)},
        catches="the bias scaled or capped with the scores",
    )
    yield Case(
        name="sandwich/tail_65",
        spec=Sandwich(dimension=32),
        sizes=sizes((65, 65), (1, 1), (4, 4)),
        dtype="bfloat16",
        inputs={"v": edited(NORMAL, scaled((None, None, (0, 1, 30, 31), None), 64.0))},
        rows=Rows(q=(0, 1, 31, 63, 64), k=(0, 1, 30, 31, 63, 64)),
        catches="angles (i − j) w in bfloat16: large values stand where the bias is small and oscillates",
    )
    far = 2**24
    yield Case(
        name="sandwich/far_positions",
        spec=SDPA(causal="bottom_right", bias=(Sandwich(dimension=16, first=1),)),
        sizes=sizes((6, 12), (2, 1)),
        inputs={
            "q_positions": integers(*(far + i for i in (5, 6, 7, 9, 11, 12))),
            "k_positions": integers(*(far + j for j in range(12))),
        },
        flags=("position_edges",),
        catches="the inner product of embeddings of absolute positions in float32, whose angles are lost there",
    )
    yield Case(
        name="sandwich/padding",
        spec=SDPA(causal="bottom_right", bias=(Sandwich(dimension=8),)),
        sizes=sizes((4, 12), (2, 1), (8, 4), batch=2),
        dtype="float16",
        inputs={
            "kv_lengths": integers(12, 7),
            "k": rows_of(NORMAL, (7, 11), NAN, batch=1),
            "v": rows_of(NORMAL, (7, 11), NAN, batch=1),
        },
        flags=("poison",),
        catches="distances counted from the end of the array instead of the end of the sequence",
    )
    yield Case(
        name="sandwich/float64",
        spec=Sandwich(dimension=12),
        sizes=sizes((9, 9), (3, 3), (5, 4)),
        dtype="float64",
        seed=2,
        catches="frequencies or cosines in float32 beside double-precision scores",
    )
