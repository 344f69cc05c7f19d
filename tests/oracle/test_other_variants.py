"""Backends of variants beside SDPA are called by the variant's own names, and only where they declare them all."""

import numpy as np
import pytest

import refattn as ra
from refattn import registry
from refattn.golden import suite
from refattn.golden.build import build


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two of Linformer's cases: one with an option, one without."""
    chosen = [c for c in registry.info("linformer").cases() if c.name in ("linformer/shared", "linformer/per_head")]
    built = {case.name: build(case) for case in chosen}
    return published(tmp_path_factory, built)


def published(tmp_path_factory, built):
    path = tmp_path_factory.mktemp("suite")
    suite.publish(path, {name: (b.manifest, b.tensors) for name, b in built.items()})
    return path


def ours(q, k, v, E, F, *, heads="shared", scale=None, dout=None, dlse=None):
    spec, x = ra.Linformer(heads=heads, scale=scale), {"q": q, "k": k, "v": v, "E": E, "F": F}
    duals = {name: dual for name, dual in (("out", dout), ("lse", dlse)) if dual is not None}
    return dict(ra.evaluate(spec, x, want=("out", "lse"))) | dict(ra.vjp(spec, x, duals))


def without_options(q, k, v, E, F):
    return ours(q, k, v, E, F, dout=np.zeros(q.shape[:3] + v.shape[3:]))["out"]


def exchanged(q, k, v, E, F, *, heads="shared", scale=None):
    return without_options(q, k, v, F, E)


def plain(q, k, v, **options):
    return ra.attention(q, k, v)


def verdicts(fn, folder):
    return {line.case: (line.verdict, line.words) for line in ra.validate(fn, folder=folder).lines}


def test_the_arrays_and_options_come_by_their_names_and_gradients_are_compared(folder):
    assert set(verdicts(ours, folder).values()) == {("pass", "")}


def test_an_option_that_is_not_declared_makes_the_case_not_supported(folder):
    found = verdicts(without_options, folder)
    assert found["linformer/shared"][0] == "pass"
    assert found["linformer/per_head"] == (
        "not supported",
        "takes no heads and no scale, which linformer needs",
    )


def test_any_options_are_not_enough(folder):
    assert set(verdicts(plain, folder).values()) == {
        ("not supported", "takes no E and no F, which linformer needs"),
        ("not supported", "takes no E and no F and no heads and no scale, which linformer needs"),
    }


def test_a_mistake_fails_without_a_diagnosis_of_another_variant(folder):
    report = ra.validate(exchanged, folder=folder)
    assert [line.verdict for line in report.lines] == ["fail", "fail"]
    assert not report.mistakes


# Terms within a variant, and outputs beside out and lse


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """A case with a bias that is not the default, and with cotangents of four outputs."""
    case = next(registry.info("attention_alignment").cases())
    return published(tmp_path_factory, {case.name: build(case)})


def alignment(q, k, v, temperature, t5_table, *, bias, causal, scale, **duals):
    assert bias == {"variant": "t5", "buckets": 8, "max_distance": 12, "bidirectional": False}
    spec = ra.AttentionAlignment(bias=registry.from_json(bias), causal=causal, scale=scale)
    x = {"q": q, "k": k, "v": v, "temperature": temperature, "t5_table": t5_table}
    outputs = ra.evaluate(spec, x, want=("out", "lse", "max_prob", "entropy"))
    return dict(outputs) | dict(ra.vjp(spec, x, {name[1:]: dual for name, dual in duals.items()}))


def with_all(*, q, k, v, temperature, t5_table, dout, dlse, dmax_prob, dentropy, bias, causal, scale=1.0):
    duals = {"dout": dout, "dlse": dlse, "dmax_prob": dmax_prob, "dentropy": dentropy}
    return alignment(q, k, v, temperature, t5_table, bias=bias, causal=causal, scale=scale, **duals)


def with_two(*, q, k, v, temperature, t5_table, dout, dlse, bias, causal, scale=1.0):
    return alignment(q, k, v, temperature, t5_table, bias=bias, causal=causal, scale=scale, dout=dout, dlse=dlse)


def test_a_term_comes_as_plain_data_and_every_output_is_compared(aligned):
    (line,) = ra.validate(with_all, folder=aligned).lines
    assert line.verdict == "pass", line.words
    assert {"out", "lse", "max_prob", "entropy", "dq", "dtemperature", "dt5_table"} <= set(line.outputs)


def test_gradients_for_some_of_the_cotangents_are_not_compared(aligned):
    (line,) = ra.validate(with_two, folder=aligned).lines
    assert line.verdict == "pass", line.words
    assert set(line.outputs) == {"out", "lse", "max_prob", "entropy"}


# Options whose default the sizes decide, and terms in a tuple


@pytest.fixture(scope="module")
def defaults(tmp_path_factory):
    """Axial-DeepLab, whose scale is 1 where none is said, and Memorizing with a T5 in its tuple of biases."""
    every = {case.name: case for name in ("axial_deeplab", "memorizing") for case in registry.info(name).cases()}
    chosen = [every["axial_deeplab/rows_3x5"], every["memorizing/normalised"]]
    return published(tmp_path_factory, {case.name: build(case) for case in chosen})


def without_scale(*, q, k, v, rq, rk, rv, span, axis="height"):
    x = {"q": q, "k": k, "v": v, "rq": rq, "rk": rk, "rv": rv}
    return dict(ra.evaluate(ra.AxialDeepLab(span=span, axis=axis), x, want=("out", "lse")))


def near_and_far(*, q, k, v, gate, sharpness, t5_table, segment, memory, top, normalise, bias):
    assert bias == ({"variant": "t5", "buckets": 4, "max_distance": 6, "bidirectional": False},)
    terms = tuple(map(registry.from_json, bias))
    spec = ra.Memorizing(segment=segment, memory=memory, top=top, normalise=normalise, bias=terms)
    x = {"q": q, "k": k, "v": v, "gate": gate, "sharpness": sharpness, "t5_table": t5_table}
    return dict(ra.evaluate(spec, x, want=("out", "indices", "margin")))


@pytest.mark.parametrize(
    ("fn", "case"), [(without_scale, "axial_deeplab/rows_3x5"), (near_and_far, "memorizing/normalised")]
)
def test_a_scale_that_is_the_variants_own_default_is_not_passed_and_terms_are_plain_data(fn, case, defaults):
    assert verdicts(fn, defaults)[case] == ("pass", "")
