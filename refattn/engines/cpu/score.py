r"""Kernels of the Score plan, one query row after another; `refattn.plan.execute` is what they mean.

    forward     p_j = exp(s_j − m) / z,  out = Σ_j c_j p_j v_j,  lse = m + log z,  z = exp(sink − m) + Σ_j exp(s_j − m)
    backward    dp_j = c_j dout·v_j,  δ = Σ_j p_j dp_j − dlse,  ds_j = p_j (dp_j − δ),  du_j = scale cap'_j ds_j
                dq = Σ_j du_j k_j,  dk_j = Σ_i du_ij q_i,  dv_j = Σ_i c_ij p_ij dout_i,  dsink = −exp(sink − lse) δ
    sigmoid     p_j = 1 / (1 + exp(−s_j − bias)),  ds_j = p_j (1 − p_j) dp_j,  no lse, no sink

c is keep over its probability; cap' = 1 − tanh² is the softcap's slope. Only a row's live keys are ever read, so what a
masked slot holds cannot matter. A row is made anew wherever it is needed, so no score matrix is stored: scratch is a
few rows of length Lk for each thread. Each task writes its own rows, in a fixed order.

Names: x is Operands; b, h, i, j batch, query head, query, key; t counts a row's live keys.
"""
# ruff: noqa: PLR0917  Numba calls kernels by position

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.engines.cpu.operands import Operands
from refattn.jit import jit

Array = NDArray[Any]


@jit
def begin(strides: Array, n: int, b: int, h: int, i: int) -> int:
    """Where row (b, h, i) of a stack's n-th array begins."""
    start: int = strides[n, 0] + b * strides[n, 1] + h * strides[n, 2] + i * strides[n, 3]
    return start


@jit
def all_true(data: Array, strides: Array, b: int, h: int, i: int, j: int) -> bool:
    """Whether every array of a boolean stack says True of a pair."""
    for n in range(strides.shape[0]):
        if not data[begin(strides, n, b, h, i) + j * strides[n, 4]]:
            return False
    return True


@jit
def bias(x: Operands, b: int, h: int, i: int, j: int, r: int) -> Any:
    """Sum of a pair's biases, r = position(j) − position(i); −∞ if any of them is."""
    distance = x.q.dtype.type(abs(r))
    total = -x.slopes[h] * distance
    if total == -np.inf:
        return total
    if x.table.shape[1] > 0:
        value = x.table[h, r - x.low]
        if value == -np.inf:
            return value
        total += value
    for n in range(x.bias_strides.shape[0]):
        value = x.biases[begin(x.bias_strides, n, b, h, i) + j * x.bias_strides[n, 4]]
        if value == -np.inf:
            return value
        total += value
    return total


@jit
def visible(x: Operands, b: int, h: int, i: int, j: int) -> Any:
    """What is added to the logit of a pair; −∞ where it is masked."""
    hidden = x.q.dtype.type(-np.inf)
    if i >= x.q_length[b] or j >= x.k_length[b]:
        return hidden
    r = x.k_at[b % x.k_at.shape[0], j] - x.q_at[b % x.q_at.shape[0], i]
    if r < x.span[0] or r > x.span[1]:
        return hidden
    if x.k_segment[b % x.k_segment.shape[0], j] != x.q_segment[b % x.q_segment.shape[0], i]:
        return hidden
    if not all_true(x.masks, x.mask_strides, b, h, i, j):
        return hidden
    return bias(x, b, h, i, j, r)


@jit
def see(x: Operands, keys: Array, rows: Array) -> None:
    """Set rows (B,Hq,Lq) where one of the keys (n,3), each b, key head, j, is visible."""
    share = x.q.shape[1] // x.k.shape[1]
    for n in range(keys.shape[0]):
        b, g, j = keys[n, 0], keys[n, 1], keys[n, 2]
        for h in range(g * share, (g + 1) * share):
            for i in range(x.q.shape[2]):
                if visible(x, b, h, i, j) != -np.inf:
                    rows[b, h, i] = True


@jit
def logits(x: Operands, b: int, h: int, i: int, live: Array, s: Array, slope: Array) -> int:
    """Fill `live` with the keys that row (b, h, i) sees, s with its logits, slope with ds/d(q·k); return how many."""
    zero, one = x.q.dtype.type(0), x.q.dtype.type(1)
    g = h // (x.q.shape[1] // x.k.shape[1])
    scale, cap = x.constants[0], x.constants[1]
    t = 0
    for j in range(x.k.shape[2]):
        added = visible(x, b, h, i, j)
        if added == -np.inf:
            continue
        dot = zero
        for d in range(x.q.shape[3]):
            dot += x.q[b, h, i, d] * x.k[b, g, j, d]
        dot *= scale
        steep = scale
        if cap > 0:
            bent = x.q.dtype.type(math.tanh(dot / cap))
            dot, steep = cap * bent, scale * (one - bent * bent)
        live[t], s[t], slope[t] = j, dot + added, steep
        t += 1
    return t


@jit
def softmax(x: Operands, h: int, n: int, s: Array) -> Any:
    """Replace the first n logits by probabilities and return lse; all NaN where a logit is not finite."""
    sink = x.sink[h]
    m = sink
    ok = not math.isnan(sink)
    for t in range(n):
        ok = ok and math.isfinite(s[t])
        m = max(m, s[t])
    if not ok:
        s[:n] = np.nan
        return x.q.dtype.type(np.nan)
    if m == -np.inf:
        return m
    z = np.exp(sink - m)
    for t in range(n):
        s[t] = np.exp(s[t] - m)
        z += s[t]
    for t in range(n):
        s[t] /= z
    return m + np.log(z)


@jit
def sigmoids(x: Operands, n: int, s: Array) -> Any:
    """Replace the first n logits by their sigmoids, NaN where one is not finite; return 0, for there is no lse."""
    one = x.q.dtype.type(1)
    for t in range(n):
        if math.isfinite(s[t]):
            s[t] = one / (one + np.exp(-(s[t] + x.constants[3])))
        else:
            s[t] = np.nan
    return x.q.dtype.type(0)


@jit
def weigh(x: Operands, h: int, n: int, s: Array) -> Any:
    """Replace the first n logits by weights; return lse, NaN where it spoils the row."""
    return sigmoids(x, n, s) if x.sigmoid else softmax(x, h, n, s)


@jit
def kept(x: Operands, b: int, h: int, i: int, j: int) -> Any:
    """1/probability where the pair is kept, else 0."""
    factor = x.constants[2]
    return factor if all_true(x.keeps, x.keep_strides, b, h, i, j) else x.q.dtype.type(0)


@jit
def forward(x: Operands, out: Array, lse: Array, start: int, stop: int) -> None:
    """Out (B,Hq,Lq,Dv) and lse (B,Hq,Lq); task = query row."""
    _, heads, rows, width = out.shape
    keys = x.k.shape[2]
    live, p, slope = np.empty(keys, np.int64), np.empty(keys, x.q.dtype), np.empty(keys, x.q.dtype)
    for task in range(start, stop):
        b, h, i = task // (heads * rows), task // rows % heads, task % rows
        g = h // (heads // x.k.shape[1])
        n = logits(x, b, h, i, live, p, slope)
        lse[b, h, i] = weigh(x, h, n, p)
        out[b, h, i] = np.nan if math.isnan(lse[b, h, i]) else 0.0
        for t in range(n):
            w = p[t] * kept(x, b, h, i, live[t])
            for d in range(width):
                out[b, h, i, d] += w * x.v[b, g, live[t], d]


@jit
def cotangents(
    x: Operands, dout: Array, dlse: Array, b: int, h: int, i: int, live: Array, w: Array, ds: Array, du: Array
) -> tuple[int, Any]:
    """Row (b, h, i) backward: its live keys, their weights c p, the cotangents of logits and q·k; n and dsink."""
    n = logits(x, b, h, i, live, w, du)
    lse = weigh(x, h, n, w)
    g = h // (x.q.shape[1] // x.k.shape[1])
    delta = -dlse[b, h, i]
    for t in range(n):
        dp = x.q.dtype.type(0)
        for d in range(x.v.shape[3]):
            dp += dout[b, h, i, d] * x.v[b, g, live[t], d]
        ds[t] = kept(x, b, h, i, live[t]) * dp
        if not x.sigmoid:
            delta += w[t] * ds[t]
    for t in range(n):
        ds[t] = w[t] * (ds[t] - delta)
        if x.sigmoid:
            ds[t] *= x.q.dtype.type(1) - w[t]
        du[t] *= ds[t]
        w[t] *= kept(x, b, h, i, live[t])
    if x.sink[h] == -np.inf:
        return n, x.q.dtype.type(0)
    return n, -np.exp(x.sink[h] - lse) * delta


@jit
def backward_rows(
    x: Operands, dout: Array, dlse: Array, dq: Array, dslope: Array, dsink: Array, start: int, stop: int
) -> None:
    """Dq, and what each row adds to dslopes and dsink, (B,Hq,Lq) float64; task = query row."""
    _, heads, rows, width = dq.shape
    keys = x.k.shape[2]
    live, w = np.empty(keys, np.int64), np.empty(keys, x.q.dtype)
    ds, du = np.empty(keys, x.q.dtype), np.empty(keys, x.q.dtype)
    for task in range(start, stop):
        b, h, i = task // (heads * rows), task // rows % heads, task % rows
        g = h // (heads // x.k.shape[1])
        k_at = x.k_at[b % x.k_at.shape[0]]
        at = x.q_at[b % x.q_at.shape[0], i]
        n, dsink[b, h, i] = cotangents(x, dout, dlse, b, h, i, live, w, ds, du)
        dslope[b, h, i] = 0.0
        dq[b, h, i] = 0.0
        for t in range(n):
            dslope[b, h, i] -= ds[t] * abs(k_at[live[t]] - at)
            for d in range(width):
                dq[b, h, i, d] += du[t] * x.k[b, g, live[t], d]


@jit
def backward_keys(x: Operands, dout: Array, dlse: Array, dk: Array, dv: Array, start: int, stop: int) -> None:
    """Dk and dv; task = key head, which walks through all rows of its query heads."""
    _, groups, keys, _ = dk.shape
    share = x.q.shape[1] // groups
    live, w = np.empty(keys, np.int64), np.empty(keys, x.q.dtype)
    ds, du = np.empty(keys, x.q.dtype), np.empty(keys, x.q.dtype)
    for task in range(start, stop):
        b, g = task // groups, task % groups
        dk[b, g] = 0.0
        dv[b, g] = 0.0
        for h in range(g * share, (g + 1) * share):
            for i in range(x.q.shape[2]):
                n, _ = cotangents(x, dout, dlse, b, h, i, live, w, ds, du)
                for t in range(n):
                    j = live[t]
                    for d in range(x.q.shape[3]):
                        dk[b, g, j, d] += du[t] * x.q[b, h, i, d]
                    for d in range(x.v.shape[3]):
                        dv[b, g, j, d] += w[t] * dout[b, h, i, d]


@jit
def backward_bias(
    x: Operands, dout: Array, dlse: Array, shape: Array, by_distance: bool, dbias: Array, start: int, stop: int
) -> None:
    """Cotangent of a dense bias or of the table, float64; task = a row of it, which walks through all rows it biases.

    shape (3,) are the bias's own sizes in b, h and i, each 1 or full; dbias (their product, columns). The column of a
    pair is j, or 0 if there is but one; for the table, (1, Hq, 1), it is position(j) − position(i) − low.
    """
    batch, heads, rows, _ = x.q.shape
    keys = x.k.shape[2]
    step = 1 if dbias.shape[1] > 1 else 0
    live, w = np.empty(keys, np.int64), np.empty(keys, x.q.dtype)
    ds, du = np.empty(keys, x.q.dtype), np.empty(keys, x.q.dtype)
    for task in range(start, stop):
        dbias[task] = 0.0
        own = task // (shape[1] * shape[2]), task // shape[2] % shape[1], task % shape[2]
        for b in range(own[0], batch, shape[0]):
            k_at = x.k_at[b % x.k_at.shape[0]]
            for h in range(own[1], heads, shape[1]):
                for i in range(own[2], rows, shape[2]):
                    first = x.q_at[b % x.q_at.shape[0], i] + x.low
                    n, _ = cotangents(x, dout, dlse, b, h, i, live, w, ds, du)
                    for t in range(n):
                        column = k_at[live[t]] - first if by_distance else live[t] * step
                        dbias[task, column] += ds[t]
