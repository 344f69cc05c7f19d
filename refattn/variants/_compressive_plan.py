"""The Compressive Transformer as one masked softmax: slots and tokens by number, not by the memories of a segment.

Token j has the number of tokens before it, slot a those of slots before it. Before query t, in a segment that begins
with token b, max(b − memory, 0) tokens have left, in `rate`s of which there are m slots; the last of these stands just
before the first token of the memory. So slot a is t − (rate − 1) m − a away, and token j is t − j.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from refattn.numeric import concatenate, einsum, real, reshape
from refattn.plan import Dense, Score
from refattn.variants import _xl


class _Keys(NamedTuple):
    """Hidden states, the slots before the tokens, and the numbers of the first of either."""

    slots: Any
    lowest: int
    tokens: Any
    first: int


def lower(spec: Any, x: Mapping[str, Any], state: Mapping[str, Any]) -> Score:
    """Every slot that there has been since the state, every token, and for each row which of them it sees."""
    tokens = concatenate([state["hidden"], x["x"]], 1)
    rows, done = x["x"].shape[1], state["length"]
    t = done + np.arange(rows)
    lowest = _left(spec, done) // spec.rate - state["slots"].shape[1]
    keys = _Keys(state["slots"], lowest, tokens, done + rows - tokens.shape[1])
    usage = np.zeros(tokens.shape[:2])
    usage[:, : tokens.shape[1] - rows] = state.get("usage", 0)

    for end in range(done - done % spec.segment + spec.segment, done + rows + 1, spec.segment):
        if spec.compression == "most_used":
            inside = t[(t >= end - spec.segment) & (t < end)]
            usage = usage + _weights(spec, x, keys, inside)[:, keys.slots.shape[1] :]
        leaving = np.arange(_left(spec, end - spec.segment), _left(spec, end))
        if leaving.size and spec.compressed:
            mean = usage[:, leaving - keys.first] / (end - leaving)
            fresh = _slots(spec, x, tokens[:, leaving - keys.first], mean)
            keys = keys._replace(slots=concatenate([keys.slots, fresh], 1))
    q, k, bias, live = _parts(spec, x, keys, t)
    at_one_place = np.zeros((1, rows), np.int64), np.zeros((1, k.shape[2]), np.int64)
    v = _projected(concatenate([keys.slots, tokens], 1), x["wv"])
    dense = Dense(values=bias)
    return Score(q=q, k=k, v=v, scale=spec.scale, positions=at_one_place, bias=(dense,), mask=live[None, None])


def _left(spec: Any, length: Any) -> Any:
    """How many tokens have left the memory when so many have come."""
    return np.maximum(length // spec.segment * spec.segment - spec.memory, 0)


def _projected(hidden: Any, matrix: Any) -> Any:
    return einsum("ble,hed->bhld", hidden, matrix)


def _parts(spec: Any, x: Mapping[str, Any], keys: _Keys, t: Any) -> tuple[Any, Any, Any, Any]:
    """Queries, keys, logits of positions, and who sees whom, of the rows of the tokens t over all keys there are."""
    t, left = t[:, None], _left(spec, t)[:, None]
    a, j = keys.lowest + np.arange(keys.slots.shape[1]), keys.first + np.arange(keys.tokens.shape[1])
    away = np.concatenate([t - (spec.rate - 1) * (left // spec.rate) - a, t - j], 1)
    held = left // spec.rate - a
    live = np.concatenate([(held > 0) & (held <= spec.compressed), (j >= left) & (j <= t)], 1)

    heads, width = x["u"].shape
    q = _projected(keys.tokens[:, t[:, 0] - keys.first], x["wq"])
    vectors = _xl.vectors_by_distance(x["wr"], np.arange(int(away.max(initial=0, where=live)) + 1))
    by_distance = einsum("bhid,hnd->bhin", q + reshape(x["w"], (heads, 1, width)), vectors)
    which = np.broadcast_to(np.where(live, away, 0), (*q.shape[:3], away.shape[1]))
    bias = real(spec.scale, q) * np.take_along_axis(by_distance, which, 3)
    k = _projected(concatenate([keys.slots, keys.tokens], 1), x["wk"])
    return q + reshape(x["u"], (heads, 1, width)), k, bias, live


def _weights(spec: Any, x: Mapping[str, Any], keys: _Keys, t: Any) -> Any:
    """Weights of the keys, summed over heads and over the rows of the tokens t: (B,n)."""
    q, k, bias, live = _parts(spec, x, keys, t)
    groups = np.arange(q.shape[1]) // max(q.shape[1] // max(k.shape[1], 1), 1)
    s = np.where(live, spec.scale * np.einsum("bhid,bhjd->bhij", q, k[:, groups]) + bias, -np.inf)
    p = np.exp(s - s.max(-1, keepdims=True))
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
