"""Memorizing attention against plain loops, all options, and equal products by an independent ranking."""

import math
from itertools import product

import numpy as np
import pytest
from checks import near, same
from memorizing_problems import EVERY, arrays, everything

import refattn as ra
from refattn import api
from refattn.plan import execute


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def unit(row, epsilon):
    length = math.sqrt(dot(row, row) + epsilon)
    return [x / length for x in row]


def mean(logits, values):
    top = max(logits)
    weights = [math.exp(s - top) for s in logits]
    size = math.fsum(weights)
    return [math.fsum(w * v[d] for w, v in zip(weights, values, strict=True)) / size for d in range(len(values[0]))], (
        top + math.log(size)
    )


def chosen(spec, products):
    """Tokens by place of {token: product}, the first of `top`, and the margin."""
    ranked = sorted(products, key=lambda t: (-products[t], t))
    if spec.selection == "exact":
        left = ranked[spec.top :]
        return ranked[: spec.top], products[ranked[spec.top - 1]] - products[left[0]] if left else 0.0
    buckets = [[t for t in ranked if t % spec.top == b] for b in range(spec.top)]
    margins = [products[b[0]] - products[b[1]] for b in buckets if len(b) > 1]
    return [b[0] if b else -1 for b in buckets], min(margins, default=0.0)


def one_head(spec, x, learned, bucket_bias):
    """Outputs of one head: token by token, out of all that came before."""
    q, k, v = x
    if spec.normalise:
        q, k = ([unit(row, spec.epsilon) for row in rows] for rows in (q, k))
    a = (
        {"absolute": abs, "exponential": math.exp}[spec.temperature](learned["sharpness"])
        if spec.normalise
        else 3**-0.5
    )
    found = {"out": [], "lse": [], "indices": [], "margin": []}
    for i, row in enumerate(q):
        begin = i - i % spec.segment
        reach = range(max(begin - spec.memory, 0), begin)
        tokens, margin = chosen(spec, {t: dot(row, k[t]) for t in reach})
        far = [t for t in tokens if t >= 0]
        inside = range(begin, i + 1)
        near_logits = [a * dot(row, k[j]) + bucket_bias(i - j) for j in inside]
        far_logits, far_values, near_values = [a * dot(row, k[t]) for t in far], [v[t] for t in far], v[begin : i + 1]
        if spec.combine == "joint":
            out, lse = mean(far_logits + near_logits, far_values + near_values)
        else:
            g = 1 / (1 + math.exp(-learned["gate"]))
            memory = mean(far_logits, far_values)[0] if far else [0.0] * len(v[0])
            out, lse = [g * m + (1 - g) * n for m, n in zip(memory, mean(near_logits, near_values)[0], strict=True)], 0
        for name, value in zip(found, (out, lse, tokens + [-1] * (spec.top - len(tokens)), margin), strict=True):
            found[name].append(value)
    return found


@EVERY
def test_against_plain_loops(options, rng):
    spec = ra.Memorizing(**options)
    x = arrays(spec, rng)
    found = everything(spec, x)
    for b, h in product(range(2), range(4)):
        g = h // 2
        learned = {name: float(x[name][h]) for name in ("gate", "sharpness") if name in x}
        # Four buckets to distance 6: 0, 1, 2 to 3, and from √(2 · 6) = 3.46 on.
        table = x["t5_table"][:, h] if spec.bias else np.zeros(4)
        qkv = x["q"][b, h].tolist(), x["k"][b, g].tolist(), x["v"][b, g].tolist()
        expected = one_head(
            spec, qkv, learned, lambda r, table=table: float(table[r if r < 2 else 2 if r < 3.46 else 3])
        )
        same(found.indices[b, h], np.array(expected.pop("indices")))
        for name, value in expected.items():
            if name in found:
                near(found[name][b, h], np.array(value), 1e-11)


@pytest.mark.parametrize("selection", ["exact", "bucketed"])
def test_equal_products_go_to_the_lowest_index_in_reference_and_plan(selection, rng):
    spec = ra.Memorizing(segment=5, memory=15, top=3, selection=selection)
    x = arrays(spec, rng, L=20)
    x |= {name: rng.integers(-1, 2, x[name].shape).astype(float) for name in "qk"}
    found = everything(spec, x)
    near(execute(api.build(spec, x, "float64", ("out",)).plan)["out"], found.out)
    products = np.einsum("bhid,bhjd->bhij", x["q"], np.repeat(x["k"], 2, 1))
    for b, h, i in np.ndindex(2, 4, 20):
        reach = range(max(i - i % 5 - 15, 0), i - i % 5)
        tokens, _ = chosen(spec, {t: float(products[b, h, i, t]) for t in reach})
        same(found.indices[b, h, i], np.array(tokens + [-1] * (3 - len(tokens))))
    assert (found.margin[:, :, 5:] == 0).any()
