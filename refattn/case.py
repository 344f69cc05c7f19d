"""Cases and input recipes: the golden suite's problems as a few integers, never as arrays.

A recipe is a closed formula over Philox4x32-10 words and integers, so any language regenerates the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from refattn.dtypes import Overflow
from refattn.spec import Spec

Kind = Literal["normal12", "integers", "bernoulli", "constant", "one_hot", "heads", "values"]


@dataclass(frozen=True, kw_only=True)
class Edit:
    """Change the entries at an index of the array: None is every index of an axis, a negative one counts from the end.

    "set" writes the value, "scale" multiplies by it (a power of two), "add" adds it.
    """

    at: tuple[int | tuple[int, ...] | None, ...]
    op: Literal["set", "scale", "add"]
    value: float


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How one input array is made; every value is a dyadic number exact in the case's dtype.

    normal12   k 2^exp2 with k the sum of twelve Philox bytes minus 1530, rounded to the dtype's significand
    integers   k 2^exp2 with |k| ≤ limit, from Philox word 3
    bernoulli  True where word 3 < 2^32 · true / 256; for a real array, 0 where True and `otherwise` where not
    constant   `value` everywhere
    one_hot    1 where the last index equals the row modulo the last size, else 0
    heads      (head + 1) 2^exp2: the value names the head
    values     `values` as they stand, in C order

    `shape` replaces the signature's where an array broadcasts. `period` repeats rows: row l holds what row l mod
    period would. `alternate` gives row l the value of row l // 2, negated where l is odd. Edits come last, in order.
    """

    kind: Kind = "normal12"
    exp2: int = -8
    limit: int = 15
    true: int = 192
    value: float = 0.0
    otherwise: float = float("-inf")
    values: tuple[float | int | bool, ...] = ()
    shape: tuple[int, ...] | None = None
    period: int | None = None
    alternate: bool = False
    edits: tuple[Edit, ...] = ()


NORMAL = Recipe()


class Flag(NamedTuple):
    """`exercises`: what a case with this flag does; `bugs`: reports it would have caught; `family`: made by inputs.

    Bugs are `repository#number`.
    """

    exercises: str
    bugs: tuple[str, ...] = ()
    family: bool = False


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a long case that are published: query rows for out, lse and dq; key rows for dk and dv."""

    q: tuple[int, ...]
    k: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Case:
    """One golden problem: spec, sizes and recipes.

    `inputs` names the arrays that are not NORMAL and the optional arrays that are present; `cotangents` the same for
    dout and those of other outputs; `want` says which outputs are published, "state" for the arrays carried on, "vjp"
    for gradients; `flags` name what the case exercises, `catches` the mistake it is there to catch. `history`: so many
    tokens have gone before, and the arrays state_<name> after them are inputs too. `overflow`: what becomes of a result
    beyond the dtype's largest number: infinity (NaN where there is none), or under "saturate" that number.
    `suite`: of "large" the repository holds manifests alone, recipes and hashes.
    """

    name: str
    spec: Spec
    sizes: Mapping[str, int]
    catches: str
    dtype: str = "float32"
    inputs: Mapping[str, Recipe] = field(default_factory=dict)
    cotangents: Mapping[str, Recipe] = field(default_factory=dict)
    want: tuple[str, ...] = ("out", "lse", "vjp")
    flags: tuple[str, ...] = ()
    rows: Rows | None = None
    history: int = 0
    seed: int = 1
    overflow: Overflow = "nonsaturate"
    suite: Literal["core", "large"] = "core"

    def group(self) -> str:
        """Folder of the case: the name up to its first slash."""
        return self.name.partition("/")[0]


def as_json(value: Any) -> Any:
    """JSON form of a Recipe, Edit or Rows: fields that differ from their defaults, floats in hexadecimal."""
    if isinstance(value, float):
        return value.hex()
    if isinstance(value, tuple):
        return [as_json(item) for item in value]
    if hasattr(value, "__dataclass_fields__"):
        defaults = {name: f.default for name, f in value.__dataclass_fields__.items()}
        given = {name: getattr(value, name) for name in defaults}
        return {name: as_json(item) for name, item in given.items() if item != defaults[name] or name in ("kind", "op")}
    return value
