"""The products in float32, each thread a small block of both.

`lanes` threads stand beside each other. A thread holds the scores of `tall` rows below each other with keys `lanes`
apart, and of the same rows groups of four columns of the output. Weights go through shared memory within a warp.
"""
# ruff: noqa: PLR0917  a product has its sizes

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.engines.cuda.kernels import tiles
from refattn.engines.cuda.kernels.form import Form, padded
from refattn.engines.cuda.kernels.product import Product

F = np.float32


def make(ops: Any, form: Form, base: int | None = None) -> Product:
    """The products of a form in float32.

    With a base, D = Dv and one operand serves both: values are the keys, and all begins at that word.
    """
    lanes, keys, threads = form.lanes, form.keys, form.threads
    tall, broad, groups = form.rows * lanes // threads, keys // lanes, -(-form.width // (4 * lanes))
    shift, rest, step, wide = lanes.bit_length() - 1, lanes - 1, 4 * lanes, 4 * groups
    v_stride, p_stride = 4 * lanes * groups + 4, keys + 4
    stride = padded(form.depth, 4) + 4 if base is None else v_stride
    q_word, values = base or 0, keys * v_stride if base is None else 0
    k_word, v_word, p_word, words = (
        q_word + n for n in tiles.places(form.rows * stride, keys * stride, values, form.rows * p_stride)
    )
    v_word = v_word if base is None else k_word
    deep, v_columns, v_words = padded(form.depth, 4) // 4, v_stride - 4, keys * v_stride
    scores, four_keys, zero, one = tall * broad, 4 * broad, F(0), F(1)

    @ops.device
    def multiply(s):
        across, first = ops.thread() & rest, (ops.thread() >> shift) * tall
        near = ops.local(four_keys)
        for n in range(scores):
            s[n] = zero
        for d in range(deep):
            for c in range(broad):
                word = k_word + (across + (c << shift)) * stride + 4 * d
                near[4 * c], near[4 * c + 1], near[4 * c + 2], near[4 * c + 3] = ops.get4(word)
            for r in range(tall):
                q0, q1, q2, q3 = ops.get4(q_word + (first + r) * stride + 4 * d)
                for c in range(broad):
                    t = q0 * near[4 * c] + s[r * broad + c]
                    t = q1 * near[4 * c + 1] + t
                    t = q2 * near[4 * c + 2] + t
                    s[r * broad + c] = q3 * near[4 * c + 3] + t

    add = adding(ops, tall, lanes, groups, keys, v_word, v_stride, p_stride)

    @ops.device
    def accumulate(o, s):
        across, first = ops.thread() & rest, (ops.thread() >> shift) * tall
        for r in range(tall):
            for c in range(broad):
                ops.put(p_word + (first + r) * p_stride + across + (c << shift), s[r * broad + c])
        ops.warp_sync()
        add(o, p_word)

    @ops.device
    def sweep(search):
        n = ops.thread()
        while n < v_words:
            if n % v_stride < v_columns:
                value = ops.get(v_word + n)
                finite = value - value == zero
                kept = zero if search else value
                ops.put(v_word + n, kept if finite else one if search else zero)
            n += threads

    kept = "paged" if form.paged else "plain"
    fill_q = tiles.make(ops, form, q_word, form.rows, form.depth, stride, kind="grouped" if form.split else "plain")
    fill_k = tiles.make(ops, form, k_word, keys, form.depth, stride, kind=kept)
    fill_v = tiles.make(ops, form, v_word, keys, form.width, v_stride, kind=kept)
    return Product(
        tall=tall,
        broad=broad,
        wide=wide,
        lanes=lanes,
        words=words,
        fill_q=fill_q,
        fill_k=fill_k,
        fill_v=fill_v,
        multiply=multiply,
        accumulate=accumulate,
        sweep=sweep,
        row=ops.device(lambda r: (ops.thread() >> shift) * tall + r),
        key=ops.device(lambda c: (ops.thread() & rest) + (c << shift)),
        column=ops.device(lambda w: 4 * (ops.thread() & rest) + step * (w >> 2) + (w & 3)),
        score=ops.device(lambda r, c: r * broad + c),
        output=ops.device(lambda r, w: r * wide + w),
        leads=ops.device(lambda: ops.thread() & rest == 0),
        store=ops.write,
    )


def adding(ops: Any, tall: int, lanes: int, groups: int, keys: int, v_word: int, v_stride: int, p_stride: int) -> Any:
    """`add(o, p_word)`: o += P·V, both in shared memory, P from p_word on, `keys` rows of V from v_word on.

    A thread has `tall` rows, and of each `groups` times 4 columns, 4 times `lanes` apart.
    """
    shift, rest, step, wide, quarter = lanes.bit_length() - 1, lanes - 1, 4 * lanes, 4 * groups, keys // 4
    four_wide = 4 * wide

    @ops.device
    def add(o, p_word):
        across, first = ops.thread() & rest, (ops.thread() >> shift) * tall
        near = ops.local(four_wide)
        for n in range(quarter):
            for m in range(wide):
                word = v_word + (4 * n + m // groups) * v_stride + 4 * across + step * (m % groups)
                near[4 * m], near[4 * m + 1], near[4 * m + 2], near[4 * m + 3] = ops.get4(word)
            for r in range(tall):
                p0, p1, p2, p3 = ops.get4(p_word + (first + r) * p_stride + 4 * n)
                for w in range(wide):
                    t = p0 * near[w] + o[r * wide + w]
                    t = p1 * near[wide + w] + t
                    t = p2 * near[2 * wide + w] + t
                    o[r * wide + w] = p3 * near[3 * wide + w] + t

    return add
