"""Spreads the tasks of a kernel over threads.

A kernel takes a range of tasks and writes the rows that belong to them and no others, so results are the same bits for
any number of threads. Numba's own thread layers are not used: one dies after fork, another aborts when two Python
threads call at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np

from refattn.errors import SpecError

VARIABLE = "REFATTN_NUM_THREADS"

_SMALL = 1 << 17  # multiply-adds that take about as long as waking a thread
_RANGES_PER_THREAD = 4  # rows differ in cost: causal ones grow


def threads() -> int:
    """Threads a call may use: the environment variable REFATTN_NUM_THREADS, else one for each processor.

    Raises
    ------
    SpecError
        The variable holds something else than a positive integer.
    """
    given = os.environ.get(VARIABLE)
    if given is None:
        return _processors()
    if not given.isdecimal() or int(given) < 1:
        raise SpecError(f"{VARIABLE} is a positive integer; given: {given!r}")
    return int(given)


@cache
def _processors() -> int:
    return os.cpu_count() or 1


def spread(kernel: Callable[..., None], arguments: tuple[Any, ...], tasks: int, work: int) -> None:
    """Call kernel(*arguments, start, stop) on ranges that cover 0 to `tasks`; `work` counts multiply-adds in all."""
    workers = min(threads(), tasks)
    if workers < 2 or work < _SMALL:
        kernel(*arguments, 0, tasks)
        return
    edges = np.linspace(0, tasks, min(tasks, workers * _RANGES_PER_THREAD) + 1).astype(int).tolist()
    pool = _pool(os.getpid(), workers)
    pending = [pool.submit(kernel, *arguments, a, b) for a, b in pairwise(edges)]
    for future in pending:
        future.result()


def together(kernel: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]], tasks: int, work: int) -> None:
    """Call kernel(*arguments()) in this thread and in others; the calls share out `tasks` among themselves."""
    workers = 1 if work < _SMALL else min(threads(), tasks)
    if workers < 2:
        kernel(*arguments())
        return
    pool = _pool(os.getpid(), threads())
    others = [pool.submit(kernel, *arguments()) for _ in range(workers - 1)]
    kernel(*arguments())
    for other in others:
        other.result()


@cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    """One pool a process: after fork the parent's threads do not exist in the child."""
    return ThreadPoolExecutor(workers, thread_name_prefix="refattn")
