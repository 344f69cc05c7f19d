"""Golden cases of RoPE.

A row that sees one key alone has gradients that vanish; they are exact zeros, which balls decide, where that key and
the query stand at position 0. Everywhere else a row sees two keys at least.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from refattn.case import NORMAL, Case, Flag, Recipe, Rows
from refattn.dtypes import round_to
from refattn.trigonometric import cos64, sin64
from refattn.variants._case_parts import NAN, edited, flagged, integers, numbers, rows_of, scaled, set_, sizes
from refattn.variants._frequencies import float32_frequencies
from refattn.variants._sdpa_cases import option_flags
from refattn.variants.alibi import ALiBi
from refattn.variants.rope import RoPE
from refattn.variants.sdpa import SDPA

FLAGS: Mapping[str, Flag] = {
    "rope": Flag("Queries and keys turned by their positions."),
    "rope_half": Flag("Channels t and t + width/2 are a pair.", ("nanotron#241", "TinyLlama#24")),
    "rope_interleaved": Flag("Channels 2t and 2t + 1 are a pair.", ("vllm-ascend#12765",)),
    "rope_partial": Flag("Some channels turn, the others stay."),
    "rope_far": Flag("Turns at positions from 32768 on.", ("gpt-neox#1003", "transformers#29285", "Megatron-LM#535")),
    "rope_float32": Flag("Angles as float32 arithmetic finds them."),
    "rope_table": Flag("Cosines and sines as inputs, with their gradients."),
}


def cases() -> Iterator[Case]:
    """Both pairings, all kinds of angles, both parts, near and far positions, beside other options."""
    for case in flagged(_cases()):
        whole: Any = SDPA(causal=True, rotary=case.spec) if isinstance(case.spec, RoPE) else case.spec
        rope: RoPE = whole.rotary
        own = {
            f"rope_{rope.pairing}": True,
            "rope_partial": rope.width not in (None, case.sizes["D"]),
            f"rope_{rope.angles}": rope.angles != "exact",
        }
        kept = [name for name, holds in own.items() if holds]
        yield replace(case, flags=(*case.flags, *option_flags(whole, case.sizes), "rope", *kept))


def _cases() -> Iterator[Case]:
    yield Case(
        name="rope/half",
        spec=RoPE(pairing="half"),
        sizes=sizes((20, 20), (2, 2), (8, 4)),
        cotangents={"dlse": Recipe()},
        catches="interleaved pairs; turns by −p; frequencies base^(−t/D); values turned as well",
    )
    yield Case(
        name="rope/interleaved",
        spec=RoPE(pairing="interleaved"),
        sizes=sizes((17, 17), (4, 2), (8, 5)),
        dtype="float16",
        catches="pairs of halves; keys turned by the number of their query head",
    )
    # Channels 0 and 4 are large: a pair whose turn decides in halves, two single channels otherwise.
    large = edited(NORMAL, scaled((None, None, None, (0, 4)), 4.0))
    yield Case(
        name="rope/large_pair",
        spec=SDPA(rotary=RoPE(pairing="half")),
        sizes=sizes((12, 12), (2, 1), (8, 4)),
        dtype="float16",
        inputs={"q": large, "k": large},
        catches="interleaved pairs, under which the two large channels never mix and other keys win",
    )
    yield Case(
        name="rope/first_4_of_10",
        spec=SDPA(causal="bottom_right", rotary=RoPE(pairing="half", width=4)),
        sizes=sizes((9, 14), (2, 1), (10, 5)),
        dtype="float16",
        cotangents={"dlse": Recipe()},
        catches="pairs t, t + D/2 and exponents 2t/D instead of those of the width; queries that stand at 0, 1, ...",
    )
    yield Case(
        name="rope/last_6_of_9",
        spec=SDPA(causal="top_left", rotary=RoPE(pairing="interleaved", width=6, part="last")),
        sizes=sizes((12, 9), (2, 2), (9, 4)),
        catches="the first channels turned instead of the last; positions counted from the bottom right",
    )
    yield Case(
        name="rope/base_500000",
        seed=2,
        spec=SDPA(causal=True, softcap=1.5, rotary=RoPE(pairing="half", base=500000.0)),
        sizes=sizes((15, 15), (4, 4), (16, 8)),
        dtype="float16",
        inputs={"q": Recipe(exp2=-7), "sink": numbers(0.5, -1.0, 2.0, 0.0)},
        catches="the base 10000 whatever is asked; a turn after the scale or the cap",
    )
    yield Case(
        name="rope/alibi",
        spec=SDPA(causal=True, scale=0.25, rotary=RoPE(pairing="interleaved", width=4), bias=(ALiBi(),)),
        sizes=sizes((13, 13), (2, 2)),
        catches="one of two position terms dropped where both are given",
    )
    yield Case(
        name="rope/decode_300",
        spec=SDPA(causal="bottom_right", rotary=RoPE(pairing="interleaved")),
        sizes=sizes((1, 300), (4, 2), (8, 4)),
        dtype="float16",
        rows=Rows(q=(0,), k=(0, 1, 63, 150, 298, 299)),
        catches="the only query of a decode step turned as position 0 instead of 299",
    )
    yield from _far()
    yield from _tables()
    yield Case(
        name="rope/positions_of_a_batch",
        spec=SDPA(causal="bottom_right", window=(14, None), rotary=RoPE(pairing="half", width=6, part="last")),
        sizes=sizes((4, 6), (2, 1), (8, 4), batch=2),
        dtype="float16",
        inputs={
            "q_positions": Recipe(kind="values", shape=(2, 4), values=(3, 4, 17, 41, 9, 31, 32, 8)),
            "k_positions": Recipe(kind="values", shape=(2, 6), values=(2, 3, 4, 17, 40, 41, 8, 0, 30, 31, 9, 7)),
        },
        catches="keys turned by their index instead of their position; the first sequence's positions for all",
    )
    yield Case(
        name="rope/padding",
        spec=SDPA(causal="bottom_right", rotary=RoPE(pairing="interleaved")),
        sizes=sizes((4, 12), (2, 1), (8, 4), batch=2),
        inputs={
            "kv_lengths": integers(12, 7),
            "k": rows_of(NORMAL, (7, 11), NAN, batch=1),
            "v": rows_of(NORMAL, (7, 11), NAN, batch=1),
        },
        flags=("poison",),
        catches="queries that stand at the end of the array instead of the end of their sequence",
    )
    yield Case(
        name="rope/float64",
        spec=RoPE(pairing="half"),
        sizes=sizes((10, 10), (2, 2), (6, 4)),
        dtype="float64",
        catches="cosines, or angles, in float32 beside double-precision scores",
    )


def _at(*places: int) -> dict[str, Recipe]:
    """Six queries and as many keys at the same places: the first query is left out, for it sees one key alone."""
    return {"q_positions": integers(*places[1:]), "k_positions": integers(*places)}


def _far() -> Iterator[Case]:
    yield Case(
        name="rope/far_exact",
        spec=SDPA(causal="bottom_right", rotary=RoPE(pairing="half")),
        sizes=sizes((6, 7), (4, 2), (8, 4)),
        inputs=_at(32769, 32770, 40001, 65537, 2**19 + 3, 2**20 - 1, 2**20),
        flags=("rope_far", "position_edges"),
        catches="positions times frequencies in float32: angles off by 1e-3 at 32768 and by 0.03 at 2^20",
    )
    yield Case(
        name="rope/far_bfloat16",
        spec=SDPA(causal="bottom_right", rotary=RoPE(pairing="interleaved", width=4)),
        sizes=sizes((6, 7), (2, 2), (8, 4)),
        dtype="bfloat16",
        inputs=_at(32768, 32771, 32790, 33000, 33003, 40007, 40100),
        flags=("rope_far", "position_edges"),
        catches="positions or angles in the model's bfloat16, which holds every 256th position from 32768 on",
    )
    yield Case(
        name="rope/far_float32",
        spec=SDPA(causal="bottom_right", rotary=RoPE(pairing="half", angles="float32")),
        sizes=sizes((6, 7), (2, 2), (8, 4)),
        inputs=_at(32767, 32769, 33333, 50021, 65535, 99991, 131071),
        cotangents={"dlse": Recipe()},
        flags=("rope_far", "position_edges"),
        catches="angles in double precision, or frequencies so, where the model was trained on float32 ones",
    )
    yield Case(
        name="rope/far_float32_last",
        spec=SDPA(rotary=RoPE(pairing="interleaved", angles="float32", width=6, part="last", base=1000000.0)),
        sizes=sizes((6, 7), (4, 2), (10, 4)),
        inputs=_at(2, 40000, 40961, 77777, 250007, 2**19 - 1, 2**19 + 1),
        flags=("rope_far", "position_edges"),
        catches="the exponent 2t/D for 2t/width; the frequency as base^(−2t/width) in place of a power's reciprocal",
    )


def _table(dtype: str, rows: int, width: int) -> dict[str, Recipe]:
    """Cosines and sines as models keep them: of float32 angles, rounded to the dtype."""
    angles = np.arange(rows, dtype=np.float32)[:, None] * float32_frequencies(10000.0, width)

    def rounded(function: Any) -> Recipe:
        values = round_to(function(angles.astype(np.float64)), dtype).astype(np.float64)
        return Recipe(kind="values", values=tuple(values.ravel().tolist()))

    return {"rope_cos": rounded(cos64), "rope_sin": rounded(sin64)}


def _tables() -> Iterator[Case]:
    yield Case(
        name="rope/table",
        spec=SDPA(causal=True, rotary=RoPE(pairing="half", angles="table", width=8)),
        sizes=sizes((11, 11), (4, 2), (8, 4)) | {"P": 16},
        inputs=_table("float32", 16, 8),
        cotangents={"dlse": Recipe()},
        catches="own angles in place of those handed over; the gradient of a row that queries and keys both read",
    )
    # A circle is not asked for: row 3 halves what stands there, and row 5 is a reflection.
    table = _table("bfloat16", 9, 4)
    table["rope_cos"] = edited(table["rope_cos"], scaled((3, None), 0.5), set_((5, None), -1.0))
    table["rope_sin"] = edited(table["rope_sin"], scaled((3, None), 0.5), set_((5, None), 0.0))
    yield Case(
        name="rope/table_bfloat16",
        spec=SDPA(causal="bottom_right", rotary=RoPE(pairing="interleaved", angles="table", width=4, part="last")),
        sizes=sizes((5, 9), (2, 1), (6, 4)) | {"P": 9},
        dtype="bfloat16",
        inputs=table,
        catches="rows of the table read by index 0, 1, ... for queries that stand at 4, 5, ...",
    )
    yield Case(
        name="rope/causal_300",
        spec=SDPA(causal=True, rotary=RoPE(pairing="half")),
        sizes=sizes((300, 300), (2, 1), (4, 4)),
        dtype="bfloat16",
        rows=Rows(q=(0, 127, 128, 256, 299), k=(0, 127, 256, 299)),
        catches="positions that begin anew with every tile",
    )
    yield Case(
        name="rope/interleaved_513",
        spec=SDPA(rotary=RoPE(pairing="interleaved")),
        sizes=sizes((5, 513), (2, 2), (4, 4)),
        dtype="float16",
        rows=Rows(q=(0, 4), k=(0, 255, 256, 512)),
        catches="queries at their own index, where the last one stands with the last key",
    )
