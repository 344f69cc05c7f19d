"""Golden cases of the Compressive Transformer. Projections are small, as in those of Transformer-XL."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe
from refattn.variants._case_parts import flagged
from refattn.variants._transformer_xl_cases import FEW, tokens, weights
from refattn.variants.compressive import Compressive

FLAGS: Mapping[str, Flag] = {
    "compressive": Flag("Slots of compressed hidden states before a memory, at the distances of their indices."),
    "compressive_conv": Flag("Slots by a convolution, with the gradients of its kernel."),
    "compressive_dilated": Flag("Slots by a dilated convolution, 0 outside what leaves together."),
    "compressive_pooled": Flag("Slots by means or maxima."),
    "compressive_most_used": Flag("Slots that are the tokens most attended to."),
    "compressive_none": Flag("No slots: Transformer-XL."),
    "compressive_attached": Flag("Gradients through memory and slots."),
    "reconstruction": Flag("A loss that the compression has for itself, and its gradient."),
}
PUBLISHED = ("out", "lse", "reconstruction", "state", "vjp")


def cases() -> Iterator[Case]:
    """Every function, with and without gradients through memory and slots; segments that began before."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "compressive": True,
        "compressive_conv": spec.compression == "conv",
        "compressive_dilated": spec.compression == "dilated",
        "compressive_pooled": spec.compression in ("mean", "max"),
        "compressive_most_used": spec.compression == "most_used",
        "compressive_none": spec.compressed == 0,
        "compressive_attached": not spec.detach,
        "reconstruction": "reconstruction" in case.want,
        "history": case.history > 0,
        "state": "state" in case.want,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="compressive/conv",
        spec=Compressive(segment=4, memory=4, compressed=3, rate=2),
        sizes=tokens(17, (3, 4), (4, 2), (3, 2)),
        inputs=weights() | {"kernel": Recipe(exp2=-9), "kernel_bias": Recipe(exp2=-9)},
        want=PUBLISHED,
        cotangents={"dlse": NORMAL, "dreconstruction": NORMAL},
        catches="a memory that is compressed before its tokens leave it, so that they are seen twice; a kernel whose "
        "channels are exchanged; a gradient of out for it, or of the loss for anything else",
    )
    yield Case(
        name="compressive/history",
        spec=Compressive(segment=4, memory=6, compressed=8, rate=2),
        sizes=tokens(11, (3, 4), (2, 1), (3, 4), batch=2),
        inputs=weights() | {"kernel": Recipe(exp2=-9)},
        history=14,
        want=PUBLISHED,
        cotangents={"dreconstruction": NORMAL, "dstate_slots": NORMAL},
        catches="distances of a slot counted in the tokens it stands for; slots appended after the memory",
    )
    yield Case(
        name="compressive/attached",
        spec=Compressive(segment=3, memory=3, compressed=2, rate=3, detach=False, scale=0.75),
        sizes=tokens(13, (3, 5), (2, 2), (3, 2)),
        inputs=weights() | {"kernel": Recipe(exp2=-9), "kernel_bias": Recipe(exp2=-9)},
        want=PUBLISHED,
        cotangents={"dlse": NORMAL},
        catches="slots detached where gradients are to go back through them, to the kernel and to older tokens",
    )
    yield Case(
        name="compressive/dilated",
        spec=Compressive(segment=6, memory=6, compressed=4, rate=3, compression="dilated", dilation=3),
        sizes=tokens(26, (2, 4), (2, 2), (3, 3)),
        dtype="float16",
        inputs=weights(-10) | {"wv": NORMAL, "kernel": Recipe(exp2=-9)},
        want=PUBLISHED,
        cotangents={"dout": FEW, "dreconstruction": NORMAL},
        catches="taps that reach into tokens that left before or stay, where 0 is asked; taps not centred",
    )
    yield Case(
        name="compressive/mean",
        spec=Compressive(segment=4, memory=4, compressed=2, rate=4, compression="mean"),
        sizes=tokens(19, (3, 4), (2, 1), (2, 3)),
        dtype="float16",
        inputs=weights(),
        want=PUBLISHED,
        cotangents={"dout": FEW, "dlse": FEW},
        catches="sums for means; slots forgotten the newest first",
    )
    yield Case(
        name="compressive/max",
        spec=Compressive(segment=4, memory=0, compressed=3, rate=2, compression="max", scale=2.0),
        sizes=tokens(14, (2, 2), (2, 2), (2, 3)),
        dtype="bfloat16",
        inputs=weights(-10) | {"wv": NORMAL, "u": Recipe(exp2=-9), "w": Recipe(exp2=-9)},
        want=("out", "lse", "state", "vjp"),
        cotangents={"dout": Recipe(kind="bernoulli", true=224, otherwise=1.0)},
        catches="the largest magnitude for the largest number; a memory of 0 tokens that keeps them all",
    )
    yield Case(
        name="compressive/most_used",
        spec=Compressive(segment=4, memory=4, compressed=3, rate=2, compression="most_used"),
        sizes=tokens(15, (3, 4), (2, 2), (3, 2)),
        inputs=weights(),
        want=PUBLISHED,
        cotangents={"dlse": NORMAL},
        catches="sums of weights for their means, which favours tokens with more queries; slots in order of usage",
    )
    yield Case(
        name="compressive/no_slots",
        spec=Compressive(segment=4, memory=4, compressed=0, rate=2, compression="mean"),
        sizes=tokens(11, (3, 4), (3, 1), (3, 2)),
        dtype="float16",
        inputs=weights(),
        want=("out", "lse", "state", "vjp"),
        catches="slots kept where none are asked; anything but Transformer-XL",
    )
    yield Case(
        name="compressive/conv_257",
        spec=Compressive(segment=32, memory=32, compressed=16, rate=4, scale=1.0),
        sizes=tokens(257, (2, 4), (2, 1), (3, 1)),
        dtype="bfloat16",
        inputs=weights(-10) | {"u": Recipe(exp2=-9), "w": Recipe(exp2=-9), "kernel": Recipe(exp2=-9)},
        want=("out", "lse", "vjp"),
        cotangents={"dout": FEW, "dlse": FEW, "dreconstruction": NORMAL},
        catches="slots of one compression only, where there are two of 8 each",
    )
    yield Case(
        name="compressive/mean_300",
        spec=Compressive(segment=24, memory=48, compressed=12, rate=8, compression="mean", detach=False),
        sizes=tokens(300, (2, 4), (1, 1), (2, 2)),
        dtype="float16",
        inputs=weights(),
        want=("out", "lse", "vjp"),
        history=130,
        cotangents={"dout": FEW, "dlse": FEW},
        catches="a compression where calls end instead of after every 24 tokens",
    )
    yield Case(
        name="compressive/long_range_321",
        spec=Compressive(segment=8, memory=8, compressed=32, rate=8, compression="max"),
        sizes=tokens(321, (2, 2), (1, 1), (2, 2)),
        inputs=weights(),
        want=("out", "lse", "vjp"),
        cotangents={"dout": FEW, "dlse": FEW},
        catches="a range of memory + compressed tokens, where it is memory + 8 · compressed: 264 before a segment",
    )
    yield Case(
        name="compressive/float64",
        spec=Compressive(segment=2, memory=2, compressed=2, rate=2),
        sizes=tokens(9, (3, 3), (2, 2), (3, 3)),
        dtype="float64",
        inputs=weights() | {"kernel": Recipe(exp2=-9)},
        want=PUBLISHED,
        cotangents={"dreconstruction": NORMAL},
        catches="slots in float32 beside double-precision scores",
    )
