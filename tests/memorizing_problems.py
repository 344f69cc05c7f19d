"""Options, sizes and inputs of Memorizing attention that two test files use."""

from itertools import product

import pytest

import refattn as ra

MODULE = ra.variants()["memorizing"].module
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "L": 14, "D": 3, "Dv": 2}
KINDS = {"plain": {}, "absolute": {"normalise": True}, "exponential": {"normalise": True, "temperature": "exponential"}}
OPTIONS = {
    f"{combine}-{selection}-{kind}-{'biased' if bias else 'unbiased'}": {
        "segment": 4, "memory": 6, "top": 3, "combine": combine, "selection": selection, "bias": bias, **options,
    }
    for combine, selection, (kind, options), bias in product(
        ("gated", "joint"), ("exact", "bucketed"), KINDS.items(), ((), (ra.T5(buckets=4, max_distance=6),))
    )
}  # fmt: skip
EVERY = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def arrays(spec, rng, **changed):
    sizes = SIZES | changed
    return {name: rng.standard_normal(a.shape(sizes)) for name, a in MODULE.signature(spec).items()}


def everything(spec, x):
    return ra.evaluate(spec, x, want=(*MODULE.outputs(spec), "state"))
