"""What makes a suite immutable: the hashes of its files as released, and an erratum for every one that has changed.

`errata.json` of a suite's folder holds both. A released case keeps its bytes; where one was wrong, an erratum says
which file, its sha256 before and after, when, and why. Cases may be added: the next version releases them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from refattn.errors import GoldenFormatError
from refattn.files import write
from refattn.golden.load import ERRATA, read_errata, read_index
from refattn.golden.store import json_bytes

FILES = ("manifest", "tensors")


def current(folder: Path) -> dict[str, dict[str, str]]:
    """sha256 of both files of every case, as the index has them."""
    return {entry["name"]: {file: entry[file] for file in FILES} for entry in read_index(folder)["cases"]}


def corrected(told: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """The released hashes with every erratum applied, in their order.

    Raises
    ------
    GoldenFormatError
        An erratum corrects a case that was never released, or a file that had another hash.
    """
    found = {name: dict(files) for name, files in told["released"].items()}
    for n, erratum in enumerate(told["errata"]):
        name, file = erratum["case"], erratum["file"]
        if found.get(name, {}).get(file) != erratum["old"]:
            raise GoldenFormatError(f"{ERRATA}, field errata.{n}: the {file} of {name} did not have this hash before")
        found[name][file] = erratum["new"]
    return found


def broken(folder: Path) -> Iterator[tuple[str, str]]:
    """Released files that have changed without an erratum: their name, and what is wrong."""
    try:
        promised = corrected(read_errata(folder))
        now = current(folder) if promised else {}
    except GoldenFormatError as error:
        yield ERRATA, str(error)
        return
    for name, files in promised.items():
        for file in FILES:
            if name not in now:
                yield f"{name} ({file})", "was released and is gone"
            elif now[name][file] != files[file]:
                yield f"{name} ({file})", "was released with other bytes, and no erratum says why they changed"


def changed(folder: Path, files: Mapping[str, tuple[bytes, bytes]]) -> list[str]:
    """Released cases whose files, manifest or tensors, are about to change or to go."""
    return [
        name
        for name, hashes in corrected(read_errata(folder)).items()
        if [hashlib.sha256(data).hexdigest() for data in files.get(name, ())] != [hashes[file] for file in FILES]
    ]


def release(folder: Path, version: str) -> int:
    """Take the hashes of every case that is new into the record of what was released; their number.

    Raises
    ------
    GoldenFormatError
        A released file has changed without an erratum.
    """
    wrong = next(broken(folder), None)
    if wrong is not None:
        remedy = "restore it, or `refattn golden generate --erratum` with a reason"
        raise GoldenFormatError(f"{wrong[0]} {wrong[1]}: {remedy}")
    told, now = read_errata(folder), current(folder)
    new = {name: files for name, files in now.items() if name not in told["released"]}
    write(folder / ERRATA, json_bytes(told | {"version": version, "released": dict(told["released"]) | new}))
    return len(new)


def record(folder: Path, why: str, date: str) -> int:
    """Write an erratum with this reason for every released file that the index has with other bytes; their number."""
    told, now = read_errata(folder), current(folder)
    promised = corrected(told)
    added = [
        {"case": name, "file": file, "old": files[file], "new": now[name][file], "why": why, "date": date}
        for name, files in promised.items()
        for file in FILES
        if name in now and now[name][file] != files[file]
    ]
    write(folder / ERRATA, json_bytes(told | {"errata": [*told["errata"], *added]}))
    return len(added)
