"""States: what a streaming variant carries from one call to the next, as plain named arrays."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.errors import SpecError, StorageError
from refattn.files import safetensors_bytes, safetensors_read, write
from refattn.spec import Spec, from_json

FORMAT = "refattn.state/1"


class State(Mapping[str, NDArray[Any]]):
    """Read-only arrays of a variant's memory after `length` tokens; those of an unfinished segment are among them.

    All sequences of a batch have come equally far. No step changes a state: an older one may be stepped from again.
    """

    def __init__(self, spec: Spec, length: int, arrays: Mapping[str, NDArray[Any]]) -> None:
        if type(length) is not int or length < 0:
            raise SpecError(f"a state's length is a number of tokens from 0 on; given: {length!r}")
        self.spec, self.length = spec, length
        self._arrays = {name: _readonly(array) for name, array in arrays.items()}

    def __getitem__(self, name: str) -> NDArray[Any]:
        """The array of that name."""
        return self._arrays[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in the variant's order."""
        return iter(self._arrays)

    def __len__(self) -> int:
        """Count of arrays."""
        return len(self._arrays)

    def __repr__(self) -> str:
        """Variant, length, shapes and dtypes."""
        parts = (f"{name}: {tuple(a.shape)} {a.dtype}" for name, a in self._arrays.items())
        return f"State({self.spec.variant}, length {self.length}, {', '.join(parts)})"

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, whole or not at all; spec and length are its metadata.

        Raises
        ------
        StorageError
            The file cannot be written.
        """
        metadata = {"format": FORMAT, "spec": json.dumps(self.spec.to_json()), "length": str(self.length)}
        write(Path(path), safetensors_bytes(self._arrays, metadata))


def read(path: str | Path, find: Callable[[str], type[Spec]]) -> State:
    """The state that `State.save` wrote, bit for bit; `find` gives the Spec class of a variant's name.

    Raises
    ------
    StorageError
        The file is missing, damaged, or holds no state.
    """
    try:
        arrays, metadata = safetensors_read(Path(path).read_bytes())
        if metadata.get("format") != FORMAT:
            raise ValueError(f"its format is {metadata.get('format')!r}, not {FORMAT!r}")
        spec = json.loads(metadata["spec"])
        return State(from_json(spec, find), int(metadata["length"]), arrays)
    except (OSError, ValueError, KeyError) as error:
        raise StorageError(f"{path} holds no state that can be read: {error}") from None


def _readonly(array: NDArray[Any]) -> NDArray[Any]:
    view = np.asanyarray(array).view()
    view.flags.writeable = False
    return view
