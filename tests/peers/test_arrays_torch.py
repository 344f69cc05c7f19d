import ml_dtypes
import numpy as np
import pytest

from refattn.arrays import from_numpy, kind_of, to_numpy
from refattn.errors import DTypeError

torch = pytest.importorskip("torch", reason="torch is not installed; `make peers` installs it")

DTYPES = {
    "bool": "?",
    "int8": "i1",
    "int64": "i8",
    "uint8": "u1",
    "float16": "f2",
    "float32": "f4",
    "float64": "f8",
    "bfloat16": ml_dtypes.bfloat16,
    "float8_e4m3fn": ml_dtypes.float8_e4m3fn,
    "float8_e5m2": ml_dtypes.float8_e5m2,
}


def values(dtype):
    return torch.tensor([[0, 1, 1.5], [2, 3, 0.25]]).to(getattr(torch, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [lambda t: t, lambda t: t.T, lambda t: t[:, ::2], lambda t: t[0, 1], lambda t: t[:0]])
def test_there_and_back(dtype, view):
    t = view(values(dtype))
    a = to_numpy(t, "q")
    assert a.dtype == DTYPES[dtype] and a.shape == tuple(t.shape)
    assert a.astype(np.float64).tolist() == t.to(torch.float64).tolist()
    back = from_numpy(a, t)
    assert isinstance(back, torch.Tensor) and back.dtype == t.dtype and back.shape == t.shape
    assert back.to(torch.float64).tolist() == t.to(torch.float64).tolist()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8_e5m2"])
def test_memory_is_shared_both_ways(dtype):
    t = values(dtype)
    a = to_numpy(t.T, "q")
    assert a.ctypes.data == t.data_ptr() == from_numpy(a, t).data_ptr()


def test_every_bit_pattern_of_bfloat16_survives():
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    a = to_numpy(bits.view(torch.bfloat16), "q")
    assert np.array_equal(a.view(np.int16), bits.numpy())
    assert torch.equal(from_numpy(a, bits).view(torch.int16), bits)


def test_a_tensor_that_requires_a_gradient_is_detached_and_left_alone():
    t = torch.nn.Parameter(torch.ones(2, 3))
    assert to_numpy((t * 2).bfloat16(), "q").tolist() == [[2.0] * 3] * 2
    assert to_numpy(t, "q").shape == (2, 3)
    assert t.requires_grad and not from_numpy(np.ones(2), t).requires_grad


def test_a_lazily_negated_tensor_is_resolved():
    t = torch.tensor([1 + 2j, 3 - 4j]).conj().imag
    assert t.is_neg() and to_numpy(t, "q").tolist() == [-2.0, 4.0]


def test_read_only_and_reversed_results_are_copied_without_a_warning():
    a = np.arange(3.0)
    a.flags.writeable = False
    assert from_numpy(a, torch.ones(1)).tolist() == [0.0, 1.0, 2.0]
    assert from_numpy(np.arange(3.0)[::-1], torch.ones(1)).tolist() == [2.0, 1.0, 0.0]


def test_mixed_kinds_follow_the_first():
    t, a = torch.ones(2), np.ones(2)
    assert kind_of(t, a) == "torch" and kind_of(a, t) == "numpy"
    assert kind_of(torch.nn.Parameter(t)) == "torch"


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, dtype=torch.complex64), r"^q is torch.Tensor of dtype complex64; allowed are bool, int8"),
        (torch.ones(2, dtype=torch.uint8).view(torch.float8_e4m3fnuz), r"^q is torch.Tensor of dtype float8_e4m3fnuz;"),
        (torch.ones(2).to_sparse(), r"^q is a torch tensor of layout torch.sparse_coo; .*to_dense"),
        (torch.ones(2, device="meta"), r'^q is on meta, .*move it to the CPU or ask engine="cuda"'),
    ],
)
def test_refused_tensors(x, message):
    with pytest.raises(DTypeError, match=message):
        to_numpy(x, "q")


def test_a_tensor_inside_vmap_has_no_values_to_read():
    with pytest.raises(DTypeError, match=r"^q \(torch.Tensor\) cannot be read as a NumPy array"):
        torch.vmap(lambda t: to_numpy(t, "q"))(torch.ones(2, 2))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cuda_tensor_is_refused_and_results_go_to_its_device(dtype):
    t = values(dtype).cuda().requires_grad_()
    with pytest.raises(DTypeError, match=r'^q is on cuda:0, .*engine="cuda"'):
        to_numpy(t, "q")
    back = from_numpy(to_numpy(t.cpu(), "q"), t)
    assert back.device == t.device and torch.equal(back, t)
