"""Golden cases that publish what stands inside: the final logits and the weights."""

from __future__ import annotations

from collections.abc import Iterator

from refattn.case import Case, Recipe
from refattn.variants._case_parts import attend, integers, numbers, sizes
from refattn.variants.sdpa import SDPA

INNER = ("out", "lse", "scores", "probs", "vjp")


def cases() -> Iterator[Case]:
    """Small problems with what moves or masks a logit."""
    yield Case(
        name="inner/plain",
        spec=SDPA(),
        sizes=sizes((5, 7), (2, 1), (8, 4)),
        want=INNER,
        catches="scores returned before the scale, or weights that do not add up to 1",
    )
    yield Case(
        name="inner/softcap_bias_sink",
        spec=SDPA(causal="bottom_right", softcap=2.0),
        sizes=sizes((6, 9), (2, 2), (4, 4)),
        inputs={"bias": Recipe(shape=(1, 2, 6, 9)), "sink": numbers(1.5, -0.5)},
        want=INNER,
        catches="scores read before the cap, the bias or the mask; weights that leave the sink's share out",
    )
    yield Case(
        name="inner/empty_rows_bfloat16",
        spec=SDPA(),
        sizes=sizes((5, 9), (2, 1), (8, 8)),
        dtype="bfloat16",
        inputs={"mask": attend(1, 1, 5, 9, hidden=((None, None, (1, 4), None),))},
        want=INNER,
        catches="weights 1/n or NaN in rows that see nothing",
    )
    yield Case(
        name="inner/segments_float16",
        spec=SDPA(causal=True),
        sizes=sizes((9, 9), (1, 1), (8, 8)),
        dtype="float16",
        inputs={
            "q_segment_ids": Recipe(kind="values", values=(0, 0, 0, 1, 1, 1, 1, 2, 2), shape=(9,)),
            "k_segment_ids": Recipe(kind="values", values=(0, 0, 0, 1, 1, 1, 1, 2, 2), shape=(9,)),
        },
        want=INNER,
        catches="scores of pairs in different segments that are a large negative number instead of −∞",
    )
    yield Case(
        name="inner/sigmoid_float64",
        spec=SDPA(causal=True, normalizer="sigmoid", sigmoid_bias=-2.0),
        sizes=sizes((7, 7), (2, 1), (4, 4)),
        dtype="float64",
        want=("out", "scores", "probs", "vjp"),
        catches="the bias of sigmoid attention missing in the scores; weights divided by their sum",
    )
    yield Case(
        name="inner/kept_weights",
        spec=SDPA(keep_probability=0.5),
        sizes=sizes((6, 6), (2, 2), (4, 4), batch=2),
        inputs={"keep": attend(2, 2, 6, 6, true=128), "kv_lengths": integers(6, 3)},
        want=INNER,
        catches="weights after the keep-mask, where those before it are asked",
    )
