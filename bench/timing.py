"""How samples are taken and summed up; nothing here knows what is timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

SAMPLE_S = 0.01  # a sample lasts at least this long: short calls are repeated
WARM_S = 0.05  # a call shorter than this is made once untimed before each sample, to find its caches as it left them
REST_S = 0.005  # between two contenders: threads that wait busily for more work have gone to sleep by then
BLOCK_REST_S = 0.3
MOST_TURNS = 31

Sampler = Callable[[str, int, bool], float]  # (contender, calls, warm) -> seconds a call


@dataclass(frozen=True)
class Plan:
    """How often a contender is timed, and with how many calls each time."""

    calls: int
    turns: int
    warm: bool


def plan(seconds: float, share: float) -> Plan:
    """For a call of that many seconds and that much time in all: at least once, 31 times at most."""
    calls = max(1, math.ceil(SAMPLE_S / max(seconds, 1e-9)))
    warm = seconds < WARM_S
    turn = seconds * (calls + warm) + REST_S
    return Plan(calls, min(max(int(share / turn), 1), MOST_TURNS), warm)


def plans(probes: Mapping[str, float], budget: float) -> dict[str, Plan]:
    """The budget in equal shares; what the quick ones leave over goes to the slow ones."""
    found: dict[str, Plan] = {}
    left = budget
    for count, name in zip(range(len(probes), 0, -1), sorted(probes, key=lambda n: probes[n]), strict=True):
        found[name] = plan(probes[name], left / count)
        left -= found[name].turns * probes[name] * (found[name].calls + found[name].warm)
    return {name: found[name] for name in probes}


def interleaved(sample: Sampler, planned: Mapping[str, Plan]) -> dict[str, list[float]]:
    """Turn by turn: each contender once, then all again. Who has fewer turns has them spread over the whole."""
    found: dict[str, list[float]] = {name: [] for name in planned}
    most = max((p.turns for p in planned.values()), default=0)
    for turn in range(most):
        for name, p in planned.items():
            if (turn + 1) * p.turns // most > turn * p.turns // most:
                time.sleep(REST_S)
                found[name].append(sample(name, p.calls, p.warm))
    return found


def by_blocks(sample: Sampler, planned: Mapping[str, Plan]) -> dict[str, list[float]]:
    """Contender by contender: all its turns without a break, after a rest."""
    found: dict[str, list[float]] = {}
    for name, p in planned.items():
        time.sleep(BLOCK_REST_S)
        found[name] = [sample(name, p.calls, p.warm) for _ in range(p.turns)]
    return found


@dataclass(frozen=True)
class Spread:
    """Samples in three numbers and their count."""

    median: float
    least: float
    greatest: float
    count: int


def spread(samples: list[float]) -> Spread:
    """Median, least and greatest."""
    return Spread(float(np.median(samples)), min(samples), max(samples), len(samples))


def geometric_mean(values: list[float]) -> float:
    """NaN for none."""
    return float(np.exp(np.mean(np.log(values)))) if values else math.nan
