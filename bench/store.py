"""Results in a file of JSON lines, one a cell: a run that was cut off goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def read(path: Path, key: str) -> dict[str, dict[str, Any]]:
    """Results by cell, of lines with this key only: other versions, another machine or other code are another run."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            kept = json.loads(line)
        except json.JSONDecodeError:  # the last line of a run that was killed while it wrote
            continue
        if kept.get("key") == key:
            found[kept["cell"]] = kept
    return found


def append(path: Path, key: str, kept: dict[str, Any]) -> None:
    """One line more, on a line of its own even after a torn one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torn = path.exists() and path.stat().st_size and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write(("\n" if torn else "") + json.dumps(kept | {"key": key}) + "\n")


def whole(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)
