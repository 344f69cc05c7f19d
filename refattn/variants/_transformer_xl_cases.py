"""Golden cases of Transformer-XL. Projections are small: a sum over E of hidden states near 1 stays near 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe
from refattn.variants._case_parts import edited, flagged, scaled
from refattn.variants.transformer_xl import TransformerXL

FLAGS: Mapping[str, Flag] = {
    "transformer_xl": Flag(
        "A memory of hidden states and projected sinusoids of the distance.",
        ("espnet/espnet#2684", "huggingface/transformers#14832"),
    ),
    "transformer_xl_clamp": Flag("Distances beyond a largest one are alike."),
    "transformer_xl_same_length": Flag("Every query sees as many tokens before it."),
    "transformer_xl_no_memory": Flag("Segments that see nothing but themselves."),
    "transformer_xl_attached": Flag("Gradients through the memory."),
}
PUBLISHED = ("out", "lse", "state", "vjp")
# A cotangent for one number in 32: the bounds of gradients of many terms grow faster than the gradients do.
FEW = Recipe(kind="bernoulli", true=248, otherwise=1.0)


def cases() -> Iterator[Case]:
    """Every option; segments that end, that do not, and that began before."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "transformer_xl": True,
        "transformer_xl_clamp": spec.clamp is not None,
        "transformer_xl_same_length": spec.same_length,
        "transformer_xl_no_memory": spec.memory == 0,
        "transformer_xl_attached": not spec.detach,
        "history": case.history > 0,
        "state": "state" in case.want,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def tokens(
    count: int,
    hidden: tuple[int, int] = (4, 4),
    heads: tuple[int, int] = (2, 2),
    widths: tuple[int, int] = (4, 4),
    batch: int = 1,
) -> dict[str, int]:
    """Sizes by name from L, (E, R), (Hq, Hkv), (D, Dv) and B."""
    (e, r), (hq, hkv), (d, dv) = hidden, heads, widths
    return {"B": batch, "L": count, "E": e, "R": r, "Hq": hq, "Hkv": hkv, "D": d, "Dv": dv}


def weights(exp2: int = -9) -> dict[str, Recipe]:
    """Projections of that size, the standard deviation being 256 · 2^exp2."""
    return {name: Recipe(exp2=exp2) for name in ("wq", "wk", "wv", "wr")}


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="transformer_xl/segments",
        spec=TransformerXL(segment=4, memory=5),
        sizes=tokens(11, (5, 6), (4, 2), (5, 3)),
        inputs=weights(),
        want=PUBLISHED,
        cotangents={"dlse": NORMAL, "dstate_hidden": NORMAL},
        catches="u and w exchanged; r of the distance j − i, or of i − j + 1; cosines before sines; gradients of the "
        "memory let through",
    )
    yield Case(
        name="transformer_xl/history",
        spec=TransformerXL(segment=5, memory=4),
        sizes=tokens(8, (3, 4), (2, 1), (3, 4), batch=2),
        inputs=weights(),
        history=13,
        want=PUBLISHED,
        cotangents={"dstate_hidden": NORMAL},
        catches="a segment begun by every call: 3 tokens of the open one are there already, and hand gradients on",
    )
    yield Case(
        name="transformer_xl/clamp",
        spec=TransformerXL(segment=4, memory=6, clamp=3),
        sizes=tokens(13, (4, 8), (2, 2), (6, 3)),
        dtype="float16",
        inputs=weights() | {"wr": Recipe(exp2=-8)},
        cotangents={"dlse": NORMAL},
        catches="distances beyond the clamp without a position, or at the clamp less one",
    )
    yield Case(
        name="transformer_xl/same_length",
        spec=TransformerXL(segment=3, memory=4, same_length=True, scale=1.25),
        sizes=tokens(10, (3, 4), (2, 1), (3, 3)),
        dtype="bfloat16",
        inputs=weights(-10) | {"wv": NORMAL, "u": Recipe(exp2=-9), "w": Recipe(exp2=-9)},
        cotangents={"dout": FEW},
        catches="4 tokens with the query among them, which sees 4 others; the scale on one part of the score alone",
    )
    yield Case(
        name="transformer_xl/attached_history",
        spec=TransformerXL(segment=3, memory=5, detach=False),
        sizes=tokens(7, (4, 5), (2, 2), (3, 2)),
        inputs=weights(),
        history=8,
        want=PUBLISHED,
        catches="a memory that is detached where gradients are to go through it; a cosine beyond an odd R",
    )
    yield Case(
        name="transformer_xl/no_memory",
        spec=TransformerXL(segment=4, memory=0, scale=0.75),
        sizes=tokens(10, (4, 4), (3, 1), (4, 5)),
        dtype="float16",
        inputs=weights(),
        want=PUBLISHED,
        catches="a memory of everything where it is to hold the last 0 tokens",
    )
    yield Case(
        name="transformer_xl/large_scores",
        spec=TransformerXL(segment=4, memory=8),
        sizes=tokens(12, (4, 4), (2, 2), (4, 4)),
        inputs=weights() | {"x": Recipe(exp2=-6), "u": Recipe(exp2=-4), "w": Recipe(exp2=-4)},
        flags=("large_scores",),
        cotangents={"dlse": NORMAL},
        catches="exponentials without their row's maximum; contents and positions as two softmaxes",
    )
    yield Case(
        name="transformer_xl/far_token_257",
        spec=TransformerXL(segment=64, memory=32, clamp=40, scale=1.0),
        sizes=tokens(257, (2, 4), (2, 1), (3, 1)),
        dtype="bfloat16",
        # The last tokens that the first of a segment sees, and those just beyond.
        inputs=weights(-10)
        | {
            "x": edited(NORMAL, scaled((None, (31, 32, 95, 96, 159, 160), None), 2.0)),
            "u": Recipe(exp2=-9),
            "w": Recipe(exp2=-9),
        },
        cotangents={"dout": FEW, "dlse": FEW},
        catches="a memory of 31 or 33 tokens; a last segment of one token that sees itself alone",
    )
    yield Case(
        name="transformer_xl/same_length_300",
        spec=TransformerXL(segment=60, memory=40, same_length=True, clamp=24),
        sizes=tokens(300, (2, 4), (1, 1), (3, 1)),
        dtype="float16",
        inputs=weights(),
        history=130,
        cotangents={"dout": FEW, "dlse": FEW},
        catches="a memory cut where calls end instead of after every 60 tokens",
    )
    yield Case(
        name="transformer_xl/short_segments_321",
        spec=TransformerXL(segment=8, memory=24),
        sizes=tokens(321, (2, 2), (1, 1), (2, 2)),
        dtype="float16",
        inputs=weights(),
        cotangents={"dout": FEW, "dlse": FEW},
        catches="a memory of one segment only, where it holds three",
    )
    yield Case(
        name="transformer_xl/float64",
        spec=TransformerXL(segment=3, memory=3),
        sizes=tokens(8, (3, 3), (2, 2), (3, 3)),
        dtype="float64",
        inputs=weights(),
        want=PUBLISHED,
        catches="sinusoids in float32 beside double-precision scores",
    )
