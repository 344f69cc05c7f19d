"""What a claim gives: rows of a table, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import refattn as ra


class Row(NamedTuple):
    """What is claimed, the paper's figure, ours, and "yes", or "no" with the reason."""

    claim: str
    paper: str
    ours: str
    reproduced: str


@dataclass(frozen=True)
class Result:
    """Rows, a sentence or two on how they were found, and what draws the picture on a matplotlib figure."""

    rows: Sequence[Row]
    how: str
    draw: Callable[[Any], None] | None = None


class NotThere(Exception):
    """The registry has no such variant yet."""


def variant(name: str, **options: Any) -> Any:
    """The Spec of a variant that may not have been written yet."""
    if name not in ra.variants():
        raise NotThere(f"{name}: variant not there yet")
    return ra.spec(name, **options)


def verdict(holds: Any, why: str) -> str:
    """The last column: a claim that does not reproduce is said so."""
    return "yes" if holds else f"no: {why}"
