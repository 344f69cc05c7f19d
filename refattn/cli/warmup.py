"""The command `refattn warmup`."""

from __future__ import annotations

import os
import time
from pathlib import Path

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

console = Console()


def warmup() -> None:
    """Compile the cpu engine's kernels ahead, so that no later process waits for them.

    A line per kernel: whether it was compiled now or already on disk, and the seconds it took. A stopped run keeps what
    it has finished. Exit code 1 where no folder can be written, 130 where it was stopped.
    """
    from refattn.engines.cpu import warm

    folder = warm.folder()
    if folder is None or not os.access(folder, os.W_OK):
        where = os.environ.get("NUMBA_CACHE_DIR") or folder or "the package's own folder"
        _say(f"nothing can be kept: {where} cannot be written; set NUMBA_CACHE_DIR to a folder that can be", "bold red")
        raise typer.Exit(1)
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given and not folder.is_relative_to(Path(given).absolute()):
        _say(f"{given}, which NUMBA_CACHE_DIR names, cannot be written", "bold red")
    kernels, compiled, done = list(warm.kernels()), 0, 0
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
    try:
        with Progress(*columns, console=console, transient=True) as progress:
            task = progress.add_task("compiling", total=len(kernels))
            for kernel in kernels:
                begun = time.perf_counter()
                new = kernel.warm()
                compiled, done = compiled + new, done + 1
                seconds, what = time.perf_counter() - begun, "compiled" if new else "on disk"
                progress.console.print(f"{kernel.name:<40} {what:<9} {seconds:6.1f} s", highlight=False, soft_wrap=True)
                progress.update(task, advance=1)
    except KeyboardInterrupt:
        _say(f"stopped: {done} of {len(kernels)} kernels are in {folder}; run it again to go on", "bold")
        raise typer.Exit(130) from None
    _say(f"{compiled} kernels compiled, {done - compiled} found on disk, in {folder}", "bold green")


def _say(text: str, style: str) -> None:
    console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
