"""Golden cases of attention alignment.

Logits are shifted before they are divided, so rows that see one key, and ties, are exact at any temperature. Where such
a row has a gradient, that of lse over tau, odd factors of tau are large enough to divide no product of inputs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe, Rows
from refattn.variants._case_parts import INF, NAN, edited, flagged, integers, numbers, rows_of, set_, sizes
from refattn.variants.alibi import ALiBi
from refattn.variants.attention_alignment import AttentionAlignment
from refattn.variants.t5 import T5

FLAGS: Mapping[str, Flag] = {
    "attention_alignment": Flag("Logits divided by a temperature for each head, with its gradient."),
    "scores_divided": Flag("Only q·k divided by the temperature, and not the bias."),
    "statistics": Flag("The largest weight of every row and its entropy in nats, with their gradients."),
    "tied_logits": Flag("The largest logit occurs twice: the first has the gradient of the largest weight."),
}
ALL = ("out", "lse", "max_prob", "entropy", "vjp")
EVERY = {name: Recipe() for name in ("dlse", "dmax_prob", "dentropy")}


def cases() -> Iterator[Case]:
    """Both divisions, both directions of T5, other biases and none, temperatures from 1/32 to 16."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "attention_alignment": True,
        "scores_divided": spec.divide == "scores",
        "statistics": bool({"dmax_prob", "dentropy"} & set(case.cotangents)),
        "causal": bool(spec.causal),
        "causal_top_left": spec.causal == "top_left",
        "causal_bottom_right": spec.causal == "bottom_right",
        "scale": spec.scale != 1,
        "t5": isinstance(spec.bias, T5),
        "t5_bidirectional": isinstance(spec.bias, T5) and spec.bias.bidirectional,
        "alibi": isinstance(spec.bias, ALiBi),
    }
    return (name for name, holds in present.items() if holds)


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    small = Recipe(exp2=-9)
    yield Case(
        name="attention_alignment/causal",
        spec=AttentionAlignment(causal="bottom_right", bias=T5(buckets=8, max_distance=12)),
        sizes=sizes((14, 14), (4, 2), (4, 4)),
        inputs={"q": small, "temperature": numbers(0.75, 0.5, 1.25, 0.875)},
        cotangents=EVERY,
        want=ALL,
        catches="the bias added after the division; a temperature for each key head; scores scaled by D^-1/2",
    )
    yield Case(
        name="attention_alignment/bidirectional",
        spec=AttentionAlignment(bias=T5(buckets=8, max_distance=7, bidirectional=True)),
        sizes=sizes((9, 13), (2, 2), (8, 4), batch=2),
        dtype="bfloat16",
        inputs={"q": small, "temperature": numbers(0.625, 1.5)},
        cotangents=EVERY,
        want=ALL,
        catches="logits multiplied by the temperature; entropy in bits; the mean of all weights for the largest",
    )
    yield Case(
        name="attention_alignment/scores_divided",
        spec=AttentionAlignment(divide="scores", causal="top_left", bias=T5(buckets=8, max_distance=9)),
        sizes=sizes((11, 15), (2, 1), (8, 4)),
        inputs={"q": small, "temperature": numbers(0.75, 3.0)},
        cotangents=EVERY,
        want=ALL,
        catches="the bias divided as well where q·k alone is asked; its gradient then is 1/tau of what it should be",
    )
    yield Case(
        name="attention_alignment/cold_and_hot",
        spec=AttentionAlignment(causal="bottom_right", bias=T5(buckets=6, max_distance=7)),
        sizes=sizes((8, 12), (4, 4), (4, 4)),
        dtype="float16",
        inputs={
            "q": Recipe(exp2=-10),
            "k": Recipe(exp2=-9),
            "t5_table": Recipe(exp2=-9),
            "temperature": numbers(0.03125, 0.125, 4.0, 16.0),
        },
        cotangents=EVERY,
        want=ALL,
        flags=("large_scores",),
        catches="exponentials without their row's maximum, after a division by 1/32; −p ln p of a weight that is 0",
    )
    yield Case(
        name="attention_alignment/padded",
        spec=AttentionAlignment(causal="bottom_right", scale=0.25, bias=T5(buckets=6, max_distance=8)),
        sizes=sizes((4, 11), (4, 2), (8, 5), batch=3),
        dtype="bfloat16",
        inputs={
            "kv_lengths": integers(11, 7, 5),
            "temperature": numbers(0.5, 0.75, 2.0, 1.5),
            "k": edited(rows_of(NORMAL, (7, 8, 9, 10), NAN, batch=1), *rows_of(NORMAL, (5, 6), INF, batch=2).edits),
            "v": edited(rows_of(NORMAL, (7, 8, 9, 10), INF, batch=1), *rows_of(NORMAL, (5, 6), NAN, batch=2).edits),
        },
        cotangents=EVERY,
        want=ALL,
        flags=("poison",),
        catches="padded keys counted in entropy; distances counted from the end of the array",
    )
    yield Case(
        name="attention_alignment/zero_length",
        spec=AttentionAlignment(bias=None),
        sizes=sizes((3, 6), (2, 2), (8, 4), batch=2),
        inputs={"q": small, "kv_lengths": integers(6, 0), "temperature": numbers(0.5, 1.5)},
        cotangents=EVERY,
        want=ALL,
        flags=("zero_length", "fully_masked_rows"),
        catches="NaN from 0 ln 0 or from −∞ − −∞ in the statistics of a row that sees nothing, both of which are 0",
    )
    # Keys 2 and 5 are 0, as is the bias: their logits are 0 for every query, and all others are negative.
    yield Case(
        name="attention_alignment/ties",
        spec=AttentionAlignment(bias=None),
        sizes=sizes((5, 9), (2, 1), (4, 4)),
        inputs={
            "q": edited(Recipe(exp2=-9), *(set_((None, None, None, d), 1.0) for d in (0, 1))),
            "k": edited(
                Recipe(exp2=-12),
                *(set_((None, None, None, d), -2.0) for d in (0, 1)),
                set_((None, None, (2, 5), None), 0.0),
            ),
            "temperature": numbers(0.75, 6.0),
        },
        cotangents=EVERY,
        want=ALL,
        flags=("tied_logits",),
        catches="the gradient of the largest weight shared by equals, or given to the last of them",
    )
    yield Case(
        name="attention_alignment/learned_slopes",
        spec=AttentionAlignment(bias=ALiBi(slopes="learned"), divide="scores"),
        sizes=sizes((7, 10), (6, 2), (5, 4)),
        dtype="float16",
        inputs={
            "q": small,
            "slopes": numbers(0.5, 0.25, 0.125, 1.0, 0.75, 0.0625),
            "temperature": numbers(0.25, 0.5, 0.75, 1.5, 2.0, 3.0),
        },
        cotangents=EVERY,
        want=ALL,
        flags=("learned_slopes",),
        catches="another bias than T5's divided with the scores",
    )
    yield Case(
        name="attention_alignment/dispersed_513",
        spec=AttentionAlignment(causal="bottom_right"),
        sizes=sizes((3, 513), (2, 2), (4, 3)),
        dtype="bfloat16",
        inputs={"q": small, "temperature": numbers(0.6875, 0.875)},
        cotangents=EVERY,
        want=ALL,
        rows=Rows(q=(0, 1, 2), k=(0, 1, 384, 511, 512)),
        catches="entropy summed key by key in 16 bits over 513 keys that are attended to flatly, or by −p ln(p + 1e-4)",
    )
    yield Case(
        name="attention_alignment/one_query_1025",
        spec=AttentionAlignment(bias=T5(buckets=16, max_distance=1024)),
        sizes=sizes((1, 1025), (1, 1), (4, 4)),
        dtype="float16",
        inputs={"q": small, "temperature": numbers(0.5625)},
        cotangents=EVERY,
        want=ALL,
        rows=Rows(q=(0,), k=(0, 1, 512, 1016, 1024)),
        catches="a decode step whose statistics are those of its last tile of keys",
    )
    yield Case(
        name="attention_alignment/scores_257",
        spec=AttentionAlignment(divide="scores", bias=T5(bidirectional=True, max_distance=200)),
        sizes=sizes((4, 257), (2, 1), (4, 4)),
        inputs={"q": small, "temperature": numbers(0.5, 1.75)},
        cotangents=EVERY,
        want=ALL,
        rows=Rows(q=(0, 1, 2, 3), k=(0, 57, 128, 256)),
        catches="the bias of 257 keys divided with their scores",
    )
    yield Case(
        name="attention_alignment/float64",
        spec=AttentionAlignment(causal="bottom_right", bias=T5(buckets=6, max_distance=8)),
        sizes=sizes((9, 9), (2, 2), (5, 4)),
        dtype="float64",
        inputs={"temperature": numbers(0.8125, 1.1875)},
        cotangents=EVERY,
        want=ALL,
        catches="a temperature, or the statistics, in float32 beside double-precision scores",
    )
