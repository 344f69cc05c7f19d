"""Golden cases of NoPE."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from refattn.case import NORMAL, Case, Flag, Recipe, Rows
from refattn.variants._case_parts import edited, flagged, numbers, scaled, sizes
from refattn.variants._sdpa_cases import option_flags
from refattn.variants.nope import NoPE
from refattn.variants.sdpa import SDPA

FLAGS: Mapping[str, Flag] = {
    "nope": Flag("Causal attention without positions, in which a position would show."),
}


def cases() -> Iterator[Case]:
    """Alone: repeated tokens, nearly equal weights, far and heavy values."""
    for case in flagged(_cases()):
        yield replace(case, flags=(*case.flags, *option_flags(SDPA(causal=True), case.sizes), "nope"))


def _cases() -> Iterator[Case]:
    yield Case(
        name="nope/causal",
        spec=NoPE(),
        sizes=sizes((17, 17), (4, 2), (8, 4)),
        cotangents={"dlse": Recipe()},
        catches="a default bias or rotation that was not switched off",
    )
    yield Case(
        name="nope/repeated_tokens",
        spec=NoPE(),
        sizes=sizes((24, 24), (2, 2), (8, 4)),
        dtype="float16",
        inputs={"k": Recipe(period=6), "v": Recipe(period=6)},
        catches="positions that tell equal tokens apart: keys and values repeat every six tokens",
    )
    yield Case(
        name="nope/means_of_values",
        spec=NoPE(),
        sizes=sizes((65, 65), (2, 1), (4, 4)),
        dtype="bfloat16",
        inputs={"q": Recipe(exp2=-15), "sink": numbers(-2.0, 1.0)},
        rows=Rows(q=(0, 1, 2, 31, 63, 64), k=(0, 1, 31, 63, 64)),
        catches="anything but nearly the mean of the values before the query, of which the sink takes its share",
    )
    yield Case(
        name="nope/far_777",
        spec=NoPE(),
        sizes=sizes((777, 777), (2, 2), (8, 4)),
        dtype="bfloat16",
        inputs={"v": edited(NORMAL, scaled((None, None, (0, 1, 2), None), 256.0))},
        rows=Rows(q=(0, 1, 2, 388, 776), k=(0, 1, 2, 388, 776)),
        catches="the first tokens, whose values are large, forgotten by a window or a decay",
    )
    yield Case(
        name="nope/causal_300",
        spec=NoPE(),
        sizes=sizes((300, 300), (2, 1), (4, 4)),
        dtype="bfloat16",
        rows=Rows(q=(0, 128, 299), k=(0, 127, 299)),
        catches="a position that a tile's mask gives away: keys after the query within its own tile",
    )
    yield Case(
        name="nope/decode_1025",
        spec=SDPA(causal="bottom_right", bias=(NoPE(),)),
        sizes=sizes((1, 1025), (4, 1), (8, 4)),
        dtype="float16",
        rows=Rows(q=(0,), k=(0, 511, 512, 1023, 1024)),
        catches="a decode step that sees its own first tile of keys alone",
    )
