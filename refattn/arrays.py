"""The caller's arrays in, the caller's arrays out: NumPy, torch, JAX, and whatever speaks DLPack or `__array__`.

No framework is imported here: an array of a framework can only exist once the caller has imported it, so
`sys.modules` tells. bfloat16 and the 8-bit floats cross DLPack nowhere in NumPy; torch hands them over as integers of
the same width, JAX gives the ml_dtypes types itself.
"""

from __future__ import annotations

import sys
from typing import Any, Literal

import ml_dtypes
import numpy as np

from refattn.cache import Grown
from refattn.errors import DTypeError

_NAMES = "bool, int8 to int64, uint8 to uint64, float16, float32, float64, bfloat16, float8_e4m3fn, float8_e5m2"

Kind = Literal["numpy", "torch", "jax", "other"]

# dtypes that torch knows and NumPy does not: the ml_dtypes type, and the integer both sides can view it as.
_BY_BITS = {
    "bfloat16": (np.dtype(ml_dtypes.bfloat16), "int16"),
    "float8_e4m3fn": (np.dtype(ml_dtypes.float8_e4m3fn), "uint8"),
    "float8_e5m2": (np.dtype(ml_dtypes.float8_e5m2), "uint8"),
}
_PLAIN = [np.dtype(c) for c in ("?", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8")]
_ALLOWED = (*_PLAIN, *(dtype for dtype, _ in _BY_BITS.values()))
_AS_THEY_ARE = frozenset(_ALLOWED)
_ALLOWED_NAMES = {dtype.name for dtype in _ALLOWED}

# DLPack device types whose memory the host can read: CPU, CUDA pinned, ROCm pinned.
_HOST_DEVICES = {1, 3, 11}


def kind_of(*arrays: object) -> Kind:
    """Return the kind of the first array that is not None; kinds may be mixed, and the first (q) decides.

    "other" is an array that is neither NumPy, torch nor JAX but knows its namespace, DLPack or the CUDA array
    interface; Python numbers, nested lists and all the rest are "numpy".
    """
    x = next((x for x in arrays if x is not None), None)
    if isinstance(x, (np.ndarray, np.generic)):
        return "numpy"
    if isinstance(x, _framework_type("torch", "Tensor")):
        return "torch"
    if isinstance(x, _framework_type("jax", "Array")):
        return "jax"
    protocols = ("__array_namespace__", "__dlpack__", "__cuda_array_interface__")
    return "other" if any(hasattr(x, protocol) for protocol in protocols) else "numpy"


def to_numpy(x: object, name: str) -> np.ndarray:
    """Return x as a NumPy array in native byte order, without a copy where its memory allows; x is not modified.

    Parameters
    ----------
    x : array, scalar or nested list
        NumPy, torch (strided, on the CPU; detached), JAX (on the CPU), DLPack on the CPU, `__array__`, Python numbers.
    name : str
        The argument's name, for the message.

    Returns
    -------
    numpy.ndarray
        Any shape; bool, an integer of up to 64 bits, float16, float32, float64, or the ml_dtypes types bfloat16,
        float8_e4m3fn, float8_e5m2. It may be read-only, and may share the caller's memory.

    Raises
    ------
    DTypeError
        x has another type (object, complex, longdouble, text, ...), is masked, lives on an accelerator, or cannot be
        read now (a traced JAX array, a sparse tensor, a ragged list).
    """
    if (type(x) is np.ndarray or type(x) is Grown) and x.dtype in _AS_THEY_ARE:
        return x
    if isinstance(x, np.ma.MaskedArray):
        raise DTypeError(f"{name} is a masked array, whose mask would be lost; give its data, filled, and mask= apart")
    try:
        match kind_of(x):
            case "torch":
                a = _from_torch(x, name)
            case "jax":
                a = _from_jax(x, name)
            case "other":
                a = _from_other(x, name)
            case "numpy":
                a = np.asarray(x)
    except DTypeError:
        raise
    except (TypeError, ValueError, RuntimeError, BufferError, AttributeError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise DTypeError(f"{name} ({_type_name(x)}) cannot be read as a NumPy array: {reason}") from error
    if not a.dtype.isnative:
        a = a.astype(a.dtype.newbyteorder("="))
    if a.dtype not in _ALLOWED:
        raise _refused(name, f"{_type_name(x)} of dtype {a.dtype}")
    return a


def from_numpy(a: np.ndarray, like: object) -> Any:
    """Return a in the kind and on the device of `like`, in a's own dtype, sharing memory where the kind allows it.

    An array of a library without a namespace and without `from_dlpack` gets NumPy back.

    Raises
    ------
    DTypeError
        The kind cannot hold a's values: float64 in JAX without x64, an ml_dtypes type in an array-API library.
    """
    match kind_of(like):
        case "torch":
            return _to_torch(a, like)
        case "jax":
            return _to_jax(a, like)
        case "other":
            return _to_other(a, like)
        case "numpy":
            return a


def _from_torch(x: Any, name: str) -> np.ndarray:
    torch = sys.modules["torch"]
    if x.device.type != "cpu":
        raise _not_on_host(name, x.device)
    if x.layout != torch.strided:
        raise DTypeError(f"{name} is a torch tensor of layout {x.layout}; give a dense one, {name}.to_dense()")
    dtype = str(x.dtype).removeprefix("torch.")
    if dtype not in _ALLOWED_NAMES:
        raise _refused(name, f"torch.Tensor of dtype {dtype}")
    x = x.detach().resolve_neg()
    if dtype in _BY_BITS:
        numpy_dtype, bits = _BY_BITS[dtype]
        return np.asarray(x.view(getattr(torch, bits)).numpy()).view(numpy_dtype)
    return np.asarray(x.numpy())


def _to_torch(a: np.ndarray, like: Any) -> Any:
    torch = sys.modules["torch"]
    # torch warns of memory it must not write to, and refuses negative strides.
    if not a.flags.writeable or min(a.strides, default=0) < 0:
        a = a.copy()
    if a.dtype.name in _BY_BITS:
        _, bits = _BY_BITS[a.dtype.name]
        return torch.from_numpy(a.view(bits)).view(getattr(torch, a.dtype.name)).to(like.device)
    return torch.from_numpy(a).to(like.device)


def _from_jax(x: Any, name: str) -> np.ndarray:
    if isinstance(x, sys.modules["jax"].core.Tracer):
        raise DTypeError(f"{name} is traced (jit, grad or vmap) and has no values yet; call from jax.pure_callback")
    if any(device.platform != "cpu" for device in x.devices()):
        raise _not_on_host(name, x.device)
    return np.asarray(x)


def _to_jax(a: np.ndarray, like: Any) -> Any:
    device = min(like.devices(), key=lambda device: device.id)
    result = sys.modules["jax"].device_put(a, device)
    # Without x64 JAX narrows in silence. An integer that fits has lost nothing; a float64 has lost its last bits.
    if result.dtype != a.dtype and (a.dtype.kind == "f" or not np.array_equal(np.asarray(result), a)):
        raise DTypeError(
            f"the result is {a.dtype}, which JAX would turn into {result.dtype}; "
            'ask dtype="float32", or set jax.config.update("jax_enable_x64", True)'
        )
    return result


def _from_other(x: Any, name: str) -> np.ndarray:
    if hasattr(x, "__cuda_array_interface__"):
        raise _not_on_host(name, "a CUDA device")
    if hasattr(x, "__dlpack_device__"):
        device = x.__dlpack_device__()
        if int(device[0]) not in _HOST_DEVICES:
            raise _not_on_host(name, f"DLPack device {tuple(map(int, device))}")
        try:
            return np.from_dlpack(x)
        except (RuntimeError, BufferError, TypeError):
            if not hasattr(x, "__array__"):  # NumPy's DLPack knows no bfloat16; __array__ may
                raise
    return np.asarray(x)


def _to_other(a: np.ndarray, like: Any) -> Any:
    try:
        if hasattr(like, "__array_namespace__"):
            return like.__array_namespace__().asarray(a, device=like.device)
        package = sys.modules.get(type(like).__module__.partition(".")[0])
        return package.from_dlpack(a) if package is not None and hasattr(package, "from_dlpack") else a
    except (TypeError, ValueError, RuntimeError, BufferError) as error:
        raise DTypeError(f"{_type_name(like)} cannot hold the result, {a.dtype}: {error}; ask another dtype") from error


def _framework_type(framework: str, name: str) -> Any:
    # A framework half way through its import has no such name yet; isinstance(x, ()) is False.
    return getattr(sys.modules.get(framework), name, ())


def _type_name(x: object) -> str:
    cls = type(x)
    return cls.__qualname__ if cls.__module__ == "builtins" else f"{cls.__module__}.{cls.__qualname__}"


def _refused(name: str, given: str) -> DTypeError:
    return DTypeError(f"{name} is {given}; allowed are {_NAMES}")


def _not_on_host(name: str, device: object) -> DTypeError:
    return DTypeError(f'{name} is on {device}, which this engine cannot read; move it to the CPU or ask engine="cuda"')
