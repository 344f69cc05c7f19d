"""How every kernel is compiled: the one place that holds Numba's options."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

Kernel = TypeVar("Kernel", bound=Callable[..., Any])


def jit(function: Kernel) -> Kernel:
    """Compile at the first call of each signature and keep the machine code on disk.

    nogil lets the threads of `pool` run side by side. error_model="numpy" gives x/0 as IEEE 754 does. No fastmath: it
    answers isnan(nan) with False, and masking depends on that answer.

    The key of the disk cache is the function's own file: what a kernel calls stands in the same file, else an edited
    helper would leave the old machine code in use.
    """
    return cast("Kernel", numba.njit(cache=True, nogil=True, error_model="numpy")(function))
