"""Mistakes made after the scores: in lse, on empty rows, in the gradients, in what a masked slot holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from refattn.dtypes import format_of, round_to
from refattn.golden.build import rows_of
from refattn.oracle.alternatives import Alternative, Failure, Values
from refattn.problem import Problem

LN2 = 0.6931471805599453
SHORT = 11  # significant bits of a 16-bit format, at most


def log_sum(f: Failure) -> Iterator[Alternative]:
    """Another logarithm, or what it is taken of."""
    if "lse" not in f.results:
        return

    def base_2(problem: Problem, values: Values) -> Values:
        return values | {"lse": values["lse"] / LN2}

    def maximum(problem: Problem, values: Values) -> Values:
        with np.errstate(divide="ignore"):
            top = values["lse"] + np.log(f.weights.max(-1, initial=0.0))
        if "sink" in problem.inputs:
            top = np.maximum(top, problem.inputs["sink"].astype(np.float64)[:, None])
        return values | {"lse": top}

    def without_maximum(problem: Problem, values: Values) -> Values:
        with np.errstate(invalid="ignore"):
            return values | {"lse": values["lse"] - maximum(problem, values)["lse"]}

    yield Alternative(key="lse_base_2", words="lse to base 2, where it is natural", after=base_2)
    words = "the row maximum for lse: the log of the sum is missing"
    yield Alternative(key="lse_is_maximum", words=words, after=maximum)
    words = "the log of the sum for lse: the row maximum is missing"
    yield Alternative(key="lse_lacks_maximum", words=words, after=without_maximum)
    if "sink" in f.arrays:
        words = "lse without the sink"
        yield Alternative(key="lse_without_sink", words=words, arrays={"sink": None}, only=("lse",))


def shifted_log_sum(f: Failure) -> Iterator[Alternative]:
    """ALiBi written m j in place of −m |i − j|: the same weights, another lse."""
    plan = f.problem.score
    if "lse" not in f.results or not plan.causal or not any(hasattr(b, "slopes") for b in plan.bias):
        return
    slopes: Any = sum(np.asarray(b.slopes) for b in plan.bias if hasattr(b, "slopes"))

    def absolute(problem: Problem, values: Values) -> Values:
        return values | {"lse": values["lse"] + slopes[:, None] * plan.positions[0][:, None, :]}

    yield Alternative(key="alibi_absolute", words="ALiBi as m·j: the same weights, lse off by m·i", after=absolute)


def empty_rows(f: Failure) -> Iterator[Alternative]:
    """Rows that see nothing: the mean of V, or NaN, where 0 is asked."""
    if not (f.weights.sum(-1) == 0).any():
        return

    def mean(problem: Problem, values: Values) -> Values:
        empty = f.weights.sum(-1) == 0
        v = problem.inputs["v"].astype(np.float64)
        group = empty.shape[1] // v.shape[1]
        means = np.repeat(np.where(np.isfinite(v), v, 0).mean(2), group, axis=1)
        values["out"] = np.where(empty[..., None], means[:, :, None], values["out"])
        if "dv" in values:
            dout = np.where(empty[..., None], f.duals["out"].astype(np.float64), 0).sum(2)
            values["dv"] = values["dv"] + dout.reshape(*v.shape[:2], group, -1).sum(2)[:, :, None] / v.shape[2]
        return values

    def nan(problem: Problem, values: Values) -> Values:
        return values | {"out": np.where(f.weights.sum(-1)[..., None] == 0, np.nan, values["out"])}

    words = "the mean of V on rows that see nothing, where 0 is asked"
    yield Alternative(key="mean_of_values", words=words, after=mean, only=("out",))
    yield Alternative(key="mean_of_values", words=words, after=mean, only=("out", "dv"))
    words = "NaN on rows that see nothing, where 0 is asked"
    yield Alternative(key="nan_on_empty_rows", words=words, after=nan, only=("out",))


def gradients(f: Failure) -> Iterator[Alternative]:
    """The scale missing from or doubled in dq and dk; gradients not summed over the group."""
    spec: Any = f.golden.spec
    for name in ("dq", "dk"):
        if name in f.results:
            for factor, word in ((1 / spec.scale, "lacks the scale"), (spec.scale, "has the scale twice")):
                def times(problem: Problem, values: Values, name: str = name, factor: float = factor) -> Values:
                    return values | {name: values[name] * factor}

                words = f"the right forward pass, but {name} {word}"
                yield Alternative(key=f"{name}_scale", words=words, after=times, only=(name,))
    heads, groups = f.golden.sizes["Hq"], f.golden.sizes["Hkv"]
    if heads == groups or not {"dk", "dv"} & set(f.results):
        return
    group = heads // groups
    arrays = {name: np.repeat(f.arrays[name], group, axis=1) for name in ("k", "v")}
    for member, word in ((group - 1, "last"), (0, "first")):

        def pick(problem: Problem, values: Values, member: int = member) -> Values:
            return {name: a[:, member::group] if name in ("dk", "dv") else a for name, a in values.items()}

        words = f"dk and dv of the {word} query head of each group alone, where the group's sum is asked"
        yield Alternative(key="group_sum", words=words, arrays=arrays, after=pick)


def group_buffer(f: Failure) -> Iterator[Alternative]:
    """Gradients of a key head gathered in its 16-bit buffer, with a rounding for each query head."""
    heads, groups, dtype = f.golden.sizes["Hq"], f.golden.sizes["Hkv"], format_of(f.golden.dtype)
    if heads == groups or "dv" not in f.results or dtype.precision > SHORT or "keep" in f.arrays:
        return

    def buffered(problem: Problem, values: Values) -> Values:
        weights = round_to(f.weights, dtype.numpy).astype(np.float64)
        share = np.einsum("bhij,bhid->bhjd", weights, f.duals["out"].astype(np.float64))
        total = np.zeros((share.shape[0], groups, *share.shape[2:]))
        for member in range(heads // groups):
            total = round_to(total + share[:, member :: heads // groups], dtype.numpy).astype(np.float64)
        return values | {"dv": rows_of(f.golden.case(), "dv", total)}

    words = f"dv summed over the query heads of a group in {f.golden.dtype}, with a rounding for each head"
    yield Alternative(key="group_buffer", words=words, after=buffered, only=("dv",))


def leak(f: Failure) -> Iterator[Alternative]:
    """NaN or infinity from a slot that no row may see."""
    foreign = [n for n in ("q", "k", "v") if not np.isfinite(f.arrays[n].astype(np.float64)).all()]
    if not foreign:
        return

    def spoil(problem: Problem, values: Values) -> Values:
        return {n: np.where(np.isfinite(f.results[n]), a, np.nan) if n in f.results else a for n, a in values.items()}

    slots = ", ".join(foreign)
    words = f"attention into which NaN leaks from masked slots of {slots} (0 · NaN is NaN: clean what is masked)"
    yield Alternative(key="leak", words=words, after=spoil)


def layout(f: Failure) -> Iterator[Alternative]:
    """Heads and length exchanged in what comes back, where the sizes cannot tell."""

    def exchanged(problem: Problem, values: Values) -> Values:
        return {n: a.swapaxes(1, 2) if a.ndim == 4 else a for n, a in values.items()}

    sizes = f.golden.sizes
    if f.golden.rows is None and sizes["Hq"] == sizes["Lq"] and sizes["Hq"] > 1:
        words = "results in the layout (batch, length, heads, width)"
        yield Alternative(key="layout", words=words, after=exchanged, only=("out",))


AFTERMATH = (log_sum, shifted_log_sum, empty_rows, gradients, group_buffer, leak, layout)
