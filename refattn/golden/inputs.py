"""From recipes to arrays: the same bytes in any language, by Philox words and integers alone."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import philox, registry
from refattn.case import NORMAL, Case, Edit, Recipe
from refattn.dtypes import Format, format_of, round_to, significand_bits
from refattn.errors import SpecError
from refattn.problem import state_arrays
from refattn.spec import Array

# Scores, weights and scales of integers are handed to a backend in float32 whatever the case's storage type.
FLOAT32_INPUTS = ("sink", "slopes", "slopes_right", "k_scale", "v_scale")


def inputs(case: Case) -> dict[str, NDArray[Any]]:
    """Every input of a case: the required arrays by their recipe or NORMAL, the optional ones it names."""
    signature = signature_of(case)
    unknown = sorted(set(case.inputs) - set(signature))
    if unknown:
        raise SpecError(f"case {case.name} gives a recipe for {unknown[0]!r}; the signature has {', '.join(signature)}")
    return {
        name: array_of(case, name, array, case.inputs.get(name, NORMAL))
        for name, array in signature.items()
        if name in case.inputs or not array.optional
    }


def cotangents(case: Case) -> dict[str, NDArray[Any]]:
    """Cotangent of out (recipe "dout", default NORMAL) and, where named, of others; zero outside the published rows."""
    if "vjp" not in case.want:
        return {}
    spec, module = registry.whole(case.spec)
    after = state_arrays(module, spec, case.history + case.sizes.get("L", 0))
    found = {}
    for name, array in (module.outputs(spec) | after).items():
        if name == "out" or f"d{name}" in case.cotangents:
            made = array_of(case, f"d{name}", array, case.cotangents.get(f"d{name}", NORMAL))
            if case.rows is not None:
                made = made[:, :, list(case.rows.q)]
            found[name] = made
    return found


def signature_of(case: Case) -> dict[str, Array]:
    """The signature of the case's spec standing alone, with the arrays of a state where tokens have gone before."""
    spec, module = registry.whole(case.spec)
    found: dict[str, Array] = module.signature(spec)
    return found | (state_arrays(module, spec, case.history) if case.history else {})


def array_of(case: Case, name: str, array: Array, recipe: Recipe) -> NDArray[Any]:
    """One array of a case from its recipe."""
    shape = recipe.shape or array.shape(case.sizes)
    dtype = "float32" if name in FLOAT32_INPUTS else case.dtype
    made = materialise(recipe, shape, array.kind, dtype, seed=case.seed, case=case.name, tensor=name)
    if array.kind != "int":
        return made
    whole = made.astype(array.integers)
    if not np.array_equal(whole, made):
        raise SpecError(f"recipe of {name!r} in case {case.name!r} makes integers that {whole.dtype} cannot hold")
    return whole


def materialise(
    recipe: Recipe, shape: tuple[int, ...], kind: str, dtype: str, *, seed: int, case: str, tensor: str
) -> NDArray[Any]:
    """The array of a recipe: dyadic numbers exact in `dtype`, or booleans, or integers."""
    fmt = format_of(dtype)
    values = _BASES[recipe.kind](recipe, shape, kind, fmt, (seed, case, tensor))
    if recipe.alternate:
        values = np.where(_row_index(shape) % 2, -values, values)
    for edit in recipe.edits:
        _apply(values, edit)
    if kind != "real":
        plain: NDArray[Any] = values.astype({"bool": np.bool_, "int": np.int64}[kind])
        return plain
    exact = round_to(values, fmt.numpy)
    kept = exact.astype(np.float64)
    if not np.array_equal(kept, values, equal_nan=True):
        raise SpecError(f"recipe of {tensor!r} in case {case!r} makes values that {dtype} cannot hold")
    return exact


def sha256(array: NDArray[Any]) -> str:
    """Hash of the little-endian C-order bytes."""
    plain = np.ascontiguousarray(array)
    if plain.dtype.byteorder == ">":
        plain = plain.astype(plain.dtype.newbyteorder("<"))
    return hashlib.sha256(plain.tobytes()).hexdigest()


def _row_index(shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Index along the length axis, the last but one, of every element."""
    axis = max(len(shape) - 2, 0)
    return np.broadcast_to(np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(shape))]), shape)


def _source(recipe: Recipe, shape: tuple[int, ...]) -> NDArray[np.int64]:
    """Which element's Philox block each element reads: its own, unless rows repeat or alternate."""
    index = np.arange(int(np.prod(shape, dtype=np.int64))).reshape(shape)
    if recipe.period is None and not recipe.alternate:
        return index
    row = _row_index(shape)
    source = row % recipe.period if recipe.period is not None else row
    source = source // 2 if recipe.alternate else source
    stride = shape[-1] if len(shape) > 1 else 1
    return index + (source - row) * stride


def _words(recipe: Recipe, shape: tuple[int, ...], names: tuple[int, str, str]) -> Any:
    source = _source(recipe, shape)
    words = philox.words(*names, int(source.max(initial=-1)) + 1)
    return tuple(w[source] for w in words)


def _normal12(recipe: Recipe, shape: Any, kind: str, fmt: Format, names: Any) -> NDArray[Any]:
    k = significand_bits(philox.normal12(_words(recipe, shape, names)), min(fmt.precision, 53))
    return np.asarray(np.ldexp(k.astype(np.float64), recipe.exp2))


def _integers(recipe: Recipe, shape: Any, kind: str, fmt: Format, names: Any) -> NDArray[Any]:
    word = _words(recipe, shape, names)[3].astype(np.int64)
    k = word % (2 * recipe.limit + 1) - recipe.limit
    return np.asarray(np.ldexp(significand_bits(k, min(fmt.precision, 53)).astype(np.float64), recipe.exp2))


def _bernoulli(recipe: Recipe, shape: Any, kind: str, fmt: Format, names: Any) -> NDArray[Any]:
    hit = _words(recipe, shape, names)[3] < np.uint64(recipe.true << 24)
    return np.asarray(hit if kind == "bool" else np.where(hit, 0.0, recipe.otherwise))


def _constant(recipe: Recipe, shape: Any, kind: str, fmt: Format, names: Any) -> NDArray[Any]:
    return np.full(shape, recipe.value)


def _one_hot(recipe: Recipe, shape: Any, kind: str, fmt: Format, names: Any) -> NDArray[Any]:
    return np.asarray(np.arange(shape[-1]) == _row_index(shape) % shape[-1], np.float64)


def _heads(recipe: Recipe, shape: Any, kind: str, fmt: Format, names: Any) -> NDArray[Any]:
    head = np.arange(1, shape[1] + 1).reshape([-1 if i == 1 else 1 for i in range(len(shape))])
    return np.ldexp(np.broadcast_to(head, shape).astype(np.float64), recipe.exp2)


def _values(recipe: Recipe, shape: Any, kind: str, fmt: Format, names: Any) -> NDArray[Any]:
    return np.array(recipe.values, np.float64).reshape(shape)


_BASES: Mapping[str, Any] = {
    "normal12": _normal12,
    "integers": _integers,
    "bernoulli": _bernoulli,
    "constant": _constant,
    "one_hot": _one_hot,
    "heads": _heads,
    "values": _values,
}


def _apply(values: NDArray[Any], edit: Edit) -> None:
    key: Any = tuple(slice(None) if i is None else np.asarray(i) if isinstance(i, tuple) else i for i in edit.at)
    if edit.op == "set":
        values[key] = edit.value
    elif edit.op == "scale":
        values[key] *= edit.value
    else:
        values[key] += edit.value
