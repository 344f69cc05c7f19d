"""The forward pass: a tile of rows by tiles of keys, in one kernel for float32 and for 16-bit numbers.

FlashAttention-2 (arXiv 2307.08691, algorithm 1). Keys and values have a buffer each, and one is fetched while the other
is used.

Where a value that is not finite has reached a row, seen or not, the block runs again: once with those values as 0, and
once to find which rows see one, for 0·NaN is NaN.
"""

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
    tall, broad, wide = product.tall, product.broad, product.wide
    fill_q, fill_k, fill_v, multiply = product.fill_q, product.fill_k, product.fill_v, product.multiply
    accumulate, sweep, store, leads = product.accumulate, product.sweep, product.store, product.leads
    row, key, column, score, output = product.row, product.key, product.column, product.score, product.output
    greatest, total_of, base, lse_of = softmax.make(ops, product.lanes)
    see, following = sight.make(ops, form)
    place_of, part_of, scaled, biased, masked = logits.make(ops, form)
    has_bias = form.table or form.dense
    rows, keys, width, scores, outputs = form.rows, form.keys, form.width, tall * broad, tall * wide
    zero, one, bottom, nan = F(0), F(1), F(-np.inf), F(np.nan)

    @ops.device
    def score_all(x, b, h, first, n, some, place, part, s):  # type: ignore[no-untyped-def]
        """Products to logits, in place."""
        for c in range(broad):
            key_place = place_of(x.k_at, b * x.at_strides[2], n * keys + key(c), x.lk)
            for r in range(tall):
                s[score(r, c)] = scaled(x, h, key_place - place[r], s[score(r, c)])
        if has_bias:
            for c in range(broad):
                j = n * keys + key(c)
                key_place = place_of(x.k_at, b * x.at_strides[2], j, x.lk)
                for r in range(tall):
                    m = score(r, c)
                    s[m] = biased(x, b, h, first + row(r), j, key_place - place[r], s[m])
        if some:
            for c in range(broad):
                j = n * keys + key(c)
                key_place = place_of(x.k_at, b * x.at_strides[2], j, x.lk)
                key_part = part_of(x.k_segment, b * x.at_strides[3], j, x.lk)
                for r in range(tall):
                    i, m, away = first + row(r), score(r, c), key_place - place[r]
                    s[m] = masked(x, b, h, i, part[r], j, key_part, away, s[m])

    @ops.device
    def weigh(s, o, top, total, searching):  # type: ignore[no-untyped-def]
        """Logits to weights, in place; what came before is brought to the new maximum."""
        for r in range(tall):
            here = bottom
            for c in range(broad):
                here = ops.larger(here, s[score(r, c)])
            new = ops.larger(top[r], greatest(here))
            low = base(new)
            factor = ops.exp2(top[r] - low)
            top[r], total[r] = new, total[r] * factor
            for w in range(wide):
                o[output(r, w)] = o[output(r, w)] * factor
            for c in range(broad):
                m = score(r, c)
                seen = zero if s[m] == bottom else one
                weight = ops.exp2(s[m] - low)
                total[r] = total[r] + weight
                s[m] = seen if searching else weight

    def forward(x):  # type: ignore[no-untyped-def]
        t, h, b = ops.block(0), ops.block(1), ops.block(2)
        q_tiles, k_tiles = (x.lq + rows - 1) // rows, (x.lk + keys - 1) // keys
        # Where the last rows see more keys than the first, the longest work begins first.
        t = q_tiles - 1 - t
        g, first = h // x.share, t * rows
        q_length, k_length = ops.read(x.q_length, b), ops.read(x.k_length, b)
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
                score_all(x, b, h, first, n, some, place, part, s)
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
            again = careful < SEARCHING and (ops.barrier_or(spoilt) or careful == CLEANED)
            careful += 1

    return Kernel(forward, product.words)
