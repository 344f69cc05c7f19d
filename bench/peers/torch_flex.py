"""torch's flex_attention, compiled: terms as functions of a score, masks as block masks, made beforehand."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import Any

from numpy.typing import NDArray

from bench.cells import SOFTCAP, Cell, by_difference, visible
from bench.peers import Call
from bench.peers.torch_sdpa import read, tensor

TITLE = "torch flex"
PACKAGES = ("torch",)
MODULE = "torch"
FIRST_CALL_S = 120


def refuses(cell: Cell) -> str | None:
    """What flex_attention does not do on a CPU."""
    return "no backward pass on a CPU" if cell.kind == "backward" else None


def memory(cell: Cell) -> int:
    """What the block mask is made from: one matrix of booleans and its sums."""
    return 9 * cell.queries * cell.length


def prepare(cell: Cell, x: Mapping[str, NDArray[Any]]) -> Call:
    """Compiled anew for every cell, for that is the fastest."""
    torch = importlib.import_module("torch")
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    torch.set_num_threads(cell.threads)
    torch.compiler.reset()
    q, k, v = (tensor(x[n]) for n in "qkv")
    options: dict[str, Any] = {"score_mod": _score(cell, x), "enable_gqa": cell.heads != cell.kv_heads}
    if cell.causal or cell.term in ("window", "document"):
        first, end = (torch.from_numpy(a) for a in visible(cell))
        options["block_mask"] = flex.create_block_mask(
            lambda b, h, i, j: (j >= first[i]) & (j < end[i]), None, None, cell.queries, cell.length, device="cpu"
        )
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def attend() -> Any:
        with torch.no_grad():
            return compiled(q, k, v, **options)

    return Call(attend, lambda found: {"out": read(found)})


def _score(cell: Cell, x: Mapping[str, NDArray[Any]]) -> Callable[..., Any] | None:
    torch = importlib.import_module("torch")
    if cell.term == "softcap":
        return lambda s, b, h, i, j: SOFTCAP * torch.tanh(s / SOFTCAP)
    if cell.term == "alibi":
        flat = by_difference(cell)
        assert flat is not None
        steep = tensor(flat[:, cell.length - 2].copy())  # the bias of the key before, −slope
        return lambda s, b, h, i, j: s + steep[h] * abs(i - j)
    flat = by_difference(cell, x.get("t5_table"))
    if flat is None:
        return None
    table = tensor(flat)
    return lambda s, b, h, i, j: s + table[h, j - i + (cell.length - 1)]
