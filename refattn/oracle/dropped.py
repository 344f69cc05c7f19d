"""Keys that are never read: the last block, the first key, or the one key that the error points at."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from refattn.oracle.alternatives import Alternative, Failure


def blocks(f: Failure) -> Iterator[Alternative]:
    """The remainder of a length that is not a multiple of a block's."""
    lk = f.golden.sizes["Lk"]
    seen = set()
    for size in (16, 32, 64, 128, 256):
        kept = lk - lk % size
        if lk % size and kept and kept not in seen:
            seen.add(kept)
            words = f"attention to the first {kept} of {lk} keys: the last block of {lk - kept} is not read"
            yield _without(f, np.arange(lk) >= kept, "last_block", words)


def one_key(f: Failure) -> Iterator[Alternative]:
    """Dropping key j moves a row's output by p_j (out − v_j) / (1 − p_j): the j that fits the worst row best."""
    if "out" not in f.results:
        return
    exact, result = f.golden.expected["out"], f.results["out"]
    error = np.where(np.isfinite(exact) & np.isfinite(result), result - exact, 0.0)
    unit = f.golden.bound["out"] + 1e-300
    b, h, i, _ = np.unravel_index(int(np.argmax(np.abs(error) / unit)), error.shape)
    values = f.arrays["v"][b, h // (f.golden.sizes["Hq"] // f.golden.sizes["Hkv"])].astype(np.float64)
    p = f.weights[b, h, i][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = p * (exact[b, h, i] - values) / (1 - p)
    misfit = np.abs(moved - error[b, h, i]).max(-1)
    misfit[~np.isfinite(misfit) | (p[:, 0] == 0)] = np.inf
    if not misfit.size or not np.isfinite(misfit.min()):
        return
    j = int(np.argmin(misfit))
    lk = f.golden.sizes["Lk"]
    yield _without(f, np.arange(lk) == j, "dropped_key", f"attention without key {j} of {lk}")


def _without(f: Failure, dropped: np.ndarray, key: str, words: str) -> Alternative:
    mask = f.arrays.get("mask", np.ones((1, 1), bool)) & ~dropped
    return Alternative(key=key, words=words, arrays={"mask": mask})


DROPPED = (one_key, blocks)
