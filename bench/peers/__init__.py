"""Who is timed, one module each, none importing its framework before it is asked to prepare a cell.

A module has
    TITLE, PACKAGES     its name in tables; the distributions whose versions the page prints
    MODULE              what is imported; where it isn't there the peer is "not installed"
    FIRST_CALL_S        seconds that the first call may take beyond any other's, for compiling
    refuses(cell)       why it can't compute the cell, or None
    memory(cell)        estimated bytes beyond inputs and outputs
    prepare(cell, x)    Call for these arrays: `run` is what is timed, `read` turns its result into named arrays
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from numpy.typing import NDArray

OWN = "refattn"
PEAK = "peak"  # the machine itself, which takes its turn as the peers do
PEERS = ("torch_sdpa", "torch_flex", "ort_mha", "ort_attention", "jax_sdpa")
ALL = (PEAK, OWN, *PEERS)


@dataclass(frozen=True)
class Call:
    """A prepared computation."""

    run: Callable[[], Any]
    read: Callable[[Any], dict[str, NDArray[Any]]]


def load(name: str) -> ModuleType:
    """The module of a contender."""
    modules = {OWN: "refattn_cpu", PEAK: "machine_peak"}
    return importlib.import_module(f"bench.peers.{modules.get(name, name)}")


def installed(peer: ModuleType) -> bool:
    """Whether its framework can be imported."""
    return importlib.util.find_spec(peer.MODULE) is not None
