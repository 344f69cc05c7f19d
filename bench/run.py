"""One cell: who takes part, in which order, and what is kept of it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import peers, timing
from bench.cells import Cell, arrays
from bench.exact import exact, units
from bench.worker import Stopped, Worker

MEMORY = 8 << 30
CALL_S = 20.0


@dataclass
class Crew:
    """The processes that are running, all with the same number of threads."""

    store: Path
    narrow: bool = False
    threads: int = 0
    workers: dict[str, Worker] = field(default_factory=dict)

    def member(self, name: str, threads: int) -> Worker:
        """The contender's process, started anew where there is none; all are ended when `threads` changes."""
        if threads != self.threads:
            self.dismiss()
            self.threads = threads
        if name not in self.workers or not self.workers[name].alive:
            self.workers[name] = Worker(name, threads, self.store, self.narrow)
        return self.workers[name]

    def dismiss(self) -> None:
        """End all."""
        for worker in self.workers.values():
            worker.stop()
        self.workers.clear()


def obstacle(cell: Cell, name: str, short: bool) -> str | None:
    """Why a contender is not even started."""
    peer = peers.load(name)
    if not peers.installed(peer):
        return "not installed"
    if name in peers.PEERS and (cell.paged or cell.dtype == "int8"):
        return "takes no keys and values in pages" if cell.paged else "takes no keys and values in int8"
    if short and name == "torch_flex" and cell.term == "plain":
        return "left out of the short run, for it compiles for 20 s"
    refused: str | None = peer.refuses(cell)
    if refused is not None:
        return refused
    need = peer.memory(cell)
    return f"needs about {need / 2**30:.0f} GiB" if need > MEMORY else None


def measure(
    cell: Cell, crew: Crew, budget: float, names: Iterable[str] = peers.ALL, short: bool = False
) -> dict[str, Any]:
    """What is kept of a cell: seconds of every sample, errors, and why a contender has none."""
    skipped = {n: why for n in names if (why := obstacle(cell, n, short)) is not None}
    probes, errors, amounts = {}, {}, {}
    load = os.getloadavg()[0]
    want = exact(cell, arrays(cell))
    for name in names:
        if name in skipped:
            continue
        try:
            worker = crew.member(name, cell.threads)
            found = worker.ask(("prepare", cell), CALL_S + peers.load(name).FIRST_CALL_S)
            if name == peers.PEAK:
                amounts["peak"] = float(found["amount"])
            else:
                errors[name] = units(cell, found, want)
            probes[name] = worker.ask(("time", 1, False), CALL_S)
        except Stopped as stop:
            skipped[name] = str(stop)

    def sample(name: str, calls: int, warm: bool) -> float:
        if name in skipped:
            return math.nan
        try:
            return float(crew.member(name, cell.threads).ask(("time", calls, warm), 3 * CALL_S))
        except Stopped as stop:
            skipped[name] = str(stop)
            return math.nan

    planned = timing.plans(probes, budget)
    kept: dict[str, Any] = {"cell": cell.name, "load": load, "errors": errors, "skipped": skipped, "amounts": amounts}
    kept["interleaved"] = timing.interleaved(sample, planned)
    kept["blocks"] = timing.by_blocks(sample, planned) if cell.blocks else {}
    for mode in ("interleaved", "blocks"):
        kept[mode] = {name: seconds for name, seconds in kept[mode].items() if name not in skipped}
    for name in probes:
        with suppress(Stopped):
            crew.member(name, cell.threads).ask(("drop",), CALL_S)
    return kept
