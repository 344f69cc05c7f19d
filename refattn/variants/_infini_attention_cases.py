"""Golden cases of Infini-attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe
from refattn.variants._case_parts import edited, flagged, numbers
from refattn.variants.infini_attention import InfiniAttention
from refattn.variants.rope import RoPE

FLAGS: Mapping[str, Flag] = {
    "infini": Flag("A compressive memory beside attention inside a segment, with the gradients through the memory."),
    "infini_delta": Flag("The delta rule writes what the memory does not give yet.", ("huggingface/blog#2270",)),
    "infini_options": Flag("Another convention for the first segment, the divisor, the gate or z than the paper's."),
    "infini_rotary": Flag("Rotation by positions inside the segment, of which the memory sees nothing."),
    "history": Flag("Tokens have gone before: the state's arrays are inputs, with their gradients."),
    "state": Flag("The arrays carried on are published."),
}
PUBLISHED = ("out", "state", "vjp")
# A memory that keys of features 1 and values of about 1 would leave.
HISTORY = {
    "state_memory": Recipe(exp2=-7),
    "state_weight": Recipe(kind="constant", value=8.0),
    "gate": numbers(0.5, -1.0),
}


def cases() -> Iterator[Case]:
    """Both rules and every convention; segments that end, that do not, and that began before."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    usual = InfiniAttention(segment=spec.segment, update=spec.update, scale=spec.scale, rotary=spec.rotary)
    present = {
        "infini": True,
        "infini_delta": spec.update == "delta",
        "infini_options": spec != usual,
        "infini_rotary": spec.rotary is not None,
        "history": case.history > 0,
        "state": "state" in case.want,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def tokens(count: int, heads: tuple[int, int] = (2, 2), widths: tuple[int, int] = (4, 4), batch: int = 1) -> Any:
    """Sizes with so many tokens."""
    return {"B": batch, "Hq": heads[0], "Hkv": heads[1], "L": count, "D": widths[0], "Dv": widths[1]}


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="infini_attention/linear",
        spec=InfiniAttention(segment=4),
        sizes=tokens(13, (4, 2), (5, 3)),
        inputs={"gate": numbers(0.25, -2.0, 1.5, 0.0)},
        want=PUBLISHED,
        cotangents={"dstate_memory": NORMAL, "dstate_weight": NORMAL},
        catches="a memory read after the segment is written, or keys of the open segment in it already",
    )
    yield Case(
        name="infini_attention/delta",
        spec=InfiniAttention(segment=3, update="delta", scale=0.75),
        sizes=tokens(11, (2, 1), (3, 5)),
        dtype="bfloat16",
        inputs={"gate": numbers(1.0, -0.5)},
        want=PUBLISHED,
        catches="errors measured token by token, against a memory that holds the segment's earlier tokens",
    )
    yield Case(
        name="infini_attention/history",
        spec=InfiniAttention(segment=5),
        sizes=tokens(9, batch=2),
        history=13,
        inputs=HISTORY,
        want=PUBLISHED,
        cotangents={"dstate_memory": NORMAL, "dstate_k": NORMAL},
        catches="a new segment begun by every call: 3 tokens of the open one are there already",
    )
    yield Case(
        name="infini_attention/delta_history",
        spec=InfiniAttention(segment=4, update="delta", z_update="linear_only"),
        sizes=tokens(7, (2, 1), (4, 6)),
        dtype="float16",
        history=6,
        inputs=HISTORY,
        want=PUBLISHED,
        catches="z written at every segment where the delta rule is asked to leave it",
    )
    yield Case(
        name="infini_attention/skip_local",
        spec=InfiniAttention(segment=4, first="skip", weighs="local"),
        sizes=tokens(10, (2, 2), (6, 4)),
        inputs={"gate": numbers(2.0, -1.5)},
        want=("out", "vjp"),
        catches="the gate's two sides exchanged; the local part weighed while there is no memory",
    )
    yield Case(
        name="infini_attention/added_divisor",
        spec=InfiniAttention(segment=6, divisor="add", epsilon=0.5),
        sizes=tokens(14, (2, 1)),
        dtype="float16",
        inputs={"gate": numbers(0.5, 3.0), "k": Recipe(exp2=-7)},
        want=("out", "vjp"),
        catches="an epsilon that is clamped to, not added; one inside the features' sum, counted D times",
    )
    yield Case(
        name="infini_attention/repeated_keys",
        spec=InfiniAttention(segment=4, update="delta"),
        sizes=tokens(16, (1, 1), (4, 4)),
        inputs={
            "q": Recipe(period=4),
            "k": Recipe(period=4),
            "v": Recipe(period=4),
            "gate": numbers(6.0),
        },
        want=PUBLISHED,
        catches="z left as it is where a binding is written again, which the published equations do not do",
    )
    yield Case(
        name="infini_attention/faint_features",
        spec=InfiniAttention(segment=4, divisor="clamp", epsilon=2.0**-20),
        sizes=tokens(9, (1, 1)),
        # elu + 1 of keys near −12 is some 6e-6: their sum times that of a query lies below epsilon.
        inputs={
            "q": edited(Recipe(exp2=-10), Edit(at=(None,) * 4, op="add", value=-12.0)),
            "k": edited(Recipe(exp2=-10), Edit(at=(None,) * 4, op="add", value=-12.0)),
            "gate": numbers(1.0),
        },
        want=("out", "vjp"),
        catches="a clamp that is left out where the divisor has faded, and features that underflow as exp(x) − 1 + 1",
    )
    yield Case(
        name="infini_attention/tokens_257",
        spec=InfiniAttention(segment=64),
        sizes=tokens(257, (1, 1), (2, 2)),
        dtype="bfloat16",
        inputs={"gate": numbers(1.5)},
        want=("out", "vjp"),
        catches="a last segment of one token that is written early, or reads a memory one segment old",
    )
    yield Case(
        name="infini_attention/delta_300",
        spec=InfiniAttention(segment=100, update="delta"),
        sizes=tokens(300, (1, 1), (2, 2)),
        dtype="float16",
        history=250,
        inputs={**HISTORY, "gate": numbers(1.0), "v": Recipe(exp2=-9)},
        want=PUBLISHED,
        catches="a memory written where calls end instead of segments of 100, whose ends are tokens 50, 150 and 250",
    )
    yield Case(
        name="infini_attention/rotary",
        seed=2,
        spec=InfiniAttention(segment=100, rotary=RoPE(pairing="half", base=16.0)),
        sizes=tokens(260, (1, 1), (4, 2)),
        dtype="float16",
        history=130,
        inputs={**HISTORY, "gate": numbers(1.0)},
        want=PUBLISHED,
        catches="rotated keys written into the memory or read from the open segment; positions that pass its end",
    )
    yield Case(
        name="infini_attention/float64",
        spec=InfiniAttention(segment=3),
        sizes=tokens(8, (2, 2), (3, 3)),
        dtype="float64",
        inputs={"gate": numbers(-0.5, 0.5)},
        want=PUBLISHED,
        catches="a memory in float32 beside double-precision scores",
    )
