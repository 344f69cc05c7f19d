"""A block of CUDA threads on the CPU: greenlets, a seeded scheduler, poisoned memory and a record of who touched what.

What runs here is the text that a device runs. An error is raised where a device would hang, or read what nobody wrote,
or would depend on which thread came first. Not modelled: bank conflicts, and the rounding of the approximate units.
"""

from __future__ import annotations

import contextvars
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, NamedTuple, cast

import numpy as np
from greenlet import getcurrent, greenlet

LANES = 32
POISON = 0x7FC0DEAD  # a NaN
NOBODY, SEVERAL = -1, -2


class SimulationError(Exception):
    """What a device would do wrong in silence, or never end doing."""


class Stamp(NamedTuple):
    """A thread at a moment: how many barriers its block, and syncs its warp, have passed."""

    thread: int
    warp: int
    barriers: int
    syncs: int

    def precedes(self, other: Stamp) -> bool:
        """Whether the other thread is sure to come after this moment."""
        if self.barriers < other.barriers:
            return True
        return self.warp == other.warp and (self.syncs < other.syncs or self.thread == other.thread != NOBODY)


@dataclass
class Copy:
    """An asynchronous copy: where it goes, what it brings."""

    word: int
    bits: list[int]
    landed: bool = False


class Shared:
    """Words of shared memory; a read or write that no barrier orders after another thread's is a race."""

    def __init__(self, words: int) -> None:
        self.bits = np.full(words, POISON, np.uint32)
        self.floats = self.bits.view(np.float32)
        self.written: list[Stamp | None] = [None] * words
        self.readers: list[Stamp | None] = [None] * words
        self.flying: set[int] = set()

    def check(self, word: int, count: int, *, writes: bool) -> None:
        """Records an access of the running thread to so many words, and raises where it is a race."""
        now = running().now
        if word % count or not 0 <= word <= len(self.written) - count:
            raise SimulationError(f"words {word} to {word + count} of {len(self.written)} of shared memory")
        for i in range(word, word + count):
            if i in self.flying:
                raise SimulationError(f"word {i} is touched while a copy to it is in flight")
            written, reader = self.written[i], self.readers[i]
            if written is None:
                if not writes:
                    raise SimulationError(f"word {i} of shared memory is read, and nobody has written it")
            elif written.barriers >= now.barriers and not written.precedes(now):
                raise SimulationError(f"race: word {i} was written by {written}, no barrier before {now}")
            if writes:
                if reader is not None and not reader.precedes(now):
                    raise SimulationError(f"race: word {i} was read by {reader}, no barrier before {now}")
                self.written[i], self.readers[i] = now, None
            elif reader is not now:
                self.readers[i] = now if reader is None else _together(reader, now)

    def fly(self, copy: Copy) -> None:
        """Begins a copy."""
        self.check(copy.word, len(copy.bits), writes=True)
        self.flying.update(range(copy.word, copy.word + len(copy.bits)))

    def land(self, copy: Copy, *, waited: bool) -> None:
        """The bits arrive; only one who has waited may rely on it."""
        if not copy.landed:
            self.bits[copy.word : copy.word + len(copy.bits)] = copy.bits
            copy.landed = True
        if waited:
            now = running().now
            for i in range(copy.word, copy.word + len(copy.bits)):
                self.flying.discard(i)
                self.written[i] = now


def _together(reader: Stamp, now: Stamp) -> Stamp:
    """Stands for all readers since the last write: of one warp, or of several, where only a barrier orders them."""
    if reader.barriers < now.barriers or reader.precedes(now):
        return now
    if reader.warp == now.warp:
        return reader if reader.thread == NOBODY else Stamp(NOBODY, *now[1:])
    return reader if reader.warp == SEVERAL else Stamp(NOBODY, SEVERAL, *now[2:])


class Thread(greenlet):  # type: ignore[misc]
    """One CUDA thread."""

    def __init__(self, block: Block, index: int, run: Callable[[Any], None]) -> None:
        super().__init__(run, block.home)
        self.gr_context = contextvars.copy_context()
        self.block, self.index, self.warp = block, index, block.warps[index // LANES]
        self.now = Stamp(index, self.warp.index, 0, 0)
        self.request: Request | None = None
        self.answer: Any = None
        self.copies: list[Copy] = []
        self.groups: list[list[Copy]] = []


class Request(NamedTuple):
    """What a thread waits for: a collective of that name, called at that place, with its own operand."""

    name: str
    place: tuple[str, int]
    operand: Any


@dataclass
class Warp:
    """Lanes that run until all ask for the same."""

    index: int
    lanes: list[Thread] = field(default_factory=list)

    def asked(self) -> Request | None:
        """What all lanes ask for; None if all are done."""
        requests = [lane.request for lane in self.lanes]
        first = requests[0]
        if any((r is None) != (first is None) or (r and first and r[:2] != first[:2]) for r in requests):
            raise SimulationError(f"lanes of warp {self.index} part: {sorted({str(r and r[:2]) for r in requests})}")
        return first


class Block:
    """The threads of a block."""

    def __init__(self, kernel: Any, arguments: Any, at: tuple[int, ...], sizes: tuple[int, int], rng: Any) -> None:
        threads, words = sizes
        if threads % LANES:
            raise SimulationError(f"{threads} threads are no whole number of warps")
        self.home, self.at, self.rng = getcurrent(), at, rng
        self.shared, self.eager = Shared(words), rng.random() < 0.5
        self.warps = [Warp(n) for n in range(threads // LANES)]
        for index in range(threads):
            thread = Thread(self, index, lambda _: kernel(*arguments))
            thread.warp.lanes.append(thread)

    def run(self, deadline: float) -> None:
        """Runs all threads to their end: one warp as far as it goes, then another."""
        waiting: dict[int, Request] = {}
        going = list(self.warps)
        while going or waiting:
            if time.monotonic() > deadline:
                raise SimulationError("the time limit has passed")
            if not going:
                self.meet(waiting)
                going, waiting = [self.warps[n] for n in waiting], {}
            warp = going.pop(self.rng.randrange(len(going)))
            request = self.advance(warp)
            if request is not None:
                waiting[warp.index] = request
                if len(waiting) + len(going) < len(self.warps):
                    raise SimulationError(f"warp {warp.index} waits at {request[:2]} for a warp that has ended")
            elif waiting:
                others = next(iter(waiting.values()))
                raise SimulationError(f"warp {warp.index} has ended, while others wait at {others[:2]}")

    def advance(self, warp: Warp) -> Request | None:
        """Runs a warp to the next barrier of the block, which it returns, or to its end."""
        while True:
            for lane in self.rng.sample(warp.lanes, LANES):
                if not lane.dead:
                    lane.request = None
                    lane.switch(lane.answer)
            request = warp.asked()
            if request is None or request.name.startswith("barrier"):
                return request
            collective, lanes = COLLECTIVES[request.name], warp.lanes
            answers = collective([lane.request.operand for lane in lanes if lane.request])
            for lane, answer in zip(lanes, answers, strict=True):
                lane.answer = answer
                if request.name == "warp_sync":
                    lane.now = lane.now._replace(syncs=lane.now.syncs + 1)

    def meet(self, waiting: dict[int, Request]) -> None:
        """All warps have come to a barrier."""
        if len({request[:2] for request in waiting.values()}) > 1:
            raise SimulationError(f"warps part: {sorted({str(r[:2]) for r in waiting.values()})}")
        lanes = [lane for warp in self.warps for lane in warp.lanes]
        flag = any(lane.request.operand for lane in lanes if lane.request)
        for lane in lanes:
            lane.answer, lane.now = flag, lane.now._replace(barriers=lane.now.barriers + 1)


COLLECTIVES: dict[str, Callable[[Sequence[Any]], Sequence[Any]]] = {"warp_sync": lambda operands: operands}


def running() -> Thread:
    """The thread that runs."""
    return cast("Thread", getcurrent())  # no greenlet but these calls a primitive


def collective(name: str, operand: Any = None) -> Any:
    """Waits until all lanes, or for a barrier all threads, ask for the same; their answer to this one."""
    thread, frame = running(), sys._getframe(2)
    thread.request = Request(name, (frame.f_code.co_name, frame.f_lineno), operand)
    return thread.block.home.switch()


def launch(
    kernel: Callable[..., None],
    grid: tuple[int, int, int],
    threads: int,
    words: int,
    arguments: Sequence[Any],
    *,
    seed: int = 0,
    limit: float = 60.0,
) -> None:
    """Runs a kernel on a grid of blocks, one after another in an order that the seed draws.

    Raises
    ------
    SimulationError
        Race, divergence at a collective, access out of bounds, or more than `limit` seconds.
    """
    rng, deadline = random.Random(seed), time.monotonic() + limit
    blocks = list(product(*map(range, grid)))
    rng.shuffle(blocks)
    with np.errstate(all="ignore"):
        for at in blocks:
            Block(kernel, arguments, at, (threads, words), rng).run(deadline)
