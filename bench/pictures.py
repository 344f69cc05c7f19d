"""The page's two pictures: ratio to the fastest peer, and share of the machine's peak, a bar a cell."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

from bench.cells import Cell, goal
from bench.report import ratio, share


def draw(cells: Sequence[Cell], results: Mapping[str, Mapping[str, Any]]) -> dict[str, bytes]:
    """PNG by name; the same bytes for the same numbers."""
    done = [(cell, results[cell.name]) for cell in cells if cell.name in results]
    ratios = [(cell, found[0]) for cell, kept in done if (found := ratio(kept)) is not None]
    shares = [(cell, part) for cell, kept in done if (part := share(cell, kept)) is not None]
    return {
        "ratio": _bars(ratios, "fastest peer's time over refattn's (| goal)", {c: goal(c) for c, _ in ratios}, 1.0),
        "peak": _bars(shares, "share of the machine's peak: multiply-adds, or reading for decode", {}, None),
    }


def _bars(
    bars: Sequence[tuple[Cell, float]], label: str, goals: Mapping[Cell, float | None], line: float | None
) -> bytes:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 1.0 + 0.2 * max(len(bars), 1)), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(bars)), [value for _, value in bars], height=0.7)
    axes.set_yticks(range(len(bars)), [cell.name for cell, _ in bars], fontsize=7)
    axes.invert_yaxis()
    wanted = [(n, g) for n, (cell, _) in enumerate(bars) if (g := goals.get(cell)) is not None]
    if wanted:
        axes.plot([g for _, g in wanted], [n for n, _ in wanted], "k|", markersize=8)
    if line is not None:
        axes.axvline(line, color="k", lw=0.8)
    axes.set_xlabel(label)
    axes.grid(True, axis="x", lw=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()
