"""The cpu engine: a problem's plan run by Numba kernels, in float32, or in float64 where the result is float64."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import pullback
from refattn.engines.cpu import adjoint, fast, score, skipping
from refattn.engines.cpu.blocks import in_a_row, on_pages, packed, paged_alone, stored
from refattn.engines.cpu.operands import Operands, converted, prepare, rank4, rows
from refattn.engines.cpu.pool import spread
from refattn.engines.cpu.storage import finite, narrowed, storage_of, widened
from refattn.errors import ShapeError
from refattn.plan import Dense, Score, Slope, Table, keys
from refattn.problem import Problem
from refattn.scoring import differences
from refattn.spec import Outputs
from refattn.unpack import unpacked

name = "cpu"

Floats = NDArray[np.float64]


def refuses(problem: Problem) -> str | None:
    """A sentence for a variant that does not lower to a Score plan, or None."""
    if problem.unplanned is not None:
        return problem.unplanned
    plan = problem.outline or problem.plan
    if not isinstance(plan, Score):
        return f"the cpu engine runs Score plans, and {problem.spec.variant} lowers to {type(plan).__name__}"
    if plan.relative or plan.v_table:
        return "the cpu engine has no kernel yet for vectors by relative position"
    others = [output for output in problem.want if output not in ("out", "lse")]
    if others:
        return f"the cpu engine gives out and lse, and not {' and not '.join(others)}"
    return None


def skips(problem: Problem) -> str | None:
    """What of the problem is left out because it is proved not to count, or None."""
    plan = problem.outline or problem.plan
    if not isinstance(plan, Score):
        return None
    return skipping.told(plan, fast.few(plan, plan.q.shape[1] // plan.k.shape[1] * plan.q.shape[2], keys(plan)))


def run(problem: Problem) -> Outputs:
    """Out (B,Hq,Lq,Dv) and, of a softmax, lse (B,Hq,Lq), computed in float32 or float64."""
    plan = problem.outline or problem.score
    q, k, v = (problem.inputs[n] for n in "qkv") if problem.outline else (plan.q, plan.k, plan.v)
    found = _outputs(plan, q, k, v, _kind(problem))
    if problem.dtype.itemsize == 2 and np.isfinite(found["out"]).all():
        found["out"] = narrowed(found["out"], problem.dtype)
    return Outputs(found)


def vjp(
    problem: Problem, cotangents: Mapping[str, Any], wrt: Sequence[str], outputs: Mapping[str, Any] | None = None
) -> Outputs:
    """Outputs and gradients d<name>: the kernels give the cotangents of the plan's leaves, the tape carries them on.

    Where `outputs` holds the outputs of this problem, the forward pass is spared.

    Raises
    ------
    ShapeError
        out or lse in `outputs` does not have the shape this problem gives it.
    Unsupported
        The plan has not the gradients of the variant's text.
    """
    kind = _kind(problem)

    def find(plan: Score, wanted: set[str]) -> tuple[Any, Any]:
        found = _saved(outputs or {}, plan, kind) or _outputs(plan, plan.q, plan.k, plan.v, kind)
        row = in_a_row(plan, plan.k, plan.v) if packed(plan) else plan
        gradients = _gradients(row, kind, found, cotangents, wanted)
        if plan.pages is not None and plan.lengths is not None:
            pages = plan.k.shape[0], plan.k.shape[2], plan.pages, plan.lengths[1]
            gradients |= {n: on_pages(*pages, gradients[n]) for n in wanted & {"k", "v"}}
        return found, gradients

    return pullback.gradients(problem, wrt, find, name, paged_alone)


def _kind(problem: Problem) -> type[np.floating[Any]]:
    return np.float64 if problem.dtype == np.float64 else np.float32


def _outputs(plan: Score, q: Any, k: Any, v: Any, kind: type[np.floating[Any]]) -> dict[str, NDArray[Any]]:
    """The outputs by the fast kernel where it can, its rows of doubt and all other plans row by row.

    q, k and v stand in for those of the plan.
    """
    if packed(plan):
        return _packed(plan, q, k, v, kind)
    if kind is np.float64 or not fast.takes(plan):
        return _forward(prepare(replace(plan, q=q, k=k, v=v), kind))
    given, q, count = {"q": q, "k": k, "v": v}, widened(q), q.shape[1] // k.shape[1] * q.shape[2]
    few = fast.few(plan, count, k.shape[2])
    if k.dtype != v.dtype or storage_of(k) is None:
        k, v = widened(k), widened(v)
    q = converted(q, q.dtype)
    if not few:
        k, v = converted(k, k.dtype), converted(v, v.dtype)
    # Logits of an infinity in q are all infinite or NaN, and their row is one of doubt, unless a cap, a sink or a
    # sigmoid makes numbers of them.
    doubted = plan.sink is plan.softcap is None and plan.normalizer == "softmax"
    if not (few or doubted or finite(q)):
        q = rows(q)
    out, lse, redo = fast.run(plan, q, k, v)
    if redo.any():
        v = widened(v)
        again, numbers = prepare(replace(plan, **given), kind), np.isfinite(v)
        bad = np.argwhere(~numbers.all(-1))
        if len(bad):
            # A weight of 0 hides no NaN: once more without them, and those rows again that see one.
            out, lse, redo = fast.run(plan, q, widened(k), np.where(numbers, v, np.float32(0)))
            score.see(again, bad, redo)
        for row in np.flatnonzero(redo).tolist():
            score.forward(again, out, lse, row, row + 1)
        _sign(out, lse)
    return {"out": out} if plan.normalizer == "sigmoid" else {"out": out, "lse": lse}


def _packed(plan: Score, q: Any, k: Any, v: Any, kind: type[np.floating[Any]]) -> dict[str, NDArray[Any]]:
    """As `_outputs`: few rows read keys and values where they stand, others and those of doubt from a row of them."""
    if kind is np.float64:
        row = unpacked(replace(plan, q=q, k=k, v=v))
        return _outputs(row, q, row.k, row.v, kind)
    if not fast.takes(plan) or not fast.few(plan, q.shape[1] // k.shape[1] * q.shape[2], keys(plan)):
        row = in_a_row(plan, k, v)
        return _outputs(row, q, row.k, row.v, kind)
    numbers = k, v
    if k.dtype != v.dtype or stored(k) is None:
        numbers = widened(k), widened(v)
    out, lse, redo = fast.run(plan, converted(widened(q), np.float32), *numbers)
    if redo.any():
        row = in_a_row(plan, k, v)
        again = _outputs(row, q, row.k, row.v, kind)
        out[redo], lse[redo] = again["out"][redo], again["lse"][redo]
    return {"out": out, "lse": lse}


def _forward(x: Operands) -> dict[str, Floats]:
    batch, heads, lq, _ = x.q.shape
    out = np.empty((batch, heads, lq, x.v.shape[3]), x.q.dtype)
    lse = np.empty((batch, heads, lq), x.q.dtype)
    spread(score.forward, (x, out, lse), lse.size, _work(x))
    _sign(out, lse)
    return {"out": out} if x.sigmoid else {"out": out, "lse": lse}


def _sign(*outputs: NDArray[Any]) -> None:
    """Make every NaN the positive one: the sign of a computed NaN differs between processors."""
    for a in outputs:
        np.copyto(a, np.nan, where=np.isnan(a))


def _saved(outputs: Mapping[str, Any], plan: Score, kind: type[np.floating[Any]]) -> dict[str, Any] | None:
    """The outputs of an earlier evaluate, where they are all there and no less precise than what is computed in."""
    shapes = _shapes(plan)
    if plan.normalizer != "softmax":
        del shapes["lse"]
    if not set(shapes) <= set(outputs):
        return None
    for n, shape in shapes.items():
        if outputs[n].shape != shape:
            raise ShapeError(f"{n} of an earlier evaluate has shape {outputs[n].shape}, but this problem's has {shape}")
    if any(outputs[n].dtype.itemsize < np.dtype(np.float32).itemsize for n in shapes):
        return None
    return {n: converted(outputs[n], kind) for n in shapes}


def _shapes(plan: Score) -> dict[str, tuple[int, ...]]:
    return {"out": (*plan.q.shape[:3], plan.v.shape[3]), "lse": plan.q.shape[:3]}


def _work(x: Operands) -> int:
    """Multiply-adds of the two products."""
    return int(np.prod(x.q.shape[:3])) * int(x.k.shape[2] * (x.q.shape[3] + x.v.shape[3]))


def _gradients(
    plan: Score,
    kind: type[np.floating[Any]],
    found: Mapping[str, NDArray[Any]],
    cotangents: Mapping[str, Any],
    wanted: set[str],
) -> dict[str, NDArray[Any]]:
    """Cotangents of the plan's leaves by the fast kernels where they can, else row by row."""
    dout, dlse = (converted(cotangents.get(n, np.zeros(s, kind)), kind) for n, s in _shapes(plan).items())
    if wanted and kind is np.float32 and plan.normalizer == "softmax" and fast.takes(plan):
        q, k, v, out, lse = (converted(a, kind) for a in (plan.q, plan.k, plan.v, found["out"], found["lse"]))
        gradients = adjoint.gradients(plan, adjoint.Pass(q, k, v, out, lse, dout, dlse), wanted)
        if gradients is not None:
            return gradients
    return _backward(plan, prepare(plan, kind), dout, dlse, wanted)


def _backward(plan: Score, x: Operands, dout: NDArray[Any], dlse: NDArray[Any], wanted: set[str]) -> dict[str, Floats]:
    """Cotangents of the plan's leaves, at least of those wanted, by the names of `refattn.plan.leaves`."""
    found: dict[str, Floats] = {}
    given = (x, dout, dlse)
    by_row = {"q", "sink"} | {f"bias.{n}" for n, b in enumerate(plan.bias) if isinstance(b, Slope)}
    if wanted & by_row:
        dq, dslope, dsink = np.empty_like(x.q), np.empty(dlse.shape), np.empty(dlse.shape)
        spread(score.backward_rows, (*given, dq, dslope, dsink), dlse.size, 2 * _work(x))
        found |= dict.fromkeys(by_row, dslope.sum((0, 2)))
        found |= {"q": dq.astype(np.float64), "sink": dsink.sum((0, 2))}
    if wanted & {"k", "v"}:
        dk, dv = np.empty_like(x.k), np.empty_like(x.v)
        spread(score.backward_keys, (*given, dk, dv), dk.shape[0] * dk.shape[1], 3 * _work(x))
        found |= {"k": dk.astype(np.float64), "v": dv.astype(np.float64)}
    for n, bias in enumerate(plan.bias):
        if f"bias.{n}" in wanted - by_row:
            found[f"bias.{n}"] = _bias_gradient(bias, given, differences(plan))
    return found


def _bias_gradient(bias: Any, given: tuple[Any, ...], differences: tuple[int, int]) -> Floats:
    """Cotangent of a dense bias or a table, in its own shape: summed over what it was repeated along."""
    low, count = differences
    gradient = np.zeros(bias.values.shape)
    sizes = (1, gradient.shape[0], 1, count) if isinstance(bias, Table) else rank4(gradient.shape)
    rows = np.empty((math.prod(sizes[:3]), sizes[3]))
    arguments = (*given, np.array(sizes[:3], np.int64), isinstance(bias, Table), rows)
    spread(score.backward_bias, arguments, len(rows), 2 * _work(given[0]))
    if isinstance(bias, Dense):
        return rows.reshape(gradient.shape)
    gradient[:, low + bias.offset : low + bias.offset + count] = rows
    return gradient
