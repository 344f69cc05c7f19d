"""Golden cases of 2049 keys and more, with a few rows published: what a tolerance for the whole tensor lets through."""

from __future__ import annotations

from collections.abc import Iterator

from refattn.case import NORMAL, Case, Edit, Recipe, Rows
from refattn.variants._case_parts import NAN, edited, integers, numbers, rows_of, scaled, set_, sizes
from refattn.variants.sdpa import SDPA

LAST_HEAVY = Recipe(edits=(scaled((None, None, 2048, None), 64.0),))
POSITIVE = Recipe(
    kind="integers", exp2=-4, limit=7,
    edits=(Edit(at=(None,), op="add", value=1.0), scaled((None, None, 700, None), 256.0)),
)  # fmt: skip


def cases() -> Iterator[Case]:
    """Lengths 2049, 2050, 2065, 2304 and 4097."""
    yield Case(
        name="long/last_key_2049",
        spec=SDPA(),
        sizes=sizes((5, 2049), (1, 1), (8, 8)),
        inputs={"v": LAST_HEAVY},
        rows=Rows(q=(0, 2, 4), k=(0, 1023, 1024, 2047, 2048)),
        catches="key 2048 dropped: one weight in two thousand, on a value 64 times the others",
    )
    yield Case(
        name="long/last_key_2049_bfloat16",
        spec=SDPA(causal=True),
        sizes=sizes((2049, 2049), (2, 1), (8, 4)),
        dtype="bfloat16",
        inputs={"v": LAST_HEAVY},
        rows=Rows(q=(0, 1, 1024, 2047, 2048), k=(0, 1023, 1024, 2047, 2048)),
        catches="the last key or the last query dropped at a tile's edge, which 2 % of relative error hides",
    )
    yield Case(
        name="long/flat_weights_2049",
        spec=SDPA(scale=0.25),
        sizes=sizes((3, 2049), (2, 2), (4, 4)),
        dtype="bfloat16",
        inputs={"v": POSITIVE},
        rows=Rows(q=(0, 1, 2), k=(0, 700, 2048)),
        catches="sums accumulated in bfloat16: beyond 256 equal terms they stop growing",
    )
    yield Case(
        name="long/flat_weights_2304_float16",
        spec=SDPA(scale=0.25),
        sizes=sizes((2, 2304), (2, 1), (4, 4)),
        dtype="float16",
        inputs={"v": POSITIVE},
        rows=Rows(q=(0, 1), k=(0, 700, 2303)),
        catches="the denominator accumulated in float16: beyond 2048 it stops growing by ones",
    )
    yield Case(
        name="long/window_2050",
        spec=SDPA(causal=True, window=(1024, 0)),
        sizes=sizes((2050, 2050), (2, 2), (4, 4)),
        dtype="float16",
        rows=Rows(q=(1023, 1024, 1025, 2048, 2049), k=(0, 1, 1023, 1024, 1025, 2049)),
        inputs={"v": edited(NORMAL, scaled((None, None, (0, 1, 1023, 1024, 1025), None), 32.0))},
        catches="1023 or 1025 keys to the left, one weight in a thousand; positions in float16 beyond 2048",
    )
    yield Case(
        name="long/prefix_cache",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((17, 2065), (4, 2), (8, 4)),
        rows=Rows(q=(0, 1, 16), k=(0, 1, 2047, 2048, 2049, 2064)),
        inputs={"v": edited(NORMAL, scaled((None, None, (2049, 2050, 2064), None), 64.0))},
        catches="17 new queries on a cache of 2048 keys aligned at the top left",
    )
    yield Case(
        name="long/top_left_2049x2304",
        spec=SDPA(causal="top_left"),
        sizes=sizes((2049, 2304), (2, 2), (4, 8)),
        dtype="bfloat16",
        inputs={
            "k": rows_of(NORMAL, (2049, 2303), NAN),
            "v": edited(NORMAL, scaled((None, None, (1024, 2048), None), 64.0)),
        },
        rows=Rows(q=(0, 1023, 1024, 2047, 2048), k=(0, 1024, 2047, 2048, 2303)),
        flags=("poison",),
        catches="keys beyond the last query read before they are masked",
    )
    yield Case(
        name="long/decode_4097",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((1, 4097), (4, 1), (8, 4)),
        dtype="bfloat16",
        inputs={"v": edited(NORMAL, scaled((None, None, 4096, None), 128.0))},
        rows=Rows(q=(0,), k=(0, 2047, 2048, 4095, 4096)),
        catches="the newest key missing from a decode step's split of the cache",
    )
    yield Case(
        name="long/sink_2049",
        spec=SDPA(causal=True),
        sizes=sizes((2049, 2049), (2, 2), (4, 4)),
        dtype="bfloat16",
        inputs={"sink": numbers(8.0, 6.5)},
        cotangents={"dlse": Recipe()},
        rows=Rows(q=(0, 1, 1024, 2048), k=(0, 1024, 2048)),
        catches="the sink rescaled with the accumulator, or added once a tile",
    )
    yield Case(
        name="long/padding_2050",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((3, 2050), (2, 1), (4, 4), batch=2),
        inputs={
            "kv_lengths": integers(2050, 1025),
            "k": rows_of(NORMAL, (1025, 1026, 2049), NAN, batch=1),
            "v": rows_of(
                edited(NORMAL, scaled((None, None, (1024, 2049), None), 64.0)), (1025, 1026, 2049), NAN, batch=1
            ),
        },
        rows=Rows(q=(0, 2), k=(0, 1023, 1024, 1025, 2048, 2049)),
        flags=("poison",),
        catches="a sequence that ends one key behind a tile's edge, with NaN in the rest of the tile",
    )
    last_two = Recipe(kind="constant", shape=(2050,), edits=(set_(((2048, 2049),), 1.0),))
    yield Case(
        name="long/segments_2050",
        spec=SDPA(causal=True),
        sizes=sizes((2050, 2050), (2, 2), (4, 4)),
        inputs={"q_segment_ids": last_two, "k_segment_ids": last_two},
        rows=Rows(q=(1, 1024, 2047, 2048, 2049), k=(0, 1024, 2047, 2048, 2049)),
        catches="a last segment of two tokens that reads the one before it",
    )
    yield Case(
        name="long/softcap_bias_2049",
        spec=SDPA(softcap=2.0),
        sizes=sizes((4, 2049), (1, 1), (8, 4)),
        dtype="bfloat16",
        inputs={"q": Recipe(exp2=-7), "bias": Recipe(shape=(1, 1, 1, 2049), edits=(set_((0, 0, 0, 2048), 6.0),))},
        rows=Rows(q=(0, 3), k=(0, 1024, 2047, 2048)),
        catches="a bias capped with the scores: key 2048 stands 6 above the cap of 2",
    )
