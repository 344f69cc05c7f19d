"""The products of 16-bit numbers on tensor cores: mma.sync.m16n8k16, summed in float32.

A warp has 16 rows of the tile. Scores and outputs lie as that instruction leaves them: of row `lane // 4` and the 8th
below it, columns 2 (lane % 4) and the next of every 8. So weights are operands of the second product where they are.
Rows of shared memory are 16 bytes longer than their numbers: the 8 rows that ldmatrix reads at a time lie in different
banks, for any depth, which no exclusive or of addresses does for one that is not a multiple of 64.
"""
# ruff: noqa: PLR0915  a factory holds what its kernel closes over

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.engines.cuda.kernels import tiles
from refattn.engines.cuda.kernels.form import Form, padded
from refattn.engines.cuda.kernels.product import Product

F = np.float32


def make(ops: Any, form: Form, base: int | None = None) -> Product:
    """The products of a form in bfloat16 or float16; `base` as in `simt`."""
    keys, threads = form.keys, form.threads
    split, brain = form.split, form.storage == "bfloat16"
    mma, pack = (ops.mma_bf16, ops.pack_bf16) if brain else (ops.mma_f16, ops.pack_f16)
    exponent, unity = (0x7F80, 0x3F80) if brain else (0x7C00, 0x3C00)
    stride, v_stride = padded(form.depth, 16) // 2 + 4, padded(form.width, 16) // 2 + 4
    q_word, values = base or 0, keys * v_stride if base is None else 0
    k_word, v_word, words = (q_word + n for n in tiles.places(form.rows * stride, keys * stride, values))
    v_word = v_word if base is None else k_word
    deep, pairs, v_pairs = (stride - 4) // 8, keys // 16, (v_stride - 4) // 8
    v_columns, v_words, zero, scores = v_stride - 4, keys * v_stride, F(0), keys // 2

    @ops.device
    def multiply(s):
        lane, warp = ops.thread() & 31, ops.thread() >> 5
        q = q_word + (16 * warp + (lane & 15)) * stride + 4 * (lane >> 4)
        k = k_word + ((lane & 7) + 8 * (lane >> 4)) * stride + 4 * (lane >> 3 & 1)
        for n in range(scores):
            s[n] = zero
        for d in range(deep):
            a = ops.ldmatrix(q + 8 * d)
            for n in range(pairs):
                b0, b1, b2, b3 = ops.ldmatrix(k + 16 * n * stride + 8 * d)
                m = 8 * n
                c = (s[m], s[m + 1], s[m + 2], s[m + 3])
                s[m], s[m + 1], s[m + 2], s[m + 3] = mma(c, a, b0, b1)
                c = (s[m + 4], s[m + 5], s[m + 6], s[m + 7])
                s[m + 4], s[m + 5], s[m + 6], s[m + 7] = mma(c, a, b2, b3)

    @ops.device
    def accumulate(o, s):
        lane = ops.thread() & 31
        v = v_word + (lane & 15) * v_stride + 4 * (lane >> 4)
        for n in range(pairs):
            m = 8 * n
            low, high = pack(s[m], s[m + 1]), pack(s[m + 2], s[m + 3])
            a = (low, high, pack(s[m + 4], s[m + 5]), pack(s[m + 6], s[m + 7]))
            for w in range(v_pairs):
                b0, b1, b2, b3 = ops.ldmatrix_t(v + 16 * n * v_stride + 8 * w)
                u = 8 * w
                c = (o[u], o[u + 1], o[u + 2], o[u + 3])
                o[u], o[u + 1], o[u + 2], o[u + 3] = mma(c, a, b0, b1)
                c = (o[u + 4], o[u + 5], o[u + 6], o[u + 7])
                o[u + 4], o[u + 5], o[u + 6], o[u + 7] = mma(c, a, b2, b3)

    @ops.device
    def swept(half, search):
        finite = half & exponent != exponent
        kept = 0 if search else half
        return kept if finite else unity if search else 0

    @ops.device
    def sweep(search):
        n = ops.thread()
        while n < v_words:
            if n % v_stride < v_columns:
                word = ops.get_bits(v_word + n)
                ops.put_bits(v_word + n, ops.join(swept(word & 0xFFFF, search), swept(word >> 16 & 0xFFFF, search)))
            n += threads

    @ops.device
    def store(out, i, x):
        ops.write(out, i, x if split else pack(x, zero))

    kept = "paged" if form.paged else "plain"
    fill_q = tiles.make(ops, form, q_word, form.rows, form.depth, stride, kind="grouped" if form.split else "plain")
    fill_k = tiles.make(ops, form, k_word, keys, form.depth, stride, kind=kept)
    fill_v = tiles.make(ops, form, v_word, keys, form.width, v_stride, kind=kept)
    return Product(
        tall=2,
        broad=keys // 4,
        wide=4 * v_pairs,
        lanes=4,
        words=words,
        fill_q=fill_q,
        fill_k=fill_k,
        fill_v=fill_v,
        multiply=multiply,
        accumulate=accumulate,
        sweep=sweep,
        row=ops.device(lambda r: 16 * (ops.thread() >> 5) + (ops.thread() >> 2 & 7) + 8 * r),
        key=ops.device(lambda c: 8 * (c >> 1) + 2 * (ops.thread() & 3) + (c & 1)),
        column=ops.device(lambda w: 8 * (w >> 1) + 2 * (ops.thread() & 3) + (w & 1)),
        score=ops.device(lambda r, c: 4 * (c >> 1) + 2 * r + (c & 1)),
        output=ops.device(lambda r, w: 4 * (w >> 1) + 2 * r + (w & 1)),
        leads=ops.device(lambda: ops.thread() & 3 == 0),
        store=store,
    )
