"""The forward pass in float32: a tile of rows by tiles of keys, each thread a small block of both products.

FlashAttention-2 (arXiv 2307.08691, algorithm 1). The threads of a block stand `lanes` beside each other in rows of
threads; a thread holds the scores of TM rows with TN keys and TM rows of 4-column groups of the output. Weights go
through shared memory within a warp. Keys and values have a buffer each, and one is fetched while the other is used.

Where a value that is not finite reached a row, masked or not, the block runs again: once with those values as 0, and
once to find which rows see one, for 0·NaN is NaN.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cuda.kernels import logits, sight, softmax, tiles
from refattn.engines.cuda.kernels.form import Form, padded

F = np.float32


class Layout(NamedTuple):
    """Where things stand in shared memory, in words, and how threads share a tile.

    lanes threads beside each other; tall rows and broad keys of scores for each.
    """

    lanes: int
    tall: int
    broad: int
    groups: int
    q: int
    k: int
    v: int
    p: int
    stride: int
    v_stride: int
    p_stride: int
    words: int


def layout(form: Form, lanes: int) -> Layout:
    """The layout of a form with so many threads beside each other, a power of 2 within a warp."""
    tall, broad = form.rows * lanes // form.threads, form.keys // lanes
    stride, groups = padded(form.depth, 4) + 4, -(-form.width // (4 * lanes))
    v_stride, p_stride = 4 * lanes * groups + 4, form.keys + 4
    sizes = form.rows * stride, form.keys * stride, form.keys * v_stride, form.rows * p_stride
    q, k, v, p = 0, sizes[0], sum(sizes[:2]), sum(sizes[:3])
    return Layout(lanes, tall, broad, groups, q, k, v, p, stride, v_stride, p_stride, sum(sizes))


def make(ops: Any, form: Form, lanes: int = 16) -> Any:
    """The kernel, of one argument, `Arguments`; a grid of (tiles of rows, Hq, B) blocks."""
    at = layout(form, lanes)
    rows, keys, threads, tall, broad, groups = form.rows, form.keys, form.threads, at.tall, at.broad, at.groups
    q_word, k_word, v_word, p_word = at.q, at.k, at.v, at.p
    stride, v_stride, p_stride, depth = at.stride, at.v_stride, at.p_stride, at.stride - 4
    width, v_columns, v_words = form.width, at.v_stride - 4, form.keys * at.v_stride
    shift, rest, step, scores, sums = lanes.bit_length() - 1, lanes - 1, 4 * lanes, tall * broad, 4 * tall * groups
    four_keys, wide, parts = 4 * broad, 4 * groups, 4 * groups * tall
    zero, one, bottom, nan = F(0), F(1), F(-np.inf), F(np.nan)
    eyes, soft, pair = sight.make(ops, form), softmax.make(ops, lanes), logits.make(ops, form)
    see, following, greatest, total_of, base, lse_of = *eyes, soft.greatest, soft.sum, soft.base, soft.lse
    place_of, part_of, logit = pair
    fill_q = tiles.make(ops, form, rows, form.depth, stride)
    fill_k = tiles.make(ops, form, keys, form.depth, stride)
    fill_v = tiles.make(ops, form, keys, form.width, v_stride)

    @ops.device
    def multiply(s, x, y):  # type: ignore[no-untyped-def]
        """Scores of a tile: s[r, c] = q_r · k_c."""
        near = ops.local(four_keys)
        for n in range(scores):
            s[n] = zero
        for d in range(0, depth, 4):
            for c in range(broad):
                word = k_word + (x + (c << shift)) * stride + d
                near[4 * c], near[4 * c + 1], near[4 * c + 2], near[4 * c + 3] = ops.get4(word)
            for r in range(tall):
                q0, q1, q2, q3 = ops.get4(q_word + (y * tall + r) * stride + d)
                for c in range(broad):
                    t = q0 * near[4 * c] + s[r * broad + c]
                    t = q1 * near[4 * c + 1] + t
                    t = q2 * near[4 * c + 2] + t
                    s[r * broad + c] = q3 * near[4 * c + 3] + t

    @ops.device
    def accumulate(o, x, y):  # type: ignore[no-untyped-def]
        """o += P·V of a tile."""
        near = ops.local(wide)
        for n in range(0, keys, 4):
            for m in range(4):
                for g in range(groups):
                    word = v_word + (n + m) * v_stride + 4 * x + step * g
                    near[4 * g], near[4 * g + 1], near[4 * g + 2], near[4 * g + 3] = ops.get4(word)
                for r in range(tall):
                    p = ops.get(p_word + (y * tall + r) * p_stride + n + m)
                    for w in range(wide):
                        o[r * wide + w] = p * near[w] + o[r * wide + w]

    @ops.device
    def sweep(search):  # type: ignore[no-untyped-def]
        """Values that are not finite become 0; in a search they become 1, and all others 0."""
        for n in range(ops.thread(), v_words, threads):
            if n % v_stride < v_columns:
                value = ops.get(v_word + n)
                finite = value - value == zero
                kept = zero if search else value
                ops.put(v_word + n, kept if finite else one if search else zero)

    def forward(x):  # type: ignore[no-untyped-def]
        t, h, b = ops.block(0), ops.block(1), ops.block(2)
        q_tiles, k_tiles = (x.lq + rows - 1) // rows, (x.lk + keys - 1) // keys
        # Where the last rows see more keys than the first, the longest work begins first.
        t = q_tiles - 1 - t
        g, first = h // x.share, t * rows
        q_length, k_length = ops.read(x.q_length, b), ops.read(x.k_length, b)
        across, down = ops.thread() & rest, ops.thread() >> shift
        q = ops.past(x.q, b * x.q_strides[0] + h * x.q_strides[1])
        k = ops.past(x.k, b * x.k_strides[0] + g * x.k_strides[1])
        v = ops.past(x.v, b * x.v_strides[0] + g * x.v_strides[1])
        start = (b * x.heads + h) * x.lq
        out, lse = ops.past(x.out, start * width), ops.past(x.lse, start)
        sink = ops.read(x.sink, h)
        s, o, top, total = ops.local(scores), ops.local(parts), ops.local(tall), ops.local(tall)
        place, part = ops.local_int(tall), ops.local_int(tall)
        for r in range(tall):
            i = first + down * tall + r
            place[r] = place_of(x.q_at, b * x.at_strides[0], i, x.lq)
            part[r] = part_of(x.q_segment, b * x.at_strides[1], i, x.lq)
        fill_q(q_word, q, x.q_strides[2], first, q_length)

        careful, again = 0, True
        while again:
            for r in range(tall):
                top[r], total[r] = sink, one if across == 0 and sink != bottom else zero
            for w in range(parts):
                o[w] = zero
            n = following(x, b, t, 0, q_tiles, k_tiles)
            if n < k_tiles:
                fill_k(k_word, k, x.k_strides[2], n * keys, k_length)
            ops.commit()
            while n < k_tiles:
                ops.wait(0)
                ops.barrier()
                fill_v(v_word, v, x.v_strides[2], n * keys, k_length)
                ops.commit()
                multiply(s, across, down)
                some = see(x, b, t, n, q_tiles, k_tiles) != 0
                for c in range(broad):
                    j = n * keys + across + (c << shift)
                    key_place = place_of(x.k_at, b * x.at_strides[2], j, x.lk)
                    key_part = part_of(x.k_segment, b * x.at_strides[3], j, x.lk)
                    for r in range(tall):
                        i, m = first + down * tall + r, r * broad + c
                        s[m] = logit(x, b, h, i, place[r], part[r], j, key_place, key_part, s[m], some)
                for r in range(tall):
                    here = s[r * broad]
                    for c in range(1, broad):
                        here = ops.larger(here, s[r * broad + c])
                    new = ops.larger(top[r], greatest(here))
                    low = base(new)
                    factor = ops.exp2(top[r] - low)
                    top[r], total[r] = new, total[r] * factor
                    for w in range(wide):
                        o[r * wide + w] = o[r * wide + w] * factor
                    for c in range(broad):
                        p = ops.exp2(s[r * broad + c] - low)
                        total[r] = total[r] + p
                        if careful == 2:
                            p = zero if s[r * broad + c] == bottom else one
                        ops.put(p_word + (down * tall + r) * p_stride + across + (c << shift), p)
                n = following(x, b, t, n + 1, q_tiles, k_tiles)
                ops.wait(0)
                ops.barrier()
                if n < k_tiles:
                    fill_k(k_word, k, x.k_strides[2], n * keys, k_length)
                ops.commit()
                if careful > 0:
                    sweep(careful == 2)
                    ops.barrier()
                accumulate(o, across, down)

            spoilt = False
            for r in range(tall):
                i, whole = first + down * tall + r, total_of(total[r])
                inside = i < q_length
                norm = ops.divide(one, whole) if inside and whole != zero else zero
                if i < x.lq:
                    for w in range(wide):
                        column = 4 * across + step * (w >> 2) + (w & 3)
                        value = o[r * wide + w]
                        if column < width:
                            spoilt = spoilt or (inside and value - value != zero)
                            if careful < 2:
                                ops.write(out, i * width + column, value * norm if inside else zero)
                            elif inside and value > zero:
                                ops.write(out, i * width + column, nan)
                    if across == 0 and careful == 0:
                        ops.write(lse, i, lse_of(top[r], whole) if inside else lse_of(sink, zero if sink == bottom else one))
            again = careful < 2 and (ops.barrier_or(spoilt) or careful == 1)
            careful += 1

    return forward
