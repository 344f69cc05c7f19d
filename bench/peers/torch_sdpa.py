"""torch's scaled_dot_product_attention; what it has no option for is given as a float mask, made beforehand."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from bench.cells import Cell, dense_bias, dense_mask, visible
from bench.peers import Call

TITLE = "torch SDPA"
PACKAGES = ("torch",)
MODULE = "torch"
FIRST_CALL_S = 10


def refuses(cell: Cell) -> str | None:
    """Softcap is no option of SDPA."""
    return "no softcap" if cell.term == "softcap" else None


def memory(cell: Cell) -> int:
    """The mask: a matrix a head for a bias, one for a mask."""
    each = 4 * cell.queries * cell.length
    return each * {"alibi": 2 * cell.heads, "t5": 2 * cell.heads, "window": 2, "document": 2}.get(cell.term, 0)


def tensor(a: NDArray[Any]) -> Any:
    """The same memory as a tensor; bfloat16 by its bits."""
    torch = importlib.import_module("torch")
    if a.dtype.name == "bfloat16":
        return torch.from_numpy(a.view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(a)


def read(found: Any) -> NDArray[Any]:
    """As float32, which holds every value of the halves."""
    return np.asarray(found.detach().float().numpy())


def mask(cell: Cell, x: Mapping[str, NDArray[Any]]) -> Any:
    """Bias, causality and mask as one float array that broadcasts to (1,H,L,L), or None."""
    bias, seen = dense_bias(cell, x.get("t5_table")), dense_mask(cell)
    if bias is None and seen is None:
        return None
    if seen is None and cell.causal:
        seen = np.arange(cell.length) < visible(cell)[1][:, None]
    whole = np.zeros((1, cell.queries, cell.length), np.float32) if bias is None else bias
    if seen is not None:
        whole = np.where(seen, whole, np.float32(-np.inf))
    return tensor(whole.astype(x["q"].dtype, copy=False))[None]


def prepare(cell: Cell, x: Mapping[str, NDArray[Any]]) -> Call:
    """Backward is autograd's of one forward pass, kept."""
    torch = importlib.import_module("torch")
    torch.set_num_threads(cell.threads)
    q, k, v = inputs = [tensor(x[n]) for n in "qkv"]
    given = mask(cell, x)
    options: dict[str, Any] = {"is_causal": cell.causal} if given is None else {"attn_mask": given}
    if cell.heads != cell.kv_heads:
        options["enable_gqa"] = True

    def attend() -> Any:
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, **options)

    if cell.kind != "backward":
        return Call(attend, lambda found: {"out": read(found)})
    for one in inputs:
        one.requires_grad_()
    out, dout = attend(), tensor(x["dout"])
    return Call(
        lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True),
        lambda found: {n: read(a) for n, a in zip(("dq", "dk", "dv"), found, strict=True)},
    )
