"""C4: the logarithm that Sandwich's bias follows."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import refattn as ra
from claims.claim import Result, Row, verdict

TITLE = "Sandwich: a logarithmic tail"


def curve(length: int, first: int = 0) -> np.ndarray:
    """The bias at distances 0, 1, ..., less its value at 0, r = 8: the lse of one key that scores nothing else."""
    q, one = np.zeros((1, 1, length, 1)), np.zeros((1, 1, 1, 1))
    spec = ra.SDPA(bias=ra.Sandwich(first=first))
    where = {"q_positions": np.arange(length)[None], "k_positions": np.zeros((1, 1), np.int64)}
    lse = ra.evaluate(spec, {"q": q, "k": one, "v": one, **where}, want=("lse",)).lse
    return np.asarray(lse[0, 0]) - 64 / 8


def fit(bias: np.ndarray) -> tuple[float, float]:
    """Slope and constant of least squares on log(1 + distance)."""
    slope, constant = np.polyfit(np.log1p(np.arange(bias.size)), bias, 1)
    return float(slope), float(constant)


def measure(small: bool = False) -> Result:
    """The fit, the asymptotic slope, and what the sum's first index changes."""
    bias = curve(8192)
    slope, constant = fit(bias)
    other = fit(curve(8192, first=1))
    close = abs(slope + 0.825) < 0.02 and abs(constant + 0.8) < 0.02
    expected = -(64 / (4 * math.log(10))) / 8
    rows = [
        Row("Fit over distances 0 to 8191", "-0.825 log(1 + x) - 0.8", f"{slope:.3f} log(1 + x) - {-constant:.3f}",
            verdict(close, "more than 0.02 apart")),
        Row("The sum from t = 0, not 1", "not in the paper", f"from t = 1: {other[0]:.3f} log(1 + x) - {-other[1]:.3f}",
            verdict(abs(other[1] + 0.8) > abs(constant + 0.8), "the other is nearer")),
        Row("Slope of the exact asymptote", "not in the paper", f"{expected:.3f}",
            verdict(abs(slope - expected) < 0.05, "not near")),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        axes, x = figure.add_subplot(), np.arange(bias.size)
        axes.semilogx(1 + x, bias, lw=0.8, label="Sandwich, r = 8")
        axes.semilogx(1 + x, slope * np.log1p(x) + constant, "--", label="least squares")
        axes.semilogx(1 + x, -0.825 * np.log1p(x) - 0.8, ":", label="the paper's")
        axes.set(xlabel="1 + distance", ylabel="bias")
        axes.legend()

    how = (
        "The bias is read off as the log-sum-exp of a single key. The paper's figure is from its caption, as recalled."
    )
    return Result(rows, how, draw)
