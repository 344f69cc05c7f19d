"""ONNX Runtime's own operator MultiHeadAttention (com.microsoft), which takes (1,L,H·D)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cells import Cell
from bench.peers import Call, _ort
from bench.peers.ort_attention import added, score_memory

TITLE = "ORT MHA"
PACKAGES = ("onnxruntime", "onnx")
MODULE = "onnxruntime"
FIRST_CALL_S = 10


def refuses(cell: Cell) -> str | None:
    """What the operator has no input for."""
    if cell.kind == "backward":
        return "no backward pass"
    if cell.heads != cell.kv_heads:
        return "no grouped heads"
    if cell.dtype == "bf16":
        return "no bfloat16 on a CPU"
    return "no softcap" if cell.term == "softcap" else None


def memory(cell: Cell) -> int:
    """Scores of all heads, and the bias."""
    return score_memory(cell)


def prepare(cell: Cell, x: Mapping[str, NDArray[Any]]) -> Call:
    """Heads are laid side by side beforehand, and not taken apart in the timed part."""
    inputs = {n: np.ascontiguousarray(x[n][0].transpose(1, 0, 2).reshape(1, x[n].shape[2], -1)) for n in "qkv"}
    names = ["q", "k", "v"]
    bias = added(cell, x)
    if bias is not None:
        inputs["bias"] = bias
        names += ["", "", "bias"]
    options: dict[str, Any] = {"num_heads": cell.heads}
    if cell.causal and bias is None:
        options["unidirectional"] = 1
    made = _ort.session(cell, "MultiHeadAttention", "com.microsoft", inputs, names, **options)
    return _ort.call(made, inputs, lambda o: o.reshape(1, cell.queries, cell.heads, -1).transpose(0, 2, 1, 3))
