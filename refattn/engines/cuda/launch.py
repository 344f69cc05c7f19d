"""Kernels on a device: memory, one launch, and what a driver refuses as an error with a remedy.

Written against the driver API and run on a driver that the tests simulate; it has never run on a device.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.engines.cuda.arrays import Device
from refattn.engines.cuda.kernels.form import Form
from refattn.errors import DeviceError, EngineUnavailable

_ALIGNED = 256  # bytes: where each array of a shared allocation begins
_PLAIN = 48 << 10  # bytes of shared memory that a kernel has without being granted more
_LEGACY_STREAM = 0


class Loaded(NamedTuple):
    """A kernel that a device has."""

    function: Any
    words: int


def needs() -> str | None:
    """Which of package and driver is missing and how to get it, or None."""
    packages = [name for name in ("numba_cuda", "cuda.bindings") if not _found(name)]
    if packages:
        names = " and ".join(name.replace("_", "-").replace(".", "-") for name in packages)
        are = "is" if len(packages) == 1 else "are"
        how = "pip install 'refattn[cuda]' (Linux or Windows, Python 3.11 or newer)"
        return f"{names}, which {are} not installed: {how}"
    try:
        driver = _driver()
        (code,) = driver.cuInit(0)
    except Exception as error:  # what a loader raises differs from version to version
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        return (
            f"the NVIDIA driver, which cannot be loaded ({reason}): install a driver for CUDA 13.0 (580 or newer) on a "
            "machine with a GPU of compute capability 8.0 or newer"
        )
    if int(code):
        return f"a working NVIDIA driver, and cuInit gives {_told(driver, code)}: check that nvidia-smi lists a GPU"
    return None


def ready() -> Any:
    """The driver.

    Raises
    ------
    EngineUnavailable
        The package or the driver is missing.
    """
    absent = needs()
    if absent is not None:
        raise EngineUnavailable(f"engine 'cuda' needs {absent}")
    return _driver()


class Session:
    """Work on one stream of a device; an array of the host has a place there until the session ends."""

    def __init__(self, device: int, stream: int) -> None:
        self.driver, self.device, self.stream = ready(), device, stream
        self.places: dict[int, tuple[NDArray[Any], int]] = {}
        self.blocks: list[int] = []

    def run(
        self, name: str, form: Form, given: tuple[Any, ...], grid: tuple[int, int, int], blank: Sequence[str] = ()
    ) -> None:
        """Launches the kernel of that name and form with named tuples of numbers, arrays of the host and `Device`s.

        What is blank is not copied there.

        Raises
        ------
        DeviceError
            Too little memory or shared memory, too old a device, or what else the driver tells.
        """
        kernel = loaded(name, form, self.device)
        whole = {n: a for x in given for n, a in x._asdict().items()}
        host = {n: a for n, a in whole.items() if isinstance(a, np.ndarray)}
        self._place({n: a for n, a in host.items() if id(a) not in self.places}, blank)
        values, kinds = packed(whole | {n: self.places[id(a)][1] for n, a in host.items()})
        size, stream = 4 * kernel.words, self.stream
        done = self.driver.cuLaunchKernel(kernel.function, *grid, form.threads, 1, 1, size, stream, (values, kinds), 0)
        _check(self.driver, done, f"a launch with {size} bytes of shared memory on device {self.device}")

    def fetch(self, *arrays: NDArray[Any]) -> None:
        """Waits for the work, and copies what it left in the places of these arrays into them."""
        for array in arrays:
            if array.nbytes:
                place = self.places[id(array)][1]
                _check(self.driver, self.driver.cuMemcpyDtoHAsync(array, place, array.nbytes, self.stream))
        _check(self.driver, self.driver.cuStreamSynchronize(self.stream))

    def end(self) -> None:
        """Gives the memory back once the stream has come by."""
        for block in self.blocks:
            self.driver.cuMemFreeAsync(block, self.stream)

    def _place(self, host: Mapping[str, NDArray[Any]], blank: Sequence[str]) -> None:
        """Places for the arrays in one allocation."""
        size = sum(-(-a.nbytes // _ALIGNED) * _ALIGNED for a in host.values())
        what, place = f"{size} bytes of memory on device {self.device}", 0
        if size:
            place = int(_check(self.driver, self.driver.cuMemAllocAsync(size, self.stream), what))
            self.blocks.append(place)
        for name, array in host.items():
            self.places[id(array)] = array, place
            if array.nbytes and name not in blank:
                whole = np.ascontiguousarray(array)
                _check(self.driver, self.driver.cuMemcpyHtoDAsync(place, whole, whole.nbytes, self.stream), what)
            place += -(-array.nbytes // _ALIGNED) * _ALIGNED


@contextmanager
def session(device: int = 0, stream: int = _LEGACY_STREAM) -> Iterator[Session]:
    """A session, with the primary context of its device current, which torch, CuPy and JAX use.

    Raises
    ------
    EngineUnavailable
        The package or the driver is missing.
    """
    driver = ready()
    context, _ = _context(device)
    _check(driver, driver.cuCtxPushCurrent(context))
    work = Session(device, stream)
    try:
        yield work
    finally:
        work.end()
        driver.cuCtxPopCurrent()


def packed(x: Mapping[str, Any]) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The numbers that a kernel's parameters are, tuples taken apart, and their C types; by their names."""
    values: list[Any] = []
    kinds: list[Any] = []
    for name, value in x.items():
        kind = _KINDS.get(name, ctypes.c_void_p)
        for part in value if isinstance(value, tuple) else (value,):
            values.append(part.address if isinstance(part, Device) else float(part) if kind is _F32 else int(part))
            kinds.append(kind)
    return tuple(values), tuple(kinds)


_I32, _I64, _F32 = ctypes.c_int32, ctypes.c_int64, ctypes.c_float
_NUMBERS = "heads share lq lk columns zero splits page entries segment at_strides span".split()
_KINDS: dict[str, Any] = dict.fromkeys(_NUMBERS, _I32)
_KINDS |= dict.fromkeys(("q_strides", "k_strides", "v_strides", "dout_strides", "dense_strides", "mask_strides"), _I64)
_KINDS |= dict.fromkeys(("unit", "cap", "scale", "clamp", "add"), _F32)


@cache
def loaded(name: str, form: Form, number: int) -> Loaded:
    """The form's kernel on a device, granted the shared memory it needs.

    Raises
    ------
    DeviceError
        The device is too old, or has too little shared memory.
    """
    from refattn.engines.cuda import build

    driver, (_, device) = _driver(), _context(number)
    named = driver.CUdevice_attribute
    major = _attribute(driver, named.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR, device)
    if major < build.LEAST[0]:
        raise DeviceError(f"device {number} has compute capability {major}, and the kernels need 8.0 or newer")
    words, text = build.words(name, form), build.kept(name, form)
    most = _attribute(driver, named.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, device)
    size = 4 * words
    if size > most:
        raise DeviceError(
            f"the kernel for D = {form.depth} and Dv = {form.width} in {form.storage} needs {size} bytes of shared "
            f"memory a block, and device {number} has {most}: take smaller heads or 16-bit numbers"
        )
    library = _check(driver, driver.cuLibraryLoadData(text.encode() + b"\0", [], [], 0, [], [], 0), "loading a kernel")
    function = _check(driver, driver.cuLibraryGetKernel(library, build.entry(text).encode()), "loading a kernel")
    if size > _PLAIN:
        granted = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _check(driver, driver.cuKernelSetAttribute(granted, size, function, device), f"{size} bytes of shared memory")
    return Loaded(driver.CUfunction(int(function)), words)


def _found(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # of the package above it
        return False


def _driver() -> Any:
    return import_module("cuda.bindings.driver")


@cache
def _context(number: int) -> tuple[Any, Any]:
    """Primary context and handle of a device."""
    driver = _driver()
    device = _check(driver, driver.cuDeviceGet(number), f"device {number}")
    return _check(driver, driver.cuDevicePrimaryCtxRetain(device), f"device {number}"), device


def _attribute(driver: Any, attribute: Any, device: Any) -> int:
    return int(_check(driver, driver.cuDeviceGetAttribute(attribute, device)))


def _check(driver: Any, answer: Sequence[Any], what: str = "") -> Any:
    """What the driver gives beside its code, if the code is that of success."""
    code, *given = answer
    if int(code):
        told = _told(driver, code)
        remedy = "; free memory, or take a smaller batch" if "OUT_OF_MEMORY" in told else ""
        raise DeviceError(f"the driver gives {told}{f' for {what}' if what else ''}{remedy}")
    return given[0] if given else None


def _told(driver: Any, code: Any) -> str:
    """Name of a driver's code."""
    failed, name = driver.cuGetErrorName(code)
    return str(code) if int(failed) else name.decode()
