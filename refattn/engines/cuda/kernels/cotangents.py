"""Weights of the pairs of a tile and the cotangents of their logits, in a backward pass."""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cuda.kernels import logits
from refattn.engines.cuda.kernels.form import Form
from refattn.engines.cuda.kernels.product import Product

F = np.float32


class Cotangents(NamedTuple):
    """What a backward kernel is given beside `Arguments`, and what it finds.

    dout as q is, with strides. level, less (B,Hq,Lq) float32: lse times log₂e, +∞ where a row sees nothing, and
    δ = Σ_d dout out − dlse. dq, dk, dv float32 in C order. slope (B,Hq,Lq) float32: −Σ_j dS |r|. scale: of the
    plan. sums (B,Hq,tiles of rows,n) float32, 0 at first: those of dS of a tile by the column of the table.
    """

    dout: Any
    level: Any
    less: Any
    dq: Any
    dk: Any
    dv: Any
    slope: Any
    sums: Any
    dout_strides: Any
    scale: Any


class Pairs(NamedTuple):
    """Device functions."""

    own: Any
    weigh: Any
    steepen: Any


def make(ops: Any, form: Form, product: Product, turned: bool) -> Pairs:
    """Of a product whose own rows are queries, and keys its other ones; turned, the other way round.

    `own(x, b, first, places, parts)`: positions and segments of the own rows from `first` on.
    `weigh(x, b, h, first, other, some, places, parts, levels, lesses, s, d)`: products q·k in s become weights P, and
    dout·v in d cotangents dS of logits, times the slope of the softcap; 0 where P is, whatever a hidden pair holds.
    levels and lesses of the queries. Each step is taken for all pairs before the next, as in `logits`.
    `steepen(x, b, other, places, d, slope)`: slope[r] −= Σ dS |position(j) − position(i)|.
    """
    tall, broad, row, key, score = product.tall, product.broad, product.row, product.key, product.score
    pairs = logits.make(ops, form, product)
    tanh, place, part = pairs.tanh, pairs.place, pairs.part
    scaled, biased, masked = pairs.scaled, pairs.biased, pairs.masked
    softcap, has_bias, zero, one, bottom = form.softcap, form.table or form.dense, F(0), F(1), F(-np.inf)

    @ops.device
    def of_query(x, b, i):
        return place(x.q_at, b * x.at_strides[0], i, x.lq), part(x.q_segment, b * x.at_strides[1], i, x.lq)

    @ops.device
    def of_key(x, b, j):
        return place(x.k_at, b * x.at_strides[2], j, x.lk), part(x.k_segment, b * x.at_strides[3], j, x.lk)

    @ops.device
    def as_they_are(one, other):
        return one, other

    @ops.device
    def changed(one, other):
        return other, one

    # What belongs to the query, and what to the key; and of two numbers that of the query.
    ordered, of_own, of_other = (changed, of_key, of_query) if turned else (as_they_are, of_query, of_key)
    query = ops.device((lambda r, c: c) if turned else (lambda r, c: r))

    @ops.device
    def own(x, b, first, places, parts):
        for r in range(tall):
            places[r], parts[r] = of_own(x, b, first + row(r))

    @ops.device
    def lessen(x, lesses, s, d):
        for c in range(broad):
            for r in range(tall):
                m = score(r, c)
                d[m] = d[m] - lesses[query(r, c)]
                if softcap:
                    t = tanh(s[m] * x.cap[0])
                    d[m] = d[m] * (one - t * t)

    @ops.device
    def weigh(x, b, h, first, other, some, places, parts, levels, lesses, s, d):
        lessen(x, lesses, s, d)
        for c in range(broad):
            far, _ = of_other(x, b, other + key(c))
            for r in range(tall):
                at_q, at_k = ordered(places[r], far)
                s[score(r, c)] = scaled(x, h, at_k - at_q, s[score(r, c)])
        if has_bias:
            for c in range(broad):
                far, _ = of_other(x, b, other + key(c))
                for r in range(tall):
                    at_q, at_k = ordered(places[r], far)
                    i, j = ordered(first + row(r), other + key(c))
                    s[score(r, c)] = biased(x, b, h, i, j, at_k - at_q, s[score(r, c)])
        if some:
            for c in range(broad):
                far, apart = of_other(x, b, other + key(c))
                for r in range(tall):
                    at_q, at_k = ordered(places[r], far)
                    q_part, k_part = ordered(parts[r], apart)
                    i, j = ordered(first + row(r), other + key(c))
                    s[score(r, c)] = masked(x, b, h, i, q_part, j, k_part, at_k - at_q, s[score(r, c)])
        for c in range(broad):
            for r in range(tall):
                m = score(r, c)
                weight = zero if s[m] == bottom else ops.exp2(s[m] - levels[query(r, c)])
                d[m] = zero if weight == zero else weight * d[m]
                s[m] = weight

    @ops.device
    def steepen(x, b, other, places, d, slope):
        for c in range(broad):
            far, _ = of_other(x, b, other + key(c))
            for r in range(tall):
                slope[r] = slope[r] - d[score(r, c)] * ops.absolute(F(np.int32(far - places[r])))

    return Pairs(own, weigh, steepen)
