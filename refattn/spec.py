"""Specs, the arrays they take, and what comes back: plain frozen data."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from math import prod
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refattn.errors import SpecError

_HEX_FLOAT = re.compile(r"-?0x[01]\.?[0-9a-f]*p[+-]\d+|-?inf")


@dataclass(frozen=True, kw_only=True)
class Spec:
    """What is computed: scalars, strings, tuples and nested term Specs; never an array, never what a shape tells.

    A real number in a Spec is the dyadic number written; JSON holds it as a hexadecimal float.
    """

    @property
    def variant(self) -> str:
        """The registry's name: the module the class stands in."""
        return type(self).__module__.rpartition(".")[2]

    def to_json(self) -> dict[str, Any]:
        """JSON-able mapping; left out is a default that is None or an empty tuple, or is that of an `added` field."""
        given = {f.name: (getattr(self, f.name), f) for f in fields(self)}
        kept = {n: value for n, (value, f) in given.items() if value != f.default or not _silent(value, f)}
        return {"variant": self.variant} | {name: _encode(value) for name, value in kept.items()}


def added(default: Any) -> Any:
    """A field that golden files are older than: JSON leaves its default out, so that theirs stay as they are."""
    return field(default=default, metadata={"added": True})


def _silent(value: Any, own: Any) -> bool:
    return value in (None, ()) or "added" in own.metadata


def dyadic(name: str, value: Any) -> float:
    """A Spec's real number as the double it is, from a Python or NumPy number that is one.

    Raises
    ------
    SpecError
        It is no number, not finite, or an integer that no double equals.
    """
    plain = value.item() if isinstance(value, np.generic) else value
    if type(plain) in (float, int) and abs(plain) <= sys.float_info.max and float(plain) == plain:
        return float(plain)
    raise SpecError(f"{name} is a finite number that float64 holds; given: {value!r}")


def _encode(value: Any) -> Any:
    if isinstance(value, Spec):
        return value.to_json()
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def from_json(data: Mapping[str, Any], find: Callable[[str], type[Spec]]) -> Spec:
    """Spec from `Spec.to_json`'s mapping; `find` gives the class of a variant's name.

    Raises
    ------
    SpecError
        For a missing or unknown variant, a field its Spec does not have, or one without a default that is missing.
    """
    if not isinstance(data, Mapping) or "variant" not in data:
        raise SpecError(f"a spec is an object with the field 'variant'; given: {data!r}")
    kind = find(data["variant"])
    given = {name: _decode(value, find) for name, value in data.items() if name != "variant"}
    known = [f.name for f in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        name = data["variant"]
        raise SpecError(f"unknown field {unknown[0]!r} of variant {name!r}; its fields are {', '.join(known)}")
    return made(kind, data["variant"], given)


def made(kind: type[Spec], name: str, options: Mapping[str, Any]) -> Spec:
    """A Spec of the class, called `name`.

    Raises
    ------
    SpecError
        An option that has no default is missing, or one is out of range.
    """
    missing = [f.name for f in fields(kind) if f.default is f.default_factory is MISSING and f.name not in options]
    if missing:
        raise SpecError(f"{name} has no default for {', '.join(missing)}: give a value")
    return kind(**options)


def _decode(value: Any, find: Callable[[str], type[Spec]]) -> Any:
    if isinstance(value, Mapping):
        return from_json(value, find)
    if isinstance(value, list):
        return tuple(_decode(item, find) for item in value)
    if isinstance(value, str) and _HEX_FLOAT.fullmatch(value):
        try:
            return float.fromhex(value)
        except OverflowError:
            raise SpecError(f"{value} is beyond the largest float64") from None
    return value


@dataclass(frozen=True)
class Array:
    """One array of a signature: dimensions by name, or a number where the spec fixes the size; kind and role.

    A dimension such as M*S has the product of two sizes.

    `domain` narrows the values: "any", "positive" (and finite), "positions" (any integers), "lengths:<dim>" (0 to that
    size), "indices:<dim>" (0 to one less, the dim a name or a number), "segments" (any integers), "int8" (of no other
    type). A `broadcast` array may lack leading dimensions or have size 1 in any.
    """

    dims: str
    kind: Literal["real", "int", "bool"] = "real"
    role: Literal["data", "learned", "choice"] = "data"
    domain: str = "any"
    optional: bool = False
    broadcast: bool = False

    @property
    def integers(self) -> type[np.signedinteger[Any]]:
        """The type of integers that stand in for it where none are given."""
        return np.int8 if self.domain == "int8" else np.int64

    @property
    def names(self) -> list[str]:
        """Dimensions whose size the arrays tell."""
        return [dim for dim in self.dims.replace("*", " ").split() if not dim.isdigit()]

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        """Its shape where the named dimensions have these sizes."""
        return tuple(extent(dim, sizes) for dim in self.dims.split())

    def __str__(self) -> str:
        notes = [self.kind] + ["optional"] * self.optional + ["broadcastable"] * self.broadcast
        return f"({', '.join(self.dims.split())}) {' '.join(notes)}"


def extent(dim: str, sizes: Mapping[str, int]) -> int:
    """Size of a dimension: a number, a name, or a product of these."""
    return prod(int(part) if part.isdigit() else sizes[part] for part in dim.split("*"))


def describe(signature: Mapping[str, Array]) -> str:
    """The signature as one line a name, for error messages."""
    return "\n".join(f"  {name} {array}" for name, array in signature.items())


class Outputs(Mapping[str, Any]):
    """What an evaluation returns: a read-only mapping whose entries are attributes too.

    `status` maps a certified output's name to an array of codes (see `refattn.engines.certified`), else is empty.
    """

    def __init__(self, arrays: Mapping[str, Any], status: Mapping[str, NDArray[np.uint8]] | None = None) -> None:
        self._arrays = dict(arrays)
        self.status = dict(status or {})

    def __getitem__(self, name: str) -> Any:
        """The array of that name."""
        return self._arrays[name]

    def __getattr__(self, name: str) -> Any:
        """The array of that name."""
        if name.startswith("_") or name not in self._arrays:
            there = ", ".join(self._arrays) or "none"
            raise AttributeError(f"no output {name!r}; there are: {there} (ask for it in want=)")
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        """Names in the order asked."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """Count of arrays."""
        return len(self._arrays)

    def __repr__(self) -> str:
        """Names, shapes and dtypes."""
        shown = {n: f"{tuple(a.shape)} {a.dtype}" if hasattr(a, "shape") else repr(a) for n, a in self._arrays.items()}
        return f"Outputs({', '.join(f'{name}: {what}' for name, what in shown.items())})"
