"""Laws over everything the registry finds: a module dropped into the folder is held to them without an edit here."""

import sys
from types import ModuleType

import numpy as np
import pytest

import refattn as ra
from refattn import registry
from refattn.case import Case
from refattn.errors import SpecError
from refattn.spec import Array, Spec

ALL = ra.variants()
EVERY = pytest.mark.parametrize("info", ALL.values(), ids=ALL)


def test_the_names_are_sorted_and_the_seeds_are_there():
    assert list(ALL) == registry.names() == sorted(ALL)
    assert {"alibi", "sdpa"} <= set(ALL)
    assert not any(name.startswith("_") for name in ALL)


@EVERY
def test_the_docstring_has_a_title_a_source_and_what_it_differs_from(info):
    assert info.title
    assert "\n" not in info.title
    assert "Source: " in info.doc
    assert "Differs from: " in info.doc


@EVERY
def test_the_class_is_found_by_name_in_any_case(info):
    assert issubclass(info.spec, Spec)
    assert getattr(ra, info.spec.__name__) is registry.spec_class(info.name) is info.spec
    assert info.spec.__name__.lower() == info.name.replace("_", "")
    assert ra.spec(info.name, **vars(info.example)) == info.example
    assert info.example.variant == info.name


@EVERY
def test_a_module_keeps_the_protocol(info):
    places = ("rotate", "lower_rotate"), ("content", "lower_content"), ("term", "lower_term")
    own = {
        "variant": ("outputs", "reference"),
        "term": next(p for p in places if hasattr(info.module, p[0]) or p[0] == "term"),
    }
    for name in ("signature", "resolve", *own[info.kind]):
        assert callable(getattr(info.module, name)), name
    if info.kind == "variant":
        # A sentence says why there is no plan.
        assert callable(info.module.lower) or " " in info.module.lower
    signature = info.module.signature(info.example)
    assert all(isinstance(array, Array) for array in signature.values())
    whole, module = registry.whole(info.example)
    assert {"out"} <= set(module.outputs(whole))


@EVERY
def test_cases_are_cases_of_known_names(info):
    names = [case.name for case in info.cases()]
    assert len(set(names)) == len(names)
    for case in info.cases():
        assert isinstance(case, Case)
        assert case.catches
        assert case.group() == case.name.split("/")[0]
        assert registry.from_json(case.spec.to_json()) == case.spec


@EVERY
def test_the_example_resolves_to_itself(info):
    whole, module = registry.whole(info.example)
    sizes = {d: 4 for a in module.signature(whole).values() for d in a.names}
    resolved = module.resolve(whole, sizes)
    assert module.resolve(resolved, sizes) == resolved


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("flash", {}, "unknown variant 'flash'; there are: alibi, .*sdpa"),
        ("infini_attention", {"update": "delta"}, "infini_attention has no default for segment"),
        ("sdpa", {"dropout": 0.1}, "sdpa has no option 'dropout'; its options are causal, window"),
        ("compressive", {"segment": 4}, "compressive has no default for memory, compressed, rate: give a value"),
        ("_place", {}, "unknown variant '_place'"),
        (None, {}, "unknown variant None"),
        (["sdpa"], {}, "unknown variant"),
    ],
    ids=str,
)
def test_an_unknown_name_or_option_lists_the_known_ones(name, options, message):
    with pytest.raises(SpecError, match=message):
        ra.spec(name, **options)


def test_a_third_party_adds_a_variant_by_an_entry_point(monkeypatch):
    module = ModuleType("their_package.doubled")
    source = (
        '"""Twice the values.\n\nSource: none. Differs from: all."""\n'
        "from dataclasses import dataclass\n"
        "from refattn.spec import Array, Spec\n"
        "@dataclass(frozen=True, kw_only=True)\n"
        "class Doubled(Spec):\n    times: int = 2\n"
        "def signature(spec): return {'v': Array('L D')}\n"
        "def outputs(spec): return {'out': Array('L D')}\n"
        "def resolve(spec, sizes): return spec\n"
        "def validate(spec, x): pass\n"
        "def reference(spec, x, state=None): return {'out': x['v'] * spec.times}\n"
    )
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(source, vars(module))

    class Entry:
        name, value = "doubled", module.__name__

    monkeypatch.setattr("importlib.metadata.entry_points", lambda group: [Entry] if group == "refattn.variants" else [])
    registry._locations.cache_clear()
    try:
        spec = ra.spec("doubled", times=3)
        assert ra.variants()["doubled"].title == "Twice the values"
        v = np.arange(6.0).reshape(2, 3)
        np.testing.assert_array_equal(ra.evaluate(spec, {"v": v}).out, 3 * v)
        np.testing.assert_array_equal(ra.evaluate(spec, {"v": v}, engine="certified").out, 3 * v)
        np.testing.assert_array_equal(ra.vjp(spec, {"v": v}, {"out": v}).dv, 3 * v)
        assert registry.from_json({"variant": "doubled", "times": 3}) == spec
    finally:
        registry._locations.cache_clear()
