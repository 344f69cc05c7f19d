"""Golden cases of Expire-Span."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe
from refattn.variants._case_parts import edited, flagged, numbers, rows_of, set_
from refattn.variants.expire_span import ExpireSpan

FLAGS: Mapping[str, Flag] = {
    "expire_span": Flag("Tokens that expire by a learned span, with the gradients of what the spans are made of."),
    "expire_span_own": Flag("A token sees itself, which in the paper it does not."),
    "expire_span_epsilon": Flag("A number is added to the sum of the masked weights before they are divided by it."),
    "expire_span_lags": Flag("Learned vectors on the keys nearest to each query."),
    "expired_rows": Flag("Rows whose every key has expired."),
}
EVERYTHING = ("out", "lse", "spans", "loss", "state", "vjp")
NO_STATE = ("out", "lse", "spans", "loss", "vjp")
LOSS = {"dlse": NORMAL, "dloss": NORMAL}


def cases() -> Iterator[Case]:
    """Either own, epsilon and learned vectors; spans that end inside and outside, and rows with nothing left."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "expire_span": True,
        "expire_span_own": spec.own == "included",
        "expire_span_epsilon": spec.epsilon > 0,
        "expire_span_lags": spec.lags > 0,
        "history": case.history > 0,
        "state": "state" in case.want,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def tokens(
    count: int, heads: tuple[int, int] = (2, 2), widths: tuple[int, int] = (4, 4), hidden: int = 3, batch: int = 1
) -> dict[str, int]:
    """Sizes with so many tokens and hidden states of that width."""
    return {"B": batch, "Hq": heads[0], "Hkv": heads[1], "L": count, "D": widths[0], "Dv": widths[1], "E": hidden}


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="expire_span/ramp",
        spec=ExpireSpan(max_span=6, ramp=3),
        sizes=tokens(13, (4, 2), (5, 3)),
        inputs={"span_bias": numbers(0.5)},
        cotangents=LOSS,
        want=EVERYTHING,
        catches="weights cut off at the end of the span instead of over the ramp; m applied without dividing again",
    )
    yield Case(
        name="expire_span/history",
        spec=ExpireSpan(max_span=5, ramp=4),
        sizes=tokens(7, batch=2),
        history=11,
        inputs={"state_spans": edited(Recipe(exp2=-9), Edit(at=(None, None), op="add", value=2.5))},
        cotangents={"dstate_spans": NORMAL, "dstate_v": NORMAL, **LOSS},
        want=EVERYTHING,
        catches="ages counted from the call's first token; a memory of max_span tokens, without those on the ramp",
    )
    yield Case(
        name="expire_span/own_lags",
        spec=ExpireSpan(max_span=4, ramp=4, own="included", lags=3, divisor=2.0),
        sizes=tokens(10, (2, 1), (4, 5)),
        dtype="float16",
        inputs={"span_bias": numbers(-0.5)},
        want=EVERYTHING,
        catches="the learned vector of the farthest key first, one lag off, or added without the scale",
    )
    yield Case(
        name="expire_span/epsilon",
        spec=ExpireSpan(max_span=5, ramp=3, epsilon=0.125, lags=9, scale=0.75),
        sizes=tokens(9, (2, 2), (3, 4), batch=2),
        inputs={"span_bias": numbers(-1.0)},
        cotangents=LOSS,
        want=NO_STATE,
        catches="epsilon added to a sum of exponentials that is not divided yet, or weighed by what has expired",
    )
    yield Case(
        name="expire_span/loud_and_expired",
        spec=ExpireSpan(max_span=8, ramp=2, coefficient=0.25),
        sizes=tokens(12, (2, 1)),
        # Tokens 2 and 5 answer every query with some 500 and are gone two or three tokens later.
        inputs={
            "q": edited(NORMAL, Edit(at=(None, None, None, 0), op="set", value=16.0)),
            "k": edited(NORMAL, Edit(at=(None, None, (2, 5), 0), op="set", value=64.0)),
            "hidden": edited(Recipe(exp2=-9), set_((None, (2, 5), None), -2.0)),
            "span_weight": numbers(1.0, 0.5, 0.75),
            "span_bias": numbers(1.0),
        },
        cotangents={"dloss": NORMAL},
        want=NO_STATE,
        flags=("large_scores",),
        catches="a row's maximum that is taken over what has expired, so that all that is left underflows",
    )
    yield Case(
        name="expire_span/nothing_left",
        spec=ExpireSpan(max_span=16, ramp=1),
        sizes=tokens(9, (2, 2), (4, 3), batch=2),
        dtype="float16",
        # Spans near 0.3, of every third token near 3.7.
        inputs={
            "hidden": edited(Recipe(exp2=-12), set_((None, (0, 3, 6), None), 1.0)),
            "span_weight": numbers(1.0, 1.0, 0.75),
            "span_bias": numbers(-4.0),
            "v": rows_of(NORMAL, 8, 1.0),
        },
        want=NO_STATE,
        cotangents=LOSS,
        seed=2,
        flags=("expired_rows",),
        catches="0/0 in the first row, which sees nothing, and wherever the last token has expired",
    )
    yield Case(
        name="expire_span/tokens_257",
        spec=ExpireSpan(max_span=40, ramp=16),
        sizes=tokens(257, (1, 1), (3, 2), 2),
        dtype="bfloat16",
        want=("out", "loss", "vjp"),
        cotangents={"dloss": NORMAL},
        catches="a memory dropped in blocks, with tokens in it that are still on the ramp",
    )
    yield Case(
        name="expire_span/tokens_300",
        spec=ExpireSpan(max_span=24, own="included", divisor=4.0, coefficient=2.0),
        sizes=tokens(300, (1, 1), (2, 2), 2),
        dtype="float16",
        inputs={"span_bias": numbers(2.0)},
        want=("out", "loss", "vjp"),
        cotangents={"dloss": NORMAL},
        catches="a ramp cut short where the longest span ends: tokens fade for 32 more",
    )
    yield Case(
        name="expire_span/tokens_264",
        spec=ExpireSpan(max_span=64, ramp=8, epsilon=0.5),
        sizes=tokens(264, (1, 1), (2, 3), 1),
        dtype="bfloat16",
        history=100,
        inputs={
            "state_spans": edited(
                Recipe(kind="integers", limit=31, exp2=-1), Edit(at=(None, None), op="add", value=32.25)
            ),
            "span_weight": numbers(1.5),
            "span_bias": numbers(-1.0),
        },
        want=("out", "loss", "state", "vjp"),
        cotangents={"dloss": NORMAL},
        catches="spans of earlier tokens found again from hidden states that this call does not have",
    )
    yield Case(
        name="expire_span/float64",
        spec=ExpireSpan(max_span=4, ramp=2),
        sizes=tokens(8, (3, 3), (3, 4)),
        dtype="float64",
        cotangents=LOSS,
        want=EVERYTHING,
        catches="spans in float32 beside double-precision scores",
    )
