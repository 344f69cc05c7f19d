"""Steps of the decode kernel on the logits of a few rows and a tile of keys, lanes along the keys.

    weights  m' = max(m, s), w = exp2(s − m'), l' = l exp2(m − m') + Σ_n w[n]

A tile's row (`Lanes.row`) is one query's numbers for all its keys. Steps of `tiles` that treat rows and lanes alike
serve here with the two exchanged.
"""
# ruff: noqa: PLR0917  Numba calls intrinsics by position

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

from refattn.engines.cpu.tiles import INFINITY
from refattn.engines.cpu.vectors import F32, I32, Lanes, inline

LEAST = -float.fromhex("0x1.fffffep127")  # no logit that is a number lies below, and −∞ does


def across(x: Lanes, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
    """All lanes of a vector joined, in every lane."""
    step = 1
    while step < x.width:
        vector = join(vector, x.mix(vector, vector, [c ^ step for c in range(x.width)]))
        step *= 2
    return vector


@inline
def weights(x: Lanes, s: Any, size: Any, tiles: Any, m: Any, total: Any, factor: Any, count: Any) -> None:
    """The logits of `count` rows in some tiles, `size` bytes apart, become weights.

    m changes, and `total`, a vector for each row; `factor` is what they change by.
    """
    with x.each(count) as r:
        row, place, sums = x.at(s, (r, x.row)), x.at(m, (r, 4)), x.at(total, (r, 4 * x.width))
        before = x.spread(x.load(place, F32))
        tops = x.variables([before] * x.vectors)
        with x.each(tiles) as n:
            for top, logit in zip(tops, x.loads(x.at(row, (n, size))), strict=True):
                x.b.store(x.largest(x.b.load(top), logit), top)
        now = across(x, reduce(x.largest, [x.b.load(top) for top in tops]), x.largest)
        change = x.exp2(x.b.fsub(before, now))
        x.store(x.b.extract_element(now, I32(0)), place)
        x.store(x.b.extract_element(change, I32(0)), x.at(factor, (r, 4)))
        parts = x.variables([x.b.fmul(change, x.load(sums))] + [x.spread(0.0)] * (x.vectors - 1))
        with x.each(tiles) as n:
            found = [x.exp2(x.b.fsub(logit, now)) for logit in x.loads(x.at(row, (n, size)))]
            for part, weight in zip(parts, found, strict=True):
                x.b.store(x.b.fadd(x.b.load(part), weight), part)
            x.stores(found, x.at(row, (n, size)))
        x.store(reduce(x.b.fadd, [x.b.load(part) for part in parts]), sums)


@inline
def scaled(x: Lanes, s: Any, count: Any, k_scale: Any, v_scale: Any) -> None:
    """s[r,n] *= k_scale[n]; NaN for what is not finite, in v_scale too."""
    by, values, zero = x.loads(k_scale), x.loads(v_scale), x.spread(0.0)
    with x.each(count) as r:
        row = x.at(s, (r, x.row))
        found = [x.b.fmul(a, scale) for a, scale in zip(x.loads(row), by, strict=True)]
        x.stores([x.fma(v, zero, x.fma(a, zero, a)) for v, a in zip(values, found, strict=True)], row)


@inline
def valued(x: Lanes, w: Any, count: Any, v_scale: Any) -> None:
    """w[r,n] *= v_scale[n]; a weight of 0 stays, for a key that is masked may have any scale."""
    by, zero = x.loads(v_scale), x.spread(0.0)
    with x.each(count) as r:
        row = x.at(w, (r, x.row))
        found = x.loads(row)
        products = [x.b.fmul(a, scale) for a, scale in zip(found, by, strict=True)]
        live = [x.b.fcmp_unordered("!=", a, zero) for a in found]
        x.stores([x.b.select(c, a, zero) for c, a in zip(live, products, strict=True)], row)


@inline
def sloped(x: Lanes, s: Any, count: Any, k_at: Any, q_at: Any, slope: Any) -> None:
    """s[r,n] −= slope[r] |k_at[n] − q_at[r]|, positions int32."""
    keys = x.loads_of(k_at, x.integers)
    with x.each(count) as r:
        row = x.at(s, (r, x.row))
        place = x.spread(x.load(x.at(q_at, (r, 4)), I32))
        steep = x.b.fneg(x.spread(x.load(x.at(slope, (r, 4)), F32)))
        far = [x.magnitude(x.b.sitofp(x.b.sub(key, place), x.floats)) for key in keys]
        x.stores([x.fma(f, steep, a) for f, a in zip(far, x.loads(row), strict=True)], row)


@inline
def added(x: Lanes, s: Any, count: Any, other: Any, factor: Any) -> None:
    """s[r] += factor other[r]; −∞ in `other` masks whatever stands in s."""
    by, hidden = x.spread(factor), x.spread(-INFINITY)
    with x.each(count) as r:
        row = x.at(s, (r, x.row))
        terms = x.loads(x.at(other, (r, x.row)))
        sums = [x.fma(term, by, a) for term, a in zip(terms, x.loads(row), strict=True)]
        kept = [
            x.b.select(x.b.fcmp_ordered("==", term, hidden), hidden, a) for term, a in zip(terms, sums, strict=True)
        ]
        x.stores(kept, row)
