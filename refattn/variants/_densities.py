"""Densities on the line and what Gaussian basis functions average to under them, in closed form."""

from __future__ import annotations

from typing import Any

from refattn.numeric import erf, exp, log, pi, real, sqrt, total


def normal(t: Any, mean: Any, variance: Any) -> Any:
    """N(t; mean, variance)."""
    away = t - mean
    return exp(-(away * away) / (2 * variance)) / sqrt(2 * pi(variance) * variance)


def softmax_mean(mu: Any, variance: Any, centres: Any, widths: Any) -> Any:
    """∫ N(t; μ, σ²) N(t; μ_j, σ_j²) dt = N(μ; μ_j, σ² + σ_j²), over the whole line."""
    return normal(mu, centres, variance + widths * widths)


def sparsemax_mean(mu: Any, variance: Any, centres: Any, widths: Any) -> Any:
    r"""∫ p(t) N(t; μ_j, σ_j²) dt for the truncated parabola p(t) = [a² − (t − μ)²]₊ / 2σ², a³ = 3σ²/2.

    With d = μ_j − μ, u = (a − d)/σ_j, l = −(a + d)/σ_j, φ and Φ of the standard normal density:

        ((a² − d² − σ_j²)(Φ(u) − Φ(l)) + σ_j ((a − d) φ(l) + (a + d) φ(u))) / 2σ²

    Where the parabola is much narrower than the basis function, (σ_j / a)³ is lost to cancellation.
    """
    a, d = half_width(variance), centres - mu
    above, below = (a - d) / widths, -(a + d) / widths
    mass = (a * a - d * d - widths * widths) * _between(below, above)
    edges = widths * ((a - d) * _phi(below) + (a + d) * _phi(above))
    return (mass + edges) / (2 * variance)


def half_width(variance: Any) -> Any:
    """Half of the support of the truncated parabola, the cube root of 3σ²/2."""
    return exp(log(3 * variance / 2) / 3)


def histogram(mu: Any, variance: Any, edges: Any) -> Any:
    """Mass of N(μ, σ²) in each of the bins between the edges, a new last axis."""
    at = (edges - mu) / sqrt(variance)
    return _between(at[..., :-1], at[..., 1:])


def divergence(mu: Any, variance: Any, deviation: float, mean: float | None) -> Any:
    """KL of N(μ, σ²) from N(m, s²): (σ²/s² − ln(σ²/s²) − 1 + (μ − m)²/s²) / 2, without its last term for m None."""
    s = real(deviation, variance)
    ratio = variance / (s * s)
    found = ratio - log(ratio) - 1
    if mean is not None:
        away = (mu - real(mean, mu)) / s
        found = found + away * away
    return found / 2


def softmax(a: Any, shift: Any) -> Any:
    """Of the last axis, with exponents lowered by the shift."""
    p = exp(a - shift)
    return p / total(p, -1, keepdims=True)


def _phi(t: Any) -> Any:
    return exp(-(t * t) / 2) / sqrt(2 * pi(t))


def _between(low: Any, high: Any) -> Any:
    """Φ(high) − Φ(low)."""
    root = sqrt(real(2, low))
    return (erf(high / root) - erf(low / root)) / 2
