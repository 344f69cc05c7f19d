"""Golden cases of DBA as reconstructed here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe, Rows
from refattn.variants._case_parts import INF, NAN, edited, flagged, integers, rows_of, scaled, sizes
from refattn.variants.dba import DBA

FLAGS: Mapping[str, Flag] = {
    "dba_recon_v1": Flag("Keys compressed by latents that read them: this project's reconstruction, not the authors'."),
    "dba_two_sided": Flag("Queries that read latents, which read the compressed keys."),
}

HALF, QUARTER = Recipe(exp2=-9), Recipe(exp2=-10)
# Latents +z, −z compress the keys to means far apart, so that 16 bits tell one from the other.
OPPOSITE = Recipe(alternate=True)


def cases() -> Iterator[Case]:
    """Both forms, padding, sequences without keys, latents that agree, keys that cancel or share a large part."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {"dba_recon_v1": True, "dba_two_sided": spec.form == "two_sided", "scale": spec.scale is not None}
    return (name for name, holds in present.items() if holds)


def latents(count: int, reduced: int, *given: Any, **options: Any) -> dict[str, int]:
    """Sizes with `count` latents and keys of `reduced` width."""
    return sizes(*given, **options) | {"P": count, "Dr": reduced}


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    channel = (None, None, None, 0)
    yield Case(
        name="dba/key_side",
        spec=DBA(),
        sizes=latents(5, 4, (9, 12), (4, 2), (6, 6)),
        inputs={"R": QUARTER},
        cotangents={"dlse": Recipe()},
        catches="the scale of D instead of Dr; K' as keys in their full width; latents of query head h",
    )
    yield Case(
        name="dba/two_sided",
        spec=DBA(form="two_sided"),
        sizes=latents(4, 3, (8, 10), (2, 2), (6, 4), batch=2),
        inputs={"R": QUARTER},
        catches="queries that read compressed keys where they read latents; the inner softmax left out",
    )
    yield Case(
        name="dba/two_sided_scale",
        spec=DBA(form="two_sided", scale=0.75),
        sizes=latents(4, 2, (7, 9), (4, 1), (4, 7)),
        dtype="float16",
        inputs={"R": HALF, "Z": Recipe(exp2=-9, alternate=True), "q": HALF},
        seed=2,
        catches="the given scale in one of the three softmaxes alone",
    )
    yield Case(
        name="dba/key_side_scale",
        spec=DBA(scale=0.25),
        sizes=latents(4, 3, (10, 14), (6, 2), (2, 3)),
        dtype="float16",
        inputs={"R": HALF, "Z": OPPOSITE},
        cotangents={"dlse": Recipe()},
        catches="the given scale in one of the two softmaxes alone; a projection to more than D",
    )
    yield Case(
        name="dba/padding",
        spec=DBA(),
        sizes=latents(2, 1, (6, 11), (2, 2), (4, 4), batch=3),
        dtype="bfloat16",
        seed=5,
        inputs={
            "R": QUARTER,
            "q": HALF,
            "Z": OPPOSITE,
            "kv_lengths": integers(11, 7, 3),
            "k": edited(rows_of(NORMAL, (7, 8, 9, 10), NAN, batch=1), *rows_of(NORMAL, 5, INF, batch=2).edits),
            "v": edited(rows_of(NORMAL, (7, 8, 9, 10), INF, batch=1), *rows_of(NORMAL, 5, NAN, batch=2).edits),
        },
        flags=("poison",),
        catches="padded keys in the latents' softmax, with logit 0 or with whatever they hold",
    )
    yield Case(
        name="dba/zero_length",
        spec=DBA(form="two_sided"),
        sizes=latents(3, 4, (5, 8), (2, 1), (6, 4), batch=2),
        inputs={"R": HALF, "kv_lengths": integers(8, 0)},
        flags=("zero_length",),
        catches="NaN of latents that see no key, or the mean of what is padded",
    )
    yield Case(
        name="dba/cancelling_keys_258",
        spec=DBA(),
        sizes=latents(3, 4, (7, 258), (2, 1), (6, 4)),
        inputs={
            "R": HALF,
            "Z": Recipe(exp2=-11),
            "k": Recipe(exp2=-9, alternate=True),
            "v": Recipe(alternate=True),
        },
        rows=Rows(q=tuple(range(7)), k=(0, 1, 127, 128, 256, 257)),
        flags=("cancelling_values",),
        catches="keys +k, −k compressed in 16 bits, which loses what is left of them",
    )
    yield Case(
        name="dba/large_scores",
        spec=DBA(),
        sizes=latents(4, 4, (8, 20), (2, 2), (4, 3)),
        dtype="float64",
        inputs={
            "R": edited(Recipe(exp2=-12), *(Edit(at=(d, d), op="add", value=1.0) for d in range(4))),
            "q": edited(NORMAL, Edit(at=channel, op="add", value=128.0)),
            "Z": edited(NORMAL, Edit(at=(None, None, 0), op="add", value=128.0)),
            "k": edited(NORMAL, scaled(channel, 2.0**-8), Edit(at=channel, op="add", value=16.0)),
        },
        flags=("large_scores",),
        catches="exponentials without their row's maximum: all keys share a channel that adds 1024 to every logit",
    )
    yield Case(
        name="dba/queries_2049",
        spec=DBA(form="two_sided"),
        sizes=latents(2, 2, (2049, 257), (4, 2), (4, 4)),
        dtype="float16",
        inputs={"R": QUARTER, "Z": Recipe(exp2=-9, alternate=True), "q": HALF},
        rows=Rows(q=(0, 127, 1024, 2048), k=(0, 1, 255, 256)),
        catches="queries beyond the length of the keys skipped, as if the form were causal",
    )
    yield Case(
        name="dba/float64",
        spec=DBA(form="two_sided"),
        sizes=latents(3, 5, (5, 7), (3, 3), (3, 4)),
        dtype="float64",
        inputs={"R": HALF},
        catches="compressed keys in float32 beside double-precision scores",
    )
    yield Case(
        name="dba/keys_513",
        spec=DBA(),
        sizes=latents(3, 2, (4, 513), (1, 1), (2, 2)),
        inputs={"R": QUARTER, "q": Recipe(exp2=-6)},
        catches="mixtures of whole tiles of keys, without the last one",
    )
    yield Case(
        name="dba/two_sided_257",
        spec=DBA(form="two_sided"),
        sizes=latents(3, 2, (257, 20), (1, 1), (2, 2)),
        inputs={"R": QUARTER},
        catches="queries beyond a tile that read the latents of none",
    )
