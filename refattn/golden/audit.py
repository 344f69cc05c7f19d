"""Audit: values recomputed on balls alone, with more bits than they were made with, and the files held to them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.case import Case, Rows
from refattn.engines import certified
from refattn.engines.certified.escalation import by_row
from refattn.errors import Undecided
from refattn.golden import inputs as recipes
from refattn.golden import load
from refattn.golden.build import problem_of, rows_of

Certificates = Mapping[str, certified.Certificate]
# Pairs of a query and a key from which on balls would fill the memory: some query rows stand for all.
LARGE = 1 << 22
SAMPLE = 128


@dataclass(frozen=True)
class Finding:
    """What an audit of one case found; `note` says what was not looked at."""

    name: str
    elements: int
    wrong: tuple[str, ...]
    note: str = ""


def audit(name: str, folder: Path, bits: int) -> Finding:
    """Recompute the values of a case from its manifest on balls of `bits` bits; of a large one, those of some rows."""
    golden = load.load(name, folder)
    case, rows = golden.case(), None
    if case.rows is None and pairs(case) >= LARGE:
        rows = sample(case.sizes["Lq"])
        case = replace(case, rows=Rows(q=rows, k=()))
    problem, found = _certified(case, bits, fast=False)
    wrong: list[str] = []
    elements, left = 0, []
    for output, published in golden.expected.items():
        if rows is not None and not by_row(problem, output):
            left.append(output)
            continue
        listed = np.zeros(published.shape, bool)
        listed.flat[golden.manifest["outputs"][output].get("identity", [])] = True
        stored, listed = (a if rows is None else a[:, :, list(rows)] for a in (published, listed))
        fresh, status = (rows_of(case, output, a) for a in (found[output].value, found[output].status))
        elements += stored.size
        wrong += differences(output, stored, listed, fresh=fresh, status=status, bits=bits)
    note = "" if rows is None else f"{len(rows)} query rows, without {', '.join(left)}"
    return Finding(name, elements, tuple(wrong), note)


def differences(
    output: str, stored: Any, listed: Any, *, fresh: NDArray[np.float64], status: NDArray[np.uint8], bits: int
) -> Iterator[str]:
    """What is wrong with stored values, and with which of them are called identities, by fresh ones."""
    open_, identity = status == certified.ENCLOSED, status == certified.IDENTITY
    differs = ~open_ & (fresh != stored) & ~(np.isnan(fresh) & np.isnan(stored))
    # With more bits a ball may be the point that fewer had to leave to the field.
    mistaken = (identity & ~listed) | (listed & ~identity & (status != certified.EXACT))
    for those, what in (
        (differs, f"are not what {bits} bits prove"),
        (open_, "are called certified but stay undecided"),
        (mistaken & ~open_, "are called an identity and are none, or are one and are not called so"),
    ):
        if those.any():
            yield f"{int(those.sum())} values of {output} {what}"


def reseeded(case: Case, seed: int, bits: int) -> Finding:
    """The case with another seed: what exact slices and pairs of doubles decide against balls of `bits` bits."""
    other = replace(case, seed=seed)
    name = f"{case.name} (seed {seed})"
    try:
        (_, fast), (_, slow) = (_certified(other, bits, fast=which) for which in (True, False))
    except Undecided as error:
        return Finding(name, 0, (), str(error))
    wrong, elements = [], 0
    for output, by in fast.items():
        own = (by.tier == certified.BY_SLICES) | (by.tier == certified.BY_PAIRS)
        told = own & (slow[output].status != certified.ENCLOSED)
        elements += int(told.sum())
        differs = (by.value != slow[output].value) | (by.rne != slow[output].rne) & (other.dtype == "float64")
        differs &= told & ~(np.isnan(by.value) & np.isnan(slow[output].value))
        if differs.any():
            wrong.append(f"{int(differs.sum())} values of {output} are not what {bits} bits prove")
    return Finding(name, elements, tuple(wrong))


def pairs(case: Case) -> int:
    """Pairs of a query and a key, over all heads."""
    return int(np.prod([case.sizes.get(name, 1) for name in ("B", "Hq", "Lq", "Lk")]))


def sample(length: int) -> tuple[int, ...]:
    """Some rows: both ends, and others that no power of two divides evenly."""
    spread = {round(i * (length - 1) / (SAMPLE - 1)) for i in range(SAMPLE)}
    return tuple(sorted(spread))


def _certified(case: Case, bits: int, fast: bool) -> tuple[Any, Certificates]:
    problem, weights = problem_of(case, recipes.inputs(case)), recipes.cotangents(case)
    wrt: Sequence[str] = tuple(problem.real_inputs()) if weights else ()
    return problem, certified.certify(problem, weights, wrt, bits=(bits, 4 * bits), fast=fast)


def audit_all(jobs: Sequence[Callable[[], Finding]], processes: int | None) -> Iterator[Finding]:
    """Findings of many audits, in parallel."""
    count = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(job) for job in jobs]:
            yield future.result()


def jobs_of(folder: Path, names: Sequence[str], bits: int) -> list[Callable[[], Finding]]:
    """Audits of committed cases."""
    return [partial(audit, name, folder, bits) for name in names]


def jobs_of_seeds(cases: Sequence[Case], seeds: int, bits: int) -> list[Callable[[], Finding]]:
    """Audits of the small cases among these with so many other seeds."""
    small = [case for case in cases if pairs(case) < LARGE]
    return [partial(reseeded, case, seed, bits) for seed in range(101, 101 + seeds) for case in small]
