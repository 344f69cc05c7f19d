"""Named problems of masked attention, each with the feature its name says, and the arrays that go with it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import refattn as ra


class Sizes(NamedTuple):
    B: int = 2
    Hq: int = 4
    Hkv: int = 2
    Lq: int = 5
    Lk: int = 7
    D: int = 3
    Dv: int = 5


class Problem(NamedTuple):
    spec: ra.SDPA
    sizes: Sizes = Sizes()
    extras: tuple[str, ...] = ()


def _dense(rng, *shape):
    return np.where(rng.random(shape) < 0.3, -np.inf, rng.standard_normal(shape))


def _mask(rng, s):
    mask = rng.random((s.B, 1, s.Lq, s.Lk)) < 0.7
    mask[:, :, :1] = False
    return {"mask": mask}


def _segments_of_keys(rng, s):
    return {"q_segment_ids": rng.integers(0, 2, s.Lq), "k_segment_ids": rng.integers(0, 2, (s.B, s.Lk))}


def _segments(rng, s):
    return {"q_segment_ids": rng.integers(0, 3, (s.B, s.Lq)), "k_segment_ids": rng.integers(1, 4, (1, s.Lk))}


EXTRAS: dict[str, Callable[[Any, Sizes], dict[str, Any]]] = {
    "bias": lambda rng, s: {"bias": _dense(rng, s.B, s.Hq, s.Lq, s.Lk)},
    "bias of a head": lambda rng, s: {"bias": _dense(rng, s.Hq, 1, s.Lk)},
    "bias of a batch": lambda rng, s: {"bias": _dense(rng, s.B, 1, s.Lq, 1)},
    "bias of a pair": lambda rng, s: {"bias": _dense(rng, s.Lq, s.Lk)},
    "scalar bias": lambda rng, s: {"bias": rng.standard_normal(())},
    "mask": _mask,
    "mask of a head": lambda rng, s: {"mask": rng.random((s.Hq, 1, s.Lk)) < 0.7},
    "mask of nothing": lambda rng, s: {"mask": np.zeros((1, 1), bool)},
    "sink": lambda rng, s: {"sink": rng.standard_normal(s.Hq)},
    "q_lengths": lambda rng, s: {"q_lengths": rng.integers(0, s.Lq + 1, s.B)},
    "kv_lengths": lambda rng, s: {"kv_lengths": rng.integers(0, s.Lk + 1, s.B)},
    "q_positions": lambda rng, s: {"q_positions": rng.integers(-3, s.Lk + 3, (s.B, s.Lq))},
    "k_positions": lambda rng, s: {"k_positions": rng.integers(-3, s.Lk + 3, s.Lk)},
    "k_positions of a batch": lambda rng, s: {"k_positions": rng.integers(-3, s.Lk + 3, (s.B, s.Lk))},
    "segments": _segments,
    "segments of keys": _segments_of_keys,
    "keep": lambda rng, s: {"keep": rng.random((s.B, s.Hq, s.Lq, s.Lk)) < 0.8},
    "keep of a key": lambda rng, s: {"keep": rng.random((1, 1, s.Lk)) < 0.8},
    "slopes": lambda rng, s: {"slopes": rng.random(s.Hq)},
    "slopes_right": lambda rng, s: {"slopes_right": rng.standard_normal(s.Hq)},
    "t5_table": lambda rng, s: {"t5_table": rng.standard_normal((8, s.Hq))},
}


def arrays(problem, rng, dtype=np.float64):
    """The problem's inputs and cotangents of out and lse, in a dtype."""
    s = problem.sizes
    x = {"q": (s.B, s.Hq, s.Lq, s.D), "k": (s.B, s.Hkv, s.Lk, s.D), "v": (s.B, s.Hkv, s.Lk, s.Dv)}
    inputs = {name: rng.standard_normal(shape) for name, shape in x.items()}
    for extra in problem.extras:
        inputs |= EXTRAS[extra](rng, s)
    real = {n: a.astype(dtype) if a.dtype == np.float64 else a for n, a in inputs.items()}
    outputs = {"out": (s.B, s.Hq, s.Lq, s.Dv), "lse": (s.B, s.Hq, s.Lq)}
    return real, {name: rng.standard_normal(shape).astype(dtype) for name, shape in outputs.items()}


def _alibi(**options):
    return ra.SDPA(causal=options.pop("causal", "bottom_right"), bias=ra.ALiBi(**options))


def _alibi_interpolation(**options):
    return ra.SDPA(causal=options.pop("causal", "bottom_right"), bias=ra.ALiBiInterpolation(**options))


OF_TERMS = ("slopes", "t5_table")
LEARNED = {"symmetric": ("slopes",), "half": ("slopes",), "two_sided": ("slopes", "slopes_right")}
NUMBERS = (0.5, 0.25, 0.0, -0.125)

PROBLEMS = {
    "plain": Problem(ra.SDPA()),
    "one key": Problem(ra.SDPA(), Sizes(Lk=1)),
    "one query": Problem(ra.SDPA(causal="bottom_right"), Sizes(Lq=1, Lk=17)),
    "no key": Problem(ra.SDPA(), Sizes(Lk=0)),
    "no key, a sink": Problem(ra.SDPA(), Sizes(Lk=0), ("sink",)),
    "no query": Problem(ra.SDPA(causal="top_left"), Sizes(Lq=0)),
    "no batch": Problem(ra.SDPA(), Sizes(B=0)),
    "no width": Problem(ra.SDPA(), Sizes(D=0)),
    "no value width": Problem(ra.SDPA(), Sizes(Dv=0)),
    "lengths around 16": Problem(ra.SDPA(causal="bottom_right"), Sizes(1, 2, 2, 15, 17, 7, 9)),
    "lengths around 32": Problem(ra.SDPA(causal="top_left"), Sizes(1, 1, 1, 33, 31, 16, 8)),
    "one head each": Problem(ra.SDPA(), Sizes(Hq=3, Hkv=3)),
    "one key head": Problem(ra.SDPA(), Sizes(Hq=3, Hkv=1)),
    "scale": Problem(ra.SDPA(scale=-1.5)),
    "scale 0": Problem(ra.SDPA(scale=0.0)),
    "softcap": Problem(ra.SDPA(softcap=0.75, scale=2.0)),
    "causal top left": Problem(ra.SDPA(causal="top_left")),
    "causal bottom right": Problem(ra.SDPA(causal="bottom_right")),
    "causal, more queries than keys": Problem(ra.SDPA(causal="bottom_right"), Sizes(Lq=9, Lk=4)),
    "causal top left, more queries": Problem(ra.SDPA(causal="top_left"), Sizes(Lq=9, Lk=4)),
    "window": Problem(ra.SDPA(window=(2, 1))),
    "window to the left": Problem(ra.SDPA(window=(1, None))),
    "window to the right": Problem(ra.SDPA(window=(None, 0))),
    "window of one": Problem(ra.SDPA(causal="top_left", window=(0, 0)), Sizes(Lq=8)),
    "causal window": Problem(ra.SDPA(causal="bottom_right", window=(2, 3)), Sizes(Lq=8, Lk=8)),
    **{extra: Problem(ra.SDPA(), extras=(extra,)) for extra in EXTRAS if not extra.startswith(("keep", *OF_TERMS))},
    **{extra: Problem(ra.SDPA(keep_probability=0.75), extras=(extra,)) for extra in EXTRAS if extra.startswith("keep")},
    "nothing live, a sink": Problem(ra.SDPA(), extras=("mask of nothing", "sink")),
    "ragged": Problem(ra.SDPA(causal="bottom_right"), Sizes(B=4), ("q_lengths", "kv_lengths")),
    "ragged ALiBi": Problem(_alibi(), Sizes(B=4), ("q_lengths", "kv_lengths")),
    "positions": Problem(ra.SDPA(causal="top_left", window=(3, None)), extras=("q_positions", "k_positions")),
    "positions, ALiBi": Problem(_alibi(direction="two_sided", causal=False), extras=("k_positions of a batch",)),
    **{
        f"positions, learned ALiBi {direction}": Problem(
            _alibi(slopes="learned", direction=direction, causal=False),
            Sizes(),
            ("q_positions", "k_positions of a batch", *LEARNED[direction]),
        )
        for direction in ("symmetric", "two_sided")
    },
    **{
        f"ALiBi {direction} {rule}": Problem(
            _alibi(slopes=rule, direction=direction, causal=False),
            Sizes(Hq=6, Hkv=3),
            LEARNED[direction] if rule == "learned" else (),
        )
        for direction in LEARNED
        for rule in ("interleaved", "geometric", "learned")
    },
    "ALiBi numbers": Problem(_alibi(slopes=NUMBERS)),
    "ALiBi two numbers": Problem(
        _alibi(slopes=NUMBERS, slopes_right=NUMBERS[::-1], direction="two_sided", causal=False)
    ),
    "NoPE": Problem(ra.SDPA(causal="bottom_right", bias=(ra.NoPE(), ra.ALiBi(), ra.NoPE()))),
    "T5": Problem(ra.SDPA(causal="bottom_right", bias=ra.T5(buckets=8, max_distance=6)), extras=("t5_table",)),
    "T5 bidirectional": Problem(
        ra.SDPA(scale=1.0, bias=ra.T5(buckets=8, max_distance=5, bidirectional=True)),
        Sizes(Lq=15, Lk=17),
        ("t5_table", "sink"),
    ),
    "T5, positions": Problem(
        ra.SDPA(bias=(ra.T5(buckets=8, max_distance=5, bidirectional=True), ra.ALiBi())),
        extras=("t5_table", "q_positions", "k_positions of a batch"),
    ),
    "T5, ragged": Problem(
        ra.SDPA(causal="bottom_right", softcap=1.0, bias=ra.T5(buckets=8, max_distance=5)),
        Sizes(B=4),
        ("t5_table", "q_lengths", "kv_lengths"),
    ),
    "T5, no key": Problem(ra.SDPA(bias=ra.T5(buckets=8)), Sizes(Lk=0), ("t5_table",)),
    "Sandwich": Problem(ra.SDPA(causal="bottom_right", bias=ra.Sandwich(dimension=12))),
    "Sandwich from 1": Problem(
        ra.SDPA(scale=0.5, softcap=1.0, bias=(ra.Sandwich(dimension=2, first=1), ra.ALiBi())), Sizes(Lq=17), ("sink",)
    ),
    "Sandwich, positions": Problem(
        ra.SDPA(bias=ra.Sandwich()), Sizes(Hq=6), ("q_positions", "k_positions of a batch", "mask")
    ),
    "Sandwich, ragged": Problem(
        ra.SDPA(causal="bottom_right", bias=ra.Sandwich(dimension=8)), Sizes(B=4), ("q_lengths", "kv_lengths")
    ),
    "Sandwich, no key": Problem(ra.SDPA(bias=ra.Sandwich(dimension=4)), Sizes(Lk=0)),
    "interpolated ALiBi, dynamic": Problem(_alibi_interpolation(train_length=4)),
    "interpolated ALiBi, static": Problem(
        _alibi_interpolation(train_length=3, mode="static", length=7, slopes="geometric", causal=False),
        Sizes(Hq=6, Hkv=3),
        ("q_positions",),
    ),
    "interpolated ALiBi, ragged": Problem(
        _alibi_interpolation(train_length=3), Sizes(B=4, Lk=9), ("q_lengths", "kv_lengths", "bias of a head", "sink")
    ),
    "biases of all kinds": Problem(
        ra.SDPA(
            bias=(
                ra.ALiBi(slopes=NUMBERS),
                ra.ALiBi(direction="half"),
                ra.ALiBi(slopes="learned", direction="two_sided"),
                ra.ALiBi(),
            )
        ),
        extras=("slopes", "slopes_right", "bias of a head"),
    ),
    "everything": Problem(
        ra.SDPA(
            causal="bottom_right", window=(4, 2), softcap=2.0, keep_probability=0.5, bias=ra.ALiBi(slopes="learned")
        ),
        Sizes(2, 6, 2, 9, 11, 5, 3),
        ("slopes", "bias of a pair", "mask", "sink", "q_lengths", "kv_lengths", "segments", "keep"),
    ),
}
