"""The Compressive Transformer as one masked softmax: slots and tokens by number, not by the memories of a segment.

Token j has the number of tokens before it, slot a those of slots before it. Before query t, in a segment that begins
with token b, max(b − memory, 0) tokens have left, in `rate`s of which there are m slots; the last of these stands just
before the first token of the memory. So slot a is t − (rate − 1) m − a away, and token j is t − j.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refattn.numeric import concatenate, einsum, real, reshape
from refattn.plan import Dense, Score
from refattn.variants import _xl


def lower(spec: Any, x: Mapping[str, Any], state: Mapping[str, Any]) -> Score:
    """Every slot that there has been since the state, every token, and for each row which of them it sees."""
    tokens = concatenate([state["hidden"], x["x"]], 1)
    rows, done = x["x"].shape[1], state["length"]
    first, t = done + rows - tokens.shape[1], done + np.arange(rows)
    made = _left(spec, done) // spec.rate
    usage = np.zeros((tokens.shape[0], tokens.shape[1]))
    usage[:, : tokens.shape[1] - rows] = state.get("usage", 0)

    slots, lowest = state["slots"], made - state["slots"].shape[1]
    for end in range(done - done % spec.segment + spec.segment, done + rows + 1, spec.segment):
        if spec.compression == "most_used":
            ours = (t >= end - spec.segment) & (t < end)
            score = _score(spec, x, tokens, slots, (first, lowest, t), ours)
            usage = usage + _weights(score)[:, slots.shape[1] :]
        span = np.arange(_left(spec, end - spec.segment), _left(spec, end))
        if span.size and spec.compressed:
            mean = usage[:, span - first] / (end - span)
            slots = concatenate([slots, _slots(spec, x, tokens[:, span - first], mean)], 1)
    return _score(spec, x, tokens, slots, (first, lowest, t), np.ones(rows, bool))


def _left(spec: Any, length: Any) -> Any:
    """How many tokens have left the memory when so many have come."""
    return np.maximum(length // spec.segment * spec.segment - spec.memory, 0)


def _score(spec: Any, x: Mapping[str, Any], tokens: Any, slots: Any, numbers: Any, chosen: Any) -> Score:
    """The chosen rows over the slots and tokens there are."""
    first, lowest, t = numbers[0], numbers[1], numbers[2][chosen][:, None]
    left = _left(spec, t)
    a, j = lowest + np.arange(slots.shape[1]), first + np.arange(tokens.shape[1])
    away = np.concatenate([t - (spec.rate - 1) * (left // spec.rate) - a, t - j], 1)
    held = left // spec.rate - a
    live = np.concatenate([(held > 0) & (held <= spec.compressed), (j >= left) & (j <= t)], 1)

    heads, width = x["u"].shape
    keys = concatenate([slots, tokens], 1)
    q = einsum("ble,hed->bhld", tokens[:, numbers[2][chosen] - first], x["wq"])
    farthest = int(away.max(initial=0, where=live))
    vectors = _xl.vectors_by_distance(x["wr"], np.arange(farthest + 1))
    by_distance = einsum("bhid,hnd->bhin", q + reshape(x["w"], (heads, 1, width)), vectors)
    which = np.broadcast_to(np.where(live, away, 0), (*q.shape[:3], keys.shape[1]))
    place = np.zeros((1, q.shape[2]), np.int64), np.zeros((1, keys.shape[1]), np.int64)
    return Score(
        q=q + reshape(x["u"], (heads, 1, width)),
        k=einsum("ble,hed->bhld", keys, x["wk"]),
        v=einsum("ble,hed->bhld", keys, x["wv"]),
        scale=spec.scale,
        positions=place,
        bias=(Dense(values=real(spec.scale, q) * np.take_along_axis(by_distance, which, 3)),),
        mask=live[None, None],
    )


def _weights(score: Score) -> Any:
    """Weights of the keys, summed over heads and rows: (B,n)."""
    batch, heads, rows, width = score.q.shape
    groups, keys = score.k.shape[1:3]
    q = score.q.reshape(batch, groups, heads // max(groups, 1), rows, width)
    s = score.scale * np.einsum("bgrid,bgjd->bgrij", q, score.k).reshape(batch, heads, rows, keys)
    s = np.where(score.mask, s + score.bias[0].values, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True, initial=-1e308))
    return (p / p.sum(-1, keepdims=True)).sum((1, 2))


def _slots(spec: Any, x: Mapping[str, Any], old: Any, mean: Any) -> Any:
    """Slots of one leaving stretch: each tap of a slot by the matrix of which token it reads, or none."""
    count, rate = old.shape[1], spec.rate
    if spec.compression == "most_used":
        best = np.sort(np.argsort(-mean, axis=1, kind="stable")[:, : count // rate], axis=1)
        return np.take_along_axis(old, best[:, :, None], 1)
    if spec.compression == "max":
        return np.max([old[:, n::rate] for n in range(rate)], axis=0)
    step = spec.dilation if spec.compression == "dilated" else 1
    first = np.arange(0, count, rate) - (rate - 1) * (step - 1) // 2
    reads = [((first + step * n)[:, None] == np.arange(count)) * 1.0 for n in range(rate)]
    parts = [np.einsum("ap,bpe->bae", matrix, old) for matrix in reads]
    if spec.compression == "mean":
        return np.sum(parts, axis=0) / rate
    made = np.sum([part @ x["kernel"][n] for n, part in enumerate(parts)], axis=0)
    return made + x["kernel_bias"] if "kernel_bias" in x else made
