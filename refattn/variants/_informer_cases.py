"""Golden cases of Informer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import Case, Edit, Flag, Recipe
from refattn.variants._case_parts import edited, flagged, rows_of, scaled, sizes
from refattn.variants.informer import Informer

FLAGS: Mapping[str, Flag] = {
    "informer": Flag("Softmax for the queries of the largest sampled measure, with their indices and the margin."),
    "informer_causal": Flag("The causal form: what is not chosen gets a sum or a mean of the values so far."),
    "informer_cumsum": Flag("The sum of the values so far, not divided.", ("Informer2020#88", "Informer2020#633")),
    "informer_lse_mean": Flag("Queries ranked by the paper's measure, log-sum-exp minus mean."),
    "informer_samples": Flag("The sum of the sampled products divided by their count, not by that of the keys."),
    "informer_queries": Flag("A count of queries that is given."),
}
PUBLISHED = ("out", "indices", "margin", "vjp")


def cases() -> Iterator[Case]:
    """Both measures, both divisors, every lazy form; all queries chosen, one, or none."""
    for case in flagged(listed()):
        yield replace(case, want=PUBLISHED, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "informer": True,
        "informer_causal": spec.causal,
        "informer_cumsum": spec.lazy == "cumsum",
        "informer_lse_mean": spec.measure == "lse_mean",
        "informer_samples": spec.divisor == "samples",
        "informer_queries": spec.queries is not None,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def keys(count: int) -> Recipe:
    """Indices below an odd count, drawn with replacement."""
    half = count // 2
    return edited(Recipe(kind="integers", exp2=0, limit=half), Edit(at=(None, None), op="add", value=float(half)))


def measured(samples: int, *given: Any, **options: Any) -> dict[str, int]:
    """Sizes with as many sampled keys a query."""
    return sizes(*given, **options) | {"U": samples}


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="informer/mean",
        spec=Informer(factor=2),
        # A divisor of 16 leaves exact what is exact, so that every gradient of the margin is decided.
        sizes=measured(6, (11, 16), (4, 2), (8, 6)),
        inputs={"sample": keys(15)},
        cotangents={"dmargin": Recipe()},
        catches="a sample for each head or sequence; the mean of the sampled values, or of the chosen queries' keys",
    )
    yield Case(
        name="informer/causal_cumsum",
        spec=Informer(causal=True, lazy="cumsum", queries=4),
        sizes=measured(7, (17, 17), (2, 2), batch=2),
        dtype="bfloat16",
        inputs={"sample": keys(17)},
        catches="a sum of values accumulated in bfloat16, or divided by its count; chosen rows that see later keys",
    )
    yield Case(
        name="informer/causal_cummean",
        spec=Informer(causal=True, lazy="cummean", queries=5, divisor="samples", scale=0.5),
        sizes=measured(9, (19, 19), (6, 2), (5, 4)),
        dtype="float16",
        inputs={"sample": keys(19)},
        catches="a mean over all values, future ones included; the products of the measure divided by Lk",
    )
    yield Case(
        name="informer/lse_mean",
        spec=Informer(measure="lse_mean", divisor="samples", queries=3),
        sizes=measured(8, (9, 15), (2, 1), (8, 4), batch=2),
        inputs={"sample": keys(15)},
        cotangents={"dmargin": Recipe()},
        catches="queries ranked by max − mean where log-sum-exp − mean is asked",
    )
    yield Case(
        name="informer/divisor_decides",
        spec=Informer(queries=2),
        sizes=measured(3, (6, 31), (2, 2), (4, 4)),
        inputs={"sample": keys(31), "q": edited(Recipe(), scaled((None, None, (1, 4), None), 2.0))},
        catches="the sum of 3 sampled products divided by 3 and not by 31, which ranks other queries first",
    )
    yield Case(
        name="informer/one_peaked_query_257",
        spec=Informer(queries=1),
        sizes=measured(5, (6, 257), (2, 2), (4, 3)),
        inputs={"sample": keys(257), "q": edited(rows_of(Recipe(exp2=-9), 3, 0.0), Edit(
            at=(None, None, 3, 0), op="set", value=64.0))},
        flags=("large_scores",),
        catches="exponentials of a chosen row without its maximum: its scores lie beyond ±100",
    )  # fmt: skip
    yield Case(
        name="informer/all_queries",
        spec=Informer(),
        sizes=measured(4, (7, 9), (2, 1)),
        dtype="bfloat16",
        inputs={"sample": keys(9)},
        catches="anything but exact attention, where u is Lq; a margin that is not 0",
    )
    yield Case(
        name="informer/queries_257",
        spec=Informer(factor=1),
        sizes=measured(5, (257, 33), (1, 1), (4, 4)),
        inputs={"sample": keys(33)},
        catches="a choice made tile by tile of the queries instead of over all of them",
    )
    yield Case(
        name="informer/float64",
        spec=Informer(factor=1),
        sizes=measured(4, (8, 11), (3, 3), (5, 4)),
        dtype="float64",
        inputs={"sample": keys(11)},
        catches="a measure in float32 beside double-precision scores",
    )
    yield Case(
        name="informer/keys_513",
        spec=Informer(queries=2),
        sizes=measured(8, (5, 513), (1, 1), (2, 2)),
        inputs={"sample": keys(513)},
        catches="sampled indices in 8 bits, or a mean of 513 values summed in bfloat16",
    )
