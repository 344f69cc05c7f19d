r"""Shaw's relative positions: a learned vector for each clipped difference of positions, added to keys and to values.

    s[h,i,j] = scale q[h,i]·(k[g,j] + shaw_k[c(j − i)]),     c(r) = min(max(r, −L), L) + L,     g = h // (Hq / Hkv)
    out[h,i] = Σ_j p[h,i,j] (v[g,j] + shaw_v[c(j − i)])

j − i the difference of positions, key minus query. shaw_k (2L+1,D), and shaw_v (2L+1,Dv) where values=True: row L is
that of a query's own position, row 0 that of all keys L or more before it, row 2L that of all L or more after. With
heads="per_head" the tables are (Hq,2L+1,·), one for each query head. L = 0 adds one vector to every key, which moves
lse alone, and one to every value. The scale covers both parts of the score; a rotation turns q before it meets the
table, and not the table. Causal attention reads rows 0..L only.

Source: Shaw, Uszkoreit, Vaswani, arXiv 1803.02155, section 3.1, equations 3 and 4, clipping: section 3.2; there the
tables are shared by all heads of a layer. Equation numbers are recalled, not looked up.

Differs from: transformers' "relative_key" of Wav2Vec2-BERT and SeamlessM4T v2, which clips the two sides at distances
of their own (64 before, 8 after by default) and has no values; the "relative_key" that its BERT had, one row for every
difference and none clipped, and "relative_key_query", where the key meets the table too; Music Transformer's skewed
table, the same logits without clipping; Transformer-XL, whose vectors are projected sinusoids with biases of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refattn.errors import SpecError
from refattn.numeric import broadcast, concatenate, einsum, real, reshape, take
from refattn.plan import Relative, ValueTable
from refattn.spec import Array, Spec
from refattn.variants._place import Place, reach


@dataclass(frozen=True, kw_only=True)
class Shaw(Spec):
    """Vectors by relative position.

    clip: the difference L from which on all are alike. values: whether values have a table too. heads: "shared", one
    table for all heads, or "per_head", one for each query head.
    """

    clip: int = 16
    values: bool = True
    heads: Literal["shared", "per_head"] = "shared"

    def __post_init__(self) -> None:
        if type(self.clip) is not int or self.clip < 0:
            raise SpecError(f"clip is the largest difference told apart, an integer from 0 on; given: {self.clip!r}")
        if type(self.values) is not bool:
            raise SpecError(f"values is True or False; given: {self.values!r}")
        if not isinstance(self.heads, str) or self.heads not in ("shared", "per_head"):
            raise SpecError(f"heads is 'shared' or 'per_head'; given: {self.heads!r}")


def signature(spec: Shaw) -> dict[str, Array]:
    """The learned tables."""
    lead = "" if spec.heads == "shared" else "Hq "
    tables = {"shaw_k": Array(f"{lead}{2 * spec.clip + 1} D", role="learned")}
    return tables | ({"shaw_v": Array(f"{lead}{2 * spec.clip + 1} Dv", role="learned")} if spec.values else {})


def resolve(spec: Shaw, sizes: Mapping[str, int]) -> Shaw:
    """Nothing has a default to be resolved."""
    return spec


def content(spec: Shaw, x: Mapping[str, Any], at: Place) -> tuple[Any, Any]:
    """q·shaw_k of every pair, to be scaled with q·k; and which row of shaw_v each pair adds to its value."""
    which = np.clip((at.j - at.i)[:, 0], -spec.clip, spec.clip) + spec.clip
    batch, width, table = x["q"].shape[0], x["q"].shape[3], x["shaw_k"]
    lead, letters = ((), "bhid,bijd->bhij") if spec.heads == "shared" else ((at.heads,), "bhid,hbijd->bhij")
    vectors = reshape(take(table, which.reshape(-1), len(lead)), (*lead, *which.shape, width))
    vectors = broadcast(vectors, (*lead, batch, *which.shape[1:], width))
    return einsum(letters, x["q"], vectors), (which, x["shaw_v"]) if spec.values else None


def lower_content(
    spec: Shaw, x: Mapping[str, Any], at: Place, scale: Any
) -> tuple[tuple[Relative, ...], ValueTable | None]:
    """The tables over every difference that occurs, their end rows repeated; the scale goes into that of the keys."""
    low, high = reach(at)
    first, last = max(low, -spec.clip), min(high, spec.clip)

    def stretched(table: Any) -> Any:
        table = table if table.ndim == 3 else reshape(table, (1, *table.shape))
        heads, count, width = table.shape
        before = broadcast(table[:, :1], (heads, first - low, width))
        after = broadcast(table[:, count - 1 :], (heads, high - last, width))
        return concatenate([before, table[:, first + spec.clip : last + spec.clip + 1], after], axis=1)

    keys = stretched(x["shaw_k"])
    relative = Relative(rows=x["q"], values=keys * real(scale, keys), offset=-low)
    return (relative,), ValueTable(values=stretched(x["shaw_v"]), offset=-low) if spec.values else None
