r"""Products of the decode kernel: a few rows of queries, lanes along the depth.

    dots   s[r,n] = c Σ_d q[r,d] k[n,d]                then sums of lanes, so that s has its lanes along n
    blend  o[r] = exp2(m − m') o[r] + Σ_n w[r,n] v[n]

k and v are read where they lie, in order, and what stands `ahead` bytes on is brought near meanwhile. If the shape is
`tabled`, k and v are tables of the addresses of rows, and it is the row whose address stands there. A tile's row
(`Lanes.row`) is one query's numbers for all keys of the tile; q and o are stored by `lines`.
"""
# ruff: noqa: PLR0917  Numba calls intrinsics by position

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from refattn.engines.cpu.lines import UNIT, Reader, kept
from refattn.engines.cpu.vectors import F32, I64, Lanes, inline

_KEYS = {1: 1, 2: 1, 4: 2}  # that are met at a time, by rows: few, so that memory is read nearly in order
_LINES = 8  # of float32 that values are read in at a time: with two rows their sums fit the registers


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


def in_rows(x: Lanes, count: Any, ahead: Any, largest: int, emit: Callable[[Any, int, Any], None]) -> None:
    """emit(first, size, ahead) for blocks of `largest` rows and powers of two; what is read is brought near once."""
    b, zero = x.b, I64(0)
    with x.each(b.sdiv(count, I64(largest))) as n:
        emit(b.mul(n, I64(largest)), largest, b.select(b.icmp_signed("==", n, zero), ahead, zero))
    size = largest // 2
    while size:
        first = b.and_(count, I64(-2 * size))
        with b.if_then(b.icmp_signed("!=", b.and_(count, I64(size)), zero)):
            emit(first, size, b.select(b.icmp_signed("==", first, zero), ahead, zero))
        size //= 2


@inline
def dots(
    x: Lanes, s: Any, q: Any, stride: Any, rows: Any, k: Any, ahead: Any, count: Any, depth: Any, c: Any
) -> None:
    """s[r,n] = c q[r]·k[n] for r < rows and n < count, and more up to a whole vector; NaN for what is not finite.

    q's rows are `stride` bytes apart; keys follow each other, if there is no table.
    """

    def some(r: Any, size: int, near: Any) -> None:
        _dots(x, size, x.at(s, (r, x.row)), x.at(q, (r, stride)), stride, k, near, count, depth, c)

    in_rows(x, rows, ahead, 4, some)


def _row(x: Lanes, base: Any, n: Any, size: Any, ahead: Any, start: Any = 0) -> Callable[[Any], tuple[Any, Any]]:
    """What gives, for a number of bytes on from byte `start` of row n, the address and the one to be brought near."""
    if x.tabled:
        place = x.at(base, (n, 8))
        own, other = (x.at(x.load(x.at(place, further), I64), start) for further in (0, ahead))
        return lambda more: (x.at(own, more), x.at(other, more))
    first = kept(x, x.at(base, (n, size), start))
    return lambda more: (x.at(first, more), x.at(first, more, ahead))


def _dots(
    x: Lanes, rows: int, s: Any, q: Any, stride: Any, k: Any, ahead: Any, count: Any, depth: Any, c: Any
) -> None:
    read, unit = Reader(x), x.b.fmul(x.spread(c), x.spread(UNIT[x.storage]))
    each = min(_KEYS[rows], x.width // rows)
    chains = 4 // rows  # sums of one product, for one alone would wait for each of its additions
    several = max(chains // read.parts, 1)
    whole, left, size = read.split(depth)
    last = x.b.sub(count, I64(1))
    own_q = [kept(x, x.at(q, (stride, r))) for r in range(rows)]
    partial = cgutils.alloca_once(x.b, ir.ArrayType(x.floats, x.width // each))  # type: ignore[no-untyped-call]
    partial = x.b.ptrtoint(partial, I64)
    with x.each(x.b.sdiv(x.b.add(count, I64(x.width - 1)), I64(x.width))) as block:
        with x.each(x.width // each) as group:
            first = x.at(I64(0), (block, x.width), (group, each))
            numbers = [x.b.add(first, I64(n)) for n in range(each)]
            own_k = [_row(x, k, x.b.select(x.b.icmp_signed("<", n, last), n, last), size, ahead) for n in numbers]
            sums = x.variables([x.spread(0.0)] * (rows * each * chains))

            def step(line: Any, live: Any = None, chain: int = 0) -> None:
                queries = [
                    [x.load(x.at(a, (line, 4 * read.numbers), 4 * x.width * p)) for p in range(read.parts)]
                    for a in own_q
                ]
                for n in range(each):
                    address, near = own_k[n]((line, read.bytes))
                    x.ahead(near, locality=2)
                    parts = read.line(address, live)
                    for r, p in product(range(rows), range(read.parts)):
                        place = sums[(chain + p) % chains * rows * each + r * each + n]
                        x.b.store(x.fma(parts[p], queries[r][p], x.b.load(place)), place)

            with x.each(x.b.sdiv(whole, I64(several))) as line:
                for n in range(several):
                    step(x.at(I64(n), (line, several)), chain=n * read.parts)
            for n in range(several - 1):
                line = x.b.add(x.b.mul(x.b.sdiv(whole, I64(several)), I64(several)), I64(n))
                with x.b.if_then(x.b.icmp_signed("<", line, whole)):
                    step(line, chain=n * read.parts)
            with x.b.if_then(x.b.icmp_signed(">", left, I64(0))):
                step(whole, left)
            found = [x.b.load(place) for place in sums]
            while len(found) > rows * each:
                half = len(found) // 2
                found = [x.b.fadd(a, b) for a, b in zip(found[:half], found[half:], strict=True)]
            x.store(folded(x, found)[0], x.at(partial, (group, 4 * x.width)))
        found = [x.load(x.at(partial, 4 * x.width * n)) for n in range(x.width // each)]
        for r, total in enumerate(by_row(x, folded(x, found, rows * each), rows, each)):
            logits = x.b.fmul(total, unit)
            # ∞ · 0 is NaN, so −∞ stands for what is masked and for nothing else.
            x.store(x.fma(logits, x.spread(0.0), logits), x.at(s, x.row * r, (block, 4 * x.width)))


@inline
def blend(
    x: Lanes, o: Any, stride: Any, factor: Any, w: Any, rows: Any, v: Any, ahead: Any, count: Any, width: Any
) -> None:
    """o[r] = factor[r] o[r] + Σ_n w[r,n] v[n] / `UNIT` for r < rows; o's rows are `stride` bytes apart.

    v's follow each other. By two rows, so that their sums and a whole row of v fit the registers, v read in order.
    """

    def some(r: Any, size: int, near: Any) -> None:
        places = [x.at(o, (x.at(r, n), stride)) for n in range(size)]
        by = [x.spread(x.load(x.at(factor, (r, 4), 4 * n), F32)) for n in range(size)]
        _blend(x, places, by, x.at(w, (r, x.row)), v, near, count, width)

    in_rows(x, rows, ahead, 2, some)


def _blend(x: Lanes, o: list[Any], by: list[Any], w: Any, v: Any, ahead: Any, count: Any, width: Any) -> None:
    read = Reader(x)
    whole, left, size = read.split(width)

    def block(line: Any, lines: int, live: Any = None) -> None:
        vectors = [4 * x.width * n for n in range(lines * read.parts)]
        places = [[x.at(a, (line, 4 * read.numbers), n) for n in vectors] for a in o]
        sums = [x.variables([x.b.fmul(x.load(a), f) for a in row]) for row, f in zip(places, by, strict=True)]
        with x.each(count) as n:
            address = _row(x, v, n, size, ahead, (line, read.bytes))
            shares = [x.spread(x.load(x.at(w, x.row * r, (n, 4)), F32)) for r in range(len(o))]
            for d in range(lines):
                here, near = address(d * read.bytes)
                x.ahead(near, locality=2)
                for p, part in enumerate(read.line(here, live)):
                    for share, row in zip(shares, sums, strict=True):
                        place = row[d * read.parts + p]
                        x.b.store(x.fma(part, share, x.b.load(place)), place)
        for row, found in zip(places, sums, strict=True):
            for a, place in zip(row, found, strict=True):
                x.store(x.b.load(place), a)

    most = max(_LINES // read.parts, 1)
    with x.each(x.b.sdiv(whole, I64(most))) as n:
        block(x.b.mul(n, I64(most)), most)
    lines = most // 2
    while lines:
        with x.b.if_then(x.b.icmp_signed(">", x.b.and_(whole, I64(lines)), I64(0))):
            block(x.b.and_(whole, I64(-2 * lines)), lines)
        lines //= 2
    with x.b.if_then(x.b.icmp_signed(">", left, I64(0))):
        block(whole, 1, left)
