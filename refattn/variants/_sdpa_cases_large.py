"""Golden cases of the large suite: lengths and widths that are used, stored as recipes and hashes alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from refattn.case import NORMAL, Case, Rows
from refattn.variants._case_parts import edited, scaled, sizes
from refattn.variants.alibi import ALiBi
from refattn.variants.sdpa import SDPA

# The ends, both sides of tiles of powers of two, and a place that is nobody's edge.
Q_8192 = (0, 1, 127, 128, 1000, 4095, 4096, 8190, 8191)
K_8192 = (0, 1, 127, 128, 1000, 4095, 4096, 8190, 8191)
Q_32768 = (0, 8191, 16384, 32767)
K_32768 = (0, 1, 8191, 16383, 16384, 32766, 32767)


def cases() -> Iterator[Case]:
    """Whole problems up to 4096 queries, chosen rows of longer ones."""
    for case in (*_whole(), *_rows()):
        yield replace(case, suite="large")


def _whole() -> Iterator[Case]:
    alibi = SDPA(causal=True, bias=(ALiBi(),))
    yield Case(
        name="whole/alibi_1024",
        spec=alibi,
        sizes=sizes((1024, 1024), (2, 1), (64, 64)),
        catches="any row of a whole problem of eight tiles and more",
    )
    yield Case(
        name="whole/alibi_4096",
        spec=alibi,
        sizes=sizes((4096, 4096), (1, 1), (128, 128)),
        catches="any row of a whole problem of the size that kernels are tuned at",
    )
    yield Case(
        name="whole/causal_2048_bfloat16",
        spec=SDPA(causal=True),
        sizes=sizes((2048, 2048), (1, 1), (128, 128)),
        dtype="bfloat16",
        catches="any row of a whole problem in 16 bits",
    )


def _rows() -> Iterator[Case]:
    yield Case(
        name="rows/causal_8192",
        spec=SDPA(causal=True),
        sizes=sizes((8192, 8192), (4, 2), (64, 64)),
        rows=Rows(q=Q_8192, k=K_8192),
        catches="offsets beyond 2^31 bytes of a score matrix, and rows at the edges of tiles",
    )
    yield Case(
        name="rows/window_8192_float16",
        spec=SDPA(causal=True, window=(1023, 0)),
        sizes=sizes((8192, 8192), (2, 1), (128, 128)),
        dtype="float16",
        rows=Rows(q=Q_8192, k=K_8192),
        catches="a window of 1024 keys far from the first tile",
    )
    yield Case(
        name="rows/causal_32768_bfloat16",
        spec=SDPA(causal=True),
        sizes=sizes((32768, 32768), (2, 1), (128, 128)),
        dtype="bfloat16",
        inputs={"v": edited(NORMAL, scaled((None, None, (16384, 32767), None), 64.0))},
        rows=Rows(q=Q_32768, k=K_32768),
        catches="sums over 32768 keys; a pair of indices multiplied in 32 bits",
    )
    yield Case(
        name="rows/alibi_32768",
        spec=SDPA(causal=True, bias=(ALiBi(),)),
        sizes=sizes((32768, 32768), (8, 8), (64, 64)),
        rows=Rows(q=(16384, 32767), k=K_32768),
        catches="distances in 16 bits; tiles left out that still weigh",
    )
    yield Case(
        name="rows/decode_32768",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((1, 32768), (8, 2), (128, 128)),
        inputs={"v": edited(NORMAL, scaled((None, None, 32767, None), 256.0))},
        rows=Rows(q=(0,), k=K_32768),
        catches="the parts of a cache that is split between workers joined with the wrong maximum",
    )
