"""What a tier is asked: only what is open, no gradients that are decided, and of query rows only those concerned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.engines.certified.enclosure import Enclosing
from refattn.engines.certified.rounding import ENCLOSED, Rounded, round_enclosed
from refattn.engines.certified.tier import Task
from refattn.problem import Problem

Bools = NDArray[np.bool_]
# The axis of the query rows.
_ROWS = 2


def still_open(decided: Mapping[str, Rounded]) -> dict[str, Bools]:
    """Undecided elements, of the outputs that have any."""
    found = {name: part.status == ENCLOSED for name, part in decided.items()}
    return {name: where for name, where in found.items() if where.any()}


def concerned(task: Task, open_: Mapping[str, Bools]) -> tuple[Task, list[int] | None]:
    """The task for the open outputs and, where each of their elements hangs on its query row alone, for those rows."""
    wrt = tuple(name for name in task.wrt if f"d{name}" in open_)
    small = Task(task.problem, task.cotangents if wrt else {}, wrt)
    given = (*open_, *small.cotangents)
    if not hasattr(task.problem.variant, "restrict") or not all(by_row(task.problem, name) for name in given):
        return small, None
    rows = sorted({int(i) for where in open_.values() for i in np.nonzero(where)[_ROWS]})
    cotangents = {name: np.take(c, rows, _ROWS) for name, c in small.cotangents.items()}
    return Task(task.problem.restricted(tuple(rows)), cotangents, wrt), rows


def of_rows(array: NDArray[Any], rows: list[int] | None) -> NDArray[Any]:
    """The part of an output that a restricted task gives."""
    return array if rows is None else np.take(array, rows, _ROWS)


def answered(
    task: Task, decided: Mapping[str, Rounded], enclose: Callable[[Task], Mapping[str, Enclosing]]
) -> dict[str, Rounded]:
    """Roundings from the intervals of what is open, or of everything where nothing is decided yet."""
    part, rows = concerned(task, still_open(decided)) if decided else (task, None)
    wide = task.problem.dtype == np.float64
    found = {name: round_enclosed(x, wide) for name, x in enclose(part).items()}
    if rows is None:
        return found
    return {name: _placed(decided[name], new, rows) for name, new in found.items() if by_row(task.problem, name)}


def _placed(old: Rounded, new: Rounded, rows: list[int]) -> Rounded:
    copies: Any = [part.copy() for part in old]
    for whole, part in zip(copies, new, strict=True):
        whole[:, :, rows] = part
    return Rounded(*copies)


def by_row(problem: Problem, name: str) -> bool:
    """Whether an output, or the gradient of an input, has an entry for each query row that hangs on that row alone."""
    outputs = problem.outputs
    array = outputs[name] if name in outputs else problem.signature[name[1:]]
    return not array.broadcast and array.dims.split()[_ROWS : _ROWS + 1] == ["Lq"]
