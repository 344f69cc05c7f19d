"""The primitives of the kernels on a device, as LLVM instructions and inline PTX; `sim` has the same names.

Pointers are those of numba's `CPointer`, to float32, int32, uint16 or uint8; an index counts elements. Shared memory is
one array of 32-bit words, as many as the launch gives; an index counts words. Indices are 32 bits wide, so that no
address costs a 64-bit multiplication; `past` moves a pointer further than they reach.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, Signature, signature
from typing import Any

from llvmlite import ir
from numba import cuda, types
from numba.core import cgutils
from numba.core.extending import intrinsic

__all__ = [
    "absolute", "barrier", "barrier_or", "block", "commit", "copy4", "copy16", "device", "divide", "exp2", "get",
    "get4", "get_bits", "join", "larger", "ldmatrix", "ldmatrix_t", "local", "local_int", "log2", "mma_bf16", "mma_f16",
    "pack_bf16", "pack_f16", "past", "put", "put_bits", "read", "shuffle_xor", "thread", "wait", "warp_sync", "write",
]  # fmt: skip

F32, I32, U32 = types.float32, types.int32, types.uint32
FOUR_FLOATS, FOUR_WORDS = types.UniTuple(F32, 4), types.UniTuple(U32, 4)
_FLOAT, _INT, _LONG, _VOID = ir.FloatType(), ir.IntType(32), ir.IntType(64), ir.VoidType()
_SHARED, _GLOBAL = 3, 1  # address spaces of NVVM
_WHOLE_WARP = ir.Constant(_INT, -1)

# Inlined where the text stands, before types are known: a call would have to be compiled for a device that is there.
device = cuda.jit(device=True, inline="always")


def primitive(result: Any, *kinds: Any) -> Callable[[Callable[..., Any]], Any]:
    """A function of kernels from what emits it; a kind of None is the argument's own, a result of None its dtype.

    A result of "same" is the first argument's kind.
    """

    def wrap(emit: Callable[..., Any]) -> Any:
        names = list(signature(emit).parameters.values())[1:]

        def typed(context: Any, *given: Any) -> Any:
            own = [g if kind is None else kind for g, kind in zip(given, kinds, strict=True)]
            gives = own[0].dtype if result is None else own[0] if result == "same" else result

            def generate(target: Any, b: Any, sig: Any, args: Any) -> Any:
                found = emit(b, *args)
                return target.get_dummy_value() if gives is types.void else found

            return gives(*own), generate

        typed.__name__ = emit.__name__
        first = Parameter("context", Parameter.POSITIONAL_OR_KEYWORD)
        typed.__signature__ = Signature([first, *names])  # type: ignore[attr-defined]
        return intrinsic(typed)

    return wrap


def _asm(b: Any, result: Any, text: str, constraints: str, args: list[Any], *, effect: bool = False) -> Any:
    """Inline PTX; with an effect it is neither moved past other effects nor into a branch."""
    kind = ir.FunctionType(result, [a.type for a in args])
    if effect:
        constraints = ",".join(filter(None, (constraints, "~{memory}")))
    call = b.call(ir.InlineAsm(kind, text, constraints, side_effect=effect), args)
    if effect:
        call.attributes.add("convergent")
    return call


def _call(b: Any, name: str, result: Any, *args: Any) -> Any:
    return b.call(cgutils.get_or_insert_function(b.module, ir.FunctionType(result, [a.type for a in args]), name), args)


def _tuple(b: Any, struct: Any, count: int) -> Any:
    return cgutils.pack_array(b, [b.extract_value(struct, n) for n in range(count)])


def _parts(b: Any, packed: Any) -> list[Any]:
    return [b.extract_value(packed, n) for n in range(4)]


def _element(b: Any, p: Any, i: Any) -> Any:
    return b.gep(p, [b.sext(i, _LONG)], inbounds=True)


def _word(b: Any, i: Any) -> Any:
    """Pointer to a word of shared memory."""
    memory = b.module.globals.get("refattn_shared")
    if memory is None:
        memory = ir.GlobalVariable(b.module, ir.ArrayType(_INT, 0), "refattn_shared", addrspace=_SHARED)
        memory.linkage, memory.align = "external", 16
    return b.gep(memory, [ir.Constant(_INT, 0), i], inbounds=True)


def _floats_at(b: Any, i: Any) -> Any:
    return b.bitcast(_word(b, i), ir.PointerType(_FLOAT, _SHARED))


def _address(b: Any, i: Any) -> Any:
    """The 32-bit address that PTX takes for shared memory."""
    return b.ptrtoint(_word(b, i), _INT)


# Where a thread is ---------------------------------------------------------------------------------------------------


@primitive(I32)
def thread(b: Any) -> Any:
    """Number of the thread in its block."""
    return _call(b, "llvm.nvvm.read.ptx.sreg.tid.x", _INT)


@intrinsic(prefer_literal=True)
def block(context: Any, axis: Any) -> Any:
    """Number of the block along axis 0, 1 or 2, a constant."""
    name = f"llvm.nvvm.read.ptx.sreg.ctaid.{'xyz'[axis.literal_value]}"
    return I32(axis), lambda target, b, sig, args: _call(b, name, _INT)


# Memory --------------------------------------------------------------------------------------------------------------


def _local(kind: Any, of: Any) -> Any:
    @intrinsic(prefer_literal=True)
    def made(context: Any, count: Any) -> Any:
        def generate(target: Any, b: Any, sig: Any, args: Any) -> Any:
            memory = cgutils.alloca_once(b, ir.ArrayType(of, count.literal_value))
            return b.bitcast(memory, of.as_pointer())

        return types.CPointer(kind)(count), generate

    return made


local = _local(F32, _FLOAT)
local_int = _local(I32, _INT)


@primitive("same", None, types.int64)
def past(b: Any, p: Any, count: Any) -> Any:
    """The pointer so many elements on."""
    return b.gep(p, [count])


@primitive(None, None, I32)
def read(b: Any, p: Any, i: Any) -> Any:
    """Element i."""
    return b.load(_element(b, p, i))


@intrinsic
def write(context: Any, p: Any, i: Any, x: Any) -> Any:
    """Sets element i; of a word that is wider, its low bits."""

    def generate(target: Any, b: Any, sig: Any, args: Any) -> Any:
        b.store(args[2], _element(b, args[0], args[1]))
        return target.get_dummy_value()

    return types.void(p, I32, p.dtype), generate


@primitive(F32, I32)
def get(b: Any, i: Any) -> Any:
    """Word i of shared memory as a float."""
    return b.load(_floats_at(b, i))


@primitive(FOUR_FLOATS, I32)
def get4(b: Any, i: Any) -> Any:
    """Words i to i + 3 of shared memory, i a multiple of 4."""
    found = b.load(b.bitcast(_word(b, i), ir.PointerType(ir.VectorType(_FLOAT, 4), _SHARED)), align=16)
    return cgutils.pack_array(b, [b.extract_element(found, ir.Constant(_INT, n)) for n in range(4)])


@primitive(I32, I32)
def get_bits(b: Any, i: Any) -> Any:
    """Word i of shared memory as bits, of which the highest may be a sign."""
    return b.load(_word(b, i))


@primitive(types.void, I32, F32)
def put(b: Any, i: Any, x: Any) -> Any:
    """Sets word i of shared memory to a float."""
    return b.store(x, _floats_at(b, i))


@primitive(types.void, I32, U32)
def put_bits(b: Any, i: Any, bits: Any) -> Any:
    """Sets word i of shared memory to bits."""
    return b.store(bits, _word(b, i))


def _copy(size: int, cache: str) -> Any:
    @primitive(types.void, I32, None, I32, types.boolean)
    def copy(b: Any, i: Any, p: Any, j: Any, live: Any) -> Any:
        source = b.ptrtoint(b.addrspacecast(_element(b, p, j), ir.PointerType(p.type.pointee, _GLOBAL)), _LONG)
        count = b.select(live, ir.Constant(_INT, size), ir.Constant(_INT, 0))
        text = f"cp.async.{cache}.shared.global [$0], [$1], {size}, $2;"
        return _asm(b, _VOID, text, "r,l,r", [_address(b, i), source, count], effect=True)

    return copy


# copy4(i, p, j, live): one word from element j on to word i of shared memory, in flight until `wait`; 0 if not live.
copy4 = _copy(4, "ca")
# copy16: four words, of addresses that are multiples of 16 bytes.
copy16 = _copy(16, "cg")


@primitive(types.void)
def commit(b: Any) -> Any:
    """Makes the copies of this thread since the last commit a group."""
    return _asm(b, _VOID, "cp.async.commit_group;", "", [], effect=True)


@intrinsic(prefer_literal=True)
def wait(context: Any, count: Any) -> Any:
    """Waits until at most so many of this thread's groups, a constant, are in flight."""

    def generate(target: Any, b: Any, sig: Any, args: Any) -> Any:
        _asm(b, _VOID, f"cp.async.wait_group {count.literal_value};", "", [], effect=True)
        return target.get_dummy_value()

    return types.void(count), generate


# Threads together ----------------------------------------------------------------------------------------------------


@primitive(types.void)
def barrier(b: Any) -> Any:
    """All threads of the block wait for each other, and see each other's writes."""
    return _call(b, "llvm.nvvm.barrier0", _VOID)


@primitive(types.boolean, types.boolean)
def barrier_or(b: Any, flag: Any) -> Any:
    """As `barrier`; whether any thread's flag is set."""
    found = _call(b, "llvm.nvvm.barrier0.or", _INT, b.zext(flag, _INT))
    return b.icmp_signed("!=", found, ir.Constant(_INT, 0))


@primitive(types.void)
def warp_sync(b: Any) -> Any:
    """All lanes of the warp wait for each other, and see each other's writes."""
    return _call(b, "llvm.nvvm.bar.warp.sync", _VOID, _WHOLE_WARP)


@primitive(F32, F32, I32)
def shuffle_xor(b: Any, x: Any, distance: Any) -> Any:
    """The x of the lane whose number differs by these bits."""
    text = "shfl.sync.bfly.b32 $0, $1, $2, 31, -1;"
    return _asm(b, _FLOAT, text, "=f,f,r", [x, distance], effect=True)


def _ldmatrix(option: str) -> Any:
    @primitive(FOUR_WORDS, I32)
    def load(b: Any, i: Any) -> Any:
        text = f"ldmatrix.sync.aligned.m8n8.x4{option}.shared.b16 {{$0, $1, $2, $3}}, [$4];"
        found = _asm(b, ir.LiteralStructType([_INT] * 4), text, "=r,=r,=r,=r,r", [_address(b, i)], effect=True)
        return _tuple(b, found, 4)

    return load


# ldmatrix(i): four 8×8 matrices of 16-bit numbers; lane n gives the address of row n % 8 of matrix n // 8, and receives
# of each matrix the numbers 2 (n % 4) and the next of row n // 4; `ldmatrix_t`: of the transposed matrices.
ldmatrix = _ldmatrix("")
ldmatrix_t = _ldmatrix(".trans")


def _mma(kind: str) -> Any:
    @primitive(FOUR_FLOATS, FOUR_FLOATS, FOUR_WORDS, U32, U32)
    def mma(b: Any, c: Any, a: Any, low: Any, high: Any) -> Any:
        text = (
            f"mma.sync.aligned.m16n8k16.row.col.f32.{kind}.{kind}.f32 "
            "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};"
        )
        constraints = "=f,=f,=f,=f,r,r,r,r,r,r,0,1,2,3"
        arguments = [*_parts(b, a), low, high, *_parts(b, c)]
        return _tuple(b, _asm(b, ir.LiteralStructType([_FLOAT] * 4), text, constraints, arguments, effect=True), 4)

    return mma


# mma(c, a, low, high): c + A·B of a warp, A 16×16, B 16×8 in the layout of `ldmatrix`, C 16×8 in float32.
mma_bf16 = _mma("bf16")
mma_f16 = _mma("f16")


# Numbers -------------------------------------------------------------------------------------------------------------


def _pack(kind: str) -> Any:
    @primitive(U32, F32, F32)
    def pack(b: Any, low: Any, high: Any) -> Any:
        return _asm(b, _INT, f"cvt.rn.{kind}x2.f32 $0, $1, $2;", "=r,f,f", [high, low])

    return pack


# Two floats rounded to 16 bits each in one word, the first in the low half.
pack_bf16 = _pack("bf16")
pack_f16 = _pack("f16")


@primitive(U32, U32, U32)
def join(b: Any, low: Any, high: Any) -> Any:
    """One word of two halves."""
    return b.or_(low, b.shl(high, ir.Constant(_INT, 16)))


@primitive(F32, F32)
def exp2(b: Any, x: Any) -> Any:
    """2ˣ, within 2 ulp; what is too small is 0."""
    return _asm(b, _FLOAT, "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x])


@primitive(F32, F32)
def log2(b: Any, x: Any) -> Any:
    """log₂ x, within 2⁻²² of absolute error."""
    return _asm(b, _FLOAT, "lg2.approx.ftz.f32 $0, $1;", "=f,f", [x])


@primitive(F32, F32)
def absolute(b: Any, x: Any) -> Any:
    """|x|."""
    return _asm(b, _FLOAT, "abs.f32 $0, $1;", "=f,f", [x])


@primitive(F32, F32, F32)
def larger(b: Any, x: Any, y: Any) -> Any:
    """The larger of two, the number where one is NaN."""
    return _asm(b, _FLOAT, "max.f32 $0, $1, $2;", "=f,f,f", [x, y])


@primitive(F32, F32, F32)
def divide(b: Any, x: Any, y: Any) -> Any:
    """x / y, correctly rounded."""
    return _asm(b, _FLOAT, "div.rn.f32 $0, $1, $2;", "=f,f,f", [x, y])
