"""C5: the variance that tells a model without positions where it is."""

from __future__ import annotations

from typing import Any

import numpy as np

import refattn as ra
from claims.claim import Result, Row, verdict

TITLE = "NoPE: variance against position"
SIGMA = 0.02


def variances(length: int, width: int, seeds: int) -> np.ndarray:
    """Variance of the projected output at every position, over channels and seeds, for weights N(0, σ²)."""
    found = []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((length, width))
        x = (x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True)
        wq, wk, wv, wo = SIGMA * rng.standard_normal((4, width, width))
        q, k, v = ((x @ w)[None, None] for w in (wq, wk, wv))
        out = ra.evaluate(ra.SDPA(causal=True, bias=ra.NoPE()), {"q": q, "k": k, "v": v}).out
        found.append(np.mean((out[0, 0] @ wo) ** 2, 1))
    return np.mean(found, 0)


def measure(small: bool = False) -> Result:
    """The slope of the logarithms, and the constant d² σ⁴."""
    length, width, seeds = (64, 32, 4) if small else (512, 192, 32)
    found, m = variances(length, width, seeds), np.arange(1, length + 1)
    # Weights that make every octave of positions count alike.
    slope, _ = np.polyfit(np.log(m), np.log(found), 1, w=m**-0.5)
    size = np.mean(found * m) / (width**2 * SIGMA**4)
    rows = [
        Row("Variance at position m falls as 1/m", "slope -1", f"slope {slope:.3f}",
            verdict(abs(slope + 1) < 0.05, "more than 0.05 away")),
        Row("Its size is d² σ⁴ / m", "1", f"{size:.2f} of it", verdict(abs(size - 1) < 0.1, "more than 10 % away")),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        axes.loglog(m, found, ".", markersize=2, label=f"measured, {seeds} seeds, d = {width}")
        axes.loglog(m, width**2 * SIGMA**4 / m, "--", label="d² σ⁴ / m")
        axes.set(xlabel="position m", ylabel="variance")
        axes.legend()

    how = (
        f"Normalised Gaussian tokens, {width} wide, all four projections N(0, {SIGMA}²), one head, causal, no training."
    )
    return Result(rows, how, draw)
