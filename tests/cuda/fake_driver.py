"""A CUDA driver whose device is the simulator: memory is one array, and a launch runs the kernel of its form there."""

import ctypes
import sys
from types import SimpleNamespace

import numpy as np
from simulating import SMALL, SPLIT

from refattn.engines import cuda
from refattn.engines.cuda import launch, operands, sim, simulator
from refattn.engines.cuda.kernels.roles import ROLES

BASE = 1 << 20
TUPLES = {"q_strides": 3, "k_strides": 3, "v_strides": 3, "at_strides": 4, "span": 2, "cap": 2}
TUPLES |= {"dout_strides": 3, "dense_strides": 4, "mask_strides": 4}
OUT_OF_MEMORY, NO_DEVICE = 2, 100


class Driver:
    """The functions that `launch` calls, with the answers of cuda.bindings."""

    CUdevice_attribute = SimpleNamespace(
        CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR="major",
        CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN="shared",
    )
    CUfunction_attribute = SimpleNamespace(CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES="granted")
    CUfunction = int

    def __init__(self, size=1 << 20, broken=0, **attributes):
        self.memory, self.top, self.broken, self.live, self.depth = np.full(size, 0xFF, np.uint8), 0, broken, set(), 0
        self.attributes = {"major": 9, "shared": 227 << 10} | attributes
        self.streams, self.forms, self.granted = [], [], {}

    def cuInit(self, flags):
        return (self.broken,)

    def cuGetErrorName(self, code):
        return 0, {OUT_OF_MEMORY: b"CUDA_ERROR_OUT_OF_MEMORY", NO_DEVICE: b"CUDA_ERROR_NO_DEVICE"}[int(code)]

    def cuDeviceGet(self, number):
        return 0, number

    def cuDevicePrimaryCtxRetain(self, device):
        return 0, f"context of {device}"

    def cuCtxPushCurrent(self, context):
        self.depth += 1
        return (0,)

    def cuCtxPopCurrent(self):
        self.depth -= 1
        return 0, None

    def cuDeviceGetAttribute(self, attribute, device):
        return 0, self.attributes[attribute]

    def cuLibraryLoadData(self, code, *options):
        return 0, code

    def cuLibraryGetKernel(self, library, name):
        self.forms.append(FORMS[int(name.removeprefix(b"form"))])
        return 0, len(self.forms) - 1

    def cuKernelSetAttribute(self, attribute, value, kernel, device):
        self.granted[kernel] = value
        return (0,)

    def cuMemAllocAsync(self, size, stream):
        if self.top + size > self.memory.size:
            return OUT_OF_MEMORY, None
        address, self.top = BASE + self.top, self.top + size
        self.live.add(address)
        return 0, address

    def cuMemFreeAsync(self, address, stream):
        self.live.remove(address)
        return (0,)

    def cuMemcpyHtoDAsync(self, address, array, size, stream):
        self.memory[address - BASE :][:size] = array.reshape(-1).view(np.uint8)
        return (0,)

    def cuMemcpyDtoHAsync(self, array, address, size, stream):
        array.reshape(-1).view(np.uint8)[:] = self.memory[address - BASE :][:size]
        return (0,)

    def cuStreamSynchronize(self, stream):
        return (0,)

    def cuLaunchKernel(self, function, *rest):
        *grid, threads, _, _, size, stream, (values, kinds), _ = rest
        name, form = self.forms[function]
        if size > 48 << 10 and self.granted.get(function, 0) < size:
            return 1, None
        self.streams.append(stream)
        kernel = ROLES[name].make(sim, form)
        assert size == 4 * kernel.words
        assert threads == form.threads
        x = self.arguments(name, form, values, kinds)
        simulator.launch(kernel.run, tuple(grid), threads, size // 4, x)
        return (0,)

    def arguments(self, name, form, values, kinds):
        """The parameters put together again, pointers as those of the simulator."""
        given, found = list(zip(values, kinds, strict=True)), []
        floats = "lse slopes sink table dense outs lses level less dq dk dv slope sums memory weight transition".split()
        types = dict.fromkeys(floats, np.float32) | {"mask": np.uint8}
        stored = np.float32 if form.storage == "float32" else np.uint16
        types |= dict.fromkeys(("q", "k", "v", "dout"), stored)
        types |= {"out": np.float32 if form.split and name == "forward" else stored}
        for field in (field for taken in ROLES[name].takes for field in taken._fields):
            parts = [given.pop(0) for _ in range(TUPLES.get(field, 1))]
            read = [np.float32(v) if kind is ctypes.c_float else v for v, kind in parts]
            if parts[0][1] is ctypes.c_void_p:
                kind = np.dtype(types.get(field, np.int32))
                start = (read[0] or BASE) - BASE
                assert start % kind.itemsize == 0
                found.append(sim.Pointer(self.memory.view(kind), start // kind.itemsize))
            else:
                found.append(tuple(read) if field in TUPLES else read[0])
        assert not given
        return [taken(*(found.pop(0) for _ in taken._fields)) for taken in ROLES[name].takes]


FORMS = []


def words(name, form):
    return ROLES[name].make(sim, form).words


def smaller(form):
    return form._replace(**SPLIT if form.split else SMALL[form.storage])


def kept(name, form):
    FORMS.append((name, form))
    return f".visible .entry form{len(FORMS) - 1}(\n)"


def install(monkeypatch, driver):
    """Puts the driver, and a compiler that knows its kernels by number, in the place of the packages."""
    built = SimpleNamespace(
        LEAST=(8, 0),
        kept=kept,
        words=words,
        entry=lambda text: text.split()[2].removesuffix("("),
    )
    monkeypatch.setitem(sys.modules, "refattn.engines.cuda.build", built)
    monkeypatch.setattr(cuda, "build", built, raising=False)
    tiled = operands.tiled
    monkeypatch.setattr(operands, "tiled", lambda **constants: smaller(tiled(**constants)))
    monkeypatch.setattr(launch, "_driver", lambda: driver)
    monkeypatch.setattr(launch, "_found", lambda name: True)
    launch.loaded.cache_clear()
    launch._context.cache_clear()


class Remote:
    """An array of the device, as a library would hand it out: by the CUDA array interface."""

    def __init__(self, driver, shape, dtype, *, address=None, strides=None, stream=None, number=0):
        self.driver, self.shape, self.dtype, self.strides, self.stream = driver, shape, np.dtype(dtype), strides, stream
        self.device, size = SimpleNamespace(id=number), int(np.prod(shape)) * self.dtype.itemsize
        self.address = address or driver.cuMemAllocAsync(-(-size // 256) * 256, 0)[1]

    @property
    def __cuda_array_interface__(self):
        told = {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False), "version": 3}
        return told | {"strides": self.strides, "stream": self.stream}

    def empty_on_device(self, shape, dtype):
        return Remote(self.driver, shape, dtype)

    def numpy(self):
        flat = self.driver.memory[self.address - BASE :][: int(np.prod(self.shape)) * self.dtype.itemsize]
        return flat.view(self.dtype).reshape(self.shape)

    @classmethod
    def of(cls, driver, array, **options):
        made = cls(driver, array.shape, array.dtype, **options)
        made.numpy()[:] = array
        return made
