"""Golden cases of the Causal Transformer's attention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe
from refattn.variants._case_parts import INF, NAN, edited, flagged, scaled, sizes
from refattn.variants.causal_transformer import CausalTransformer

FLAGS: Mapping[str, Flag] = {
    "streams": Flag("Several streams, each attending to itself and then to what the others were before."),
    "uniform_rows": Flag("Rows that see no key and, by a mask of −10⁹, weigh all keys alike, later ones included."),
    "active_queries": Flag("Entries that are not active hidden as queries."),
    "active_keys": Flag("Entries that are not active hidden as keys."),
    "residual": Flag("The query's input added to what its attention gives."),
    "code_norm": Flag("A layer norm whose variance divides by E − 1, eps beside the standard deviation."),
    "final_layer": Flag("Heads projected to the stream's width."),
}
HALF, EIGHTH = Recipe(exp2=-9), Recipe(exp2=-11)
# Small scores: what an attention gives is asked about again, and errors of scores are multiplied twice.
WEIGHTS = {"wq": Recipe(exp2=-10), "wk": Recipe(exp2=-10), "wv": HALF, "shaw_k": HALF, "shaw_v": HALF}


def cases() -> Iterator[Case]:
    """Every option alone and the code's together, over one, two and three streams."""
    for case in flagged(listed()):
        yield replace(case, inputs=WEIGHTS | dict(case.inputs), flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "streams": case.sizes["S"] > 1,
        "uniform_rows": spec.mask == "minus_1e9",
        "active_queries": "active" in case.inputs and spec.active != "keys",
        "active_keys": "active" in case.inputs and spec.active != "queries",
        "residual": spec.residual,
        "code_norm": spec.norm is not None,
        "final_layer": spec.final_layer,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def block(
    streams: int, length: int, *, heads: int = 2, widths: tuple[int, int] = (3, 2), batch: int = 1, width: int = 0
) -> dict[str, int]:
    """Sizes of streams of a length; their width is that of the heads side by side where none is given."""
    whole = sizes((length, length), (heads, heads), widths, batch)
    return whole | {"S": streams, "E": width or heads * widths[1]}


def lengths(*whole: tuple[int, ...], of: int) -> Recipe:
    """Entries that are active up to a length, of every sequence's streams."""
    values = tuple(float(i < n) for sequence in whole for n in sequence for i in range(of))
    return Recipe(kind="values", values=values, shape=(len(whole), len(whole[0]), of))


# Where a row sees one key, or all alike, its weights are 1 or 1/8, and exact only where the query is: rows that see
# nothing are 8 keys long, and the streams' first active entries stand together.


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="causal_transformer/three_streams",
        spec=CausalTransformer(),
        sizes=block(3, 6),
        inputs={"x": edited(NORMAL, scaled((None, 1, None, None), 2.0), scaled((None, 2, None, None), 0.5))},
        catches="keys and values from what the other stream became, or weights [t, s] for [s, t]",
    )
    yield Case(
        name="causal_transformer/as_the_code",
        spec=CausalTransformer(clip=3, mask="minus_1e9", active="both", residual=True, norm="code"),
        sizes=block(3, 7, batch=2),
        inputs={
            **dict.fromkeys(("wq", "wk", "shaw_k"), EIGHTH),
            **dict.fromkeys(("bq", "bv", "shift"), HALF),
            "gain": edited(HALF, Edit(at=(None, None, None), op="add", value=1.0)),
            "active": lengths((7, 7, 5), (4, 4, 3), of=7),
        },
        catches="a norm that divides by E; a residual of the projected query, or only after the second attention",
    )
    yield Case(
        name="causal_transformer/two_streams_uniform",
        spec=CausalTransformer(clip=2, mask="minus_1e9", scale=0.75),
        sizes=block(2, 8, batch=2),
        inputs={"active": lengths((8, 4), (5, 1), of=8)},
        catches="rows of inactive queries that are 0, or the mean of the keys up to them alone",
    )
    yield Case(
        name="causal_transformer/keys_late",
        spec=CausalTransformer(clip=4, active="keys"),
        sizes=block(2, 9, widths=(4, 3)),
        inputs={"active": Recipe(kind="values", values=(0, 0, 1, 1, 0, 0, 1, 0, 1, 0, 0, 1, 1, 1, 0, 1, 0, 0),
                                 shape=(1, 2, 9))},
        flags=("fully_masked_rows",),
        catches="inactive entries hidden as queries; rows before the first active key that are not 0",
    )  # fmt: skip
    yield Case(
        name="causal_transformer/keys_uniform",
        spec=CausalTransformer(clip=2, active="keys", mask="minus_1e9", residual=True),
        sizes=block(2, 8, heads=1, widths=(4, 4)),
        inputs={
            "active": Recipe(kind="values", values=(0, 0, 1, 1, 0, 1, 0, 0, 0, 0, 1, 1, 1, 0, 0, 1), shape=(1, 2, 8))
        },
        catches="rows that see nothing weighted over active keys only, where −10⁹ leaves all alike",
    )
    absent: tuple[tuple[int | None, ...], ...] = ((0, 0, 5, None), (0, 1, 4, None), (0, 1, 5, None))
    yield Case(
        name="causal_transformer/absent_entries",
        spec=CausalTransformer(clip=3, active="both"),
        sizes=block(2, 6),
        inputs={
            "x": edited(
                NORMAL, *(Edit(at=at, op="set", value=v) for at, v in zip(absent, (NAN, INF, NAN), strict=True))
            ),
            "active": lengths((5, 4), of=6),
        },
        flags=("poison", "fully_masked_rows"),
        catches="absent entries multiplied by 0 instead of never read",
    )
    yield Case(
        name="causal_transformer/final_layer",
        spec=CausalTransformer(clip=2, final_layer=True, residual=True),
        sizes=block(2, 5, heads=3, width=5),
        inputs={"wo": HALF, "bo": HALF},
        catches="the final layer applied to the sum of the attentions, whose streams have layers of their own",
    )
    yield Case(
        name="causal_transformer/normed",
        spec=CausalTransformer(clip=1, norm="code", residual=True, final_layer=True),
        sizes=block(3, 5, heads=1, widths=(2, 3), width=4),
        # Streams and values of some 2^-12, where eps is a hundredth of the standard deviation; queries as elsewhere.
        inputs={
            "x": Recipe(exp2=-21),
            "wq": edited(EIGHTH, *(scaled((s, s, None, None, None), 2.0**12) for s in range(3))),
            "wk": EIGHTH,
            "shaw_k": EIGHTH,
            "shaw_v": Recipe(exp2=-21),
            "wo": HALF,
            "gain": edited(HALF, Edit(at=(None, None, None), op="add", value=1.0)),
            "shift": HALF,
        },
        catches="eps under the root, or left out; the sum over streams normalised instead of every attention",
    )
    yield Case(
        name="causal_transformer/one_stream_257",
        spec=CausalTransformer(clip=1, residual=True),
        sizes=block(1, 257, heads=1, widths=(2, 3)),
        dtype="float16",
        catches="an empty sum over other streams: a stream alone keeps its self-attention",
    )
    yield Case(
        name="causal_transformer/four_streams_33",
        spec=CausalTransformer(clip=15),
        sizes=block(4, 33, heads=1, widths=(2, 2)),
        catches="the clip at 15 taken for a window, or for the last row of a table of 15",
    )
    yield Case(
        name="causal_transformer/float64",
        spec=CausalTransformer(clip=2, active="both", residual=True),
        sizes=block(2, 5),
        inputs={"active": lengths((5, 3), of=5)},
        dtype="float64",
        catches="projections in float32 beside double-precision scores",
    )
