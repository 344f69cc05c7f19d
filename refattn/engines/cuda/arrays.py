"""Arrays in the memory of a device, taken where they are: DLPack, or the CUDA array interface."""

from __future__ import annotations

import ctypes
import sys
from typing import Any

import ml_dtypes
import numpy as np

from refattn.errors import DTypeError, Unsupported

_CUDA, _MANAGED = 2, 13  # device types of DLPack
_LEGACY = 1  # the legacy default stream, in DLPack and in the CUDA array interface
_KINDS = {(2, 32): np.float32, (2, 16): np.float16, (4, 16): ml_dtypes.bfloat16, (2, 64): np.float64}
_KINDS |= {(0, bits): np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)}
_KINDS |= {(1, bits): np.dtype(f"u{bits // 8}") for bits in (8, 16, 32, 64)} | {(6, 8): np.bool_}


class Device:
    """An array of a device; strides and nbytes in bytes. `owner` keeps the memory, `stream` is where it is ready."""

    __array_ufunc__ = None

    def __init__(  # noqa: PLR0917
        self, owner: Any, address: int, shape: Any, strides: Any, dtype: Any, number: int, stream: int
    ) -> None:
        self.owner, self.address, self.number, self.stream = owner, int(address), int(number), int(stream)
        self.shape, self.strides, self.dtype = tuple(shape), tuple(strides), np.dtype(dtype)
        self.ndim, self.size = len(self.shape), int(np.prod(self.shape, dtype=np.int64))
        self.nbytes = self.size * self.dtype.itemsize

    def swapaxes(self, a: int, b: int) -> Device:
        """The same memory with two axes changed."""
        order = list(range(self.ndim))
        order[a], order[b] = order[b], order[a]
        shape, strides = ([given[n] for n in order] for given in (self.shape, self.strides))
        return Device(self.owner, self.address, shape, strides, self.dtype, self.number, self.stream)

    def handed_out(self) -> Any:
        """The array as its library has it, in this order of axes."""
        size = self.dtype.itemsize
        if self.strides == _dense(self.shape, size) or self.ndim != 4:
            return self.owner
        return self.owner.swapaxes(1, 2)

    def astype(self, dtype: Any, **options: Any) -> Device:
        """Itself, in its own dtype.

        Raises
        ------
        Unsupported
            Another dtype is asked, as by a variant that computes with the numbers.
        """
        if np.dtype(dtype) != self.dtype:
            raise Unsupported(
                f"engine 'cuda' does not convert a {self.dtype} array on a device to {np.dtype(dtype)}: this problem "
                "computes with the numbers of q, k or v; give them on the host"
            )
        return self

    def __array__(self, *arguments: Any, **options: Any) -> Any:
        raise DTypeError("the array is on a device, and its numbers are read there alone; move it to the host first")


def on_device(x: Any) -> bool:
    """Whether an array is in the memory of a CUDA device."""
    if hasattr(x, "__dlpack_device__"):
        return int(x.__dlpack_device__()[0]) in (_CUDA, _MANAGED)
    return hasattr(x, "__cuda_array_interface__")


def take(x: Any, name: str) -> Device:
    """The array where it is, ready on the stream that its library works on now.

    Raises
    ------
    DTypeError
        It has a dtype or a form that neither protocol tells, or is read-only by another's will.
    """
    stream = stream_of(x)
    detached = x.detach() if hasattr(x, "detach") else x
    try:
        if hasattr(x, "__dlpack__"):
            return _from_dlpack(detached, stream, int(x.__dlpack_device__()[1]))
        return _from_interface(x, stream)
    except (TypeError, ValueError, RuntimeError, BufferError, KeyError) as error:
        raise DTypeError(f"{name} cannot be taken from its device: {error}") from error


def stream_of(x: Any) -> int:
    """The stream on which the array's library works now; the legacy default where it does not tell."""
    package = type(x).__module__.partition(".")[0]
    library: Any = sys.modules.get(package)
    if package == "torch":
        return int(library.cuda.current_stream(x.device).cuda_stream) or _LEGACY
    if package == "cupy":
        return int(library.cuda.get_current_stream().ptr) or _LEGACY
    return _LEGACY


def empty(like: Device, shape: tuple[int, ...], dtype: Any) -> Device:
    """A new array of the library of `like` on its device.

    Raises
    ------
    Unsupported
        A library that offers no memory to write to: JAX, whose arrays never change.
    """
    package = type(like.owner).__module__.partition(".")[0]
    library: Any = sys.modules.get(package)
    name = np.dtype(dtype).name
    if package == "torch":
        made = library.empty(shape, dtype=getattr(library, name), device=like.owner.device)
    elif package == "cupy":
        made = library.empty(shape, dtype=name)
    elif hasattr(like.owner, "empty_on_device"):
        made = like.owner.empty_on_device(shape, np.dtype(dtype))
    else:
        raise Unsupported(
            f"engine 'cuda' reads arrays of {package} but cannot give any back: torch and CuPy tensors, or NumPy arrays"
        )
    return take(made, "out")


class _Tensor(ctypes.Structure):
    """DLTensor, the beginning of a DLManagedTensor."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


def _from_dlpack(x: Any, stream: int, number: int) -> Device:
    """The capsule is looked into and dropped: it gives its own share back, and `owner` holds the memory."""
    capsule = x.__dlpack__(stream=stream)
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.restype, pointer.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    found = _Tensor.from_address(pointer(capsule, b"dltensor"))
    kind = _KINDS.get((found.code, found.bits))
    if kind is None or found.lanes != 1:
        raise TypeError(f"DLPack type {found.code} of {found.bits} bits and {found.lanes} lanes")
    shape = tuple(found.shape[n] for n in range(found.ndim))
    size = np.dtype(kind).itemsize
    steps = tuple(found.strides[n] * size for n in range(found.ndim)) if found.strides else _dense(shape, size)
    return Device(x, (found.data or 0) + found.byte_offset, shape, steps, kind, number, stream)


def _from_interface(x: Any, stream: int) -> Device:
    told = x.__cuda_array_interface__
    if told.get("mask") is not None:
        raise TypeError("a masked array")
    shape, dtype = told["shape"], np.dtype(told["typestr"])
    strides = told.get("strides") or _dense(shape, dtype.itemsize)
    number = int(getattr(getattr(x, "device", None), "id", 0))
    return Device(x, told["data"][0], shape, strides, dtype, number, told.get("stream") or stream)


def _dense(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple((np.cumprod((1, *shape[:0:-1]))[::-1] * size).tolist()) if shape else ()
