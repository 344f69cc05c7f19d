"""The kernels of the cpu engine, each with a small problem that compiles it or loads it from the disk cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from refattn.engines.cpu import _jit, decode, fast, forward, score, skipping, storage
from refattn.engines.cpu.operands import prepare
from refattn.plan import Score, Slope

_SIZE = 8  # numbers in a vector, and heads that share a key head


class Kernel(NamedTuple):
    """A kernel: what it is called, Numba's functions, and a call that needs them."""

    name: str
    functions: tuple[Any, ...]
    call: Callable[[], Any]

    def warm(self) -> bool:
        """Make the machine code ready; whether something had to be compiled."""
        before = self._compiled()
        self.call()
        return self._compiled() > before

    def _compiled(self) -> int:
        return sum(sum(f.stats.cache_misses.values()) for f in self.functions)


def kernels() -> Iterator[Kernel]:
    """Every kernel that this processor runs: of each storage the tiled ones, of each float type those row by row."""
    kinds = [np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16)]
    lane = _jit.lanes()
    for kind in kinds:
        code = storage.storage_of(np.zeros(0, kind))
        if code is None:
            continue
        search = (storage._greatest,)
        yield Kernel(f"search of {kind} numbers", search, partial(storage.finite, np.ones(1, kind)))
        if code:
            functions = tuple(storage._converter(lane << 16 | code << 24, widening) for widening in (True, False))
            yield Kernel(f"conversion of {kind}", functions, partial(_convert, kind))
        shape, small = (forward.shape_for(1, rows, code) for rows in (_LONG, decode.MOST))
        yield Kernel(f"forward, {kind}", (forward.kernel(shape),), partial(_run, kind, _LONG, _LONG))
        if not decode.suits(small.rows, small.rows):
            few = partial(_run, kind, small.rows, small.rows)
            yield Kernel(f"forward of few rows, {kind}", (forward.kernel(small),), few)
        norms = (skipping._measure(shape.width << 16 | 1 << 8 | 1 | code << 24),)
        yield Kernel(f"norms of keys, {kind}", norms, partial(_run, kind, skipping.SHORTEST, skipping.SHORTEST, True))
        yield Kernel(f"decode, {kind}", (decode.kernel(lane, code),), partial(_run, kind, 1, _LONG))
    for kind, (name, call) in product((np.float32, np.float64), _BY_ROW.items()):
        function = getattr(score, name)
        yield Kernel(f"{name} row by row, {kind.__name__}", (function,), partial(call, function, kind))


def folder() -> Path | None:
    """Where the machine code is kept; None where no folder can be written."""
    function: Any = score.forward
    path = function.stats.cache_path
    return None if path is None else Path(path)


_LONG = 2 * decode.MOST  # rows that are too many for `decode`


def _plan(kind: Any, lq: int, lk: int, falling: bool = False) -> Score:
    q, k = (np.ones((1, 1, length, _SIZE), kind) for length in (lq, lk))
    bias = (Slope(slopes=np.ones(1)),) if falling else ()
    return Score(q=q, k=k, v=k, scale=1.0, positions=(np.arange(lq)[None], np.arange(lk)[None]), bias=bias)


def _run(kind: Any, lq: int, lk: int, falling: bool = False) -> None:
    plan = _plan(kind, lq, lk, falling)
    fast.run(plan, plan.q.astype(np.float32), plan.k, plan.v)


def _convert(kind: np.dtype[Any]) -> None:
    storage.narrowed(storage.widened(np.ones(_SIZE, kind)), kind)


def _rows(kind: Any) -> tuple[Any, Any, Any]:
    x = prepare(_plan(np.float64, 1, 1), kind)
    return x, np.ones_like(x.q), np.ones(x.q.shape[:3], kind)


def _forward(function: Any, kind: Any) -> None:
    x, out, lse = _rows(kind)
    function(x, out, lse, 0, 1)


def _see(function: Any, kind: Any) -> None:
    function(_rows(kind)[0], np.zeros((0, 3), np.int64), np.zeros((1, 1, 1), np.bool_))


def _backward_rows(function: Any, kind: Any) -> None:
    x, dout, dlse = _rows(kind)
    function(x, dout, dlse, np.empty_like(x.q), np.empty(dlse.shape), np.empty(dlse.shape), 0, 1)


def _backward_keys(function: Any, kind: Any) -> None:
    x, dout, dlse = _rows(kind)
    function(x, dout, dlse, np.empty_like(x.k), np.empty_like(x.v), 0, 1)


def _backward_bias(function: Any, kind: Any) -> None:
    function(*_rows(kind), np.ones(3, np.int64), False, np.empty((1, 1)), 0, 1)


_BY_ROW: dict[str, Callable[[Any, Any], None]] = {
    "forward": _forward,
    "see": _see,
    "backward_rows": _backward_rows,
    "backward_keys": _backward_keys,
    "backward_bias": _backward_bias,
}
