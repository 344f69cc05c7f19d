import ml_dtypes
import numpy as np
import pytest

from refattn.arrays import from_numpy, kind_of, to_numpy
from refattn.errors import DTypeError

jax = pytest.importorskip("jax", reason="jax is not installed; `make peers` installs it")
jnp = jax.numpy
CPU = jax.devices("cpu")[0]

DTYPES = ["?", "i1", "i4", "u1", "f2", "f4", ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2]


def on_cpu(a):
    return jax.device_put(a, CPU)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("view", [lambda a: a, lambda a: a.T, lambda a: a[:, ::-2], lambda a: a[:0]])
def test_there_and_back(dtype, view):
    a = view(np.array([[0, 1, 1.5], [2, 3, 0.25]]).astype(dtype))
    x = from_numpy(a, on_cpu(np.ones(1, np.float32)))
    assert isinstance(x, jax.Array) and x.dtype == dtype and x.devices() == {CPU}
    back = to_numpy(x, "q")
    assert type(back) is np.ndarray and back.dtype == dtype
    assert back.tolist() == a.tolist()


def test_memory_is_shared_on_the_way_in():
    x = on_cpu(np.ones((64, 64), np.float32))
    assert to_numpy(x, "q").ctypes.data == x.unsafe_buffer_pointer()


def test_mixed_kinds_follow_the_first():
    x, a = on_cpu(np.ones(2, np.float32)), np.ones(2)
    assert kind_of(x, a) == "jax" and kind_of(a, x) == "numpy"


def test_float64_is_never_narrowed_in_silence():
    like = on_cpu(np.ones(1, np.float32))
    with jax.enable_x64(False), pytest.raises(DTypeError, match=r'float64.*float32; ask dtype="float32".*enable_x64'):
        from_numpy(np.ones(2), like)
    with jax.enable_x64(True):
        result = from_numpy(np.full(2, 1 / 3), like)
        assert result.dtype == np.float64 and to_numpy(result, "q").tolist() == [1 / 3, 1 / 3]


def test_int64_becomes_int32_only_where_it_fits():
    like = on_cpu(np.ones(1, np.float32))
    with jax.enable_x64(False):
        assert from_numpy(np.array([0, -7]), like).tolist() == [0, -7]
        with pytest.raises(DTypeError, match="the result is int64, which JAX would turn into int32"):
            from_numpy(np.array([2**40]), like)


@pytest.mark.parametrize("transform", [jax.jit, jax.vmap, lambda f: jax.grad(lambda x: f(x).sum())])
def test_a_traced_array_is_refused(transform):
    with pytest.raises(DTypeError, match=r"^q is traced .*pure_callback"):
        transform(lambda x: to_numpy(x, "q"))(on_cpu(np.ones(2, np.float32)))


def test_pure_callback_is_the_way_out_of_a_trace():
    def double(x):
        return from_numpy(2 * to_numpy(x, "q"), x)

    x = on_cpu(np.ones(3, np.float32))
    result = jax.jit(lambda x: jax.pure_callback(double, jax.ShapeDtypeStruct(x.shape, x.dtype), x))(x)
    assert result.tolist() == [2.0] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: jnp.ones(2, jnp.complex64), r"^q is .*ArrayImpl of dtype complex64; allowed are bool, int8"),
        (lambda: jax.random.key(0), r"^q .*cannot be read as a NumPy array"),
    ],
)
def test_refused_arrays(make, message):
    with jax.default_device(CPU), pytest.raises(DTypeError, match=message):
        to_numpy(make(), "q")
