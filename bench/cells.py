"""Cells: the problems that are timed, their arrays, and what they cost."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Kind = Literal["forward", "backward", "decode"]
TERMS = ("plain", "alibi", "t5", "window", "softcap", "document")
DTYPES: dict[str, Any] = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16, "int8": np.int8}
UNITS = {"f32": 2.0**-24, "bf16": 2.0**-8, "f16": 2.0**-11, "int8": 2.0**-24}  # of the output: int8 has float32 queries
PAGE = 16  # slots
SOFTCAP, WINDOW, BUCKETS, FARTHEST = 50.0, 256, 32, 128
_DOCUMENTS = (0.05, 0.15, 0.3, 0.5, 0.6, 0.85)  # where the documents of a sequence begin, as shares of its length


@dataclass(frozen=True)
class Cell:
    """One problem: batch 1; queries as long as keys, but for decode, which has one query.

    Decode alone has int8, which is of k and v, each token of a head with a scale, and pages: blocks out of order.
    """

    kind: Kind = "forward"
    heads: int = 8
    kv_heads: int = 8
    length: int = 2048
    width: int = 64
    causal: bool = False
    term: str = "plain"
    dtype: str = "f32"
    threads: int = 2
    paged: bool = False

    @property
    def queries(self) -> int:
        """Query rows of one head."""
        return 1 if self.kind == "decode" else self.length

    @property
    def name(self) -> str:
        """The cell in words; unique."""
        heads = f"H{self.heads}" if self.heads == self.kv_heads else f"H{self.heads}/{self.kv_heads}"
        mask = "" if self.kind == "decode" else "causal " if self.causal else "full "
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        pages = "paged " if self.paged else ""
        return f"{self.kind} {heads} L{self.length} D{self.width} {mask}{pages}{self.term} {self.dtype} {threads}"

    @property
    def blocks(self) -> bool:
        """Whether the cell is timed block by block too: those that goals are set for."""
        plain = self.term == "plain" and self.threads == 2 and self.heads == self.kv_heads
        return plain and self.kind != "decode" and self.length <= 2048 and goal(self) is not None


def goal(cell: Cell) -> float | None:
    """The least ratio to the fastest peer that issue and design ask for; None where they ask for none."""
    if cell.kind == "decode":
        return None
    wide, plain = cell.width == 128, cell.term == "plain"
    if cell.kind == "backward":
        return (1.2 if wide else 1.5) if cell.length == 2048 and plain else 1.05
    if not plain or cell.threads != 2 or cell.heads != cell.kv_heads:
        return 1.05
    narrow_goal, wide_goal = {
        (2048, True): (1.7, 1.4),
        (512, True): (2.3, 1.9),
        (128, True): (1.6, 1.6),
        (2048, False): (1.35, 1.15),
    }.get((cell.length, cell.causal), (1.05, 1.05))
    return wide_goal if wide else narrow_goal


def quick() -> list[Cell]:
    """The fixed subset of `make bench`: one of each kind of the grid, and the cells with a goal of their own."""
    causal = [
        Cell(heads=16, kv_heads=16, length=n, width=d, causal=True) for n, d in ((128, 64), (512, 64), (512, 128))
    ]
    long = [Cell(width=d, causal=c) for c, d in product((True, False), (64, 128))]
    others = [
        Cell(heads=16, kv_heads=16, length=128),
        Cell(heads=4, kv_heads=4, length=8192, causal=True),
        Cell(heads=32, kv_heads=8, length=512, causal=True),
        *(Cell(causal=True, term=term) for term in TERMS[1:]),
        *(Cell(causal=True, dtype=dtype) for dtype in ("bf16", "f16")),
        *(Cell(kind="backward", width=d, causal=True) for d in (64, 128)),
        *(decode(32768, kv, 128, dtype) for kv, dtype in ((8, "f32"), (32, "f32"), (8, "bf16"), (8, "int8"))),
        replace(decode(32768, 8, 128, "f32"), paged=True),
        Cell(causal=True, threads=1),
        Cell(width=128, threads=1),
    ]
    return [*causal, *long, *others]


def grid() -> list[Cell]:
    """Every cell of `make bench-full`, two threads first."""
    return list(dict.fromkeys(cell for threads in (2, 1) for cell in _grid(threads)))


def _grid(threads: int) -> Iterator[Cell]:
    square = [(16, 16, 128), (16, 16, 512), (8, 8, 2048), (4, 4, 8192), (1, 1, 32768)]
    grouped = [(32, 8, 512), (32, 8, 2048)]
    both = (False, True)
    for term, (h, g, n), d, causal in product(TERMS, square + grouped, (64, 128), both):
        yield Cell("forward", h, g, n, d, causal, term, "f32", threads)
    for dtype, (h, g, n), d, causal in product(("bf16", "f16"), square[:3], (64, 128), both):
        yield Cell("forward", h, g, n, d, causal, "plain", dtype, threads)
    for (h, g, n), d, causal in product(square[:3] + grouped, (64, 128), both):
        yield Cell("backward", h, g, n, d, causal, "plain", "f32", threads)
    for n, heads, d, dtype in product((4096, 32768, 131072), (8, 32), (64, 128), DTYPES):
        yield decode(n, heads, d, dtype, threads)
    for n, heads, dtype in product((4096, 32768, 131072), (8, 32), ("f32", "int8")):
        yield replace(decode(n, heads, 128, dtype, threads), paged=True)
    for n, term in product((8192, 32768), ("plain", "alibi")):  # what skipping is measured on
        yield Cell("forward", 8, 8, n, 64, True, term, "f32", threads)


def decode(length: int, heads: int, width: int, dtype: str, threads: int = 2) -> Cell:
    """One query of each head against a cache of 8 key heads."""
    return Cell("decode", heads, 8, length, width, False, "plain", dtype, threads)


def arrays(cell: Cell) -> dict[str, NDArray[Any]]:
    """q, k, v (1,H,L,D), for backward dout, for t5 the table (buckets, H): the same numbers in every process.

    For int8 k and v with k_scale and v_scale (1,H,L), and q in float32.
    """
    shape = (cell.kind, cell.heads, cell.kv_heads, cell.length, cell.width)
    generator = np.random.default_rng(zlib.crc32(repr(shape).encode()))
    q, k, v = (cell.heads, cell.queries), (cell.kv_heads, cell.length), (cell.kv_heads, cell.length)
    sizes = {"q": q, "k": k, "v": v} | ({"dout": q} if cell.kind == "backward" else {})
    normal = {n: generator.standard_normal((1, *s, cell.width), dtype=np.float32) for n, s in sizes.items()}
    if cell.dtype == "int8":
        return {"q": normal["q"], **_quantised("k", normal["k"]), **_quantised("v", normal["v"])}
    found: dict[str, NDArray[Any]] = {n: a.astype(DTYPES[cell.dtype], copy=False) for n, a in normal.items()}
    if cell.term == "t5":
        found["t5_table"] = generator.standard_normal((BUCKETS, cell.heads), dtype=np.float32)
    return found


def _quantised(name: str, a: NDArray[np.float32]) -> dict[str, NDArray[Any]]:
    scale = np.abs(a).max(-1) / np.float32(127)
    return {name: np.rint(a / scale[..., None]).astype(np.int8), f"{name}_scale": scale}


def visible(cell: Cell) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """First key and end of the keys that each query sees: every mask of the grid is one stretch of keys a row."""
    i = np.arange(cell.queries)
    first, end = np.zeros_like(i), np.full_like(i, cell.length)
    if cell.term == "window":
        left, right = window(cell)
        first, end = np.maximum(i - left, 0), np.minimum(i + right + 1, cell.length)
    if cell.term == "document":
        edges = np.array([0, *documents(cell), cell.length])
        own = np.searchsorted(edges, i, "right")
        first, end = edges[own - 1], edges[own]
    return first, np.minimum(end, i + 1) if cell.causal else end


def window(cell: Cell) -> tuple[int, int]:
    """Keys to either side: 256 in all with the query's own where causal, 128 to each side where not."""
    return (WINDOW - 1, 0) if cell.causal else (WINDOW // 2, WINDOW // 2)


def documents(cell: Cell) -> list[int]:
    """Where the second and every later document begins."""
    return [int(share * cell.length) for share in _DOCUMENTS]


def segments(cell: Cell) -> NDArray[np.int64]:
    """Number of the document of each position, (1, L)."""
    return np.searchsorted(documents(cell), np.arange(cell.length), "right")[None].astype(np.int64)


def by_difference(cell: Cell, table: NDArray[Any] | None = None) -> NDArray[np.float32] | None:
    """The bias as (H, 2L − 1) by key − query, from −(L − 1) on; None for a term that adds none."""
    r = np.arange(1 - cell.length, cell.length)
    if cell.term == "alibi":
        return (-slopes(cell)[:, None] * np.abs(r)).astype(np.float32)
    if cell.term == "t5":
        assert table is not None
        return np.asarray(table.T[:, buckets(r, not cell.causal)], np.float32)
    return None


def slopes(cell: Cell) -> Floats:
    """ALiBi's slopes for a power of two of heads."""
    return np.exp2(-8.0 * np.arange(1, cell.heads + 1) / cell.heads)


def buckets(r: NDArray[np.int64], bidirectional: bool) -> NDArray[np.int64]:
    """T5's bucket of each key − query. log2 is exact where a step falls on an integer."""
    count = BUCKETS // 2 if bidirectional else BUCKETS
    distance = np.abs(r) if bidirectional else np.maximum(-r, 0)
    exact = count // 2
    far = np.log2(np.maximum(distance, exact) / exact) / math.log2(FARTHEST / exact) * (count - exact)
    found = np.where(distance < exact, distance, np.minimum(exact + far.astype(np.int64), count - 1))
    return found + np.where(bidirectional & (r > 0), count, 0)


def dense_bias(cell: Cell, table: NDArray[Any] | None = None) -> NDArray[np.float32] | None:
    """The bias (H, Lq, Lk); None for a term that adds none."""
    flat = by_difference(cell, table)
    if flat is None:
        return None
    rows = np.lib.stride_tricks.sliding_window_view(flat, cell.length, axis=1)
    return np.ascontiguousarray(rows[:, ::-1])


def dense_mask(cell: Cell) -> NDArray[np.bool_] | None:
    """What each query sees, (Lq, Lk); None where the mask is none but causal's."""
    if cell.term not in ("window", "document"):
        return None
    first, end = visible(cell)
    j = np.arange(cell.length)
    return (j >= first[:, None]) & (j < end[:, None])


def flops(cell: Cell) -> float:
    """Useful operations: 4 D for each visible pair, 10 D in the backward pass; a masked pair counts for nothing."""
    first, end = visible(cell)
    return float((end - first).sum()) * cell.heads * cell.width * (10 if cell.kind == "backward" else 4)


def cache_bytes(cell: Cell) -> int:
    """Bytes of k and v, which decode has to read once, and of their scales."""
    scale = 4 if cell.dtype == "int8" else 0
    return 2 * cell.kv_heads * cell.length * (cell.width * int(np.dtype(DTYPES[cell.dtype]).itemsize) + scale)
