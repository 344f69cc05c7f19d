"""The whole suite: every case of every variant, generated in parallel, published atomically, verified byte for byte."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path

from refattn import registry
from refattn.case import Case
from refattn.errors import GoldenFormatError, SpecError
from refattn.files import write
from refattn.golden.build import SCHEMA, Built, build
from refattn.golden.load import INDEX, read_index
from refattn.golden.store import json_bytes
from refattn.philox import identifier

SUITE = "core"


def cases() -> list[Case]:
    """Every case that the registry's variants offer, sorted by name.

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
    return found


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


def publish(folder: Path, files: dict[str, tuple[bytes, bytes]]) -> None:
    """Write cases and, last, the index that names them; files of cases that are gone are removed."""
    for name, (manifest, tensors) in sorted(files.items()):
        for path, data in zip(paths(folder, name), (manifest, tensors), strict=True):
            if not path.exists() or path.read_bytes() != data:
                write(path, data)
    write(folder / INDEX, index_bytes(files))
    kept = {path for name in files for path in paths(folder, name)} | {folder / INDEX}
    for path in strays(folder, kept):
        path.unlink()


def index_bytes(files: dict[str, tuple[bytes, bytes]]) -> bytes:
    """The index: every case with the sha256 of its two files."""
    entries = [
        {"name": name, "manifest": hashlib.sha256(m).hexdigest(), "tensors": hashlib.sha256(t).hexdigest()}
        for name, (m, t) in sorted(files.items())
    ]
    return json_bytes({"schema": SCHEMA, "suite": SUITE, "cases": entries})


def strays(folder: Path, kept: set[Path]) -> list[Path]:
    """Golden files that no case owns."""
    found = (p for pattern in ("*.json", "*.safetensors") for p in folder.rglob(pattern))
    return sorted(p for p in found if p not in kept)


@dataclass(frozen=True)
class Difference:
    """A committed file that is not what the case gives today."""

    file: str
    what: str


def compare_committed(folder: Path, name: str, built: Built) -> list[Difference]:
    """How the committed files of a case differ from the built bytes."""
    found = []
    for path, data in zip(paths(folder, name), (built.manifest, built.tensors), strict=True):
        relative = str(path.relative_to(folder))
        if not path.exists():
            found.append(Difference(relative, "is missing"))
        elif path.read_bytes() != data:
            at = first_difference(path.read_bytes(), data)
            found.append(Difference(relative, f"differs from byte {at} on"))
    return found


def first_difference(a: bytes, b: bytes) -> int:
    """Offset of the first byte in which two files differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def verify(
    folder: Path, todo: list[Case], processes: int | None, done: Callable[[Case, Built], None]
) -> list[Difference]:
    """Regenerate cases and compare every byte, the index and strays included; `done` is told of each case."""
    whole = {c.name for c in todo} == {c.name for c in cases()}
    differences, files = [], {}
    for case, built in build_all(todo, processes):
        done(case, built)
        files[case.name] = (built.manifest, built.tensors)
        differences += compare_committed(folder, case.name, built)
    if whole:
        try:
            read_index(folder)
            if (folder / INDEX).read_bytes() != index_bytes(files):
                differences.append(Difference(INDEX, "does not hold the hashes of these files"))
        except GoldenFormatError as error:
            differences.append(Difference(INDEX, str(error)))
        kept = {path for name in files for path in paths(folder, name)} | {folder / INDEX}
        differences += [Difference(str(p.relative_to(folder)), "belongs to no case") for p in strays(folder, kept)]
    return sorted(differences, key=lambda d: d.file)
