"""Every two terms of the registry beside each other: their logits add, in either order, in the text and in the plan."""

from itertools import combinations_with_replacement

import numpy as np
import pytest
from checks import near

import refattn as ra
from refattn import api
from refattn.oracle.offer import dense
from refattn.plan import execute

TERMS = {name: info.spec() for name, info in ra.variants().items() if info.kind == "term"} | {
    "alibi of half the heads": ra.ALiBi(direction="half"),
    "learned alibi": ra.ALiBi(slopes="learned"),
    "interpolated alibi": ra.ALiBiInterpolation(train_length=3),
    "bidirectional t5": ra.T5(bidirectional=True),
}
PAIRS = list(combinations_with_replacement(TERMS, 2))
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "Lq": 6, "Lk": 9, "D": 3, "Dv": 2}


def problem(rng, *terms):
    spec = ra.SDPA(causal="bottom_right", bias=terms)
    signature = ra.variants()["sdpa"].module.signature(spec)
    x = {n: rng.standard_normal(a.shape(SIZES)) for n, a in signature.items() if not a.optional}
    return spec, x | {"sink": rng.standard_normal(4), "kv_lengths": np.array([9, 5])}


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_two_terms_add(names, rng):
    one, other = (TERMS[name] for name in names)
    spec, x = problem(rng, one, other)
    found = ra.evaluate(spec, x, want=("out", "lse"))
    plan = api.build(spec, x, "float64", ("out",)).plan
    turned = ra.evaluate(ra.SDPA(causal="bottom_right", bias=(other, one)), x, want=("out", "lse"))
    logits = sum((dense(b, plan) for b in plan.bias), np.zeros((1, 4, 6, 9)))
    own = {name: x[name] for name in ("q", "k", "v", "sink", "kv_lengths")}
    as_array = ra.evaluate(ra.SDPA(causal="bottom_right"), own | {"bias": logits}, want=("out", "lse"))
    executed = execute(plan)
    for name in ("out", "lse"):
        near(turned[name], found[name])
        near(as_array[name], found[name])
        near(executed[name], found[name])
