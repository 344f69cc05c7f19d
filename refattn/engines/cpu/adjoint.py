"""The backward pass of a plan that the fast kernels take: what they are given, and the sums of what they find."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cpu import fast, sparing
from refattn.engines.cpu.backward import Given, Gradients, by_pair, kernel, total
from refattn.engines.cpu.forward import shape_for
from refattn.engines.cpu.operands import rank4
from refattn.engines.cpu.pool import spread, together
from refattn.engines.cpu.skipping import norms
from refattn.engines.cpu.work import KEYS, Array, Arrays, scratch
from refattn.plan import Dense, Score, Slope, Table
from refattn.pullback import of_sink
from refattn.scoring import differences

_TASKS = 8  # at least, where there are so many tiles of keys: fewer heads are shared out
_STEP = 8  # tiles of keys at most that a tile of rows is packed for: they and their gradients fit the second cache
_BUFFERS = 48 << 20  # bytes of the dq of all shares but the first


class Pass(NamedTuple):
    """Arrays of a backward pass in float32, C order: out and dout (B,Hq,Lq,Dv), lse and dlse (B,Hq,Lq)."""

    q: Array
    k: Array
    v: Array
    out: Array
    lse: Array
    dout: Array
    dlse: Array


def gradients(plan: Score, given: Pass, wanted: set[str]) -> dict[str, Array] | None:
    """Cotangents of the leaves wanted, and maybe of others, by the names of `refattn.plan.leaves`.

    None where a number that a row sees, or one that came of it, is not finite.
    """
    hiding = plan.lengths or plan.segments or plan.mask is not None or not _finite_biases(plan)
    sure = _without_unseen(plan, given) if hiding else given
    found = None if sure is None else _found(plan, sure, wanted)
    if found is None and not hiding:
        sure = _without_unseen(plan, given)
        found = None if sure is None or sure is given else _found(plan, sure, wanted)
    return found


def _finite_biases(plan: Score) -> bool:
    return not any(np.isneginf(b.values).any() for b in plan.bias if not isinstance(b, Slope))


def _without_unseen(plan: Score, given: Pass) -> Pass | None:
    """The same with 0 for rows of q, k, v, dout that hold what is not finite and meet no other; None if one does.

    The forward pass tells: a row that sees one of q, k or a logit that is not finite has no lse, one of v no out.
    """
    if np.isnan(given.lse).any() or not np.isfinite(given.out).all():
        return None
    blind = np.isneginf(given.lse)
    if plan.lengths is not None:
        blind |= (np.arange(given.lse.shape[2]) >= np.asarray(plan.lengths[0])[:, None])[:, None]
    if not np.isfinite(given.dlse[~blind]).all():
        return None
    changed: dict[str, Any] = {}
    for name in ("q", "k", "v", "dout"):
        array = getattr(given, name)
        finite = np.isfinite(array).all(-1)
        if finite.all():
            continue
        if name == "dout" and not (finite | blind).all():
            return None
        changed[name] = np.where(finite[..., None], array, np.float32(0))
    return given._replace(**changed) if changed else given


def _found(plan: Score, given: Pass, wanted: set[str]) -> dict[str, Array] | None:
    """The cotangents, or None where one of them is not finite."""
    x = fast.arrays(plan, given.q, given.k, given.v)
    found: dict[str, Array] = {}
    for n, bias in enumerate(plan.bias):
        # One that every pair of rows and keys has a number of.
        if f"bias.{n}" in wanted and isinstance(bias, Dense) and min(rank4(bias.values.shape)[2:]) > 1:
            gradient = _of_pairs(plan, x, given, bias)
            if gradient is None:
                return None
            found[f"bias.{n}"] = gradient
    return found if wanted <= set(found) else _of_tiles(plan, x, given, wanted - set(found), found)


def _of_tiles(
    plan: Score, x: Arrays, given: Pass, wanted: set[str], found: dict[str, Array]
) -> dict[str, Array] | None:
    """All but what is by pair."""
    batch, heads, groups, lq, lk, depth, width = x.sizes
    shares, step = _shares(batch * groups, -(-lk // KEYS), given.q.nbytes)
    biases = {f"bias.{n}": b for n, b in enumerate(plan.bias) if f"bias.{n}" in wanted}
    sums = [
        any(isinstance(b, Slope) for b in biases.values()),
        any(isinstance(b, Dense) and rank4(b.values.shape)[3] == 1 for b in biases.values()),
        any(isinstance(b, Dense) and rank4(b.values.shape)[3] > 1 for b in biases.values()),
        any(isinstance(b, Table) for b in biases.values()),
    ]
    low, count = differences(plan) if sums[3] else (0, 0)
    shapes = [(shares, batch, heads, lq), (shares, batch, heads, lq), (batch, heads, lk), (shares, batch, heads, count)]
    slope, row, key, table = (np.zeros(shape if on else 0) for on, shape in zip(sums, shapes, strict=True))
    dq, dk, dv = np.zeros((shares, *given.q.shape), np.float32), np.zeros_like(given.k), np.zeros_like(given.v)
    doubt, counter = np.empty(batch * groups * shares, np.bool_), np.zeros(1, np.int64)
    results = (a.reshape(-1) for a in (dq, dk, dv, slope, row, key, table))
    gradients = Gradients._make([*results, low, count, doubt])
    shape = shape_for(heads // groups, lq)
    own = _given(plan, given, shares, step)
    known = norms(x, shape.width, shape.storage)
    allowed = sparing.allowed(x, known, own, shape, by_share=not any(sums))
    if allowed is None:
        return None
    work, sizes = given.lse.size * lk * (3 * depth + 2 * width), (shape.rows, depth, width, shape.storage)
    arguments = x, known, allowed, own, gradients
    together(kernel(shape), lambda: (*arguments, scratch(*sizes), _bent(shape.rows), counter), doubt.size, work)
    if doubt.any():
        return None
    found |= {"q": _summed(dq), "k": dk, "v": dv}
    if "sink" in wanted:
        found["sink"] = of_sink(plan.sink, given.out, given.lse, given.dout, given.dlse)
    for name, bias in biases.items():
        if isinstance(bias, Slope):
            found[name] = slope.sum((0, 1, 3))
        elif isinstance(bias, Table):
            found[name] = np.zeros(bias.values.shape)
            found[name][:, low + bias.offset : low + bias.offset + count] = table.sum((0, 1))
        else:
            found[name] = _gathered(bias, row.sum(0)[..., None] if row.size else row, key)
    return found


def _given(plan: Score, given: Pass, shares: int, step: int) -> Given:
    flat = (a.reshape(-1) for a in (given.out, given.lse, given.dout, given.dlse))
    return Given._make([*flat, float(plan.scale), shares, step])


def _bent(rows: int) -> Array:
    """Scratch for the softcap's slope of a tile."""
    return np.empty(KEYS * rows, np.float32)


def _shares(heads: int, tiles: int, size: int) -> tuple[int, int]:
    """Into how many tasks the keys of a head are shared out, and how many tiles a step has; by shapes alone.

    Each share has two steps or more, where there are so many tiles, for a causal mask leaves the last ones little.
    """
    shares = max(1, min(-(-_TASKS // heads), 1 + _BUFFERS // max(size, 1), tiles))
    return shares, _STEP if shares == 1 else max(1, min(_STEP, tiles // (2 * shares)))


def _summed(parts: Array) -> Array:
    """The sum over the first axis, in its order, in the memory of the first."""
    if len(parts) > 1:
        spread(total, (parts.reshape(len(parts), -1),), parts[0].size, parts.size)
    return np.asarray(parts[0])


def _gathered(bias: Dense, rows: Array, keys: Array) -> Array:
    """Cotangent of a bias that is repeated along keys or rows, from sums (B,Hq,Lq,1) or (B,Hq,Lk)."""
    shape = rank4(bias.values.shape)
    sums = rows if shape[3] == 1 else keys[:, :, None]
    repeated = tuple(n for n in range(4) if shape[n] == 1)
    return np.asarray(sums.sum(repeated).reshape(bias.values.shape))


def _of_pairs(plan: Score, x: Arrays, given: Pass, bias: Dense) -> Array | None:
    """Cotangent of a bias that every pair of rows and keys has a number of."""
    _, _, _, lq, lk, depth, width = x.sizes
    own = rank4(bias.values.shape)
    gradient = np.zeros(own, np.float32)
    shape = shape_for(1, lq)
    tasks = own[0] * own[1] * -(-lq // shape.rows)
    doubt, counter = np.empty(tasks, np.bool_), np.zeros(1, np.int64)
    arguments = (x, _given(plan, given, 1, 1), own[:2], gradient.reshape(-1))
    work = given.lse.size * lk * (depth + width)
    together(
        by_pair(shape),
        lambda: (*arguments, scratch(shape.rows, depth, width, shape.storage), _bent(shape.rows), doubt, counter),
        tasks,
        work,
    )
    return None if doubt.any() else gradient.reshape(bias.values.shape)
