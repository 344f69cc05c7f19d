"""C9: how near the cheap approximations come to exact attention at the same budget."""

from __future__ import annotations

from typing import Any

import numpy as np

import refattn as ra
from claims.claim import Result, Row, variant, verdict

TITLE = "Linformer, Informer, Skeinformer: error against budget"
KINDS = ("clusters", "independent tokens")
NAMES = ("Linformer", "Informer", "Skeinformer")


def tokens(kind: str, length: int, width: int, seed: int) -> dict[str, np.ndarray]:
    """Queries and keys of 8 clusters, whose attention has few directions, or independent Gaussian ones."""
    rng = np.random.default_rng(seed)
    centres, own = 1.5 * rng.standard_normal((8, width)), 0.5 if kind == "clusters" else 1.0
    q, k = (own * rng.standard_normal((length, width)) for _ in range(2))
    if kind == "clusters":
        q, k = (a + centres[rng.integers(0, 8, length)] for a in (q, k))
    v = k @ rng.standard_normal((width, width)) / np.sqrt(width) + 0.5 * rng.standard_normal((length, width))
    return {name: a[None, None] for name, a in (("q", q), ("k", k), ("v", v))}


def approximated(name: str, x: dict[str, np.ndarray], budget: int, seed: int) -> np.ndarray:
    """The output with so many mixtures, exact queries, or columns."""
    length = x["k"].shape[2]
    if name == "Linformer":
        # One random projection of both, whose rows have the expectation of an average over a group.
        rng = np.random.default_rng(seed)
        group = rng.integers(0, budget, length)
        mix = (group == np.arange(budget)[:, None]).astype(float)
        mix /= np.maximum(mix.sum(1, keepdims=True), 1)
        given: dict[str, Any] = {"E": mix, "F": mix}
        spec = ra.Linformer()
    elif name == "Informer":
        spec = variant("informer", queries=budget)
        given = {"sample": ra.draws.sampled_keys(length, length, count=budget, seed=seed)}
    else:
        spec = variant("skeinformer")
        given = {"pilot": ra.draws.pilot_rows([length], budget, seed=seed)}
        first = given | {"columns": np.zeros((1, 1, 1), np.int64)}
        scores = ra.evaluate(spec, x | first, want=("column_scores",)).column_scores
        given["columns"] = ra.draws.columns(scores, budget, seed=seed)
    return np.asarray(ra.evaluate(spec, x | given).out[0, 0])


def errors(name: str, kind: str, sizes: tuple[int, int, int], budgets: list[int]) -> list[float]:
    """Mean over seeds of the spectral norm of the error, as a share of exact attention's."""
    length, width, seeds = sizes
    found = np.zeros((seeds, len(budgets)))
    for seed in range(seeds):
        x = tokens(kind, length, width, seed)
        exact = ra.attention(x["q"], x["k"], x["v"])[0, 0]
        size = np.linalg.norm(exact, 2)
        found[seed] = [np.linalg.norm(approximated(name, x, n, seed) - exact, 2) / size for n in budgets]
    return [float(e) for e in found.mean(0)]


def measure(small: bool = False) -> Result:
    """The three at equal budgets, and each at the whole budget."""
    for name in ("informer", "skeinformer"):
        variant(name)
    sizes, budgets = ((64, 8, 2), [8, 32]) if small else ((512, 32, 4), [8, 16, 32, 64, 128, 256])
    found = {kind: {name: errors(name, kind, sizes, budgets) for name in NAMES} for kind in KINDS}
    rows = []
    for kind, curves in found.items():
        for name, curve in curves.items():
            told = ", ".join(f"{e:.3f}" for e in curve)
            falls = verdict(curve[-1] < curve[0], "it does not fall")
            rows.append(Row(f"{name}, {kind}, budgets {', '.join(map(str, budgets))}", "falls", told, falls))
        lowest = [min(NAMES, key=lambda name, n=n: curves[name][n]) for n in range(len(budgets))]
        where = ", ".join(f"{n}: {best}" for n, best in zip(budgets, lowest, strict=True))
        every = verdict(all(best == "Skeinformer" for best in lowest), "not at every budget")
        rows.append(Row(f"Skeinformer has the least error, {kind}", "least", where, every))

    def draw(figure: Any) -> None:
        for place, (kind, curves) in enumerate(found.items(), 1):
            axes = figure.add_subplot(1, 2, place)
            for name, curve in curves.items():
                axes.loglog(budgets, curve, "o-", markersize=3, label=name)
            axes.set(title=kind, xlabel=f"budget, of {sizes[0]}", ylabel="relative spectral error")
        axes.legend()

    how = (
        f"Spectral norm of the error over that of exact attention, mean of {sizes[2]} seeds, {sizes[0]} tokens, D "
        f"= {sizes[1]}. Linformer's matrix is a random average over groups of keys, where the paper learns it. "
        "The budget counts what each has few of: mixtures, exact queries, columns."
    )
    return Result(rows, how, draw)
