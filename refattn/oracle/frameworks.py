"""Call a backend with the arrays of its framework, and bring out, lse and gradients home as NumPy arrays."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any

import numpy as np

from refattn.arrays import from_numpy, to_numpy
from refattn.errors import DTypeError, EngineUnavailable, ShapeError
from refattn.oracle.offer import Declared, Offer

ARRAYS = ("numpy", "torch", "jax")
Duals = Mapping[str, np.ndarray]


def call(fn: Callable[..., Any], takes: Declared, offer: Offer, duals: Duals, arrays: str) -> dict[str, np.ndarray]:
    """Run fn on a case; `duals` are the cotangents of its outputs, full size.

    Gradients come from fn where it returns them (a parameter `dout`, and `dlse` where lse has a cotangent, receives
    what they are gradients for; without all of these they are not compared), else from the framework's own
    differentiation.
    """
    arguments = dict(offer.arguments)
    if "dout" in takes.names and duals:
        arguments |= {f"d{name}": dual for name, dual in duals.items() if f"d{name}" in takes.names}
    if arrays == "numpy":
        results = _mapping(fn(**arguments))
    elif arrays == "torch":
        results = _torch(fn, arguments, offer.leaves, duals)
    else:
        results = _jax(fn, arguments, offer.leaves, duals)
    home = {_named(name, offer.leaves): to_numpy(a, name) for name, a in results.items()}
    if "dout" in takes.names and any(f"d{name}" not in takes.names for name in duals):
        return {name: a for name, a in home.items() if not name.startswith("d")}
    return home


def framework(name: str) -> Any:
    """Import a framework.

    Raises
    ------
    EngineUnavailable
        It is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        raise EngineUnavailable(f"{name} is not installed: `make peers`, or pip install {name}") from None


def _mapping(returned: Any) -> dict[str, Any]:
    if isinstance(returned, Mapping):
        found = {name: a for name, a in returned.items() if a is not None}
    elif isinstance(returned, (tuple, list)) or returned is None:
        given = type(returned).__name__
        raise DTypeError(f"a backend returns out, or a mapping such as {{'out': ..., 'lse': ...}}; it gave {given}")
    else:
        found = {"out": returned}
    if "out" not in found:
        raise DTypeError(f"a backend returns 'out'; it gave {', '.join(found) or 'an empty mapping'}")
    return found


def _named(result: str, leaves: Mapping[str, str]) -> str:
    """Golden's name of a result: the gradient of an argument is that of the input it stands for."""
    return f"d{leaves[result[1:]]}" if result[:1] == "d" and result[1:] in leaves else result


def _to(argument: Any, like: Any) -> Any:
    """Every array inside an argument as one of the framework's."""
    if isinstance(argument, tuple):
        return tuple(_to(item, like) for item in argument)
    return from_numpy(np.ascontiguousarray(argument), like) if isinstance(argument, np.ndarray) else argument


def _torch(fn: Any, arguments: Mapping[str, Any], leaves: Mapping[str, str], duals: Duals) -> dict[str, Any]:
    torch = framework("torch")
    like = torch.zeros(())
    given = {name: _to(a, like) for name, a in arguments.items()}
    if duals:
        for name in leaves:
            given[name].requires_grad_(True)
    results = _mapping(fn(**given))
    pairs = [(results[n], _to(dual, like)) for n, dual in duals.items() if n in results]
    own = any(f"d{name}" in results for name in leaves)
    if own or len(pairs) < len(duals) or not all(r.requires_grad for r, _ in pairs) or not pairs:
        return results
    for result, dual in pairs:
        if result.shape != dual.shape:
            raise ShapeError(f"an output has shape {tuple(result.shape)}; expected {tuple(dual.shape)}")
    outputs, weights = [r for r, _ in pairs], [w.to(r.dtype) for r, w in pairs]
    found = torch.autograd.grad(outputs, [given[n] for n in leaves], weights, allow_unused=True)
    return results | {f"d{n}": g for n, g in zip(leaves, found, strict=True) if g is not None}


def _jax(fn: Any, arguments: Mapping[str, Any], leaves: Mapping[str, str], duals: Duals) -> dict[str, Any]:
    jax = framework("jax")
    like = sys.modules["jax"].numpy.zeros(())
    given = {name: _to(a, like) for name, a in arguments.items()}
    if not duals:
        return _mapping(fn(**given))
    variable = {name: given.pop(name) for name in leaves}

    def run(x: Any) -> Any:
        """Results with a derivative, and beside them the integers."""
        found = _mapping(fn(**given, **x))
        whole = {name: a for name, a in found.items() if a.dtype.kind in "iub"}
        return {name: a for name, a in found.items() if name not in whole}, whole

    results, pull, integers = jax.vjp(run, variable, has_aux=True)
    if any(f"d{name}" in results for name in leaves) or not set(duals) <= set(results):
        return {**results, **integers}
    for name, dual in duals.items():
        if results[name].shape != dual.shape:
            raise ShapeError(f"{name} has shape {tuple(results[name].shape)}; expected {tuple(dual.shape)}")
    zero = {name: jax.numpy.zeros_like(r) for name, r in results.items()}
    weights = {name: _to(dual, like).astype(results[name].dtype) for name, dual in duals.items()}
    (found,) = pull(zero | weights)
    return {**results, **integers, **{f"d{name}": g for name, g in found.items()}}
