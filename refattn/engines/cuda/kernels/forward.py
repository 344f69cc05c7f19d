"""The forward pass: a tile of rows by tiles of keys, in one kernel for float32 and for 16-bit numbers.

Of a split form the rows are all that share a key head, and a block has a part of their keys: see `decode`.

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
    """A kernel of one argument, `Arguments`, and the words of shared memory it needs.

    Its grid is (tiles of rows, Hq, B), of a split form (parts, Hkv, B).
    """

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
    split, paged, rows, keys, width = form.split, form.paged, form.rows, form.keys, form.width
    scores, outputs = tall * product.broad, tall * wide
    zero, one, bottom, nan = F(0), F(1), F(-np.inf), F(np.nan)

    @ops.device
    def walk(x, t, b, k, v, begin, end, careful, heads, numbers, places, parts, s, o, top, total):
        """All tiles of keys from `begin` to `end` that the rows see."""
        q_tiles, k_tiles, k_length = (x.lq + rows - 1) // rows, (x.lk + keys - 1) // keys, ops.read(x.k_length, b)
        pages = ops.past(x.pages, b * x.entries)
        n = following(x, b, t, begin, end, q_tiles, k_tiles)
        if n < end:
            fill_k(k, x.k_strides, x.page, pages, n * keys, k_length)
        ops.commit()
        while n < end:
            ops.wait(0)
            ops.barrier()
            fill_v(v, x.v_strides, x.page, pages, n * keys, k_length)
            ops.commit()
            multiply(s)
            some = see(x, b, t, n, q_tiles, k_tiles) != 0
            turn(x, b, heads, numbers, n, some, places, parts, s)
            weigh(s, o, top, total, careful == SEARCHING)
            n = following(x, b, t, n + 1, end, q_tiles, k_tiles)
            ops.wait(0)
            ops.barrier()
            if n < end:
                fill_k(k, x.k_strides, x.page, pages, n * keys, k_length)
            ops.commit()
            if careful > 0:
                sweep(careful == SEARCHING)
                ops.barrier()
            accumulate(o, s)

    @ops.device
    def finish(x, b, z, q_length, careful, heads, numbers, o, top, total):
        """Writes the rows; whether what is not finite has reached one that is inside its length."""
        spoilt = False
        for r in range(tall):
            i, whole = numbers[r], total_of(total[r])
            inside = i < q_length
            norm = ops.divide(one, whole) if inside and whole != zero else zero
            at = (b * x.heads + heads[r]) * x.lq + i
            if split:
                at = at * x.splits + z
            out = ops.past(x.out, at * width)
            for w in range(wide):
                value = o[output(r, w)]
                if inside and value - value != zero:
                    spoilt = True
                if i < x.lq and column(w) < width:
                    if careful < SEARCHING:
                        store(out, column(w), value * norm if inside else zero)
                    elif inside and value > zero:
                        store(out, column(w), nan)
            if i < x.lq and leads() and careful == 0:
                sink = sink_of(x, heads[r], z)
                alone = zero if sink == bottom else one
                ops.write(ops.past(x.lse, at), 0, lse_of(top[r], whole) if inside else lse_of(sink, alone))
        return spoilt

    @ops.device
    def sink_of(x, h, z):
        """Of parts of the keys the first one counts it."""
        return ops.read(x.sink, h) if z == 0 else bottom

    def forward(x):
        t, z, h, b = ops.block(0), 0, ops.block(1), ops.block(2)
        heads, numbers = ops.local_int(tall), ops.local_int(tall)
        places, parts = ops.local_int(tall), ops.local_int(tall)
        begin, end, q_length = 0, (x.lk + keys - 1) // keys, ops.read(x.q_length, b)
        if split:
            t, z, g = 0, t, h
            each = (end + x.splits - 1) // x.splits
            begin = z * each
            end = end if end < begin + each else begin + each
            for r in range(tall):
                here = row(r) < x.share * x.lq
                heads[r] = g * x.share + (row(r) // x.lq if here else 0)
                numbers[r] = row(r) % x.lq if here else x.lq
            first, length, front = 0, x.share * x.lq, g * x.share
        else:
            # Where the last rows see more keys than the first, the longest work begins first.
            t = (x.lq + rows - 1) // rows - 1 - t
            g, first, length, front = h // x.share, t * rows, q_length, h
            for r in range(tall):
                heads[r], numbers[r] = h, first + row(r)
        fill_q(ops.past(x.q, b * x.q_strides[0] + front * x.q_strides[1]), x.q_strides, x.lq, x.pages, first, length)
        sequence = 0 if paged else b
        k = ops.past(x.k, sequence * x.k_strides[0] + g * x.k_strides[1])
        v = ops.past(x.v, sequence * x.v_strides[0] + g * x.v_strides[1])
        s, o, top, total = ops.local(scores), ops.local(outputs), ops.local(tall), ops.local(tall)
        for r in range(tall):
            places[r] = place_of(x.q_at, b * x.at_strides[0], numbers[r], x.lq)
            parts[r] = part_of(x.q_segment, b * x.at_strides[1], numbers[r], x.lq)

        careful, again = 0, True
        while again:
            for r in range(tall):
                top[r] = sink_of(x, heads[r], z)
                total[r] = one if leads() and top[r] != bottom else zero
            for w in range(outputs):
                o[w] = zero
            walk(x, t, b, k, v, begin, end, careful, heads, numbers, places, parts, s, o, top, total)
            spoilt = finish(x, b, z, q_length, careful, heads, numbers, o, top, total)
            again = careful < SEARCHING and (ops.barrier_or(spoilt) or careful == CLEANED)
            careful += 1

    return Kernel(forward, product.words)
