"""Correct kernels as a GPU author would write them, in NumPy float32, and the same with one fault planted.

Written from the papers of FlashAttention and not from refattn: scores in any base, online softmax in blocks, weights
and score gradients kept in 16 bits, out stored before D = rowsum(dO∘O), weights recomputed from a saved lse.
"""

from typing import Any, NamedTuple

import numpy as np

from refattn.dtypes import round_to

F = np.float32
LOG2E, LN2 = F(1.4426950408889634), F(0.6931471805599453)


class Kernel(NamedTuple):
    """block: keys at a time (0: two passes); order of the keys; base2: exp2 on scores scaled by log2 e; fault."""

    block: int = 0
    order: str = "forward"
    base2: bool = False
    fault: str = ""


KERNELS = {
    "two passes": Kernel(),
    "two passes, base 2": Kernel(base2=True),
    "blocks of 16": Kernel(16),
    "blocks of 16, reversed, base 2": Kernel(16, "reversed", True),
    "blocks of 64, shuffled": Kernel(64, "shuffled"),
    "blocks of 64, base 2": Kernel(64, base2=True),
}
FAULTS = ("bf16 accumulator", "dropped key", "fp8 weights", "scale missing in dq")


class Options(NamedTuple):
    """What a problem asks for: live (B,H,Lq,Lk), a dense bias broadcastable to it, sink (H,)."""

    scale: float
    live: Any
    bias: Any = None
    softcap: float | None = None
    sink: Any = None


def run(kernel, arrays, options, cotangents, dtype):
    """Outputs out, lse, dq, dk, dv, dbias, dsink (dense bias, sink only where given), as float64 arrays."""
    q, k, v = (arrays[n].astype(F) for n in "qkv")
    group = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
    dout, dlse = (cotangents[n].astype(F) for n in ("out", "lse"))
    order = _order(kernel, k.shape[2])
    k, v, live = k[:, :, order], v[:, :, order], options.live[..., order].copy()
    if kernel.fault == "dropped key":
        live[..., live.shape[-1] // 2] = False
    storage = None if dtype == "float32" else dtype
    s, slope = _scores(kernel, q, k, order, options)
    sink = (
        None
        if options.sink is None
        else options.sink.astype(F).reshape(1, -1, 1, 1) * (LOG2E if kernel.base2 else F(1))
    )
    weights = _stored("float8_e4m3fn" if kernel.fault == "fp8 weights" else storage)
    out, lse = _forward(kernel, s, live, v, sink=sink, weights=weights)
    out = _stored(storage)(out)

    saved = lse * LOG2E if kernel.base2 else lse
    saved = np.where(np.isfinite(saved), saved, F(0))[..., None]
    p = np.where(live, _exp(kernel)(np.where(live, s - saved, F(0))), F(0))
    d = (dout * out).sum(-1, keepdims=True, dtype=F) - dlse[..., None]
    ds = p * (dout @ v.swapaxes(-1, -2) - d)
    dscore = _stored(storage)(ds * slope)
    scale = F(options.scale)
    found = {"out": out, "lse": lse}
    found["dq"] = dscore @ k * (F(1) if kernel.fault == "scale missing in dq" else scale)
    found["dk"] = _per_key(dscore.swapaxes(-1, -2) @ q * scale, order, group)
    found["dv"] = _per_key(weights(p).swapaxes(-1, -2) @ dout, order, group)
    if options.bias is not None:
        found["dbias"] = _unbroadcast(_stored(storage)(ds)[..., np.argsort(order)], options.bias.shape)
    if sink is not None:
        found["dsink"] = -(_exp(kernel)(sink - saved) * d).sum((0, 2, 3), dtype=F)
    wide = ("lse", "dbias", "dsink")
    return {n: (a if n in wide else _stored(storage)(a)).astype(np.float64) for n, a in found.items()}


def _order(kernel, length):
    order = np.arange(length)
    if kernel.order == "shuffled":
        np.random.default_rng(length).shuffle(order)
    return order[::-1] if kernel.order == "reversed" else order


def _exp(kernel):
    return np.exp2 if kernel.base2 else np.exp


def _stored(dtype):
    """Round to a storage type and read back; float32 stays as it is."""
    return lambda x: x if dtype is None else round_to(x.astype(np.float64), dtype, "saturate").astype(F)


def _scores(kernel, q, k, order, options):
    """Scores in the kernel's base, (B,H,Lq,Lk), and the slope of the cap."""
    scale, base = F(options.scale), LOG2E if kernel.base2 else F(1)
    slope = F(1)
    if options.softcap is not None:
        cap = F(options.softcap)
        t = np.tanh(q @ k.swapaxes(-1, -2) * scale / cap)
        s, slope = cap * t * base, F(1) - t * t
    elif kernel.base2:
        s = q @ k.swapaxes(-1, -2) * (scale * base)
    else:
        s = (q * scale) @ k.swapaxes(-1, -2)
    if options.bias is not None:
        s = s + np.broadcast_to(options.bias.astype(F), s.shape)[..., order] * base
    return s, slope


def _forward(kernel, s, live, v, *, sink, weights):
    """Online softmax over blocks of keys, or one block of all of them."""
    rows = (*s.shape[:-1], 1)
    m = np.full(rows, -np.inf, F) if sink is None else np.broadcast_to(sink, rows)
    z = np.zeros(rows, F) if sink is None else np.ones(rows, F)
    acc, step = np.zeros((*s.shape[:-1], v.shape[-1]), F), kernel.block or s.shape[-1]
    exp = _exp(kernel)
    for start in range(0, s.shape[-1], step):
        block = slice(start, start + step)
        seen = np.where(live[..., block], s[..., block], F(-np.inf))
        top = np.maximum(m, seen.max(-1, keepdims=True))
        safe = np.where(np.isfinite(top), top, F(0))
        p, alpha = exp(seen - safe), exp(m - safe)
        z = z * alpha + p.sum(-1, keepdims=True, dtype=F)
        acc = acc * alpha + weights(p) @ v[..., block, :]
        if kernel.fault == "bf16 accumulator":
            acc = _stored("bfloat16")(acc)
        m = top
    safe = np.where(z > 0, z, F(1))
    out = acc / safe if kernel.order == "forward" else acc * (F(1) / safe)
    with np.errstate(divide="ignore"):
        lse = (m + np.log2(z)) * LN2 if kernel.base2 else m + np.log(z)
    return out, lse[..., 0]


def _per_key(x, order, group):
    """Back into the keys' own order, query heads of a group summed."""
    x = x[:, :, np.argsort(order)]
    return x.reshape(x.shape[0], -1, group, *x.shape[2:]).sum(2, dtype=F)


def _unbroadcast(x, shape):
    extra = x.ndim - len(shape)
    axes = tuple(i for i in range(x.ndim) if i < extra or shape[i - extra] != x.shape[i])
    return x.sum(axes, dtype=F).reshape(shape)
