"""Generate the suite so that it can be stopped and taken up again: finished cases wait beside, and move in together."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path

from refattn.case import Case
from refattn.files import write
from refattn.golden.build import Built
from refattn.golden.suite import build_all, paths, publish


def fingerprint() -> str:
    """Hash of the package's sources: cases finished by other sources are not taken up."""
    digest = hashlib.sha256()
    for path in sorted(Path(str(files("refattn"))).rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()[:16]


def waiting_room(folder: Path) -> Path:
    """Where finished cases of an unfinished run wait."""
    return folder.parent / f".{folder.name}-unfinished-{fingerprint()}"


def generate(folder: Path, todo: list[Case], processes: int | None, done: Callable[[Case, Built | None], None]) -> None:
    """Build every case and publish the suite; `done` is told of each, with None for one that an earlier run finished.

    Raises
    ------
    StorageError
        The disk is full; what was published before stands as it was.
    """
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
    publish(folder, finished)
    shutil.rmtree(room, ignore_errors=True)
