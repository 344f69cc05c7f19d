"""C3: how far ALiBi looks, and Sandwich."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

import refattn as ra
from claims.claim import Result, Row, verdict
from refattn.receptive_field import ReceptiveField, receptive_field

TITLE = "ALiBi and Sandwich: effective windows"
SLOPES = tuple(2.0**-n for n in range(1, 9))


def field(spec: Any, length: int) -> ReceptiveField:
    """The field of one head over tokens that do not differ, so that the bias alone decides."""
    alike = {"q": np.zeros((1, 1, 1)), "k": np.zeros((1, 1, 1)), "v": np.ones((1, 1, 1))}
    return receptive_field(spec, np.ones((length, 1)), alike)


def measure(small: bool = False) -> Result:
    """99 per cent windows, exactly."""
    length, slopes = (256, SLOPES[:3]) if small else (4096, SLOPES)
    found = {m: field(ra.ALiBi(slopes=(m,)), length) for m in slopes}
    rows = [
        Row(
            f"ALiBi, slope {m:g}",
            f"{math.ceil(math.log(100) / m)}, the closed form ln 100 / m",
            f"{f.tokens} tokens",
            "yes",
        )
        for m, f in found.items()
    ]
    rows = [
        row._replace(reproduced=verdict(f.tokens == math.ceil(math.log(100) / m), "another count"))
        for row, (m, f) in zip(rows, found.items(), strict=True)
    ]
    far = {name: field(spec, length) for name, spec in (("Sandwich", ra.Sandwich()), ("none", ra.SDPA(causal=True)))}
    share = far["Sandwich"].tokens / length
    rows.append(
        Row(
            f"Sandwich's last head, {length} tokens",
            "beyond any window of ALiBi's",
            f"{far['Sandwich'].tokens} tokens, {share:.0%}; without a bias {far['none'].tokens}",
            verdict(max(f.tokens for f in found.values()) < far["Sandwich"].tokens <= far["none"].tokens, "not so"),
        )
    )

    def draw(figure: Any) -> None:
        axes, steps = figure.add_subplot(), np.arange(1, length + 1)
        for m, f in found.items():
            axes.semilogx(steps, f.cumulated, "-", lw=1, color=str(0.75 * (1 + math.log2(m) / 9)))
        axes.semilogx(steps, far["Sandwich"].cumulated, "--", color="tab:red", label="Sandwich, r = 8")
        axes.semilogx(steps, far["none"].cumulated, ":", color="tab:blue", label="no bias")
        axes.plot([], [], "-", color="0.4", label="ALiBi, slopes 1/2 (left) to 1/256")
        axes.axhline(0.99, lw=0.5, color="k")
        axes.set(xlabel="most recent tokens", ylabel="share of the sensitivity")
        figure.legend(loc="outside upper center", ncols=3, fontsize="small")

    how = (
        "`refattn.receptive_field` of tokens that do not differ: the gradient of the last output, normalised, "
        "from the last token back. ALiBi's figure is that of an endless context."
    )
    return Result(rows, how, draw)
