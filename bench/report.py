"""The page: what was kept of the cells, as tables. Every figure is a median, with its error in the same field."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bench import peers
from bench.cells import Cell, cache_bytes, flops, goal
from bench.timing import geometric_mean, spread

Kept = Mapping[str, Any]
TITLES = {name: peers.load(name).TITLE for name in peers.ALL}
HEAD = """\
# Benchmark

Written by `{command}`. refattn's cpu engine through its public functions, beside its peers on the same numbers, with
the same number of threads, in one run. Each contender has its own process (JAX's is tied to as many cores as it may use
threads, for it has no other setting), and they take turns: interleaved is one sample of each, again and again; block by
block is all samples of one, then of the next. A sample is one call, or as many as last 10 ms. Compiling, masks and
biases as arrays, and other layouts are made beforehand, untimed. Batch 1, N(0,1) inputs.

A field is the median in milliseconds, then the greatest error against float64 NumPy, in units u·max|exact|, where u is
2⁻²⁴, 2⁻⁸ and 2⁻¹¹ for f32, bf16 and f16. **Ratio** is the fastest peer's median over refattn's: above 1, refattn is the
faster. **Peak** is refattn's share of the most multiply-adds that the same machine did on registers alone in its turns
between the others; masked pairs count as no work. For decode it is the share of the speed at which k and v can be read.
"""


def ratio(kept: Kept, mode: str = "interleaved") -> tuple[float, str] | None:
    """Fastest peer's median over refattn's, and who it is; None where either is missing."""
    medians = {n: spread(s).median for n, s in kept[mode].items() if s}
    rivals = [n for n in medians if n in peers.PEERS]
    if peers.OWN not in medians or not rivals:
        return None
    best = min(rivals, key=lambda n: medians[n])
    return medians[best] / medians[peers.OWN], best


def share(cell: Cell, kept: Kept) -> float | None:
    """refattn's work or bytes a second over the machine's own."""
    samples = kept["interleaved"]
    if not samples.get(peers.OWN) or not samples.get(peers.PEAK):
        return None
    speed = (cache_bytes(cell) if cell.kind == "decode" else flops(cell)) / spread(samples[peers.OWN]).median
    return float(speed / peak(kept))


def peak(kept: Kept) -> float:
    """The most operations or bytes a second that the machine itself did in its turns: a limit is not a median."""
    return float(kept["amounts"]["peak"] / spread(kept["interleaved"][peers.PEAK]).least)


def page(cells: Sequence[Cell], results: Mapping[str, Kept], machine: Mapping[str, str], command: str) -> str:
    """The Markdown of all cells that have a result, in their order."""
    done = [(cell, results[cell.name]) for cell in cells if cell.name in results]
    parts = [HEAD.format(command=command), *_noise(done), _machine(machine, done, len(cells)), _summary(done)]
    parts += ["![Ratio to the fastest peer](bench/ratio.png)\n", "![Share of the machine's peak](bench/peak.png)\n"]
    parts += [_goals(done), _own(done)]
    for kind in ("forward", "backward", "decode"):
        some = [(cell, kept) for cell, kept in done if cell.kind == kind]
        parts += [_table(kind, some)] if some else []
    return "\n".join([p for p in parts if p])


def _noise(done: Sequence[tuple[Cell, Kept]]) -> list[str]:
    """A warning where other work ran, judged by the load before the first cell and the spread of the peak."""
    if not done:
        return []
    load = done[0][1]["load"]
    widths = [width for _, _, _, width in _peaks(done)]
    if load <= 0.5 and all(width <= 1.15 for width in widths):
        return []
    return [
        f"**Provisional: the machine was not quiet.** Load before the first cell: {load:.1f}; the machine's own peak "
        f"differs by a factor of {max(widths, default=math.nan):.2f} between cells. Ratios mean something, "
        "times little.\n"
    ]


def _peaks(done: Sequence[tuple[Cell, Kept]]) -> list[tuple[str, float, float, float]]:
    """(what, least, greatest, factor) of the machine's own speed over the cells where it should be the same."""
    rows = []
    for what, decode in (("multiply-adds, G operations/s", False), ("reading k and v, GB/s", True)):
        for threads in (1, 2):
            found: dict[int, list[float]] = {}
            for cell, kept in done:
                if (
                    (cell.kind == "decode") == decode
                    and cell.threads == threads
                    and kept["interleaved"].get(peers.PEAK)
                ):
                    found.setdefault(cache_bytes(cell) if decode else 0, []).append(peak(kept) / 1e9)
            for size, speeds in sorted(found.items()):
                of = f" of {size / 2**20:.0f} MiB" if decode else ""
                rows.append((f"{what}{of}, threads: {threads}", min(speeds), max(speeds), max(speeds) / min(speeds)))
    return rows


def _machine(machine: Mapping[str, str], done: Sequence[tuple[Cell, Kept]], wanted: int) -> str:
    lines = ["## Machine\n", "| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in machine.items())]
    loads = [kept["load"] for _, kept in done]
    if loads:
        lines.append(f"| load before a cell | {min(loads):.1f} to {max(loads):.1f} |")
    lines += [f"| {what} | {low:.0f} to {high:.0f} |" for what, low, high, _ in _peaks(done)]
    return "\n".join([*lines, f"| cells measured | {len(done)} of {wanted} |", ""])


def _summary(done: Sequence[tuple[Cell, Kept]]) -> str:
    lines = ["## Ratio to the fastest peer\n", "| | cells | geometric mean | least |", "|---|---|---|---|"]
    for kind in ("forward", "backward", "decode", "all"):
        found = [(r[0], cell) for cell, kept in done if kind in (cell.kind, "all") and (r := ratio(kept))]
        if found:
            mean, (low, where) = geometric_mean([r for r, _ in found]), min(found, key=lambda f: f[0])
            lines.append(f"| {kind} | {len(found)} | {mean:.2f} | {low:.2f} ({where.name}) |")
    absent = [cell.name for cell, kept in done if not kept["interleaved"].get(peers.OWN)]
    if absent:
        lines += ["", f"Without a figure of refattn's, and so in no mean: {'; '.join(absent)}."]
    return "\n".join([*lines, ""])


def _goals(done: Sequence[tuple[Cell, Kept]]) -> str:
    lines = ["## Goals\n", "| cell | goal | interleaved | block by block | peak |", "|---|---|---|---|---|"]
    for cell, kept in done:
        if cell.blocks:
            found = [
                f"{r[0]:.2f} ({TITLES[r[1]]})" if (r := ratio(kept, m)) else "–" for m in ("interleaved", "blocks")
            ]
            lines.append(f"| {cell.name} | {goal(cell)} | {' | '.join(found)} | {_percent(share(cell, kept))} |")
    return "\n".join([*lines, ""]) if len(lines) > 3 else ""


def _own(done: Sequence[tuple[Cell, Kept]]) -> str:
    """refattn beside itself: what a term costs for each visible pair, and what a narrower dtype gains."""
    seconds = {
        c: spread(kept["interleaved"][peers.OWN]).median for c, kept in done if kept["interleaved"].get(peers.OWN)
    }
    lines = ["## refattn beside itself\n", "| cell | beside | time, at the same work |", "|---|---|---|"]
    for cell, t in seconds.items():
        other = Cell(**(vars(cell) | {"term": "plain", "dtype": "f32", "paged": False}))
        if other != cell and other in seconds:
            factor = (t / flops(cell)) / (seconds[other] / flops(other))
            lines.append(f"| {cell.name} | {other.term} {other.dtype} | {factor:.2f} |")
    return "\n".join([*lines, ""]) if len(lines) > 3 else ""


def _table(kind: str, done: Sequence[tuple[Cell, Kept]]) -> str:
    names = [peers.OWN, *peers.PEERS]
    shown = [n for n in names if n == peers.OWN or any(kept["interleaved"].get(n) for _, kept in done)]
    lines = [f"## {kind.capitalize()}\n", f"| cell | ratio | peak | {' | '.join(TITLES[n] for n in shown)} |"]
    lines.append("|---" * (3 + len(shown)) + "|")
    for cell, kept in done:
        best = ratio(kept)
        first = [cell.name.removeprefix(f"{kind} "), f"{best[0]:.2f}" if best else "–", _percent(share(cell, kept))]
        lines.append(f"| {' | '.join(first + [_field(kept, n) for n in shown])} |")
    return "\n".join([*lines, "", *_reasons([*names, peers.PEAK], done), ""])


def _field(kept: Kept, name: str) -> str:
    samples = kept["interleaved"].get(name)
    if not samples:
        return "not run"
    found = spread(samples)
    few = f" ({found.count}×)" if found.count < 5 else ""
    return f"{1e3 * found.median:.3g} · {kept['errors'][name]:.2g} u{few}"


def _reasons(names: Sequence[str], done: Sequence[tuple[Cell, Kept]]) -> list[str]:
    """Why a contender has no figure, each reason once, with its cells where they are few."""
    lines = []
    for name in names:
        cells: dict[str, list[str]] = {}
        for cell, kept in done:
            if name in kept["skipped"]:
                cells.setdefault(kept["skipped"][name], []).append(cell.name)
        for why, where in cells.items():
            which = (
                "all cells"
                if len(where) == len(done)
                else "; ".join(where)
                if len(where) < 4
                else f"{len(where)} cells"
            )
            lines.append(f"- {TITLES[name]} not run: {why} ({which})")
    return lines


def _percent(part: float | None) -> str:
    return "–" if part is None else f"{100 * part:.0f} %"
