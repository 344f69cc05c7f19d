"""refattn: exact attention, certified golden files, fast CPU kernels, no framework."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from refattn import draws, errors
from refattn.api import attention, evaluate, vjp
from refattn.cache import extend
from refattn.explanation import explain
from refattn.registry import class_named, spec, variants
from refattn.state import State
from refattn.streaming import init_state, load_state, step

if TYPE_CHECKING:
    from refattn.variants.alibi import ALiBi as ALiBi
    from refattn.variants.alibi_interpolation import ALiBiInterpolation as ALiBiInterpolation
    from refattn.variants.nope import NoPE as NoPE
    from refattn.variants.sandwich import Sandwich as Sandwich
    from refattn.variants.sdpa import SDPA as SDPA
    from refattn.variants.t5 import T5 as T5

__all__ = [
    "State",
    "attention",
    "draws",
    "errors",
    "evaluate",
    "explain",
    "extend",
    "init_state",
    "load_state",
    "spec",
    "step",
    "variants",
    "vjp",
]


def __getattr__(name: str) -> Any:
    """Spec classes by name, `validate` and `__version__`, each imported when first asked for."""
    if name == "__version__":
        from importlib.metadata import version

        return version("refattn")
    if name == "validate":
        from refattn.oracle.validate import validate

        return validate
    found = class_named(name)
    if found is None:
        raise AttributeError(f"refattn has no {name!r}")
    return found
