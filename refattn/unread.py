"""The plan of a problem lowered from the shapes of q, k and v: their numbers and scales go into it as stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np

from refattn.plan import Score, leaves

Shapes = tuple[tuple[int, ...], ...]

_LARGEST = 1 << 20  # bytes of a plan that is kept
_STORED = frozenset({"q", "k", "v", "k_scale", "v_scale"})  # go into a plan as they are stored


class Unread:
    """Stands for an array of which a lowering may ask the shape and nothing else."""

    dtype = np.dtype(np.float64)
    nbytes = 0
    __array_ufunc__ = None

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.ndim, self.size = shape, len(shape), int(np.prod(shape))

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise TypeError("the array's numbers are read")


def outline(problem: Any, others: Mapping[str, Any] | None = None) -> Score | None:
    """The Score plan with an `Unread` for each of q, k and v; None where lowering reads them, or it is another plan.

    `others` stand in the place of the inputs of their names.
    Where there are no other inputs it depends on the spec and three shapes, and is kept for the next call.
    """
    inputs, lower = problem.inputs, getattr(problem.variant, "lower", None)
    if not callable(lower) or hasattr(problem.variant, "state"):
        return None
    if "q" not in inputs or "k" not in inputs or "v" not in inputs:
        return None
    shapes = inputs["q"].shape, inputs["k"].shape, inputs["v"].shape
    if len(inputs) == len(shapes):
        try:
            return _kept(lower, problem.spec, shapes)
        except _TooLarge as plan:
            return plan.args[0]  # type: ignore[no-any-return]
        except TypeError:  # of a spec that has no hash
            pass
    real = {n: a.astype(np.float64, copy=False) for n, a in problem.real_inputs().items() if n not in _STORED}
    return _lowered(lower, problem.spec, shapes, dict(inputs) | real | dict(others or {}))


def plan(problem: Any, others: Mapping[str, Any] | None = None) -> Score | None:
    """The outline with q, k and v of the inputs, in the caller's own dtype."""
    found = outline(problem, others)
    return None if found is None else replace(found, **{n: problem.inputs[n] for n in "qkv"})


class _TooLarge(Exception):
    """Carries a plan past the cache."""


@lru_cache(maxsize=32)
def _kept(lower: Callable[..., Any], spec: Any, shapes: Shapes) -> Score | None:
    found = _lowered(lower, spec, shapes, {})
    if found is not None and sum(a.nbytes for a in (*leaves(found).values(), *found.positions)) > _LARGEST:
        raise _TooLarge(found)
    return found


def _lowered(lower: Callable[..., Any], spec: Any, shapes: Shapes, others: Mapping[str, Any]) -> Score | None:
    given = {n: Unread(shape) for n, shape in zip("qkv", shapes, strict=True)}
    try:
        found = lower(spec, dict(others) | given)
    except (TypeError, AttributeError):
        return None
    if not isinstance(found, Score) or any(getattr(found, n) is not array for n, array in given.items()):
        return None
    if sum(isinstance(leaf, Unread) for leaf in leaves(found).values()) > len(given):
        return None
    return found
