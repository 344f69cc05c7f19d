r"""T5's relative bias: a learned number for each head and each bucket of distances.

    s[h,i,j] = scale q[h,i]·k[g,j] + t5_table[bucket(r), h],     r = position(j) − position(i)

t5_table (buckets, Hq), in the order of transformers' embedding: a row for each bucket, a column for each head. With
N = buckets, M = max_distance and e = ⌊N/2⌋, keys at or before the query, n = max(−r, 0), have the buckets

    n                                       where n < e: one bucket for each distance
    e + ⌊(N − e) ln(n/e) / ln(M/e)⌋         from there on, N − 1 at most: equal steps of the logarithm, to n = M

and every key after the query has bucket 0. Bidirectional: each side has N/2 buckets by the same rule of n = |r|, and
those of keys after the query (r > 0; r = 0 counts as before) follow those of keys before it; row N/2 is never read.
A distance reaches a logarithmic bucket by integers: (N − e) ln(n/e) / ln(M/e) ≥ b where n^(N−e) e^b ≥ M^b e^(N−e).

Source: Raffel et al., arXiv 1910.10683, section 2.1; buckets: transformers' T5Attention._relative_position_bucket,
whose defaults are 32 and 128. T5 itself has no scale (it is folded into the initialisation), and the scale is a field
of SDPA: SDPA(scale=1.0, bias=T5()). Its encoder is bidirectional, its decoder not, its cross-attention has no bias; all
layers of a stack share a table.

Differs from: x-transformers (the table multiplied by √D); memorizing-transformers (scaled scores, as is the default of
SDPA); buckets computed in bfloat16 (distances 76 and 112 one bucket too far by default; in float32 none is);
transformers' function, whose default is bidirectional; DeBERTa v2 (recalled: the logarithm rounded up).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.errors import SpecError
from refattn.numeric import reshape, take, transpose
from refattn.plan import Bias, Table
from refattn.spec import Array, Spec
from refattn.variants._place import Place, reach

Integers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class T5(Spec):
    """A bias by bucketed distance. `buckets` in all, the last from `max_distance` on; `bidirectional` halves them."""

    buckets: int = 32
    max_distance: int = 128
    bidirectional: bool = False

    def __post_init__(self) -> None:
        for name in ("buckets", "max_distance"):
            if type(getattr(self, name)) is not int:
                raise SpecError(f"{name} is an integer; given: {getattr(self, name)!r}")
        if type(self.bidirectional) is not bool:
            raise SpecError(f"bidirectional is True or False; given: {self.bidirectional!r}")
        sides = 2 if self.bidirectional else 1
        if self.buckets < 2 * sides or self.buckets % sides:
            least = "an even number from 4 on where bidirectional" if self.bidirectional else "2 or more"
            raise SpecError(f"buckets is {least}; given: {self.buckets}")
        exact = self.buckets // sides // 2
        if self.max_distance <= exact:
            raise SpecError(
                f"max_distance lies beyond the {exact} distances that have a bucket each; given: {self.max_distance}"
            )


def signature(spec: T5) -> dict[str, Array]:
    """The learned table."""
    return {"t5_table": Array(f"{spec.buckets} Hq", role="learned")}


def resolve(spec: T5, sizes: Mapping[str, int]) -> T5:
    """Nothing has a default to be resolved."""
    return spec


def bucket(spec: T5, r: int) -> int:
    """Bucket of a key at position r ahead of the query, by the definition."""
    side, count = (spec.buckets // 2, spec.buckets // 2) if spec.bidirectional else (0, spec.buckets)
    n, exact = abs(r) if spec.bidirectional else max(-r, 0), count // 2
    if n >= exact:
        wide = count - exact
        n = exact + bisect_left(range(1, wide), True, key=lambda b: not _reaches(spec, n, b, exact, wide))
    return n + side if r > 0 and spec.bidirectional else n


def _reaches(spec: T5, n: int, b: int, exact: int, wide: int) -> bool:
    """Whether (N − e) ln(n/e) / ln(M/e) ≥ b."""
    return bool(n**wide * exact**b >= spec.max_distance**b * exact**wide)


def term(spec: T5, x: Mapping[str, Any], at: Place) -> tuple[Any, None]:
    """The table's row for the bucket of every pair."""
    ahead = (at.j - at.i)[:, 0]
    different, index = np.unique(ahead, return_inverse=True)
    chosen = np.array([bucket(spec, int(r)) for r in different], np.intp)[index.reshape(-1)]
    logits = reshape(take(x["t5_table"], chosen, 0), (*ahead.shape, at.heads))
    return transpose(logits, (0, 3, 1, 2)), None


def edges(spec: T5) -> Integers:
    """Least distance of every bucket of one side: those of the logarithmic ones are rounded-up integer roots."""
    count = spec.buckets // 2 if spec.bidirectional else spec.buckets
    exact = count // 2
    wide, far = count - exact, range(exact, spec.max_distance + 1)
    steps = (spec.max_distance**b * exact ** (wide - b) for b in range(wide))
    first = [far[bisect_left(far, power, key=lambda n: n**wide)] for power in steps]
    return np.array([*range(exact), *first], np.int64)


def lower_term(spec: T5, x: Mapping[str, Any], at: Place) -> tuple[Bias, ...]:
    """A table over every difference that occurs, filled by looking distances up between the buckets' edges."""
    low, high = reach(at)
    ahead = np.arange(low, high + 1)
    far = np.abs(ahead) if spec.bidirectional else np.maximum(-ahead, 0)
    rows = np.searchsorted(edges(spec), far, side="right") - 1
    if spec.bidirectional:
        rows = np.where(ahead > 0, rows + spec.buckets // 2, rows)
    return (Table(values=transpose(take(x["t5_table"], rows, 0), (1, 0)), offset=-low),)
