"""Golden cases of keys and values kept otherwise than as real numbers in a row: int8 with scales."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from refattn.case import Case, Edit, Recipe, Rows
from refattn.variants._case_parts import NAN, edited, integers, numbers, set_, sizes
from refattn.variants.rope import RoPE
from refattn.variants.sdpa import SDPA

WHOLE = Recipe(kind="integers", limit=127, exp2=0)
"""Integers from −127 to 127."""


def scale(*shape: int, exp2: int = -6) -> Recipe:
    """Scales between 9/16 and 23/16 of 2^exp2, of the whole shape if none is said."""
    return Recipe(
        kind="integers",
        limit=7,
        exp2=exp2 - 4,
        shape=shape or None,
        edits=(Edit(at=(), op="add", value=2.0**exp2),),
    )


def int8(**more: Recipe) -> dict[str, Recipe]:
    """Inputs of integers with a scale for each token and head, or as told."""
    return {"k": WHOLE, "v": WHOLE, "k_scale": scale(), "v_scale": scale(), **more}


def cases() -> Iterator[Case]:
    """How scales are read, and where they act."""
    small: dict[str, Any] = {"sizes": sizes((11, 18), (4, 2), (8, 6), batch=2)}
    yield Case(
        name="int8/a_scale_for_each_token",
        spec=SDPA(kv="int8"),
        inputs=int8(),
        cotangents={"dlse": Recipe()},
        catches="one scale read for all tokens or heads, or that of k applied to v",
        **small,
    )
    yield Case(
        name="int8/a_scale_for_each_head_decode",
        spec=SDPA(kv="int8", causal="bottom_right"),
        sizes=sizes((1, 70), (8, 2), (16, 16), batch=3),
        dtype="bfloat16",
        inputs=int8(
            k_scale=scale(1, 2, 1), v_scale=scale(1, 2, 1, exp2=-5), kv_lengths=integers(70, 1, 33)
        ),
        catches="k dequantised to bfloat16 before the product, or a decode step that reads another head's scale",
    )
    yield Case(
        name="int8/ends_of_the_range",
        spec=SDPA(kv="int8", scale=2.0**-5),
        sizes=sizes((9, 12), (2, 2)),
        dtype="float16",
        inputs=int8(
            k=edited(WHOLE, set_((None, None, (1, 5), None), -128.0), set_((None, None, (2, 7), 3), 127.0)),
            v=edited(WHOLE, set_((None, None, (0, 8), None), -128.0)),
        ),
        catches="−128 clamped to −127 or read as unsigned, or sums of products that overflow float16",
    )
    yield Case(
        name="int8/scales_of_padding",
        spec=SDPA(kv="int8", causal="bottom_right"),
        sizes=sizes((5, 16), (2, 1), batch=2),
        inputs=int8(
            k_scale=edited(scale(), set_((None, None, (13, 14, 15)), NAN)),
            v_scale=edited(scale(), set_((None, None, (13, 14, 15)), NAN)),
            kv_lengths=integers(13, 6),
        ),
        flags=("poison",),
        catches="the scale of a slot that no query sees: 0 · NaN in the sum, or in dk_scale",
    )
    yield Case(
        name="int8/softcap_and_sink",
        spec=SDPA(kv="int8", softcap=2.0, causal=True),
        sizes=sizes((16, 16), (2, 2)),
        inputs=int8(sink=numbers(1.5, -0.5)),
        cotangents={"dlse": Recipe()},
        catches="k's scale applied after the cap, or v's scale to the sink's share",
    )
    yield Case(
        name="int8/a_scale_of_zero",
        spec=SDPA(kv="int8"),
        sizes=sizes((6, 10), (2, 1)),
        inputs=int8(
            k_scale=edited(scale(), set_((None, None, (2, 3)), 0.0)),
            v_scale=edited(scale(), set_((None, None, (3, 7)), 0.0)),
        ),
        catches="a scale of 0, as a token of zeros has it, divided by or taken for a mask",
    )
    yield Case(
        name="int8/turned_keys",
        spec=SDPA(kv="int8", causal=True, rotary=RoPE(pairing="half")),
        sizes=sizes((15, 15), (2, 2)),
        inputs=int8(),
        flags=("rope",),
        catches="keys turned as integers, or not turned because they are integers",
    )
    yield Case(
        name="int8/beyond_a_tile",
        spec=SDPA(kv="int8"),
        sizes=sizes((5, 257), (2, 1), (8, 4)),
        inputs=int8(),
        rows=Rows(q=(0, 4), k=()),
        catches="the scale of the one token beyond a tile of 256 not read",
    )
