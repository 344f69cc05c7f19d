"""Outputs that are integers, from the certified engine to the verdict on a backend: a variant that chooses queries."""

import json
from dataclasses import replace
from functools import wraps

import numpy as np
import pytest
from checks import same

import refattn as ra
from refattn import registry
from refattn.errors import ShapeError
from refattn.golden import load, suite
from refattn.golden.audit import audit
from refattn.golden.build import build
from refattn.golden.store import read_safetensors
from refattn.oracle.compare import compare

CASES = {case.name: case for case in registry.info("informer").cases()}
NAME = "informer/causal_cummean"


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """Two cases, of float16 and of float64."""
    folder = tmp_path_factory.mktemp("chosen")
    built = {name: build(CASES[name]) for name in (NAME, "informer/float64")}
    suite.publish(folder, {name: (b.manifest, b.tensors) for name, b in built.items()})
    return folder


def evaluated(golden):
    return ra.evaluate(golden.spec, golden.inputs(), want=("out", "indices", "margin"))


def test_the_files_hold_them_as_exact_doubles_with_a_bound_of_0(chosen):
    manifest, tensors = suite.paths(chosen, NAME)
    entry = json.loads(manifest.read_bytes())["outputs"]["indices"]
    assert (entry["kind"], entry["status"], entry["shape"]) == ("int", "correctly_rounded", [1, 6, 5])
    stored = read_safetensors(tensors.read_bytes(), "here")
    golden = load.load(NAME, chosen)
    same(stored["indices"], evaluated(golden).indices.astype(np.float64))
    assert not stored["indices.bound"].any()
    assert stored["margin.bound"].all()


def test_the_case_comes_back_and_can_be_built_again(chosen):
    golden = load.load(NAME, chosen)
    assert set(golden.case().want) == {"out", "indices", "margin", "vjp"}
    again = build(replace(golden.case(), flags=golden.flags))
    assert again.tensors == suite.paths(chosen, NAME)[1].read_bytes()


@pytest.mark.parametrize("name", [NAME, "informer/float64"])
def test_an_audit_recomputes_them(chosen, name):
    finding = audit(name, chosen, 256)
    assert finding.wrong == ()
    assert finding.elements == sum(a.size for a in load.load(name, chosen).expected.values())


def test_one_index_off_by_one_or_out_of_order_fails(chosen):
    golden = load.load(NAME, chosen)
    right = dict(evaluated(golden))
    assert {c.name: c.verdict for c in compare(golden, right)} == dict.fromkeys(("out", "indices", "margin"), "pass")
    for wrong in (right["indices"] + (np.arange(5) == 3), right["indices"][..., ::-1]):
        found = {c.name: c for c in compare(golden, right | {"indices": wrong})}
        assert (found["out"].verdict, found["indices"].verdict) == ("pass", "fail")
        assert found["indices"].worst_ratio == np.inf
        # Counted in doubles: in float16, the case's own, an index would be a thousand units off at most.
        assert found["indices"].worst_ulp > 2**40
    assert found["indices"].why.startswith("indices[0, 0, 0] is ")
    with pytest.raises(ShapeError, match="indices has shape"):
        compare(golden, right | {"indices": right["indices"][..., :-1]})


def ours(q, k, v, sample, *, dout, queries, divisor="keys", lazy="mean", causal=False, factor=5, scale=None):
    spec = ra.Informer(queries=queries, divisor=divisor, lazy=lazy, causal=causal, factor=factor, scale=scale)
    x = {"q": q, "k": k, "v": v, "sample": sample}
    return dict(ra.evaluate(spec, x, want=("out", "indices", "margin"))) | dict(ra.vjp(spec, x, {"out": dout}))


@wraps(ours)
def unsorted(**given):
    found = ours(**given)
    return found | {"indices": np.sort(found["indices"], -1)}


@pytest.mark.parametrize(("fn", "verdict"), [(ours, "pass"), (unsorted, "fail")])
def test_a_backend_that_returns_them_is_told(chosen, fn, verdict):
    lines = ra.validate(fn, folder=chosen).lines
    assert {line.verdict for line in lines} == {verdict}
    assert all("indices" in line.outputs and "dq" in line.outputs for line in lines)
    assert {line.failing() for line in lines} == ({()} if verdict == "pass" else {("indices",)})
