r"""Steps of the backward kernel on one tile, beside those of `tiles`.

    deltas       δ = Σ_d dout[d] out[d]                     row by row
    turn_back    p[n] = exp2(c s[n] − lse), ds[n] = factor p[n] (dp[n] − δ)
    outer        to[a,c] += Σ_b w[a,b] other[b,c]           the lanes are columns

Sᵀ, dPᵀ and what becomes of them have queries in the lanes, as in `tiles`; dq, dk and dv are added to where they lie,
with their columns in the lanes. All arguments that are not numbers of something are addresses.
"""
# ruff: noqa: PLR0917  Numba calls intrinsics by position

from __future__ import annotations

from typing import Any

from llvmlite import ir

from refattn.engines.cpu.tiles import sweep
from refattn.engines.cpu.vectors import F32, I32, Lanes, inline


@inline
def deltas(x: Lanes, to: Any, a: Any, b: Any, rows: Any, stride: Any, columns: Any) -> None:
    """to[r] = Σ_c a[r,c] b[r,c] over whole vectors of columns; lanes from `rows` on hold the last row's."""
    whole = x.b.sdiv(columns, x.index(x.width))
    last = x.b.sub(rows, x.index(1))
    for v in range(x.vectors):
        first = x.index(v * x.width)
        places = [x.b.add(first, x.index(r)) for r in range(x.width)]
        places = [x.b.select(x.b.icmp_signed("<", r, last), r, last) for r in places]
        sums = x.variables([x.spread(0.0)] * x.width)
        with x.each(whole) as c:
            for r, place in zip(places, sums, strict=True):
                one, other = (x.load(x.at(base, (r, stride), (c, 4 * x.width))) for base in (a, b))
                x.b.store(x.fma(one, other, x.b.load(place)), place)
        columns_of = x.transposed([x.b.load(place) for place in sums])
        while len(columns_of) > 1:
            columns_of = [x.b.fadd(p, q) for p, q in zip(columns_of[::2], columns_of[1::2], strict=True)]
        x.store(columns_of[0], x.at(to, 4 * v * x.width))


@inline
def turn_back(x: Lanes, s: Any, dp: Any, count: Any, c: Any, lse: Any, delta: Any, factor: Any) -> None:
    """Logits c s[n] become weights p, dp[n] becomes factor p (dp[n] − δ); both are 0 where s is −∞ or NaN.

    Where p is 0 the cotangent is 0, whatever a masked row holds.
    """
    unit, by, zero, least = x.spread(c), x.spread(factor), x.spread(0.0), x.spread(-127.0)
    shift, less = [x.b.fneg(a) for a in x.loads(lse)], x.loads(delta)
    with x.each(count) as n:
        row, other = x.at(s, (n, x.row)), x.at(dp, (n, x.row))
        weights, found = [], []
        for a, g, b, d in zip(x.loads(row), x.loads(other), shift, less, strict=True):
            p = x.exp2(x.largest(x.fma(a, unit, b), least))
            ds = x.b.fmul(x.b.fmul(p, by), x.b.fsub(g, d))
            weights.append(p)
            found.append(x.b.select(x.b.fcmp_ordered(">", p, zero), ds, zero))
        x.stores(weights, row)
        x.stores(found, other)


@inline
def bend_back(x: Lanes, s: Any, slope: Any, count: Any, steep: Any, cap: Any, factor: Any) -> None:
    """s[n] = cap t, slope[n] = factor (1 − t²), where t = tanh(steep s[n])."""
    inner, outer_, by, one = x.spread(steep), x.spread(cap), x.spread(factor), x.spread(1.0)

    with x.each(count) as n:
        row = x.at(s, (n, x.row))
        bent = x.tanh([x.b.fmul(inner, a) for a in x.loads(row)])
        x.stores([x.b.fmul(by, x.b.fsub(one, x.b.fmul(t, t))) for t in bent], x.at(slope, (n, x.row)))
        x.stores([x.b.fmul(outer_, t) for t in bent], row)


@inline
def times(x: Lanes, s: Any, other: Any, count: Any) -> None:
    """s[n] *= other[n]."""
    sweep(
        x,
        s,
        count,
        lambda n, row: [x.b.fmul(a, b) for a, b in zip(row, x.loads(x.at(other, (n, x.row))), strict=True)],
    )


@inline
def multiply(x: Lanes, s: Any, count: Any, factor: Any) -> None:
    """s[n] *= factor."""
    by = x.spread(factor)
    sweep(x, s, count, lambda n, row: [x.b.fmul(a, by) for a in row])


@inline
def outer(
    x: Lanes,
    to: Any,
    to_stride: Any,
    count: Any,
    w: Any,
    down: Any,
    along: Any,
    depth: Any,
    other: Any,
    stride: Any,
    columns: Any,
) -> None:
    """to[a,c] += Σ_b w[a,b] other[b,c] for a < count, b < depth, c < columns.

    Strides in bytes: `down` and `along` from row to row and from number to number of w.
    """

    def columns_from(column: Any, vectors: int, mask: Any) -> None:
        def block(start: Any, size: int) -> None:
            rows = [x.at(to, (x.b.add(start, x.index(n)), to_stride), (column, 4)) for n in range(size)]
            firsts = [x.at(w, (x.b.add(start, x.index(n)), down)) for n in range(size)]
            places = [x.at(row, 4 * x.width * v) for row in rows for v in range(vectors)]
            sums = x.variables([_load(x, place, mask) for place in places])
            with x.each(depth) as b:
                line = x.at(other, (b, stride), (column, 4))
                numbers = [_load(x, x.at(line, 4 * x.width * v), mask) for v in range(vectors)]
                for n in range(size):
                    weight = x.spread(x.load(x.at(firsts[n], (b, along)), F32))
                    for v in range(vectors):
                        place = sums[n * vectors + v]
                        x.b.store(x.fma(weight, numbers[v], x.b.load(place)), place)
            for kept, place in zip(sums, places, strict=True):
                _store(x, x.b.load(kept), place, mask)

        x.in_blocks(count, block)

    whole = x.b.sdiv(columns, x.index(x.width * x.vectors))
    with x.each(whole) as c:
        columns_from(x.b.mul(c, x.index(x.width * x.vectors)), x.vectors, None)
    begin = x.b.mul(whole, x.index(x.width * x.vectors))
    left = x.b.sub(columns, begin)
    with x.each(x.b.sdiv(x.b.add(left, x.index(x.width - 1)), x.index(x.width))) as c:
        done = x.b.mul(c, x.index(x.width))
        mask = x.b.icmp_signed("<", x.integers(list(range(x.width))), x.spread(x.b.trunc(x.b.sub(left, done), I32)))
        columns_from(x.b.add(begin, done), 1, mask)


def _load(x: Lanes, address: Any, mask: Any) -> Any:
    """A vector, 0 where the mask is false; memory is read only where it is true."""
    if mask is None:
        return x.load(address)
    pointer = x.b.inttoptr(address, x.floats.as_pointer())
    return _masked(x, "load", x.floats, pointer, I32(4), mask, x.spread(0.0))


def _store(x: Lanes, value: Any, address: Any, mask: Any) -> None:
    if mask is None:
        x.store(value, address)
    else:
        _masked(x, "store", ir.VoidType(), value, x.b.inttoptr(address, x.floats.as_pointer()), I32(4), mask)


def _masked(x: Lanes, name: str, result: Any, *values: Any) -> Any:
    kind, full = ir.FunctionType(result, [value.type for value in values]), f"llvm.masked.{name}.v{x.width}f32.p0"
    function = x.b.module.globals.get(full) or ir.Function(x.b.module, kind, full)
    return x.b.call(function, values)
