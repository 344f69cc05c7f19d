"""jax.nn.dot_product_attention, compiled; (1,L,H,D) in and out."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cells import Cell, dense_bias, segments, window
from bench.peers import Call

TITLE = "JAX"
PACKAGES = ("jax", "jaxlib")
MODULE = "jax"
FIRST_CALL_S = 60


def refuses(cell: Cell) -> str | None:
    """What the function has no argument for."""
    return "no softcap" if cell.term == "softcap" else None


def memory(cell: Cell) -> int:
    """Scores, masked scores and weights of all heads; the bias and its copy."""
    return 4 * cell.queries * cell.length * cell.heads * (5 if cell.term in ("alibi", "t5") else 3)


def prepare(cell: Cell, x: Mapping[str, NDArray[Any]]) -> Call:
    """Backward is the compiled cotangent function of one forward pass, kept."""
    jax = importlib.import_module("jax")
    q, k, v = (jax.numpy.asarray(_swapped(x[n])) for n in "qkv")
    options: dict[str, Any] = {"is_causal": cell.causal}
    arrays: dict[str, Any] = {}
    bias = dense_bias(cell, x.get("t5_table"))
    if bias is not None:
        arrays["bias"] = jax.numpy.asarray(bias[None], q.dtype)
    if cell.term == "window":
        options["local_window_size"] = window(cell)
    if cell.term == "document":
        own = segments(cell)[0]
        arrays["mask"] = jax.numpy.asarray((own[:, None] == own)[None, None])

    def attend(q: Any, k: Any, v: Any, arrays: Any) -> Any:
        return jax.nn.dot_product_attention(q, k, v, **options, **arrays)

    if cell.kind != "backward":
        compiled = jax.jit(attend)
        return Call(lambda: compiled(q, k, v, arrays).block_until_ready(), lambda found: {"out": _read(found)})
    pulled = jax.jit(lambda q, k, v: jax.vjp(lambda q, k, v: attend(q, k, v, arrays), q, k, v)[1])(q, k, v)
    back, dout = jax.jit(lambda pull, given: pull(given)), jax.numpy.asarray(_swapped(x["dout"]))
    return Call(
        lambda: jax.block_until_ready(back(pulled, dout)),
        lambda found: {n: _read(a) for n, a in zip(("dq", "dk", "dv"), found, strict=True)},
    )


def _swapped(a: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(a.transpose(0, 2, 1, 3))


def _read(found: Any) -> NDArray[Any]:
    return np.asarray(found).astype(np.float32).transpose(0, 2, 1, 3)
