"""C8: the size, the capacity and the re-writes of Infini-attention's memory."""

from __future__ import annotations

from typing import Any

import numpy as np

import refattn as ra
from claims.claim import Result, Row, verdict

TITLE = "Infini-attention: memory, capacity, re-writes"
LAYERS, HEADS, WIDTH = 12, 8, 128


def floats() -> int:
    """Numbers in the memories of all layers, counted in a state."""
    state = ra.init_state(ra.InfiniAttention(segment=2048), B=1, Hkv=HEADS, D=WIDTH, Dv=WIDTH)
    return LAYERS * sum(state[name].size for name in ("memory", "weight"))


def recalled(keys: np.ndarray, values: np.ndarray, update: str, again: np.ndarray | None = None) -> np.ndarray:
    """What queries equal to `again` (default: the keys) read of a memory with one pair a segment, gate all open."""
    n, queries = keys.shape[0], keys if again is None else again
    spec = ra.InfiniAttention(segment=1, update=update)
    _, state = ra.step(
        spec,
        ra.init_state(spec, B=1, Hkv=1, D=keys.shape[1], Dv=values.shape[1]),
        {"q": keys[None, None], "k": keys[None, None], "v": values[None, None], "gate": np.zeros(1)},
    )
    # A gate of 60 leaves 1e-26 of the local part; the memory that one query reads is that before its own segment.
    found = []
    for query in queries:
        one = {"q": query[None, None, None], "k": np.zeros((1, 1, 1, keys.shape[1])), "gate": np.array([60.0])}
        found.append(ra.step(spec, state, one | {"v": np.zeros((1, 1, 1, values.shape[1]))})[0].out[0, 0, 0])
    return np.array(found).reshape(-1, values.shape[1]) if n else np.zeros_like(values)


def capacity(counts: list[int], width: int, update: str) -> list[float]:
    """Relative error of recall for so many pairs of Gaussian keys and values."""
    found = []
    for n in counts:
        rng = np.random.default_rng(n)
        # Twice as long as a Gaussian vector, which keeps features of different keys apart.
        keys, values = 2 * rng.standard_normal((n, width)), rng.standard_normal((n, width))
        found.append(float(np.linalg.norm(recalled(keys, values, update) - values) / np.linalg.norm(values)))
    return found


def passkey(length: int, width: int) -> float:
    """Worst error of a value whose key has features of its own, written at any depth of a long sequence."""
    worst = 0.0
    for depth in (0, length // 2, length - 1):
        rng = np.random.default_rng(depth)
        keys, values = rng.standard_normal((length, width)), rng.standard_normal((length, width))
        # elu + 1 of −50 is 2e-22: the passkey answers to the last channel, and nothing else does.
        keys[:, -1], keys[depth] = -50, -50
        keys[depth, -1] = 5
        found = recalled(keys, values, "linear", keys[depth : depth + 1])
        worst = max(worst, float(abs(found - values[depth]).max()))
    return worst


def strangers(update: str) -> float:
    """Worst error over 4 pairs of keys whose features hardly meet."""
    # elu + 1 of −50 is 2e-22.
    keys, values = np.where(np.eye(4) == 1, 3.0, -50.0), np.arange(1.0, 13.0).reshape(4, 3)
    return float(abs(recalled(keys, values, update) - values).max())


def rewritten(update: str, times: int) -> list[float]:
    """What is read, as a share of V, after the same pair was written so many times."""
    key, value = np.array([[0.5, -1.0, 2.0]]), np.array([[1.0]])
    each = [recalled(np.repeat(key, n, 0), np.repeat(value, n, 0), update, key) for n in range(1, times + 1)]
    return [float(found.item()) for found in each]


def measure(small: bool = False) -> Result:
    """Arithmetic, then recall without training."""
    width, counts, length = (8, [2, 8], 32) if small else (32, [1, 2, 4, 8, 16, 32, 64, 128, 256], 1024)
    size, curves = floats(), {update: capacity(counts, width, update) for update in ("linear", "delta")}
    cache, key = 2 * LAYERS * 2048 * HEADS * WIDTH, passkey(length, width)
    again = {update: rewritten(update, 5) for update in ("linear", "delta")}
    shown = {update: ", ".join(f"{x:.3f}" for x in read) for update, read in again.items()}
    meet = {update: strangers(update) for update in ("linear", "delta")}
    kept = all(abs(x - 1) < 1e-12 for x in again["delta"])
    rows = [
        Row("Memory of 12 layers, 8 heads of 128", "1.6M", f"{size:,}", verdict(size == 1585152, "another count")),
        Row("Against Memorizing Transformers' 183M", "114x", f"{183e6 / size:.1f}x; 114.4x of the rounded 1.6M",
            verdict(round(183 / 1.6) == 114, "another ratio")),
        Row("Transformer-XL's cache of 2048 tokens", "50M", f"{cache:,}", verdict(round(cache / 1e6) == 50, "another")),
        Row(f"A passkey is retrieved at any depth of {length} tokens", "100 % at 1M tokens, tuned",
            f"within {key:.0e} at the beginning, middle and end, its features being its own",
            verdict(key < 1e-12, "not retrieved")),
        Row("Capacity: recall is exact for few pairs and fades", "not in the paper",
            f"linear: error {curves['linear'][0]:.2f} for {counts[0]}, {curves['linear'][-1]:.2f} for {counts[-1]}; "
            f"delta: {curves['delta'][-1]:.2f}",
            verdict(curves["linear"][0] < curves["linear"][-1], "it does not fade")),
        Row("Keys whose features do not meet are recalled, linear rule", "not in the paper",
            f"within {meet['linear']:.0e}", verdict(meet["linear"] < 1e-12, "not recalled")),
        Row("The same, delta rule", "not in the paper", f"off by {meet['delta']:.1f}, values 1 to 12",
            verdict(meet["delta"] < 1e-12, "an unknown key reads the mean of what is there, and that is taken off V")),
        Row("The linear rule, a pair written 1 to 5 times", "not in the paper", f"{shown['linear']} of V",
            verdict(all(abs(x - 1) < 1e-12 for x in again["linear"]), "it changes")),
        Row("The delta rule leaves a binding that exists unmodified", "unmodified", f"{shown['delta']} of V",
            verdict(kept, "of the memory it is true, but z grows all the same, so what is read halves")),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        axes = figure.add_subplot(1, 2, 1)
        for update, curve in curves.items():
            axes.semilogx(counts, curve, "o-", markersize=3, label=update)
        axes.set(xlabel=f"pairs stored, D = {width}", ylabel="relative error of recall")
        axes.legend()
        axes = figure.add_subplot(1, 2, 2)
        for update, mark in (("linear", "o-"), ("delta", "s-")):
            axes.plot(range(1, 6), again[update], mark, label=update)
        axes.set(xlabel="times a pair was written", ylabel="share of V read", ylim=(0, 1.1))
        axes.legend()

    how = (
        "One pair a segment, read with the gate all open. The paper's passkey is that of a tuned language model; "
        "here it is a pair whose features no other has."
    )
    return Result(rows, how, draw)
