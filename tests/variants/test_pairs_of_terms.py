"""Every two biases, and every bias beside what reads q and k: logits add, in either order, in the text and the plan."""

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from checks import near

import refattn as ra
from refattn import api
from refattn.oracle.offer import dense
from refattn.plan import execute

BIASES = {name: info.spec() for name, info in ra.variants().items() if hasattr(info.module, "term")} | {
    "alibi of half the heads": ra.ALiBi(direction="half"),
    "learned alibi": ra.ALiBi(slopes="learned"),
    "interpolated alibi": ra.ALiBiInterpolation(train_length=3),
    "bidirectional t5": ra.T5(bidirectional=True),
}
CONTENT = {name: info.spec() for name, info in ra.variants().items() if hasattr(info.module, "content")} | {
    "shaw per head": ra.Shaw(clip=2, heads="per_head"),
    "shaw of keys": ra.Shaw(clip=3, values=False),
}
PAIRS = list(combinations_with_replacement(BIASES, 2))
BESIDE = [(one, other) for one in CONTENT for other in BIASES]
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "Lq": 6, "Lk": 9, "D": 3, "Dv": 2}


def problem(rng, *terms, content=()):
    spec = ra.SDPA(causal="bottom_right", softcap=2.0, bias=terms, content=content)
    signature = ra.variants()["sdpa"].module.signature(spec)
    x = {n: rng.standard_normal(a.shape(SIZES)) for n, a in signature.items() if not a.optional}
    return spec, x | {"sink": rng.standard_normal(4), "kv_lengths": np.array([9, 5])}


@pytest.mark.parametrize("names", PAIRS, ids=" + ".join)
def test_two_terms_add(names, rng):
    one, other = (BIASES[name] for name in names)
    spec, x = problem(rng, one, other)
    found = ra.evaluate(spec, x, want=("out", "lse"))
    turned = ra.evaluate(replace(spec, bias=(other, one)), x, want=("out", "lse"))
    for name in ("out", "lse"):
        near(turned[name], found[name])
    are_what_their_logits_are(spec, x)


@pytest.mark.parametrize("names", BESIDE, ids=" + ".join)
def test_a_bias_adds_to_what_reads_queries_and_keys(names, rng):
    content, bias = CONTENT[names[0]], BIASES[names[1]]
    are_what_their_logits_are(*problem(rng, bias, content=content))


def are_what_their_logits_are(spec, x):
    """The biases as one array, and the plan, give what the terms give."""
    plan = api.build(spec, x, "float64", ("out",)).plan
    bare, sdpa = replace(spec, bias=()), ra.variants()["sdpa"].module
    own = {name: x[name] for name in sdpa.signature(bare) if name in x}
    logits = sum((dense(b, plan) for b in plan.bias), np.zeros((1, 4, 6, 9)))
    found = ra.evaluate(spec, x, want=("out", "lse"))
    as_array = ra.evaluate(bare, own | {"bias": logits}, want=("out", "lse"))
    executed = execute(plan)
    for name in ("out", "lse"):
        near(as_array[name], found[name])
        near(executed[name], found[name])
