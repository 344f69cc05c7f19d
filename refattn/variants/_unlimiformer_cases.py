"""Golden cases of Unlimiformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe, Rows
from refattn.variants._case_parts import NAN, edited, flagged, integers, rows_of, sizes
from refattn.variants.unlimiformer import Unlimiformer

FLAGS: Mapping[str, Flag] = {
    "unlimiformer": Flag("Each query attends to its nearest tokens of all; which were found is published."),
    "unlimiformer_hidden": Flag("Tokens ranked as hidden states, with the gradients of the projections."),
}
FOUND = ("out", "lse", "indices", "margin", "vjp")


def cases() -> Iterator[Case]:
    """Both forms, biases, padding, more asked for than there is, and tokens that 16 bits do not tell apart."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "unlimiformer": True,
        "unlimiformer_hidden": spec.score == "hidden",
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    biases = {"b_q": NORMAL, "b_k": NORMAL, "b_v": NORMAL}
    yield Case(
        name="unlimiformer/keys",
        spec=Unlimiformer(top=4),
        sizes=sizes((7, 15), (4, 2), (5, 4)),
        want=FOUND,
        cotangents={"dlse": Recipe()},
        catches="one choice for all heads or all queries; a softmax over all tokens of which the largest are kept",
    )
    yield Case(
        name="unlimiformer/padding",
        spec=Unlimiformer(top=3, scale=0.75),
        sizes=sizes((5, 300), (2, 1), (3, 2), batch=2),
        dtype="bfloat16",
        inputs={
            "kv_lengths": integers(130, 2),
            "k": edited(
                rows_of(NORMAL, tuple(range(130, 300)), 64.0, batch=0), *rows_of(NORMAL, 4, 64.0, batch=1).edits
            ),
            "v": rows_of(NORMAL, (2, 130, 299), NAN, batch=1),
        },
        want=FOUND,
        flags=("poison",),
        catches="padding that is masked after it was found, in the place of tokens; rows of 2 tokens that find 3",
    )
    yield Case(
        name="unlimiformer/hidden",
        spec=Unlimiformer(top=4, score="hidden"),
        sizes=sizes((5, 12), (2, 1), (4, 3)) | {"E": 6},
        want=FOUND,
        cotangents={"dlse": Recipe()},
        catches="a query scaled by its own width E in place of D; keys made of encoded tokens that are found in part",
    )
    yield Case(
        name="unlimiformer/hidden_biases",
        spec=Unlimiformer(top=3, score="hidden"),
        seed=4,
        sizes=sizes((6, 9), (4, 2), (3, 4), batch=2) | {"E": 5},
        dtype="float16",
        inputs={"kv_lengths": integers(9, 5), "w_q": Recipe(exp2=-10), "w_k": Recipe(exp2=-10), **biases},
        want=FOUND,
        cotangents={"dlse": Recipe()},
        catches="a bias of the keys that is not given back to their logits, as lse shows; Wk of another key head",
    )
    yield Case(
        name="unlimiformer/everything_found",
        spec=Unlimiformer(top=16),
        sizes=sizes((6, 9), (2, 2), (4, 3)),
        dtype="float64",
        want=("out", "lse", "margin", "vjp"),
        catches="anything but exact attention, which this is",
    )
    yield Case(
        name="unlimiformer/faint_differences",
        spec=Unlimiformer(top=3),
        sizes=sizes((6, 12), (1, 1), (4, 4)),
        dtype="float16",
        seed=7,
        # Keys of ones, but for some 2⁻¹⁰: products that 16 bits hold alike, and values that differ.
        inputs={"k": edited(Recipe(kind="integers", limit=3, exp2=-10), Edit(at=(None,) * 4, op="add", value=1.0))},
        want=FOUND,
        catches="products ranked after they were rounded to 16 bits, where they tie",
    )
    yield Case(
        name="unlimiformer/negative_products",
        spec=Unlimiformer(top=3),
        sizes=sizes((5, 10), (2, 1), (4, 4)),
        dtype="bfloat16",
        inputs={
            "q": edited(Recipe(kind="integers", exp2=-5), Edit(at=(None,) * 4, op="add", value=1.0)),
            "k": edited(Recipe(kind="integers", exp2=-5), Edit(at=(None,) * 4, op="add", value=-1.0)),
        },
        want=FOUND,
        catches="products ranked by their size, or padding of 0 that lies above all of them",
    )
    yield Case(
        name="unlimiformer/tokens_1025",
        spec=Unlimiformer(top=5),
        sizes=sizes((4, 1025), (1, 1), (4, 3)),
        rows=Rows(q=(0, 1, 2, 3), k=(0, 50, 140, 984, 1023)),
        want=FOUND,
        catches="the nearest of each tile of keys in place of all; gradients into keys that nobody has found",
    )
    yield Case(
        name="unlimiformer/hidden_300",
        spec=Unlimiformer(top=4, score="hidden"),
        sizes=sizes((3, 300), (1, 1), (3, 2)) | {"E": 4},
        want=FOUND,
        catches="encoded tokens counted from the beginning of a chunk",
    )
