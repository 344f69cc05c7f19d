"""Golden files on disk: JSON in one canonical form, and tensors that say what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from refattn.errors import GoldenFormatError
from refattn.files import safetensors_read

METADATA = {"format": "refattn.golden/1"}
REMEDY = "restore it from the repository, or regenerate it with `refattn golden generate`"


def read_safetensors(data: bytes, source: str, remedy: str = REMEDY) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors file; `source` and `remedy` stand in errors.

    Raises
    ------
    GoldenFormatError
        The bytes are truncated, altered or no safetensors file.
    """
    try:
        return safetensors_read(data)[0]
    except ValueError as error:
        raise GoldenFormatError(f"{source} is not a readable safetensors file ({error}); {remedy}") from None


def json_bytes(value: Any) -> bytes:
    """Canonical JSON: sorted keys, two spaces, short lists on one line, a newline at the end."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (_fold(text) + "\n").encode()


def _fold(text: str) -> str:
    """Lists of plain numbers or strings on one line where that is short."""
    lines, out = text.split("\n"), []
    i = 0
    while i < len(lines):
        if lines[i].rstrip().endswith("["):
            j = i + 1
            while j < len(lines) and not lines[j].rstrip().endswith(("[", "{")) and lines[j].strip() not in ("]", "],"):
                j += 1
            folded = lines[i] + " ".join(line.strip() for line in lines[i + 1 : j]) + lines[j].strip()
            if lines[j].strip() in ("]", "],") and len(folded) <= 120:
                out.append(folded)
                i = j + 1
                continue
        out.append(lines[i])
        i += 1
    return "\n".join(out)


def read_json(path: Path) -> Any:
    """A JSON file's content.

    Raises
    ------
    GoldenFormatError
        The file is missing or no JSON.
    """
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise GoldenFormatError(f"{path} is not readable JSON ({error}); {REMEDY}") from None


def read_bytes(path: Path, remedy: str = REMEDY) -> bytes:
    """A file's bytes.

    Raises
    ------
    GoldenFormatError
        The file is missing or cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise GoldenFormatError(f"{path} cannot be read ({error.strerror or error}); {remedy}") from None
