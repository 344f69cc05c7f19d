"""The forward pass: a tile of rows by tiles of keys, in one kernel for float32 and for 16-bit numbers.

FlashAttention-2 (arXiv 2307.08691, algorithm 1). Keys and values have a buffer each, and one is fetched while the other
is used.

Where a value that is not finite has reached a row, seen or not, the block runs again: once with those values as 0, and
once to find which rows see one, for 0·NaN is NaN.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position
# ruff: noqa: PLR0915  a factory holds what its kernel closes over

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cuda.kernels import logits, sight, simt, softmax, tensor
from refattn.engines.cuda.kernels.form import Form

F = np.float32
CLEANED, SEARCHING = 1, 2  # passes over values that are not finite


class Kernel(NamedTuple):
    """A kernel of one argument, `Arguments`, for a grid of (tiles of rows, Hq, B); words of shared memory it needs."""

    run: Any
    words: int


def make(ops: Any, form: Form) -> Kernel:
    """The kernel of a form."""
    product = (simt if form.storage == "float32" else tensor).make(ops, form)
    fill_q, fill_k, fill_v, multiply = product.fill_q, product.fill_k, product.fill_v, product.multiply
    accumulate, sweep, store, leads = product.accumulate, product.sweep, product.store, product.leads
    row, column, output, tall, wide = product.row, product.column, product.output, product.tall, product.wide
    total_of, lse_of, weigh = softmax.make(ops, product)
    see, following = sight.make(ops, form)
    pairs = logits.make(ops, form, product)
    place_of, part_of, turn = pairs.place, pairs.part, pairs.turn
    rows, keys, width, scores, outputs = form.rows, form.keys, form.width, tall * product.broad, tall * wide
    zero, one, bottom, nan = F(0), F(1), F(-np.inf), F(np.nan)

    @ops.device
    def walk(x, q_tiles, t, b, h, k, v, first, careful, place, part, s, o, top, total):
        """All tiles of keys that the rows see."""
        k_tiles, k_length = (x.lk + keys - 1) // keys, ops.read(x.k_length, b)
        n = following(x, b, t, 0, q_tiles, k_tiles)
        if n < k_tiles:
            fill_k(k, x.k_strides[2], n * keys, k_length)
        ops.commit()
        while n < k_tiles:
            ops.wait(0)
            ops.barrier()
            fill_v(v, x.v_strides[2], n * keys, k_length)
            ops.commit()
            multiply(s)
            some = see(x, b, t, n, q_tiles, k_tiles) != 0
            turn(x, b, h, first, n, some, place, part, s)
            weigh(s, o, top, total, careful == SEARCHING)
            n = following(x, b, t, n + 1, q_tiles, k_tiles)
            ops.wait(0)
            ops.barrier()
            if n < k_tiles:
                fill_k(k, x.k_strides[2], n * keys, k_length)
            ops.commit()
            if careful > 0:
                sweep(careful == SEARCHING)
                ops.barrier()
            accumulate(o, s)

    @ops.device
    def finish(x, out, lse, first, q_length, careful, sink, alone, o, top, total):
        """Writes the rows; whether what is not finite has reached one that is inside its length."""
        spoilt = False
        for r in range(tall):
            i, whole = first + row(r), total_of(total[r])
            inside = i < q_length
            norm = ops.divide(one, whole) if inside and whole != zero else zero
            for w in range(wide):
                value = o[output(r, w)]
                if inside and value - value != zero:
                    spoilt = True
                if i < x.lq and column(w) < width:
                    if careful < SEARCHING:
                        store(out, i * width + column(w), value * norm if inside else zero)
                    elif inside and value > zero:
                        store(out, i * width + column(w), nan)
            if i < x.lq and leads() and careful == 0:
                ops.write(lse, i, lse_of(top[r], whole) if inside else lse_of(sink, alone))
        return spoilt

    def forward(x):
        t, h, b = ops.block(0), ops.block(1), ops.block(2)
        # Where the last rows see more keys than the first, the longest work begins first.
        q_tiles = (x.lq + rows - 1) // rows
        t = q_tiles - 1 - t
        g, first, q_length = h // x.share, t * rows, ops.read(x.q_length, b)
        q = ops.past(x.q, b * x.q_strides[0] + h * x.q_strides[1])
        k = ops.past(x.k, b * x.k_strides[0] + g * x.k_strides[1])
        v = ops.past(x.v, b * x.v_strides[0] + g * x.v_strides[1])
        start = (b * x.heads + h) * x.lq
        out, lse = ops.past(x.out, start * width), ops.past(x.lse, start)
        sink = ops.read(x.sink, h)
        alone = zero if sink == bottom else one
        s, o, top, total = ops.local(scores), ops.local(outputs), ops.local(tall), ops.local(tall)
        place, part = ops.local_int(tall), ops.local_int(tall)
        for r in range(tall):
            place[r] = place_of(x.q_at, b * x.at_strides[0], first + row(r), x.lq)
            part[r] = part_of(x.q_segment, b * x.at_strides[1], first + row(r), x.lq)
        fill_q(q, x.q_strides[2], first, q_length)

        careful, again = 0, True
        while again:
            for r in range(tall):
                top[r], total[r] = sink, alone if leads() else zero
            for w in range(outputs):
                o[w] = zero
            walk(x, q_tiles, t, b, h, k, v, first, careful, place, part, s, o, top, total)
            spoilt = finish(x, out, lse, first, q_length, careful, sink, alone, o, top, total)
            again = careful < SEARCHING and (ops.barrier_or(spoilt) or careful == CLEANED)
            careful += 1

    return Kernel(forward, product.words)
