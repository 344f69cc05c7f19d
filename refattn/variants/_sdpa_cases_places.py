"""Golden cases of where rows stand: packed segments, padded lengths, given positions."""

from __future__ import annotations

from collections.abc import Iterator

from refattn.case import NORMAL, Case, Recipe, Rows
from refattn.variants._case_parts import HUGE, INF, NAN, integers, rows_of, sizes
from refattn.variants.sdpa import SDPA


def cases() -> Iterator[Case]:
    """Topic by topic."""
    yield from segments()
    yield from padding()
    yield from positions()


def segments() -> Iterator[Case]:
    """Several sequences packed into one row."""
    packed = (0,) * 5 + (1,) * 1 + (2,) * 9 + (7,) * 2
    yield Case(
        name="segments/packed",
        spec=SDPA(),
        sizes=sizes((17, 17), (2, 1)),
        inputs={"q_segment_ids": integers(*packed), "k_segment_ids": integers(*packed)},
        catches="attention across the borders of packed sequences",
    )
    yield Case(
        name="segments/packed_causal",
        spec=SDPA(causal=True),
        sizes=sizes((17, 17), (4, 2), (8, 5)),
        dtype="bfloat16",
        inputs={"q_segment_ids": integers(*packed), "k_segment_ids": integers(*packed)},
        catches="segments taken for the causal mask or the causal mask for segments",
    )
    yield Case(
        name="segments/cross",
        spec=SDPA(),
        sizes=sizes((10, 14), (2, 2)),
        dtype="float16",
        inputs={
            "q_segment_ids": integers(*(0, 0, 0, 1, 1, 3, 3, 2, 2, 2)),
            "k_segment_ids": integers(*(0,) * 6 + (2,) * 8),
        },
        flags=("fully_masked_rows",),
        catches="ids of the queries used for the keys; segments without a key give 0",
    )
    ids = tuple(i // 100 for i in range(257))
    yield Case(
        name="segments/three_hundreds",
        spec=SDPA(causal=True),
        sizes=sizes((257, 257), (2, 2), (4, 8)),
        dtype="bfloat16",
        inputs={"q_segment_ids": integers(*ids), "k_segment_ids": integers(*ids)},
        rows=Rows(q=(0, 99, 100, 101, 127, 128, 199, 200, 201, 256), k=(0, 99, 100, 128, 200, 256)),
        catches="a border inside a tile rounded to the tile's edge",
    )


def padding() -> Iterator[Case]:
    """Sequences shorter than their arrays, with rubbish in what is left over."""
    yield Case(
        name="padding/keys_poisoned",
        spec=SDPA(),
        sizes=sizes((8, 12), (2, 1), (8, 4), batch=3),
        inputs={
            "kv_lengths": integers(12, 7, 2),
            "k": rows_of(rows_of(NORMAL, (7, 8, 11), NAN, batch=1), (2, 3, 11), HUGE, batch=2),
            "v": rows_of(rows_of(NORMAL, (7, 8, 11), INF, batch=1), (2, 3, 11), NAN, batch=2),
        },
        flags=("poison",),
        catches="slots beyond a sequence's length let in, or multiplied by 0",
    )
    yield Case(
        name="padding/causal_bottom_right",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((10, 16), (4, 2), (8, 4), batch=3),
        dtype="bfloat16",
        inputs={
            "q_lengths": integers(10, 4, 7),
            "kv_lengths": integers(16, 9, 5),
            "q": rows_of(NORMAL, (4, 9), NAN, batch=1),
        },
        cotangents={"dlse": Recipe()},
        flags=("poison", "fully_masked_rows"),
        catches="Lk − Lq of the arrays where each sequence has its own",
    )
    yield Case(
        name="padding/causal_top_left",
        spec=SDPA(causal="top_left"),
        sizes=sizes((9, 9), (2, 2), (4, 4), batch=2),
        dtype="float16",
        inputs={"q_lengths": integers(9, 5), "kv_lengths": integers(6, 9)},
        flags=("fully_masked_rows",),
        catches="top-left alignment moved by the lengths",
    )
    yield Case(
        name="padding/empty_sequences",
        spec=SDPA(),
        sizes=sizes((6, 10), (2, 1), (8, 4), batch=4),
        inputs={"q_lengths": integers(6, 0, 6, 3), "kv_lengths": integers(10, 10, 0, 4)},
        flags=("zero_length", "fully_masked_rows"),
        catches="a sequence of length 0 that divides by 0 or takes its neighbour's keys",
    )
    yield Case(
        name="padding/long_cache",
        spec=SDPA(causal="bottom_right", window=(100, 0)),
        sizes=sizes((5, 700), (2, 1), (8, 4), batch=2),
        dtype="bfloat16",
        inputs={
            "kv_lengths": integers(700, 259),
            "k": rows_of(NORMAL, (259, 300, 699), NAN, batch=1),
            "v": rows_of(NORMAL, (259, 300, 699), NAN, batch=1),
        },
        rows=Rows(q=(0, 1, 4), k=(153, 154, 157, 158, 258, 259, 595, 596, 599, 600, 699)),
        flags=("poison",),
        catches="a window in a padded cache counted from the array's end instead of the sequence's",
    )


def positions() -> Iterator[Case]:
    """Where queries and keys stand is told, not counted."""
    yield Case(
        name="positions/scattered",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((8, 12), (2, 2)),
        inputs={
            "q_positions": integers(5, 3, 40, 17, 0, 21, 22, 9),
            "k_positions": integers(0, 9, 2, 30, 4, 17, 1, 40, 21, 3, 12, 100),
        },
        catches="array indices used where positions are given",
    )
    yield Case(
        name="positions/window_by_batch",
        spec=SDPA(causal="bottom_right", window=(6, None)),
        sizes=sizes((6, 10), (2, 1), (4, 4), batch=2),
        dtype="bfloat16",
        inputs={
            "q_positions": Recipe(kind="values", values=(9, 10, 11, 12, 13, 14, 2, 3, 4, 5, 6, 7), shape=(2, 6)),
            "k_positions": integers(*range(3, 13)),
        },
        flags=("fully_masked_rows",),
        catches="a window measured by index instead of position, or one sequence's positions used for all",
    )
