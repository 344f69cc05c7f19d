"""Spreads the tasks of a kernel over threads.

A kernel writes the rows that belong to its tasks and no others, so results are the same bits for any number of threads.
Numba's own thread layers are not used: one dies after fork, another aborts when two Python threads call at once.

The thread that calls takes part. It asks idle threads of ours to help and waits for none that has not begun when it is
done itself; where several threads call at once, they share out those helpers, and no more threads run than asked for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable
from functools import cache
from itertools import pairwise
from queue import SimpleQueue
from threading import Lock, Thread
from typing import Any

import numpy as np

from refattn.errors import SpecError

VARIABLE = "REFATTN_NUM_THREADS"

_SMALL = 1 << 20  # multiply-adds that take a few times as long as asking a helper
_RANGES_PER_THREAD = 4  # rows differ in cost: causal ones grow

_next = Lock()  # an iterator gives each range to one thread


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
    workers = 1 if work < _SMALL else min(threads(), tasks)
    if workers < 2:
        kernel(*arguments, 0, tasks)
        return
    edges = np.linspace(0, tasks, min(tasks, workers * _RANGES_PER_THREAD) + 1).astype(int).tolist()
    left = pairwise(edges)

    def part() -> None:
        try:
            while True:
                with _next:
                    start, stop = next(left)
                kernel(*arguments, start, stop)
        except StopIteration:
            pass
        finally:
            # After an error the others need not go on.
            with _next:
                deque(left, 0)

    _share(part, workers)


def together(kernel: Callable[..., Any], arguments: Callable[[], tuple[Any, ...]], tasks: int, work: int) -> None:
    """Call kernel(*arguments()) in this thread and in others; the calls share out `tasks` among themselves."""
    workers = 1 if work < _SMALL else min(threads(), tasks)
    if workers < 2:
        kernel(*arguments())
        return
    _share(lambda: kernel(*arguments()), workers)


class _Offer:
    """A part of the work, for a helper that is free before the caller is done."""

    def __init__(self, part: Callable[[], Any]) -> None:
        self.part = part
        self.error: BaseException | None = None
        self.claim, self.done = Lock(), Lock()
        self.done.acquire()

    def take(self) -> None:
        """Do it, if it still stands."""
        if self.claim.acquire(blocking=False):
            try:
                self.part()
            except BaseException as error:
                self.error = error
            self.done.release()

    def settle(self) -> BaseException | None:
        """Withdraw it, or wait until it is done; the error in which it ended."""
        if not self.claim.acquire(blocking=False):
            self.done.acquire()
        return self.error


def _share(part: Callable[[], Any], workers: int) -> None:
    """Call the part in this thread, and in others of `workers` in all that are free."""
    offers = [_Offer(part) for _ in range(workers - 1)]
    queue = _helpers(workers - 1)
    for offer in offers:
        queue.put(offer)
    try:
        part()
    finally:
        errors = [error for error in [offer.settle() for offer in offers] if error is not None]
    if errors:
        raise errors[0]


class _Helpers:
    """Threads that wait for offers, of one process: after fork the parent's do not exist in the child."""

    def __init__(self) -> None:
        self.queue: SimpleQueue[_Offer] = SimpleQueue()
        self.count, self.lock = 0, Lock()

    def work(self) -> None:
        """Take one offer after the other."""
        while True:
            self.queue.get().take()


_crew = _Helpers()


def _forget() -> None:
    # Another thread of the parent may have held them.
    global _crew, _next
    _crew, _next = _Helpers(), Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _helpers(count: int) -> SimpleQueue[_Offer]:
    """The queue of at least so many helpers."""
    crew = _crew
    if crew.count < count:
        with crew.lock:
            for _ in range(crew.count, count):
                Thread(target=crew.work, name="refattn", daemon=True).start()
                crew.count += 1
    return crew.queue
