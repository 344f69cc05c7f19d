"""A process for each contender, so that each has its own thread pools, and may be stopped when it takes too long.

Every process makes the arrays itself, from the cell's seed. Only outputs and seconds go through the pipe.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import re
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bench import peers
from bench.cells import Cell, arrays
from bench.exact import rows_of

_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMBA_NUM_THREADS", "REFATTN_NUM_THREADS")
_NARROW = {  # the machine held to AVX2
    "NUMBA_CPU_NAME": "haswell",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "XLA_FLAGS": "--xla_cpu_max_isa=AVX2",
}


class Stopped(Exception):
    """The contender can't go on with this cell; the message says why."""


class Worker:
    """The parent's end of one contender's process."""

    def __init__(self, name: str, threads: int, store: Path, narrow: bool = False) -> None:
        self.name = name
        settings = dict.fromkeys(_THREADS, str(threads)) | (_NARROW if narrow else {})
        settings |= {"TORCHINDUCTOR_CACHE_DIR": str(store / "inductor"), "JAX_PLATFORMS": "cpu"}
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_serve, args=(other, name, threads), daemon=True)
        with _environment(settings):  # a spawned process takes the environment of its start
            self.process.start()
        other.close()

    def ask(self, order: tuple[Any, ...], limit: float) -> Any:
        """The answer to an order; Stopped where there is none within `limit` seconds, or the order failed."""
        try:
            self.pipe.send(order)
            if not self.pipe.poll(limit):
                self.stop()
                raise Stopped(f"one call takes more than {limit:.0f} s")
            good, answer = self.pipe.recv()
        except (EOFError, OSError):
            self.stop()
            raise Stopped("its process ended, for want of memory or by a crash") from None
        if not good:
            raise Stopped(answer)
        return answer

    @property
    def alive(self) -> bool:
        """Whether it takes orders."""
        return self.process.is_alive()

    def stop(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()


@contextlib.contextmanager
def _environment(settings: dict[str, str]) -> Any:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _serve(pipe: Connection, name: str, threads: int) -> None:
    """Orders: ("prepare", cell) computes once and answers with the rows to check; ("time", calls, warm); ("drop",)."""
    if name == "jax_sdpa" and hasattr(os, "sched_setaffinity"):  # the size of its pool is that of the set of cores
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    call: peers.Call | None = None
    while True:
        try:
            order = pipe.recv()
        except EOFError:
            return
        try:
            if order[0] == "prepare":
                call = None
                call, answer = _prepare(name, order[1])
            elif order[0] == "time":
                assert call is not None
                answer = _time(call, *order[1:])
            else:
                call = answer = None
                gc.collect()
            pipe.send((True, answer))
        except Exception as error:  # whatever a framework raises is the reason why it has no figure here
            call = None
            pipe.send((False, reason(error)))


def _prepare(name: str, cell: Cell) -> tuple[peers.Call, Any]:
    call = peers.load(name).prepare(cell, arrays(cell))
    rows = rows_of(cell)
    found = call.read(call.run())
    return call, {n: a[:, :, rows] if n == "out" else a for n, a in found.items()}


def _time(call: peers.Call, calls: int, warm: bool) -> float:
    if warm:
        call.run()
    gc.disable()
    start = time.perf_counter()
    for _ in range(calls):
        call.run()
    seconds = time.perf_counter() - start
    gc.enable()
    return seconds / calls


def reason(error: Exception) -> str:
    """The first line of an error, short, without any path of the machine."""
    first = next(iter(str(error).strip().splitlines()), "")
    text = re.sub(r"\S*[/\\]\S+", "…", first)
    return f"{type(error).__name__}: {text[:120]}".rstrip(": ")
