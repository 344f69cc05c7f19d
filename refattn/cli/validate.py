"""The command `refattn validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from refattn.files import write
from refattn.oracle.report import COLOURS, Line
from refattn.oracle.validate import validate as run

console = Console()


def validate(
    target: Annotated[str, typer.Argument(help="torch:sdpa, refattn:reference, refattn:cpu, package.module:function")],
    *,
    suite: Annotated[str, typer.Option("--suite", help="which suite")] = "core",
    cases: Annotated[str, typer.Option("--cases", help="only cases whose name matches, such as 'alibi/*'")] = "*",
    profile: Annotated[str | None, typer.Option("--profile", help="whose bound; default: the case's dtype's")] = None,
    arrays: Annotated[str | None, typer.Option("--arrays", help="numpy, torch or jax; default: the adapter's")] = None,
    folder: Annotated[Path | None, typer.Option("--folder", help="a suite's folder; default: the committed")] = None,
    report: Annotated[Path | None, typer.Option("--json", help="write the whole report to this file too")] = None,
) -> None:
    """Check a backend against the golden suite; where it fails, say what it does differently.

    A line per case: largest error in units of the last place and of the case's bound, verdict, outputs. Exit code 1
    where a case fails or none could be run, 2 where the target is not found.
    """
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("validating", total=None)
        progress.console.print(_row(("case", "ulp", "of bound", "verdict", "")), style="bold")

        def step(done: int, total: int, line: Line) -> None:
            style = None if line.verdict == "pass" else COLOURS[line.verdict]
            progress.console.print(_row(line.row()), style=style, markup=False, highlight=False, soft_wrap=True)
            progress.update(task, total=total, completed=done)

        found = run(
            target, suite=suite, arrays=arrays, profile=profile, folder=folder, cases=cases, progress=step
        )  # fmt: skip
    if report is not None:
        write(report, (json.dumps(found.to_json(), indent=1, ensure_ascii=False) + "\n").encode())
    console.print(found.summary, style="bold green" if found.ok else "bold", markup=False, highlight=False)
    for text in found.findings:
        console.print(text, style="bold red", markup=False, highlight=False, soft_wrap=True)
    for line in found.failures:
        console.print(f"  {line.case}: {line.words}", markup=False, highlight=False, soft_wrap=True)
    if not found.ok:
        raise typer.Exit(1)


def _row(cells: tuple[str, ...]) -> str:
    case, ulp, ratio, verdict, outputs = cells
    return f"{case:<36} {ulp:>9} {ratio:>9}  {verdict:<13}  {outputs}"
