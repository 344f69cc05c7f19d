"""The kernels of the cpu engine, each with a small problem that compiles it or loads it from the disk cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from refattn import jit
from refattn.cache import extend
from refattn.engines.cpu import (
    adjoint,
    backward,
    cached,
    decode,
    fast,
    forward,
    remote,
    score,
    skipping,
    sparing,
    storage,
)
from refattn.engines.cpu.operands import prepare
from refattn.engines.cpu.vectors import INT8
from refattn.plan import Bias, Dense, Score, Slope

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
    falling, long = (Slope(slopes=np.ones(1)),), skipping.SHORTEST
    kinds = [np.dtype(t) for t in (np.float32, ml_dtypes.bfloat16, np.float16)]
    lane = jit.lanes()
    for kind in kinds:
        code = storage.storage_of(np.zeros(0, kind))
        if code is None:
            continue
        search = (storage._greatest,)
        yield Kernel(f"search of {kind} numbers", search, partial(storage.finite, np.ones(1, kind)))
        if code:
            functions = tuple(storage._converter(lane << 16 | code << 24, widening) for widening in (True, False))
            yield Kernel(f"conversion of {kind}", functions, partial(_convert, kind))
        for lq in (_LONG, 1):
            shape = forward.shape_for(1, lq, code)
            name = f"forward, {shape.rows} queries a tile, {kind}"
            yield Kernel(name, (forward.kernel(shape),), partial(_run, kind, lq, _LONG, normalizer="sigmoid"))
        shape = forward.shape_for(1, _LONG, code)
        norms = (skipping._measure(shape.width << 16 | 1 << 8 | 1 | code << 24),)
        yield Kernel(f"norms of keys, {kind}", norms, partial(_run, kind, long, long, falling))
        yield from _decode(kind, code)
        literal = cached.literal(code)
        name = f"norms of a cache, {kind}"
        yield Kernel(name, (cached.of_keys(literal), cached.of_values(literal)), partial(_cached, kind, long))
    yield Kernel("choice of tiles of a cache", (remote.leave(),), partial(_cached, np.dtype(np.float32), long))
    yield from _decode(np.dtype(np.int8), INT8)
    for lq in (_LONG, 2):
        shape = forward.shape_for(1, lq)
        both: tuple[Any, ...] = (backward.kernel(shape), backward.by_pair(shape))
        yield Kernel(f"backward, {shape.rows} queries a tile", both, partial(_backward, lq))
    long = sparing.SHORTEST
    search = (sparing.kernel(forward.shape_for(1, long)),)
    yield Kernel("search of what gradients leave out", search, partial(_backward, long, long, falling))
    yield Kernel("sum of parts", (backward.total,), _sum)
    for kind, (name, call) in product((np.float32, np.float64), _BY_ROW.items()):
        function = getattr(score, name)
        yield Kernel(f"{name} row by row, {kind.__name__}", (function,), partial(call, function, kind))


def _decode(kind: np.dtype[Any], code: int) -> Iterator[Kernel]:
    for tabled in (False, True):
        name = f"decode, {kind}{' in pages' if tabled else ''}"
        yield Kernel(name, (decode.kernel(jit.lanes(), code, tabled),), partial(_read, kind, tabled))


def folder() -> Path | None:
    """Where the machine code is kept; None where no folder can be written."""
    function: Any = score.forward
    path = function.stats.cache_path
    return None if path is None else Path(path)


_LONG = 2 * decode.MOST  # rows that are too many for `decode`


def _plan(kind: Any, lq: int, lk: int, bias: tuple[Bias, ...] = (), normalizer: Any = "softmax") -> Score:
    q, k = (np.ones((1, 1, length, _SIZE), kind) for length in (lq, lk))
    positions = np.arange(lq)[None], np.arange(lk)[None]
    return Score(q=q, k=k, v=k, scale=1.0, positions=positions, bias=bias, normalizer=normalizer)


def _run(kind: Any, lq: int, lk: int, bias: tuple[Bias, ...] = (), normalizer: Any = "softmax") -> None:
    plan = _plan(kind, lq, lk, bias, normalizer)
    fast.run(plan, plan.q.astype(np.float32), plan.k, plan.v)


def _read(kind: np.dtype[Any], tabled: bool) -> None:
    plan, one = _plan(kind, 1, _LONG), np.ones((1, 1, 1), np.float32)
    if kind == np.int8:
        plan = replace(plan, k_scale=one, v_scale=one)
    if tabled:
        plan = replace(plan, pages=np.zeros((1, 1), np.int64), lengths=(np.ones(1, np.int64), np.ones(1, np.int64)))
    fast.run(plan, plan.q.astype(np.float32), plan.k, plan.v)


def _cached(kind: np.dtype[Any], lk: int) -> None:
    plan = _plan(kind, 1, lk, (Slope(slopes=np.ones(1)),))
    held = extend(plan.k[:, :, :0], plan.k, 2)
    fast.run(plan, plan.q.astype(np.float32), held, held)


def _backward(lq: int, lk: int = _LONG, bias: tuple[Bias, ...] = ()) -> None:
    plan = _plan(np.float32, lq, lk, bias or (Dense(values=np.zeros((lq, lk))),))
    wanted = {"q", "k", "v"} if bias else {"q", "k", "v", "bias.0"}
    given = adjoint.Pass(plan.q, plan.k, plan.v, plan.q, plan.q[..., 0].copy(), plan.q, plan.q[..., 0].copy())
    adjoint.gradients(plan, given, wanted)


def _sum() -> None:
    for kind in (np.float32, np.float64):
        adjoint._summed(np.zeros((2, _SIZE), kind))


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
