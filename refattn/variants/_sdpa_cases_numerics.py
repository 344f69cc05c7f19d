"""Golden cases of numbers: ties, dominance, cancellation, and both ends of the formats' ranges."""

from __future__ import annotations

from collections.abc import Iterator

from refattn.case import Case, Edit, Recipe, Rows
from refattn.variants._case_parts import scaled, set_, sizes
from refattn.variants.sdpa import SDPA


def cases() -> Iterator[Case]:
    """Scores first, then values, then the ranges."""
    yield from scores()
    yield from values()
    yield from ranges()


def scores() -> Iterator[Case]:
    """How the scores lie to each other. Seed 3 draws large scores of which some rows have two that compete."""
    yield Case(
        name="numerics/exact_scores",
        spec=SDPA(scale=2.0**-6),
        sizes=sizes((16, 16), (2, 2), (16, 8)),
        inputs={"q": Recipe(kind="integers", exp2=0), "k": Recipe(kind="integers", exp2=0)},
        flags=("exact32",),
        catches="errors of softmax and P·V, told apart from those of q·k, whose sums are exact in any float32 order",
    )
    yield Case(
        name="numerics/values_of_one_sign",
        spec=SDPA(causal=True),
        sizes=sizes((257, 257), (1, 1), (8, 8)),
        dtype="bfloat16",
        inputs={"v": Recipe(kind="integers", limit=3, exp2=-2, edits=(Edit(at=(None,) * 4, op="add", value=2.0),))},
        rows=Rows(q=(63, 64, 127, 128, 255, 256), k=(0, 128, 255, 256)),
        flags=("exact32",),
        catches="an accumulator in bfloat16: sums that only grow lose every small weight",
    )
    yield Case(
        name="numerics/exact_scores_bfloat16",
        spec=SDPA(scale=2.0**-5, causal=True),
        sizes=sizes((31, 31), (2, 1), (8, 8)),
        dtype="bfloat16",
        inputs={"q": Recipe(kind="integers", exp2=0), "k": Recipe(kind="integers", exp2=0)},
        flags=("exact32",),
        catches="scores kept in bfloat16 between q·k and the softmax",
    )
    for name, exp2, dtype, what in (
        ("scores_of_a_hundred", -5, "float32", "exponentials taken without their own row's maximum"),
        ("scores_of_a_hundred_bfloat16", -5, "bfloat16", "scores rounded to bfloat16: weights off by half"),
        ("scores_of_hundreds", -4, "float16", "q·k or its running maximum kept in float16"),
    ):
        yield Case(
            name=f"numerics/{name}",
            spec=SDPA(),
            sizes=sizes((8, 24), (1, 1)),
            dtype=dtype,
            inputs={"q": Recipe(exp2=exp2), "k": Recipe(exp2=-5)},
            seed=3,
            flags=("large_scores",),
            catches=what,
        )
    yield Case(
        name="numerics/common_offset",
        spec=SDPA(),
        sizes=sizes((9, 14), (2, 1), (16, 8)),
        inputs={
            "q": Recipe(edits=(set_((None, None, None, 0), 64.0),)),
            "k": Recipe(edits=(set_((None, None, None, 0), 512.0), set_((None, None, (1, 4, 6, 7, 12), 0), 512.0625))),
        },
        flags=("large_scores",),
        catches="scores near 8192 that differ by 1: lost in 16 bits, overflowing where the maximum is not subtracted",
    )
    for name, dtype, gaps in (
        ("near_ties", "float32", (2.0**-20, 2.0**-35, 2.0**-50)),
        ("near_ties_bfloat16", "bfloat16", (2.0**-8, 2.0**-20, 2.0**-40)),
    ):
        groups = tuple(tuple(range(4 * n, 4 * n + 4)) for n in (1, 2, 3))
        close = (set_((None, None, rows, 0), gap) for rows, gap in zip(groups, gaps, strict=True))
        yield Case(
            name=f"numerics/{name}",
            spec=SDPA(),
            sizes=sizes((8, 16), (2, 2)),
            dtype=dtype,
            inputs={"k": Recipe(period=4, edits=(set_((None, None, None, 0), 0.0), *close))},
            flags=("near_ties",),
            catches="weights found by comparing with the maximum: each key has three others within 2^-8 to 2^-50 of it",
        )
    yield Case(
        name="numerics/equal_keys",
        spec=SDPA(),
        sizes=sizes((7, 16), (2, 2), (4, 4)),
        inputs={"k": Recipe(period=1)},
        flags=("equal_keys",),
        catches="equal maxima of which only the first counts: out is the mean of V and dq exactly 0",
    )
    yield Case(
        name="numerics/equal_keys_causal",
        spec=SDPA(causal=True),
        sizes=sizes((16, 16), (2, 1), (4, 4)),
        dtype="float16",
        inputs={"k": Recipe(period=1)},
        want=("out", "lse"),
        flags=("equal_keys",),
        catches="lse = s + log(i + 1) taken to another base or without its logarithm",
    )
    yield Case(
        name="numerics/repeated_keys",
        spec=SDPA(causal=True),
        sizes=sizes((260, 260), (2, 2), (8, 4)),
        dtype="float16",
        inputs={"k": Recipe(period=4)},
        rows=Rows(q=(0, 3, 4, 127, 128, 259), k=(0, 4, 127, 128, 256, 259)),
        flags=("repeated_keys",),
        catches="repeated tokens, for which a running maximum never moves again",
    )
    for name, dtype in (("dominant_key", "float32"), ("dominant_key_bfloat16", "bfloat16")):
        yield Case(
            name=f"numerics/{name}",
            spec=SDPA(),
            sizes=sizes((6, 12), (2, 2), (16, 8)),
            dtype=dtype,
            inputs={
                "q": Recipe(edits=(set_((None, None, None, 0), 8.0),)),
                "k": Recipe(edits=(set_((None, None, None, 0), 0.0), set_((None, None, 7, 0), 64.0))),
            },
            flags=("dominant_key",),
            catches="0/0 or NaN gradients where one key has all the weight: the others are e^-128",
        )
    steps = (set_((None, None, j, 0), 2.0 * n) for n, j in enumerate((64, 129, 300, 512), 1))
    yield Case(
        name="numerics/rising_scores",
        spec=SDPA(),
        sizes=sizes((4, 513), (2, 1), (4, 8)),
        inputs={
            "q": Recipe(edits=(set_((None, None, None, 0), 8.0),)),
            "k": Recipe(edits=(set_((None, None, None, 0), 0.0), *steps)),
        },
        rows=Rows(q=(0, 1, 3), k=(0, 64, 129, 300, 511, 512)),
        flags=("dominant_key",),
        catches="a running maximum that moves in every tile, and the sum or the accumulator not rescaled with it",
    )


def values() -> Iterator[Case]:
    """What the weights are applied to."""
    yield Case(
        name="numerics/one_hot_values",
        spec=SDPA(),
        sizes=sizes((12, 16), (2, 2), (8, 16)),
        inputs={"v": Recipe(kind="one_hot")},
        flags=("one_hot_values",),
        catches="any wrong weight: the output is the matrix of weights",
    )
    yield Case(
        name="numerics/one_hot_values_causal",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((12, 16), (4, 2), (8, 16)),
        dtype="bfloat16",
        inputs={"v": Recipe(kind="one_hot")},
        flags=("one_hot_values",),
        catches="a weight where the mask forbids one: the output must be 0 there",
    )
    yield Case(
        name="numerics/constant_values",
        spec=SDPA(),
        sizes=sizes((5, 7), (1, 1), (4, 2)),
        inputs={"v": Recipe(kind="constant", value=1.5)},
        want=("out", "lse"),
        flags=("constant_values",),
        catches="lost mass: weights that do not sum to 1 (the output is 1.5, an identity that balls only enclose)",
    )
    odd = tuple(range(1, 16, 2))
    for name, dtype, step in (
        ("cancelling_values", "float32", 2.0**-12),
        ("cancelling_values_float16", "float16", 2.0**-6),
    ):
        near = Recipe(
            alternate=True,
            edits=(
                scaled((None, None, odd, None), -1.0),
                set_((None, None, None, 0), 0.0),
                set_((None, None, odd, 0), step),
            ),
        )
        yield Case(
            name=f"numerics/{name}",
            spec=SDPA(),
            sizes=sizes((8, 16), (2, 1)),
            dtype=dtype,
            inputs={"k": near, "v": Recipe(alternate=True)},
            flags=("cancelling_values", "near_ties"),
            catches="values that cancel in pairs: the output shows the difference of weights, 1e-4 or 1e-2 of V",
        )


def ranges() -> Iterator[Case]:
    """The ends of the formats."""
    yield Case(
        name="numerics/subnormal_values",
        spec=SDPA(),
        sizes=sizes((8, 12), (2, 2)),
        dtype="float16",
        inputs={"v": Recipe(exp2=-24)},
        flags=("subnormal",),
        catches="subnormal float16 values flushed to 0",
    )
    yield Case(
        name="numerics/subnormal_queries",
        spec=SDPA(scale=2.0**15),
        sizes=sizes((8, 12), (2, 1)),
        dtype="float16",
        inputs={"q": Recipe(exp2=-24)},
        cotangents={"dout": Recipe(exp2=-24)},
        flags=("subnormal",),
        catches="subnormal float16 queries or cotangents flushed to 0 by the matrix unit",
    )
    yield Case(
        name="numerics/tiny_values",
        spec=SDPA(causal=True),
        sizes=sizes((9, 9), (2, 2), (4, 4)),
        inputs={"v": Recipe(exp2=-118), "q": Recipe(exp2=-7)},
        cotangents={"dout": Recipe(exp2=92)},
        flags=("subnormal",),
        catches="products of tiny values and small weights that underflow when the weights are normalised too late",
    )
    yield Case(
        name="numerics/greatest_values",
        spec=SDPA(),
        sizes=sizes((8, 12), (2, 2)),
        dtype="float16",
        inputs={
            "v": Recipe(
                kind="constant", value=65504.0, alternate=True, edits=(scaled((None, None, (2, 5, 6), (0, 3, 4)), 0.5),)
            )
        },
        cotangents={"dout": Recipe(exp2=-16)},
        flags=("max_finite",),
        catches="a float16 sum of weighted values that overflows before it is divided",
    )
    yield Case(
        name="numerics/product_beyond_float16",
        spec=SDPA(scale=2.0**-16),
        sizes=sizes((8, 12), (2, 1)),
        dtype="float16",
        inputs={"q": Recipe(exp2=0), "k": Recipe(exp2=0)},
        cotangents={"dout": Recipe(exp2=-12)},
        flags=("max_finite",),
        catches="q·k beyond 65504 before the scale brings it back",
    )
    yield Case(
        name="numerics/huge_values",
        spec=SDPA(causal=True),
        sizes=sizes((12, 12), (2, 2), (4, 4)),
        dtype="bfloat16",
        inputs={"v": Recipe(exp2=108)},
        cotangents={"dout": Recipe(exp2=-100)},
        flags=("max_finite",),
        catches="values of 2^116 converted through float16",
    )
    yield Case(
        name="numerics/float64_cancelling",
        spec=SDPA(softcap=3.0),
        sizes=sizes((6, 8), (2, 1), (5, 3)),
        dtype="float64",
        inputs={"sink": Recipe(kind="values", values=(1.0, -2.0)), "v": Recipe(alternate=True)},
        flags=("cancelling_values",),
        catches="a float32 hyperbolic tangent inside a double-precision kernel",
    )
