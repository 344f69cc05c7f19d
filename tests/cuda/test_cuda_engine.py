"""The engine on a driver whose device is the simulator: what it gives, refuses and says is missing."""

import fake_driver
import numpy as np
import pytest
from fake_driver import Driver, Remote
from problems import PROBLEMS, arrays

import refattn as ra
from refattn.engines import cuda
from refattn.engines.cuda import arrays as devices
from refattn.engines.cuda import launch
from refattn.engines.cuda.kernels.form import tiled
from refattn.errors import DeviceError, DTypeError, EngineUnavailable, ShapeError, Unsupported

CAUSAL = ra.SDPA(causal="bottom_right")
WANT = ("out", "lse")


@pytest.fixture
def driver(monkeypatch):
    made = Driver()
    fake_driver.install(monkeypatch, made)
    return made


def given(rng, dtype=np.float32, lq=5, lk=7, d=4):
    shapes = {"q": (1, 2, lq, d), "k": (1, 1, lk, d), "v": (1, 1, lk, d)}
    return {n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}


@pytest.mark.parametrize("name", ["ragged ALiBi", "biases of all kinds"])
def test_a_problem_through_the_public_function(name, driver, rng):
    problem = PROBLEMS[name]
    inputs, _ = arrays(problem, rng, np.float32)
    found, expected = (ra.evaluate(problem.spec, inputs, want=WANT, engine=e) for e in ("cuda", "reference"))
    for n in WANT:
        assert found[n].dtype == np.float32
        np.testing.assert_allclose(found[n], expected[n], atol=2e-6)
    assert not driver.live
    assert driver.depth == 0


def test_sixteen_bits_stay_sixteen_bits(driver, rng):
    inputs = given(rng, np.float16)
    found, expected = (ra.evaluate(CAUSAL, inputs, want=WANT, engine=e) for e in ("cuda", "reference"))
    assert found.out.dtype == np.float16
    np.testing.assert_allclose(found.out.astype(float), expected.out.astype(float), atol=2e-3)
    assert driver.forms[0][1].storage == "float16"


def test_a_rotated_problem_in_16_bits_is_computed_in_float32(driver, rng):
    spec = ra.SDPA(causal="bottom_right", rotary=ra.RoPE(pairing="half"))
    inputs = given(rng, np.float16)
    found, expected = (ra.evaluate(spec, inputs, engine=e).out for e in ("cuda", "reference"))
    np.testing.assert_array_equal(found, expected)
    assert driver.forms[0][1].storage == "float32"


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_few_rows_with_many_keys_go_to_decode(dtype, driver, rng):
    """Two parts, the last of them short; one of the sequences sees no key of it."""
    shapes = {"q": (2, 4, 2, 8), "k": (2, 1, 150, 8), "v": (2, 1, 150, 8)}
    inputs = {n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}
    inputs |= {"kv_lengths": np.array([150, 40]), "sink": np.array([0.5, -np.inf, 3, -1], np.float32)}
    inputs["v"][0, 0, 149, 2] = np.nan
    found, expected = (ra.evaluate(CAUSAL, inputs, want=WANT, engine=e) for e in ("cuda", "reference"))
    assert [name for name, _ in driver.forms] == ["forward", "combine"]
    for n in WANT:
        np.testing.assert_allclose(found[n].astype(float), expected[n].astype(float), atol=2e-6 if n == "lse" else 1e-3)
    assert np.isnan(found.out[0, :, 1, 2]).all()
    assert not driver.live


def test_no_keys(driver):
    inputs = {n: np.ones((1, 1, 3 if n == "q" else 0, 2), np.float32) for n in "qkv"}
    found = ra.evaluate(ra.SDPA(), inputs, want=WANT, engine="cuda")
    assert (found.out == 0).all()
    assert np.isneginf(found.lse).all()


def test_arrays_of_a_device_are_read_and_given_in_place(driver, rng):
    inputs = given(rng)
    there = {n: Remote.of(driver, a, stream=7) for n, a in inputs.items()}
    found = ra.evaluate(CAUSAL, there, want=WANT, engine="cuda")
    expected = ra.evaluate(CAUSAL, inputs, want=WANT)
    for n in WANT:
        assert isinstance(found[n], Remote)
        np.testing.assert_allclose(found[n].numpy(), expected[n], atol=2e-6)
    assert driver.streams == [7]


def test_rows_of_a_device_that_lie_apart(driver, rng):
    inputs = given(rng)
    whole = Remote.of(driver, rng.standard_normal((1, 5, 2, 6)).astype(np.float32))
    q = whole.numpy()[..., :4].swapaxes(1, 2)
    inputs["q"] = np.ascontiguousarray(q)
    there = {n: Remote.of(driver, a) for n, a in inputs.items()}
    there["q"] = Remote(driver, q.shape, q.dtype, address=whole.address, strides=q.strides)
    found = ra.evaluate(CAUSAL, there, engine="cuda").out
    np.testing.assert_allclose(found.numpy(), ra.evaluate(CAUSAL, inputs).out, atol=2e-6)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int32])
def test_dlpack_tells_where_an_array_is(dtype):
    """Of NumPy, which stands for a library whose arrays are on a device."""
    own = np.arange(2 * 5 * 3 * 4).astype(dtype).reshape(2, 5, 3, 4).swapaxes(1, 2)[:, 1:]

    class Elsewhere:
        def __dlpack__(self, *, stream):
            assert stream == 1
            return own.__dlpack__()

        def __dlpack_device__(self):
            return 2, 3

    found = devices.take(Elsewhere(), "q")
    assert (found.shape, found.strides, found.dtype) == (own.shape, own.strides, own.dtype)
    assert (found.address, found.number, found.nbytes) == (own.ctypes.data, 3, own.nbytes)
    with pytest.raises(DTypeError, match="its numbers are read there alone"):
        np.asarray(found)


def test_blocks_of_keys_of_a_device(driver, rng):
    spec = ra.SDPA(causal="bottom_right", paged=True)
    blocks = {"q": (2, 2, 3, 4), "k": (3, 1, 4, 4), "v": (3, 1, 4, 4)}
    inputs = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in blocks.items()}
    others = {"block_table": np.array([[2, 0], [1, -9]]), "kv_lengths": np.array([7, 4])}
    there = {n: Remote.of(driver, a) for n, a in inputs.items()}
    found = ra.evaluate(spec, there | others, engine="cuda").out
    np.testing.assert_allclose(found.numpy(), ra.evaluate(spec, inputs | others).out, atol=2e-6)


def test_attention_takes_arrays_of_a_device(driver, rng):
    inputs = given(rng)
    q, k, v = (Remote.of(driver, a) for a in inputs.values())
    found = ra.attention(q, k, v, causal="bottom_right", engine="cuda")
    np.testing.assert_allclose(found.numpy(), ra.attention(**inputs, causal="bottom_right"), atol=2e-6)


def test_bad_arrays_of_a_device(driver, rng):
    inputs = given(rng)
    there = {n: Remote.of(driver, a) for n, a in inputs.items()}

    def refused(error, match, **other):
        with pytest.raises(error, match=match):
            ra.evaluate(CAUSAL, there | other, engine="cuda")

    v = there["v"]
    refused(ShapeError, "v is on the host", v=inputs["v"])
    refused(ShapeError, "q is on device 0 and v on device 1", v=Remote.of(driver, inputs["v"], number=1))
    refused(DTypeError, "v is float16 where the result is float32", v=Remote(driver, v.shape, np.float16))
    moved = Remote(driver, v.shape, v.dtype, address=v.address + 2)
    refused(ShapeError, "v is not aligned to its 4-byte numbers", v=moved)
    turned = Remote(driver, v.shape, v.dtype, address=v.address, strides=(112, 112, 4, 28))
    refused(ShapeError, "numbers of a row of v lie 28 bytes apart", v=turned)
    with pytest.raises(DTypeError, match="sink is on a device, where engine 'cuda' reads q, k and v alone"):
        ra.evaluate(CAUSAL, there | {"sink": Remote(driver, (2,), np.float32)}, engine="cuda")
    with pytest.raises(DTypeError, match='ask engine="cuda"'):
        ra.evaluate(CAUSAL, there)
    with pytest.raises(Unsupported, match="give them on the host"):
        ra.evaluate(ra.SDPA(rotary=ra.RoPE(pairing="half")), there, engine="cuda")


def test_what_the_engine_has_not(rng):
    inputs = given(rng)
    engine = {"engine": "cuda"}
    with pytest.raises(Unsupported, match="gives float32, bfloat16, float16 and not float64"):
        ra.evaluate(CAUSAL, given(rng, np.float64), **engine)
    with pytest.raises(Unsupported, match="no gradients of dense biases: ask engine='cpu'"):
        ra.vjp(CAUSAL, inputs | {"bias": np.ones((5, 7))}, {"out": np.ones((1, 2, 5, 4))}, **engine)
    with pytest.raises(Unsupported, match="no kernel for sigmoid weights"):
        ra.evaluate(ra.SDPA(normalizer="sigmoid", sigmoid_bias=0.0), inputs, **engine)
    with pytest.raises(Unsupported, match="of more than 128"):
        ra.evaluate(CAUSAL, given(rng, d=129), **engine)


def test_a_package_that_is_missing_is_named(monkeypatch, rng):
    monkeypatch.setattr(launch, "_found", lambda name: name != "numba_cuda")
    with pytest.raises(EngineUnavailable, match=r"needs numba-cuda, .* pip install 'refattn\[cuda"):
        ra.evaluate(CAUSAL, given(rng), engine="cuda")


def test_a_driver_that_is_missing_or_sees_no_device_is_told(monkeypatch, rng):
    def absent():
        raise RuntimeError("libcuda.so.1: cannot open\nmore")

    monkeypatch.setattr(launch, "_found", lambda name: True)
    monkeypatch.setattr(launch, "_driver", absent)
    with pytest.raises(EngineUnavailable, match=r"NVIDIA driver, which cannot be loaded \(libcuda.so.1: cannot open\)"):
        ra.evaluate(CAUSAL, given(rng), engine="cuda")
    monkeypatch.setattr(launch, "_driver", lambda: Driver(broken=fake_driver.NO_DEVICE))
    with pytest.raises(EngineUnavailable, match="cuInit gives CUDA_ERROR_NO_DEVICE: check that nvidia-smi"):
        ra.evaluate(CAUSAL, given(rng), engine="cuda")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 512}, "CUDA_ERROR_OUT_OF_MEMORY for .* bytes of memory on device 0; free memory"),
        ({"shared": 512}, "needs .* bytes of shared memory a block, and device 0 has 512"),
        ({"major": 7}, "compute capability 7, and the kernels need 8.0"),
    ],
)
def test_a_device_that_is_too_small(options, match, monkeypatch, rng):
    driver = Driver(**options)
    fake_driver.install(monkeypatch, driver)
    with pytest.raises(DeviceError, match=match):
        ra.evaluate(CAUSAL, given(rng), engine="cuda")
    assert not driver.live
    assert driver.depth == 0


def test_more_shared_memory_than_48_kb_is_asked_for(driver):
    form = tiled(depth=128, width=128, storage="float32", wide=True)
    kernel = launch.loaded("forward", form, 0)
    assert driver.granted == {0: 4 * kernel.words}
    assert 4 * kernel.words > 48 << 10


def test_the_engine_is_found_without_its_packages():
    assert cuda.name in ra.explain(CAUSAL, {"B": 1, "Hq": 1, "Hkv": 1, "Lq": 2, "Lk": 2, "D": 2, "Dv": 2})["engines"]
