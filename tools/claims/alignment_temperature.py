"""C6: the temperatures that keep attention as sharp at longer lengths."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import numpy as np

from claims.claim import Result, Row, variant, verdict

TITLE = "Attention alignment: temperature against length"
TRAINED, SPREAD = 512, 3.0


def temperatures(lengths: list[int], rows: int) -> dict[str, list[float]]:
    """Temperatures by both criteria for independent Gaussian logits, one draw of the longest, shortened."""
    variant("attention_alignment")
    from refattn.alignment import align_temperature, statistics

    logits = SPREAD * np.random.default_rng(0).standard_normal((1, 1, rows, max(lengths)))
    target = statistics(logits[..., :TRAINED])
    return {
        criterion: [
            float(align_temperature(logits[..., :n], target=getattr(target, criterion), criterion=criterion))
            for n in lengths
        ]
        for criterion in ("max_prob", "entropy")
    }


def measure(small: bool = False) -> Result:
    """Temperatures below 1 that fall with the length."""
    lengths, rows = ([512, 1024, 2048], 16) if small else ([512, 1024, 2048, 4096, 8192, 15360], 128)
    found = temperatures(lengths, rows)
    table = []
    for criterion, taus in found.items():
        falls = all(a > b for a, b in pairwise(taus)) and abs(taus[0] - 1) < 1e-9
        listed = ", ".join(f"{tau:.3f}" for tau in taus)
        table.append(
            Row(f"tau by {criterion} at {', '.join(map(str, lengths))}", "below 1, falling with the length", listed,
                verdict(falls, "not falling"))
        )  # fmt: skip
    by_length = [math.log(TRAINED) / math.log(n) for n in lengths]
    gap = max(abs(a - b) for a, b in zip(found["entropy"], by_length, strict=True))
    table.append(
        Row("Scaling by log n instead", "not in the paper",
            f"{', '.join(f'{t:.3f}' for t in by_length)}: within {gap:.2f} of entropy's",
            verdict(by_length[-1] < 1, "not below 1"))
    )  # fmt: skip

    def draw(figure: Any) -> None:
        axes = figure.add_subplot()
        for criterion, taus in found.items():
            axes.semilogx(lengths, taus, "o-", label=criterion)
        axes.semilogx(lengths, by_length, ":", label="ln 512 / ln L")
        axes.set(xlabel="length L", ylabel="temperature")
        axes.legend()

    how = (
        f"{rows} rows of independent N(0, {SPREAD:g}²) logits, trained length {TRAINED}, bisection to 1e-10. The "
        "paper's temperatures are of a trained T5, whose logits a CPU cannot bring back; what is checked is the "
        "law."
    )
    return Result(table, how, draw)
