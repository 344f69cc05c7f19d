"""Golden cases of sigmoid attention: the bias, the order of operations, saturation, and what is masked."""

from __future__ import annotations

from collections.abc import Iterator

from refattn.case import Case, Recipe, Rows
from refattn.variants._case_parts import NAN, attend, head_marks, integers, rows_of, sizes
from refattn.variants.alibi import ALiBi
from refattn.variants.sdpa import SDPA

WANT = ("out", "vjp")
WIDE = Recipe(exp2=-7)


def cases() -> Iterator[Case]:
    """Every row sees several keys, or none."""
    yield Case(
        name="sigmoid/plain",
        spec=SDPA(normalizer="sigmoid", sigmoid_bias=-2.5),
        sizes=sizes((12, 17), (2, 2)),
        inputs={"q": WIDE},
        want=WANT,
        catches="a softmax, or sigmoids divided by their sum, or dS without the factor 1 − p",
    )
    yield Case(
        name="sigmoid/minus_log_of_the_keys",
        spec=SDPA(normalizer="sigmoid", sigmoid_bias="keys", causal=True),
        sizes=sizes((33, 33), (4, 2), (8, 5)),
        dtype="bfloat16",
        inputs={"q": WIDE, "v": head_marks(2)},
        want=WANT,
        flags=("distinct_heads",),
        catches="no bias, or −ln(i + 1) of the keys that a row sees where −ln Lk is asked",
    )
    yield Case(
        name="sigmoid/softcap_bias_and_mask",
        spec=SDPA(normalizer="sigmoid", sigmoid_bias=-1.75, softcap=1.5),
        sizes=sizes((10, 14), (2, 1)),
        dtype="float16",
        inputs={
            "q": WIDE,
            "bias": Recipe(exp2=-7, shape=(1, 2, 10, 14)),
            "mask": attend(1, 1, 10, 14, true=160, hidden=((0, 0, 4, None),)),
        },
        want=WANT,
        flags=("fully_masked_rows",),
        catches="the sigmoid's bias inside the cap, or masked pairs that keep the weight sigmoid(−c + b)",
    )
    yield Case(
        name="sigmoid/alibi_and_keep_mask",
        spec=SDPA(normalizer="sigmoid", sigmoid_bias=-0.5, causal=True, bias=(ALiBi(),), keep_probability=0.75),
        sizes=sizes((19, 19), (4, 2)),
        inputs={"keep": Recipe(kind="bernoulli", true=192)},
        want=WANT,
        flags=("alibi",),
        catches="weights dropped before the sigmoid, or ALiBi in its absolute form, which only softmax forgives",
    )
    yield Case(
        name="sigmoid/saturated",
        spec=SDPA(normalizer="sigmoid", sigmoid_bias=3.0),
        sizes=sizes((8, 24), (1, 1)),
        inputs={"q": Recipe(exp2=-4), "k": Recipe(exp2=-5)},
        want=WANT,
        seed=3,
        flags=("large_scores",),
        catches="1/(1 + exp(−s)) whose exponential overflows backwards: inf · 0 in the gradients of far keys",
    )
    yield Case(
        name="sigmoid/poisoned_padding",
        spec=SDPA(normalizer="sigmoid", sigmoid_bias=-1.0, causal="bottom_right"),
        sizes=sizes((6, 16), (2, 1), batch=2),
        inputs={
            "k": rows_of(Recipe(), (13, 14, 15), NAN),
            "v": rows_of(Recipe(), (13, 14, 15), NAN),
            "kv_lengths": integers(13, 9),
        },
        want=WANT,
        flags=("poison",),
        catches="weights of masked pairs that are 0 only after they have met a NaN",
    )
    yield Case(
        name="sigmoid/beyond_a_tile",
        spec=SDPA(normalizer="sigmoid", sigmoid_bias="keys"),
        sizes=sizes((7, 257), (2, 1), (8, 4)),
        dtype="bfloat16",
        inputs={"q": WIDE},
        want=WANT,
        rows=Rows(q=(0, 3, 6), k=(0, 63, 64, 128, 255, 256)),
        catches="the one key beyond a tile of 256 dropped, or tiles merged by an lse that sigmoids do not have",
    )
    yield Case(
        name="sigmoid/float64",
        spec=SDPA(normalizer="sigmoid", sigmoid_bias=0.1, scale=0.7),
        sizes=sizes((9, 7), (2, 1)),
        dtype="float64",
        want=WANT,
        catches="the bias rounded to float32, or a sigmoid by a tanh that keeps no small weight",
    )
