"""How every kernel is compiled: the one place that holds Numba's options, for all engines."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, cast

import llvmlite
import numba
from llvmlite import ir
from llvmlite.binding import get_host_cpu_features
from numba.core.caching import FunctionCache
from numba.core.codegen import JITCodeLibrary
from numba.core.compiler import Compiler
from numba.extending import overload

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def jit(function: Kernel) -> Kernel:
    """Compile at the first call of each signature and keep the machine code on disk.

    nogil lets the threads of `pool` run side by side. error_model="numpy" gives x/0 as IEEE 754 does. No fastmath: it
    answers isnan(nan) with False, and masking depends on that answer.

    The key of the disk cache is the function's own file and the numbers it closes over: what a kernel calls stands in
    the same file, or the kernel closes over the `stamp` of the other ones, else an edited helper would leave the old
    machine code in use.
    """
    return cast("Kernel", _kept(numba.njit(nogil=True, error_model="numpy")(function)))


def inlined(function: Kernel) -> Kernel:
    """What kernels and Python call, never kept on disk.

    Inlined before loops are vectorised: eight double-double exponentials at a time take 30 ns each, one 240 ns.
    """
    return cast("Kernel", numba.njit(nogil=True, error_model="numpy", forceinline=True)(function))


def bare(function: Kernel) -> Kernel:
    """As `jit`, for what allocates no array: without counting references.

    Numba counts one for each array of a tuple at each call, with an atomic operation on memory that all threads share.
    """
    options: dict[str, Any] = {"_nrt": False, "no_cfunc_wrapper": True}
    return cast("Kernel", _kept(numba.njit(nogil=True, error_model="numpy", **options)(function)))


def inner(function: Kernel) -> Kernel:
    """What kernels call and Python does not, in a kernel's own terms: compiled into each kernel, never kept by itself.

    Kept on disk it would be served stale, for its key does not tell of the files that it calls. In Python it remains
    the plain function. A number that is known when a kernel is compiled is known in what it calls. Numba's doors to
    Python, which for a tuple of thirty arrays are most of the code, are left out.
    """
    options: Any = dict.fromkeys(("nogil", "no_cpython_wrapper", "no_cfunc_wrapper"), True)
    options |= {"error_model": "numpy", "_nrt": False, "pipeline_class": _Inner}
    overload(function, jit_options=options, strict=False, prefer_literal=True)(lambda *_: function)
    return function


class _Inner(Compiler):
    """Numba's compiler, of which no machine code is asked."""

    def __init__(self, typing: Any, target: Any, library: Any, *rest: Any) -> None:
        part: Any = _Part
        super().__init__(typing, target, library or part(target.codegen(), "part"), *rest)  # type: ignore[no-untyped-call]


class _Part(JITCodeLibrary):
    """Code that is linked into a kernel and optimised there.

    Numba would optimise each function with all that it calls, and turn each into machine code that nobody runs.
    """

    def add_ir_module(self, ir_module: Any) -> None:
        """Add a function's code. What lies at the address of a tuple is changed by no other way: see `tuples`."""
        for argument in (a for function in ir_module.functions for a in function.args):
            if isinstance(getattr(argument.type, "pointee", None), ir.LiteralStructType):
                argument.add_attribute("noalias")
        super().add_ir_module(ir_module)  # type: ignore[no-untyped-call]

    def get_pointer_to_function(self, name: str) -> int:
        """0, as for a function that is not there."""
        del name
        self._ensure_finalized()  # type: ignore[no-untyped-call]
        return 0

    @property
    def codegen(self) -> Any:
        """Who is told where a function keeps Python's objects: it has none."""
        return self

    def set_env(self, name: str, env: Any) -> None:
        """Nothing is there to be set."""

    def _optimize_final_module(self) -> None:
        pass

    def _finalize_final_module(self) -> None:
        self._finalize_dynamic_globals()  # type: ignore[no-untyped-call]
        self._finalized = True


class _Cache(FunctionCache):
    """Numba's disk cache, of which a failure costs the time to compile and nothing else."""

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The machine code of a signature, or None."""
        try:
            return super().load_overload(sig, target_context)  # type: ignore[no-untyped-call]
        except Exception:  # whatever unpickling damaged bytes raises
            # Saving reads the index too, so a damaged one would never be replaced.
            with suppress(OSError):
                self.flush()  # type: ignore[no-untyped-call]
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        """Keep the machine code, where there is room and permission."""
        with suppress(OSError):
            super().save_overload(sig, data)  # type: ignore[no-untyped-call]


def _kept(dispatcher: Any) -> Any:
    """With a disk cache, where a folder for it can be written."""
    with suppress(RuntimeError):  # there is none
        dispatcher._cache = _Cache(dispatcher.py_func)  # type: ignore[no-untyped-call]
    return dispatcher


def stamp(*modules: ModuleType) -> int:
    """A number that changes with the text of the modules and of this one, and with llvmlite."""
    found = zlib.crc32(Path(__file__).read_bytes(), zlib.crc32(llvmlite.__version__.encode()))
    for module in modules:
        found = zlib.crc32(Path(cast("str", module.__file__)).read_bytes(), found)
    return found


@cache
def lanes() -> int:
    """Float32 numbers in one vector register of the processor that is compiled for."""
    named = getattr(numba.config, "CPU_NAME", None)
    if named and named != "host":
        wide = ("avx512", "icelake", "sapphire", "znver4", "znver5")
        return 16 if any(part in named for part in wide) else 4 if named in {"generic", "x86-64"} else 8
    features = get_host_cpu_features()
    return 16 if features.get("avx512f") else 8 if features.get("avx2") else 4


@cache
def halves() -> bool:
    """Whether the processor that is compiled for converts float16 by itself."""
    named = getattr(numba.config, "CPU_NAME", None)
    if platform.machine() in {"arm64", "aarch64"}:
        return True
    if named and named != "host":
        return named not in {"generic", "x86-64"}
    return bool(get_host_cpu_features().get("f16c"))
