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
    """The one key that what is wrong points at, judged by out, by lse and by a gradient that is 0."""
    lk = f.golden.sizes["Lk"]
    for j in sorted({*_by_out(f), *_by_log_sum(f), *_by_gradient(f)}):
        yield _without(f, np.arange(lk) == j, "dropped_key", f"attention without key {j} of {lk}")


def _by_out(f: Failure) -> Iterator[int]:
    """Dropping key j moves a row's output by p_j (out − v_j) / (1 − p_j): the j that fits the worst row best."""
    if "out" not in f.results:
        return
    exact, result = f.golden.expected["out"], f.results["out"]
    error = np.where(np.isfinite(exact) & np.isfinite(result), result - exact, 0.0)
    if not error.any():
        return
    b, h, i, _ = np.unravel_index(int(np.argmax(np.abs(error) / (f.golden.bound["out"] + 1e-300))), error.shape)
    values = f.arrays["v"][b, h // (f.golden.sizes["Hq"] // f.golden.sizes["Hkv"])].astype(np.float64)
    p = f.weights[b, h, i][:, None]
    with np.errstate(divide="ignore", invalid="ignore"):
        misfit = np.abs(p * (exact[b, h, i] - values) / (1 - p) - error[b, h, i]).max(-1)
    yield int(np.argmin(np.where(np.isfinite(misfit) & (p[:, 0] > 0), misfit, np.inf)))


def _by_log_sum(f: Failure) -> Iterator[int]:
    """Dropping key j moves lse by log(1 − p_j): the j that fits all rows best."""
    if "lse" not in f.results:
        return
    with np.errstate(divide="ignore", invalid="ignore"):
        error = f.results["lse"] - f.golden.expected["lse"]
        misfit = np.abs(np.log1p(-f.weights) - error[..., None])
    misfit = np.where(np.isfinite(error)[..., None], misfit, 0.0).sum((0, 1, 2))
    if misfit.size:
        yield int(np.argmin(np.where(np.isnan(misfit), np.inf, misfit)))


def _by_gradient(f: Failure) -> Iterator[int]:
    """A key whose gradients are exactly 0 where they should not be, if there is just one."""
    rows = f.golden.rows.k if f.golden.rows is not None else range(f.golden.sizes["Lk"])
    for name in ("dk", "dv"):
        if name in f.results:
            dead = (f.results[name] == 0).all((0, 1, 3)) & (f.golden.expected[name] != 0).any((0, 1, 3))
            if dead.sum() == 1:
                yield rows[int(np.argmax(dead))]


def _without(f: Failure, dropped: np.ndarray, key: str, words: str) -> Alternative:
    mask = f.arrays.get("mask", np.ones((1, 1), bool)) & ~dropped
    return Alternative(key=key, words=words, arrays={"mask": mask})


DROPPED = (one_key, blocks)
