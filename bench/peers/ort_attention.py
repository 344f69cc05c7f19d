"""ONNX's standard operator Attention (opset 23) as ONNX Runtime runs it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cells import SOFTCAP, Cell, dense_bias, dense_mask, visible
from bench.peers import Call, _ort

TITLE = "ORT Attention"
PACKAGES = ("onnxruntime", "onnx")
MODULE = "onnxruntime"
FIRST_CALL_S = 10


def refuses(cell: Cell) -> str | None:
    """Inference only."""
    if cell.dtype == "bf16":
        return "no bfloat16 on a CPU"
    return "no backward pass" if cell.kind == "backward" else None


def memory(cell: Cell) -> int:
    """Scores of all heads, and the bias."""
    return score_memory(cell)


def score_memory(cell: Cell) -> int:
    """A score matrix a head, and as much again for a bias or mask and the copy it is made from."""
    return 4 * cell.queries * cell.length * cell.heads * (3 if cell.term in ("alibi", "t5") else 1)


def added(cell: Cell, x: Mapping[str, NDArray[Any]]) -> NDArray[Any] | None:
    """Bias, causality and mask as one array (1, 1 or H, L, L) of q's dtype, or None."""
    bias, seen = dense_bias(cell, x.get("t5_table")), dense_mask(cell)
    if bias is None and seen is None:
        return None
    if seen is None and cell.causal:
        seen = np.arange(cell.length) < visible(cell)[1][:, None]
    whole = np.zeros((1, cell.queries, cell.length), np.float32) if bias is None else bias
    whole = whole if seen is None else np.where(seen, whole, np.float32(-np.inf))
    return whole[None].astype(x["q"].dtype, copy=False)


def prepare(cell: Cell, x: Mapping[str, NDArray[Any]]) -> Call:
    """(1,H,L,D) in and out."""
    inputs = {n: x[n] for n in "qkv"}
    bias = added(cell, x)
    names = [*inputs]
    options: dict[str, Any] = {"is_causal": int(cell.causal and bias is None)}
    if bias is not None:
        inputs["bias"] = bias
        names.append("bias")
    if cell.term == "softcap":
        options["softcap"] = SOFTCAP
    made = _ort.session(cell, "Attention", "", inputs, names, **options)
    return _ort.call(made, inputs, lambda o: o)
