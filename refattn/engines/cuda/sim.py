"""The primitives of the kernels in the simulator, under the names they have in `ptx`, where each is described."""
# ruff: noqa: D103

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refattn.engines.cuda.simulator import COLLECTIVES, LANES, POISON, Copy, SimulationError, collective, running

__all__ = [
    "absolute", "barrier", "barrier_or", "block", "commit", "copy4", "copy16", "device", "divide", "exp2", "get",
    "get4", "get_bits", "join", "larger", "ldmatrix", "ldmatrix_t", "local", "local_int", "log2", "mma_bf16", "mma_f16",
    "pack_bf16", "pack_f16", "past", "put", "put_bits", "read", "shuffle_xor", "thread", "wait", "warp_sync", "write",
]  # fmt: skip

F = np.float32
Four = tuple[Any, Any, Any, Any]


@dataclass(frozen=True)
class Pointer:
    """Flat memory of a device from an element on."""

    memory: NDArray[Any]
    first: int = 0

    def at(self, i: int, count: int = 1) -> int:
        """Where element i is, with so many."""
        place = self.first + int(i)
        if not -(2**31) <= i < 2**31:
            raise SimulationError(f"index {i} does not fit 32 bits")
        if not 0 <= place <= self.memory.size - count:
            raise SimulationError(f"elements {place} to {place + count} of an array of {self.memory.size}")
        return place


def device(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that kernels call."""
    return function


def thread() -> int:
    return running().index


def block(axis: int) -> int:
    return running().block.at[axis]


def local(count: int) -> list[Any]:
    return [np.uint32(POISON).view(F)] * count


def local_int(count: int) -> list[int]:
    return [POISON] * count


def past(p: Pointer, count: int) -> Pointer:
    return Pointer(p.memory, p.first + int(count))


def read(p: Pointer, i: int) -> Any:
    found = p.memory[p.at(i)]
    return found if p.memory.dtype == F else int(found)


def write(p: Pointer, i: int, x: Any) -> None:
    p.memory[p.at(i)] = x if p.memory.dtype == F else int(x) & (1 << 8 * p.memory.itemsize) - 1


def get(i: int) -> Any:
    shared = running().block.shared
    shared.check(i, 1, writes=False)
    return shared.floats[i]


def get4(i: int) -> Four:
    shared = running().block.shared
    shared.check(i, 4, writes=False)
    a, b, c, d = shared.floats[i : i + 4]
    return a, b, c, d


def get_bits(i: int) -> Any:
    shared = running().block.shared
    shared.check(i, 1, writes=False)
    return int(shared.bits[i])


def put(i: int, x: Any) -> None:
    shared = running().block.shared
    shared.check(i, 1, writes=True)
    shared.floats[i] = x


def put_bits(i: int, bits: int) -> None:
    shared = running().block.shared
    shared.check(i, 1, writes=True)
    shared.bits[i] = bits


def copy4(i: int, p: Pointer, j: int, live: bool) -> None:
    _copy(i, p, j, live, 1)


def copy16(i: int, p: Pointer, j: int, live: bool) -> None:
    _copy(i, p, j, live, 4)


def _copy(i: int, p: Pointer, j: int, live: bool, words: int) -> None:
    bits, now = [0] * words, running()
    if live:
        count = 4 * words // p.memory.itemsize
        place = p.at(j, count)
        if place % count or p.memory.ctypes.data % (4 * words):
            raise SimulationError(f"a copy of {4 * words} bytes from element {place} is not aligned")
        bits = p.memory[place : place + count].view(np.uint32).tolist()
    copy = Copy(i, bits)
    now.block.shared.fly(copy)
    if now.block.eager:
        now.block.shared.land(copy, waited=False)
    now.copies.append(copy)


def commit() -> None:
    now = running()
    now.groups.append(now.copies)
    now.copies = []


def wait(count: int) -> None:
    now = running()
    while len(now.groups) > count:
        for copy in now.groups.pop(0):
            now.block.shared.land(copy, waited=True)


def barrier() -> None:
    collective("barrier")


def barrier_or(flag: Any) -> bool:
    return bool(collective("barrier_or", bool(flag)))


def warp_sync() -> None:
    collective("warp_sync")


def shuffle_xor(x: Any, distance: int) -> Any:
    return collective("shuffle_xor", (x, distance))


def ldmatrix(i: int) -> Four:
    found: Four = collective("ldmatrix", _row(i))
    return found


def ldmatrix_t(i: int) -> Four:
    found: Four = collective("ldmatrix_t", _row(i))
    return found


def mma_bf16(c: Four, a: Four, low: int, high: int) -> Four:
    found: Four = collective("mma_bf16", (c, a, low, high))
    return found


def mma_f16(c: Four, a: Four, low: int, high: int) -> Four:
    found: Four = collective("mma_f16", (c, a, low, high))
    return found


def pack_bf16(low: Any, high: Any) -> int:
    return _pack(low, high, ml_dtypes.bfloat16)


def pack_f16(low: Any, high: Any) -> int:
    return _pack(low, high, np.float16)


def join(low: int, high: int) -> int:
    return (int(low) | int(high) << 16) & 0xFFFFFFFF


def exp2(x: Any) -> Any:
    found = np.exp2(x)
    return found if not abs(found) < F(2.0**-126) else F(0)


def log2(x: Any) -> Any:
    return np.log2(x)


def absolute(x: Any) -> Any:
    return abs(x)


def larger(x: Any, y: Any) -> Any:
    return np.fmax(x, y)


def divide(x: Any, y: Any) -> Any:
    return x / y


def _pack(low: Any, high: Any, kind: Any) -> int:
    halves = np.array([low, high], F).astype(kind).view(np.uint16)
    return int(halves[0]) | int(halves[1]) << 16


def _row(i: int) -> Any:
    """The row of a matrix that a lane reads for all."""
    shared = running().block.shared
    shared.check(i, 4, writes=False)
    return shared.bits[i : i + 4].view(np.uint16).copy()


def _shuffled(operands: Sequence[Any]) -> list[Any]:
    return [operands[lane ^ distance][0] for lane, (_, distance) in enumerate(operands)]


def _spread(rows: Sequence[Any], *, turned: bool = False) -> list[Four]:
    matrices = np.stack(rows).reshape(4, 8, 8)
    words = np.ascontiguousarray(matrices.swapaxes(1, 2) if turned else matrices).view(np.uint32)
    return [(a, b, c, d) for a, b, c, d in words.reshape(4, LANES).T.tolist()]


def _product(operands: Sequence[Any], kind: Any) -> list[Four]:
    """C + A·B in float32 of what 32 lanes hold, in the layout of mma.sync.m16n8k16."""
    lane = np.arange(LANES)
    row, pair = lane // 4, 2 * (lane % 4)
    a, b, c = np.zeros((16, 16), F), np.zeros((16, 8), F), np.zeros((16, 8), F)
    held = np.array([o[1] for o in operands], np.uint32).view(kind).astype(F).reshape(LANES, 4, 2)
    given = np.array([o[2:] for o in operands], np.uint32).view(kind).astype(F).reshape(LANES, 2, 2)
    sums = np.array([o[0] for o in operands], F).reshape(LANES, 2, 2)
    for n in range(4):
        a[row + 8 * (n % 2), pair + 8 * (n // 2)] = held[:, n, 0]
        a[row + 8 * (n % 2), pair + 8 * (n // 2) + 1] = held[:, n, 1]
    for n in range(2):
        b[pair + 8 * n, row], b[pair + 8 * n + 1, row] = given[:, n, 0], given[:, n, 1]
        c[row + 8 * n, pair], c[row + 8 * n, pair + 1] = sums[:, n, 0], sums[:, n, 1]
    # float16 and bfloat16 products are exact in float64, and so, nearly, is their sum.
    found = (c.astype(np.float64) + a.astype(np.float64) @ b.astype(np.float64)).astype(F)
    quads = np.stack([found[row, pair], found[row, pair + 1], found[row + 8, pair], found[row + 8, pair + 1]], 1)
    return list(map(tuple, quads))


COLLECTIVES.update(
    shuffle_xor=_shuffled,
    ldmatrix=_spread,
    ldmatrix_t=lambda rows: _spread(rows, turned=True),
    mma_bf16=lambda operands: _product(operands, ml_dtypes.bfloat16),
    mma_f16=lambda operands: _product(operands, np.float16),
)
