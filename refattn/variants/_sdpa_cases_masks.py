"""Golden cases of who may attend: causal alignment, windows, boolean masks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from refattn.case import NORMAL, Case, Recipe, Rows
from refattn.variants._case_parts import HUGE, INF, NAN, attend, edited, rows_of, set_, sizes
from refattn.variants.sdpa import SDPA

Causal = bool | Literal["top_left", "bottom_right"]
Window = tuple[int | None, int | None]


def cases() -> Iterator[Case]:
    """Topic by topic."""
    yield from causal()
    yield from windows()
    yield from masks()


def causal() -> Iterator[Case]:
    """Both alignments, both ways of Lq ≠ Lk."""
    small: tuple[tuple[Causal, int, int, str, str], ...] = (
        ("top_left", 16, 24, "float32", "bottom-right alignment where top-left is asked"),
        ("bottom_right", 16, 24, "bfloat16", "top-left alignment where bottom-right is asked"),
        ("top_left", 24, 16, "float16", "rows beyond the last key masked or shifted: they see every key"),
        ("bottom_right", 24, 16, "float32", "NaN, or the mean of V, in the first rows, which see nothing"),
    )
    for align, lq, lk, dtype, what in small:
        yield Case(
            name=f"causal/{align}_{lq}x{lk}",
            spec=SDPA(causal=align),
            sizes=sizes((lq, lk), (2, 1)),
            dtype=dtype,
            cotangents={"dlse": Recipe()},
            catches=what,
        )
    yield Case(
        name="causal/top_left_decode",
        spec=SDPA(causal="top_left"),
        sizes=sizes((1, 33), (2, 2), (4, 4)),
        dtype="bfloat16",
        flags=("one_visible_key",),
        catches="a decode step taken at the last position: top-left, the one query sees key 0 alone",
    )
    yield Case(
        name="causal/poisoned_future",
        spec=SDPA(causal="top_left"),
        sizes=sizes((12, 16), (2, 1)),
        inputs={"k": rows_of(NORMAL, (12, 15), NAN), "v": rows_of(rows_of(NORMAL, (12, 13), INF), 14, NAN)},
        flags=("poison",),
        catches="weight 0 times NaN or inf: keys that no query sees reach the output or dk",
    )
    large: tuple[tuple[str, Causal, int, int, str, tuple[int, int], str], ...] = (
        ("bottom_right_129x257", "bottom_right", 129, 257, "bfloat16", (4, 2), "alignment lost when tiles are skipped"),
        ("top_left_257x129", "top_left", 257, 129, "float16", (2, 2), "tiles right of the diagonal skipped by Lq"),
        ("bottom_right_300x257", "bottom_right", 300, 257, "float32", (2, 1), "a whole tile row that sees nothing"),
        ("square_257", True, 257, 257, "float32", (3, 1), "the diagonal tile masked with < for ≤"),
        ("square_1000", True, 1000, 1000, "bfloat16", (2, 2), "a length that no tile size divides"),
    )
    cuts = (0, 1, 42, 43, 44, 63, 64, 127, 128, 129, 255, 256, 299, 511, 512, 999)
    for name, align, lq, lk, dtype, heads, what in large:
        yield Case(
            name=f"causal/{name}",
            spec=SDPA(causal=align),
            sizes=sizes((lq, lk), heads, (8, 4)),
            dtype=dtype,
            rows=Rows(q=tuple(i for i in cuts if i < lq), k=tuple(j for j in cuts if j < lk)),
            catches=what,
        )


def windows() -> Iterator[Case]:
    """Both ends are inclusive and each may be 0 or unbounded."""
    small: tuple[tuple[str, Window, Causal, int, int, str, str], ...] = (
        ("both_sides", (3, 2), False, 33, 33, "float32", "either end off by one"),
        ("left_causal", (4, None), True, 33, 33, "bfloat16", "4 keys in all where 4 to the left and itself are meant"),
        ("self_and_right", (0, 3), False, 17, 17, "float32", "a left end of 0 taken as unbounded"),
        ("bottom_right", (5, 0), "bottom_right", 16, 33, "float16", "a window placed by i instead of i + Lk − Lq"),
        ("top_left", (3, 1), "top_left", 33, 16, "float32", "rows whose window lies beyond the last key not 0"),
        ("unaligned", (2, 2), False, 12, 20, "bfloat16", "without causal, a window placed by i, not i + Lk − Lq"),
    )
    for name, window, align, lq, lk, dtype, what in small:
        yield Case(
            name=f"window/{name}",
            spec=SDPA(window=window, causal=align),
            sizes=sizes((lq, lk), (2, 1), (8, 8)),
            dtype=dtype,
            flags=("fully_masked_rows",) if lq > lk else (),
            catches=what,
        )
    yield Case(
        name="window/self_only",
        spec=SDPA(window=(0, 0)),
        sizes=sizes((9, 9), (2, 2), (4, 4)),
        dtype="bfloat16",
        flags=("one_visible_key",),
        catches="an empty window, or two keys, where (0, 0) is the key at the query: out = v",
    )
    large: tuple[tuple[str, Window, Causal, int, int, str, tuple[int, int], tuple[int, ...], str], ...] = (
        ("left_128", (128, 0), True, 257, 257, "bfloat16", (2, 2), (0, 127, 128, 129, 130, 255, 256),
         "127 or 129 keys to the left at a tile's edge"),
        ("edges_in_bfloat16", (256, 0), True, 515, 515, "bfloat16", (1, 1), (255, 256, 257, 258, 259, 513, 514),
         "positions compared in bfloat16, which holds odd integers up to 256 only"),
        ("both_384", (100, 27), False, 384, 384, "float16", (2, 1), (0, 27, 100, 101, 127, 128, 255, 256, 356, 383),
         "tiles wholly outside the window skipped one too early"),
        ("bottom_right_65x513", (63, 0), "bottom_right", 65, 513, "float32", (4, 2), (0, 1, 62, 63, 64),
         "first tile of a window with a cache counted from the query's own index"),
    )  # fmt: skip
    for name, window, align, lq, lk, dtype, heads, cuts, what in large:
        yield Case(
            name=f"window/{name}",
            spec=SDPA(window=window, causal=align),
            sizes=sizes((lq, lk), heads, (8, 4)),
            dtype=dtype,
            rows=Rows(q=cuts, k=tuple(j + (lk - lq) for j in cuts)),
            flags=("position_edges",) if lq == 515 else (),
            catches=what,
        )


def masks() -> Iterator[Case]:
    """Boolean masks of every broadcast shape; what sees nothing gives 0, what is hidden touches nothing."""
    b, h, lq, lk = 2, 4, 9, 14
    for name, shape, dtype, what in (
        ("keys_by_batch", (b, 1, 1, lk), "float32", "a key-padding mask broadcast over the batch, or inverted"),
        ("keys_by_head", (1, h, 1, lk), "bfloat16", "the mask of a query head taken from its key head"),
        ("pairs_by_batch", (b, 1, lq, lk), "float16", "True read as hidden; a mask of all heads used for the first"),
        ("pairs", (lq, lk), "float32", "a two-dimensional mask aligned with batch and head"),
    ):
        yield Case(
            name=f"mask/{name}",
            spec=SDPA(),
            sizes=sizes((lq, lk), (h, 2), (8, 4), batch=b),
            dtype=dtype,
            inputs={"mask": attend(*shape)},
            catches=what,
        )
    yield Case(
        name="mask/empty_rows",
        spec=SDPA(),
        sizes=sizes((8, 12), (2, 2)),
        inputs={"mask": attend(1, 1, 8, 12, hidden=((0, 0, (0, 3, 7), None),))},
        cotangents={"dlse": Recipe()},
        flags=("fully_masked_rows",),
        catches="NaN or the mean of V in rows that see nothing, or any gradient from them",
    )
    yield Case(
        name="mask/query_rows",
        spec=SDPA(),
        sizes=sizes((10, 10), (2, 1)),
        dtype="float16",
        inputs={"mask": attend(1, 2, 10, 1, true=144, hidden=((0, 1, 4, 0),))},
        flags=("fully_masked_rows",),
        catches="a mask with one key column taken as a key mask: it hides whole rows, head by head",
    )
    yield Case(
        name="mask/empty_head_and_batch",
        spec=SDPA(),
        sizes=sizes((8, 8), (4, 2), (8, 4), batch=2),
        dtype="bfloat16",
        inputs={"mask": attend(2, 4, 1, 8, hidden=((0, 2, 0, None), (1, None, 0, None)))},
        flags=("fully_masked_head", "fully_masked_rows"),
        catches="a head, and a whole sequence, that see nothing: NaN spreads through a shared dk and dv",
    )
    yield Case(
        name="mask/with_causal",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((10, 16), (2, 2)),
        dtype="float16",
        inputs={"mask": attend(1, 1, 10, 16, hidden=((0, 0, 2, None),))},
        flags=("fully_masked_rows",),
        catches="a mask that replaces the causal one instead of both holding",
    )
    hidden = (3, 8, 9)
    yield Case(
        name="mask/poisoned_keys",
        spec=SDPA(),
        sizes=sizes((8, 12), (2, 1)),
        inputs={
            "mask": attend(1, 1, 1, 12, true=256, hidden=((0, 0, 0, hidden),)),
            "k": rows_of(rows_of(rows_of(NORMAL, 3, NAN), 8, INF), 9, HUGE),
            "v": rows_of(rows_of(rows_of(NORMAL, 3, INF), 8, NAN), 9, -HUGE),
        },
        flags=("poison",),
        catches="NaN, inf or 1e30 in a hidden key reaching out, lse, dq, dk or dv",
    )
    yield Case(
        name="mask/poison_in_a_bfloat16_tile",
        spec=SDPA(causal=True),
        sizes=sizes((257, 257), (2, 2), (8, 4)),
        dtype="bfloat16",
        inputs={
            "mask": attend(1, 1, 1, 257, hidden=((0, 0, 0, (70, 200)),)),
            "k": rows_of(NORMAL, 70, NAN),
            "v": rows_of(NORMAL, 200, NAN),
        },
        rows=Rows(q=(63, 70, 71, 128, 200, 256), k=(0, 69, 70, 71, 200, 256)),
        flags=("poison",),
        catches="NaN of a hidden key spread over a tile by the product P·V",
    )
    yield Case(
        name="mask/live_nan",
        spec=SDPA(causal=True),
        sizes=sizes((8, 8), (2, 2), (4, 4)),
        inputs={"v": edited(NORMAL, set_((0, 0, 5, 2), NAN))},
        want=("out", "lse"),
        flags=("propagates",),
        catches="NaN of a visible key silently dropped, or spread to rows and columns that do not read it",
    )
