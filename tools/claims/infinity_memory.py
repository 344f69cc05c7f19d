"""C7: what ∞-former's continuous memory holds, forgets, counts and, where it is sticky, keeps."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

import refattn as ra
from claims.claim import Result, Row, variant, verdict

TITLE = "∞-former: reconstruction, age, counting, sticky memories"
SIGMAS, TAU, READ = (0.01, 0.05), 0.75, 0.03


class Sizes(NamedTuple):
    """Tokens of a segment, basis functions tried, samples and bins, segments that pass, symbols that are counted."""

    segment: int
    bases: tuple[int, ...]
    samples: int
    bins: int
    passing: int
    symbols: int


SMALL, FULL = Sizes(48, (16, 48), 48, 32, 4, 5), Sizes(512, (32, 64, 128, 256, 512), 256, 128, 8, 20)


def signal(memory: np.ndarray, t: np.ndarray, read: float = 0.0) -> np.ndarray:
    """Bᵀψ(t), of Gaussians whose means are spread over [0, 1], both widths at each; or what N(t, read²) reads of it."""
    means = np.linspace(0, 1, memory.shape[0] // len(SIGMAS)).repeat(len(SIGMAS))
    widths = np.hypot(np.tile(SIGMAS, memory.shape[0] // len(SIGMAS)), read)
    z = (t[:, None] - means) / widths
    return np.asarray(np.exp(-z * z / 2) / (widths * math.sqrt(2 * math.pi)) @ memory)


def arrays(x: np.ndarray, basis: int, at: float | None = None) -> dict[str, np.ndarray]:
    """Inputs for tokens x (L,E) whose queries see nothing of their own, or all look at one place."""
    length, width = x.shape
    found = {"x": x[None], "q": np.zeros((1, 1, length, 1))}
    found |= {"wk": np.zeros((1, width, 1)), "wv": np.zeros((1, width, 1))}
    found |= {"w_mu": np.zeros(basis), "w_sigma": np.zeros(basis)}
    if at is not None:
        found |= {"b_mu": np.array([math.log(at / (1 - at))]), "b_sigma": np.array([math.log(math.expm1(READ**2))])}
    return found


def fitted(x: np.ndarray, spec: Any) -> np.ndarray:
    """The memory (N,E) once the segments in x have ended and one more token has come."""
    given = arrays(np.concatenate([x, np.zeros((1, x.shape[1]))]), spec.basis)
    return np.asarray(ra.evaluate(spec, given, want=("state",)).state["memory"][0])


def error(found: np.ndarray, exact: np.ndarray) -> float:
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def waves(length: int, seed: int) -> np.ndarray:
    """Two channels of five slow waves each."""
    rng, t = np.random.default_rng(seed), (np.arange(length) + 0.5) / length
    phase, size = rng.uniform(0, 2 * math.pi, (5, 2)), rng.standard_normal((5, 2))
    return np.asarray(sum(size[n] * np.sin(2 * math.pi * (n + 1) * t[:, None] + phase[n]) for n in range(5)))


def reconstruction(s: Sizes) -> list[float]:
    """Error of one segment's signal for each count of basis functions."""
    x, t = waves(s.segment, 0), (np.arange(s.segment) + 0.5) / s.segment
    specs = [variant("infinity_former", segment=s.segment, basis=n, sigmas=SIGMAS, ridge=0.5) for n in s.bases]
    return [error(signal(fitted(x, spec), t), x) for spec in specs]


def ages(s: Sizes, draws: int = 4) -> list[float]:
    """Mean error of what is n segments old, which lies between τⁿ⁺¹ and τⁿ."""
    options = {"segment": s.segment, "basis": s.bases[-1], "sigmas": SIGMAS, "samples": s.samples, "ridge": 0.5}
    spec, part = variant("infinity_former", contraction=TAU, **options), (np.arange(s.segment) + 1) / s.segment
    found = np.zeros((draws, s.passing - 1))
    for draw in range(draws):
        x = [waves(s.segment, 100 * draw + n) for n in range(s.passing)]
        memory = fitted(np.concatenate(x), spec)
        for age in range(s.passing - 1):
            t = TAU ** (age + 1) + (TAU**age - TAU ** (age + 1)) * part
            found[draw, age] = error(signal(memory, t), x[-1 - age])
    return [float(e) for e in found.mean(0)]


def counting(s: Sizes) -> tuple[Any, Any]:
    """How often each symbol occurs, and the same by integrating the signal of one-hot tokens."""
    rng = np.random.default_rng(1)
    # Counts 1, 2, 3, ... times the same, so that no two are near each other.
    share = np.arange(1, s.symbols + 1)
    counts = s.segment * share // share.sum()
    tokens = rng.permutation(np.repeat(np.arange(s.symbols), counts))
    onehot = np.eye(s.symbols)[tokens]
    memory = fitted(onehot, variant("infinity_former", segment=tokens.size, basis=s.bases[-1], sigmas=SIGMAS))
    t = (np.arange(20 * tokens.size) + 0.5) / (20 * tokens.size)
    found = signal(memory, t).mean(0) * tokens.size
    return counts, found


def marked(s: Sizes, sticky: bool) -> list[float]:
    """The most that a density reads of a mark of size 1 after each segment; all queries look at the past's middle."""
    options = {"segment": s.segment, "basis": s.bases[-1], "sigmas": SIGMAS, "samples": s.samples, "bins": s.bins}
    spec = variant("infinity_former", contraction=TAU, sticky=sticky, bias=True, ridge=0.5, **options)
    state = ra.init_state(spec, B=1, E=1)
    rng, place = np.random.default_rng(2), (np.arange(s.segment) + 0.5) / s.segment
    t, left, drawn = np.linspace(0, 1, 2001), [], np.zeros(s.samples, np.int64)
    for n in range(s.passing + 1):
        mark = (abs(place - TAU / 2) < 0.06) * 1.0 if n == 0 else np.zeros(s.segment)
        given = arrays(mark[:, None], spec.basis, TAU / 2)
        if sticky:
            given["drawn"] = np.broadcast_to(drawn, (1, s.segment, s.samples))
        found, state = ra.step(spec, state, given, want=("out", "histogram") if sticky else ("out",))
        if n:
            left.append(float(signal(state["memory"][0], t, READ).max()))
        if sticky and n:
            p = found.histogram[0, -1]
            drawn = np.sort(rng.choice(s.bins, s.samples, p=p / p.sum()))
    return left


def measure(small: bool = False) -> Result:
    """No training anywhere: signals go in, and the memory is read."""
    s = SMALL if small else FULL
    by_basis, by_age, (counts, found) = reconstruction(s), ages(s), counting(s)
    off, ordered = abs(found - counts).max(), (np.argsort(found) == np.argsort(counts)).all()
    plain, sticky = marked(s, False), marked(s, True)
    listed = ", ".join(f"{n}: {e:.1e}" for n, e in zip(s.bases, by_basis, strict=True))
    worse = by_age[-1] > by_age[0]
    rows = [
        Row(f"A signal of {s.segment} tokens is kept in N coefficients", "better with N", f"relative error {listed}",
            verdict(by_basis[-1] < by_basis[0], "not better")),
        Row("The past is kept at a resolution that falls with age", "older is coarser",
            "relative error by age " + ", ".join(f"{e:.2f}" for e in by_age), verdict(worse, "not so")),
        Row(f"Tokens are counted by integrating: {s.symbols} symbols", "sorted by frequency",
            f"order {'right' if ordered else 'wrong'}, counts within {off:.2f} tokens",
            verdict(ordered, "wrong order")),
        Row("Sticky memories keep what is looked at", "sticky above plain",
            f"read of a mark after {len(plain)} segments: {sticky[-1]:.2f} sticky, {plain[-1]:.2f} plain",
            verdict(sticky[-1] > plain[-1], "plain keeps more")),
        Row("Perplexities on WikiText-103 and PG-19", "24.22 with sticky memories", "-", "no: needs training"),
    ]  # fmt: skip

    def draw(figure: Any) -> None:
        for place, (x, series, name) in enumerate(
            [(s.bases, {"error": by_basis}, "N"), (range(len(by_age)), {"error": by_age}, "age in segments"),
             (counts, {"integral": found, "": counts}, "count"),
             (range(1, len(plain) + 1), {"sticky": sticky, "plain": plain}, "segments since")], 1
        ):  # fmt: skip
            axes = figure.add_subplot(1, 4, place)
            for label, y in series.items():
                axes.plot(x, y, "o-" if label else "k:", markersize=3, label=label or None)
            axes.set(xlabel=name, yscale="log" if place == 1 else "linear", ylim=None if place == 1 else (0, None))
            axes.legend()

    how = (
        f"Segments of {s.segment} tokens, sigmas {SIGMAS}, contraction {TAU}; the memory is that of the state. "
        f"For the mark every query looks at the middle of the past, with a density {READ} wide, and bins are "
        "drawn from the histogram."
    )
    return Result(rows, how, draw)
