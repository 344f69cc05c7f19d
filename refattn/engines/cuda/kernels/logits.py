"""The logit of a pair from its product q·k: scale or softcap, biases, masks; in units of log 2."""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cuda.kernels.form import Form
from refattn.engines.cuda.kernels.product import Product

F = np.float32


class Logits(NamedTuple):
    """Device functions."""

    tanh: Any
    place: Any
    part: Any
    scaled: Any
    biased: Any
    masked: Any
    turn: Any


def make(ops: Any, form: Form, product: Product) -> Logits:
    """A logit in three steps, each of which is taken for all pairs of a tile before the next.

    In one they would be so much text for each pair that the compiler leaves the loop over pairs a loop, and with it
    the scores in memory. `turn(x, b, heads, rows, n, some, places, parts, s)`: the products in s to logits, of
    rows with these heads, numbers, places and parts and the n-th tile of keys; `some`: whether anything may be masked.

    `scaled(x, h, away, product)`: scale or softcap, and slopes, `away` the key's position less
    the row's. `biased(x, b, h, i, j, away, s)`: table and dense bias, −∞ where one masks. `masked(x, b, h, i, part, j,
    key_part, away, s)`: −∞ where row i must not see key j. A logit that is not finite though no bias masks it becomes
    NaN. `place(pointer, start, i, length)` and `part`: the position and segment of row or key i, 0 where the form does
    not need them or where i has none.
    """
    positions, segments, mask, placed = form.positions, form.segments, form.mask, form.placed
    slopes, table, dense, softcap = form.slopes, form.table, form.dense, form.softcap
    zero, log2e, bottom = F(0), F(1.4426950408889634), F(-np.inf)
    tall, broad, keys, key, score = product.tall, product.broad, form.keys, product.key, product.score
    has_bias, tanh = table or dense, _tanh(ops)

    @ops.device
    def place(pointer, start, i, length):
        return ops.read(pointer, start + i) if placed and i < length else 0

    @ops.device
    def part(pointer, start, i, length):
        return ops.read(pointer, start + i) if segments and i < length else 0

    @ops.device
    def scaled(x, h, away, product):
        # What is not finite times 0 is NaN.
        s = product * zero + product
        s = x.cap[1] * tanh(s * x.cap[0]) if softcap else s * x.unit
        return s - ops.read(x.slopes, h) * ops.absolute(F(np.int32(away))) if slopes else s

    @ops.device
    def biased(x, b, h, i, j, away, s):
        bias = zero
        if i < x.lq and j < x.lk:
            if table:
                bias = ops.read(x.table, h * x.columns + x.zero + away)
            if dense:
                at = i * x.dense_strides[2] + j * x.dense_strides[3]
                add = ops.read(ops.past(x.dense, b * x.dense_strides[0] + h * x.dense_strides[1]), at)
                bias = bottom if bottom in (bias, add) else bias + add * log2e
        s = s + bias
        return bottom if bias == bottom else s * zero + s

    @ops.device
    def masked(x, b, h, i, part, j, key_part, away, s):
        live = j < ops.read(x.k_length, b)
        if positions:
            live = live and x.span[0] <= away <= x.span[1]
        if segments:
            live = live and part == key_part
        if mask and live and i < x.lq:
            at = i * x.mask_strides[2] + j * x.mask_strides[3]
            live = ops.read(ops.past(x.mask, b * x.mask_strides[0] + h * x.mask_strides[1]), at) != 0
        return s if live else bottom

    @ops.device
    def turn(x, b, heads, rows, n, some, places, parts, s):
        """Products to logits, in place."""
        for c in range(broad):
            key_place = place(x.k_at, b * x.at_strides[2], n * keys + key(c), x.lk)
            for r in range(tall):
                s[score(r, c)] = scaled(x, heads[r], key_place - places[r], s[score(r, c)])
        if has_bias:
            for c in range(broad):
                j = n * keys + key(c)
                key_place = place(x.k_at, b * x.at_strides[2], j, x.lk)
                for r in range(tall):
                    m = score(r, c)
                    s[m] = biased(x, b, heads[r], rows[r], j, key_place - places[r], s[m])
        if some:
            for c in range(broad):
                j = n * keys + key(c)
                key_place = place(x.k_at, b * x.at_strides[2], j, x.lk)
                key_part = part(x.k_segment, b * x.at_strides[3], j, x.lk)
                for r in range(tall):
                    m, away = score(r, c), key_place - places[r]
                    s[m] = masked(x, b, heads[r], rows[r], parts[r], j, key_part, away, s[m])

    return Logits(tanh, place, part, scaled, biased, masked, turn)


def _tanh(ops: Any) -> Any:
    """Tanh within a few ulp: an odd polynomial near 0, where 1 − 2 / (1 + e²ˣ) would cancel."""
    one, two, far = F(1), F(2), F(0.3)
    c1, c2, c3, c4 = F(-1 / 3), F(2 / 15), F(-17 / 315), F(62 / 2835)
    c5, twice = F(-1382 / 155925), F(2 * 1.4426950408889634)

    @ops.device
    def tanh(x):
        y = x * x
        near = x + x * y * (c1 + y * (c2 + y * (c3 + y * (c4 + y * c5))))
        away = one - ops.divide(two, one + ops.exp2(x * twice))
        return near if ops.absolute(x) < far else away

    return tanh
