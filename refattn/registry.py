"""Finds variants, terms and engines by name, without importing those not asked for.

A module of `refattn.variants` whose name has no leading underscore is a variant (it has `reference`) or a term (it has
`term`, `content` or `rotate`). Third parties add theirs by the entry point group `refattn.variants`, each entry naming
a module.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

from refattn import spec as specs
from refattn import variants as package
from refattn.case import Flag
from refattn.errors import EngineUnavailable, SpecError
from refattn.spec import Spec

# The function that a term's module offers, and the field of SDPA in which the term stands.
_PLACES = {"rotate": "rotary", "content": "content", "term": "bias"}
ENGINES = ("reference", "certified", "cpu", "cuda")


@dataclass(frozen=True)
class Info:
    """What the registry knows of a variant or term."""

    name: str
    module: ModuleType

    @property
    def kind(self) -> str:
        """Either "variant" or "term"."""
        return "variant" if hasattr(self.module, "reference") else "term"

    @property
    def place(self) -> str | None:
        """Field of SDPA in which a term stands; None for a variant."""
        return next((field for function, field in _PLACES.items() if hasattr(self.module, function)), None)

    @property
    def doc(self) -> str:
        """The module's docstring: claim, formula, source, what it differs from."""
        return self.module.__doc__ or ""

    @property
    def title(self) -> str:
        """First sentence of the docstring."""
        return self.doc.partition("\n\n")[0].replace("\n", " ").rstrip(".")

    @property
    def spec(self) -> type[Spec]:
        """The Spec class."""
        found = [
            c
            for c in vars(self.module).values()
            if isinstance(c, type) and issubclass(c, Spec) and c.__module__ == self.module.__name__
        ]
        return found[0]

    @property
    def example(self) -> Spec:
        """A Spec of the class: of its defaults, or of the first golden case where an option has no default."""
        try:
            return self.spec()
        except (TypeError, SpecError):
            found: Spec = next(self.cases()).spec
            return found

    @property
    def _listed(self) -> ModuleType | None:
        """Where its golden cases are: its own module, or _<name>_cases beside it."""
        if hasattr(self.module, "cases"):
            return self.module
        parent, _, own = self.module.__name__.rpartition(".")
        name = f"{parent}._{own}_cases"
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name not in (name, parent):
                raise
            return None

    def flags(self) -> dict[str, Flag]:
        """What the flags mean that only its own cases have: the FLAGS beside them."""
        return dict(getattr(self._listed, "FLAGS", {}))

    def cases(self) -> Iterator[Any]:
        """Its golden cases."""
        yield from getattr(self._listed, "cases", tuple)()


@cache
def _locations() -> dict[str, str]:
    """Name to module path, of every variant and term that can be imported."""
    # Imported here, for it takes a third as long as all of refattn.
    from importlib.metadata import entry_points

    own = {m.name: f"{package.__name__}.{m.name}" for m in pkgutil.iter_modules(package.__path__) if m.name[0] != "_"}
    return own | {entry.name: entry.value for entry in entry_points(group="refattn.variants")}


def names() -> list[str]:
    """Names of all variants and terms, without importing any."""
    return sorted(_locations())


def info(name: str) -> Info:
    """The variant or term of that name.

    Raises
    ------
    SpecError
        For an unknown name; the message lists the known ones.
    """
    if not isinstance(name, str) or name not in _locations():
        raise SpecError(f"unknown variant {name!r}; there are: {', '.join(names())}")
    return Info(name, importlib.import_module(_locations()[name]))


def variants() -> dict[str, Info]:
    """Every variant and term by name."""
    return {name: info(name) for name in names()}


def spec_class(name: str) -> type[Spec]:
    """The Spec class of a variant or term."""
    return info(name).spec


def spec(name: str, **options: Any) -> Spec:
    """The Spec of a variant by its registry name: `spec("alibi", slopes="geometric")`.

    Raises
    ------
    SpecError
        For an unknown name or option, one without a default that is missing, or an option out of range.
    """
    kind = spec_class(name)
    unknown = sorted(set(options) - set(kind.__dataclass_fields__))
    if unknown:
        raise SpecError(f"{name} has no option {unknown[0]!r}; its options are {', '.join(kind.__dataclass_fields__)}")
    return specs.made(kind, name, options)


def from_json(data: Any) -> Spec:
    """Spec of a JSON object such as a manifest holds."""
    return specs.from_json(data, spec_class)


def class_named(attribute: str) -> type[Spec] | None:
    """The Spec class that `refattn.<attribute>` names: a module's name without underscores, any case."""
    wanted = attribute.replace("_", "").lower()
    for name in names():
        if name.replace("_", "") == wanted:
            return spec_class(name)
    return None


def whole(given: Spec) -> tuple[Spec, Any]:
    """A Spec that stands alone, and its module: a term means causal SDPA with that term."""
    module = importlib.import_module(type(given).__module__)
    if hasattr(module, "reference"):
        return given, module
    sdpa = info("sdpa")
    field = Info(given.variant, module).place or ""
    options: dict[str, Any] = {"causal": True, field: given}
    return sdpa.spec(**options), sdpa.module


def engine(name: str) -> Any:
    """The engine's module.

    Raises
    ------
    SpecError
        For an unknown name.
    EngineUnavailable
        Where what it needs is not installed; the message names the extra.
    """
    if not isinstance(name, str) or name not in ENGINES:
        raise SpecError(f"unknown engine {name!r}; there are: {', '.join(ENGINES)}")
    try:
        return importlib.import_module(f"refattn.engines.{name}")
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("refattn"):
            raise
        raise EngineUnavailable(
            f"engine {name!r} needs {error.name}, which is not installed: pip install 'refattn[golden]'"
        ) from None
