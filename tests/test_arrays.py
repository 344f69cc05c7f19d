import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from refattn.arrays import from_numpy, kind_of, to_numpy
from refattn.errors import DTypeError

SMALL = (ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2)


class DLPack:
    """A library's array: memory behind DLPack, a namespace of its own, nothing else of NumPy."""

    def __init__(self, a, device=(1, 0), namespace=None):
        self.a, self.dlpack_device = a, device
        self.device = "host"
        if namespace is not None:
            self.__array_namespace__ = lambda: namespace

    def __dlpack__(self, **kwargs):
        return self.a.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.dlpack_device


class WithArray(DLPack):
    def __array__(self, dtype=None, copy=None):
        return self.a


class ArrayOnly:
    def __init__(self, a):
        self.a = a

    def __array__(self, dtype=None, copy=None):
        return self.a


class Namespace:
    @staticmethod
    def asarray(a, *, device):
        if a.dtype == ml_dtypes.bfloat16:
            raise TypeError("unknown dtype bfloat16")
        return DLPack(a, namespace=Namespace), device


@pytest.mark.parametrize("dtype", ["?", "i1", "i8", "u1", "u8", "f2", "f4", "f8", *SMALL])
def test_a_numpy_array_comes_back_itself(dtype):
    a = np.ones((2, 3), dtype)[:, ::-2]
    assert to_numpy(a, "q") is a
    assert from_numpy(a, a) is a


@pytest.mark.parametrize(
    ("x", "dtype", "shape"),
    [
        (1.5, "f8", ()),
        (3, "i8", ()),
        (True, "?", ()),
        (np.float32(2), "f4", ()),
        (ml_dtypes.bfloat16(2), ml_dtypes.bfloat16, ()),
        ([[1, 2], [3, 4]], "i8", (2, 2)),
        ([[0.5], (1,)], "f8", (2, 1)),
        ([], "f8", (0,)),
    ],
)
def test_numbers_and_nested_lists(x, dtype, shape):
    a = to_numpy(x, "q")
    assert type(a) is np.ndarray and a.dtype == dtype and a.shape == shape
    assert a.tolist() == np.array(x).tolist()
    assert kind_of(x) == "numpy"


def test_big_endian_becomes_native_and_the_caller_keeps_the_original():
    big = np.array([1.0, 2.5], ">f4")
    a = to_numpy(big, "q")
    assert a.dtype == np.float32 and a.dtype.isnative and a.tolist() == [1.0, 2.5]
    assert big.dtype == np.dtype(">f4") and big.tolist() == [1.0, 2.5]


@pytest.mark.parametrize(
    ("x", "given"),
    [
        (np.array([None, 1]), "numpy.ndarray of dtype object"),
        (None, "NoneType of dtype object"),
        ({1, 2}, "set of dtype object"),
        (2**70, "int of dtype object"),
        (1j, "complex of dtype complex128"),
        (np.ones(2, "c8"), "numpy.ndarray of dtype complex64"),
        ("abc", "str of dtype <U3"),
        (b"abc", "bytes of dtype |S3"),
        (np.zeros(2, "M8[s]"), "numpy.ndarray of dtype datetime64"),
        (np.zeros(2, [("a", ">f4")]), "numpy.ndarray of dtype"),
        (np.zeros(2, ml_dtypes.float8_e4m3), "numpy.ndarray of dtype float8_e4m3"),
        (np.zeros(2, ml_dtypes.int4), "numpy.ndarray of dtype int4"),
    ],
)
def test_a_refused_type_is_named_with_what_is_allowed(x, given):
    with pytest.raises(DTypeError) as raised:
        to_numpy(x, "k_positions")
    message = str(raised.value)
    assert message.startswith(f"k_positions is {given}")
    assert message.endswith("float16, float32, float64, bfloat16, float8_e4m3fn, float8_e5m2")


@pytest.mark.skipif(np.dtype(np.longdouble) == np.float64, reason="longdouble is float64 on this platform")
def test_longdouble_is_refused():
    with pytest.raises(DTypeError, match=r"^q is numpy.ndarray of dtype (long|float)"):
        to_numpy(np.ones(2, np.longdouble), "q")


def test_ragged_lists_and_masked_arrays_are_refused():
    with pytest.raises(DTypeError, match=r"^q \(list\) cannot be read as a NumPy array: .*inhomogeneous"):
        to_numpy([[1.0], [1.0, 2.0]], "q")
    with pytest.raises(DTypeError, match=r"^q is a masked array"):
        to_numpy(np.ma.masked_array([1.0, 2.0], [True, False]), "q")


@pytest.mark.parametrize("wrap", [DLPack, WithArray, ArrayOnly])
def test_foreign_arrays_share_their_memory(wrap):
    memory = np.arange(6.0).reshape(2, 3).T
    a = to_numpy(wrap(memory), "q")
    assert np.shares_memory(a, memory) and a.strides == memory.strides
    assert np.array_equal(a, memory)


def test_bfloat16_that_dlpack_cannot_carry_goes_through_array():
    memory = np.ones(3, ml_dtypes.bfloat16)
    assert to_numpy(WithArray(memory), "q") is memory
    with pytest.raises(DTypeError, match=r"^v \(.*DLPack\) cannot be read as a NumPy array: "):
        to_numpy(DLPack(memory), "v")


def test_an_array_on_an_accelerator_is_sent_to_the_cuda_engine():
    for x in (DLPack(np.ones(3), device=(2, 1)), WithArray(np.ones(3), device=(10, 0))):
        with pytest.raises(
            DTypeError, match=r'^k is on DLPack device \(\d+, \d\), .*move it to the CPU.*engine="cuda"'
        ):
            to_numpy(x, "k")
    x = ArrayOnly(np.ones(3))
    x.__cuda_array_interface__ = {"version": 3}
    with pytest.raises(DTypeError, match=r'^k is on a CUDA device, .*engine="cuda"'):
        to_numpy(x, "k")


def test_pinned_memory_is_the_hosts():
    memory = np.ones(3)
    assert np.shares_memory(to_numpy(DLPack(memory, device=(3, 0)), "q"), memory)


def test_the_first_array_decides_the_kind():
    foreign, a = DLPack(np.ones(2)), np.ones(2)
    assert kind_of(foreign, a) == "other"
    assert kind_of(a, foreign) == "numpy"
    assert kind_of(None, foreign) == "other"
    assert kind_of([1.0], foreign) == "numpy"
    assert kind_of(ArrayOnly(a), foreign) == "numpy"
    assert kind_of() == "numpy"


def test_results_go_back_through_the_namespace_on_the_callers_device():
    a = np.ones(2)
    result, device = from_numpy(a, DLPack(np.zeros(3), namespace=Namespace))
    assert result.a is a and device == "host"
    with pytest.raises(
        DTypeError, match=r"DLPack cannot hold the result, bfloat16: unknown dtype bfloat16; ask another"
    ):
        from_numpy(a.astype(ml_dtypes.bfloat16), DLPack(a, namespace=Namespace))


def test_results_go_back_through_from_dlpack_or_stay_numpy(monkeypatch):
    a, like = np.ones(2), DLPack(np.zeros(3))
    assert from_numpy(a, like) is a

    library = type(sys)("some_library")
    library.from_dlpack = lambda a: ("from_dlpack", a)
    monkeypatch.setitem(sys.modules, "some_library", library)
    monkeypatch.setattr(DLPack, "__module__", "some_library.core")
    assert from_numpy(a, like) == ("from_dlpack", a)


def test_no_framework_is_imported():
    code = (
        "import sys, numpy as np\n"
        "from refattn.arrays import from_numpy, to_numpy\n"
        "from_numpy(to_numpy([1.0], 'q'), np.ones(1))\n"
        "print(sorted({'torch', 'jax', 'numba', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_a_framework_half_way_through_its_import_is_no_framework(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", type(sys)("torch"))
    monkeypatch.setitem(sys.modules, "jax", type(sys)("jax"))
    assert kind_of(DLPack(np.ones(1))) == "other"
