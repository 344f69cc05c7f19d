"""A whole suite: every case of every variant, built in parallel and published atomically."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

from refattn import registry
from refattn.case import Case
from refattn.errors import SpecError
from refattn.files import write
from refattn.golden.build import SCHEMA, Built, build
from refattn.golden.load import CORE, ERRATA, INDEX
from refattn.golden.store import json_bytes
from refattn.philox import identifier


def cases(of: str = CORE) -> list[Case]:
    """Every case of a suite that the registry's variants offer, sorted by name.

    Raises
    ------
    SpecError
        Two cases share a name, or two names share a Philox identifier and so would share random words.
    """
    found = sorted((case for info in registry.variants().values() for case in info.cases()), key=lambda c: c.name)
    for one, other in pairwise(found):
        if one.name == other.name:
            raise SpecError(f"two cases are called {one.name!r}: a name is a case's identity")
    owners: dict[int, str] = {}
    for case in found:
        other_name = owners.setdefault(identifier(case.name), case.name)
        if other_name != case.name:
            raise SpecError(f"{case.name!r} and {other_name!r} have the same Philox identifier: rename one")
    return [case for case in found if case.suite == of]


def work(case: Case) -> float:
    """A case's rough cost, to start the longest first."""
    spec, module = registry.whole(case.spec)
    total, _ = module.operations(module.resolve(spec, case.sizes), case.sizes)
    share = 1.0 if case.rows is None else len(case.rows.q) / case.sizes["Lq"]
    return float(total * share * (3 if "vjp" in case.want else 1))


def build_all(todo: Iterable[Case], processes: int | None = None) -> Iterator[tuple[Case, Built]]:
    """Built cases as they are done, the longest started first."""
    ordered = sorted(todo, key=work, reverse=True)
    count = processes or os.cpu_count() or 1
    if count == 1 or len(ordered) < 2:
        yield from ((case, build(case)) for case in ordered)
        return
    # Fresh interpreters: a forked child of a process that runs threads may hang.
    pool = ProcessPoolExecutor(count, mp_context=get_context("spawn"))
    try:
        futures = {pool.submit(build, case): case for case in ordered}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def paths(folder: Path, name: str) -> tuple[Path, Path]:
    """Manifest and tensors of a case."""
    return folder / f"{name}.json", folder / f"{name}.safetensors"


def publish(folder: Path, files: dict[str, tuple[bytes, bytes]], of: str = CORE) -> None:
    """Write cases and, last, the index that names them; files of cases that are gone are removed."""
    for name, (manifest, tensors) in sorted(files.items()):
        for path, data in zip(paths(folder, name), (manifest, tensors), strict=True):
            if not path.exists() or path.read_bytes() != data:
                write(path, data)
    write(folder / INDEX, index_bytes(files, of))
    for path in strays(folder, set(files)):
        path.unlink()


def index_bytes(files: dict[str, tuple[bytes, bytes]], of: str = CORE) -> bytes:
    """The index: every case with the sha256 of its two files."""
    entries = [
        {"name": name, "manifest": hashlib.sha256(m).hexdigest(), "tensors": hashlib.sha256(t).hexdigest()}
        for name, (m, t) in sorted(files.items())
    ]
    return json_bytes({"schema": SCHEMA, "suite": of, "cases": entries})


def strays(folder: Path, names: set[str]) -> list[Path]:
    """Golden files that none of the cases named owns."""
    kept = {path for name in names for path in paths(folder, name)} | {folder / file for file in (INDEX, ERRATA)}
    found = (p for pattern in ("*.json", "*.safetensors") for p in folder.rglob(pattern))
    return sorted(p for p in found if p not in kept)
