r"""The exact-slice tier: Score plans on inputs of few bits, everything exact or in double-double.

Inputs are integers of few bits times a power of two, so q·k and dout·v are sums of integers below 2^53: exact in
float64, whatever the order, the threads or the fused operations of a matrix product. What is not an integer is a pair
of doubles, cut into slices that are:

    p_ij = e^(s_ij − m_i),  Z_i = Σ_j p_ij,  N_i = Σ_j p_ij v_j;     out = N / Z,  lse = m + log Z
    W = p / Z,  δ_i = Σ_d dout_id out_id − dlse_i,  dS = W (dout·v − δ)
    dq = scale dS k,  dk = scale dSᵀ q,  dv = Wᵀ dout,  dbias = dS,  dslope = −Σ dS |j − i|
    dsink = −Σ_i e^(sink − lse_i) δ_i

Kept weights are divided by their probability at the end: δ stands for it times δ on the way. A row with one live key
has W = 1, and dS = dlse, as identities. docs/certification.md derives the radii.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.engines.certified import kernels
from refattn.engines.certified.enclosure import Enclosure
from refattn.engines.certified.exact_plan import ExactPlan, exact_plan
from refattn.engines.certified.fixed import BLOCK, Pairs, zeros
from refattn.engines.certified.plain_check import Strain, strain
from refattn.errors import Undecided
from refattn.plan import Score, Slope, relative, row_of, sees
from refattn.problem import Problem

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Rows that are worked on at a time.
ROWS = 64
# Above every weight: the shift is next to the largest score.
_TOP = 2.0


class Rows(NamedTuple):
    """Some rows of head h of sequence b, which reads key head g."""

    b: int
    h: int
    g: int
    rows: slice

    @property
    def key(self) -> tuple[int, int, slice]:
        """Where they stand in an array (B,Hq,Lq,...)."""
        return self.b, self.h, self.rows

    def each(self) -> range:
        """Their numbers."""
        return range(self.rows.start, self.rows.stop)


class Weights(NamedTuple):
    """What some rows see, keys in a range.

    p (rows, keys): weights before they are normalised, and z (rows, 1) their sums; kept (rows, keys) or None; out
    (rows, Dv) before kept weights are divided by their probability; sink (rows, 1) or None, the sink's part of z;
    alone (rows,): one key, no sink; strain: what the text in float64 is subject to.
    """

    at: Rows
    keys: slice
    p: Pairs
    z: Pairs
    out: Pairs
    kept: Bools | None
    sink: Pairs | None
    alone: Bools
    strain: Strain


class Sliced(NamedTuple):
    """Enclosures by the name of the output, and how far from them plain float64 may be (`plain_check`)."""

    enclosures: dict[str, Enclosure]
    limits: dict[str, Floats]


def enclose(problem: Problem, cotangents: Mapping[str, NDArray[Any]], wrt: Sequence[str]) -> Sliced | None:
    """Enclosures of out (B,Hq,Lq,Dv), lse (B,Hq,Lq) and the gradients d<name>; None where the tier refuses.

    Raises
    ------
    RefattnError
        A product of slices would not be exact: a defect of the tier.
    """
    given = exact_plan(problem, cotangents, wrt)
    try:
        return None if given is None else _sliced(given, wrt)
    except Undecided:
        return None


def _sliced(given: ExactPlan, wrt: Sequence[str]) -> Sliced:
    plan = given.plan
    batch, heads, lq, _ = plan.q.shape
    found = {"out": zeros(*plan.q.shape[:3], plan.v.shape[3]), "lse": zeros(*plan.q.shape[:3])}
    limits = {n: np.zeros(x.h.shape) for n, x in found.items()}
    back = Backward(given) if wrt else None
    for b, h in np.ndindex(batch, heads):
        for start in range(0, lq, ROWS):
            at = Rows(b, h, h // (heads // plan.k.shape[1]), slice(start, min(start + ROWS, lq)))
            x = forward(given, at, found, limits)
            if back is not None:
                back.rows(x)
        if back is not None:
            back.flush(b, h // (heads // plan.k.shape[1]))
    found["out"] = found["out"].scaled(1.0, given.probability)
    if back is not None:
        named = back.gradients()
        found |= {f"d{n}": named[n] for n in wrt}
        limits |= {f"d{n}": back.limits[n] for n in wrt}
    return Sliced({n: x.enclosure() for n, x in found.items()}, limits)


def forward(given: ExactPlan, at: Rows, found: Mapping[str, Pairs], limits: Mapping[str, Floats]) -> Weights:
    """Weights of a few rows; writes their out (not yet divided by a probability of keeping) and lse into `found`."""
    plan, fixed = given.plan, given.fixed
    live, keys = _seen(plan, at)
    value = plan.v[at.b, at.g, keys]
    dots = plan.q[at.key] @ plan.k[at.b, at.g, keys].T
    bias, biased = _bias(plan, at, keys, live)
    beta = float(bias.e.max(initial=0.0))
    # Any double will do for the maximum: the shift is exact and cancels.
    top = np.max(np.where(live, plan.scale * dots + bias.h, -np.inf), 1, initial=-np.inf)
    empty = np.isneginf(top)
    top = np.where(empty, 0.0, top)

    p = zeros(*live.shape)
    kernels.weigh(dots, plan.scale, bias.h, bias.l, beta, live, top, *p)
    alone = (live.sum(1) == 1) & (plan.sink is None)
    p.put(alone, Pairs(live[alone] * 1.0, *zeros(*live[alone].shape)[:2]))
    peak = p.h.max(1, initial=0.0)
    if ((peak >= _TOP) | ((peak < 0.5) & ~empty)).any():
        raise Undecided("scores so large that the double next to their maximum is no shift")
    parts = fixed.cut(p, _TOP)
    z = fixed.product(parts, np.ones((live.shape[1], 1)), _TOP)
    z.e[:] += p.e.sum(1, keepdims=True)
    sink = None if plan.sink is None else _exponential(float(plan.sink[at.h]), top)
    if sink is not None:
        sink.put(empty, Pairs(*(np.full((empty.sum(), 1), x) for x in (1.0, 0.0, 0.0))))
        z = z.plus(sink)
    z.h[empty] = 1.0

    kept = None if plan.keep is None else _entries(plan.keep[0], plan, at)[:, keys]
    out = fixed.product(parts if kept is None else parts * kept, value, _TOP)
    out.e[:] += fixed.error(p.e if kept is None else p.e * kept, value)
    kernels.quotient(*out, *_flat(z))
    found["out"].put(at.key, out)

    lse = _flat(z)
    kernels.log_sums(top, *lse)
    one = np.flatnonzero(alone), np.argmax(live[alone], 1) if alone.any() else np.zeros(0, np.int64)
    score = zeros(len(one[0]))
    kernels.singles(dots[one], plan.scale, bias.h[one], bias.l[one], beta, *score)
    lse.put(alone, score)
    nothing = -np.inf if plan.sink is None else plan.sink[at.h]
    lse.put(empty, Pairs(np.full(empty.sum(), nothing), *zeros(empty.sum())[:2]))
    found["lse"].put(at.key, lse)

    reach_v = np.abs(value).max(0, initial=0.0)
    farthest = np.abs(np.where(live, plan.scale * dots, 0.0)).max(1, initial=0.0)
    size = np.abs(top) + 2 * farthest + biased + kernels.FAR + (0.0 if sink is None else abs(plan.sink[at.h]))
    terms = live.sum(1) + value.shape[1] + plan.q.shape[1] // plan.k.shape[1] * plan.q.shape[2]
    strained = strain(size, terms, np.abs(given.dout[at.key]) @ reach_v / given.probability, given.dlse[at.key])
    limits["out"][at.key] = strained.weight * reach_v / given.probability
    reach = np.where(np.isfinite(lse.h), np.abs(lse.h), 0.0) + np.abs(top)
    limits["lse"][at.key] = strained.weight[:, 0] + 2.0**-50 * reach
    return Weights(at, keys, p, z, out, kept, sink, alone, strained)


class Backward:
    """Gradients, collected over rows: dk and dv as sums of slices, exact until they are flushed into pairs."""

    def __init__(self, given: ExactPlan) -> None:
        self.given, plan = given, given.plan
        self.d = {n: zeros(*getattr(plan, n).shape) for n in "qkv"}
        self.parts = {n: np.zeros((given.fixed.count, *getattr(plan, n).shape[2:])) for n in "kv"}
        self.errors = {n: zeros(*getattr(plan, n).shape[2:]).e for n in "kv"}
        self.pending = 0
        self.sink = None if plan.sink is None else zeros(len(plan.sink))
        slopes = {n for n in given.biases if isinstance(plan.bias[n], Slope)}
        self.bias: dict[int, _BiasSum | _SlopeSum] = {
            n: _SlopeSum(given) if n in slopes else _BiasSum(given, n) for n in given.biases
        }
        self.limits = {n: np.zeros(np.shape(getattr(plan, n))) for n in ("q", "k", "v", "sink")}

    def rows(self, x: Weights) -> None:
        """Dq of a few rows, and what they add to the other gradients."""
        given, plan, fixed = self.given, self.given.plan, self.given.fixed
        key, value, query = plan.k[x.at.b, x.at.g, x.keys], plan.v[x.at.b, x.at.g, x.keys], plan.q[x.at.key]
        dout, dlse = given.dout[x.at.key], given.dlse[x.at.key]
        inverse = Pairs(np.ones_like(x.z.h), *zeros(*x.z.h.shape)[:2])
        kernels.quotient(*inverse, *_flat(x.z))
        w, delta = x.p, self._delta(x, dout, dlse)
        kernels.normalise(*w, *_flat(inverse))
        if x.sink is not None:
            self._add_sink(x, inverse, delta)

        dp = dout @ value.T
        dp = dp if x.kept is None else dp * x.kept
        dp[x.alone] = 0.0
        ds = zeros(*dp.shape)
        kernels.scores(*w, dp, *delta, *ds)
        parts = fixed.cut(ds, given.unit)
        dq = fixed.product(parts, key, given.unit)
        dq.e[:] += fixed.error(ds.e, key)
        self.d["q"].put(x.at.key, dq)
        for sums in self.bias.values():
            sums.add(x, ds, parts, (w.h + w.e) * x.strain.score)
        self._collect("k", x, parts, ds.e, query)

        parts = fixed.cut(w, _TOP)
        kept = 1.0 if x.kept is None else x.kept
        self._collect("v", x, parts * kept, w.e * kept, dout)
        self._limit(x, w, query, key, dout)
        self.pending += len(dout)
        if self.pending + ROWS > BLOCK:
            self.flush(x.at.b, x.at.g)

    def _delta(self, x: Weights, dout: Floats, dlse: Floats) -> Pairs:
        """δ times the probability of keeping; −dlse alone in a row with one key, whose weight is 1 for all scores."""
        found = zeros(len(dlse))
        kernels.inner(dout, *x.out, *found)
        found.put(x.alone, zeros(int(x.alone.sum())))
        own = Pairs(-dlse, *zeros(len(dlse))[:2])
        return found.plus(own.scaled(self.given.probability))

    def _collect(self, name: str, x: Weights, parts: Floats, error: Floats, matrix: Floats) -> None:
        self.given.fixed.allow(self.pending + len(matrix))
        self.parts[name][:, x.keys] += parts.transpose(0, 2, 1) @ matrix
        self.errors[name][x.keys] += self.given.fixed.error(error.T, matrix)

    def _limit(self, x: Weights, w: Pairs, query: Floats, key: Floats, dout: Floats) -> None:
        scale, at = abs(self.given.plan.scale), (x.at.b, x.at.g, x.keys)
        q, k, do = (np.abs(a).max(0, initial=0.0) for a in (query, key, dout))
        # Weights that count as 0 have their size for an error.
        most = w.h + w.e
        self.limits["q"][x.at.key] = scale * x.strain.score * k
        self.limits["k"][at] += scale * (most * x.strain.score).sum(0)[:, None] * q
        self.limits["v"][at] += (most * x.strain.weight).sum(0)[:, None] * do / self.given.probability

    def _add_sink(self, x: Weights, inverse: Pairs, delta: Pairs) -> None:
        """Minus Σ_i w δ, w the sink's own weight."""
        assert self.sink is not None and x.sink is not None
        w = x.sink
        kernels.normalise(*w, *_flat(inverse))
        found = zeros(*w.h.shape)
        kernels.scores(*w, np.zeros(w.h.shape), *delta, *found)
        total = zeros(1)
        kernels.inner(np.ones((1, len(found.h))), found.h.T.copy(), found.l.T.copy(), found.e.T.copy(), *total)
        self.sink.put([x.at.h], self.sink.at([x.at.h]).plus(total))
        self.limits["sink"][x.at.h] += ((w.h + w.e) * x.strain.score).sum()

    def flush(self, b: int, g: int) -> None:
        """Add the sums of slices to dk and dv of a key head, and begin anew."""
        if not self.pending:
            return
        fixed, at = self.given.fixed, (b, g)
        for n, unit in (("k", self.given.unit), ("v", _TOP)):
            found = self.d[n].at(at)
            fixed.gather(self.parts[n], unit, found)
            found.e[:] += self.errors[n]
            self.d[n].put(at, found)
            self.parts[n][:] = self.errors[n][:] = 0.0
        self.pending = 0

    def gradients(self) -> dict[str, Pairs]:
        """All of them, by the names of the inputs."""
        plan, probability = self.given.plan, self.given.probability
        found = {n: self.d[n].scaled(plan.scale if n != "v" else 1.0, probability) for n in "qkv"}
        if self.sink is not None:
            found["sink"] = self.sink.scaled(1.0, probability)
        for n, sums in self.bias.items():
            own = sums.total().scaled(1.0, probability)
            name = self.given.biases[n]
            found[name] = found[name].plus(own) if name in found else own
            self.limits[name] = self.limits.get(name, 0.0) + sums.limits.reshape(own.h.shape)
        return found


class _BiasSum:
    """Slices of dS added up along what a dense bias was repeated along."""

    def __init__(self, given: ExactPlan, n: int) -> None:
        self.given, self.shape = given, np.shape(given.plan.bias[n].values)  # type: ignore[union-attr]
        full = (1,) * (4 - len(self.shape)) + self.shape
        self.parts, self.errors = np.zeros((given.fixed.count, *full)), np.zeros(full)
        self.limits = np.zeros(full)

    def add(self, x: Weights, ds: Pairs, parts: Floats, limit: Floats) -> None:
        """A few rows."""
        error = ds.e
        _, batch, heads, lq, lk = self.parts.shape
        if lk == 1:
            parts, error, limit = (a.sum(-1, keepdims=True) for a in (parts, error, limit))
        if lq == 1:
            parts, error, limit = (a.sum(-2, keepdims=True) for a in (parts, error, limit))
        b, h = x.at.b % batch, x.at.h % heads
        rows, keys = x.at.rows if lq > 1 else slice(0, 1), x.keys if lk > 1 else slice(0, 1)
        self.parts[:, b, h, rows, keys] += parts
        self.errors[b, h, rows, keys] += error
        self.limits[b, h, rows, keys] += limit

    def total(self) -> Pairs:
        """In the shape of the bias."""
        found = zeros(1, self.errors.size)
        self.given.fixed.gather(self.parts.reshape(len(self.parts), 1, -1), self.given.unit, found)
        found.e[:] += self.errors.reshape(1, -1)
        return Pairs(*(a.reshape(self.shape) for a in found))


class _SlopeSum:
    """−Σ dS |distance| of each head, in pairs."""

    def __init__(self, given: ExactPlan) -> None:
        heads = given.plan.q.shape[1]
        self.given, self.sums, self.limits = given, zeros(heads), np.zeros(heads)

    def add(self, x: Weights, ds: Pairs, parts: Floats, limit: Floats) -> None:
        """A few rows."""
        distance = _distance(self.given.plan, x.at, x.keys)
        rows, total = zeros(len(distance)), zeros(1)
        kernels.inner(-distance, *ds, *rows)
        kernels.inner(np.ones((1, len(distance))), rows.h[None], rows.l[None], rows.e[None], *total)
        self.sums.put([x.at.h], self.sums.at([x.at.h]).plus(total))
        self.limits[x.at.h] += (limit * distance).sum()

    def total(self) -> Pairs:
        """(Hq,)."""
        return self.sums


def _seen(plan: Score, at: Rows) -> tuple[Bools, slice]:
    """Live pairs (rows, keys) of the keys from the first to the last that a row sees, and which keys these are."""
    seen = np.array([sees(plan, at.b, at.h, i) for i in at.each()])
    columns = np.flatnonzero(seen.any(0))
    keys = slice(int(columns[0]), int(columns[-1]) + 1) if columns.size else slice(0, 0)
    return np.ascontiguousarray(seen[:, keys]), keys


def _bias(plan: Score, at: Rows, keys: slice, live: Bools) -> tuple[Pairs, Floats]:
    """Sum of a few rows' biases, 0 in pairs that are not live; one alone is exact.

    And what several are at most, (rows,), which their sum does not tell; 0 of one.
    """
    total, size = zeros(*live.shape), np.zeros(live.shape)
    for n, bias in enumerate(plan.bias):
        own = zeros(*live.shape)
        if isinstance(bias, Slope):
            kernels.slope_bias(float(bias.slopes[at.h]), _distance(plan, at, keys), own.h, own.l)
        else:
            own.h[:] = [row_of(bias, plan, at.b, at.h, i)[keys] for i in at.each()]
        for a in own:
            a[~live] = 0.0
        total = total.plus(own) if n else own
        size += np.abs(own.h)
    return total, size.max(1, initial=0.0) * (len(plan.bias) > 1)


def _distance(plan: Score, at: Rows, keys: slice) -> Floats:
    """|position(j) − position(i)| of a few rows."""
    return np.array([np.abs(relative(plan, at.b, i)[keys]) for i in at.each()], np.float64)


def _entries(mask: NDArray[Any], plan: Score, at: Rows) -> Bools:
    """A few rows of a mask broadcastable to (B,Hq,Lq,Lk)."""
    full = np.broadcast_to(mask, (*plan.q.shape[:3], plan.k.shape[2]))
    return np.asarray(full[at.key], bool)


def _exponential(sink: float, top: Floats) -> Pairs:
    """e^(sink − top), (rows, 1)."""
    found = zeros(len(top))
    kernels.exponentials(sink, top, *found)
    return Pairs(*(a[:, None] for a in found))


def _flat(x: Pairs) -> Pairs:
    """(rows,) of (rows, 1), a copy."""
    return Pairs(*(a[:, 0].copy() for a in x))
