"""The certified engine: every element the correctly rounded value, proved, or its status says that it is not.

Tiers of rising cost are asked until each element's rounding is decided: exact slices, pairs of doubles with radii,
balls of rising precision, and a prime field for what balls cannot decide; each is asked only what is still open. The
reference's own text runs on pairs, on balls and over the field. Then a second evaluation in another arithmetic, float64
with a proved bound of its error, must agree with every value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from flint import ctx
from numpy.typing import NDArray

from refattn.bound import Bounded, BoundSpace
from refattn.engines.certified import arithmetic
from refattn.engines.certified.balls import BALLS
from refattn.engines.certified.enclosure import Enclosing
from refattn.engines.certified.escalation import answered, still_open
from refattn.engines.certified.identities import exactness
from refattn.engines.certified.plain_check import in_blocks
from refattn.engines.certified.rounding import (
    ENCLOSED,
    EXACT,
    IDENTITY,
    PROPAGATED,
    ROUNDED,
    STATUS,
    Rounded,
    better,
    round_enclosed,
)
from refattn.engines.certified.tier import Task, Tier
from refattn.errors import RefattnError, Undecided
from refattn.problem import Problem
from refattn.profiles import FLOAT64
from refattn.spec import Outputs

if TYPE_CHECKING:
    from refattn.engines.certified.slices import Sliced

__all__ = [
    "BITS", "BY_PAIRS", "BY_SLICES", "ENCLOSED", "EXACT", "IDENTITY", "PROPAGATED", "ROUNDED", "STATUS", "TIERS",
    "Certificate", "certify", "name", "refuses",
]  # fmt: skip

name = "certified"
BITS = (128, 512, 4096)
TIERS = ("none", "slices", "pairs", "balls", "field")
UNDECIDED, BY_SLICES, BY_PAIRS, BY_BALLS, BY_FIELD = range(len(TIERS))
# Pairs of a query and a key from which on the exact-slice tier is tried first.
LARGE = 1 << 16
# Operations from which on pairs of doubles take less time than balls.
PAIRS_FROM = 10**6


@dataclass(frozen=True)
class Certificate:
    """One output, certified.

    value: float64 rounded to odd; rne: rounded to nearest even; status: a code of `STATUS` per element; width: how far
    an enclosed value may lie from the exact one (0 elsewhere); centre, bound: the independent float64 evaluation and
    its proved error; tier: which of TIERS decided, which depends on the size of the problem and on nothing it is worth.
    """

    value: NDArray[np.float64]
    rne: NDArray[np.float64]
    status: NDArray[np.uint8]
    width: NDArray[np.float64]
    centre: NDArray[np.float64]
    bound: NDArray[np.float64]
    tier: NDArray[np.uint8]


def certify(
    problem: Problem,
    cotangents: Mapping[str, NDArray[Any]] | None = None,
    wrt: Sequence[str] = (),
    bits: Sequence[int] = BITS,
    fast: bool | None = None,
) -> dict[str, Certificate]:
    """Certificates of every output and, for cotangents, of the gradients d<name>; `bits` are the precisions tried.

    `fast`: whether exact slices and pairs of doubles are tried before balls: None, where that saves time.

    Raises
    ------
    RefattnError
        If the float64 bound refutes a certified value: a defect in one of the two arithmetics, never an answer.
    """
    arithmetic.check()
    task = Task(problem, cotangents or {}, wrt)
    sliced = _on_slices(task) if fast or (fast is None and _many_pairs(problem)) else None
    decided: dict[str, Rounded] = {}
    by: dict[str, NDArray[np.uint8]] = {}
    if sliced is not None:
        decided = {n: round_enclosed(x, problem.dtype == np.float64) for n, x in sliced.enclosures.items()}
        by = {n: np.where(x.status != ENCLOSED, BY_SLICES, UNDECIDED).astype(np.uint8) for n, x in decided.items()}
    for code, tier in tiers(bits, fast or (fast is None and _many_operations(problem))):
        if decided and not still_open(decided):
            break
        try:
            found = tier(task, decided)
        except Undecided:
            continue
        decided |= {name: better(decided.get(name), part) for name, part in found.items()}
        for name in found:
            was = by.get(name, np.full(decided[name].odd.shape, UNDECIDED, np.uint8))
            by[name] = np.where((was == UNDECIDED) & (decided[name].status != ENCLOSED), code, was).astype(np.uint8)
    if not decided:
        raise Undecided(f"a decision in {problem.spec.variant} stays open at {bits[-1]} bits")
    if sliced is not None:
        checks: Mapping[str, Any] = in_blocks(problem, task.cotangents, wrt, sliced.limits)
    else:
        checks = _in_float64(problem, task.cotangents, wrt)
    clean = all(np.isfinite(a.astype(np.float64)).all() for a in problem.real_inputs().values())
    return {name: _checked(name, part, checks[name], clean, by[name]) for name, part in decided.items()}


def tiers(bits: Sequence[int], pairs: bool = True) -> list[tuple[int, Tier]]:
    """What is tried in turn: pairs, balls, and behind all balls but the first the exactness test."""
    found: list[tuple[int, Tier]] = [(BY_PAIRS, _on_pairs)] if pairs else []
    for precision in bits:
        found += [(BY_BALLS, partial(_on_balls, bits=precision))]
        if precision != bits[0] or len(bits) == 1:
            found += [(BY_FIELD, partial(exactness, bits=precision))]
    return found


def _in_float64(problem: Problem, cotangents: Mapping[str, Any], wrt: Sequence[str]) -> Mapping[str, Any]:
    """The independent check; a choice closer than float64 tells leaves every value unchecked, its bound infinite."""
    space = BoundSpace(FLOAT64)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        try:
            return problem.differentiate(space.real, cotangents, wrt)
        except Undecided:
            plain = problem.differentiate(np.asarray, cotangents, wrt)
    return {name: Bounded(space, a, np.full(np.shape(a), np.inf)) for name, a in plain.items()}


def _many_pairs(problem: Problem) -> bool:
    """Whether balls would take longer than the kernels of slices take to compile."""
    sizes = problem.sizes
    return {"B", "Hq", "Lq", "Lk"} <= set(sizes) and math.prod(sizes[n] for n in ("B", "Hq", "Lq", "Lk")) >= LARGE


def _many_operations(problem: Problem) -> bool:
    """Whether pairs take less time than balls."""
    module = problem.variant
    return hasattr(module, "operations") and module.operations(problem.spec, problem.sizes)[0] >= PAIRS_FROM


def _on_slices(task: Task) -> Sliced | None:
    from refattn.engines.certified import pairs_kernels, slices

    # What Numba compiles is tried once for both tiers.
    pairs_kernels.kernels()
    return slices.enclose(task.problem, task.cotangents, task.wrt)


def _on_pairs(task: Task, decided: Mapping[str, Rounded]) -> dict[str, Rounded]:
    from refattn.engines.certified import pairs

    return answered(task, decided, lambda part: pairs.enclose(part.problem, part.cotangents, part.wrt) or {})


def _on_balls(task: Task, decided: Mapping[str, Rounded], bits: int) -> dict[str, Rounded]:
    return answered(task, decided, partial(_in_balls, bits=bits))


def _in_balls(task: Task, bits: int) -> Mapping[str, Enclosing]:
    before = ctx.prec
    ctx.prec = bits
    try:
        return task.problem.differentiate(BALLS.real, task.cotangents, task.wrt)
    finally:
        ctx.prec = before


def _checked(name: str, found: Rounded, check: Any, clean: bool, by: NDArray[np.uint8]) -> Certificate:
    value, width = found.odd, found.width
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.abs(value - check.x) <= check.e + np.spacing(np.abs(value)) + width
    same = near | (value == check.x) | (np.isnan(value) & np.isnan(check.x))
    if clean:
        # From finite inputs an infinite bound means that float64 overflowed on the way, which refutes nothing.
        same |= np.isposinf(check.e)
    if not same.all():
        where = tuple(map(int, np.argwhere(~same)[0]))
        raise RefattnError(
            f"{name}{list(where)}: {TIERS[by[where]]} say {value[where]!r}, "
            f"float64 says {check.x[where]!r} ± {check.e[where]!r}; "
            "one of the two arithmetics is wrong, please report this"
        )
    return Certificate(value, found.nearest, found.status, width, check.x, check.e, by)


def refuses(problem: Problem) -> str | None:
    """Every reference runs on balls."""
    return None


def run(problem: Problem) -> Outputs:
    """Correctly rounded outputs: to nearest for float64, else to odd, so that one more rounding is correct."""
    return _outputs(problem, certify(problem))


def vjp(
    problem: Problem, cotangents: Mapping[str, Any], wrt: Sequence[str], outputs: Mapping[str, Any] | None = None
) -> Outputs:
    """Correctly rounded outputs and gradients."""
    return _outputs(problem, certify(problem, cotangents, wrt))


def _outputs(problem: Problem, found: Mapping[str, Certificate]) -> Outputs:
    wide = problem.dtype == np.float64
    values = {name: c.rne if wide else c.value for name, c in found.items()}
    return Outputs(values, {name: c.status for name, c in found.items()})
