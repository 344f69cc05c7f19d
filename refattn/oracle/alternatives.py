"""What a backend would give if it computed something else: the same case under a changed spec, inputs or text."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.dtypes import format_of
from refattn.engines import reference
from refattn.golden import build, inputs
from refattn.golden.load import Golden
from refattn.oracle.compare import output_dtype
from refattn.problem import Problem
from refattn.spec import Spec

Floats = NDArray[np.float64]
Values = dict[str, Floats]
# What a mistake about a bias, a sink or a cap speaks of: their own gradients depend on how it was differentiated.
FORWARD = ("out", "lse", "dq", "dk", "dv")
OUT_OF_PLACE = 1e9  # in units of the bound: NaN or infinity where a number is asked, or the other way round


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """Something else that might have been computed.

    `key` groups the alternatives of one mistake, `words` complete "it computes ...". spec and arrays replace the case's
    (None removes an array); `text` makes another formula of the variant's module; `after` changes the results.
    `only`: the outputs it speaks of, empty for all.
    """

    key: str
    words: str
    spec: Spec | None = None
    arrays: Mapping[str, Any] = field(default_factory=dict)
    text: Callable[[Any], Callable[..., Any]] | None = None
    after: Callable[[Problem, Values], Values] | None = None
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Failure:
    """A case that a backend failed: its published results in float64."""

    golden: Golden
    results: Mapping[str, Floats]

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """The case's inputs."""
        return self.golden.inputs()

    @cached_property
    def problem(self) -> Problem:
        """The case's problem, restricted to the published rows."""
        return build.problem_of(self.golden.case(), self.arrays)

    @cached_property
    def duals(self) -> dict[str, Any]:
        """Cotangents of the published rows."""
        return inputs.cotangents(self.golden.case())

    @cached_property
    def weights(self) -> Floats:
        """Softmax weights of the published rows, (B,Hq,rows,Lk): what one-hot values give."""
        lk, shape = self.golden.sizes["Lk"], self.problem.inputs["v"].shape
        given = {**self.problem.inputs, "v": np.broadcast_to(np.eye(lk), (*shape[:3], lk))}
        spec: Any = self.problem.spec
        if "keep" in given:
            given["keep"] = np.ones((1, 1), bool)
        found: Floats = reference.run(replace(self.problem, inputs=given))["out"]
        return found if spec.keep_probability is None else found * spec.keep_probability

    def evaluate(self, other: Alternative) -> Values:
        """The published values of an alternative, in float64."""
        case = self.golden.case()
        arrays = {n: a for n, a in (self.arrays | dict(other.arrays)).items() if a is not None}
        problem = build.problem_of(replace(case, spec=other.spec or case.spec), arrays)
        if other.text is not None:
            module = problem.variant
            text = SimpleNamespace(signature=module.signature, outputs=module.outputs, reference=other.text(module))
            problem = replace(problem, variant=text)
        if any(name not in ("out", "lse") for name in self.results):
            found = reference.vjp(problem, self.duals, tuple(problem.real_inputs()))
        else:
            found = reference.run(problem)
        values = {name: build.rows_of(case, name, a) for name, a in found.items()}
        return values if other.after is None else other.after(problem, values)

    def worst(self, values: Mapping[str, Floats], names: Iterable[str]) -> float:
        """Largest distance of the results from these values, in units of the case's bound and of its mean."""
        return max((self._worst(name, values[name]) for name in names if name in values), default=np.inf)

    def _worst(self, name: str, values: Floats) -> float:
        exact, bound, result = self.golden.expected[name], self.golden.bound[name], self.results[name]
        if values.shape != result.shape:
            return float(np.inf)
        size = float(np.max(np.abs(exact), where=np.isfinite(exact), initial=0.0))
        # The alternative's own bound is not known, and where the case's is 0 it is not: a typical one is added.
        typical = float(np.mean(bound[np.isfinite(bound)])) if np.isfinite(bound).any() else 0.0
        unit = bound + typical + 2.0 ** -format_of(output_dtype(self.golden, name)).precision * size + 1e-300
        with np.errstate(invalid="ignore", over="ignore"):
            far = np.minimum(np.abs(result - values) / unit, OUT_OF_PLACE)
        same = (result == values) | (np.isnan(values) & ~np.isfinite(result))
        return float(np.max(np.where(same, 0.0, np.where(np.isnan(far), OUT_OF_PLACE, far)), initial=0.0))
