"""Golden cases of what is done to the scores: scale, softcap, bias, sink, and weights that are dropped."""

from __future__ import annotations

from collections.abc import Iterator

from refattn.case import Case, Recipe, Rows
from refattn.variants._case_parts import HUGE, attend, edited, integers, numbers, set_, sizes
from refattn.variants.sdpa import SDPA

WIDE = Recipe(exp2=-7)
"""Normal with standard deviation 2: scores of the size of a cap or a sink."""


def cases() -> Iterator[Case]:
    """Topic by topic."""
    yield from scales()
    yield from softcaps()
    yield from biases()
    yield from sinks()
    yield from keeps()


def scales() -> Iterator[Case]:
    """A scale that is not D^-1/2."""
    for name, scale, width, dtype, what in (
        ("explicit", 0.1875, 16, "bfloat16", "the default D^-1/2 used although a scale is given"),
        ("decimal", 0.3, 5, "float32", "a scale rounded to 16 bits, or split as √scale on q and k in 16 bits"),
        ("one", 1.0, 8, "float16", "scale 1 taken as 'not given'"),
    ):
        yield Case(
            name=f"scale/{name}",
            spec=SDPA(scale=scale, causal=True),
            sizes=sizes((15, 15), (2, 1), (width, 8)),
            dtype=dtype,
            catches=what,
        )


def softcaps() -> Iterator[Case]:
    """Every row sees at least two keys, or none: a capped single score is exact but not computed exactly."""
    yield Case(
        name="softcap/plain",
        spec=SDPA(softcap=2.5),
        sizes=sizes((12, 17), (2, 2)),
        inputs={"q": WIDE},
        catches="the cap left out, applied before the scale, or its slope 1 − tanh² missing from the gradients",
    )
    yield Case(
        name="softcap/masked",
        spec=SDPA(softcap=2.0),
        sizes=sizes((9, 257), (4, 2), (8, 4)),
        dtype="bfloat16",
        inputs={"q": WIDE, "mask": attend(1, 1, 9, 257, true=96, hidden=((0, 0, 4, None),))},
        rows=Rows(q=tuple(range(9)), k=(0, 1, 128, 255, 256)),
        flags=("fully_masked_rows",),
        catches="the cap applied after the mask: hidden keys come back with score −c",
    )
    yield Case(
        name="softcap/with_bias",
        spec=SDPA(softcap=1.5),
        sizes=sizes((10, 14), (2, 1)),
        inputs={"bias": Recipe(exp2=-7, shape=(1, 2, 10, 14))},
        catches="the bias added before the cap",
    )
    yield Case(
        name="softcap/with_sink",
        spec=SDPA(softcap=2.0, causal=True),
        sizes=sizes((16, 16), (2, 2)),
        dtype="float16",
        inputs={"q": WIDE, "sink": numbers(3.5, -0.75)},
        cotangents={"dlse": Recipe()},
        catches="the sink capped with the scores",
    )
    yield Case(
        name="softcap/window_of_a_cache",
        spec=SDPA(softcap=3.0, causal="bottom_right", window=(70, 0)),
        sizes=sizes((130, 321), (4, 2), (8, 4)),
        dtype="bfloat16",
        inputs={"q": WIDE},
        rows=Rows(q=(0, 1, 63, 64, 128, 129), k=(121, 122, 191, 192, 255, 256, 320)),
        catches="keys outside the window that come back at −c, as in Gemma 2's sliding layers",
    )


def biases() -> Iterator[Case]:
    """Additive terms of every broadcast shape with their gradients, and masks written as numbers."""
    b, h, lq, lk = 2, 4, 7, 10
    for name, shape, dtype, what in (
        ("whole", (b, h, lq, lk), "float32", "the bias multiplied by the scale"),
        ("shared_by_batch", (1, h, lq, lk), "bfloat16", "dbias of one sequence where all are summed"),
        ("shared_by_head", (b, 1, lq, lk), "float16", "dbias of one head where all are summed"),
        ("keys_by_head", (h, 1, lk), "float32", "a bias along the keys added along the queries"),
    ):
        yield Case(
            name=f"bias/{name}",
            spec=SDPA(),
            sizes=sizes((lq, lk), (h, 2), (8, 4), batch=b),
            dtype=dtype,
            inputs={"bias": Recipe(shape=shape)},
            catches=what,
        )
    yield Case(
        name="bias/one_a_row_with_sink",
        spec=SDPA(),
        sizes=sizes((8, 8), (2, 2)),
        inputs={"bias": Recipe(shape=(1, 2, 8, 1)), "sink": numbers(0.5, -1.0)},
        cotangents={"dlse": Recipe()},
        catches="a bias constant along the row dropped 'because softmax ignores it': not beside a sink, and not in lse",
    )
    yield Case(
        name="bias/infinite",
        spec=SDPA(),
        sizes=sizes((9, 12), (2, 1)),
        inputs={"bias": Recipe(kind="bernoulli", shape=(1, 2, 9, 12), edits=(set_((0, 1, 4, None), -float("inf")),))},
        flags=("infinite_bias", "fully_masked_rows"),
        catches="−∞ minus −∞ in a row that is all −∞",
    )
    yield Case(
        name="bias/finite_mask",
        spec=SDPA(),
        sizes=sizes((9, 12), (2, 2)),
        dtype="bfloat16",
        inputs={"bias": Recipe(kind="bernoulli", otherwise=-HUGE, true=160, shape=(1, 1, 1, 12))},
        flags=("finite_mask",),
        catches="a mask written as −1e30 that overflows when multiplied by the scale or log₂ e",
    )
    yield Case(
        name="bias/dtype_min",
        spec=SDPA(causal=True),
        sizes=sizes((12, 12), (2, 1)),
        dtype="float16",
        inputs={
            "bias": Recipe(
                kind="bernoulli", otherwise=-65504.0, shape=(1, 1, 1, 12), edits=(set_((0, 0, 0, (0, 1)), 0.0),)
            )
        },
        flags=("finite_mask",),
        catches="score plus the least float16 number overflowing to −∞, or NaN after the maximum is taken",
    )
    yield Case(
        name="bias/dtype_min_whole_row",
        spec=SDPA(),
        sizes=sizes((6, 9), (2, 2), (8, 4)),
        dtype="float16",
        inputs={"bias": Recipe(kind="constant", shape=(1, 1, 6, 9), edits=(set_((0, 0, (1, 4), None), -65504.0),))},
        cotangents={"dlse": Recipe(exp2=-10)},
        flags=("finite_mask",),
        catches="a row of finite 'masks' answered with 0 or with the mean of V: it is the softmax of its scores",
    )
    yield Case(
        name="bias/causal_257",
        spec=SDPA(causal=True),
        sizes=sizes((257, 257), (2, 1), (8, 4)),
        dtype="bfloat16",
        inputs={"bias": Recipe(shape=(1, 2, 1, 257))},
        rows=Rows(q=(0, 1, 127, 128, 255, 256), k=(0, 1, 127, 128, 255, 256)),
        catches="a bias tile read one column off behind the first tile; dbias summed in 16 bits",
    )


def sinks() -> Iterator[Case]:
    """Logits far from 0, different in every head."""
    yield Case(
        name="sink/plain",
        spec=SDPA(),
        sizes=sizes((12, 16), (4, 2)),
        inputs={"sink": numbers(2.0, -1.5, 0.625, 3.25)},
        cotangents={"dlse": Recipe()},
        catches="the sink ignored, scaled with the scores, or left out of lse; dsink without the share of lse",
    )
    yield Case(
        name="sink/large",
        spec=SDPA(causal=True),
        sizes=sizes((259, 259), (2, 1), (8, 4)),
        dtype="bfloat16",
        inputs={"sink": numbers(12.0, 9.5)},
        rows=Rows(q=(0, 1, 127, 128, 255, 256, 258), k=(0, 1, 127, 128, 256, 258)),
        catches="a sink above every score left out of the maximum",
    )
    yield Case(
        name="sink/negative",
        spec=SDPA(causal=True),
        sizes=sizes((17, 17), (2, 2)),
        inputs={"sink": numbers(-6.0, -3.0)},
        catches="a sink read as its absolute value or as 0: it still takes e^-6",
    )
    yield Case(
        name="sink/zero",
        spec=SDPA(),
        sizes=sizes((8, 5), (2, 2)),
        dtype="float16",
        inputs={"sink": numbers(0.0, 0.0)},
        catches="softmax-off-by-one without its one: logit 0 is a weight of 1, not an absence",
    )
    yield Case(
        name="sink/empty_rows",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((14, 9), (4, 4), (8, 4)),
        inputs={"sink": numbers(1.0, -2.0, 0.5, 4.0)},
        cotangents={"dlse": Recipe()},
        catches="lse −∞ in a row that sees only its sink: out is 0, lse the sink, and dsink the cotangent of lse",
    )
    yield Case(
        name="sink/window",
        spec=SDPA(causal=True, window=(31, 0)),
        sizes=sizes((300, 300), (8, 2), (8, 4)),
        dtype="bfloat16",
        inputs={"sink": numbers(1.0, -1.0, 2.0, 0.5, 3.0, -2.0, 1.5, 2.5)},
        rows=Rows(q=(0, 31, 32, 128, 299), k=(0, 1, 32, 97, 128, 299)),
        catches="the sink of a key head used for its query heads, or counted once a tile",
    )
    yield Case(
        name="sink/split_keys",
        spec=SDPA(causal="bottom_right"),
        sizes=sizes((1, 1025), (2, 1), (16, 16)),
        dtype="float16",
        inputs={"sink": numbers(7.0, 6.0)},
        rows=Rows(q=(0,), k=(0, 511, 512, 1023, 1024)),
        catches="the sink counted once for every part of a split key range",
    )


def keeps() -> Iterator[Case]:
    """Dropout as a given mask. Beside causal the probability is a power of two: a row's only key stays exact."""
    yield Case(
        name="keep/causal_half",
        spec=SDPA(causal=True, keep_probability=0.5),
        sizes=sizes((15, 15), (2, 1)),
        inputs={"keep": Recipe(kind="bernoulli", true=128, shape=(1, 2, 15, 15))},
        catches="weights renormalised after the drop, or the drop applied before the softmax",
    )
    yield Case(
        name="keep/seven_eighths",
        spec=SDPA(keep_probability=0.875),
        sizes=sizes((9, 13), (4, 2), (8, 5)),
        dtype="bfloat16",
        inputs={"keep": Recipe(kind="bernoulli", true=224, edits=(set_((0, 0, 3, None), 0.0),))},
        catches="division by 1 − p for p, or dS built from the dropped weights",
    )
    yield Case(
        name="keep/sink_and_mask",
        spec=SDPA(keep_probability=0.75),
        sizes=sizes((8, 12), (2, 2)),
        dtype="float16",
        inputs={
            "keep": Recipe(kind="bernoulli", true=192, shape=(1, 2, 8, 12)),
            "sink": numbers(1.0, -0.5),
            "mask": edited(attend(1, 1, 8, 12), set_((0, 0, None, (2, 3, 7)), 1.0)),
        },
        catches="the sink dropped with the weights, or lse taken after the drop",
    )
    yield Case(
        name="keep/everything_at_once",
        spec=SDPA(causal="bottom_right", window=(40, 0), softcap=4.0, scale=0.375, keep_probability=0.5),
        sizes=sizes((65, 257), (4, 2), (5, 4), batch=2),
        inputs={
            "q": WIDE,
            "keep": Recipe(kind="bernoulli", true=128, shape=(1, 1, 1, 257)),
            "sink": numbers(2.0, -1.0, 0.5, 1.0),
            "bias": Recipe(shape=(1, 4, 1, 257)),
            "kv_lengths": integers(257, 131),
        },
        cotangents={"dlse": Recipe()},
        rows=Rows(q=(0, 1, 63, 64), k=(64, 90, 129, 130, 131, 192, 193, 256)),
        catches="an order of operations that is right for every option alone",
    )
