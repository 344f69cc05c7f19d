r"""Steps of the decode kernel on one tile of keys: a few rows of queries, lanes along the depth or along the keys.

    dots     s[r,n] = c Σ_d q[r,d] k[n,d]                       lanes along d, then sums of lanes: lanes along n
    weights  m' = max(m, s), w = exp2(s − m'), l' = l exp2(m − m') + Σ_n w[n]
    blend    o[r] = exp2(m − m') o[r] + Σ_n w[r,n] v[n]         lanes along v's numbers

Here a tile's row (`Lanes.row`) is one query's numbers for all keys of the tile. k and v are read where they lie, row by
row, and what stands `ahead` bytes on is brought near meanwhile. A *line* is what one read takes of such a row: a vector of stored numbers that becomes
`parts` vectors of float32, part p the numbers p, p + parts, ... of the line. q and o are stored in that order, filled
up to whole lines.

A shape's `block` is how many rows of queries are worked on at a time: 1, 2 or 4.
"""
# ruff: noqa: PLR0917  Numba calls intrinsics by position

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from itertools import product
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from refattn.engines.cpu.tiles import INFINITY
from refattn.engines.cpu.vectors import BFLOAT16, F32, FLOAT16, FLOAT32, I8, I16, I32, I64, Lanes, inline

PARTS = (1, 2, 1, 4)  # of a line, by storage
BYTES = (4, 2, 2, 1)  # of a stored number
_STORED = (F32, I16, I16, I8)
PREFETCH = True
_KEYS = {1: 1, 2: 1, 4: 2}  # that are met at a time, by rows: few, so that memory is read nearly in order
_LINES = 8  # of float32 that values are read in at a time: with two rows their sums fit the registers
LEAST = -float.fromhex("0x1.fffffep127")  # no logit that is a number lies below, and −∞ does


class Reader:
    """Reads lines of k or v as the shape's storage says."""

    def __init__(self, x: Lanes) -> None:
        self.x, self.rows, self.parts = x, x.block, PARTS[x.storage]
        self.numbers = x.width * self.parts
        self.kind, self.bytes = ir.VectorType(_STORED[x.storage], self.numbers), BYTES[x.storage] * self.numbers

    def line(self, address: Any, live: Any = None) -> list[Any]:
        """The parts of a line; where `live` is given, of its first `live` numbers and zeros."""
        b, x = self.x.b, self.x
        place = b.inttoptr(address, self.kind.as_pointer())
        stored = b.load(place, align=1) if live is None else self._first(place, live)
        if x.storage == FLOAT32:
            return [stored]
        if x.storage == FLOAT16:
            return [self._half(stored)]
        words = b.bitcast(stored, x.integers)
        if x.storage == BFLOAT16:
            high = x.integers([-65536] * x.width)
            return [b.bitcast(a, x.floats) for a in (b.shl(words, self._bits(16)), b.and_(words, high))]
        moved = [b.ashr(b.shl(words, self._bits(24 - 8 * n)), self._bits(24)) for n in range(4)]
        return [b.sitofp(a, x.floats) for a in moved]

    def _bits(self, count: int) -> Any:
        return self.x.integers([count] * self.x.width)

    def _first(self, place: Any, live: Any) -> Any:
        b, count = self.x.b, self.kind.count
        flags = ir.VectorType(ir.IntType(1), count)
        wide = ir.VectorType(I32, count)
        limit = b.insert_element(ir.Constant(wide, ir.Undefined), b.trunc(live, I32), I32(0))
        limit = b.shuffle_vector(limit, ir.Constant(wide, ir.Undefined), wide([0] * count))
        mask = b.icmp_signed("<", wide(list(range(count))), limit)
        kind = ir.FunctionType(self.kind, [self.kind.as_pointer(), I32, flags, self.kind])
        letter = "f32" if self.x.storage == FLOAT32 else f"i{self.kind.element.width}"
        name = f"llvm.masked.load.v{count}{letter}.p0"
        function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
        return b.call(function, [place, I32(1), mask, ir.Constant(self.kind, None)])

    def _half(self, stored: Any) -> Any:
        b, x = self.x.b, self.x
        if x.width > 4:
            return b.fpext(b.bitcast(stored, ir.VectorType(ir.HalfType(), x.width)), x.floats)
        # The oldest x86 has no such step. 2^112 makes up for the other bias of the exponent.
        words = b.zext(stored, x.integers)
        size = b.shl(b.and_(words, x.integers([0x7FFF] * x.width)), self._bits(13))
        number = b.bitcast(b.fmul(b.bitcast(size, x.floats), x.spread(2.0**112)), x.integers)
        endless = b.icmp_unsigned(">=", size, x.integers([0x7C00 << 13] * x.width))
        number = b.select(endless, b.or_(size, x.integers([0x7F800000] * x.width)), number)
        sign = b.shl(b.and_(words, x.integers([0x8000] * x.width)), self._bits(16))
        return b.bitcast(b.or_(number, sign), x.floats)

    def ahead(self, address: Any) -> None:
        """Have the line at an address brought near."""
        if not PREFETCH:
            return
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        name = "llvm.prefetch.p0"
        function = self.x.b.module.globals.get(name) or ir.Function(self.x.b.module, kind, name)
        self.x.b.call(function, [self.x.b.inttoptr(address, byte), I32(0), I32(2), I32(1)])


def kept(x: Lanes, address: Any) -> Any:
    """The same address, of which LLVM does not know how it was made.

    Else it splits sums of addresses so that every load in a loop has a pointer of its own, which registers cannot hold.
    """
    return x.b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [address], False)


def folded(x: Lanes, vectors: Sequence[Any], step: int = 1) -> list[Any]:
    """Neighbours joined by sums of lanes until one is left, or all lanes are sums.

    From step 1 on, lane i of what is left is a sum of lanes of the vector number i modulo how many there were. More
    such vectors are joined from a step of as many lanes on.
    """
    rows = list(vectors)
    while step < x.width and len(rows) > 1:
        low = [c if not c & step else x.width + c - step for c in range(x.width)]
        high = [c + step if not c & step else x.width + c for c in range(x.width)]
        rows = [x.b.fadd(x.mix(a, c, low), x.mix(a, c, high)) for a, c in zip(rows[::2], rows[1::2], strict=True)]
        step *= 2
    return rows


def exchanged(x: Lanes, vectors: Sequence[Any], size: int) -> list[Any]:
    """The square of vectors of blocks of `size` lanes with rows and columns exchanged."""
    rows, step = list(vectors), 1
    while step < len(rows):
        jump = step * size
        low = [c if not c & jump else x.width + c - jump for c in range(x.width)]
        high = [c + jump if not c & jump else x.width + c for c in range(x.width)]
        for i in range(len(rows)):
            if not i & step:
                a, c = rows[i], rows[i + step]
                rows[i], rows[i + step] = x.mix(a, c, low), x.mix(a, c, high)
        step *= 2
    return rows


def across(x: Lanes, vector: Any, join: Callable[[Any, Any], Any]) -> Any:
    """All lanes of a vector joined, in every lane."""
    step = 1
    while step < x.width:
        vector = join(vector, x.mix(vector, vector, [c ^ step for c in range(x.width)]))
        step *= 2
    return vector


def by_row(x: Lanes, found: Sequence[Any], rows: int, each: int) -> list[Any]:
    """A vector for each row, of its sums with the keys in order.

    `found` are the sums of as many equal stretches of the keys: lane (m rows + r) each + k is row r and key k of the
    m-th part of a stretch.
    """
    stretch = x.width // len(found)
    order = [(n // stretch, n % stretch // each, n % each) for n in range(x.width)]  # stretch, part, key of each lane
    if rows == 4:
        lanes = [part * rows * each + s * each + key for s, part, key in order]
        return [x.mix(a, a, lanes) for a in exchanged(x, found, each)]
    if rows == 2:
        lanes = [s * x.width + part * rows * each + key for s, part, key in order]
        return [x.mix(found[0], found[1], [n + r * each for n in lanes]) for r in range(rows)]
    return list(found)


@inline
def dots(x: Lanes, s: Any, q: Any, stride: Any, k: Any, ahead: Any, count: Any, depth: Any, c: Any) -> None:
    """s[r,n] = c q[r]·k[n] for the rows of a block and n < count, and more up to a whole vector.

    NaN for what is not finite. q's rows are `stride` bytes apart, keys follow each other.
    """
    read, unit = Reader(x), x.spread(c)
    each = min(_KEYS[read.rows], x.width // read.rows)
    chains = 4 // read.rows  # sums of one product, for one alone would wait for each of its additions
    several = max(chains // read.parts, 1)
    whole = x.b.sdiv(depth, I64(read.numbers))
    left = x.b.sub(depth, x.b.mul(whole, I64(read.numbers)))
    size, last = x.b.mul(depth, I64(BYTES[x.storage])), x.b.sub(count, I64(1))
    rows = [kept(x, x.at(q, (stride, r))) for r in range(read.rows)]
    partial = cgutils.alloca_once(x.b, ir.ArrayType(x.floats, x.width // each))  # type: ignore[no-untyped-call]
    partial = x.b.ptrtoint(partial, I64)
    with x.each(x.b.sdiv(x.b.add(count, I64(x.width - 1)), I64(x.width))) as block:
        with x.each(x.width // each) as group:
            first = x.at(I64(0), (block, x.width), (group, each))
            numbers = [x.b.add(first, I64(n)) for n in range(each)]
            own = [kept(x, x.at(k, (x.b.select(x.b.icmp_signed("<", n, last), n, last), size))) for n in numbers]
            sums = x.variables([x.spread(0.0)] * (read.rows * each * chains))

            def step(line: Any, live: Any = None, chain: int = 0) -> None:
                queries = [
                    [x.load(x.at(a, (line, 4 * read.numbers), 4 * x.width * p)) for p in range(read.parts)] for a in rows
                ]
                for n in range(each):
                    address = x.at(own[n], (line, read.bytes))
                    read.ahead(x.b.add(address, ahead))
                    parts = read.line(address, live)
                    for r, p in product(range(read.rows), range(read.parts)):
                        place = sums[(chain + p) % chains * read.rows * each + r * each + n]
                        x.b.store(x.fma(parts[p], queries[r][p], x.b.load(place)), place)

            with x.each(x.b.sdiv(whole, I64(several))) as line:
                for n in range(several):
                    step(x.at(I64(n), (line, several)), chain=n * read.parts)
            for n in range(several - 1):
                done = x.b.add(x.b.mul(x.b.sdiv(whole, I64(several)), I64(several)), I64(n))
                with x.b.if_then(x.b.icmp_signed("<", done, whole)):
                    step(done, chain=n * read.parts)
            with x.b.if_then(x.b.icmp_signed(">", left, I64(0))):
                step(whole, left)
            found = [x.b.load(place) for place in sums]
            while len(found) > read.rows * each:
                half = len(found) // 2
                found = [x.b.fadd(a, c) for a, c in zip(found[:half], found[half:], strict=True)]
            x.store(folded(x, found)[0], x.at(partial, (group, 4 * x.width)))
        found = [x.load(x.at(partial, 4 * x.width * n)) for n in range(x.width // each)]
        for r, sum_ in enumerate(by_row(x, folded(x, found, read.rows * each), read.rows, each)):
            logits = x.b.fmul(sum_, unit)
            # ∞ · 0 is NaN, so −∞ stands for what is masked and for nothing else.
            x.store(x.fma(logits, x.spread(0.0), logits), x.at(s, x.row * r, (block, 4 * x.width)))


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
def blend(
    x: Lanes, o: Any, stride: Any, factor: Any, w: Any, v: Any, ahead: Any, count: Any, width: Any
) -> None:
    """o[r] = factor[r] o[r] + Σ_n w[r,n] v[n] for the rows of a block, `stride` bytes apart; values follow each other."""
    read = Reader(x)
    whole, size = x.b.sdiv(width, I64(read.numbers)), x.b.mul(width, I64(BYTES[x.storage]))
    left = x.b.sub(width, x.b.mul(whole, I64(read.numbers)))
    most = max(_LINES // read.parts, 1)

    by = [x.spread(x.load(x.at(factor, 4 * r), F32)) for r in range(read.rows)]

    def block(line: Any, lines: int, live: Any = None) -> None:
        places = [
            [
                x.at(o, (stride, r), (line, 4 * read.numbers), 4 * x.width * n)
                for n in range(lines * read.parts)
            ]
            for r in range(read.rows)
        ]
        sums = [x.variables([x.b.fmul(x.load(a), f) for a in row]) for row, f in zip(places, by, strict=True)]
        with x.each(count) as n:
            address = kept(x, x.at(v, (n, size), (line, read.bytes)))
            shares = [x.spread(x.load(x.at(w, (x.row, r), (n, 4)), F32)) for r in range(read.rows)]
            for d in range(lines):
                read.ahead(x.at(address, ahead, d * read.bytes))
                for p, part in enumerate(read.line(x.at(address, d * read.bytes), live)):
                    for r in range(read.rows):
                        place = sums[r][d * read.parts + p]
                        x.b.store(x.fma(part, shares[r], x.b.load(place)), place)
        for row, found in zip(places, sums, strict=True):
            for a, place in zip(row, found, strict=True):
                x.store(x.b.load(place), a)

    with x.each(x.b.sdiv(whole, I64(most))) as n:
        block(x.b.mul(n, I64(most)), most)
    lines = most // 2
    while lines:
        with x.b.if_then(x.b.icmp_signed(">", x.b.and_(whole, I64(lines)), I64(0))):
            block(x.b.sub(whole, x.b.and_(whole, I64(2 * lines - 1))), lines)
        lines //= 2
    with x.b.if_then(x.b.icmp_signed(">", left, I64(0))):
        block(whole, 1, left)


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
