"""Backends by name: adapters for known functions, and any function of an importable module."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from refattn import api, registry
from refattn.errors import SpecError

ADAPTERS: Mapping[str, tuple[str, str, str]] = {
    "torch:sdpa": ("refattn.oracle.torch_sdpa", "sdpa", "torch"),
    "refattn:reference": ("refattn.oracle.adapters", "reference", "numpy"),
    "refattn:cpu": ("refattn.oracle.adapters", "cpu", "numpy"),
}


@dataclass(frozen=True)
class Target:
    """A backend: its name, the function, and the kind of arrays it is given."""

    name: str
    fn: Callable[..., Any]
    arrays: str


def resolve(name: str) -> Target:
    """Find an adapter, or the function of "package.module:function"; the current folder is searched too.

    Raises
    ------
    SpecError
        The module or the function does not exist, the import fails, or what is found cannot be called.
    """
    if name in ADAPTERS:
        module, attribute, arrays = ADAPTERS[name]
        return Target(name, getattr(import_module(module), attribute), arrays)
    module, colon, attribute = name.partition(":")
    if not colon or not module or not attribute:
        raise SpecError(f"a target is {', '.join(ADAPTERS)} or 'package.module:function'; given: {name!r}")
    found: Any = _imported(module)
    for part in attribute.split("."):
        if not hasattr(found, part):
            offered = [n for n in dir(found) if not n.startswith("_") and callable(getattr(found, n))]
            raise SpecError(f"{module} has no {attribute!r}; its functions are {', '.join(offered) or 'none'}")
        found = getattr(found, part)
    if not callable(found):
        raise SpecError(f"{name} is a {type(found).__name__}; a backend is a function fn(q, k, v, **options)")
    return Target(name, found, "numpy")


def _imported(module: str) -> Any:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        return import_module(module)
    except Exception as error:
        first = (str(error) or type(error).__name__).splitlines()[0]
        raise SpecError(f"module {module!r} cannot be imported: {type(error).__name__}: {first}") from error


def reference(q: Any, k: Any, v: Any, *, dout: Any = None, dlse: Any = None, **options: Any) -> dict[str, Any]:
    """refattn's float64 reference as a backend: its results rounded to the case's dtype."""
    return _engine("reference", {"q": q, "k": k, "v": v} | options, {"out": dout, "lse": dlse})


def cpu(q: Any, k: Any, v: Any, *, dout: Any = None, dlse: Any = None, **options: Any) -> dict[str, Any]:
    """refattn's Numba kernels as a backend."""
    return _engine("cpu", {"q": q, "k": k, "v": v} | options, {"out": dout, "lse": dlse})


_OPTIONS = ("causal", "window", "scale", "softcap", "normalizer", "sigmoid_bias")


def _engine(engine: str, given: dict[str, Any], duals: dict[str, Any]) -> dict[str, Any]:
    options: dict[str, Any] = {n: given.pop(n) for n in _OPTIONS if n in given}
    if "segment_ids" in given:
        given["q_segment_ids"], given["k_segment_ids"] = given.pop("segment_ids")
    if "keep" in given:
        given["keep"], options["keep_probability"] = given.pop("keep")
    if "block_table" in given:
        options["paged"] = True
    if "k_scale" in given:
        options["kv"] = "int8"
    if "alibi_slopes" in given:
        given["slopes"] = given.pop("alibi_slopes")
        options["bias"] = (registry.spec("alibi", slopes="learned"),)
    if "rotary" in given:
        options["rotary"] = registry.spec(**_named(given.pop("rotary")))
    if "content" in given:
        options["content"] = tuple(registry.spec(**_named(term)) for term in given.pop("content"))
    spec = registry.spec("sdpa", **options)
    want = tuple(registry.info("sdpa").module.outputs(spec))
    results = dict(api.evaluate(spec, given, engine=engine, want=want))
    duals = {name: dual for name, dual in duals.items() if dual is not None}
    if duals:
        results |= api.vjp(spec, given, duals, engine=engine)
    return results


def _named(term: Mapping[str, Any]) -> dict[str, Any]:
    """A term's plain data as the arguments of `registry.spec`."""
    return {"name" if field == "variant" else field: value for field, value in term.items()}
