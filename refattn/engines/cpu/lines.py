"""Rows of k and v read line by line, as they are stored.

A *line* is what one read takes of a row: a vector of stored numbers that becomes `parts` vectors of float32, part p
the numbers p, p + parts, ... of the line. What a row is multiplied with or added to is kept in that order, filled up to
whole lines.

Integers of 8 bits come as 2²⁴ times what they are: a byte at the top of a word is one step, and its sign needs no
other. What is made of them is brought down in the end.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir

from refattn.engines.cpu.vectors import BFLOAT16, F16, F32, FLOAT16, FLOAT32, I8, I16, I32, I64, Lanes

PARTS = (1, 2, 1, 4)  # of a line, by storage
BYTES = (4, 2, 2, 1)  # of a stored number
UNIT = (1.0, 1.0, 1.0, 2.0**-24)  # what a part is to be multiplied by
_STORED = (F32, I16, I16, I8)


class Reader:
    """Reads lines of k or v as the shape's storage says."""

    def __init__(self, x: Lanes) -> None:
        self.x, self.parts = x, PARTS[x.storage]
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
            return [b.fpext(b.bitcast(stored, ir.VectorType(F16, x.width)), x.floats)]
        words = b.bitcast(stored, x.integers)
        if x.storage == BFLOAT16:
            high = x.integers([-65536] * x.width)
            return [b.bitcast(a, x.floats) for a in (b.shl(words, self._bits(16)), b.and_(words, high))]
        moved = [b.shl(words, self._bits(24)), self._top(stored, 1), self._top(stored, 2)]
        return [b.sitofp(a, x.floats) for a in (*moved, b.and_(words, self._bits(-1 << 24)))]

    def _top(self, stored: Any, n: int) -> Any:
        """Byte n of each word at its top, and zeros below."""
        wide = ir.VectorType(I32, self.numbers)
        places = [self.numbers if p % 4 < 3 else p - 3 + n for p in range(self.numbers)]
        moved = self.x.b.shuffle_vector(stored, ir.Constant(self.kind, None), wide(places))
        return self.x.b.bitcast(moved, self.x.integers)

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

    def split(self, size: Any) -> tuple[Any, Any, Any]:
        """Of a row of so many numbers: whole lines, numbers left, and bytes."""
        b = self.x.b
        whole = b.sdiv(size, I64(self.numbers))
        return whole, b.sub(size, b.mul(whole, I64(self.numbers))), b.mul(size, I64(BYTES[self.x.storage]))


def kept(x: Lanes, address: Any) -> Any:
    """The same address, of which LLVM does not know how it was made.

    Else it splits sums of addresses so that every load in a loop has a pointer of its own, which registers cannot hold.
    """
    return x.b.asm(ir.FunctionType(I64, [I64]), "", "=r,0", [address], False)
