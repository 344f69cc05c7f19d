r"""NoPE: causal attention with no position information at all.

    s[h,i,j] = scale q[h,i]·k[g,j]          over the keys at or before the query, and nothing added

A term without logits: alone it is SDPA(causal=True), and beside other terms it changes nothing. What it knows of order
is the causal mask: out[i] stays the same when the tokens before i are permuted. But the mask tells how many keys a
query sees: the mean of m values, independent and of equal weight, has 1/m of their variance, so that at random
initialisation the variance of an output tells its position.

Source: Haviv et al., arXiv 2203.16634; the variance: Chi, Fan, Chen, Rudnicky, Ramadge, arXiv 2305.13571. Both
are recalled, as is Var ≈ d² σ⁴ / m after W_o, d σ² / m before it, for weights of variance σ² and normalised inputs of
width d.

Differs from: attention without a causal mask, which no permutation of the keys changes; sinusoidal or learned positions
added to the inputs, which this call does not see.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from refattn.plan import Bias
from refattn.spec import Array, Spec
from refattn.variants._place import Place


@dataclass(frozen=True, kw_only=True)
class NoPE(Spec):
    """No position information: no option."""


def signature(spec: NoPE) -> dict[str, Array]:
    """No input."""
    return {}


def resolve(spec: NoPE, sizes: Mapping[str, int]) -> NoPE:
    """Nothing to resolve."""
    return spec


def term(spec: NoPE, x: Mapping[str, Any], at: Place) -> tuple[None, None]:
    """No logits, and no pair forbidden."""
    return None, None


def lower_term(spec: NoPE, x: Mapping[str, Any], at: Place) -> tuple[Bias, ...]:
    """No bias."""
    return ()
