"""Gradients of a problem from those of its Score plan: what engines that run plans share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from refattn import unread
from refattn.errors import Unsupported
from refattn.plan import Score, leaves, map_leaves
from refattn.problem import Problem
from refattn.spec import Outputs
from refattn.tape import Tape, Variable
from refattn.unpack import unpacked

Arrays = Mapping[str, Any]


def gradients(
    problem: Problem,
    wrt: Sequence[str],
    find: Callable[[Score, set[str]], tuple[Arrays, Arrays]],
    engine: str,
    takes: Callable[[Score], bool] = lambda plan: False,
) -> Outputs:
    """Outputs and gradients d<name>.

    find(plan, wanted) gives the outputs of a plan without pages and scales, or with those it `takes`, and the
    cotangents of the leaves wanted, by the names of `refattn.plan.leaves`; the tape carries them on to the inputs.

    Raises
    ------
    Unsupported
        The plan has not the gradients of the variant's text.
    """
    if wrt and problem.no_gradient is not None:
        raise Unsupported(f"engine {engine!r} has no gradients of this {problem.spec.variant}: {problem.no_gradient}")
    tape, real, own = Tape(), problem.real_inputs(), set(wrt) & set("qkv")
    inputs = {n: tape.variable(real[n].astype(np.float64, copy=False)) for n in wrt if n not in own}
    # Where q, k and v are the plan's own, their cotangents are the gradients.
    taped: Any = unread.plan(problem, inputs)
    if taped is None or not (taped.pages is taped.k_scale is taped.v_scale is None or takes(taped)):
        x, own = problem.lift(np.asarray), set()
        inputs = {n: tape.variable(x[n]) for n in wrt}
        lowered: Any = problem.lowered(x | inputs)
        taped = unpacked(lowered)
    plan = map_leaves(taped, lambda leaf: getattr(leaf, "value", leaf))
    wanted = {n: leaf for n, leaf in leaves(taped).items() if isinstance(leaf, Variable)}
    found, cotangents = find(plan, own | set(wanted))
    pairs = [(leaf, cotangents[n].astype(np.float64) if leaf.parents else cotangents[n]) for n, leaf in wanted.items()]
    carried = dict(zip(inputs, tape.gradients(pairs, list(inputs.values())), strict=True))
    return Outputs(dict(found) | {f"d{n}": cotangents[n] if n in own else carried[n] for n in wrt})


def of_sink(sink: Any, out: Any, lse: Any, dout: Any, dlse: Any) -> Any:
    """−Σ exp(sink − lse) δ of each head, δ = Σ_d dout out − dlse, in float64; 0 for a sink of −∞, which is none."""
    delta = (dout * out).sum(-1, dtype=np.float64) - dlse
    level = np.where(np.isneginf(lse), 0.0, lse)
    weight = np.exp(np.asarray(sink, np.float64)[:, None] - level)
    return np.asarray(-np.where(np.isneginf(sink)[:, None], 0.0, weight * delta).sum((0, 2)))
