"""Golden cases of ALiBi.

Seed 2 stands where seed 1 draws equal components in the only two keys of a row: exact answers that balls only enclose.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

from refattn.case import NORMAL, Case, Flag, Recipe, Rows
from refattn.variants._case_parts import NAN, attend, edited, flagged, integers, numbers, rows_of, scaled, sizes
from refattn.variants._sdpa_cases import option_flags
from refattn.variants.alibi import ALiBi
from refattn.variants.sdpa import SDPA

FLAGS: Mapping[str, Flag] = {
    "alibi": Flag(
        "Linear biases from distances, not scaled.",
        (
            "TensorRT-Model-Connect#32",
            "TensorRT-Model-Connect#667",
            "transformers#29946",
            "vllm#945",
            "flash-attention#907",
        ),
    ),
    "heads_not_power_of_two": Flag(
        "Slopes by rule for a number of heads that is no power of two.",
        (
            "attention_with_linear_biases#17",
            "mlx#343",
            "mlx#3071",
            "TensorRT-LLM#1611",
            "transformers#28380",
            "Baichuan2#225",
            "aprender#2143",
            "examples#307",
        ),
    ),
    "geometric_slopes": Flag("The paper's sentence, m = 2^(−8h/n), for every n.", ("Baichuan2#225",)),
    "explicit_slopes": Flag("Slopes that are given.", ("flashinfer#5101",)),
    "learned_slopes": Flag("Slopes as inputs with gradients."),
    "alibi_both_sides": Flag("Biases on keys before and after the query.", ("attention_with_linear_biases#5",)),
    "alibi_half": Flag("Half the heads look back, half look ahead.", ("attention_with_linear_biases#5",)),
    "alibi_two_sided": Flag(
        "Different slopes for keys before and after the query.", ("attention_with_linear_biases#5",)
    ),
}


def cases() -> Iterator[Case]:
    """Both slope rules and learned slopes, every direction, both alignments, beside every other option."""
    for case in flagged(chain(slopes(), directions(), places(), together(), long())):
        whole = SDPA(causal=True, bias=(case.spec,)) if isinstance(case.spec, ALiBi) else case.spec
        yield replace(case, flags=(*case.flags, *option_flags(whole, case.sizes), *bias_flags(whole, case.sizes)))


def bias_flags(spec: Any, sizes: Mapping[str, int]) -> Iterator[str]:
    """What an ALiBi's own fields say of a case."""
    alibi, heads = spec.bias[0], sizes["Hq"]
    present = {
        "alibi": True,
        "alibi_both_sides": not spec.causal,
        "alibi_half": alibi.direction == "half",
        "alibi_two_sided": alibi.direction == "two_sided",
        "geometric_slopes": alibi.slopes == "geometric",
        "learned_slopes": alibi.slopes == "learned",
        "explicit_slopes": isinstance(alibi.slopes, tuple),
        "heads_not_power_of_two": isinstance(alibi.slopes, str)
        and alibi.slopes != "learned"
        and heads & (heads - 1) > 0,
    }
    return (name for name, holds in present.items() if holds)


def slopes() -> Iterator[Case]:
    """The slopes of 1 to 40 heads by either rule, given, or learned."""
    yield Case(
        name="alibi/twelve_heads_over_four",
        spec=ALiBi(),
        sizes=sizes((12, 12), (12, 4), (8, 4)),
        dtype="bfloat16",
        catches="geometric slopes where the authors' interleave, and a wrong key head",
    )
    for name, heads, length, widths, dtype, what in (
        ("two_heads", (2, 2), 65, (5, 4), "bfloat16", "the bias multiplied by the scale, as Falcon does"),
        ("three_heads", (3, 3), 17, (8, 8), "float32", "slopes 2^(-8h/3) for the authors' 2^-4, 2^-8, 2^-2"),
        ("six_heads_over_two", (6, 2), 23, (5, 7), "float16", "slopes indexed by key head"),
        ("eight_heads_over_one", (8, 1), 17, (8, 4), "bfloat16", "one slope for all heads of the shared key head"),
        ("sixteen_heads", (16, 16), 9, (4, 4), "float32", "slopes 2^-1/2, 2^-1, ... rounded, or off by one head"),
        ("forty_heads", (40, 40), 12, (4, 4), "float32", "the last 8 of 40 heads continued instead of 2^-1/8, 2^-3/8"),
    ):
        yield Case(
            name=f"alibi/{name}",
            spec=ALiBi(),
            sizes=sizes((length, length), heads, widths),
            dtype=dtype,
            want=("out", "lse", "vjp") if heads[0] < 40 else ("out", "lse"),
            catches=what,
        )
    yield Case(
        name="alibi/one_head_257",
        spec=ALiBi(),
        sizes=sizes((257, 257), (1, 1), (8, 4)),
        rows=Rows(q=(0, 1, 127, 128, 255, 256), k=(0, 1, 127, 128, 255, 256)),
        catches="slope 1 or 1/2 for one head, whose slope is 2^-8",
    )
    yield Case(
        name="alibi/geometric_twelve",
        spec=ALiBi(slopes="geometric"),
        sizes=sizes((9, 9), (12, 1), (4, 8)),
        catches="interleaved slopes where the paper's sentence is asked",
    )
    yield Case(
        name="alibi/learned",
        spec=ALiBi(slopes="learned"),
        sizes=sizes((16, 16), (4, 2)),
        inputs={"slopes": numbers(0.5, 0.0625, 1.25, -0.125)},
        cotangents={"dlse": Recipe()},
        seed=2,
        catches="the slopes' gradient with the wrong sign or without the softmax's own; a negative slope refused",
    )
    yield Case(
        name="alibi/learned_300",
        spec=ALiBi(slopes="learned"),
        sizes=sizes((300, 300), (2, 2), (8, 4)),
        dtype="bfloat16",
        inputs={"slopes": numbers(0.03125, 0.00390625)},
        rows=Rows(q=(0, 1, 128, 256, 299), k=(0, 128, 255, 299)),
        seed=2,
        catches="the slopes' gradient, a sum of distances times dS, accumulated in bfloat16",
    )
    yield Case(
        name="alibi/explicit",
        spec=ALiBi(slopes=(0.0, 0.75, 0.1)),
        sizes=sizes((15, 15), (3, 1)),
        dtype="float16",
        catches="given slopes replaced by the rule's; slope 0 taken as 'not given'",
    )


def directions() -> Iterator[Case]:
    """Keys on both sides of the query."""
    yield Case(
        name="alibi/symmetric",
        spec=SDPA(bias=(ALiBi(),)),
        sizes=sizes((12, 12), (4, 4)),
        catches="−m(i − j), which rewards keys after the query, where the distance |i − j| is meant",
    )
    yield Case(
        name="alibi/symmetric_9x24",
        spec=SDPA(bias=(ALiBi(),)),
        sizes=sizes((9, 24), (4, 2), (8, 5)),
        dtype="bfloat16",
        cotangents={"dlse": Recipe()},
        catches="distances |i − j| where the queries are the last 9 of 24 positions",
    )
    yield Case(
        name="alibi/half",
        spec=SDPA(bias=(ALiBi(direction="half"),)),
        sizes=sizes((16, 16), (8, 8), (4, 4)),
        catches="slopes of 8 heads where each half has those of 4, or halves that look the same way",
    )
    yield Case(
        name="alibi/half_of_six_257",
        spec=SDPA(bias=(ALiBi(direction="half"),)),
        sizes=sizes((257, 257), (6, 3), (4, 4)),
        dtype="float16",
        rows=Rows(q=(0, 1, 128, 255, 256), k=(0, 1, 128, 256)),
        catches="heads 3 to 5, which look forward, skipped with the tiles above the diagonal",
    )
    yield Case(
        name="alibi/two_sided",
        spec=SDPA(bias=(ALiBi(slopes=(0.25, 0.0625), slopes_right=(0.5, 0.015625), direction="two_sided"),)),
        sizes=sizes((16, 20), (2, 1)),
        dtype="float16",
        catches="left and right slopes exchanged, or one used for both sides",
    )
    yield Case(
        name="alibi/two_sided_learned",
        spec=SDPA(bias=(ALiBi(slopes="learned", direction="two_sided"),)),
        sizes=sizes((17, 17), (2, 2)),
        inputs={"slopes": numbers(0.25, 1.0), "slopes_right": numbers(0.75, 0.125)},
        catches="gradients of the left and the right slopes mixed",
    )


def places() -> Iterator[Case]:
    """Where the queries stand."""
    alignments: tuple[tuple[Literal["top_left", "bottom_right"], int, int, str, str], ...] = (
        ("top_left", 12, 20, "float32", "distances counted from the bottom right"),
        ("bottom_right", 12, 20, "float16", "distances counted from the top left"),
        ("top_left", 20, 12, "bfloat16", "rows beyond the last key, whose distances go on growing"),
        ("bottom_right", 20, 12, "float32", "NaN in the first rows, which see nothing"),
    )
    for align, lq, lk, dtype, what in alignments:
        yield Case(
            name=f"alibi/{align}_{lq}x{lk}",
            spec=SDPA(causal=align, bias=(ALiBi(),)),
            sizes=sizes((lq, lk), (2, 2)),
            dtype=dtype,
            cotangents={"dlse": Recipe()},
            inputs={"sink": numbers(1.0, -0.5)},
            catches=what,
        )
    yield Case(
        name="alibi/decode_513",
        spec=SDPA(causal="bottom_right", bias=(ALiBi(),)),
        sizes=sizes((1, 513), (4, 2), (8, 4)),
        dtype="bfloat16",
        rows=Rows(q=(0,), k=(0, 1, 255, 256, 511, 512)),
        catches="a bias built from the number of queries: 0 for a single one",
    )
    far = 2**24
    yield Case(
        name="alibi/far_positions",
        spec=SDPA(causal="bottom_right", bias=(ALiBi(slopes=(0.5, 0.3)),)),
        sizes=sizes((6, 12), (2, 1)),
        inputs={
            "q_positions": integers(*(far + i for i in (5, 6, 7, 9, 11, 12))),
            "k_positions": integers(*(far + j for j in (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11))),
        },
        flags=("position_edges",),
        catches="positions in float32 beyond 2^24, or the absolute form +m·j, which loses the distance there",
    )
    tree = ((0,), (0, 1), (0, 2), (0, 1, 3), (0, 1, 4), (0, 2, 5))
    unseen = (tuple(8 + j for j in range(6) if j not in seen) for seen in tree)
    yield Case(
        name="alibi/draft_tree",
        spec=SDPA(bias=(ALiBi(slopes=(0.5, 0.125, 0.25, 1.0)),)),
        sizes=sizes((6, 14), (4, 2)),
        dtype="float16",
        inputs={
            "q_positions": integers(8, 9, 9, 10, 10, 10),
            "k_positions": integers(*range(8), 8, 9, 9, 10, 10, 10),
            "mask": attend(1, 1, 6, 14, true=256, hidden=((0, 0, i, keys) for i, keys in enumerate(unseen))),
        },
        catches="siblings of a draft tree, which stand at one position, told apart or attending to each other",
    )
    yield Case(
        name="alibi/scattered_positions",
        spec=SDPA(bias=(ALiBi(slopes=(0.25, 0.03125)),)),
        sizes=sizes((5, 9), (2, 2), (8, 4), batch=2),
        dtype="float16",
        inputs={
            "q_positions": Recipe(kind="values", values=(0, 50, 7, 23, 99, 3, 3, 60, 10, 41), shape=(2, 5)),
            "k_positions": integers(2, 90, 14, 33, 5, 61, 48, 77, 20),
        },
        catches="distances between indices where positions are given, or those of the first sequence for all",
    )
    yield Case(
        name="alibi/padding",
        spec=SDPA(causal="bottom_right", bias=(ALiBi(),)),
        sizes=sizes((4, 12), (2, 1), (8, 4), batch=2),
        dtype="bfloat16",
        inputs={
            "kv_lengths": integers(12, 7),
            "k": rows_of(NORMAL, (7, 11), NAN, batch=1),
            "v": rows_of(NORMAL, (7, 11), NAN, batch=1),
            "sink": numbers(0.5, 1.5),
        },
        flags=("poison",),
        catches="distances counted from the end of the array instead of the end of the sequence",
    )


def together() -> Iterator[Case]:
    """Beside every other option."""
    yield Case(
        name="alibi/sink",
        spec=SDPA(causal=True, bias=(ALiBi(slopes=(0.5, 0.25)),)),
        sizes=sizes((288, 288), (2, 2), (8, 4)),
        dtype="bfloat16",
        inputs={"sink": numbers(1.5, 0.5)},
        cotangents={"dlse": Recipe()},
        rows=Rows(q=(0, 1, 23, 127, 128, 287), k=(0, 22, 23, 126, 128, 287)),
        catches="the absolute form +m·j, equal to −m(i − j) only without a sink and without lse",
    )
    yield Case(
        name="alibi/softcap",
        spec=SDPA(softcap=1.5, bias=(ALiBi(),)),
        sizes=sizes((12, 12), (4, 2)),
        dtype="float16",
        inputs={"q": Recipe(exp2=-7)},
        catches="the bias capped with the scores",
    )
    yield Case(
        name="alibi/scale_and_bias",
        spec=SDPA(causal=True, scale=0.125, bias=(ALiBi(),)),
        sizes=sizes((13, 13), (2, 2), (40, 8)),
        inputs={"bias": Recipe(shape=(1, 1, 13, 13))},
        seed=2,
        catches="slopes multiplied by the scale: 8 times too small; or a dense bias that replaces the linear one",
    )
    yield Case(
        name="alibi/mask_and_segments",
        spec=SDPA(causal=True, bias=(ALiBi(),)),
        sizes=sizes((20, 20), (4, 2)),
        dtype="bfloat16",
        inputs={
            "mask": attend(1, 4, 1, 20, true=208),
            "q_segment_ids": integers(*(0,) * 8 + (1,) * 12),
            "k_segment_ids": integers(*(0,) * 8 + (1,) * 12),
            "sink": numbers(0.0, 1.0, -1.0, 0.5),
        },
        catches="distances restarted in every segment for keys alone; a bias that uncovers hidden keys",
    )
    yield Case(
        name="alibi/float64",
        spec=ALiBi(),
        sizes=sizes((9, 9), (3, 3), (5, 4)),
        dtype="float64",
        seed=2,
        catches="a bias matrix built in float32 beside double-precision scores",
    )


def long() -> Iterator[Case]:
    """Distances that 16 bits do not hold."""
    yield Case(
        name="alibi/bfloat16_distances_1025",
        spec=ALiBi(slopes=(0.015625, 0.00390625)),
        sizes=sizes((1025, 1025), (2, 1), (8, 4)),
        dtype="bfloat16",
        inputs={"v": edited(NORMAL, scaled((None, None, (511, 512, 770, 771), None), 16.0))},
        rows=Rows(q=(255, 257, 771, 1023, 1024), k=(0, 255, 511, 512, 770, 1024)),
        flags=("position_edges",),
        catches="distances or +m·j in bfloat16, which gives neighbouring keys the same bias beyond 256",
    )
    yield Case(
        name="alibi/float16_distances_2304",
        spec=ALiBi(slopes=(0.001953125, 0.5)),
        sizes=sizes((2304, 2304), (2, 2), (4, 4)),
        dtype="float16",
        inputs={"v": edited(NORMAL, scaled((None, None, (0, 1, 2, 3), None), 256.0))},
        cotangents={"dout": Recipe(exp2=-12)},
        rows=Rows(q=(2047, 2048, 2050, 2303), k=(0, 1, 2, 3, 2301, 2303)),
        flags=("position_edges",),
        catches="distances in float16, which are rounded beyond 2048",
    )
    yield Case(
        name="alibi/twelve_heads_2049",
        spec=ALiBi(),
        sizes=sizes((2049, 2049), (12, 3), (4, 4)),
        dtype="bfloat16",
        rows=Rows(q=(1, 2048), k=(0, 1024, 2040, 2048)),
        catches="slopes and key heads right at short lengths and permuted by a tile scheduler at long ones",
    )
    yield Case(
        name="alibi/symmetric_1023",
        spec=SDPA(bias=(ALiBi(slopes=(0.0625, 0.0078125)),), window=(300, 200)),
        sizes=sizes((1023, 1023), (2, 2), (4, 4)),
        rows=Rows(q=(0, 200, 201, 300, 301, 822, 1022), k=(0, 1, 200, 201, 501, 822, 1022)),
        inputs={"v": edited(NORMAL, scaled((None, None, (0, 1, 400, 401, 500, 501), None), 2.0**14))},
        catches="a window's far edge under a bias that makes it light: values of 2^14 stand there",
    )
    yield Case(
        name="alibi/window_512",
        spec=SDPA(causal=True, window=(127, 0), bias=(ALiBi(),)),
        sizes=sizes((512, 512), (4, 2), (8, 4)),
        dtype="float16",
        rows=Rows(q=(0, 127, 128, 255, 511), k=(0, 1, 128, 384, 385, 511)),
        catches="tiles skipped by the window while the bias is still counted from their start",
    )
