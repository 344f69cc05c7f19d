"""Golden cases of Linformer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe, Rows
from refattn.variants._case_parts import INF, NAN, edited, flagged, integers, rows_of, scaled, sizes
from refattn.variants.linformer import Linformer

FLAGS: Mapping[str, Flag] = {
    "linformer": Flag("Attention over learned mixtures of the keys and values, with the gradients of the mixing."),
    "linformer_per_head": Flag("Mixtures of its own for every key head."),
    "linformer_shared_kv": Flag("Keys and values mixed by one matrix."),
}


def cases() -> Iterator[Case]:
    """Both ways of sharing, one matrix or one a head, padding, and mixtures that cancel or dominate."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "linformer": True,
        "linformer_per_head": spec.heads == "per_head",
        "linformer_shared_kv": spec.sharing == "kv",
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def mixtures(r: int, *given: Any, **options: Any) -> dict[str, int]:
    """Sizes with r mixtures."""
    return sizes(*given, **options) | {"R": r}


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="linformer/shared",
        spec=Linformer(),
        sizes=mixtures(5, (9, 12), (4, 2), (8, 6)),
        cotangents={"dlse": Recipe()},
        catches="E and F exchanged, or one of them used for keys and values",
    )
    yield Case(
        name="linformer/shared_kv",
        spec=Linformer(sharing="kv"),
        sizes=mixtures(4, (12, 12), (2, 2), batch=2),
        dtype="bfloat16",
        inputs={"E": Recipe(exp2=-10)},
        catches="the gradient of E from the keys alone, where the values are mixed by it too",
    )
    yield Case(
        name="linformer/per_head",
        spec=Linformer(heads="per_head", scale=0.75),
        sizes=mixtures(6, (10, 14), (6, 2), (5, 4)),
        dtype="float16",
        catches="the matrix of query head h instead of key head h // (Hq / Hkv); the scale of D where one is given",
    )
    yield Case(
        name="linformer/per_head_kv_padding",
        spec=Linformer(heads="per_head", sharing="kv"),
        sizes=mixtures(4, (6, 11), (2, 2), (8, 4), batch=3),
        dtype="bfloat16",
        inputs={
            "kv_lengths": integers(11, 7, 1),
            "k": edited(rows_of(NORMAL, (7, 8, 9, 10), NAN, batch=1), *rows_of(NORMAL, 5, INF, batch=2).edits),
            "v": edited(rows_of(NORMAL, (7, 8, 9, 10), INF, batch=1), *rows_of(NORMAL, 5, NAN, batch=2).edits),
        },
        cotangents={"dlse": Recipe()},
        flags=("poison",),
        catches="padded keys multiplied by 0 instead of replaced by it, or padding taken for a mask of the mixtures",
    )
    yield Case(
        name="linformer/zero_length",
        spec=Linformer(),
        sizes=mixtures(3, (5, 8), (2, 1), batch=2),
        inputs={"kv_lengths": integers(8, 0)},
        cotangents={"dlse": Recipe()},
        flags=("zero_length",),
        catches="lse of −∞ for a sequence of length 0, whose 3 mixtures have logit 0 each: lse is log 3",
    )
    yield Case(
        name="linformer/identity",
        spec=Linformer(sharing="kv"),
        sizes=mixtures(13, (9, 13), (2, 2)),
        inputs={"E": Recipe(kind="one_hot")},
        catches="anything but exact attention, which E = I is",
    )
    yield Case(
        name="linformer/cancelling_keys_300",
        spec=Linformer(sharing="kv"),
        sizes=mixtures(3, (7, 300), (2, 1), (8, 4)),
        inputs={
            "E": edited(
                Recipe(kind="constant", value=1.0),
                scaled((1, None), 2.0),
                scaled((2, None), -1.0),
                scaled((0, tuple(range(0, 300, 7))), 0.5),
                scaled((1, tuple(range(1, 300, 45))), 2.0),
                scaled((2, tuple(range(3, 300, 99))), 0.25),
            ),
            "k": Recipe(exp2=-9, alternate=True),
            "v": Recipe(exp2=-8, alternate=True),
        },
        rows=Rows(q=tuple(range(7)), k=(0, 1, 127, 128, 299)),
        flags=("cancelling_values",),
        catches="mixtures of keys +k, −k accumulated in 16 bits, which loses what is left of them",
    )
    yield Case(
        name="linformer/large_scores",
        spec=Linformer(),
        sizes=mixtures(4, (8, 20), (2, 2), (16, 8)),
        inputs={
            "q": Recipe(exp2=-2),
            "E": edited(Recipe(exp2=-15), Edit(at=(None, None), op="add", value=0.25)),
        },
        flags=("large_scores",),
        catches="exponentials without their row's maximum: the mixtures' scores lie near each other and beyond ±100",
    )
    yield Case(
        name="linformer/queries_2049",
        spec=Linformer(),
        sizes=mixtures(3, (2049, 257), (4, 2), (8, 4)),
        dtype="float16",
        inputs={"E": Recipe(exp2=-11), "F": Recipe(exp2=-11)},
        rows=Rows(q=(0, 127, 1024, 2048), k=(0, 1, 255, 256)),
        catches="queries beyond the length of the keys skipped, as if the form were causal",
    )
    yield Case(
        name="linformer/keys_1025",
        spec=Linformer(sharing="kv"),
        sizes=mixtures(2, (3, 1025), (2, 2), (4, 3)),
        inputs={"E": Recipe(exp2=-12)},
        rows=Rows(q=(0, 1, 2), k=(0, 1024)),
        catches="mixtures of one tile of keys, or all but the last key",
    )
    yield Case(
        name="linformer/float64",
        spec=Linformer(),
        sizes=mixtures(3, (5, 7), (3, 3), (5, 4)),
        dtype="float64",
        catches="mixtures in float32 beside double-precision scores",
    )
