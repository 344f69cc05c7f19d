"""Read committed golden cases, refusing whatever is damaged, altered or foreign."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
from numpy.typing import NDArray

from refattn import registry
from refattn.case import Case, Edit, Recipe, Rows
from refattn.dtypes import Overflow
from refattn.errors import GoldenFormatError, RefattnError, SpecError
from refattn.golden import inputs as recipes
from refattn.golden.build import SCHEMA
from refattn.golden.store import REMEDY, read_bytes, read_json, read_safetensors
from refattn.spec import Spec

INDEX, ERRATA = "index.json", "errata.json"
CORE, LARGE = "core", "large"
FOLDERS = {CORE: "v1", LARGE: "v1_large"}


def folder_name(suite: str) -> str:
    """What a suite's folder is called.

    Raises
    ------
    GoldenFormatError
        There is no suite of that name.
    """
    if suite not in FOLDERS:
        raise GoldenFormatError(f"unknown suite {suite!r}; there are {' and '.join(FOLDERS)}")
    return FOLDERS[suite]


def folder_of_suite(suite: str = CORE) -> Path:
    """A committed suite: the wheel's own copy, else `golden/v1` of the repository, of the large one `golden/v1_large`.

    Raises
    ------
    GoldenFormatError
        Neither is there, or there is no suite of that name.
    """
    package, version = Path(str(files("refattn"))), folder_name(suite)
    for folder in (package / "_suite" / version, package.parent / "golden" / version):
        if (folder / INDEX).exists():
            return folder
    raise GoldenFormatError("no golden suite in this installation: name a folder, or run `refattn golden generate`")


@dataclass(frozen=True)
class Golden:
    """A published case: the problem, the certified values, and how far a correct backend may be from them.

    expected: out, lse, dq, ... as float64 rounded to odd; NaN where a result must not be finite. bound: the hard bound
    per element under `profile`, its output's rounding included. Long cases publish `rows` only.
    """

    name: str
    spec: Spec
    sizes: Mapping[str, int]
    dtype: str
    flags: tuple[str, ...]
    catches: str
    profile: str
    rows: Rows | None
    history: int
    overflow: Overflow
    expected: Mapping[str, NDArray[np.float64]]
    bound: Mapping[str, NDArray[np.float64]]
    status: Mapping[str, str]
    manifest: Mapping[str, Any]

    def case(self) -> Case:
        """The problem as recipes."""
        given = {n: _recipe(entry["recipe"]) for n, entry in self.manifest["inputs"].items()}
        duals = {f"d{n}": _recipe(entry["recipe"]) for n, entry in self.manifest["cotangents"].items()}
        forward = tuple(n for n in self.manifest["outputs"] if not n.startswith("d"))
        return Case(
            name=self.name,
            spec=self.spec,
            sizes=dict(self.sizes),
            catches=self.catches,
            dtype=self.dtype,
            inputs=given,
            cotangents=duals,
            want=(*forward, "vjp") if duals else forward,
            flags=self.flags,
            rows=self.rows,
            history=self.history,
            seed=self.manifest["seed"],
            overflow=self.overflow,
            suite=self.manifest.get("suite", CORE),
        )

    def inputs(self) -> dict[str, NDArray[Any]]:
        """Input arrays by the signature's names, regenerated and checked against their hashes."""
        return self._regenerated(recipes.inputs, "inputs")

    def cotangents(self) -> dict[str, NDArray[Any]]:
        """Cotangents by output, of full size: zero outside the published rows."""
        found = self._regenerated(recipes.cotangents, "cotangents")
        if self.rows is None:
            return found
        full = {}
        for name, part in found.items():
            full[name] = np.zeros((*part.shape[:2], self.sizes["Lq"], *part.shape[3:]), part.dtype)
            full[name][:, :, list(self.rows.q)] = part
        return full

    def published(self, name: str, array: NDArray[Any]) -> NDArray[Any]:
        """The published rows of a full-size output or gradient."""
        if self.rows is None or name not in ("out", "lse", "dq", "dk", "dv"):
            return array
        return array[:, :, list(self.rows.k if name in ("dk", "dv") else self.rows.q)]

    def _regenerated(self, make: Callable[[Case], dict[str, NDArray[Any]]], section: str) -> dict[str, NDArray[Any]]:
        try:
            arrays = make(self.case())
        except (RefattnError, LookupError, TypeError, ValueError, OverflowError, MemoryError) as error:
            raise GoldenFormatError(
                f"manifest of {self.name}, field {section}: these recipes make no arrays ({error}); {REMEDY}"
            ) from None
        recorded = self.manifest[section]
        if arrays.keys() != recorded.keys():
            raise GoldenFormatError(
                f"manifest of {self.name}, field {section}: holds {', '.join(recorded)}; "
                f"its spec asks for {', '.join(arrays)}; {REMEDY}"
            )
        for name, array in arrays.items():
            if recipes.sha256(array) != recorded[name]["sha256"]:
                raise GoldenFormatError(
                    f"manifest of {self.name}, field {section}.{name}.sha256: is not that of the array; {REMEDY}"
                )
        return arrays


def names(suite: str = CORE, folder: Path | None = None) -> list[str]:
    """Names of the suite's cases, from its index.

    Raises
    ------
    GoldenFormatError
        The index is missing, damaged, of another version, or the suite is unknown.
    """
    index = read_index(folder or folder_of_suite(suite))
    if suite != index["suite"]:
        raise GoldenFormatError(f"unknown suite {suite!r}; this folder holds {index['suite']!r}")
    return [entry["name"] for entry in index["cases"]]


def read_index(folder: Path) -> Any:
    """The index of a suite's folder, checked."""
    path = folder / INDEX
    index = read_json(path)
    _validate(index, "index", path)
    return index


def read_errata(folder: Path) -> Any:
    """What was released of a suite's folder, and its errata; of a folder without a record, nothing."""
    path = folder / ERRATA
    if not path.exists():
        return {"schema": SCHEMA, "version": "", "released": {}, "errata": []}
    told = read_json(path)
    _validate(told, "errata", path)
    return told


def read_manifest(path: Path) -> Any:
    """The manifest of a case, checked against the schema; its tensors need not be there."""
    manifest = read_json(path)
    _validate(manifest, "case", path)
    return manifest


def load(name: str, folder: Path | None = None) -> Golden:
    """A case by name, its files checked against the index and its manifest against the schema.

    Raises
    ------
    GoldenFormatError
        Naming the file, the field and the remedy.
    """
    folder = folder or folder_of_suite()
    entry = next((e for e in read_index(folder)["cases"] if e["name"] == name), None)
    if entry is None:
        raise GoldenFormatError(f"no case {name!r} in {folder}; `refattn golden list` names them")
    return read_case(folder / f"{name}.json", entry)


def read_case(path: Path, entry: Mapping[str, str] | None = None) -> Golden:
    """A case from its manifest's path; `entry` holds the hashes of both files."""
    tensor_path = path.with_suffix(".safetensors")
    if entry is not None:
        for file, field in ((path, "manifest"), (tensor_path, "tensors")):
            # Tensors that are not there are another matter: those of a large case need not be.
            if (field == "manifest" or file.exists()) and hashlib.sha256(read_bytes(file)).hexdigest() != entry[field]:
                raise GoldenFormatError(f"{file} was altered: its sha256 is not the index's {field!r}; {REMEDY}")
    manifest = read_manifest(path)
    if manifest.get("suite") == LARGE and not tensor_path.exists():
        raise GoldenFormatError(
            f"{manifest['id']} is stored as recipes and hashes: make its tensors with `refattn golden generate --suite "
            f"large --cases {manifest['id']} --folder FOLDER`, and name that folder"
        )
    tensors = read_safetensors(read_bytes(tensor_path), str(tensor_path))
    for name, output in manifest["outputs"].items():
        if name not in tensors or f"{name}.bound" not in tensors:
            raise GoldenFormatError(f"{tensor_path} lacks {name!r} or its bound; {REMEDY}")
        value, bound = tensors[name], tensors[f"{name}.bound"]
        if list(value.shape) != output["shape"] or recipes.sha256(value) != output["sha256"]:
            raise GoldenFormatError(
                f"{tensor_path}: {name!r} is not what outputs.{name} of the manifest says; {REMEDY}"
            )
        if value.dtype != np.float64 or bound.shape != value.shape:
            raise GoldenFormatError(
                f"{tensor_path}: {name!r} is {value.dtype} {value.shape} with a bound {bound.shape}; expected float64 "
                f"and a bound of the same shape; {REMEDY}"
            )
    try:
        spec = registry.from_json(manifest["spec"])
    except SpecError as error:
        raise GoldenFormatError(f"{path}, field spec: {error}; {REMEDY}") from None
    rows = manifest.get("rows")
    return Golden(
        name=manifest["id"],
        spec=spec,
        sizes=manifest["sizes"],
        dtype=manifest["dtype"],
        flags=tuple(manifest["flags"]),
        catches=manifest["catches"],
        profile=manifest["profile"],
        rows=None if rows is None else Rows(q=tuple(rows["q"]), k=tuple(rows["k"])),
        history=manifest.get("history", 0),
        overflow=manifest["conventions"]["overflow"],
        expected={n: tensors[n] for n in manifest["outputs"]},
        bound={n: tensors[f"{n}.bound"].astype(np.float64) for n in manifest["outputs"]},
        status={n: output["status"] for n, output in manifest["outputs"].items()},
        manifest=manifest,
    )


@cache
def _validators() -> Any:
    schema = read_json(Path(str(files("refattn.golden"))) / "schema.json")
    parts = ("case", "index", "errata")
    return {part: jsonschema.Draft202012Validator(schema | {"$ref": f"#/$defs/{part}"}) for part in parts}


def _validate(data: Any, part: str, path: Path) -> None:
    if not isinstance(data, Mapping) or data.get("schema") != SCHEMA:
        given = data.get("schema") if isinstance(data, Mapping) else type(data).__name__
        raise GoldenFormatError(f"{path} has schema {given!r}; this version reads {SCHEMA!r}: use a matching refattn")
    error = next(
        iter(sorted(_validators()[part].iter_errors(data), key=lambda e: list(map(str, e.absolute_path)))), None
    )
    if error is not None:
        field = ".".join(str(p) for p in error.absolute_path) or "(top level)"
        raise GoldenFormatError(f"{path}, field {field}: {error.message}; {REMEDY}")


def _recipe(data: Mapping[str, Any]) -> Recipe:
    plain = {name: _number(value) for name, value in data.items() if name != "edits"}
    return Recipe(**plain, edits=tuple(_edit(e) for e in data.get("edits", ())))


def _edit(data: Mapping[str, Any]) -> Edit:
    at = tuple(tuple(i) if isinstance(i, list) else i for i in data["at"])
    return Edit(at=at, op=data["op"], value=_number(data["value"]))


def _number(value: Any) -> Any:
    """Hexadecimal floats back to floats, lists back to tuples."""
    if isinstance(value, list):
        return tuple(_number(item) for item in value)
    if isinstance(value, str) and (value.startswith(("0x", "-0x")) or value in ("inf", "-inf", "nan")):
        return float.fromhex(value)
    return value
