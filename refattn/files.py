"""Files that are whole or as they were, and safetensors written deterministically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from refattn.errors import EngineUnavailable, StorageError

_DTYPES: dict[str, Any] = {"F64": np.float64, "BF16": ml_dtypes.bfloat16, "F32": np.float32, "F16": np.float16}
_DTYPES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_NAMES = {np.dtype(dtype).name: name for name, dtype in _DTYPES.items()}


def safetensors_bytes(tensors: Mapping[str, NDArray[Any]], metadata: Mapping[str, str]) -> bytes:
    """A safetensors file: names sorted, data little-endian in C order, header padded with spaces to 8 bytes.

    The safetensors library reads it; it is written here because its own order of tensors is not promised to stay.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
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


def safetensors_read(data: bytes) -> tuple[dict[str, NDArray[Any]], dict[str, str]]:
    """Tensors and metadata of a safetensors file.

    Raises
    ------
    ValueError
        The bytes are truncated, altered or no safetensors file, or a tensor has another dtype than these six.
    EngineUnavailable
        The package safetensors is not installed.
    """
    try:
        import safetensors
    except ModuleNotFoundError:
        raise EngineUnavailable(
            "reading safetensors needs the package of that name: pip install 'refattn[golden]'"
        ) from None
    try:
        found = dict(safetensors.deserialize(data))  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError as error:
        raise ValueError(str(error)) from None
    for name, t in found.items():
        if t["dtype"] not in _DTYPES:
            raise ValueError(f"tensor {name!r} is {t['dtype']}, not one of {', '.join(_DTYPES)}")
    arrays = {n: np.frombuffer(bytes(t["data"]), _DTYPES[t["dtype"]]).reshape(t["shape"]) for n, t in found.items()}
    return arrays, json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]).get("__metadata__", {})


def write(path: Path, data: bytes) -> None:
    """Write beside the target and rename: the file is whole or as it was.

    Raises
    ------
    StorageError
        The disk is full or the folder cannot be written; what was written is removed.
    """
    import tempfile

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
