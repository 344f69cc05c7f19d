"""The Causal Transformer as a plan: a second derivation, all streams at once, every head a score of its own.

Streams stand where a score has heads, and a head's values are laid into the E columns that they end in, by the final
layer or by where the head stands; so the sum of the scores is the block's output. What follows an attention is linear,
but for the factor gain / (std + eps) of a norm, which is evaluated here and is the scores' weight in the sum: the mean
is subtracted from the columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.numeric import (
    broadcast,
    clean,
    einsum,
    exp,
    finite,
    real,
    reshape,
    row_max,
    sqrt,
    take,
    total,
    where,
)
from refattn.plan import Mix, Score
from refattn.variants._place import Place
from refattn.variants.shaw import Shaw, lower_content

ONE = np.ones(())


def lowered(spec: Any, x: Mapping[str, Any]) -> Mix:
    """Scores of every head for each distance from a stream to the other that it reads, round the circle of streams."""
    streams = x["x"].shape[1]
    if streams < 2:
        return _mixed([_Stage(spec, x, x["x"], 0)])
    own = _evaluated(_mixed([_Stage(spec, x, x["x"], 0)]))
    return _mixed([_Stage(spec, x, own, n) for n in range(1, streams)])


class _Stage:
    """Attention of every stream s to stream s + n, counted round."""

    def __init__(self, spec: Any, x: Mapping[str, Any], rows: Any, n: int) -> None:
        self.spec, self.x, self.rows = spec, x, rows
        self.batch, self.streams, self.length, self.width = x["x"].shape
        self.other = (np.arange(self.streams) + n) % max(self.streams, 1)
        active = np.broadcast_to(x.get("active", np.True_), x["x"].shape[:3])
        yes, there = np.ones(active.shape, bool), np.take(active, self.other, 1)
        # Rows that ask and keys that are there; what is hidden is 0, and so never read.
        self.asks = yes if spec.active == "keys" else active
        self.there = yes if spec.active == "queries" else there
        self.read = take(x["x"], self.other, 1)
        if spec.mask == "exact":
            self.read = where(self.there[..., None], self.read, 0)

    def learned(self, name: str) -> Any:
        """The entries [s, s + n] of an array (S,S,...)."""
        array = self.x[name]
        flat = reshape(array, (self.streams**2, *array.shape[2:]))
        return take(flat, np.arange(self.streams) * self.streams + self.other, 0)

    def projected(self, name: str, h: int, given: Any) -> Any:
        """Head h's queries, keys or values, (B,S,Lq,·)."""
        found = einsum("bsle,sed->bsld", given, self.learned(f"w{name}")[:, h])
        if f"b{name}" in self.x:
            bias = self.learned(f"b{name}")[:, h]
            found = found + reshape(bias, (self.streams, 1, bias.shape[1]))
        return found

    def columns(self, h: int) -> Any:
        """Where head h's values end, (S,Dv,E)."""
        if self.spec.final_layer:
            return self.centred(self.learned("wo")[:, h])
        dv = self.x["wv"].shape[4]
        place = (np.arange(self.width) == np.arange(h * dv, (h + 1) * dv)[:, None]).astype(np.int64)
        return self.centred(broadcast(real(place, self.x["wv"]), (self.streams, dv, self.width)))

    def centred(self, a: Any) -> Any:
        """Less the mean over E where a norm follows."""
        return a - total(a, -1, keepdims=True) / self.width if self.spec.norm else a

    def seen(self) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Pairs that are visible, and rows that see nothing: they do not ask, or the first key is later."""
        later = np.arange(self.length) > np.arange(self.length)[:, None]
        hidden = later | ~self.there[:, :, None, :] | ~self.asks[..., None]
        return ~hidden, ~self.asks | ~np.logical_or.accumulate(self.there, -1)

    def head(self, h: int) -> Score:
        """Head h as a score of S heads, its values of width E."""
        spec, (live, empty) = self.spec, self.seen()
        q = self.projected("q", h, where(self.asks[..., None], self.rows, 0))
        if spec.mask == "minus_1e9":
            q, live = where(empty[..., None], 0, q), live | empty[..., None]
        count, ends = np.arange(self.length)[None], self.columns(h)
        at = Place(count[:, None, :, None], count[:, None, None, :], self.streams)
        given = {"q": q} | {name: self.x[name] for name in ("shaw_k", "shaw_v")}
        relative, table = lower_content(Shaw(clip=spec.clip), given, at, spec.scale)
        assert table is not None
        return Score(
            q=q,
            k=self.projected("k", h, self.read),
            v=einsum("bsld,sde->bsle", self.projected("v", h, self.read), ends),
            scale=spec.scale,
            positions=(count, count),
            mask=live,
            relative=relative,
            v_table=(replace(table, values=einsum("nd,sde->sne", table.values[0], ends)),),
        )

    def parts(self) -> list[tuple[Any, Score]]:
        """Weights and scores."""
        heads = [self.head(h) for h in range(self.x["wv"].shape[2])]
        straight = self.centred(self.rows) if self.spec.residual else 0
        if "bo" in self.x:
            straight = straight + reshape(self.centred(self.learned("bo")), (self.streams, 1, self.width))
        # What passes unattended, as rows that see themselves alone.
        through = [] if isinstance(straight, int) else [self.itself(straight)]
        if not self.spec.norm:
            return [(ONE, part) for part in (*heads, *through)]
        apart = _evaluated(Mix(parts=(*heads, *through), weights=(ONE,) * (len(heads) + 1)))
        std = sqrt(total(apart * apart, -1, keepdims=True) / (self.width - 1))
        gain, shift = (reshape(self.learned(name), (self.streams, 1, self.width)) for name in ("gain", "shift"))
        factor = gain / (std + 1e-6)
        return [*((factor, part) for part in (*heads, *through)), (ONE, self.itself(shift))]

    def itself(self, values: Any) -> Score:
        """Every row its own value."""
        full = (self.batch, self.streams, self.length)
        nothing, count = np.zeros((*full, 1)), np.arange(self.length)[None]
        values = broadcast(values, (*full, self.width))
        return Score(q=nothing, k=nothing, v=values, scale=0.0, positions=(count, count), window=(0, 0))


def _mixed(stages: list[_Stage]) -> Mix:
    pairs = [pair for stage in stages for pair in stage.parts()]
    return Mix(parts=tuple(part for _, part in pairs), weights=tuple(weight for weight, _ in pairs))


def _evaluated(mix: Any) -> Any:
    """What the plan means, all rows at once and in the vocabulary, so that gradients pass."""
    outs = [w * _softmax(part) for w, part in zip(mix.weights, mix.parts, strict=True)]
    return sum(outs[1:], outs[0])


def _softmax(part: Score) -> Any:
    if part.window == (0, 0):
        return part.v
    (relative,), (table,) = part.relative, part.v_table
    count = part.positions[0][0]
    ahead = count - count[:, None]

    def pairwise(vectors: Any, offset: int) -> Any:
        picked = take(vectors, (ahead + offset).reshape(-1), 1)
        return reshape(picked, (vectors.shape[0], *ahead.shape, vectors.shape[2]))

    keys = pairwise(relative.values, relative.offset)[0]
    s = einsum("bsid,bsjd->bsij", part.q, part.k) * part.scale + einsum("bsid,ijd->bsij", relative.rows, keys)
    live = np.broadcast_to(np.asarray(part.mask), s.shape)
    bad = live & ~(finite(s) & np.all(finite(part.v), -1)[:, :, None, :])
    s = where(live, clean(s), 0)
    weight = where(live, exp(where(live, s - row_max(s, live), 0)), 0)
    p = weight / where(np.any(live, -1, keepdims=True), total(weight, -1, keepdims=True), 1)
    mean = einsum("bsij,bsje->bsie", p, clean(part.v))
    mean = mean + einsum("bsij,sije->bsie", p, pairwise(table.values, table.offset))
    return where(np.any(bad, -1, keepdims=True), real(np.nan, mean), mean)
