"""Steps of `skipping` on one tile: lengths of vectors, and what a row may still leave out. Queries in the lanes."""
# ruff: noqa: PLR0917  Numba calls intrinsics by position

from __future__ import annotations

from typing import Any

from llvmlite import ir

from refattn.engines.cpu.tiles import INFINITY
from refattn.engines.cpu.vectors import F32, I32, Lanes, inline

_NEVER = -(2.0**100)  # logarithm of what is too small to count


@inline
def lengths(x: Lanes, norm: Any, base: Any, q: Any, centre: Any, depth: Any, unit: Any, more: Any) -> None:
    """Norm = unit |q| and base = unit q·centre + more norm, of qᵀ."""
    sums = x.variables([x.spread(1e-30)] * x.vectors)
    dots = x.variables([x.spread(0.0)] * x.vectors)
    with x.each(depth) as d:
        c = x.spread(x.load(x.at(centre, (d, 4)), F32))
        for place, dot, a in zip(sums, dots, x.loads(x.at(q, (d, x.row))), strict=True):
            x.b.store(x.fma(a, a, x.b.load(place)), place)
            x.b.store(x.fma(a, c, x.b.load(dot)), dot)
    by, slack = x.spread(unit), x.spread(more)
    found = [x.b.fmul(by, x.call("sqrt", x.b.load(place))) for place in sums]
    x.stores(found, norm)
    x.stores([x.fma(n, slack, x.b.fmul(by, x.b.load(dot))) for n, dot in zip(found, dots, strict=True)], base)


def logarithm(x: Lanes, a: Any) -> Any:
    """No more than log₂ a, by a straight line from one power of two to the next; far below where a is 0 or tiny."""
    steps = x.b.sitofp(x.b.bitcast(a, x.integers), x.floats)
    line = x.fma(steps, x.spread(2.0**-23), x.spread(-127.0 - 2.0**-12))
    return x.b.select(x.b.fcmp_ordered(">=", a, x.spread(2.0**-126)), line, x.spread(_NEVER))


@inline
def gauge(
    x: Lanes,
    budget: Any,
    base: Any,
    o: Any,
    width: Any,
    scales: Any,
    absent: Any,
    top: Any,
    total: Any,
    out: Any,
    lse: Any,
) -> None:
    """Budget = max(budget, top − base + min(out + log₂ min_d |o_d| / max |v_d|, lse + log₂ total)), all in bits."""
    leasts = x.variables([x.spread(INFINITY)] * x.vectors)
    with x.each(width) as d:
        by, more = (x.spread(x.load(x.at(base, (d, 4)), F32)) for base in (scales, absent))
        for place, a in zip(leasts, x.loads(x.at(o, (d, x.row))), strict=True):
            size, least = x.fma(x.magnitude(a), by, more), x.b.load(place)
            x.b.store(x.b.select(x.b.fcmp_ordered("<", size, least), size, least), place)
    found = []
    rows = zip(leasts, x.loads(total), x.loads(top), x.loads(base), x.loads(budget), strict=True)
    for least, z, m, start, old in rows:
        by_out = x.b.fadd(logarithm(x, x.b.load(least)), x.spread(out))
        by_lse = x.b.fadd(logarithm(x, z), x.spread(lse))
        smaller = x.b.select(x.b.fcmp_ordered("<", by_out, by_lse), by_out, by_lse)
        rounding = x.b.fmul(x.b.fadd(x.magnitude(m), x.magnitude(start)), x.spread(2.0**-22))
        found.append(x.largest(x.b.fsub(x.b.fsub(x.b.fadd(m, smaller), rounding), start), old))
    x.stores(found, budget)


@inline
def afford(
    x: Lanes,
    to: Any,
    spent: Any,
    budget: Any,
    norm: Any,
    place: Any,
    slope: Any,
    near: Any,
    far: Any,
    length: Any,
    count: Any,
) -> None:
    """to = spent + 2^(count + norm length − slope distance − budget) of keys from place `near` to `far`.

    `count` is the logarithm of their number, with the greatest entry of the table. Slopes are not negative.
    """
    near, far = (x.spread(x.b.trunc(end, I32)) for end in (near, far))
    at, size, more, zero = x.loads_of(place, x.integers), x.spread(length), x.spread(count), x.integers(None)
    found = []
    rows = zip(at, x.loads(norm), x.loads(slope), x.loads(budget), x.loads(spent), strict=True)
    for row, n, steep, left, before in rows:
        gaps = [x.b.sub(near, row), x.b.sub(row, far), zero]
        away = gaps[0]
        for gap in gaps[1:]:
            away = x.b.select(x.b.icmp_signed(">", away, gap), away, gap)
        fall = x.b.fmul(x.b.sitofp(away, x.floats), x.b.fmul(steep, x.spread(1 - 2.0**-10)))
        bits = x.b.fsub(x.b.fadd(x.b.fsub(x.b.fmul(n, size), fall), more), left)
        # exp2 is 0 below −126, which is no bound, and wrong above 127; 100 is also what NaN becomes.
        bits = x.b.select(x.b.fcmp_ordered("<", bits, x.spread(100.0)), bits, x.spread(100.0))
        found.append(x.b.fadd(before, x.exp2(x.largest(bits, x.spread(-100.0)))))
    x.stores(found, to)


@inline
def charge(x: Lanes, price: Any, dout: Any, width: Any, longest: Any, delta: Any) -> None:
    """Price = 1 / (|dout| longest + |δ|), of doutᵀ; ∞ where that is 0, and 0 where it is out of range or NaN."""
    size, zero, one = x.spread(longest), x.spread(0.0), x.spread(1.0)
    # More than squares lose that are too small for float32.
    sums, parts = x.variables([x.spread(1e-30)] * x.vectors), x.variables([zero] * x.vectors)
    with x.each(width) as d:
        for place, part, a in zip(sums, parts, x.loads(x.at(dout, (d, x.row))), strict=True):
            x.b.store(x.fma(a, a, x.b.load(place)), place)
            x.b.store(x.b.fadd(x.magnitude(a), x.b.load(part)), part)
    found = []
    for place, part, d in zip(sums, parts, x.loads(delta), strict=True):
        cost = x.b.fmul(x.call("sqrt", x.b.load(place)), size)
        cost = x.b.select(x.b.fcmp_ordered("==", x.b.load(part), zero), zero, cost)
        cost = x.b.fadd(cost, x.magnitude(d))
        fits = x.b.and_(x.b.fcmp_ordered(">", cost, x.spread(1e-30)), x.b.fcmp_ordered("<", cost, x.spread(1e30)))
        inverse = x.b.select(fits, x.b.fdiv(one, cost), zero)
        found.append(x.b.select(x.b.fcmp_ordered("==", cost, zero), x.spread(INFINITY), inverse))
    x.stores(found, price)


@inline
def weigh_bound(x: Lanes, p: Any, ds: Any, count: Any, delta: Any, price: Any, mass: Any, total: Any) -> None:
    """ds[n] = price (2 |ds[n] + p[n] δ| + |p[n] δ| + |ds[n]|); mass += Σ p[n], total += Σ ds[n]."""
    means, by = x.loads(delta), x.loads(price)
    masses, totals = x.variables(x.loads(mass)), x.variables(x.loads(total))
    with x.each(count) as n:
        row, other, found = x.at(p, (n, x.row)), x.at(ds, (n, x.row)), []
        for a, b, d, f, m, t in zip(x.loads(row), x.loads(other), means, by, masses, totals, strict=True):
            mean = x.b.fmul(a, d)
            twice = x.b.fmul(x.spread(2.0), x.magnitude(x.b.fadd(b, mean)))
            g = x.b.fmul(f, x.b.fadd(twice, x.b.fadd(x.magnitude(mean), x.magnitude(b))))
            x.b.store(x.b.fadd(x.b.load(m), a), m)
            x.b.store(x.b.fadd(x.b.load(t), g), t)
            found.append(g)
        x.stores(found, other)
    x.stores([x.b.load(place) for place in masses], mass)
    x.stores([x.b.load(place) for place in totals], total)


@inline
def magnitudes(x: Lanes, to: Any, source: Any, count: Any) -> None:
    """`count` numbers without their sign, contiguous."""
    for at, width in x.pieces(count):
        kind = ir.VectorType(I32, width)
        a = x.load(x.at(source, (at, 4)), kind)
        x.store(x.b.and_(a, kind([0x7FFFFFFF] * width)), x.at(to, (at, 4)))


@inline
def squares(x: Lanes, to: Any, k: Any, centre: Any, count: Any, depth: Any) -> None:
    """The greatest |k − centre|² of `count` keys, or what is there if that is greater; NaN is the greatest of all."""
    wide, single = x.variables([x.spread(0.0), ir.VectorType(F32, 1)([0.0])])
    with x.each(count) as n:
        row = x.at(k, (x.b.mul(n, depth), x.size))
        x.b.store(x.spread(0.0), wide)
        x.b.store(ir.VectorType(F32, 1)([0.0]), single)
        for at, width in x.pieces(depth):
            middle = x.load(x.at(centre, (at, 4)), ir.VectorType(F32, width))
            a = x.b.fsub(x.stored(x.at(row, (at, x.size)), width), middle)
            place = wide if width > 1 else single
            x.b.store(x.b.fadd(x.b.fmul(a, a), x.b.load(place)), place)
        found = x.b.fadd(x.total(x.b.load(wide)), x.b.extract_element(x.b.load(single), I32(0)))
        x.store(greater(x, x.b.bitcast(found, I32), x.load(to, I32)), to)


@inline
def peaks(x: Lanes, to: Any, v: Any, count: Any, width: Any) -> None:
    """The greatest |v_d| of `count` keys for each d, or what is there, as int32; NaN is the greatest of all."""
    with x.each(count) as n:
        row = x.at(v, (x.b.mul(n, width), x.size))
        for at, size in x.pieces(width):
            place, kind = x.at(to, (at, 4)), ir.VectorType(I32, size)
            x.store(greater(x, x.b.bitcast(x.stored(x.at(row, (at, x.size)), size), kind), x.load(place, kind)), place)


def greater(x: Lanes, a: Any, b: Any) -> Any:
    """The greater of floats without their sign, of which b has none, as integers: infinity and NaN are the greatest."""
    mask = a.type(0x7FFFFFFF) if a.type == I32 else a.type([0x7FFFFFFF] * a.type.count)
    size = x.b.and_(a, mask)
    return x.b.select(x.b.icmp_signed(">", size, b), size, b)
