"""Golden cases of ALiBi."""

from __future__ import annotations

from collections.abc import Iterator

from refattn.case import Case
from refattn.variants.alibi import ALiBi


def cases() -> Iterator[Case]:
    """Both slope rules and learned slopes, every direction, both alignments."""
    yield Case(
        name="alibi/twelve_heads_over_four",
        spec=ALiBi(),
        sizes={"B": 1, "Hq": 12, "Hkv": 4, "Lq": 16, "Lk": 16, "D": 8, "Dv": 8},
        dtype="bfloat16",
        flags=("causal", "gqa", "heads_not_power_of_two"),
        catches="geometric slopes where the authors' interleave, and a wrong key head",
    )
