"""The library of mistakes in scores, masks and biases: each a case recomputed under another spec or other inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.oracle.alternatives import FORWARD, Alternative, Failure, Values
from refattn.problem import Problem

Hypothesis = Callable[[Failure], Iterator[Alternative]]


def alignment(f: Failure) -> Iterator[Alternative]:
    """Where the first query stands."""
    spec: Any = f.golden.spec
    places = {"top_left": "top-left", "bottom_right": "bottom-right"}
    if (spec.causal and f.golden.sizes["Lq"] != f.golden.sizes["Lk"]) or "kv_lengths" in f.arrays:
        other = "bottom_right" if spec.causal == "top_left" else "top_left"
        asked = places.get(spec.causal, "bottom-right")
        words = f"attention aligned {places[other]} where {asked} is asked"
        rows = np.arange(f.golden.sizes["Lq"])[None]
        if spec.causal:
            yield Alternative(key="alignment", words=f"causal {words}", spec=replace(spec, causal=other))
        else:
            yield Alternative(key="alignment", words=words, arrays={"q_positions": rows})
    elif f.golden.sizes["Lq"] != f.golden.sizes["Lk"] and (spec.window or spec.bias):
        rows = np.arange(f.golden.sizes["Lq"])[None]
        words = "query i at key position i, where i + Lk − Lq is asked"
        yield Alternative(key="alignment", words=words, arrays={"q_positions": rows})
    if spec.causal:
        words = "attention without the causal mask"
        yield Alternative(key="causal_ignored", words=words, spec=replace(spec, causal=False))
        strict = {"q_positions": f.problem.score.positions[0] - 1}
        if f.golden.rows is None and not spec.bias and not spec.window:
            words = "causal attention that hides the query's own key"
            yield Alternative(key="causal_strict", words=words, arrays=strict)


def window(f: Failure) -> Iterator[Alternative]:
    """A window one key wider or narrower on either side, or none."""
    spec: Any = f.golden.spec
    if spec.window is None:
        return
    left, right = spec.window
    for side, name in ((0, "left"), (1, "right")):
        for step, word in ((1, "wider"), (-1, "narrower")):
            size = (left, right)[side]
            if size is not None and size + step >= 0:
                pair = (size + step, right) if side == 0 else (left, size + step)
                words = f"a window one key {word} on the {name} ({size + step} instead of {size})"
                yield Alternative(key="window", words=words, spec=replace(spec, window=pair))
            elif size == 0 and step < 0 and f.golden.rows is None:
                i, j = f.problem.score.positions
                ahead = (j[:, None] - i[..., None])[:, None]
                mask = f.arrays.get("mask", np.ones((1, 1), bool)) & (ahead > 0 if side == 0 else ahead < 0)
                words = f"a window one key narrower on the {name} (the query's own key is hidden)"
                yield Alternative(key="window", words=words, arrays={"mask": mask})
    if left is not None and left >= 1 and right is not None and right >= 1:
        words = "a window one key narrower on both sides"
        yield Alternative(key="window", words=words, spec=replace(spec, window=(left - 1, right - 1)))
    yield Alternative(key="window_ignored", words="attention without the window", spec=replace(spec, window=None))


def key_head(f: Failure) -> Iterator[Alternative]:
    """Query head h on key head h % Hkv."""
    heads, groups = f.golden.sizes["Hq"], f.golden.sizes["Hkv"]
    chosen = np.arange(heads) % groups
    if np.array_equal(chosen, np.arange(heads) // (heads // groups)):
        return

    def gather(problem: Problem, values: Values) -> Values:
        for name in ("dk", "dv"):
            if name in values:
                values[name] = np.stack([values[name][:, chosen == g].sum(1) for g in range(groups)], 1)
        return values

    arrays = {name: f.arrays[name][:, chosen] for name in ("k", "v")}
    yield Alternative(key="key_head", words="key head h % Hkv for query head h, where h // (Hq / Hkv) is asked",
                      arrays=arrays, after=gather)  # fmt: skip


def scale(f: Failure) -> Iterator[Alternative]:
    """None, twice, its inverse power, or the default in place of the given one."""
    spec: Any = f.golden.spec
    default = sqrt_reciprocal(f.golden.sizes["D"])
    for key, words, value in (
        ("no_scale", "scores without the scale", 1.0),
        ("scale_twice", "scores scaled twice", spec.scale**2),
        ("scale_inverse_width", "scores divided by D, where the square root of D is asked", default**2),
        ("default_scale", "scores scaled by D^-1/2, where another scale is given", default),
        ("scale_log2", "scores scaled for exp2 and then given to exp", spec.scale * 1.4426950408889634),
    ):
        if value != spec.scale:
            yield Alternative(key=key, words=words, spec=replace(spec, scale=float(value)))


def slopes(f: Failure) -> Iterator[Alternative]:
    """Another slope rule, slopes times the scale, or of the other sign."""
    spec: Any = f.golden.spec
    for term in spec.bias:
        if not hasattr(term, "slopes"):
            continue
        learned = term.slopes == "learned"
        none = {"slopes": None, "slopes_right": None} if learned else {}
        right = {"slopes_right": None} if hasattr(term, "slopes_right") else {}
        for rule in ("geometric", "interleaved"):
            changed = replace(term, slopes=rule, **right)
            words = f"ALiBi with {rule} slopes, where others are given"
            yield Alternative(key=f"{rule}_slopes", words=words, spec=_with_term(spec, term, changed), arrays=none)
        for key, words, factor in (
            ("bias_scaled", "a bias inside the scale (as Falcon does), where it is added after it", spec.scale),
            ("bias_sign", "a bias of the other sign", -1.0),
            ("bias_ignored", "attention without the ALiBi bias", 0.0),
        ):
            together = (*none, "bias") if key == "bias_scaled" else none
            scaled = {n: f.arrays[n].astype(np.float64) * factor for n in together if n in f.arrays}
            sides = {n: getattr(term, n, None) for n in ("slopes", "slopes_right")}
            numbers = {n: tuple(m * factor for m in s) for n, s in sides.items() if isinstance(s, tuple)}
            changed = replace(term, **numbers)
            whole = _with_term(spec, term, changed)
            yield Alternative(key=key, words=words, spec=whole, arrays=scaled, only=FORWARD)


def rotation(f: Failure) -> Iterator[Alternative]:
    """RoPE left out, of the other pairs or channels, or by angles of the other arithmetic."""
    spec: Any = f.golden.spec
    turn = spec.rotary
    if turn is None or turn.variant != "rope":
        return
    none = {"rope_cos": None, "rope_sin": None}
    yield Alternative(key="rotary_ignored", words="q and k not turned", spec=replace(spec, rotary=None), arrays=none)
    for key, name, words in (
        ("rotary_pairing", "pairing", {"half": "pairs of halves", "interleaved": "pairs of neighbours"}),
        ("rotary_part", "part", {"first": "the first channels turned", "last": "the last channels turned"}),
        ("rotary_angles", "angles", {"exact": "angles in double precision", "float32": "angles in float32"}),
    ):
        asked = getattr(turn, name)
        for other in set(words) - {asked} if asked in words else ():
            if other != "float32" or float(np.float32(turn.base)) == turn.base:
                told = f"{words[other]}, where {name} is {asked!r}"
                yield Alternative(key=key, words=told, spec=replace(spec, rotary=replace(turn, **{name: other})))


def bias(f: Failure) -> Iterator[Alternative]:
    """A dense bias inside the scale, or none."""
    if "bias" not in f.arrays:
        return
    given, factor = f.arrays["bias"].astype(np.float64), f.golden.spec.scale  # type: ignore[attr-defined]

    words = "a bias inside the scale, where it is added after it"
    yield Alternative(key="bias_scaled", words=words, arrays={"bias": given * factor}, only=FORWARD)
    yield Alternative(key="bias_ignored", words="attention without the bias", arrays={"bias": None})


def masks(f: Failure) -> Iterator[Alternative]:
    """The mask inverted or ignored, lengths or segments ignored, the keep-mask not divided by its probability."""
    spec: Any = f.golden.spec
    if "mask" in f.arrays:
        inverted = ~f.arrays["mask"]
        yield Alternative(key="mask_inverted", words="a mask whose True means masked", arrays={"mask": inverted})
        yield Alternative(key="mask_ignored", words="attention without the mask", arrays={"mask": None})
    if "kv_lengths" in f.arrays:
        words = "attention that reads beyond the lengths of keys"
        yield Alternative(key="lengths_ignored", words=words, arrays={"kv_lengths": None, "q_lengths": None})
    if "q_segment_ids" in f.arrays:
        none = {"q_segment_ids": None, "k_segment_ids": None}
        yield Alternative(key="segments_ignored", words="attention across segments", arrays=none)
    if spec.keep_probability is not None:
        whole = replace(spec, keep_probability=1.0)
        yield Alternative(key="keep_undivided", words="kept weights not divided by their probability", spec=whole)


def sink(f: Failure) -> Iterator[Alternative]:
    """The sink ignored, or scaled like a score."""
    if "sink" not in f.arrays:
        return
    given, factor = f.arrays["sink"].astype(np.float64), f.golden.spec.scale  # type: ignore[attr-defined]

    yield Alternative(key="sink_ignored", words="a softmax without the sink", arrays={"sink": None}, only=FORWARD)
    words = "a sink multiplied by the scale"
    yield Alternative(key="sink_scaled", words=words, arrays={"sink": given * factor}, only=FORWARD)


def softcap(f: Failure) -> Iterator[Alternative]:
    """No softcap."""
    spec: Any = f.golden.spec
    if spec.softcap is not None:
        yield Alternative(key="softcap_ignored", words="scores without the softcap", spec=replace(spec, softcap=None))


def _with_term(spec: Any, term: Any, changed: Any) -> Any:
    return replace(spec, bias=tuple(changed if t is term else t for t in spec.bias))


SCORES: tuple[Hypothesis, ...] = (alignment, window, key_head, scale, slopes, rotation, bias, masks, sink, softcap)
