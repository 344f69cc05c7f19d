"""A Problem: one variant's text with its inputs, checked, on the way to an engine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from refattn import unread
from refattn.errors import DTypeError, ShapeError, Unsupported
from refattn.numeric import real
from refattn.plan import Plan, Score
from refattn.spec import Array, Outputs, Spec, describe, extent
from refattn.tape import Tape


class Variant(Protocol):
    """What a module in `refattn.variants` offers; the registry reads it, nothing subclasses it.

    A streaming variant offers `state(spec, length)`, the arrays that it carries after so many tokens, and gives them
    as "state" among its outputs; it is given them, with their "length", in the last argument. Its signature calls the
    number of tokens L. A module may also offer `validate(spec, x)`, which refuses what only the arrays together tell,
    `cases()` (there, or in _<name>_cases beside it, with FLAGS), `restrict(spec, x, rows)` for the published rows of
    long cases, `inner_outputs(spec)` and `inner_reference(spec, x)` for arrays inside that `want` may name beside the
    outputs, `operations(spec, sizes)` for `explain`, and `no_gradient(spec)`, a sentence where its plan has not the
    gradients of its text, or None.
    """

    def signature(self, spec: Any) -> dict[str, Array]:
        """Arrays the spec takes."""

    def outputs(self, spec: Any) -> dict[str, Array]:
        """Arrays it gives."""

    def resolve(self, spec: Any, sizes: Mapping[str, int]) -> Spec:
        """Defaults as exact dyadic numbers."""

    def reference(self, spec: Any, x: Mapping[str, Any], state: Any = None) -> dict[str, Any]:
        """The paper's formula, on whatever space the inputs are in."""

    def lower(self, spec: Any, x: Mapping[str, Any], state: Any = None) -> Plan:
        """The same problem as a plan: a second derivation. A module without one has a sentence in its place."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Problem:
    """How a variant's text reaches an engine: `spec` resolved, `inputs` checked NumPy arrays in the caller's dtype."""

    spec: Spec
    variant: Any
    inputs: Mapping[str, NDArray[Any]]
    sizes: Mapping[str, int]
    dtype: np.dtype[Any]
    want: tuple[str, ...] = ("out",)
    length: int = 0

    @property
    def signature(self) -> dict[str, Array]:
        """Arrays the spec takes, those of its state as state_<name>."""
        own: dict[str, Array] = self.variant.signature(self.spec)
        return own | state_arrays(self.variant, self.spec, self.length)

    @property
    def outputs(self) -> dict[str, Array]:
        """Arrays the spec gives, those of its state after these tokens as state_<name>."""
        own: dict[str, Array] = self.variant.outputs(self.spec)
        return own | state_arrays(self.variant, self.spec, self.length + self.sizes.get("L", 0))

    @property
    def inner_outputs(self) -> dict[str, Array]:
        """Arrays inside the variant that are given only where `want` names them."""
        offered: dict[str, Array] = inner_outputs(self.variant, self.spec)
        return {name: array for name, array in offered.items() if name in self.want}

    @property
    def integer_outputs(self) -> set[str]:
        """Names of the outputs that are integers: exact in every space, without a cotangent."""
        return {name for name, array in self.outputs.items() if array.kind == "int"}

    def real_inputs(self) -> dict[str, NDArray[Any]]:
        """The inputs that have gradients."""
        signature = self.signature
        return {name: a for name, a in self.inputs.items() if signature[name].kind == "real"}

    def lift(self, convert: Any) -> dict[str, Any]:
        """Inputs with the real ones, as float64, passed through `convert`; integers and booleans as they are."""
        real = self.real_inputs()
        return {n: convert(a.astype(np.float64, copy=False)) if n in real else a for n, a in self.inputs.items()}

    def evaluate(self, convert: Any) -> dict[str, Any]:
        """Outputs of the variant's text in the space that `convert` lifts float64 arrays into."""
        return self.text(self.lift(convert))

    def text(self, x: Mapping[str, Any]) -> dict[str, Any]:
        """Outputs of the variant's text for lifted inputs, those of its state as state_<name>."""
        given, state = self._split(x)
        if state is None:
            found = dict(self.variant.reference(self.spec, given))
            inside = self.variant.inner_reference(self.spec, given) if self.inner_outputs else {}
            return found | {name: inside[name] for name in self.inner_outputs}
        found = dict(self.variant.reference(self.spec, given, state))
        carried = found.pop("state")
        return found | {f"state_{name}": array for name, array in carried.items()}

    def restricted(self, rows: tuple[int, ...]) -> Problem:
        """The same problem for some query rows only, by the variant's `restrict`."""
        short = self.variant.restrict(self.spec, self.inputs, rows)
        return replace(self, inputs=short, sizes=dict(self.sizes) | {"Lq": len(rows)})

    def _split(self, x: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
        """Inputs proper, and the state: as given, else of no token, where every array is 0."""
        wanted = state_arrays(self.variant, self.spec, self.length)
        if not hasattr(self.variant, "state"):
            return dict(x), None
        like = next(iter(x.values()))
        state: dict[str, Any] = {"length": self.length}
        for name, array in wanted.items():
            state[name.removeprefix("state_")] = x[name] if name in x else real(np.zeros(array.shape(self.sizes)), like)
        return {name: a for name, a in x.items() if name not in wanted}, state

    def differentiate(self, convert: Any, cotangents: Mapping[str, NDArray[Any]], wrt: Sequence[str]) -> dict[str, Any]:
        """Outputs, and the gradients d<name> of the named inputs, from the same text on the tape.

        Integer outputs come as exact numbers of the space, so that an engine has one kind of number to deal with.
        """
        tape = Tape()
        x = self.lift(convert)
        leaves = {name: tape.variable(x[name]) for name in wrt}
        outputs = self.text(x | leaves)
        pairs = [(outputs[name], convert(np.asarray(c, np.float64))) for name, c in cotangents.items()]
        gradients = tape.gradients(pairs, list(leaves.values()))
        values = {name: getattr(output, "value", output) for name, output in outputs.items()}
        values |= {name: convert(np.asarray(values[name], np.float64)) for name in self.integer_outputs}
        return values | {f"d{name}": g for name, g in zip(wrt, gradients, strict=True)}

    @property
    def unplanned(self) -> str | None:
        """Why the variant has no plan, or None: its module has a sentence in the place of `lower`, or nothing."""
        lower = getattr(self.variant, "lower", "its module offers no `lower`")
        return f"{self.spec.variant} has no plan: {lower}" if isinstance(lower, str) else None

    @property
    def no_gradient(self) -> str | None:
        """Why gradients cannot come from the plan, or None: the variant's `no_gradient(spec)`, where it has one."""
        told: str | None = getattr(self.variant, "no_gradient", lambda spec: None)(self.spec)
        return told

    @cached_property
    def plan(self) -> Plan:
        """The lowered problem, in float64."""
        return self.lowered(self.lift(np.asanyarray))

    @cached_property
    def outline(self) -> Score | None:
        """The plan without the numbers of q, k and v, as `refattn.unread` makes it; None where it cannot be had."""
        return unread.outline(self)

    def lowered(self, x: Mapping[str, Any]) -> Plan:
        """The plan of lifted inputs.

        Raises
        ------
        Unsupported
            The variant has no plan; the message says why.
        """
        if self.unplanned is not None:
            raise Unsupported(self.unplanned)
        given, state = self._split(x)
        plan: Plan = self.variant.lower(self.spec, given, *([] if state is None else [state]))
        return plan

    @property
    def score(self) -> Score:
        """The plan of a problem that lowers to one Score.

        Raises
        ------
        Unsupported
            It lowers to something else, or not at all.
        """
        if isinstance(self.plan, str):
            raise Unsupported(f"{self.spec.variant} has no plan: {self.plan}")
        if not isinstance(self.plan, Score):
            raise Unsupported(f"{self.spec.variant} lowers to {type(self.plan).__name__}, where a Score is needed")
        return self.plan


class Engine(Protocol):
    """What evaluates a Problem."""

    name: str

    def refuses(self, problem: Problem) -> str | None:
        """One sentence why not, or None."""

    def run(self, problem: Problem) -> Outputs:
        """The outputs asked for, in float64 (certified: rounded to odd), or in float32 with no negative NaN."""

    def vjp(
        self,
        problem: Problem,
        cotangents: Mapping[str, NDArray[Any]],
        wrt: Sequence[str],
        outputs: Mapping[str, Any] | None = None,
    ) -> Outputs:
        """The outputs and the gradients d<name> for cotangents of outputs; saved `outputs` spare a forward pass."""


def state_arrays(variant: Any, spec: Spec, length: int) -> dict[str, Array]:
    """The arrays that a streaming variant carries after so many tokens, as state_<name>; none of another variant."""
    carried = variant.state(spec, length) if hasattr(variant, "state") else {}
    return {f"state_{name}": array for name, array in carried.items()}


def inner_outputs(variant: Any, spec: Spec) -> dict[str, Array]:
    """The arrays inside a variant that may be asked for; none of most variants."""
    return dict(variant.inner_outputs(spec)) if hasattr(variant, "inner_outputs") else {}


# Logits, weights and their sums: results that stay in float32 where q is shorter.
WIDE = frozenset({"lse", "scores", "probs"})

_KINDS = {"int": "iu", "bool": "b"}
_NAMES = {"real": "a floating-point dtype", "int": "an integer dtype", "bool": "bool"}
# Distances of positions are exact in int64 and in float64 within this.
_FARTHEST = 2**52


def check(signature: Mapping[str, Array], inputs: Mapping[str, NDArray[Any]]) -> dict[str, int]:
    """Sizes of the dimensions that the arrays agree on.

    Raises
    ------
    ShapeError
        An array is missing, unknown, of another rank, or disagrees in a size; lengths out of their range.
    DTypeError
        An array's kind is not the signature's.
    """
    sizes = fit(signature, inputs)
    within(signature, inputs, sizes)
    return sizes


class Shaped(NamedTuple):
    """What `fit` asks of an array."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]

    @property
    def ndim(self) -> int:
        """Number of dimensions."""
        return len(self.shape)


def fit(signature: Mapping[str, Array], inputs: Mapping[str, Any]) -> dict[str, int]:
    """The part of `check` that does not read the arrays' values."""

    def wrong(what: str) -> str:
        shapes = ", ".join(f"{name} {tuple(a.shape)}" for name, a in inputs.items())
        return f"{what}\ngiven: {shapes or 'nothing'}\nexpected:\n{describe(signature)}"

    unknown = next((name for name in inputs if name not in signature), None)
    if unknown is not None:
        raise ShapeError(wrong(f"unknown array {unknown!r}"))
    sizes: dict[str, int] = {}
    for name, array in signature.items():
        if name not in inputs:
            if not array.optional:
                raise ShapeError(wrong(f"missing array {name!r}"))
            continue
        given, dims = inputs[name], array.dims.split()
        if not is_kind(given.dtype, array.kind):
            raise DTypeError(wrong(f"{name} is {given.dtype}, where {_NAMES[array.kind]} is expected"))
        if array.broadcast:
            continue
        if given.ndim != len(dims):
            raise ShapeError(wrong(f"{name} has {given.ndim} dimensions, not {len(dims)}"))
        for dim, size in zip(dims, given.shape, strict=True):
            expected = sizes.setdefault(dim, size) if dim.isidentifier() else extent(dim, sizes)
            if expected != size:
                raise ShapeError(wrong(_disagreement(name, dim, size, expected)))
    for name, given in inputs.items():
        if signature[name].broadcast and not _broadcasts(given.shape, signature[name].shape(sizes)):
            raise ShapeError(wrong(f"{name} {given.shape} does not broadcast to its dimensions"))
    return sizes


def within(signature: Mapping[str, Array], inputs: Mapping[str, NDArray[Any]], sizes: Mapping[str, int]) -> None:
    """The part of `check` that reads the arrays' values: each lies in its domain."""
    for name, given in inputs.items():
        if signature[name].domain != "any":
            _check_domain(name, signature[name].domain, given, sizes)


def is_kind(dtype: np.dtype[Any], kind: str) -> bool:
    """Whether arrays of the dtype may stand where a signature says real, int or bool."""
    if kind == "real":
        return dtype.kind == "f" or dtype.name.startswith(("bfloat", "float8"))
    return dtype.kind in _KINDS[kind]


def _disagreement(name: str, dim: str, size: int, expected: int) -> str:
    if dim.isdigit():
        return f"{name} has size {size} where {dim} is expected"
    return f"{name} has {dim}={size}, but an array before it has {dim}={expected}"


def _broadcasts(shape: tuple[int, ...], target: tuple[int, ...]) -> bool:
    return len(shape) <= len(target) and all(n in (1, full) for n, full in zip(shape[::-1], target[::-1], strict=False))


def _check_domain(name: str, domain: str, given: NDArray[Any], sizes: Mapping[str, int]) -> None:
    kind, _, dim = domain.partition(":")
    if kind == "int8" and given.dtype != np.int8:
        raise DTypeError(f"{name} is {given.dtype}, where int8 is expected")
    if kind == "positive" and not all(0 < number < np.inf for number in given.astype(np.float64).flat):
        raise ShapeError(f"{name} must hold finite numbers above 0; given: {given.tolist()}")
    if kind == "positions" and given.size and max(-int(given.min()), int(given.max())) > _FARTHEST:
        raise ShapeError(f"{name} must lie between -2^52 and 2^52; given: {given.min()} to {given.max()}")
    if kind == "indices":
        limit = extent(dim, sizes)
        if given.size and (given.min() < 0 or given.max() >= limit):
            raise ShapeError(f"{name} must lie between 0 and {dim} - 1 = {limit - 1}; given: {given.tolist()}")
    if kind == "lengths" and given.size and (given.min() < 0 or given.max() > extent(dim, sizes)):
        raise ShapeError(f"{name} must lie between 0 and {dim} = {extent(dim, sizes)}; given: {given.tolist()}")
