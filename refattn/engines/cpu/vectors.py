"""Vectors of float32 in LLVM's own types: the vocabulary that the inner loops of the fast kernels are written in.

Numba leaves vectorising to LLVM, which prefers short vectors and has no vector exponential. Here every operation says
how wide it is. No operation carries a fast-math flag: `exp2` depends on the order in which it rounds.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

F16, F32 = ir.HalfType(), ir.FloatType()
I8, I16, I32, I64 = ir.IntType(8), ir.IntType(16), ir.IntType(32), ir.IntType(64)
FLOAT32, BFLOAT16, FLOAT16, INT8 = 0, 1, 2, 3  # storages; of the last `lines` alone knows

# 2^f = 1 + f p(f) for |f| ≤ ½, coefficients from the least power: the minimax fit of relative error rounded to float32.
_EXP2 = "0x1.62e42ap-1 0x1.ebf9bcp-3 0x1.c6b752p-5 0x1.3cea88p-7 0x1.5bba14p-10"
EXP2 = tuple(map(float.fromhex, _EXP2.split()))
# The same for tanh x = x + x³ t(x²), |x| ≤ 1.
_TANH = "-0x1.55553cp-2 0x1.110bdep-3 -0x1.b961c8p-5 0x1.600748p-6 -0x1.04594ap-7 0x1.2d8d18p-9 -0x1.77a1eap-12"
TANH = tuple(map(float.fromhex, _TANH.split()))
TWO_LOG2E = float.fromhex("0x1.715476p+1")
# Adding it leaves round(y) + 127 in the low bits of the sum, which shifted are the exponent of 2^round(y).
MAGIC = 1.5 * 2.0**23 + 127.0


class Lanes:
    """Emits operations on `vectors` vectors of `width` float32; a tile's row is all of them, one lane for each query.

    Memory is addressed by integers, in bytes; an address need not be aligned. The shape is a number, for Numba takes no
    other literals: block + 2⁸ vectors + 2¹⁶ width + 2²⁴ storage + 2²⁷ tabled + 2²⁸ stride, where `storage` is how k and
    v lie in memory, `tabled` whether a table holds the addresses of their rows, and a tile's row begins `stride`
    vectors after the one before, or `vectors` if it is 0.
    """

    def __init__(self, builder: Any, shape: int) -> None:
        self.b = builder
        self.width, self.vectors, self.block = shape >> 16 & 255, shape >> 8 & 255, shape & 255
        self.storage, self.tabled = shape >> 24 & 7, shape >> 27 & 1
        self.row = 4 * self.width * (shape >> 28 or self.vectors)
        self.floats, self.integers = ir.VectorType(F32, self.width), ir.VectorType(I32, self.width)

    def at(self, base: Any, *terms: Any) -> Any:
        """Base plus terms: integers, or pairs of an index and how many bytes it counts."""
        for term in terms:
            index, size = term if isinstance(term, tuple) else (term, 1)
            base = self.b.add(base, self.b.mul(self.index(index), self.index(size)))
        return base

    @staticmethod
    def index(value: Any) -> Any:
        """An int64, from a Python integer too."""
        return I64(value) if isinstance(value, int) else value

    def load(self, address: Any, kind: Any = None) -> Any:
        """A vector of float32, or what else `kind` says."""
        kind = kind or self.floats
        size = str(getattr(kind, "element", kind))
        align = {"i8": 1, "i16": 2, "half": 2}.get(size, 4)
        return self.b.load(self.b.inttoptr(address, kind.as_pointer()), align=align)

    def store(self, value: Any, address: Any) -> None:
        """Store a vector."""
        self.b.store(value, self.b.inttoptr(address, value.type.as_pointer()), align=4)

    def ahead(self, address: Any, *, writing: bool = False, locality: int = 3) -> None:
        """Have the line at an address brought near, to cache number 4 − locality; it need not exist."""
        byte, name = I8.as_pointer(), "llvm.prefetch.p0"
        kind = ir.FunctionType(ir.VoidType(), [byte, I32, I32, I32])
        function = self.b.module.globals.get(name) or ir.Function(self.b.module, kind, name)
        self.b.call(function, [self.b.inttoptr(address, byte), I32(int(writing)), I32(locality), I32(1)])

    def loads(self, address: Any) -> list[Any]:
        """A tile's row."""
        return self.loads_of(address, self.floats)

    def loads_of(self, address: Any, kind: Any) -> list[Any]:
        """A row of vectors of another kind."""
        return [self.load(self.at(address, 4 * self.width * n), kind) for n in range(self.vectors)]

    def stores(self, row: Sequence[Any], address: Any) -> None:
        """Store a tile's row."""
        for n, value in enumerate(row):
            self.store(value, self.at(address, 4 * self.width * n))

    def stored(self, address: Any, width: int) -> Any:
        """A vector of float32 from where k or v lie as `storage` says."""
        floats, integers = ir.VectorType(F32, width), ir.VectorType(I32, width)
        if self.storage == FLOAT32:
            return self.load(address, floats)
        if self.storage == BFLOAT16:
            bits = self.b.zext(self.load(address, ir.VectorType(I16, width)), integers)
            return self.b.bitcast(self.b.shl(bits, integers([16] * width)), floats)
        return self.b.fpext(self.load(address, ir.VectorType(F16, width)), floats)

    @property
    def size(self) -> int:
        """Bytes of a number of k or v."""
        return 4 if self.storage == FLOAT32 else 2

    def narrowed(self, vector: Any) -> Any:
        """Finite float32 in 16 bits, to nearest and ties to even; too large ones become infinite."""
        width = vector.type.count
        if self.storage == FLOAT16:
            return self.b.fptrunc(vector, ir.VectorType(F16, width))
        integers = ir.VectorType(I32, width)
        bits, half, one = self.b.bitcast(vector, integers), integers([0x7FFF] * width), integers([1] * width)
        places = integers([16] * width)
        # Half a unit in the last place, less one where the kept part is even.
        rounded = self.b.add(bits, self.b.add(half, self.b.and_(self.b.lshr(bits, places), one)))
        return self.b.trunc(self.b.lshr(rounded, places), ir.VectorType(I16, width))

    def pieces(self, count: Any) -> Iterator[tuple[Any, int]]:
        """Loops whose indices cover 0 to count: by whole vectors, then one by one; each with how many it takes."""
        whole = self.b.sdiv(count, self.index(self.width))
        with self.each(whole) as n:
            yield self.b.mul(n, self.index(self.width)), self.width
        begun = self.b.mul(whole, self.index(self.width))
        with self.each(self.b.sub(count, begun)) as n:
            yield self.b.add(begun, n), 1

    def spread(self, scalar: Any) -> Any:
        """The same number in every lane; a Python number is a float32."""
        if isinstance(scalar, (int, float)):
            return self.floats([scalar] * self.width)
        kind = ir.VectorType(scalar.type, self.width)
        one = self.b.insert_element(ir.Constant(kind, ir.Undefined), scalar, I32(0))
        return self.b.shuffle_vector(
            one, ir.Constant(kind, ir.Undefined), ir.VectorType(I32, self.width)([0] * self.width)
        )

    def call(self, name: str, *values: Any) -> Any:
        """One of LLVM's own functions of vectors."""
        kind, full = ir.FunctionType(self.floats, [self.floats] * len(values)), f"llvm.{name}.v{self.width}f32"
        function = self.b.module.globals.get(full) or ir.Function(self.b.module, kind, full)
        return self.b.call(function, values)

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a·b + c, fused where the machine can."""
        return self.call("fmuladd", a, b, c)

    def magnitude(self, a: Any) -> Any:
        """|a|."""
        return self.call("fabs", a)

    def polynomial(self, coefficients: Sequence[float], x: Any) -> Any:
        """Σ coefficients[k] x^k, from the highest power down."""
        p = self.spread(coefficients[-1])
        for c in coefficients[-2::-1]:
            p = self.fma(p, x, self.spread(c))
        return p

    def largest(self, a: Any, b: Any) -> Any:
        """The larger in each lane; b where either is NaN."""
        return self.b.select(self.b.fcmp_ordered(">", a, b), a, b)

    def exp2(self, y: Any) -> Any:
        """2^y within 3u relative for −126.5 < y < 127, 0 below; NaN stays NaN."""
        b, magic = self.b, self.spread(MAGIC)
        y = self.largest(self.spread(-127.0), y)
        shifted = b.fadd(y, magic)
        f = b.fsub(y, b.fsub(shifted, magic))
        power = b.shl(b.bitcast(shifted, self.integers), self.integers([23] * self.width))
        return b.fmul(self.polynomial((1.0, *EXP2), f), b.bitcast(power, self.floats))

    def tanh(self, row: Sequence[Any]) -> list[Any]:
        """Tanh of vectors within 4u relative: x + x³ t(x²) to 1, from there 1 − 2 / (e^2|x| + 1); NaN stays NaN."""
        b, most = self.b, None
        squares = [b.fmul(x, x) for x in row]
        near = [self.fma(b.fmul(a, x), self.polynomial(TANH, a), x) for a, x in zip(squares, row, strict=True)]
        found = self.variables(near)
        for a in squares:
            most = a if most is None else self.largest(a, most)
        # Most caps lie far above most logits. A NaN may have hidden a number beyond 1, so it counts as one.
        far, bits = b.fcmp_unordered(">", most, self.spread(1.0)), ir.IntType(self.width)
        with b.if_then(b.icmp_unsigned("!=", b.bitcast(far, bits), bits(0))):
            for place, x, a in zip(found, row, near, strict=True):
                b.store(self._tanh(x, a), place)
        return [b.load(place) for place in found]

    def _tanh(self, x: Any, near: Any) -> Any:
        """Tanh x, which `near` is to 1."""
        b, one, size = self.b, self.spread(1.0), self.magnitude(x)
        power = self.exp2(
            b.fmul(
                b.select(b.fcmp_ordered("<", size, self.spread(20.0)), size, self.spread(20.0)), self.spread(TWO_LOG2E)
            )
        )
        far = self.call("copysign", b.fsub(one, b.fdiv(self.spread(2.0), b.fadd(power, one))), x)
        return b.select(b.fcmp_ordered(">", size, one), far, near)

    def total(self, vector: Any) -> Any:
        """Sum of a vector, halves to halves."""
        width, empty = vector.type.count, ir.Constant(vector.type, ir.Undefined)
        while width > 1:
            width //= 2
            low, high = (ir.VectorType(I32, width)(list(range(n, n + width))) for n in (0, width))
            vector = self.b.fadd(self.b.shuffle_vector(vector, empty, low), self.b.shuffle_vector(vector, empty, high))
            empty = ir.Constant(vector.type, ir.Undefined)
        return self.b.extract_element(vector, I32(0))

    def transposed(self, rows: list[Any]) -> list[Any]:
        """The square of `width` vectors with rows and columns exchanged, by halves of halves."""
        step = 1
        while step < self.width:
            low = [c if not c & step else self.width + c - step for c in range(self.width)]
            high = [c + step if not c & step else self.width + c for c in range(self.width)]
            changed = list(rows)
            for i in range(self.width):
                if not i & step:
                    a, c = rows[i], rows[i + step]
                    changed[i], changed[i + step] = self.mix(a, c, low), self.mix(a, c, high)
            rows, step = changed, 2 * step
        return rows

    def mix(self, a: Any, b: Any, lanes: list[int]) -> Any:
        """Lanes of two vectors, those of the second counted on from the first's."""
        return self.b.shuffle_vector(a, b, ir.VectorType(I32, self.width)(lanes))

    @contextmanager
    def each(self, count: Any) -> Iterator[Any]:
        """A loop over 0 to count."""
        with cgutils.for_range(self.b, self.index(count)) as loop:
            yield loop.index

    def variables(self, start: Sequence[Any]) -> list[Any]:
        """Places for values that a loop changes; LLVM turns them into registers."""
        places = [cgutils.alloca_once(self.b, value.type) for value in start]  # type: ignore[no-untyped-call]
        for place, value in zip(places, start, strict=True):
            self.b.store(value, place)
        return places

    def in_blocks(self, count: Any, emit: Callable[[Any, int], None]) -> None:
        """emit(start, size) for blocks that cover 0 to count: size `block`, and powers of two for what is left over."""
        b, block = self.b, self.index(self.block)
        whole = b.sdiv(count, block)
        with self.each(whole) as n:
            emit(b.mul(n, block), self.block)
        start = b.mul(whole, block)
        left = b.sub(count, start)
        for power in reversed(range((self.block - 1).bit_length())):
            size = self.index(1 << power)
            there = b.and_(left, size)
            with b.if_then(b.icmp_signed("!=", there, self.index(0))):
                emit(start, 1 << power)
            start = b.add(start, there)


def inline(emit: Callable[..., None]) -> Any:
    """What kernels call: emit(lanes, ...) as a Numba function whose first argument is the literal shape of `Lanes`."""

    def typed(typing: Any, *kinds: Any) -> Any:
        if not isinstance(kinds[0], types.IntegerLiteral):
            return None
        plain = tuple(types.float32 if isinstance(kind, types.Float) else types.int64 for kind in kinds[1:])

        def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
            emit(Lanes(builder, kinds[0].literal_value), *values[1:])
            return context.get_dummy_value()

        return types.void(kinds[0], *plain), code

    names = ["typing", "shape", *list(inspect.signature(emit).parameters)[1:]]
    positional = inspect.Parameter.POSITIONAL_OR_KEYWORD
    typed.__signature__ = inspect.Signature([inspect.Parameter(n, positional) for n in names])  # type: ignore[attr-defined]
    typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
    return intrinsic(prefer_literal=True)(typed)


def _take(typing: Any, counter: Any) -> Any:
    """The int64 at an address before one was added to it, all in one step: threads that share it get each task once.

    Who gets a number sees all that was written by those who got the ones before it.
    """

    def code(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return builder.atomic_rmw("add", builder.inttoptr(values[0], I64.as_pointer()), I64(1), "acq_rel")

    return types.int64(types.int64), code


take: Any = intrinsic(_take)
