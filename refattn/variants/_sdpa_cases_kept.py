"""Golden cases of keys and values kept otherwise than as real numbers in a row: int8 with scales, and blocks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from refattn.case import Case, Edit, Recipe, Rows
from refattn.variants._case_parts import NAN, attend, edited, integers, numbers, set_, sizes
from refattn.variants.alibi import ALiBi
from refattn.variants.rope import RoPE
from refattn.variants.sdpa import SDPA

WHOLE = Recipe(kind="integers", limit=127, exp2=0)
"""Integers from −127 to 127."""


SCALE = Recipe(kind="integers", limit=7, exp2=-10, edits=(Edit(at=(), op="add", value=2.0**-6),))
"""Scales between 9/16 and 23/16 of 2^-6."""


def int8(**more: Recipe) -> dict[str, Recipe]:
    """Inputs of integers with a scale for each token and head, or as told."""
    return {"k": WHOLE, "v": WHOLE, "k_scale": SCALE, "v_scale": SCALE, **more}


def blocks(batch: int, count: int, *table: int) -> Recipe:
    """A table of so many sequences and entries each."""
    return Recipe(kind="values", values=table, shape=(batch, count))


def in_blocks(
    lq: int, heads: tuple[int, int], widths: tuple[int, int], batch: int, pages: tuple[int, int, int]
) -> dict[str, int]:
    """Sizes by name; pages are N blocks of S slots, M entries of a sequence."""
    names = {"B": batch, "Hq": heads[0], "Hkv": heads[1], "Lq": lq, "D": widths[0], "Dv": widths[1]}
    return names | dict(zip(("N", "S", "M"), pages, strict=True))


def cases() -> Iterator[Case]:
    """Scales, then blocks."""
    yield from scales()
    yield from pages()


def scales() -> Iterator[Case]:
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
            k_scale=Recipe(kind="values", values=(15 / 1024, 23 / 1024), shape=(1, 2, 1)),
            v_scale=Recipe(kind="values", values=(19 / 512, 27 / 512), shape=(1, 2, 1)),
            kv_lengths=integers(70, 1, 33),
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
            k_scale=edited(SCALE, set_((None, None, (13, 14, 15)), NAN)),
            v_scale=edited(SCALE, set_((None, None, (13, 14, 15)), NAN)),
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
            k_scale=edited(SCALE, set_((None, None, (2, 3)), 0.0)),
            v_scale=edited(SCALE, set_((None, None, (3, 7)), 0.0)),
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


def pages() -> Iterator[Case]:
    """Blocks out of order, shared, partly filled, and holding what nobody may read; entries that name no block."""
    yield Case(
        name="paged/out_of_order",
        spec=SDPA(paged=True),
        sizes=in_blocks(7, (4, 2), (8, 6), 2, (9, 4, 4)),
        inputs={"block_table": blocks(2, 4, 5, 2, 8, 0, 7, 3, 1, 6), "kv_lengths": integers(16, 13)},
        cotangents={"dlse": Recipe()},
        catches="blocks read in the order in which they stand, or slot j of block j",
    )
    yield Case(
        name="paged/a_shared_prefix",
        spec=SDPA(paged=True, causal="bottom_right"),
        sizes=in_blocks(3, (2, 1), (8, 8), 3, (6, 4, 3)),
        inputs={"block_table": blocks(3, 3, 4, 1, 0, 4, 1, 5, 4, 2, 3), "kv_lengths": integers(11, 9, 12)},
        catches="dk and dv of a block that several sequences read taken from the last of them instead of summed",
    )
    yield Case(
        name="paged/decode_with_entries_of_no_block",
        spec=SDPA(paged=True, causal="bottom_right"),
        sizes=in_blocks(1, (8, 2), (16, 16), 4, (7, 8, 5)),
        dtype="bfloat16",
        inputs={
            "block_table": blocks(
                4, 5, 3, 6, -1, -1, -1, 1, 99, 99, 99, 99, 2, 0, 5, 4, 77, -7, -7, -7, -7, -7
            ),
            "kv_lengths": integers(16, 1, 27, 0),
        },
        flags=("zero_length", "fully_masked_rows"),
        catches="entries beyond a sequence's length followed, or a block more than it fills exactly",
    )
    yield Case(
        name="paged/poison_in_slots_and_blocks",
        spec=SDPA(paged=True),
        sizes=in_blocks(4, (2, 2), (8, 4), 2, (6, 4, 3)),
        dtype="float16",
        inputs={
            "k": Recipe(edits=(set_(((1, 4), None, None, None), NAN), set_((2, None, (2, 3), None), NAN))),
            "v": Recipe(edits=(set_(((1, 4), None, None, None), NAN), set_((2, None, (2, 3), None), NAN))),
            "block_table": blocks(2, 3, 0, 5, 2, 3, 1, 4),
            "kv_lengths": integers(10, 4),
        },
        flags=("poison",),
        catches="0 · NaN from slots that a sequence has not filled yet",
    )
    yield Case(
        name="paged/alibi_window_and_mask",
        spec=SDPA(paged=True, causal="bottom_right", window=(9, None), bias=(ALiBi(),)),
        sizes=in_blocks(5, (4, 2), (8, 8), 2, (7, 8, 3)),
        inputs={
            "block_table": blocks(2, 3, 6, 0, 3, 1, 5, 2),
            "kv_lengths": integers(24, 18),
            "mask": attend(2, 1, 1, 24, true=200),
        },
        flags=("alibi",),
        catches="distances or masks by slot where they go by the key's place in its sequence",
    )
    yield Case(
        name="paged/int8",
        spec=SDPA(paged=True, kv="int8", causal="bottom_right"),
        sizes=in_blocks(2, (4, 2), (8, 8), 2, (5, 4, 2)),
        inputs=int8(
            k_scale=edited(SCALE, set_((2, None, 3), NAN)),
            block_table=blocks(2, 2, 4, 2, 0, 3),
            kv_lengths=integers(7, 8),
        ),
        flags=("poison",),
        catches="scales read by key where they stand in blocks too",
    )
    yield Case(
        name="paged/sigmoid",
        spec=SDPA(paged=True, normalizer="sigmoid", sigmoid_bias=-2.0),
        sizes=in_blocks(3, (2, 1), (8, 5), 2, (4, 8, 2)),
        inputs={"block_table": blocks(2, 2, 3, 1, 0, -1), "kv_lengths": integers(13, 5)},
        want=("out", "vjp"),
        catches="slots that are not filled weighed by sigmoid(b)",
    )
    yield Case(
        name="paged/three_hundred_blocks",
        spec=SDPA(paged=True, causal="bottom_right"),
        sizes=in_blocks(2, (2, 1), (4, 4), 1, (300, 1, 280)),
        inputs={
            "block_table": blocks(1, 280, *(7 * n % 300 + n // 300 for n in range(280))),
            "kv_lengths": integers(279),
        },
        catches="table entries kept in 8 bits, or a slot found by a shift where blocks hold one key",
    )
