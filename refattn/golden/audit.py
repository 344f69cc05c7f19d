"""Audit committed files: recompute their values with more bits than they were made with, and hold them to it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from refattn.engines import certified
from refattn.golden import inputs as recipes
from refattn.golden import load
from refattn.golden.build import problem_of, rows_of


@dataclass(frozen=True)
class Finding:
    """What an audit of one case found."""

    name: str
    elements: int
    wrong: tuple[str, ...]


def audit(folder: Path, name: str, bits: int) -> Finding:
    """Recompute every value of a case from its manifest at `bits` bits."""
    golden = load.load(name, folder)
    case = golden.case()
    problem = problem_of(case, golden.inputs())
    weights = recipes.cotangents(case)
    found = certified.certify(problem, weights, tuple(problem.real_inputs()) if weights else (), bits=(bits, 4 * bits))
    wrong, elements = [], 0
    for output, stored in golden.expected.items():
        fresh, status = (rows_of(case, output, a) for a in (found[output].value, found[output].status))
        elements += stored.size
        listed = np.zeros(stored.shape, bool)
        listed.flat[golden.manifest["outputs"][output].get("identity", [])] = True
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
                wrong.append(f"{int(those.sum())} values of {output} {what}")
    return Finding(name, elements, tuple(wrong))


def audit_all(folder: Path, names: list[str], bits: int, processes: int | None) -> Iterator[Finding]:
    """Findings of many cases, in parallel."""
    count = processes or os.cpu_count() or 1
    with ProcessPoolExecutor(count, mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(audit, folder, name, bits) for name in names]:
            yield future.result()
