"""A plain two-pass attention in float32 with hand-written gradients: a backend to show, and to plant mistakes in.

It shares nothing with refattn's engines. Each step is a method, so that a mutant (mutants.py) replaces just one.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from refattn.dtypes import format_of

ROWS = 1024  # rows of scores held at a time


class Plain:
    """softmax(softcap(scale q kᵀ) + bias) v, head by head. All options of a case; gradients where dout is given."""

    def __call__(
        self, q: Any, k: Any, v: Any, *, causal: Any = None, window: Any = None, scale: Any = None, softcap: Any = None,
        bias: Any = None, alibi_slopes: Any = None, mask: Any = None, sink: Any = None, segment_ids: Any = None,
        q_lengths: Any = None, kv_lengths: Any = None, q_positions: Any = None, k_positions: Any = None,
        keep: Any = None, overflow: str = "nonsaturate", dout: Any = None, dlse: Any = None,
    ) -> dict[str, Any]:  # fmt: skip
        """Out (B,Hq,Lq,Dv), lse (B,Hq,Lq), and the gradients of all real inputs."""
        work = np.float64 if q.dtype == np.float64 else np.float32
        (batch, heads, lq, _), (_, groups, lk, dv) = q.shape, v.shape
        a = SimpleNamespace(
            causal=causal, window=window, softcap=softcap, bias=bias, slopes=alibi_slopes, mask=mask, sink=sink,
            keep=keep, segment_ids=segment_ids, q_lengths=q_lengths, kv_lengths=kv_lengths, q_positions=q_positions,
            k_positions=k_positions, work=work, group=heads // groups, groups=groups, lq=lq, lk=lk,
            scale=work(self.scale(q.shape[3], scale)),
        )  # fmt: skip
        r = SimpleNamespace(
            out=np.zeros((batch, heads, lq, dv), work), lse=np.zeros((batch, heads, lq), work),
            dq=np.zeros(q.shape, work), dk=np.zeros(k.shape, work), dv=np.zeros(v.shape, work),
            dsink=np.zeros(heads, work), dslopes=np.zeros(heads, work),
            dbias=None if bias is None else np.zeros((1,) * (4 - bias.ndim) + bias.shape, work),
        )  # fmt: skip
        for b, h in np.ndindex(batch, heads):
            g = self.key_head(h, a)
            keys, values = k[b, g].astype(work), v[b, g].astype(work)
            for start in range(0, lq, ROWS):
                rows = np.arange(start, min(start + ROWS, lq))
                f = SimpleNamespace(b=b, h=h, g=g, rows=rows)
                self.forward(a, f, q[b, h, rows].astype(work), keys, values)
                r.out[b, h, rows], r.lse[b, h, rows] = f.out, f.lse
                if dout is not None:
                    dl = np.zeros(len(rows), work) if dlse is None else dlse[b, h, rows].astype(work)
                    self.backward(a, r, f, dout[b, h, rows].astype(work), dl)
        if overflow == "saturate":
            largest = work(format_of(q.dtype).max_finite)
            for name in ("out", "dq", "dk", "dv"):
                getattr(r, name).clip(-largest, largest, out=getattr(r, name))
        return self.results(a, r, q.dtype, work, dout is not None)

    def results(self, a: Any, r: Any, dtype: Any, wide: Any, gradients: bool) -> dict[str, Any]:
        """What is returned, each rounded once to its type."""
        found = {"out": r.out.astype(dtype), "lse": r.lse.astype(wide)}
        if not gradients:
            return found
        found |= {n: getattr(r, n).astype(dtype) for n in ("dq", "dk", "dv")}
        if a.sink is not None:
            found["dsink"] = r.dsink
        if a.slopes is not None:
            found["dslopes"] = r.dslopes
        if a.bias is not None:
            found["dbias"] = r.dbias.reshape(a.bias.shape).astype(a.bias.dtype)
        return found

    def scale(self, width: int, given: float | None) -> float:
        """The factor of the scores."""
        return width**-0.5 if given is None else given

    def key_head(self, h: int, a: Any) -> int:
        """The key head that a query head reads."""
        return int(h // a.group)

    def offset(self, a: Any, b: int) -> int:
        """Position of the first query among the keys."""
        if a.causal == "top_left":
            return 0
        lk = a.lk if a.kv_lengths is None else int(a.kv_lengths[b])
        return lk - (a.lq if a.q_lengths is None else int(a.q_lengths[b]))

    def distance(self, a: Any, b: int, rows: Any) -> Any:
        """Position of each key minus that of each query, (rows, Lk)."""
        i, j = rows + self.offset(a, b), np.arange(a.lk)
        if a.q_positions is not None:
            i = np.atleast_2d(a.q_positions)[b % len(np.atleast_2d(a.q_positions))][rows]
        if a.k_positions is not None:
            j = np.atleast_2d(a.k_positions)[b % len(np.atleast_2d(a.k_positions))]
        return j - i[:, None]

    def visible(self, a: Any, b: int, h: int, rows: Any, ahead: Any) -> Any:
        """Which pairs may attend, (rows, Lk)."""
        live = np.ones(ahead.shape, bool)
        if a.causal:
            live &= ahead <= 0
        left, right = self.window(a)
        if left is not None:
            live &= ahead >= -left
        if right is not None:
            live &= ahead <= right
        if a.kv_lengths is not None:
            live &= np.arange(a.lk) < a.kv_lengths[b]
        if a.q_lengths is not None:
            live &= (rows < a.q_lengths[b])[:, None]
        if a.segment_ids is not None:
            mine, theirs = (np.atleast_2d(s)[b % len(np.atleast_2d(s))] for s in a.segment_ids)
            live &= mine[rows][:, None] == theirs
        if a.mask is not None:
            live &= entry(a.mask, b, h, rows)
        return live

    def window(self, a: Any) -> Any:
        """Keys visible to the left and to the right, the query's own position not counted."""
        return a.window or (None, None)

    def logits(self, a: Any, raw: Any, added: Any, live: Any) -> tuple[Any, Any, Any]:
        """Scores with softcap and bias, the slope of the softcap, and who takes part."""
        if a.softcap is None:
            return raw + added, 1, live
        t = np.tanh(raw / a.work(a.softcap))
        return a.work(a.softcap) * t + added, 1 - t * t, live

    def added(self, a: Any, b: int, h: int, rows: Any, ahead: Any) -> Any:
        """The biases, (rows, Lk), −∞ where masked."""
        total = np.zeros(ahead.shape, a.work)
        if a.slopes is not None:
            total = total - a.slopes[h].astype(a.work) * np.abs(ahead).astype(a.work)
        return total if a.bias is None else total + entry(a.bias, b, h, rows).astype(a.work)

    def clean(self, x: Any) -> Any:
        """A number in place of what is not one: 0 times NaN is NaN, and a masked slot may hold anything."""
        return np.where(np.isfinite(x), x, x.dtype.type(0))

    def product(self, p: Any, v: Any) -> Any:
        """Σ p v."""
        return p @ v

    def sink(self, a: Any, h: int) -> Any:
        """The head's logit without a value, −∞ for none."""
        return a.work(-np.inf) if a.sink is None else a.sink[h].astype(a.work)

    def log_sum(self, m: Any, z: Any) -> Any:
        """Logarithm of the normaliser."""
        return m + np.log(z)

    def empty(self, f: Any) -> Any:
        """What rows that see nothing give."""
        return np.zeros_like(f.out)

    def forward(self, a: Any, f: Any, q: Any, k: Any, v: Any) -> None:
        """The rows of head h of batch b that f names; out, lse and what the gradients need are put into f."""
        b, h, rows = f.b, f.h, f.rows
        f.ahead, f.q, f.k, f.v = self.distance(a, b, rows), self.clean(q), self.clean(k), self.clean(v)
        live, added = self.visible(a, b, h, rows, f.ahead), self.added(a, b, h, rows, f.ahead)
        live = live & ~np.isneginf(added)
        bad = live & (~np.isfinite(q).all(-1)[:, None] | ~np.isfinite(k).all(-1))
        s, f.slope, f.live = self.logits(a, a.scale * (f.q @ f.k.T), np.where(live, added, 0), live)
        sink = self.sink(a, h)
        m = np.maximum(np.max(np.where(f.live, s, -np.inf), axis=1, initial=-np.inf), sink)
        m = np.where(np.isneginf(m), 0, m).astype(a.work)
        p = np.where(f.live, np.exp(np.where(f.live, s - m[:, None], 0)), a.work(0))
        at_sink = np.exp(sink - m)
        z = p.sum(1) + at_sink
        nothing = z == 0
        z = np.where(nothing, 1, z).astype(a.work)
        f.keep = None if a.keep is None else entry(a.keep[0], b, h, rows) / a.work(a.keep[1])
        f.out = self.product(p if f.keep is None else p * f.keep, f.v) / z[:, None]
        f.out = np.where(nothing[:, None], self.empty(f), f.out)
        f.lse = np.where(nothing, -np.inf, self.log_sum(m, z))
        f.lost = bad.any(1)
        hit = (f.live.astype(a.work) @ (~np.isfinite(v)).astype(a.work) > 0) | f.lost[:, None]
        f.spoiled = hit.any(1)
        f.out, f.lse = np.where(hit, np.nan, f.out), np.where(f.lost, np.nan, f.lse)
        f.p, f.at_sink = p / z[:, None], at_sink / z

    def backward(self, a: Any, r: Any, f: Any, dout: Any, dlse: Any) -> None:
        """dS = P (dP − Σ P dP + dlse), and what follows from it, added to r."""
        b, h, g = f.b, f.h, f.g
        p = f.p if f.keep is None else f.p * f.keep
        r.dv[b, g] += p.T @ dout + self.spread(f.live & f.lost[:, None], a.work)
        dp = dout @ f.v.T if f.keep is None else (dout @ f.v.T) * f.keep
        delta = (f.p * dp).sum(1)
        ds = f.p * (dp - delta[:, None] + dlse[:, None])
        r.dsink[h] += (f.at_sink * (dlse - delta)).sum()
        r.dslopes[h] -= (ds * np.abs(f.ahead)).sum(dtype=a.work)
        if r.dbias is not None:
            at = tuple(i % n for i, n in zip((b, h), r.dbias.shape, strict=False))
            whole = ds if r.dbias.shape[3] > 1 or a.lk == 1 else ds.sum(1, keepdims=True)
            if r.dbias.shape[2] > 1 or a.lq == 1:
                r.dbias[at][f.rows] += whole
            else:
                r.dbias[at] += whole.sum(0, keepdims=True)
        ds = ds * f.slope
        r.dq[b, h, f.rows] = np.where(f.spoiled[:, None], np.nan, a.scale * (ds @ f.k))
        r.dk[b, g] += a.scale * (ds.T @ f.q) + self.spread(f.live & f.spoiled[:, None], a.work)

    def spread(self, touched: Any, work: Any) -> Any:
        """NaN for the keys that a spoiled row sees, else 0."""
        return np.where(touched.any(0)[:, None], work(np.nan), work(0))


def entry(array: Any, b: int, h: int, rows: Any) -> Any:
    """Rows of head h in batch b of an array broadcastable to (B, Hq, Lq, Lk)."""
    full = array.reshape((1,) * (4 - array.ndim) + array.shape)
    return full[b % full.shape[0], h % full.shape[1]][rows % full.shape[2]]


attention = Plain()
