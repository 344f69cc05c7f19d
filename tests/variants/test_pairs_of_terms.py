"""Every two terms of the registry beside each other in SDPA: turns come first, logits add, in the text and in the plan.

Terms are found by their places: a rotation stands beside content and bias, those beside all of either kind.
"""

from dataclasses import replace
from itertools import combinations_with_replacement

import numpy as np
import pytest
from checks import near

import refattn as ra
from refattn import api
from refattn.errors import SpecError
from refattn.oracle.offer import dense
from refattn.plan import execute
from refattn.variants._place import place

INFOS = {name: info for name, info in ra.variants().items() if info.kind == "term"}
TERMS = {name: info.example for name, info in INFOS.items()} | {
    "alibi of half the heads": ra.ALiBi(direction="half"),
    "learned alibi": ra.ALiBi(slopes="learned"),
    "interpolated alibi": ra.ALiBiInterpolation(train_length=3),
    "bidirectional t5": ra.T5(bidirectional=True),
    "shaw per head": ra.Shaw(clip=2, heads="per_head"),
    "shaw of keys": ra.Shaw(clip=3, values=False),
    "rope by a table": ra.RoPE(pairing="interleaved", angles="table", width=2, part="last"),
}
PLACES = {name: INFOS[spec.variant].place for name, spec in TERMS.items()}
# Terms that take an array of one name and other sizes have no problem in common; nor do two rotations.
APART = [("shaw", "shaw per head"), ("shaw", "shaw of keys"), ("shaw per head", "shaw of keys")]
PAIRS = [
    pair
    for pair in combinations_with_replacement(TERMS, 2)
    if pair not in APART and [PLACES[name] for name in pair].count("rotary") < 2
]
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "Lq": 6, "Lk": 9, "D": 4, "Dv": 2, "P": 9}
EVERY_PAIR = pytest.mark.parametrize("names", PAIRS, ids=" + ".join)


def problem(rng, names):
    fields = {place: tuple(TERMS[n] for n in names if PLACES[n] == place) for place in ("content", "bias")}
    rotary = next((TERMS[n] for n in names if PLACES[n] == "rotary"), None)
    spec = ra.SDPA(causal="bottom_right", rotary=rotary, **fields)
    signature = ra.variants()["sdpa"].module.signature(spec)
    x = {n: rng.standard_normal(a.shape(SIZES)) for n, a in signature.items() if not a.optional}
    return spec, x | {"sink": rng.standard_normal(4), "kv_lengths": np.array([9, 5]), "q_lengths": np.array([6, 4])}


def evaluate(spec, x):
    signature = ra.variants()["sdpa"].module.signature(spec)
    return ra.evaluate(spec, {name: a for name, a in x.items() if name in signature}, want=("out", "lse"))


def agree(one, other):
    for name in ("out", "lse"):
        near(one[name], other[name])


def test_there_are_pairs_of_every_two_places_that_go_together():
    present = set(PLACES.values())
    pairs = {frozenset(PLACES[name] for name in pair) for pair in PAIRS}
    assert {"rotary", "bias"} <= present
    assert pairs == {frozenset(p) for p in combinations_with_replacement(present, 2)} - {frozenset(["rotary"])}


@EVERY_PAIR
def test_the_plan_is_the_text_and_order_is_nothing(names, rng):
    spec, x = problem(rng, names)
    found = evaluate(spec, x)
    agree(execute(api.build(spec, x, "float64", ("out",)).plan), found)
    agree(evaluate(replace(spec, content=spec.content[::-1], bias=spec.bias[::-1]), x), found)


@EVERY_PAIR
def test_biases_are_an_array_added_after_everything_else(names, rng):
    spec, x = problem(rng, names)
    plan = api.build(spec, x, "float64", ("out",)).plan
    logits = sum((dense(b, plan) for b in plan.bias), np.zeros((1, 4, 6, 9)))
    agree(evaluate(replace(spec, bias=()), x | {"bias": logits}), evaluate(spec, x))


@pytest.mark.parametrize("names", [pair for pair in PAIRS if "rotary" in map(PLACES.get, pair)], ids=" + ".join)
def test_a_rotation_comes_before_everything_else(names, rng):
    spec, x = problem(rng, names)
    resolved = api.build(spec, x, "float64", ("out",)).spec
    q, k = INFOS[spec.rotary.variant].module.rotate(resolved.rotary, x, place(spec.causal, x))
    agree(evaluate(replace(spec, rotary=None), x | {"q": q, "k": k}), evaluate(spec, x))


@pytest.mark.parametrize("names", APART, ids=" + ".join)
def test_two_tables_of_one_name_and_other_sizes_are_refused(names):
    with pytest.raises(SpecError, match=r"shaw_k is \(.*\) real to one of these terms and \(.*\) real to another"):
        ra.explain(ra.SDPA(content=tuple(TERMS[n] for n in names)), SIZES)
