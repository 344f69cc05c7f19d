r"""Position interpolation for ALiBi: slopes that shrink where a sequence is longer than those trained on.

    s[h,i,j] = scale q[h,i]·k[g,j] − m'[h] |i − j|,     m'[h] = m[h] L_train / L  where L > L_train, else m[h]

m (Hq,) ALiBi's slopes, by its rules; i − j the distance between the positions of query and key; L_train the Spec's
train_length. It is ALiBi at the interpolated positions i L_train / L, so that no penalty exceeds m L_train, the largest
that training has shown. m' is exact: it is not rounded to float32 as m is. Nothing is learned.

L in "static" is the Spec's `length`, chosen once; in "dynamic" the count of keys of each sequence (kv_lengths, or Lk),
whether positions are given or not. Dynamic slopes change with every decoded token: biases cached in the absolute form
+m'j must be recomputed, and decoding token by token differs from one pass over the whole sequence.

Source: Al-Khateeb, Dey, Soboleva, Hestness, arXiv 2310.13017; the formula and the dynamic form are recalled, only the
abstract was read. Cerebras' BTLM has it as `alibi_scaling` (recalled).

Differs from: refattn's alibi, equal up to L_train; position interpolation for rotary embeddings (arXiv 2306.15595),
which shrinks angles; slopes fitted anew to the longer sequence.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from refattn.errors import SpecError
from refattn.numeric import real, reshape, where
from refattn.plan import Bias, Dense, Slope
from refattn.spec import Array, Spec
from refattn.variants import alibi
from refattn.variants._place import Place, lengths


@dataclass(frozen=True, kw_only=True)
class ALiBiInterpolation(Spec):
    """ALiBi with slopes times train_length / L beyond train_length, whose default is no more than a common length.

    mode: "dynamic", L the count of keys; or "static", L = `length`. slopes: ALiBi's rules, or numbers; not "learned".
    """

    train_length: int = 2048
    mode: Literal["static", "dynamic"] = "dynamic"
    length: int | None = None
    slopes: alibi.Rule | tuple[float, ...] = "interleaved"

    def __post_init__(self) -> None:
        if not isinstance(self.mode, str) or self.mode not in ("static", "dynamic"):
            raise SpecError(f"mode is 'static' or 'dynamic'; given: {self.mode!r}")
        for name in ("train_length", "length") if self.mode == "static" else ("train_length",):
            given = getattr(self, name)
            if type(given) is not int or not 0 < given <= 2**52:
                raise SpecError(f"{name} is a positive integer where mode={self.mode!r}; given: {given!r}")
        if self.mode == "dynamic" and self.length is not None:
            raise SpecError(f"length needs mode='static', for dynamic slopes count the keys; given: {self.length!r}")
        if isinstance(self.slopes, str) and self.slopes == "learned":
            raise SpecError("slopes are 'interleaved', 'geometric' or a tuple of numbers: nothing is learned here")
        object.__setattr__(self, "slopes", alibi.ALiBi(slopes=self.slopes).slopes)


def signature(spec: ALiBiInterpolation) -> dict[str, Array]:
    """No input."""
    return {}


def resolve(spec: ALiBiInterpolation, sizes: Mapping[str, int]) -> ALiBiInterpolation:
    """The trained slopes as ALiBi resolves them."""
    return replace(spec, slopes=alibi.resolve(alibi.ALiBi(slopes=spec.slopes), sizes).slopes)


def term(spec: ALiBiInterpolation, x: Mapping[str, Any], at: Place) -> tuple[Any, None]:
    """Logits −m (L_train / L) |i − j|."""
    m = reshape(real(np.asarray(spec.slopes), x["q"]), (1, at.heads, 1, 1))
    trained, length = spec.train_length, _length(spec, x)[:, None, None, None]
    longest = np.maximum(length, trained)
    share = where(length > trained, real(trained, m) / real(longest, m), 1)
    return -(m * share * real(np.abs(at.j - at.i), m)), None


def lower_term(spec: ALiBiInterpolation, x: Mapping[str, Any], at: Place) -> tuple[Bias, ...]:
    """A slope where all sequences have the same, else the logits themselves: no plan has slopes for each sequence."""
    longest = np.maximum(_length(spec, x), spec.train_length).tolist()
    shrunk = [[float(Fraction(m) * spec.train_length / n) for m in spec.slopes] for n in longest]
    if all(row == shrunk[0] for row in shrunk[1:]):
        return tuple(Slope(slopes=np.asarray(row)) for row in shrunk[:1])
    return (Dense(values=-np.asarray(shrunk)[:, :, None, None] * np.abs(at.j - at.i)),)




def _length(spec: ALiBiInterpolation, x: Mapping[str, Any]) -> NDArray[np.int64]:
    """L of each sequence, (1 or B,)."""
    if spec.mode == "static":
        return np.asarray([spec.length], np.int64)
    ragged = lengths(x)
    return np.asarray([x["k"].shape[2]]) if ragged is None else ragged[1]
