"""Golden files on disk: safetensors written deterministically, JSON in one canonical form, nothing half-written."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from numpy.typing import NDArray

from refattn.errors import GoldenFormatError, StorageError

_NAMES = {"float64": "F64", "bfloat16": "BF16", "float32": "F32", "float16": "F16"}
_DTYPES = {"F64": np.float64, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}
METADATA = {"format": "refattn.golden/1"}


def safetensors_bytes(tensors: Mapping[str, NDArray[Any]]) -> bytes:
    """A safetensors file: names sorted, data little-endian in C order, header padded with spaces to 8 bytes.

    The safetensors library reads it; it is written here because its own order of tensors is not promised to stay.
    """
    header: dict[str, Any] = {"__metadata__": METADATA}
    chunks, position = [], 0
    for name in sorted(tensors):
        array = np.asarray(tensors[name])
        data = array.astype(array.dtype.newbyteorder("<"), copy=False).tobytes()
        header[name] = {
            "dtype": _NAMES[array.dtype.name],
            "shape": list(array.shape),
            "data_offsets": [position, position + len(data)],
        }
        chunks.append(data)
        position += len(data)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


REMEDY = "restore it from the repository, or regenerate it with `refattn golden generate`"


def read_safetensors(data: bytes, source: str, remedy: str = REMEDY) -> dict[str, NDArray[Any]]:
    """Tensors of a safetensors file; `source` and `remedy` stand in errors.

    Raises
    ------
    GoldenFormatError
        The bytes are truncated, altered or no safetensors file.
    """
    try:
        found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
        for name, t in found.items():
            if t["dtype"] not in _DTYPES:
                raise ValueError(f"tensor {name!r} is {t['dtype']}, not one of {', '.join(_DTYPES)}")
        return {n: np.frombuffer(bytes(t["data"]), _DTYPES[t["dtype"]]).reshape(t["shape"]) for n, t in found.items()}
    except (safetensors.SafetensorError, ValueError) as error:
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


def write(path: Path, data: bytes) -> None:
    """Write beside the target and rename: the file is whole or as it was.

    Raises
    ------
    StorageError
        The disk is full or the folder cannot be written; what was written is removed.
    """
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise StorageError(
                f"cannot write {path} ({len(data)} bytes): {error.strerror or error}; the file is as it was before. "
                "Free space or choose another folder, then run the same command again"
            ) from None
        raise
