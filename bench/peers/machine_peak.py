"""What the machine itself can do: multiply-adds that touch registers only, and reading arrays as large as k and v."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.core.types import float32, int64
from numba.extending import intrinsic
from numpy.typing import NDArray

from bench.cells import Cell
from bench.peers import Call

TITLE = "peak"
PACKAGES = ("numba", "llvmlite")
MODULE = "numba"
FIRST_CALL_S = 60
CHAINS = 16  # independent sums: more than latency times units of any core
STEPS = 1 << 20
WIDTHS = (16, 8, 4)


def refuses(cell: Cell) -> str | None:
    """Nothing: every cell is measured against the machine of its own minute."""
    return None


def memory(cell: Cell) -> int:
    """Nothing beyond the arrays."""
    return 0


def burner(width: int) -> Callable[[int, float, float], float]:
    """A function (steps, a, b) that does steps · CHAINS · width multiply-adds s ← s a + b and returns their sum."""

    @intrinsic
    def burn(typing: Any, steps: Any, a: Any, b: Any) -> Any:
        cgutils: Any = import_module("numba.core.cgutils")  # has no types

        def emit(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            vector = ir.VectorType(ir.FloatType(), width)
            empty = ir.Constant(vector, ir.Undefined)
            lanes = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
            zero = ir.Constant(ir.IntType(32), 0)
            factor, term = (
                builder.shuffle_vector(builder.insert_element(empty, x, zero), empty, lanes) for x in arguments[1:]
            )
            sums = [
                cgutils.alloca_once_value(builder, builder.fmul(term, ir.Constant(vector, [float(n)] * width)))
                for n in range(CHAINS)
            ]  # distinct starts, so that no two chains are one
            kind = ir.FunctionType(vector, [vector] * 3)
            fma = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fmuladd.v{width}f32")
            with cgutils.for_range(builder, arguments[0]):
                for s in sums:
                    builder.store(builder.call(fma, [builder.load(s), factor, term]), s)
            total = builder.load(sums[0])
            for s in sums[1:]:
                total = builder.fadd(total, builder.load(s))
            return builder.extract_element(total, zero)

        return float32(int64, float32, float32), emit

    call: Any = burn  # Numba gives the first argument, the typing context

    @numba.njit(nogil=True)
    def run(steps: int, a: float, b: float) -> float:
        total: float = call(steps, numba.float32(a), numba.float32(b))
        return total

    return run


@numba.njit(nogil=True)
def xor(words: NDArray[np.uint64]) -> Any:
    """All words read once; integers, because a sum of floats may not be reordered."""
    found = np.uint64(0)
    for word in words:
        found ^= word
    return found


def fastest_width() -> tuple[int, Callable[[int, float, float], float]]:
    """The vector width with the most multiply-adds a second."""
    best: tuple[float, int, Callable[[int, float, float], float]] | None = None
    for width in WIDTHS:
        burn = burner(width)
        burn(1, 0.5, 0.5)
        seconds = []
        for _ in range(3):
            start = time.perf_counter()
            burn(STEPS // 8, 0.5, 0.5)
            seconds.append(time.perf_counter() - start)
        rate = width / min(seconds)
        if best is None or rate > best[0]:
            best = rate, width, burn
    assert best is not None
    return best[1:]


def prepare(cell: Cell, x: Mapping[str, NDArray[Any]]) -> Call:
    """Decode: read k and v. Else: multiply-adds; `read` tells how many operations or bytes one call stands for."""
    pool = ThreadPoolExecutor(cell.threads)
    if cell.kind == "decode":
        parts = [p for n in "kv" for p in np.array_split(x[n].reshape(-1).view(np.uint64), cell.threads)]
        amount = float(sum(p.nbytes for p in parts))
        return Call(lambda: list(pool.map(xor, parts)), lambda found: {"amount": np.array(amount)})
    width, burn = fastest_width()
    amount = 2.0 * STEPS * CHAINS * width * cell.threads
    return Call(
        lambda: list(pool.map(lambda _: burn(STEPS, 0.5, 0.5), range(cell.threads))),
        lambda found: {"amount": np.array(amount)},
    )
