r"""ALiBi: attention with linear biases.

    s[h,i,j] = scale q[h,i]·k[g,j] − m[h] |i − j|          no other position information; values untouched

m (Hq,) slopes; i − j the distance between the positions of query and key. For n heads the paper's sentence gives
m_h = 2^(−8h/n), h = 1..n ("geometric"). The authors' code agrees where n is a power of two; elsewhere it takes the
slopes of c = 2^⌊log2 n⌋ heads and then every other one of 2c heads ("interleaved", the default: trained models use it).

Directions: "symmetric" −m |i − j|; "half", the first half of the heads sees keys at or before the query, the second
half keys at or after it, each half with the slopes of Hq/2 heads; "two_sided" −m (i − j) for keys before the query and
−m' (j − i) for keys after it.

Source: Press, Smith, Lewis, arXiv 2108.12409, section 3 and footnote 10 (the bias is not scaled); the authors' fairseq
code for n not a power of two; directions: issue 5 of the authors' repository.

Differs from: Falcon (the bias inside the scale, so slopes are smaller by √D); the absolute form +m j of the authors'
code, BLOOM and flash-attention (equal only without sink, softcap after it, or lse); meliad ("geometric").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refattn.dtypes import nearest, root_of_two
from refattn.errors import ShapeError, SpecError
from refattn.numeric import real, reshape, where
from refattn.plan import Bias, Slope, Table
from refattn.spec import Array, Spec, dyadic
from refattn.variants._place import Place, reach

Rule = Literal["interleaved", "geometric", "learned"]


@dataclass(frozen=True, kw_only=True)
class ALiBi(Spec):
    """Linear biases. `slopes`: a rule, "learned" (the inputs slopes and, two-sided, slopes_right), or numbers.

    `slopes_right`: numbers for the keys after the query where direction is "two_sided"; None takes those of the left.
    """

    slopes: Rule | tuple[float, ...] = "interleaved"
    slopes_right: tuple[float, ...] | None = None
    direction: Literal["symmetric", "half", "two_sided"] = "symmetric"

    def __post_init__(self) -> None:
        if not isinstance(self.direction, str) or self.direction not in ("symmetric", "half", "two_sided"):
            raise SpecError(f"direction is 'symmetric', 'half' or 'two_sided'; given: {self.direction!r}")
        if not isinstance(self.slopes, str) or self.slopes not in ("interleaved", "geometric", "learned"):
            object.__setattr__(self, "slopes", _numbers("slopes", self.slopes))
        if self.slopes_right is not None:
            if self.direction != "two_sided" or self.slopes == "learned":
                raise SpecError("slopes_right needs direction='two_sided' and slopes that are not learned")
            object.__setattr__(self, "slopes_right", _numbers("slopes_right", self.slopes_right))


def _numbers(name: str, slopes: Any) -> tuple[float, ...]:
    if not isinstance(slopes, tuple):
        raise SpecError(f"{name}: 'interleaved', 'geometric', 'learned' or a tuple of numbers; given: {slopes!r}")
    return tuple(dyadic(f"a number of {name}", m) for m in slopes)


def signature(spec: ALiBi) -> dict[str, Array]:
    """Learned slopes are inputs."""
    names = ("slopes", "slopes_right") if spec.direction == "two_sided" else ("slopes",)
    return {name: Array("Hq", role="learned") for name in names} if spec.slopes == "learned" else {}


def rule(name: str, heads: int) -> list[Fraction]:
    """Exponents e of the slopes 2^−e, exact: 12 heads interleaved are 1, 2, ..., 8, then 1/2, 3/2, 5/2, 7/2."""
    power = 1 << heads.bit_length() - 1 if heads else 1
    if name == "geometric" or heads == power:
        return [Fraction(8 * h, heads) for h in range(1, heads + 1)]
    return rule(name, power) + rule(name, 2 * power)[::2][: heads - power]


def resolve(spec: ALiBi, sizes: Mapping[str, int]) -> ALiBi:
    """Each slope as a number that float32 holds: 2^−e rounded correctly, once, without a vendor's pow."""
    heads = sizes["Hq"]
    if spec.direction == "half" and heads % 2:
        raise ShapeError(f"direction='half' needs an even number of heads; given: Hq={heads}")
    if spec.slopes == "learned":
        return spec
    if isinstance(spec.slopes, tuple):
        slopes = spec.slopes
    else:
        count = heads // 2 if spec.direction == "half" else heads
        one = _rounded(spec.slopes, count)
        slopes = one * 2 if spec.direction == "half" else one
    for name, given in (("slopes", slopes), ("slopes_right", spec.slopes_right)):
        if given is not None and len(given) != heads:
            raise ShapeError(f"{name} holds {len(given)} numbers for Hq={heads} heads: give one a head")
    return replace(spec, slopes=slopes)


@cache
def _rounded(name: Literal["interleaved", "geometric"], count: int) -> tuple[float, ...]:
    """A rule's slopes: with a cache that grows every step asks for them again."""
    return tuple(nearest(root_of_two(-e), "float32") for e in rule(name, count))


def term(spec: ALiBi, x: Mapping[str, Any], at: Place) -> tuple[Any, NDArray[np.bool_] | None]:
    """Logits −(left·past + right·future), and who may attend where heads look one way only."""
    left, right = _slopes(spec, x)
    past, future = np.maximum(at.i - at.j, 0), np.maximum(at.j - at.i, 0)
    logits = -(_per_head(left) * real(past, left) + _per_head(right) * real(future, right))
    if spec.direction != "half":
        return logits, None
    looks_back = (np.arange(at.heads) < at.heads // 2)[:, None, None]
    return logits, np.where(looks_back, at.j <= at.i, at.j >= at.i)


def lower_term(spec: ALiBi, x: Mapping[str, Any], at: Place) -> tuple[Bias, ...]:
    """A slope where the bias is symmetric, else a table over every difference that occurs."""
    left, right = _slopes(spec, x)
    if spec.direction == "symmetric":
        return (Slope(slopes=left),)
    low, high = reach(at)
    ahead = np.arange(low, high + 1)
    columns = (at.heads, 1)
    values = where(ahead > 0, -reshape(right, columns), reshape(left, columns)) * real(ahead, left)
    if spec.direction == "half":
        backward = np.arange(at.heads)[:, None] < at.heads // 2
        values = where(np.where(backward, ahead <= 0, ahead >= 0), values, real(-np.inf, values))
    return (Table(values=values, offset=-low),)


def _slopes(spec: ALiBi, x: Mapping[str, Any]) -> tuple[Any, Any]:
    """Slopes (Hq,) for keys before and after the query."""
    if spec.slopes == "learned":
        return x["slopes"], x["slopes_right" if spec.direction == "two_sided" else "slopes"]
    left = real(np.asarray(spec.slopes), x["q"])
    return left, left if spec.slopes_right is None else real(np.asarray(spec.slopes_right), x["q"])


def _per_head(slopes: Any) -> Any:
    return reshape(slopes, (1, slopes.shape[0], 1, 1))
