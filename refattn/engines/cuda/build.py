"""A kernel compiled to PTX and machine code, on a machine with or without a GPU."""

from __future__ import annotations

from typing import Any

from numba import cuda, types

from refattn.engines.cuda.kernels.form import Arguments, Form

F32, I32, I64 = types.float32, types.int32, types.int64
_POINTERS = {"float32": F32, "bfloat16": types.uint16, "float16": types.uint16}


def kind(form: Form) -> Any:
    """The type of a kernel's `Arguments`."""
    stored, floats = types.CPointer(_POINTERS[form.storage]), types.CPointer(F32)
    ints, three, four = types.CPointer(I32), types.UniTuple(I64, 3), types.UniTuple(I64, 4)
    fields = dict.fromkeys(("q", "k", "v", "out"), stored)
    fields |= dict.fromkeys(("lse", "slopes", "sink", "table", "dense"), floats)
    fields |= {"mask": types.CPointer(types.uint8)}
    fields |= dict.fromkeys(("heads", "share", "lq", "lk", "columns", "zero"), I32)
    fields |= dict.fromkeys(("q_strides", "k_strides", "v_strides"), three)
    fields |= dict.fromkeys(("dense_strides", "mask_strides"), four)
    fields |= {"at_strides": types.UniTuple(I32, 4), "span": types.UniTuple(I32, 2), "unit": F32}
    fields |= {"cap": types.UniTuple(F32, 2)}
    return types.NamedTuple([fields.get(name, ints) for name in Arguments._fields], Arguments)


def to_ptx(kernel: Any, form: Form, capability: tuple[int, int]) -> str:
    """PTX of a kernel made with the primitives of `ptx`."""
    signature = types.void(kind(form))
    options = {"device": False, "abi": "numba", "launch_bounds": (form.threads, 2)}
    code, _ = cuda.compile(kernel, signature, cc=capability, **options)
    return code.decode() if isinstance(code, bytes) else code
