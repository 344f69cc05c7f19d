r"""The backward pass, from out and lse and without a score matrix, in two kernels that share nothing but their text.

FlashAttention-2 (arXiv 2307.08691, algorithm 2), with dU = scale cap' dS, dS = P ∘ (dP − δ), dP = dO Vᵀ:

    rows   a tile of queries by tiles of keys:   dQ = Σ dU K
    keys   a tile of keys by tiles of queries of all heads that read them:   dV = Σ Pᵀ dO,   dK = Σ dUᵀ Q

Scores are made in both, so that each number of a gradient is summed by one thread, in one order, without atomics.
A tile that is met has a buffer for each of its two matrices, and one is fetched while the last product uses the other.
What is not finite in q, k, v or dout must not reach a kernel: 0·NaN is NaN where a pair is hidden.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position
# ruff: noqa: PLR0915  a factory holds what its kernel closes over

from __future__ import annotations

from typing import Any

import numpy as np

from refattn.engines.cuda.kernels import cotangents, sight, simt, softmax, tensor
from refattn.engines.cuda.kernels.form import Form
from refattn.engines.cuda.kernels.forward import Kernel
from refattn.engines.cuda.kernels.product import Product
from refattn.engines.cuda.kernels.sight import NOTHING

F = np.float32


def make_rows(ops: Any, form: Form) -> Kernel:
    """The kernel of dq and of the slopes' cotangents, for a grid of (tiles of rows, Hq, B)."""
    near, far = _products(ops, form)
    pairs = cotangents.make(ops, form, near, turned=False)
    own, weigh, steepen = pairs.own, pairs.weigh, pairs.steepen
    sum_of, _, _ = softmax.make(ops, near)
    see, following = sight.make(ops, form)
    put = _writer(ops, near, form.depth)
    tall, row, leads, rows, keys, slopes = near.tall, near.row, near.leads, form.rows, form.keys, form.slopes
    near_q, near_k, near_multiply, accumulate = near.fill_q, near.fill_k, near.multiply, near.accumulate
    far_q, far_k, far_multiply = far.fill_q, far.fill_k, far.multiply
    scores, outputs, zero, none = tall * near.broad, tall * near.wide, F(0), F(np.inf)
    tabled = form.tabled
    tabulate, words = _tabling(ops, form, near, far.words)

    def of_rows(x, y):
        t, h, b = ops.block(0), ops.block(1), ops.block(2)
        q_tiles, k_tiles, g = (x.lq + rows - 1) // rows, (x.lk + keys - 1) // keys, h // x.share
        t = q_tiles - 1 - t
        first, k_length, start = t * rows, ops.read(x.k_length, b), (b * x.heads + h) * x.lq
        q_length = ops.read(x.q_length, b)
        near_q(ops.past(x.q, b * x.q_strides[0] + h * x.q_strides[1]), x.q_strides, 1, x.pages, first, q_length)
        dout = ops.past(y.dout, b * y.dout_strides[0] + h * y.dout_strides[1])
        far_q(dout, y.dout_strides, 1, x.pages, first, q_length)
        k = ops.past(x.k, b * x.k_strides[0] + g * x.k_strides[1])
        v = ops.past(x.v, b * x.v_strides[0] + g * x.v_strides[1])
        s, d, o = ops.local(scores), ops.local(scores), ops.local(outputs)
        levels, lesses, slope = ops.local(tall), ops.local(tall), ops.local(tall)
        places, parts = ops.local_int(tall), ops.local_int(tall)
        own(x, b, first, places, parts)
        for r in range(tall):
            there = first + row(r) < q_length
            levels[r] = ops.read(ops.past(y.level, start), first + row(r)) if there else none
            lesses[r] = ops.read(ops.past(y.less, start), first + row(r)) if there else zero
            slope[r] = zero
        for w in range(outputs):
            o[w] = zero
        n = following(x, b, t, 0, k_tiles, q_tiles, k_tiles)
        if n < k_tiles:
            near_k(k, x.k_strides, 1, x.pages, n * keys, k_length)
            far_k(v, x.v_strides, 1, x.pages, n * keys, k_length)
        ops.commit()
        while n < k_tiles:
            ops.wait(0)
            ops.barrier()
            far_multiply(d)
            near_multiply(s)
            some = see(x, b, t, n, q_tiles, k_tiles) != 0
            weigh(x, b, h, first, n * keys, some, places, parts, levels, lesses, s, d)
            if slopes:
                steepen(x, b, n * keys, places, d, slope)
            if tabled:
                sums = ops.past(y.sums, ((b * x.heads + h) * q_tiles + t) * x.columns)
                tabulate(x, b, t, n, first, q_tiles, k_tiles, d, sums)
            n = following(x, b, t, n + 1, k_tiles, q_tiles, k_tiles)
            ops.barrier()
            if n < k_tiles:
                far_k(v, x.v_strides, 1, x.pages, n * keys, k_length)
            accumulate(o, d)
            ops.barrier()
            if n < k_tiles:
                near_k(k, x.k_strides, 1, x.pages, n * keys, k_length)
            ops.commit()
        put(y.dq, start, first, x.lq, y.scale, o)
        if slopes:
            for r in range(tall):
                whole = sum_of(slope[r])
                if leads() and first + row(r) < x.lq:
                    ops.write(ops.past(y.slope, start), first + row(r), whole)

    return Kernel(of_rows, words if tabled else far.words)


def _tabling(ops: Any, form: Form, product: Product, word: int) -> tuple[Any, int]:
    """`tabulate(x, b, t, n, first, q_tiles, k_tiles, d, sums)`, and where its shared memory from `word` on ends.

    Adds the dS of a tile, which all threads have put beside each other, to the columns of its differences: a thread for
    each column, so that each sum has one order, whatever the positions are.
    """
    tall, broad, row, key, score = product.tall, product.broad, product.row, product.key, product.score
    rows, keys, threads, zero = form.rows, form.keys, form.threads, F(0)
    far = 1 << 30  # makes positions, which are within 2^29, more than 0
    stride, keys_word, rows_word = keys + 1, word + rows * (keys + 1), word + rows * (keys + 1) + keys

    @ops.device
    def lay(x, b, n, first, d):
        for r in range(tall):
            for c in range(broad):
                ops.put(word + row(r) * stride + key(c), d[score(r, c)])
        m = ops.thread()
        while m < keys:
            j = min(n * keys + m, x.lk - 1)
            ops.put_bits(keys_word + m, ops.read(x.k_at, b * x.at_strides[2] + j) + far)
            m += threads
        m = ops.thread()
        while m < rows:
            i = min(first + m, x.lq - 1)
            ops.put_bits(rows_word + m, ops.read(x.q_at, b * x.at_strides[0] + i) + far)
            m += threads
        ops.barrier()

    @ops.device
    def tabulate(x, b, t, n, first, q_tiles, k_tiles, d, sums):
        lay(x, b, n, first, d)
        ends_q, ends_k = 4 * (b * q_tiles + t), 4 * (b * k_tiles + n)
        column = ops.read(x.k_ends, ends_k) - ops.read(x.q_ends, ends_q + 1) + x.zero + ops.thread()
        last = ops.read(x.k_ends, ends_k + 1) - ops.read(x.q_ends, ends_q) + x.zero
        while column <= last:
            total = zero
            for r in range(rows):
                place = ops.get_bits(rows_word + r) + column - x.zero
                for c in range(keys):
                    if ops.get_bits(keys_word + c) == place:
                        total = total + ops.get(word + r * stride + c)
            ops.write(sums, column, ops.read(sums, column) + total)
            column += threads

    return tabulate, rows_word + rows


def make_keys(ops: Any, form: Form) -> Kernel:
    """The kernel of dk and dv, for a grid of (tiles of keys, Hkv, B)."""
    near, far = _products(ops, form._replace(rows=form.keys, keys=form.rows))
    pairs = cotangents.make(ops, form, near, turned=True)
    own, weigh = pairs.own, pairs.weigh
    see, _ = sight.make(ops, form)
    put_k, put_v = _writer(ops, near, form.depth), _writer(ops, far, form.width)
    tall, broad, key, rows, keys = near.tall, near.broad, near.key, form.rows, form.keys
    near_k, near_q, near_multiply, near_accumulate = near.fill_q, near.fill_k, near.multiply, near.accumulate
    far_k, far_q, far_multiply, far_accumulate = far.fill_q, far.fill_k, far.multiply, far.accumulate
    scores, deep, wide = tall * broad, tall * near.wide, tall * far.wide
    zero, one, none = F(0), F(1), F(np.inf)

    @ops.device
    def following(x, b, n, u, q_tiles, k_tiles):
        """The first tile of rows from u on, head by head, that sees anything of the keys."""
        while u < x.share * q_tiles and see(x, b, u % q_tiles, n, q_tiles, k_tiles) == NOTHING:
            u += 1
        return u

    @ops.device
    def fetch(fill, x, p, strides, b, h, first, length):
        fill(ops.past(p, b * strides[0] + h * strides[1]), strides, 1, x.pages, first, length)

    def of_keys(x, y):
        n, g, b = ops.block(0), ops.block(1), ops.block(2)
        q_tiles, k_tiles = (x.lq + rows - 1) // rows, (x.lk + keys - 1) // keys
        first, k_length, q_length = n * keys, ops.read(x.k_length, b), ops.read(x.q_length, b)
        fetch(near_k, x, x.k, x.k_strides, b, g, first, k_length)
        fetch(far_k, x, x.v, x.v_strides, b, g, first, k_length)
        s, d, dk, dv = ops.local(scores), ops.local(scores), ops.local(deep), ops.local(wide)
        levels, lesses = ops.local(broad), ops.local(broad)
        places, parts = ops.local_int(tall), ops.local_int(tall)
        own(x, b, first, places, parts)
        for w in range(deep):
            dk[w] = zero
        for w in range(wide):
            dv[w] = zero
        u, end = following(x, b, n, 0, q_tiles, k_tiles), x.share * q_tiles
        if u < end:
            h, i = g * x.share + u // q_tiles, u % q_tiles * rows
            fetch(near_q, x, x.q, x.q_strides, b, h, i, q_length)
            fetch(far_q, x, y.dout, y.dout_strides, b, h, i, q_length)
        ops.commit()
        while u < end:
            h, t = g * x.share + u // q_tiles, u % q_tiles
            i, start = t * rows, (b * x.heads + h) * x.lq
            for c in range(broad):
                there = i + key(c) < q_length
                levels[c] = ops.read(ops.past(y.level, start), i + key(c)) if there else none
                lesses[c] = ops.read(ops.past(y.less, start), i + key(c)) if there else zero
            ops.wait(0)
            ops.barrier()
            far_multiply(d)
            near_multiply(s)
            some = see(x, b, t, n, q_tiles, k_tiles) != 0
            weigh(x, b, h, first, i, some, places, parts, levels, lesses, s, d)
            far_accumulate(dv, s)
            u = following(x, b, n, u + 1, q_tiles, k_tiles)
            h, i = g * x.share + u // q_tiles, u % q_tiles * rows
            ops.barrier()
            if u < end:
                fetch(far_q, x, y.dout, y.dout_strides, b, h, i, q_length)
            near_accumulate(dk, d)
            ops.barrier()
            if u < end:
                fetch(near_q, x, x.q, x.q_strides, b, h, i, q_length)
            ops.commit()
        start = (b * (x.heads // x.share) + g) * x.lk
        put_k(y.dk, start, first, x.lk, y.scale, dk)
        put_v(y.dv, start, first, x.lk, one, dv)

    return Kernel(of_keys, far.words)


def _products(ops: Any, form: Form) -> tuple[Product, Product]:
    """Of q and k, and of dout and v, in shared memory one after the other."""
    module = simt if form.storage == "float32" else tensor
    near = module.make(ops, form._replace(width=form.depth), base=0)
    return near, module.make(ops, form._replace(depth=form.width), base=near.words)


def _writer(ops: Any, product: Product, width: int) -> Any:
    """`put(p, start, first, length, factor, o)`: rows of a tile times a factor to row start + first and on."""
    tall, wide, row, column, output = product.tall, product.wide, product.row, product.column, product.output

    @ops.device
    def put(p, start, first, length, factor, o):
        for r in range(tall):
            i = first + row(r)
            for w in range(wide):
                if i < length and column(w) < width:
                    ops.write(ops.past(p, (start + i) * width), column(w), o[output(r, w)] * factor)

    return put
