"""A stream of a million tokens through a variant's state: time, and the memory that it holds at each tenth.

`make stream` runs it; `.venv/bin/python bench/stream.py --variant infini_attention --tokens 100000` a part of it.
"""

from __future__ import annotations

import time
import tracemalloc
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

import refattn as ra

# By name: a spec whose state does not grow with the tokens, and the sizes of its arrays.
STREAMS: dict[str, tuple[Any, dict[str, int]]] = {
    "infini_attention": (ra.InfiniAttention(segment=256), {"B": 1, "Hq": 1, "Hkv": 1, "D": 4, "Dv": 4}),
    "infinity_former": (
        ra.InfinityFormer(segment=1024, basis=16, sigmas=(0.05,), samples=16, contraction=0.5),
        {"B": 1, "Hq": 1, "Hkv": 1, "D": 4, "Dv": 4, "E": 4},
    ),
}
TENTHS, HUNDREDTHS = 10, 100
console = Console()


def tokens(signature: dict[str, Any], sizes: dict[str, int], rng: np.random.Generator) -> dict[str, Any]:
    """Normal numbers for every input that is not optional."""
    return {name: rng.standard_normal(a.shape(sizes)) for name, a in signature.items() if not a.optional}


def stream(name: str, count: int, step: int, progress: Progress) -> list[tuple[int, float, int, int, int]]:
    """Tokens, seconds, and the bytes of the state, of all that is held and of the peak since, at each tenth."""
    spec, sizes = STREAMS[name]
    module, rng = ra.variants()[name].module, np.random.default_rng(1)
    signature = module.signature(spec)
    needed = {dim for a in module.state(spec, 0).values() for dim in a.names}
    state = ra.init_state(spec, **{dim: sizes[dim] for dim in needed})
    first = tokens(signature, sizes | {"L": 1}, rng)
    learned = {n: a for n, a in first.items() if "L" not in signature[n].names}
    rows: list[tuple[int, float, int, int, int]] = []
    task, shown, start = progress.add_task(name, total=count), 0, time.perf_counter()
    tracemalloc.start()
    ends = [count * (n + 1) // TENTHS for n in range(TENTHS)]
    while state.length < count:
        ahead = min(step, ends[len(rows)] - state.length)
        state = ra.step(spec, state, tokens(signature, sizes | {"L": ahead}, rng) | learned)[1]
        if state.length * HUNDREDTHS // count > shown:
            # The bar remembers each time that it is told of.
            shown = state.length * HUNDREDTHS // count
            progress.update(task, completed=state.length)
        if state.length == ends[len(rows)]:
            held, peak = tracemalloc.get_traced_memory()
            carried = sum(array.nbytes for array in state.values())
            rows.append((state.length, time.perf_counter() - start, carried, held, peak))
            tracemalloc.reset_peak()
    tracemalloc.stop()
    return rows


def report(name: str, rows: list[tuple[int, float, int, int, int]]) -> None:
    """One line a tenth, and what the whole has come to."""
    table = Table(box=None, title=name, title_justify="left")
    for heading in ("tokens", "seconds", "state, KiB", "held, KiB", "peak, KiB"):
        table.add_column(heading, justify="right")
    for length, seconds, *sizes in rows:
        table.add_row(f"{length:,}", f"{seconds:.1f}", *(f"{size / 1024:,.1f}" for size in sizes))
    console.print(table)
    length, seconds = rows[-1][:2]
    grown = (rows[-1][3] - rows[0][3]) / 1024
    console.print(
        f"{length / seconds:,.0f} tokens a second; held memory has grown by {grown:+,.1f} KiB since the tenth"
    )


def main(
    variant: Annotated[list[str] | None, typer.Option(help="one of those in STREAMS; default: each")] = None,
    count: Annotated[int, typer.Option("--tokens", min=TENTHS)] = 1_000_000,
    step: Annotated[int, typer.Option(help="tokens handed over at once", min=1)] = 4099,
) -> None:
    """Feed each variant a stream, and show that its memory stays."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(),
    )  # fmt: skip
    for name in variant or STREAMS:
        if name not in STREAMS:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(STREAMS)}")
        with Progress(*columns, console=console, transient=True) as progress:
            rows = stream(name, count, step, progress)
        report(name, rows)


if __name__ == "__main__":
    typer.run(main)
