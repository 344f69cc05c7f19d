r"""Steps of a fast kernel on one tile: queries in the lanes, keys down the rows.

    products     s[n] = Σ_d k[n,d] qᵀ[d]                    a key's number is spread over all queries
    weigh        m' = max(m, c s), w = exp2(c s − m'), l' = l exp2(m − m') + Σ_n w[n]
    accumulate   o[d] = exp2(m − m') o[d] + Σ_n v[n,d] w[n]

A tile's rows are contiguous: qᵀ (D,BM), s and w (n,BM), oᵀ (Dv,BM), BM = vectors·width lanes. k and v are read as they
lie in memory, `stride` bytes from key to key. All arguments that are not numbers of something are addresses.
"""
# ruff: noqa: PLR0917  Numba calls intrinsics by position

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir

from refattn.engines.cpu.vectors import F32, I8, I32, Lanes, inline

BOTTOM = -(2.0**127)  # stands for −∞ as a running maximum: two of them have a difference
INFINITY = float("inf")


@inline
def products(x: Lanes, s: Any, q: Any, k: Any, stride: Any, count: Any, depth: Any) -> None:
    """s[n] = k[n] · qᵀ for n < count."""

    def block(start: Any, size: int) -> None:
        rows = [x.at(k, (x.b.add(start, x.index(n)), stride)) for n in range(size)]
        sums = x.variables([x.spread(0.0)] * (size * x.vectors))
        with x.each(depth) as d:
            queries = x.loads(x.at(q, (d, x.row)))
            for n in range(size):
                key = x.spread(x.load(x.at(rows[n], (d, 4)), F32))
                for v in range(x.vectors):
                    place = sums[n * x.vectors + v]
                    x.b.store(x.fma(key, queries[v], x.b.load(place)), place)
        for n in range(size):
            found = [x.b.load(place) for place in sums[n * x.vectors : (n + 1) * x.vectors]]
            x.stores(found, x.at(s, (x.b.add(start, x.index(n)), x.row)))

    x.in_blocks(count, block)


@inline
def accumulate(x: Lanes, o: Any, factor: Any, w: Any, v: Any, stride: Any, count: Any, width: Any) -> None:
    """o[d] = factor o[d] + Σ_n v[n,d] w[n] for d < width."""

    def block(start: Any, size: int) -> None:
        rows = [x.at(o, (x.b.add(start, x.index(d)), x.row)) for d in range(size)]
        scale = x.loads(factor)
        begun = [x.b.fmul(a, f) for row in rows for a, f in zip(x.loads(row), scale, strict=True)]
        sums = x.variables(begun)
        first = x.at(v, (start, 4))
        with x.each(count) as n:
            weights = x.loads(x.at(w, (n, x.row)))
            values = x.at(first, (n, stride))
            for d in range(size):
                value = x.spread(x.load(x.at(values, 4 * d), F32))
                for m in range(x.vectors):
                    place = sums[d * x.vectors + m]
                    x.b.store(x.fma(value, weights[m], x.b.load(place)), place)
        for d, row in enumerate(rows):
            x.stores([x.b.load(place) for place in sums[d * x.vectors : (d + 1) * x.vectors]], row)

    x.in_blocks(width, block)


@inline
def weigh(x: Lanes, s: Any, m: Any, total: Any, factor: Any, count: Any, c: Any) -> None:
    """Logits c s[n] become weights; the running maximum m and total change, and `factor` is what they change by.

    A row of one vector is too short to wait for, so four are taken at a time; what is left of four is filled with −∞.
    """
    step = 1 if x.vectors > 1 else 4
    turns = x.b.sdiv(x.b.add(count, x.index(step - 1)), x.index(step))
    with x.each(x.b.sub(x.b.mul(turns, x.index(step)), count)) as n:
        x.stores([x.spread(-INFINITY)] * x.vectors, x.at(s, (x.b.add(count, n), x.row)))
    unit = x.spread(c)
    tops = x.variables([x.spread(-INFINITY)] * (step * x.vectors))
    with x.each(turns) as n:
        rows = [x.at(s, (n, step * x.row), k * x.row) for k in range(step)]
        for place, logit in zip(tops, [a for row in rows for a in x.loads(row)], strict=True):
            x.b.store(x.largest(x.b.load(place), logit), place)
    found = [x.b.load(place) for place in tops]
    while len(found) > x.vectors:
        found = [x.largest(a, b) for a, b in zip(found[::2], found[1::2], strict=True)]
    before = x.loads(m)
    now = [x.largest(x.b.fmul(top, unit), old) for top, old in zip(found, before, strict=True)]
    change = [x.exp2(x.b.fsub(old, new)) for old, new in zip(before, now, strict=True)]
    shift = [x.b.fneg(new) for new in now]
    begun = [x.b.fmul(f, old) for f, old in zip(change, x.loads(total), strict=True)]
    sums = x.variables(begun + [x.spread(0.0)] * ((step - 1) * x.vectors))
    x.stores(now, m)
    x.stores(change, factor)
    with x.each(turns) as n:
        rows = [x.at(s, (n, step * x.row), k * x.row) for k in range(step)]
        weights = [x.exp2(x.fma(a, unit, b)) for row in rows for a, b in zip(x.loads(row), shift, strict=True)]
        for place, weight in zip(sums, weights, strict=True):
            x.b.store(x.b.fadd(x.b.load(place), weight), place)
        for k, row in enumerate(rows):
            x.stores(weights[k * x.vectors : (k + 1) * x.vectors], row)
    ended = [x.b.load(place) for place in sums]
    while len(ended) > x.vectors:
        ended = [x.b.fadd(a, b) for a, b in zip(ended[::2], ended[1::2], strict=True)]
    x.stores(ended, total)


@inline
def squash(x: Lanes, s: Any, count: Any, c: Any, offset: Any) -> None:
    """s[n] = 1 / (1 + 2^−(c s[n] + offset)), 0 where that is below 2⁻¹²⁶; NaN stays NaN."""
    unit, more, one = x.spread(x.b.fneg(c)), x.spread(x.b.fneg(offset)), x.spread(1.0)

    def weight(a: Any) -> Any:
        y = x.fma(a, unit, more)
        far = x.b.fcmp_ordered(">", y, x.spread(126.0))
        divisor = x.b.fadd(x.exp2(x.b.select(far, x.spread(126.0), y)), one)
        return x.b.select(far, x.spread(0.0), x.b.fdiv(one, divisor))

    sweep(x, s, count, lambda n, row: [weight(a) for a in row])


def sweep(x: Lanes, s: Any, count: Any, change: Callable[[Any, list[Any]], list[Any]]) -> None:
    """s[n] = change(n, s[n]) for n < count."""
    with x.each(count) as n:
        row = x.at(s, (n, x.row))
        x.stores(change(n, x.loads(row)), row)


@inline
def bend(x: Lanes, s: Any, count: Any, steep: Any, cap: Any) -> None:
    """s[n] = cap tanh(steep s[n])."""
    inner, outer = x.spread(steep), x.spread(cap)
    sweep(x, s, count, lambda n, row: [x.b.fmul(outer, a) for a in x.tanh([x.b.fmul(inner, a) for a in row])])


@inline
def lean(x: Lanes, s: Any, count: Any, c: Any, k_at: Any, q_at: Any, slope: Any) -> None:
    """s[n] = c s[n] − slope |k_at[n] − q_at|."""
    unit, at, by = x.spread(c), x.loads_of(q_at, x.integers), [x.b.fneg(a) for a in x.loads(slope)]

    def change(n: Any, row: list[Any]) -> list[Any]:
        key = x.spread(x.load(x.at(k_at, (n, 4)), I32))
        far = [x.magnitude(x.b.sitofp(x.b.sub(key, a), x.floats)) for a in at]
        return [x.fma(f, b, x.b.fmul(unit, a)) for f, b, a in zip(far, by, row, strict=True)]

    sweep(x, s, count, change)


@inline
def add(x: Lanes, s: Any, count: Any, c: Any, other: Any, stride: Any, factor: Any) -> None:
    """s[n] = c s[n] + factor other[n], rows `stride` bytes apart."""
    unit, by = x.spread(c), x.spread(factor)

    def change(n: Any, row: list[Any]) -> list[Any]:
        added = x.loads(x.at(other, (n, stride)))
        return [x.fma(o, by, x.b.fmul(unit, a)) for o, a in zip(added, row, strict=True)]

    sweep(x, s, count, change)


@inline
def hide(x: Lanes, s: Any, count: Any, k_at: Any, q_at: Any, low: Any, reach: Any) -> None:
    """−∞ where not low ≤ k_at[n] − q_at ≤ low + reach; int32 that do not overflow, `reach` as an unsigned one."""
    at, first, most = x.loads_of(q_at, x.integers), x.spread(x.b.trunc(low, I32)), x.spread(x.b.trunc(reach, I32))

    def change(n: Any, row: list[Any]) -> list[Any]:
        key = x.b.sub(x.spread(x.load(x.at(k_at, (n, 4)), I32)), first)
        seen = [x.b.icmp_unsigned("<=", x.b.sub(key, a), most) for a in at]
        return [x.b.select(c, a, x.spread(-INFINITY)) for c, a in zip(seen, row, strict=True)]

    sweep(x, s, count, change)


@inline
def keep(x: Lanes, s: Any, count: Any, other: Any) -> None:
    """−∞ where other[n] is not 0."""

    def change(n: Any, row: list[Any]) -> list[Any]:
        seen = [x.b.fcmp_ordered("==", o, x.spread(0.0)) for o in x.loads(x.at(other, (n, x.row)))]
        return [x.b.select(c, a, x.spread(-INFINITY)) for c, a in zip(seen, row, strict=True)]

    sweep(x, s, count, change)


@inline
def part(x: Lanes, s: Any, count: Any, k_segment: Any, q_segment: Any) -> None:
    """−∞ where k_segment[n] is not q_segment, int32."""
    own = x.loads_of(q_segment, x.integers)

    def change(n: Any, row: list[Any]) -> list[Any]:
        key = x.spread(x.load(x.at(k_segment, (n, 4)), I32))
        seen = [x.b.icmp_signed("==", key, a) for a in own]
        return [x.b.select(c, a, x.spread(-INFINITY)) for c, a in zip(seen, row, strict=True)]

    sweep(x, s, count, change)


def squares(x: Lanes, to: Any, source: Any, sizes: tuple[Any, Any], strides: tuple[Any, Any, int], read: Any) -> None:
    """to[c][r] = read(source[r][c]) for whole squares of `width` numbers; strides in bytes: to, source, one number."""
    width, (rows, columns), (to_stride, stride, step) = x.index(x.width), sizes, strides
    with x.each(x.b.sdiv(rows, width)) as i, x.each(x.b.sdiv(columns, width)) as j:
        r, c = x.b.mul(i, width), x.b.mul(j, width)
        begin, end = x.at(source, (r, stride), (c, step)), x.at(to, (c, to_stride), (r, 4))
        square = x.transposed([read(x.at(begin, (x.index(n), stride))) for n in range(x.width)])
        for n, row in enumerate(square):
            x.store(row, x.at(end, (x.index(n), to_stride)))


@inline
def fetch(x: Lanes, source: Any, to: Any, count: Any) -> None:
    """Ask for the lines of `count` bytes to be read and to be written, all at once: one by one they are waited for."""
    with x.each(x.b.sdiv(count, x.index(64))) as n:
        x.ahead(x.at(source, (n, 64)))
        x.ahead(x.at(to, (n, 64)), writing=True)


@inline
def turn(x: Lanes, to: Any, source: Any, rows: Any, columns: Any, to_stride: Any, stride: Any) -> None:
    """to[c][r] = source[r][c] for whole squares of `width` numbers; both strides in bytes."""
    squares(x, to, source, (rows, columns), (to_stride, stride, 4), x.load)


@inline
def survey(x: Lanes, found: Any, source: Any, rows: Any, columns: Any, stride: Any) -> None:
    """Booleans in rows `stride` bytes apart: the bytes found[0], whether any is True, and found[1], whether all are."""
    size = 4 * x.width
    whole, single = ir.VectorType(I8, size), ir.VectorType(I8, 1)
    places = x.variables([whole(None), whole([1] * size), single(None), single([1])])
    with x.each(rows) as r:
        row = x.at(source, (r, stride))
        # The tiles to the right are looked at next, and rows lie too far apart for the processor to guess that.
        x.ahead(x.at(row, 2 * size))
        with x.each(x.b.sdiv(columns, x.index(size))) as n:
            _join(x, places[:2], x.load(x.at(row, (n, size)), whole))
        rest = x.b.srem(columns, x.index(size))
        start = x.b.sub(columns, rest)
        with x.each(rest) as n:
            _join(x, places[2:], x.load(x.at(row, start, n), single))
    some, every, one, all_ones = (x.b.load(place) for place in places)
    none, ones = ir.IntType(8 * size)(0), whole([1] * size)
    any_seen = x.b.or_(x.b.icmp_signed("!=", x.b.bitcast(some, none.type), none), _bit(x, one))
    missing = x.b.icmp_signed("!=", x.b.bitcast(x.b.xor(every, ones), none.type), none)
    all_seen = x.b.and_(x.b.not_(missing), _bit(x, all_ones))
    for n, seen in enumerate((any_seen, all_seen)):
        x.b.store(x.b.zext(seen, I8), x.b.inttoptr(x.at(found, n), I8.as_pointer()))


def _join(x: Lanes, places: Sequence[Any], seen: Any) -> None:
    x.b.store(x.b.or_(x.b.load(places[0]), seen), places[0])
    x.b.store(x.b.and_(x.b.load(places[1]), seen), places[1])


def _bit(x: Lanes, one: Any) -> Any:
    return x.b.icmp_unsigned("!=", x.b.extract_element(one, I32(0)), I8(0))


@inline
def turn_mask(x: Lanes, to: Any, source: Any, rows: Any, columns: Any, to_stride: Any, stride: Any) -> None:
    """As `turn`, from booleans: 0 for True, −∞ for False."""

    def read(address: Any) -> Any:
        seen = x.b.icmp_unsigned("!=", x.load(address, ir.VectorType(I8, x.width)), ir.VectorType(I8, x.width)(None))
        return x.b.select(seen, x.spread(0.0), x.spread(-INFINITY))

    squares(x, to, source, (rows, columns), (to_stride, stride, 1), read)


@inline
def widen(x: Lanes, to: Any, source: Any, count: Any) -> None:
    """`count` float32 from numbers as they are stored; contiguous."""
    for at, width in x.pieces(count):
        x.store(x.stored(x.at(source, (at, 2)), width), x.at(to, (at, 4)))


@inline
def narrow(x: Lanes, to: Any, source: Any, count: Any) -> None:
    """`count` finite float32 to numbers as they are stored, contiguous."""
    for at, width in x.pieces(count):
        x.store(x.narrowed(x.load(x.at(source, (at, 4)), ir.VectorType(F32, width))), x.at(to, (at, 2)))


@inline
def sound(x: Lanes, to: Any, source: Any, count: Any) -> None:
    """At `to` a float32: 0 where `count` numbers of k, as they are stored, are all finite, else NaN."""
    zero, none, step = x.spread(0.0), ir.VectorType(F32, 1)(None), 4 * x.width
    sums, single = x.variables([zero] * 4), x.variables([none])
    turns = x.b.sdiv(count, x.index(step))
    with x.each(turns) as n:
        for m, place in enumerate(sums):
            a = x.stored(x.at(source, (n, step * x.size), m * x.width * x.size), x.width)
            x.b.store(x.fma(a, zero, x.b.load(place)), place)
    begun = x.b.mul(turns, x.index(step))
    with x.each(x.b.sub(count, begun)) as n:
        a = x.stored(x.at(source, (begun, x.size), (n, x.size)), 1)
        x.b.store(x.b.fadd(x.b.fmul(a, none), x.b.load(single[0])), single[0])
    first, second, third, fourth, rest = (x.b.load(place) for place in (*sums, *single))
    whole = x.total(x.b.fadd(x.b.fadd(first, second), x.b.fadd(third, fourth)))
    x.store(x.b.fadd(whole, x.b.extract_element(rest, I32(0))), to)


@inline
def scale(x: Lanes, tile: Any, factor: Any, strange: Any, count: Any) -> None:
    """Tile[n] *= factor; `strange` becomes NaN in the lanes where a product is not finite, else 0."""
    by, zero = x.loads(factor), x.spread(0.0)
    sums = x.variables([zero] * x.vectors)
    with x.each(count) as n:
        row = x.at(tile, (n, x.row))
        scaled = [x.b.fmul(a, f) for a, f in zip(x.loads(row), by, strict=True)]
        for place, a in zip(sums, scaled, strict=True):
            x.b.store(x.fma(a, zero, x.b.load(place)), place)
        x.stores(scaled, row)
    x.stores([x.b.load(place) for place in sums], strange)


@inline
def fill(x: Lanes, tile: Any, count: Any, value: Any) -> None:
    """Tile[n] = value."""
    row = [x.spread(value)] * x.vectors
    with x.each(count) as n:
        x.stores(row, x.at(tile, (n, x.row)))
