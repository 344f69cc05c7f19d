r"""A Recurrent plan: a memory is read and written segment by segment, each in chunks of rows.

A block has some columns of a memory. Sᵀ of them and z stay in shared memory, and the sum of what is written in
registers, so that all of a segment reads the memory at its beginning:

    out_i = f_i S / (max(f_i·z, clamp) + add),   S' = A S + Σ_j g_j u_jᵀ,   u_j = v_j, or v_j less what g_j reads
"""
# ruff: noqa: PLR0915, PLR0917  Numba calls kernels by position, and a factory holds what its kernel closes over

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cuda.kernels import simt, softmax
from refattn.engines.cuda.kernels.form import Form, padded
from refattn.engines.cuda.kernels.forward import Kernel

F = np.float32


class Recurrence(NamedTuple):
    """What the kernel reads and writes, float32 in C order.

    q (B,Hq,Lq,F), k (B,Hkv,Lk,F), v (B,Hkv,Lk,Dv), memory (B,Hkv,F,Dv), weight (B,Hkv,F), out (B,Hq,Lq,Dv); transition
    (F,F) is Aᵀ; pages is not read. heads, share, lq, lk, segment, clamp and add as `plan.Recurrent` has them.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    memory: Any
    weight: Any
    transition: Any
    pages: Any
    heads: Any
    share: Any
    lq: Any
    lk: Any
    segment: Any
    clamp: Any
    add: Any


def make(ops: Any, form: Form) -> Kernel:
    """The kernel of a form, for a grid of (tiles of columns, Hkv, B).

    Of the form depth is F; keys, as many as rows, are the columns of a block, and rows the rows of a chunk.
    """
    depth, width, count, threads, lanes = form.depth, form.width, form.rows, form.threads, form.lanes
    product = simt.make(ops, form._replace(width=depth), base=0)
    fill, multiply, sum_of = product.fill_q, product.multiply, softmax.make(ops, product).sum
    tall, broad, wide, row, key, column = (getattr(product, n) for n in "tall broad wide row key column".split())
    groups, stride, u_stride = wide // 4, lanes * wide + 4, count + 4
    s_word, u_word = count * stride, product.words
    z_word = u_word + count * u_stride
    words, cells = z_word + padded(depth, 4), count * (stride - 4)
    write = simt.adding(ops, tall, lanes, groups, count, 0, stride, u_stride)
    move = simt.adding(ops, tall, lanes, groups, count, 0, stride, stride)
    divided, delta, weighed, moved = form.divided, form.delta, form.weighed, form.moved
    scores, outputs, sums = tall * broad, tall * wide, -(-depth // threads)
    weighing, zero = sums if divided else 0, F(0)

    @ops.device
    def load(x, b, g, first):
        """The memory and its weight at the beginning, 0 where there is none."""
        start = (b * (x.heads // x.share) + g) * depth
        memory, weight, n = ops.past(x.memory, start * width), ops.past(x.weight, start), ops.thread()
        while n < cells:
            f, c = n // count, n % count
            there = f < depth and first + c < width
            ops.put(s_word + c * stride + f, ops.read(memory, f * width + first + c) if there else zero)
            n += threads
        n = ops.thread()
        while divided and n < depth:
            ops.put(z_word + n, ops.read(weight, n))
            n += threads

    @ops.device
    def fetch(x, p, first, stop):
        """A chunk of rows of features, once all threads are done with the last one."""
        ops.barrier()
        fill(p, (0, 0, depth), 1, x.pages, first, stop)
        ops.commit()

    @ops.device
    def arrive():
        ops.wait(0)
        ops.barrier()

    @ops.device
    def read(x, s):
        """What the rows of the chunk read."""
        multiply(s)
        if divided:
            for r in range(tall):
                dot, f = zero, ops.thread() & (lanes - 1)
                while f < depth:
                    dot = dot + ops.get(row(r) * stride + f) * ops.get(z_word + f)
                    f += lanes
                dot = sum_of(dot)
                size = (x.clamp if dot < x.clamp else dot) + x.add
                for c in range(broad):
                    s[r * broad + c] = zero if size == zero else ops.divide(s[r * broad + c], size)

    @ops.device
    def answer(x, b, g, first, begin, end, s):
        """Out of rows from `begin` to `end` of all heads that share the memory."""
        for h in range(g * x.share, (g + 1) * x.share):
            start, i = (b * x.heads + h) * x.lq, begin
            while i < end:
                fetch(x, ops.past(x.q, start * depth), i, end)
                arrive()
                read(x, s)
                for r in range(tall):
                    out = ops.past(x.out, (start + i + row(r)) * width)
                    for c in range(broad):
                        if i + row(r) < end and first + key(c) < width:
                            ops.write(out, first + key(c), s[r * broad + c])
                i += count

    @ops.device
    def learn(x, b, g, first, begin, end, s, o, z):
        """What keys from `begin` to `end` write, added to o, and to z their own sum."""
        start, j = (b * (x.heads // x.share) + g) * x.lk, begin
        v = ops.past(x.v, start * width)
        while j < end:
            fetch(x, ops.past(x.k, start * depth), j, end)
            n = ops.thread()
            while n < count * count:
                m, c = n // count, n % count
                there = j + m < end and first + c < width
                ops.put(u_word + c * u_stride + m, ops.read(ops.past(v, (j + m) * width), first + c) if there else zero)
                n += threads
            arrive()
            if delta:
                read(x, s)
                for r in range(tall):
                    for c in range(broad):
                        word = u_word + key(c) * u_stride + row(r)
                        ops.put(word, ops.get(word) - s[r * broad + c])
                ops.barrier()
            write(o, u_word)
            for n in range(weighing):
                f = ops.thread() + n * threads
                for m in range(count):
                    if f < depth:
                        z[n] = z[n] + ops.get(m * stride + f)
            j += count

    @ops.device
    def remember(x, o, z):
        """The memory and its weight from now on; o and z begin anew."""
        if moved:
            for m in range(0, depth, count):
                fetch(x, x.transition, m, depth)
                arrive()
                move(o, s_word + m)
        ops.barrier()
        for r in range(tall):
            for w in range(wide):
                word = s_word + row(r) * stride + column(w)
                ops.put(word, o[r * wide + w] if moved else ops.get(word) + o[r * wide + w])
                o[r * wide + w] = zero
        if divided:
            known = False
            for n in range(sums):
                f = ops.thread() + n * threads
                if f < depth and ops.get(z_word + f) != zero:
                    known = True
            known = ops.barrier_or(known)
            for n in range(sums):
                f = ops.thread() + n * threads
                if f < depth and (weighed or not known):
                    ops.put(z_word + f, ops.get(z_word + f) + z[n])
                z[n] = zero

    def recur(x):
        first, g, b = ops.block(0) * count, ops.block(1), ops.block(2)
        s, o, z = ops.local(scores), ops.local(outputs), ops.local(sums)
        for n in range(outputs):
            o[n] = zero
        for n in range(sums):
            z[n] = zero
        load(x, b, g, first)
        ahead, begin = x.lk - x.lq, 0
        while begin < x.lk:
            end = min(begin + x.segment, x.lk)
            answer(x, b, g, first, max(begin - ahead, 0), end - ahead, s)
            if end < x.lk:
                learn(x, b, g, first, begin, end, s, o, z)
                remember(x, o, z)
            begin = end

    return Kernel(recur, words)
