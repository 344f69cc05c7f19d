"""The certified engine: every element the correctly rounded value, proved, or its status says that it is not.

The reference's own text runs on balls with rising precision until each element's rounding is decided; large problems of
few bits go through exact slices first, and only what these leave open to balls. Then a second evaluation in another
arithmetic, float64 with a proved bound of its error, must agree with every value.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from flint import ctx
from numpy.typing import NDArray

from refattn.bound import Bounded, BoundSpace
from refattn.engines.certified.balls import BALLS
from refattn.engines.certified.plain_check import BY_ROW, in_blocks, of_rows
from refattn.engines.certified.rounding import (
    ENCLOSED,
    EXACT,
    PROPAGATED,
    ROUNDED,
    STATUS,
    Rounded,
    better,
    round_enclosed,
)
from refattn.errors import RefattnError, Undecided
from refattn.problem import Problem
from refattn.profiles import FLOAT64
from refattn.spec import Outputs

if TYPE_CHECKING:
    from refattn.engines.certified.slices import Sliced

__all__ = ["BITS", "ENCLOSED", "EXACT", "PROPAGATED", "ROUNDED", "STATUS", "Certificate", "certify", "name", "refuses"]

name = "certified"
BITS = (128, 512, 4096)
# Pairs of a query and a key from which on the exact-slice tier is tried first.
LARGE = 1 << 16


@dataclass(frozen=True)
class Certificate:
    """One output, certified.

    value: float64 rounded to odd; rne: rounded to nearest even; status: a code of `STATUS` per element; width: how far
    an enclosed value may lie from the exact one (0 elsewhere); centre, bound: the independent float64 evaluation and
    its proved error.
    """

    value: NDArray[np.float64]
    rne: NDArray[np.float64]
    status: NDArray[np.uint8]
    width: NDArray[np.float64]
    centre: NDArray[np.float64]
    bound: NDArray[np.float64]


def certify(
    problem: Problem,
    cotangents: Mapping[str, NDArray[Any]] | None = None,
    wrt: Sequence[str] = (),
    bits: Sequence[int] = BITS,
) -> dict[str, Certificate]:
    """Certificates of every output and, for cotangents, of the gradients d<name>; `bits` are the precisions tried.

    Raises
    ------
    RefattnError
        If the float64 bound refutes a certified value: a defect in one of the two arithmetics, never an answer.
    """
    wide = problem.dtype == np.float64
    sliced = _on_slices(problem, cotangents or {}, wrt)
    decided = {n: round_enclosed(x, wide) for n, x in sliced.enclosures.items()} if sliced is not None else {}
    for precision in bits:
        if decided and not _open(decided):
            break
        try:
            decided = _on_balls(problem, cotangents or {}, wrt, precision, decided)
        except Undecided:
            continue
    if not decided:
        raise Undecided(f"a decision in {problem.spec.variant} stays open at {bits[-1]} bits")
    if sliced is not None:
        checks: Mapping[str, Any] = in_blocks(problem, cotangents or {}, wrt, sliced.limits)
    else:
        checks = _in_float64(problem, cotangents or {}, wrt)
    clean = all(np.isfinite(a.astype(np.float64)).all() for a in problem.real_inputs().values())
    return {name: _checked(name, part, checks[name], clean) for name, part in decided.items()}


def _open(decided: Mapping[str, Rounded]) -> bool:
    return any((part.status == ENCLOSED).any() for part in decided.values())


def _on_slices(problem: Problem, cotangents: Mapping[str, Any], wrt: Sequence[str]) -> Sliced | None:
    """The exact-slice tier, where balls would take longer than its kernels take to compile."""
    sizes = problem.sizes
    if not {"B", "Hq", "Lq", "Lk"} <= set(sizes) or math.prod(sizes[n] for n in ("B", "Hq", "Lq", "Lk")) < LARGE:
        return None
    from refattn.engines.certified import slices

    return slices.enclose(problem, cotangents, wrt)


def _in_float64(problem: Problem, cotangents: Mapping[str, Any], wrt: Sequence[str]) -> Mapping[str, Any]:
    """The independent check; a choice closer than float64 tells leaves every value unchecked, its bound infinite."""
    space = BoundSpace(FLOAT64)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        try:
            return problem.differentiate(space.real, cotangents, wrt)
        except Undecided:
            plain = problem.differentiate(np.asarray, cotangents, wrt)
    return {name: Bounded(space, a, np.full(np.shape(a), np.inf)) for name, a in plain.items()}


def _on_balls(
    problem: Problem, cotangents: Mapping[str, Any], wrt: Sequence[str], bits: int, decided: Mapping[str, Rounded]
) -> dict[str, Rounded]:
    """What is decided already and what balls add to it: of some query rows alone where no other element is open."""
    rows = _open_rows(problem, decided)
    if rows is not None:
        problem = of_rows(problem, tuple(rows.tolist()))
        cotangents = {name: np.asarray(c)[:, :, rows] for name, c in cotangents.items()}
        wrt = [name for name in wrt if name == "q"]
    before = ctx.prec
    ctx.prec = bits
    try:
        balls = problem.differentiate(BALLS.real, cotangents, wrt)
    finally:
        ctx.prec = before
    found = {name: round_enclosed(x, problem.dtype == np.float64) for name, x in balls.items()}
    if rows is None:
        return {name: better(decided.get(name), x) for name, x in found.items()}
    return dict(decided) | {name: _placed(decided[name], x, rows) for name, x in found.items()}


def _open_rows(problem: Problem, decided: Mapping[str, Rounded]) -> NDArray[np.intp] | None:
    """The query rows that hold all undecided elements; None where others do, or the variant has no `restrict`."""
    if not decided or not hasattr(problem.variant, "restrict"):
        return None
    found = np.zeros(problem.sizes["Lq"], bool)
    for name, part in decided.items():
        open_ = part.status == ENCLOSED
        if name in BY_ROW:
            found |= open_.any((0, 1, *range(3, open_.ndim)))
        elif open_.any():
            return None
    return np.flatnonzero(found)


def _placed(old: Rounded, new: Rounded, rows: NDArray[np.intp]) -> Rounded:
    """The old elements with, in these rows, those that the new ones decide."""
    at = (slice(None), slice(None), rows)
    some = better(Rounded(old.odd[at], old.nearest[at], old.status[at], old.width[at]), new)
    whole = Rounded(old.odd.copy(), old.nearest.copy(), old.status.copy(), old.width.copy())
    for mine, a in zip(whole, some, strict=True):
        np.asarray(mine)[at] = a
    return whole


def _checked(name: str, found: Rounded, check: Any, clean: bool) -> Certificate:
    value, width = found.odd, found.width
    with np.errstate(invalid="ignore", over="ignore"):
        near = np.abs(value - check.x) <= check.e + np.spacing(np.abs(value)) + width
    same = near | (value == check.x) | (np.isnan(value) & np.isnan(check.x))
    if clean:
        # From finite inputs an infinite bound means that float64 overflowed on the way, which refutes nothing.
        same |= np.isposinf(check.e)
    if not same.all():
        where = tuple(int(i[0]) for i in np.nonzero(~same))
        raise RefattnError(
            f"{name}{list(where)}: balls say {value[where]!r}, float64 says {check.x[where]!r} ± {check.e[where]!r}; "
            "one of the two arithmetics is wrong, please report this"
        )
    return Certificate(value, found.nearest, found.status, width, check.x, check.e)


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
