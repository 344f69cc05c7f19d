"""Two correct implementations that share no code must pass every case: a plain one, and this one in flash style."""

from types import SimpleNamespace

import numpy as np
import pytest

from refattn.golden.load import folder_of_suite, load
from refattn.oracle import plain, validate

BLOCK = 32


def flash(
    q, k, v, *, causal=None, window=None, scale=None, softcap=None, bias=None, alibi_slopes=None, mask=None, sink=None,
    segment_ids=None, q_lengths=None, kv_lengths=None, q_positions=None, k_positions=None, keep=None,
    dout=None, dlse=None,
):  # fmt: skip
    """Online softmax over blocks of 32 keys, the last block first; weights and score gradients in the storage type."""
    work = np.float64 if q.dtype == np.float64 else np.float32
    (batch, heads, lq, width), (groups, lk) = q.shape, k.shape[1:3]
    grouped = (batch, groups, heads // groups, lq)
    scale = work(1 / np.sqrt(width) if scale is None else scale)
    left, right = window or (None, None)
    n_q = np.full(batch, lq) if q_lengths is None else q_lengths
    n_k = np.full(batch, lk) if kv_lengths is None else kv_lengths
    here = np.arange(lq) + (0 * n_k if causal == "top_left" else n_k - n_q)[:, None]
    here = here if q_positions is None else np.broadcast_to(q_positions, (batch, lq))
    there = np.broadcast_to(np.arange(lk) if k_positions is None else k_positions, (batch, lk))

    def number(x):
        wide = x.astype(work)
        return np.where(np.isfinite(wide), wide, 0)

    def store(x):
        return x.astype(q.dtype).astype(work)

    def part(array, at):
        """Columns of an array that broadcasts to (B, Hq, Lq, Lk)."""
        full = np.broadcast_to(array, (batch, heads, lq, lk) if array.shape[-1] > 1 else (batch, heads, lq, 1))
        return np.broadcast_to(full if full.shape[-1] == 1 else full[..., at], (batch, heads, lq, len(at)))

    rows = number(q).reshape(*grouped, width)
    spoiled_q = ~np.isfinite(q.astype(work)).all(-1)[..., None]

    def block(at):
        b = SimpleNamespace(at=at, k=number(k[:, :, at]), v=number(v[:, :, at]))
        ahead = (there[:, None, at] - here[:, :, None])[:, None]
        inside = (at < n_k[:, None])[:, None, None] & (np.arange(lq) < n_q[:, None])[:, None, :, None]
        live = np.broadcast_to(inside, (batch, heads, lq, len(at)))
        if causal:
            live = live & (ahead <= 0)
        if left is not None:
            live = live & (ahead >= -left)
        if right is not None:
            live = live & (ahead <= right)
        if segment_ids is not None:
            mine, theirs = (np.broadcast_to(s, (batch, n)) for s, n in zip(segment_ids, (lq, lk), strict=True))
            live = live & (mine[:, :, None] == theirs[:, None, at])[:, None]
        if mask is not None:
            live = live & part(mask, at)
        s = (np.einsum("bgrid,bgjd->bgrij", rows, b.k, optimize=True) * scale).reshape(batch, heads, lq, len(at))
        b.curb = None if softcap is None else 1 - np.tanh(s / work(softcap)) ** 2
        s = s if softcap is None else np.tanh(s / work(softcap)) * work(softcap)
        b.far = np.abs(ahead).astype(work)
        if alibi_slopes is not None:
            s = s - alibi_slopes.astype(work)[:, None, None] * b.far
        if bias is not None:
            added = part(bias.astype(work), at)
            live, s = live & (added > -np.inf), s + np.where(added > -np.inf, added, 0)
        bad = np.repeat(~np.isfinite(k[:, :, at].astype(work)).all(-1), heads // groups, 1)[:, :, None] | spoiled_q
        b.live, b.s = live, np.where(live & bad, work(np.nan), s)
        b.keep = None if keep is None else part(keep[0], at) / work(keep[1])
        return b

    blocks = [np.arange(start, min(start + BLOCK, lk)) for start in range(0, lk, BLOCK)][::-1]
    logit = np.full(heads, -np.inf, work) if sink is None else sink.astype(work)
    m = np.broadcast_to(logit[:, None], (batch, heads, lq)).copy()
    total = np.where(m > -np.inf, work(1), work(0))
    acc = np.zeros((batch, heads, lq, v.shape[3]), work)
    for at in blocks:
        b = block(at)
        new = np.maximum(m, np.where(b.live, b.s, -np.inf).max(-1))
        base = np.where(new == -np.inf, 0, new)
        p = np.where(b.live, np.exp(np.where(b.live, b.s - base[..., None], 0)), work(0))
        shrink = np.where(m == -np.inf, work(0), np.exp(np.where(m == -np.inf, 0, m - base)))
        total = total * shrink + p.sum(-1)
        p = store(p if keep is None else p * b.keep).reshape(*grouped, len(at))
        acc = acc * shrink[..., None] + (p @ b.v[:, :, None]).reshape(acc.shape)
        hit = b.live.reshape(*grouped, len(at)).astype(work) @ ~np.isfinite(v[:, :, at].astype(work))[:, :, None] > 0
        acc, m = np.where(hit.reshape(acc.shape), np.nan, acc), new
    nothing = total == 0
    out = (acc / np.where(nothing, 1, total)[..., None]).astype(q.dtype)
    lse = np.where(nothing, -np.inf, m + np.log(np.where(nothing, 1, total)))
    found = {"out": out, "lse": lse.astype(work)}
    if dout is None:
        return found

    dout = dout.astype(work)
    dl = np.zeros_like(lse) if dlse is None else dlse.astype(work)
    delta = (dout * (acc / np.where(nothing, 1, total)[..., None])).sum(-1)
    dq, dk, dv = np.zeros(rows.shape, work), np.zeros(k.shape, work), np.zeros(v.shape, work)
    dbias, dslopes = np.zeros((batch, heads, lq, lk), work), np.zeros(heads, work)
    given = dout.reshape(*grouped, -1)
    for at in blocks:
        b = block(at)
        p = np.where(b.live, np.exp(np.where(b.live, b.s - np.where(nothing, 0, lse)[..., None], 0)), work(0))
        weight = store(p if keep is None else p * b.keep).reshape(*grouped, len(at))
        dv[:, :, at] = np.einsum("bgrij,bgrid->bgjd", weight, given, optimize=True)
        dp = (given @ b.v[:, :, None].swapaxes(-1, -2)).reshape(p.shape)
        ds = np.where(b.live, p * ((dp if keep is None else dp * b.keep) - delta[..., None] + dl[..., None]), work(0))
        dbias[..., at] = ds
        dslopes -= (ds * b.far).sum((0, 2, 3))
        ds = store(ds if softcap is None else ds * b.curb).reshape(*grouped, len(at))
        dq += ds @ b.k[:, :, None] * scale
        dk[:, :, at] = np.einsum("bgrij,bgrid->bgjd", ds, rows, optimize=True) * scale
    found |= {"dq": dq.reshape(q.shape).astype(q.dtype), "dk": dk.astype(k.dtype), "dv": dv.astype(v.dtype)}
    if sink is not None:
        found["dsink"] = (np.exp(logit[:, None] - lse) * (dl - delta)).sum((0, 2))
    if alibi_slopes is not None:
        found["dslopes"] = dslopes
    if bias is not None:
        shape = (1,) * (4 - bias.ndim) + bias.shape
        axes = tuple(axis for axis, n in enumerate(shape) if n == 1)
        found["dbias"] = dbias.sum(axes, keepdims=True).reshape(bias.shape).astype(bias.dtype)
    return found


@pytest.mark.parametrize("fn", [plain.attention, flash], ids=["plain", "flash"])
def test_a_correct_implementation_passes_every_case_with_every_gradient(fn, folder):
    report = validate(fn, folder=folder)
    assert report.ok and not report.unsupported, repr(report)
    assert all({"out", "lse", "dq", "dk", "dv"} <= set(line.outputs) for line in report.lines)
    assert {"dsink", "dslopes", "dbias"} <= {name for line in report.lines for name in line.outputs}


@pytest.mark.parametrize("fn", [plain.attention, flash], ids=["plain", "flash"])
def test_a_correct_implementation_passes_the_committed_suite(fn):
    report = validate(fn, folder=folder_of_suite())
    assert report.ok, repr(report)
    assert len(report.passed) >= 80
    refused = [load(line.case).spec for line in report.unsupported if load(line.case).overflow == "nonsaturate"]
    assert all(spec.variant != "sdpa" or spec.content or beyond_a_softmax_of_reals(spec) for spec in refused)


def beyond_a_softmax_of_reals(spec):
    return spec.rotary or spec.normalizer == "sigmoid" or spec.kv or spec.paged
