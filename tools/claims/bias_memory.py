"""C2: what a bias costs in memory."""

from __future__ import annotations

import refattn as ra
from claims.claim import Result, Row, verdict

TITLE = "ALiBi: memory of the bias"
HEADS, LENGTH = 16, 2048


def measure(small: bool = False) -> Result:
    """Arithmetic of the sizes; times are what `make bench` measures."""
    dense, shorter = (HEADS * n**2 * 2 / 1e6 for n in (LENGTH, LENGTH // 2))
    sizes = {"B": 1, "Hq": HEADS, "Hkv": HEADS, "Lq": LENGTH, "Lk": LENGTH, "D": 1, "Dv": 1}
    plan = ra.explain(ra.SDPA(causal=True, bias=ra.ALiBi()), sizes)["plan"]
    (slope,) = plan["bias"]
    shape = slope["Slope"]["slopes"]
    inside = 4 * shape[0]
    rows = [
        Row("A dense bias of 16 heads, float16", "0 to 100 MB more",
            f"{dense:.1f} MB of {LENGTH} tokens, {shorter:.1f} MB of {LENGTH // 2}",
            verdict(dense <= 100, f"{LENGTH} tokens need more; half as many do not")),
        Row("The same bias in the kernel", "no more memory", f"{inside} bytes: float32 slopes {shape}",
            verdict(shape == (HEADS,), "the plan holds more than slopes")),
        Row("Time of ALiBi against no bias", "about 1 % more", "not timed here: see `make bench`", "no: not measured"),
    ]  # fmt: skip
    return Result(rows, "The plan that `refattn.explain` shows holds one slope a head and no matrix.")
