"""Generate the suite so that it can be stopped and taken up again: finished cases wait beside, and move in together."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from refattn.case import Case
from refattn.errors import GoldenFormatError, SpecError
from refattn.files import write
from refattn.golden import errata
from refattn.golden.build import Built
from refattn.golden.load import CORE, INDEX, read_index
from refattn.golden.suite import build_all, cases, paths, publish


def fingerprint() -> str:
    """Hash of the package's sources: cases finished by other sources are not taken up."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(files("refattn"))).rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def waiting_room(folder: Path) -> Path:
    """Where finished cases of an unfinished run wait."""
    return folder.parent / f".{folder.name}-unfinished-{fingerprint()}"


def generate(
    folder: Path,
    todo: list[Case],
    processes: int | None,
    done: Callable[[Case, Built | None], None],
    erratum: str = "",
) -> None:
    """Build every case and publish the suite; `done` is told of each, with None for one that an earlier run finished.

    Raises
    ------
    GoldenFormatError
        A released file would change, and no `erratum` says why; nothing is written.
    SpecError
        The folder holds cases that are not among these, though the suite has them.
    StorageError
        The disk is full; what was published before stands as it was.
    """
    of = todo[0].suite if todo else CORE
    _refuse_a_part(folder, {case.name for case in todo}, of)
    room = waiting_room(folder)
    for stale in folder.parent.glob(f".{folder.name}-unfinished-*"):
        if stale != room:
            shutil.rmtree(stale, ignore_errors=True)
    finished = {}
    for case in todo:
        manifest, tensors = paths(room, case.name)
        if tensors.exists() and manifest.exists():
            finished[case.name] = (manifest.read_bytes(), tensors.read_bytes())
            done(case, None)
    for case, built in build_all([c for c in todo if c.name not in finished], processes):
        manifest, tensors = paths(room, case.name)
        write(manifest, built.manifest)
        write(tensors, built.tensors)
        finished[case.name] = (built.manifest, built.tensors)
        done(case, built)
    if not erratum:
        for name in errata.changed(folder, finished):
            raise GoldenFormatError(
                f"{name} was released with other bytes, or is gone: if those were wrong, say why with --erratum"
            )
    publish(folder, finished, of)
    if erratum:
        errata.record(folder, erratum, time.strftime("%Y-%m-%d", time.gmtime()))
    shutil.rmtree(room, ignore_errors=True)


def _refuse_a_part(folder: Path, names: set[str], of: str) -> None:
    if (folder / INDEX).exists():
        there = {entry["name"] for entry in read_index(folder)["cases"]}
        left = sorted(there & {case.name for case in cases(of)} - names)
        if left:
            raise SpecError(f"{folder} holds {left[0]} and more, and a part cannot replace it: name another --folder")
