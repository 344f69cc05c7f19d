"""Streams: the first state of a variant with a memory, a step from a state to the next, and states on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from refattn import registry
from refattn.api import _collected, _names, _numpy, _present, _run, _whole, build
from refattn.dtypes import format_of
from refattn.errors import ShapeError, SpecError
from refattn.problem import check, state_arrays
from refattn.spec import Outputs, Spec, describe
from refattn.state import State
from refattn.state import read as read_state


def init_state(spec: Spec, *, dtype: Any = "float64", **sizes: int) -> State:
    """The state of a streaming variant before the first token: init_state(spec, B=2, Hkv=4, D=64, Dv=64).

    Raises
    ------
    SpecError
        The variant carries no state.
    ShapeError
        A size that its arrays have is missing, unknown or no integer from 0 on.
    """
    whole, module = _whole(spec)
    carried = _carried(whole, module, 0)
    needed = sorted({dim for array in carried.values() for dim in array.names})
    if sorted(sizes) != needed or any(type(size) is not int or size < 0 for size in sizes.values()):
        raise ShapeError(
            f"init_state takes the sizes {', '.join(needed)}, integers from 0 on; given: {sizes or 'none'}. "
            f"The state of {whole.variant} is\n{describe(carried)}"
        )
    numpy = format_of(dtype).numpy
    return State(whole, 0, {name: np.zeros(array.shape(sizes), numpy) for name, array in carried.items()})


def step(
    spec: Spec,
    state: State,
    inputs: Mapping[str, Any],
    *,
    engine: str = "reference",
    dtype: Any = None,
    want: Sequence[str] = ("out",),
) -> tuple[Outputs, State]:
    """Outputs for the tokens that follow those of a state, and the state after them; the old one stays valid.

    Any way of cutting a sequence into steps gives the same answer, to the rounding of the state's dtype, which the new
    state has too. The certified engine proves outputs for the state it is given, not the state that it leaves.

    Raises as `attention`, and SpecError for a state of another variant or other options.
    """
    whole, module = _whole(spec)
    if not isinstance(state, State):
        raise SpecError(f"state is that of init_state or an earlier step; given: {type(state).__name__}")
    carried = _carried(whole, module, state.length)
    given, names = _present("inputs", inputs), _names("want", want)
    arrays = _numpy(given)
    sizes = check(module.signature(whole), arrays)
    if type(state.spec) is not type(whole) or module.resolve(state.spec, sizes) != module.resolve(whole, sizes):
        raise SpecError(f"this state is of {state.spec}, not of {whole}, whose state is\n{describe(carried)}")
    arrays |= {f"state_{name}": array for name, array in state.items()}
    # A state without any array would count as that of no token.
    check(module.signature(whole) | state_arrays(module, whole, state.length), arrays)
    problem = build(whole, arrays, dtype, (*names, "state"), state.length)
    results = _run(problem, engine, next(iter(state.values())).dtype)
    found = _collected(results, problem, (*names, "state"), next(iter(given.values()), None))
    return Outputs({n: found[n] for n in names}, results.status), found["state"]


def load_state(path: Any) -> State:
    """The state that `State.save` wrote, bit for bit. Raises StorageError where the file holds none."""
    return read_state(path, registry.spec_class)


def _carried(spec: Spec, module: Any, length: int) -> dict[str, Any]:
    """The arrays of a streaming variant's state by name."""
    if not hasattr(module, "state"):
        raise SpecError(f"{spec.variant} carries no state: call evaluate")
    found: dict[str, Any] = module.state(spec, length)
    return found
