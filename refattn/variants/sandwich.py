r"""Sandwich: the inner product of two sinusoidal embeddings as a bias.

    s[h,i,j] = scale q[h,i]·k[g,j] + (1 / r_h) Σ_{t=t₀}^{t₀+d̄/2−1} cos((i − j) w_t)
    w_t = 10000^(−2t/d̄),     r_h = 8h / H

i − j the distance between the positions of query and key, h = 1..H the head. Multiplied out, the scores of a model with
sinusoidal embeddings p_i have the term p_i·p_j = Σ_t cos((i − j) w_t); this is kept, what mixes positions with contents
is dropped. d̄ (`dimension`) is a number of its own, not the width of a head; r_h is the compression ratio, so the last
head has the smallest bias; t₀ (`first`) is 0, or 1 where the sum's index is read literally. Nothing is learned. The
sum is d̄/2 at distance 0 and falls like −(d̄/2)/(4 ln 10) · log |i − j|: a logarithmic tail, where ALiBi's is linear.
The constant (d̄/2)/r_h shows in lse, and in the weights beside a sink; softmax alone forgets it.

Source: Chi, Fan, Rudnicky, Ramadge, arXiv 2212.10356, "Dissecting Transformer Length Extrapolation via the Lens of
Receptive Field Analysis"; the formula, d̄ = 128 and r_h as recalled. The caption quotes, as recalled, the fit
−0.825 log(1 + x) − 0.8 to the curve less d̄/2 at r = 8; least squares over the distances 0 to 8191 give −0.832 and
−0.794 from t = 0, −0.841 and −0.611 from t = 1, hence the default.

Differs from: sinusoidal embeddings added to the hidden states (three more terms, and a bias that is projected); ALiBi
(linear, and the first head the steepest by powers of two); KERPLE's logarithm (learned, no oscillation).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from refattn.errors import SpecError
from refattn.numeric import concatenate, cos, einsum, exp, log, real, reshape, sin, take, total
from refattn.plan import Bias, Table
from refattn.spec import Array, Spec
from refattn.variants._frequencies import frequencies
from refattn.variants._place import Place, reach


@dataclass(frozen=True, kw_only=True)
class Sandwich(Spec):
    """A bias of cosines. `dimension`: d̄, even, twice the number of cosines; `first`: t₀, 0 or 1."""

    dimension: int = 128
    first: Literal[0, 1] = 0

    def __post_init__(self) -> None:
        if type(self.dimension) is not int or self.dimension < 2 or self.dimension % 2:
            raise SpecError(f"dimension is an even number from 2 on, two a cosine; given: {self.dimension!r}")
        if type(self.first) is not int or self.first not in (0, 1):
            raise SpecError(f"first is 0 or 1, the index t of the first cosine; given: {self.first!r}")

    @property
    def indices(self) -> range:
        """The d̄/2 indices t."""
        return range(self.first, self.first + self.dimension // 2)


def signature(spec: Sandwich) -> dict[str, Array]:
    """Nothing is learned."""
    return {}


def resolve(spec: Sandwich, sizes: Mapping[str, int]) -> Sandwich:
    """Every field is definite already."""
    return spec


def term(spec: Sandwich, x: Mapping[str, Any], at: Place) -> tuple[Any, None]:
    """The sum of cosines, once for every difference that occurs, over each head's ratio."""
    q, heads = x["q"], at.heads
    w = frequencies(10000, spec.indices, spec.dimension, q)
    distance = at.i - at.j
    different, index = np.unique(distance, return_inverse=True)
    curve = total(cos(reshape(real(different, q), (different.size, 1)) * w), -1)
    logits = reshape(take(curve, index.reshape(-1), 0), distance.shape)
    return heads * logits / reshape(real(8 * np.arange(1, heads + 1), q), (1, heads, 1, 1)), None


def embedding(spec: Sandwich, positions: Any, like: Any) -> Any:
    """Sinusoidal embeddings (n, d̄): the cosines, then the sines, of p / 10^(8t/d̄)."""
    p = reshape(real(positions, like), (len(positions), 1))
    angles = p / exp(log(real(10, like)) * real(8 * np.array(spec.indices), like) / spec.dimension)
    return concatenate([cos(angles), sin(angles)], -1)


def lower_term(spec: Sandwich, x: Mapping[str, Any], at: Place) -> tuple[Bias, ...]:
    """A table of inner products of embeddings: of every n-th position from the lowest difference, and of 0 to 1 − n."""
    q, heads = x["q"], at.heads
    low, high = reach(at)
    count = high - low + 1
    n = math.isqrt(count - 1) + 1
    far, near = np.arange(low, high + 1, n), -np.arange(n)
    products = einsum("ac,bc->ab", embedding(spec, far, q), embedding(spec, near, q))
    curve = reshape(products, (1, far.size * n))[:, :count]
    ratios = real(8 * np.arange(1, heads + 1), q) / heads
    return (Table(values=curve / reshape(ratios, (heads, 1)), offset=-low),)
