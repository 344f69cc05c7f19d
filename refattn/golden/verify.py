"""Regenerate the cases of a suite and compare every byte with the committed files, the index and strays included."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from refattn.case import Case
from refattn.errors import GoldenFormatError
from refattn.golden import suite
from refattn.golden.build import Built
from refattn.golden.errata import broken
from refattn.golden.load import CORE, INDEX, read_index


@dataclass(frozen=True)
class Difference:
    """A committed file that is not what the case gives today."""

    file: str
    what: str


def verify(
    folder: Path, todo: list[Case], processes: int | None, done: Callable[[Case, Built], None]
) -> list[Difference]:
    """How the files of a suite differ from what its cases give; `done` is told of each case.

    Of tensors that are not in the repository the index has the sha256.
    """
    of = todo[0].suite if todo else CORE
    hashes, differences = {}, []
    try:
        hashes = {entry["name"]: entry["tensors"] for entry in read_index(folder)["cases"]}
    except GoldenFormatError as error:
        differences.append(Difference(INDEX, str(error)))
    files = {}
    for case, built in suite.build_all(todo, processes):
        done(case, built)
        files[case.name] = (built.manifest, built.tensors)
        differences += compare_committed(folder, case, built, hashes)
    if files.keys() == {c.name for c in suite.cases(of)}:
        if hashes and (folder / INDEX).read_bytes() != suite.index_bytes(files, of):
            differences.append(Difference(INDEX, "does not hold the hashes of these files"))
        strays = suite.strays(folder, set(files))
        differences += [Difference(str(p.relative_to(folder)), "belongs to no case") for p in strays]
    differences += [Difference(name, what) for name, what in broken(folder)]
    return sorted(differences, key=lambda d: d.file)


def compare_committed(folder: Path, case: Case, built: Built, hashes: Mapping[str, str]) -> list[Difference]:
    """How the files of a case differ from the built bytes; `hashes` are those of its tensors, by case."""
    found = []
    for path, data in zip(suite.paths(folder, case.name), (built.manifest, built.tensors), strict=True):
        relative = str(path.relative_to(folder))
        if path.exists():
            if path.read_bytes() != data:
                at = first_difference(path.read_bytes(), data)
                found.append(Difference(relative, f"differs from byte {at} on"))
        elif case.suite == CORE or path.suffix == ".json":
            found.append(Difference(relative, "is missing"))
        elif hashes.get(case.name) != hashlib.sha256(data).hexdigest():
            found.append(Difference(relative, "has not the sha256 that the index records"))
    return found


def first_difference(a: bytes, b: bytes) -> int:
    """Offset of the first byte in which two files differ."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
