"""Golden cases of memorizing attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe
from refattn.variants._case_parts import edited, flagged, numbers, rows_of
from refattn.variants._infini_attention_cases import tokens
from refattn.variants.memorizing import Memorizing
from refattn.variants.t5 import T5

FLAGS: Mapping[str, Flag] = {
    "memorizing": Flag(
        "The nearest keys of a memory beside attention inside a segment; which were found is published."
    ),
    "memorizing_joint": Flag("One softmax over what was found and the segment, in place of a gate."),
    "memorizing_bucketed": Flag("The nearest key of each bucket of tokens, in place of the nearest of all."),
    "memorizing_normalised": Flag("Normalised keys and queries, and a learned temperature of each head."),
    "memorizing_bias": Flag("A bias by position inside the segment, which retrieved keys do not have."),
}
PUBLISHED = ("out", "indices", "margin", "state", "vjp")
JOINT = ("out", "lse", "indices", "margin", "vjp")


def cases() -> Iterator[Case]:
    """Both ways to combine, both selections, temperatures and biases; memories that fill, and that began before."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "memorizing": True,
        "memorizing_joint": spec.combine == "joint",
        "memorizing_bucketed": spec.selection == "bucketed",
        "memorizing_normalised": spec.normalise,
        "memorizing_bias": bool(spec.bias),
        "history": case.history > 0,
        "state": "state" in case.want,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="memorizing/gated",
        spec=Memorizing(segment=4, memory=8, top=3),
        sizes=tokens(18, (4, 2), (5, 3)),
        inputs={"gate": numbers(0.25, -2.0, 1.5, 0.0)},
        want=PUBLISHED,
        catches="a segment that finds its own keys, or keys that have left; a gradient into the token that wrote a key",
    )
    yield Case(
        name="memorizing/history",
        spec=Memorizing(segment=5, memory=12, top=2, scale=0.75),
        sizes=tokens(9, (2, 1), (4, 3), batch=2),
        dtype="bfloat16",
        history=13,
        inputs={"gate": numbers(0.5, 1.0)},
        want=PUBLISHED,
        cotangents={"dstate_memory_v": NORMAL, "dstate_k": NORMAL},
        catches="found keys counted from the memory's beginning, which is token 3 of the stream in the last segment",
    )
    yield Case(
        name="memorizing/joint",
        spec=Memorizing(segment=50, memory=120, top=3, combine="joint"),
        sizes=tokens(258, (1, 1), (3, 2)),
        dtype="float16",
        want=JOINT,
        cotangents={"dlse": Recipe()},
        catches="two softmaxes added up instead of one over both; a first segment that lacks what a memory would weigh",
    )
    yield Case(
        name="memorizing/joint_bias",
        spec=Memorizing(segment=6, memory=12, top=4, combine="joint", bias=(T5(buckets=4, max_distance=6),)),
        sizes=tokens(11, (4, 2), (4, 3)),
        history=8,
        want=(*JOINT, "state"),
        catches="a bias for retrieved keys too, by their distance or by their rank, or one by places in the memory",
    )
    yield Case(
        name="memorizing/normalised",
        spec=Memorizing(segment=4, memory=8, top=2, normalise=True, bias=(T5(buckets=4, max_distance=6),)),
        sizes=tokens(14, (2, 1), (5, 4)),
        inputs={"gate": numbers(0.5, -0.5), "sharpness": numbers(3.0, -2.0)},
        want=PUBLISHED,
        catches="a negative temperature, whose absolute value counts; keys kept with their length, or ranked by it",
    )
    yield Case(
        name="memorizing/joint_exponential",
        spec=Memorizing(
            segment=5, memory=15, top=3, combine="joint", normalise=True, temperature="exponential", epsilon=0.0625
        ),
        sizes=tokens(13, (4, 1), (4, 4)),
        dtype="float64",
        inputs={"sharpness": numbers(0.5, 3.0, -1.0, 2.0)},
        want=JOINT,
        cotangents={"dlse": Recipe()},
        catches="a temperature used as it stands instead of its exponential; a key's length without the epsilon",
    )
    yield Case(
        name="memorizing/bucketed",
        spec=Memorizing(segment=4, memory=10, top=4, selection="bucketed"),
        sizes=tokens(9, (2, 2), (4, 3)),
        history=14,
        inputs={"gate": numbers(1.0, 0.0)},
        want=PUBLISHED,
        catches="buckets that are stretches of neighbours, or that begin anew with the memory's oldest token",
    )
    yield Case(
        name="memorizing/faint_differences",
        spec=Memorizing(segment=8, memory=8, top=3, combine="joint"),
        sizes=tokens(16, (1, 1), (4, 4)),
        dtype="float16",
        seed=6,
        # Keys of ones, but for some 2⁻¹⁰: products that 16 bits hold alike, and values that differ.
        inputs={
            "k": edited(Recipe(kind="integers", limit=3, exp2=-10), Edit(at=(None,) * 4, op="add", value=1.0)),
        },
        want=JOINT,
        catches="products ranked after they were rounded to 16 bits, where they tie",
    )
    yield Case(
        name="memorizing/longest_key_has_left",
        spec=Memorizing(segment=64, memory=100, top=1, combine="joint"),
        sizes=tokens(260, (1, 1), (3, 2)),
        inputs={
            "q": edited(Recipe(exp2=-10), Edit(at=(None,) * 4, op="add", value=1.0)),
            "k": rows_of(NORMAL, 1, 4.0),
            "v": rows_of(NORMAL, 1, 64.0),
        },
        want=JOINT,
        catches="a memory one segment too long, whose key of token 1 every query would find",
    )
    yield Case(
        name="memorizing/everything_found",
        spec=Memorizing(segment=3, memory=16, top=16, combine="joint"),
        sizes=tokens(10, (2, 1), (4, 3)),
        want=("out", "lse", "vjp"),
        catches="anything but causal attention over all tokens, which this is forwards",
    )
    yield Case(
        name="memorizing/tokens_257",
        spec=Memorizing(segment=64, memory=128, top=2),
        sizes=tokens(257, (1, 1), (3, 2)),
        inputs={"gate": numbers(0.5)},
        want=("out", "indices", "vjp"),
        catches="a memory of 192 tokens where 128 are kept; a last segment of one token that finds none",
    )
    yield Case(
        name="memorizing/bucketed_300",
        spec=Memorizing(segment=100, memory=200, top=3, selection="bucketed", normalise=True, combine="joint"),
        sizes=tokens(300, (1, 1), (3, 2)),
        history=170,
        inputs={"sharpness": numbers(4.0)},
        want=("out", "indices", "vjp"),
        catches="a memory written where calls end instead of segments of 100; ends are tokens 30, 130, 230",
    )
    yield Case(
        name="memorizing/float64",
        spec=Memorizing(segment=3, memory=6, top=2),
        sizes=tokens(10, (2, 2), (3, 3)),
        dtype="float64",
        inputs={"gate": numbers(-0.5, 0.5)},
        want=PUBLISHED,
        catches="a memory in float32 beside double-precision scores",
    )
