"""`make bench` and `make bench-full`: time the cells, keep each result, write docs/bench.md and its pictures."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from bench import cells, machine, pictures, report, run, store

ROOT = Path(__file__).resolve().parents[1]
SHORT_S, FULL_S = 6.0, 15.0


def main(arguments: Sequence[str] | None = None) -> int:
    """0 unless the arguments make no sense; a peer that fails is a row of the page."""
    given = _arguments(arguments)
    wanted = [cell for cell in (cells.grid() if given.full else cells.quick()) if given.only in cell.name]
    name = "full" if given.full else "short"
    path = given.store / f"{name}{'-avx2' if given.avx2 else ''}.jsonl"
    key = machine.key(given.avx2)
    if not given.full and not given.report:
        path.unlink(missing_ok=True)
    results = store.read(path, key)
    if not given.report:
        _measure([cell for cell in wanted if cell.name not in results], path, key, given)
        results = store.read(path, key)
    command = "make bench-full" if given.full else "make bench"
    page = report.page(wanted, results, machine.description(given.avx2), command)
    for title, png in pictures.draw(wanted, results).items():
        store.whole(given.docs / "bench" / f"{title}.png", png)
    store.whole(given.docs / "bench.md", page.encode())
    print(f"{given.docs.name}/bench.md: {sum(cell.name in results for cell in wanted)} of {len(wanted)} cells")
    return 0


def _measure(wanted: Sequence[cells.Cell], path: Path, key: str, given: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    crew = run.Crew(given.store, given.avx2)
    budget = given.seconds or (FULL_S if given.full else SHORT_S)
    try:
        with Progress(*columns, TimeRemainingColumn(), console=Console()) as progress:
            task = progress.add_task("cells", total=len(wanted))
            for cell in wanted:
                progress.update(task, description=cell.name)
                kept = run.measure(cell, crew, budget, short=not given.full)
                store.append(path, key, kept)
                best = report.ratio(kept)
                told = f"{best[0]:.2f} × {report.TITLES[best[1]]}" if best else "no ratio"
                progress.console.print(f"{cell.name}: {told}", highlight=False)
                progress.advance(task)
    finally:
        crew.dismiss()


def _arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="every cell of the grid; goes on where it was cut off")
    parser.add_argument("--only", default="", metavar="TEXT", help="cells whose name has this text in it")
    parser.add_argument("--seconds", type=float, help=f"budget of a cell in each mode: {SHORT_S:g}, full {FULL_S:g}")
    parser.add_argument("--avx2", action="store_true", help="refattn and its peers held to AVX2")
    parser.add_argument("--report", action="store_true", help="measure nothing; write the page from what is kept")
    parser.add_argument("--store", type=Path, default=ROOT / "build" / "bench", help="where results are kept")
    parser.add_argument("--docs", type=Path, default=ROOT / "docs", help="where the page is written")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    raise SystemExit(main())
