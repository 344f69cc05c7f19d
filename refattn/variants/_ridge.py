"""The ridge regression of the ∞-former: constants of its Spec, by which tokens become coefficients of a basis."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

from refattn.numeric import concatenate, constant, einsum, real, reshape, solve, transpose
from refattn.variants._densities import normal


def centres(spec: Any, like: Any) -> Any:
    """(N,) centres of the basis functions: N / len(sigmas) from 0 to 1, each with every width."""
    count = spec.basis // len(spec.sigmas)
    places = np.repeat(np.arange(count), len(spec.sigmas))
    return constant(lambda zero: real(places, zero) / max(count - 1, 1), like)


def widths(spec: Any, like: Any) -> Any:
    """(N,) widths of the basis functions, in the order of `centres`."""
    return real(np.tile(spec.sigmas, spec.basis // len(spec.sigmas)), like)


def basis_at(spec: Any, t: Any) -> Any:
    """(n, N): ψ_j(t_i) = N(t_i; μ_j, σ_j²)."""
    sigma = widths(spec, t)
    return normal(reshape(t, (*t.shape, 1)), centres(spec, t), sigma * sigma)


def samples(spec: Any, like: Any) -> Any:
    """(M, N) the basis at m/M, m = 1..M, where a memory is read that is to be contracted."""
    return constant(lambda zero: basis_at(spec, real(np.arange(1, spec.samples + 1), zero) / spec.samples), like)


def bin_starts(spec: Any, like: Any) -> Any:
    """(bins, N) the basis at the left end of each bin, where a sticky memory is read."""
    return constant(lambda zero: basis_at(spec, real(np.arange(spec.bins), zero) / spec.bins), like)


def edges(spec: Any, like: Any) -> Any:
    """(bins + 1,) ends of the bins, the first and the last a millionth outside [0, 1] as in the authors' code."""
    outside = np.array([-1] + [0] * (spec.bins - 1) + [1])
    return constant(
        lambda zero: real(np.arange(spec.bins + 1), zero) / spec.bins + real(outside, zero) / 1_000_000, like
    )


def fit(spec: Any, contracted: bool, like: Any) -> Any:
    """G (P, N): the coefficients of a signal x (P, E) are Gᵀ x, those that Σ_p ‖x_p − ψ(t_p)ᵀB‖² + λ‖B‖² is least for.

    The P points are a segment's own, or the M samples of the memory that was and then the segment's. Where positions
    are "centre_padded" the sum also runs over points outside [0, 1], at which the signal is 0.
    """
    return constant(lambda zero: _fit(spec, contracted, zero), like)


def _fit(spec: Any, contracted: bool, like: Any) -> Any:
    own, pad = basis_at(spec, _own_points(spec, contracted, like)), _padding(spec, contracted)
    f = own
    if pad:
        above, below = np.array([t.numerator for t in pad]), np.array([t.denominator for t in pad])
        f = concatenate([own, basis_at(spec, real(above, like) / real(below, like))], 0)
    penalty = real(spec.ridge, like) * real(np.eye(spec.basis, dtype=np.int64), like)
    return transpose(solve(einsum("pn,pm->nm", f, f) + penalty, transpose(own, (1, 0)), spec.ridge), (1, 0))


def _own_points(spec: Any, contracted: bool, like: Any) -> Any:
    """Where the signal's rows stand."""
    new = np.arange(1, spec.segment + 1)
    if not contracted:
        centred = spec.positions == "centre_padded"
        return real(2 * new - 1 if centred else 2 * new, like) / (2 * spec.segment)
    tau = real(spec.contraction, like)
    old = tau * real(np.arange(1, spec.samples + 1), like) / spec.samples
    return concatenate([old, tau + (1 - tau) * real(new, like) / spec.segment], 0)


def _padding(spec: Any, contracted: bool) -> Sequence[Fraction]:
    """Points outside [0, 1], of a grid over [−½, 1½] with twice as many points as the signal has."""
    if spec.positions != "centre_padded":
        return []
    count = spec.segment + spec.samples if contracted else spec.segment
    if not contracted:
        grid = [Fraction(2 * i + 1, 2 * count) for i in range(-(count // 2), count + count // 2)]
    else:
        # The authors' distance from the ends; 1 / 2 (M + L) would make the spacing even.
        shift = Fraction(1, 2 * spec.segment + spec.samples)
        step = (2 - 2 * shift) / (2 * count - 1)
        grid = [shift - Fraction(1, 2) + k * step for k in range(2 * count)]
    return [t for t in grid if t < 0 or t > 1]
