"""refattn's cpu engine, through its public functions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

import refattn as ra
from bench.cells import PAGE, SOFTCAP, Cell, segments, window
from bench.peers import Call

TITLE = "refattn"
PACKAGES = ("refattn", "numba", "llvmlite", "numpy")
MODULE = "refattn"
FIRST_CALL_S = 60


def refuses(cell: Cell) -> str | None:
    """Nothing of the grid."""
    return None


def memory(cell: Cell) -> int:
    """No score matrix is stored."""
    return 0


def prepare(cell: Cell, x: Mapping[str, NDArray[Any]], engine: str = "cpu") -> Call:
    """`evaluate`; backward is `vjp` with out and lse of a forward pass before."""
    options: dict[str, Any] = {"causal": cell.causal}
    inputs = {name: a for name, a in x.items() if name != "dout"}
    if cell.term == "alibi":
        options["bias"] = ra.ALiBi()
    if cell.term == "t5":
        options["bias"] = ra.T5(bidirectional=not cell.causal)
    if cell.term == "window":
        options["window"] = window(cell)
    if cell.term == "softcap":
        options["softcap"] = SOFTCAP
    if cell.term == "document":
        inputs |= {"q_segment_ids": segments(cell), "k_segment_ids": segments(cell)}
    if cell.dtype == "int8":
        options["kv"] = "int8"
    if cell.paged:
        options["paged"] = True
        inputs = _paged(inputs)
    spec = ra.SDPA(**options)
    if cell.kind != "backward":
        return Call(lambda: ra.evaluate(spec, inputs, engine=engine), lambda found: {"out": found["out"]})
    saved = ra.evaluate(spec, inputs, engine=engine, want=("out", "lse"))
    wrt = ("q", "k", "v")
    return Call(
        lambda: ra.vjp(spec, inputs, {"out": x["dout"]}, outputs=saved, wrt=wrt, engine=engine),
        lambda found: {f"d{n}": np.asarray(found[f"d{n}"]) for n in wrt},
    )


def _paged(inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """k and v (1,H,L,D) and scales in blocks (L / PAGE,H,PAGE,D) out of order, and the table that names them."""
    count = inputs["k"].shape[2] // PAGE
    order = np.random.default_rng(0).permutation(count)
    found = {"q": inputs["q"], "block_table": np.argsort(order)[None], "kv_lengths": np.array([count * PAGE])}
    for name in inputs.keys() - {"q"}:
        a = inputs[name][0]
        blocks = a.reshape(a.shape[0], count, PAGE, *a.shape[2:]).swapaxes(0, 1)
        found[name] = np.ascontiguousarray(blocks[order])
    return found
