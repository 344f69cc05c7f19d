"""A kernel as PTX, on a machine with or without a GPU, and the file that keeps it."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

from numba import cuda
from numba.core import types as numba_types

from refattn.engines.cuda import ptx
from refattn.engines.cuda.kernels.form import Form
from refattn.engines.cuda.kernels.roles import ROLES
from refattn.errors import StorageError
from refattn.files import write

LEAST = (8, 0)  # the compute capability that the text is for; a driver or ptxas makes machine code of any later one
BLOCKS = 2  # a multiprocessor is to have room for: without this ptxas spills to make room for 3

types: Any = numba_types  # without types of their own

_F32, _I32, _I64 = types.float32, types.int32, types.int64
_STORED = {"float32": _F32, "bfloat16": types.uint16, "float16": types.uint16}


def kinds(name: str, form: Form) -> list[Any]:
    """The types of what a kernel takes."""
    stored, floats = types.CPointer(_STORED[form.storage]), types.CPointer(_F32)
    ints, three, four = types.CPointer(_I32), types.UniTuple(_I64, 3), types.UniTuple(_I64, 4)
    fields = dict.fromkeys(("q", "k", "v", "out", "dout"), stored)
    fields |= {"out": floats} if form.split and name == "forward" else {}
    fields |= dict.fromkeys(("lse", "slopes", "sink", "table", "dense", "outs", "lses"), floats)
    fields |= dict.fromkeys(
        ("level", "less", "dq", "dk", "dv", "slope", "sums", "memory", "weight", "transition"), floats
    )
    fields |= {"mask": types.CPointer(types.uint8)}
    fields |= dict.fromkeys(("heads", "share", "lq", "lk", "columns", "zero", "splits", "page", "entries"), _I32)
    fields |= dict.fromkeys(("q_strides", "k_strides", "v_strides", "dout_strides"), three)
    fields |= dict.fromkeys(("dense_strides", "mask_strides"), four)
    fields |= {"at_strides": types.UniTuple(_I32, 4), "span": types.UniTuple(_I32, 2)}
    fields |= {"cap": types.UniTuple(_F32, 2), "segment": _I32}
    fields |= dict.fromkeys(("unit", "scale", "clamp", "add"), _F32)
    return [types.NamedTuple([fields.get(n, ints) for n in t._fields], t) for t in ROLES[name].takes]


def compiled(name: str, form: Form) -> str:
    """PTX of a kernel of that name and form; 5 to 10 seconds, nearly all of them numba's."""
    signature = types.void(*kinds(name, form))
    options = {"device": False, "abi": "numba", "cc": LEAST, "launch_bounds": (form.threads, BLOCKS)}
    compiler: Any = cuda
    code, _ = compiler.compile(ROLES[name].make(ptx, form).run, signature, **options)
    return code.decode() if isinstance(code, bytes) else str(code)


def words(name: str, form: Form) -> int:
    """Words of shared memory that a kernel needs."""
    return int(ROLES[name].make(ptx, form).words)


def kept(name: str, form: Form) -> str:
    """As `compiled`, from the file of an earlier process where there is one."""
    path = _folder() / f"{name}-{_key(form)}.ptx"
    with suppress(OSError, UnicodeDecodeError):
        text = path.read_text()
        if text.rstrip().endswith("}"):
            return text
    text = compiled(name, form)
    with suppress(StorageError):  # a failure costs the time to compile and nothing else
        write(path, text.encode())
    return text


def entry(text: str) -> str:
    """Name of the kernel in its PTX."""
    found = re.search(r"\.entry\s+(\w+)", text)
    assert found is not None
    return found[1]


def _folder() -> Path:
    named = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    return Path(named or Path.home() / ".cache") / "refattn"


def _key(form: Form) -> str:
    """Changes with the form, the text of the kernels and primitives, and the compiler."""
    here = Path(__file__).parent
    texts = [Path(__file__), here / "ptx.py", *sorted((here / "kernels").glob("*.py"))]
    found = hashlib.sha256(repr((form, version("numba"), version("numba-cuda"))).encode())
    for path in texts:
        found.update(path.read_bytes())
    return found.hexdigest()[:32]
