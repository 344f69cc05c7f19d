"""Attention, engine by engine and beside a peer: time, with the error against the reference next to it."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest

import refattn as ra

SHAPES = {"short": (1, 8, 128, 64), "medium": (1, 8, 512, 64), "long": (1, 2, 2048, 64)}
OPTIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"causal": True},
    "alibi": {"causal": True, "bias": ra.ALiBi()},
}


def arrays(shape: tuple[int, int, int, int]) -> list[np.ndarray]:
    """q, k, v of one shape (B, H, L, D), float32."""
    generator = np.random.default_rng(0)
    return [generator.standard_normal(shape, dtype=np.float32) for _ in range(3)]


def torch_sdpa(q: Any, k: Any, v: Any, options: dict[str, Any]) -> Any:
    """The peer's call for the same problem; ALiBi as the mask that torch needs, made outside the timed part."""
    torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
    q, k, v = (torch.from_numpy(a) for a in (q, k, v))
    given: dict[str, Any] = {"is_causal": bool(options.get("causal"))}
    if "bias" in options:
        heads, length = q.shape[1:3]
        slopes = torch.tensor(ra.explain(ra.ALiBi(), sizes(q.shape))["spec"].bias[0].slopes)
        ahead = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        mask = torch.where(ahead <= 0, slopes.reshape(heads, 1, 1) * ahead, -torch.inf)
        given = {"attn_mask": mask.to(torch.float32)[None]}
    return lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, **given).numpy()


def sizes(shape: tuple[int, ...]) -> dict[str, int]:
    """Sizes of a problem whose q, k and v have this shape."""
    batch, heads, length, width = shape
    return {"B": batch, "Hq": heads, "Hkv": heads, "Lq": length, "Lk": length, "D": width, "Dv": width}


@pytest.mark.parametrize("engine", ["cpu", "reference", "torch"])
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("shape", SHAPES)
def test_attention(benchmark: Any, shape: str, options: str, engine: str) -> None:
    """One forward pass, float32."""
    q, k, v = arrays(SHAPES[shape])
    chosen = OPTIONS[options]
    if engine == "torch":
        call = torch_sdpa(q, k, v, chosen)
    else:

        def call() -> Any:
            return ra.attention(q, k, v, engine=engine, **chosen)

    exact = ra.attention(q, k, v, dtype="float64", **chosen)
    error = float(np.abs(np.asarray(call(), np.float64) - exact).max())
    benchmark.group = f"{shape} {SHAPES[shape]} {options}"
    benchmark.extra_info.update(error=error, threads=os.cpu_count(), dtype="float32")
    benchmark(call)
