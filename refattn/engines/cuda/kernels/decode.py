"""Few rows of queries: their keys are cut into parts, which blocks take side by side, and the parts are joined.

Flash-decoding. The first kernel is `forward` of a split form, whose tile is all rows that share a key head, so that a
key head is read once for all its query heads. Each part leaves its own softmax and its lse; here they become one:
lse = log Σ exp(lse_z), out = Σ exp(lse_z − lse) out_z.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cuda.kernels.form import Form
from refattn.engines.cuda.kernels.forward import Kernel

F = np.float32
MOST = 16  # rows that share a key head: a tile of tensor cores
LEAST = 128  # keys of a part
BLOCKS = 1024  # are enough to fill a device: a guess that has not been measured


class Parts(NamedTuple):
    """What `make`'s kernel reads and writes, in C order.

    outs (rows, splits, Dv) and lses (rows, splits) float32; out (rows, Dv) and lse (rows,).
    """

    outs: Any
    lses: Any
    out: Any
    lse: Any
    splits: Any


def make(ops: Any, form: Form) -> Kernel:
    """The kernel that puts parts together, of one argument, `Parts`; a block for each row, a thread for each column."""
    width, threads, narrow = form.width, form.threads, form.storage != "float32"
    pack = ops.pack_bf16 if form.storage == "bfloat16" else ops.pack_f16
    zero, bottom, log2e, ln2 = F(0), F(-np.inf), F(1.4426950408889634), F(0.6931471805599453)

    def combine(x):
        row, column = ops.block(0), ops.thread()
        lses, outs = ops.past(x.lses, row * x.splits), ops.past(x.outs, row * x.splits * width)
        top = bottom
        for z in range(x.splits):
            top = ops.larger(top, ops.read(lses, z))
        base, total = zero if top == bottom else top, zero
        for z in range(x.splits):
            total = total + ops.exp2((ops.read(lses, z) - base) * log2e)
        norm = zero if total == zero else ops.divide(F(1), total)
        while column < width:
            value = zero
            for z in range(x.splits):
                value = value + ops.exp2((ops.read(lses, z) - base) * log2e) * ops.read(outs, z * width + column)
            if narrow:
                ops.write(ops.past(x.out, row * width), column, pack(value * norm, zero))
            else:
                ops.write(ops.past(x.out, row * width), column, value * norm)
            column += threads
        if ops.thread() == 0:
            ops.write(x.lse, row, bottom if total == zero else base + ops.log2(total) * ln2)

    return Kernel(combine, 0)
