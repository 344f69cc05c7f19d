"""Which problems the exact-slice tier takes, as a Score plan of doubles, and how wide its slices are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from flint import arb
from numpy.typing import NDArray

from refattn.engines.certified.balls import BALLS, Balls
from refattn.engines.certified.fixed import Fixed, fixed, whole
from refattn.errors import RefattnError
from refattn.plan import Dense, Score, Slope, leaves, map_leaves
from refattn.problem import Problem

Floats = NDArray[np.float64]

# Inputs up to this size become balls when the plan is lowered; a larger one has to be a leaf as it is.
_LIFTED = 1 << 14
# Entries of a bias that a lowering makes, as balls: a few of 100 bytes each.
_TABLE = 1 << 18
# Multiples of 2^-100 up to 2^200 keep every error of the tier clear of underflow, and everything of overflow.
_LEAST, _MOST = -100, 200


@dataclass(frozen=True)
class ExactPlan:
    """A plan in float64 whose numbers are exactly those of the problem.

    dout (B,Hq,Lq,Dv) and dlse (B,Hq,Lq): cotangents, 0 where none is given; fixed: the slices; unit: a power of two
    that no cotangent of a score reaches; biases: the inputs that the plan's biases are, by their place.
    """

    plan: Score
    dout: Floats
    dlse: Floats
    fixed: Fixed
    unit: float
    biases: Mapping[int, str]

    @property
    def probability(self) -> float:
        """Of keeping a weight."""
        return 1.0 if self.plan.keep is None else self.plan.keep[1]


def exact_plan(problem: Problem, cotangents: Mapping[str, NDArray[Any]], wrt: Sequence[str]) -> ExactPlan | None:
    """The problem as the tier takes it, or None."""
    given = {*problem.outputs, *problem.inner_outputs}
    if problem.unplanned is not None or given != {"out", "lse"} or (wrt and problem.no_gradient):
        return None
    found = _lowered(problem)
    if found is None or not _known(found[0], problem.inputs):
        return None
    plan, biases = found
    if not set(wrt) <= {"q", "k", "v", "sink", *biases.values()}:
        return None
    shape = (*plan.q.shape[:3], plan.v.shape[3])
    dout = np.asarray(cotangents.get("out", np.zeros(shape)), np.float64)
    dlse = np.asarray(cotangents.get("lse", np.zeros(shape[:3])), np.float64)
    if not (_numbers(plan) and np.isfinite(dout).all() and np.isfinite(dlse).all()):
        return None
    slices = _widths(plan, dout, dlse, bool(wrt))
    return None if slices is None else ExactPlan(plan, dout, dlse, *slices, biases)


def _lowered(problem: Problem) -> tuple[Score, dict[int, str]] | None:
    """The plan with its leaves as doubles, and which inputs its biases are; None where a leaf is not exact.

    The plan is lowered on balls, so that what its lowering computes proves itself exact. Large inputs stand in as NaN,
    for they have to be leaves themselves; so do q, k and v.
    """
    real = {n: a.astype(np.float64, copy=False) for n, a in problem.real_inputs().items()}
    if not set("qkv") <= real.keys():
        return None
    given = {n: _nan(a.shape) if n in "qkv" or a.size > _LIFTED else BALLS.real(a) for n, a in real.items()}
    try:
        if not _small(problem.plan, real):
            return None
        lowered = problem.lowered(dict(problem.inputs) | given)
    except RefattnError:
        return None
    if not isinstance(lowered, Score) or any(getattr(lowered, n) is not given[n] for n in "qkv"):
        return None
    names = {id(balls): n for n, balls in given.items()}
    all_leaves = leaves(lowered).values()
    values = {id(leaf): real[names[id(leaf)]] if id(leaf) in names else _doubles(leaf) for leaf in all_leaves}
    if any(a is None for a in values.values()):
        return None
    owned = {n: b.slopes if isinstance(b, Slope) else b.values for n, b in enumerate(lowered.bias)}
    biases = {n: names[id(leaf)] for n, leaf in owned.items() if id(leaf) in names}
    return map_leaves(lowered, lambda leaf: values[id(leaf)]), biases


def _small(plan: Any, real: Mapping[str, Floats]) -> bool:
    """Whether what a lowering makes is small enough to be made of balls: a table may span all positions."""
    if not isinstance(plan, Score):
        return False
    made = [a.shape for n, a in leaves(plan).items() if n.startswith("bias.")]
    return all(math.prod(shape) <= _TABLE or shape in {a.shape for a in real.values()} for shape in made)


def _nan(shape: tuple[int, ...]) -> Balls:
    one = np.empty((), object)
    one[()] = arb("nan")
    return Balls(np.broadcast_to(one, shape))


def _doubles(leaf: Any) -> Floats | None:
    """The doubles that balls are, or −∞; None where one of them is not, or the lowering has rounded to float64."""
    if not isinstance(leaf, Balls):
        return None
    t, d, r = leaf.enclosure()
    return t if ((d == 0) & (r == 0) & ~np.isnan(t) & ~np.isposinf(t)).all() else None


def _known(plan: Score, inputs: Mapping[str, Any]) -> bool:
    """Whether the tier has the arithmetic for everything in the plan."""
    plain = plan.softcap is None and plan.normalizer == "softmax" and plan.pages is None
    plain = plain and not (plan.relative or plan.v_table) and plan.k_scale is None and plan.v_scale is None
    # A mask that a lowering makes might come from numbers, which stand in as NaN.
    given = [plan.mask, None if plan.keep is None else plan.keep[0]]
    return plain and all(a is None or any(a is b for b in inputs.values()) for a in given)


def _numbers(plan: Score) -> bool:
    """Whether every leaf holds numbers alone; −∞ in a bias masks, and is one."""
    masks = [id(bias.values) for bias in plan.bias if not isinstance(bias, Slope)]
    return all((np.isfinite(a) | (np.isneginf(a) & (id(a) in masks))).all() for a in leaves(plan).values())


def _widths(plan: Score, dout: Floats, dlse: Floats, gradients: bool) -> tuple[Fixed, float] | None:
    """Slices and the bound of the scores' cotangents; None where numbers have too many bits, or are too far from 1."""
    (nq, eq), (nk, ek), (nv, ev), (no, eo) = (whole(a) for a in (plan.q, plan.k, plan.v, dout))
    rest = [whole(a[np.isfinite(a)]) for n, a in leaves(plan).items() if n not in "qkv"]
    rest += [whole(x) for x in (plan.scale, dlse, 1.0 if plan.keep is None else plan.keep[1])]
    for n, e in ((nq, eq), (nk, ek), (nv, ev), (no, eo), *rest):
        if n and (e < _LEAST or n.bit_length() + e > _MOST):
            return None
    lq, lk = plan.q.shape[2], plan.k.shape[2]
    if nq * nk * plan.q.shape[3] > 2**53:
        return None
    if not gradients:
        slices = fixed(nv, lk)
        return None if slices is None else (slices, 1.0)
    if nv * no * plan.v.shape[3] > 2**53:
        return None
    slices = fixed(max(nv, nk, nq, no), max(lq, lk))
    size = 2 * plan.v.shape[3] * np.abs(plan.v).max(initial=0.0) * np.abs(dout).max(initial=0.0)
    unit = 2.0 ** int(np.frexp(size + np.abs(dlse).max(initial=0.0))[1])
    if slices is None or any(_repeats(plan, b) > 2 ** (53 - slices.bits) for b in plan.bias if isinstance(b, Dense)):
        return None
    return slices, unit


def _repeats(plan: Score, bias: Dense) -> int:
    """Pairs that one entry of a bias is added to."""
    return math.prod(map(int, plan.q.shape[:3])) * int(plan.k.shape[2]) // max(int(bias.values.size), 1)
