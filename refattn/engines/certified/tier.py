"""What a tier of certification is: told the task and what is decided already, it says what it can of the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from numpy.typing import NDArray

from refattn.engines.certified.rounding import Rounded
from refattn.problem import Problem


class Task(NamedTuple):
    """A problem, the cotangents of its outputs, and the inputs whose gradients are asked."""

    problem: Problem
    cotangents: Mapping[str, NDArray[Any]]
    wrt: Sequence[str]


Tier = Callable[[Task, Mapping[str, Rounded]], Mapping[str, Rounded]]
"""Returns Rounded of every output that it has something to say of; raises Undecided where it has nothing to say."""
