"""What is asked of the balls: only what a cheaper tier left undecided, and of that only the query rows concerned."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.engines.certified.plain_check import of_rows
from refattn.engines.certified.rounding import ENCLOSED, Rounded, better
from refattn.problem import Problem
from refattn.spec import Array


@dataclass(frozen=True)
class Question:
    """A problem with the cotangents and inputs of the gradients that are asked; `rows` of the whole, None if all."""

    problem: Problem
    cotangents: Mapping[str, NDArray[Any]]
    wrt: tuple[str, ...]
    rows: tuple[int, ...] | None = None

    def merged(self, decided: Mapping[str, Rounded], found: Mapping[str, Rounded]) -> dict[str, Rounded]:
        """What was decided, with what has been found where it was not; a result that nobody asked for is left out."""
        merged = dict(decided)
        for name, new in found.items():
            old = decided.get(name)
            axis = _axis(self.problem, name)
            if self.rows is None or old is None:
                merged[name] = better(old, new)
            elif axis is not None:
                at = (slice(None),) * axis + (list(self.rows),)
                parts: Any = (part[at] for part in old)
                settled: Any = zip(old, better(Rounded(*parts), new), strict=True)
                merged[name] = Rounded(*(_replaced(a, at, b) for a, b in settled))
        return merged


def question(whole: Question, decided: Mapping[str, Rounded]) -> Question | None:
    """What is still open, or None: fewer gradients, and fewer rows, where the variant can be restricted to rows."""
    if not decided:
        return whole
    left = {name: part.status == ENCLOSED for name, part in decided.items()}
    left = {name: where for name, where in left.items() if where.any()}
    if not left:
        return None
    wrt = tuple(name for name in whole.wrt if f"d{name}" in left)
    smaller = replace(whole, wrt=wrt, cotangents=whole.cotangents if wrt else {})
    rows = _rows(smaller, left)
    return smaller if rows is None else _restricted(smaller, rows)


def _rows(asked: Question, left: Mapping[str, NDArray[np.bool_]]) -> tuple[int, ...] | None:
    """Query rows with something undecided; None where that does not save half, or what is open is no row's own."""
    problem = asked.problem
    axes = {name: _axis(problem, name) for name in (*left, *asked.cotangents)}
    if not hasattr(problem.variant, "restrict") or "L" in problem.sizes or None in axes.values():
        return None
    open_ = np.zeros(problem.sizes["Lq"], bool)
    for name, where in left.items():
        open_ |= where.any(tuple(i for i in range(where.ndim) if i != axes[name]))
    return tuple(np.flatnonzero(open_).tolist()) if 2 * open_.sum() <= open_.size else None


def _restricted(asked: Question, rows: tuple[int, ...]) -> Question:
    duals = {name: np.take(c, rows, _axis(asked.problem, name)) for name, c in asked.cotangents.items()}
    return Question(of_rows(asked.problem, rows), duals, asked.wrt, rows)


def _axis(problem: Problem, name: str) -> int | None:
    """The axis of the query rows in an output or in the gradient of what has rows of its own for each; or None."""
    arrays: dict[str, Array] = {f"d{n}": array for n, array in problem.signature.items()} | problem.outputs
    dims = arrays[name].dims.split()
    return dims.index("Lq") if "Lq" in dims and not arrays[name].broadcast else None


def _replaced(old: NDArray[Any], at: Any, new: NDArray[Any]) -> NDArray[Any]:
    found = old.copy()
    found[at] = new
    return found
