"""Gradients of the engine, on a driver whose device is the simulator."""

import fake_driver
import numpy as np
import pytest
from fake_driver import Driver
from problems import PROBLEMS, Sizes, arrays
from simulating import SQUARE

import refattn as ra
from refattn.engines.cuda import adjoint
from refattn.errors import ShapeError, Unsupported

CAUSAL = ra.SDPA(causal="bottom_right")
ENGINE = {"engine": "cuda"}


@pytest.fixture
def driver(monkeypatch):
    made = Driver(size=1 << 21)
    fake_driver.install(monkeypatch, made)
    monkeypatch.setattr(adjoint, "squared", lambda form, name: form._replace(**SQUARE[form.storage]))
    return made


def given(rng, dtype=np.float32, lq=5, lk=7, d=4):
    shapes = {"q": (1, 2, lq, d), "k": (1, 1, lk, d), "v": (1, 1, lk, d)}
    return {n: rng.standard_normal(shape).astype(dtype) for n, shape in shapes.items()}


@pytest.mark.parametrize(
    "name", ["ragged ALiBi", "sink", "softcap", "positions, learned ALiBi symmetric", "T5", "T5, positions"]
)
def test_gradients_through_the_public_function(name, driver, rng):
    problem = PROBLEMS[name]._replace(sizes=Sizes(B=1, Hq=2, Hkv=1))
    inputs, duals = arrays(problem, rng, np.float32)
    found, expected = (ra.vjp(problem.spec, inputs, duals, engine=e) for e in ("cuda", "reference"))
    assert set(found) == set(expected)
    for n, gradient in found.items():
        assert gradient.dtype == np.float32
        np.testing.assert_allclose(gradient, expected[n], atol=2e-5)
    assert [role for role, _ in driver.forms] == ["forward", "rows", "keys"]
    assert not driver.live
    assert driver.depth == 0


def test_outputs_that_are_saved_spare_the_forward_pass(driver, rng):
    inputs, dout = given(rng), {"out": rng.standard_normal((1, 2, 5, 4)).astype(np.float32)}
    saved = dict(ra.evaluate(CAUSAL, inputs, want=("out", "lse")))
    found, expected = (ra.vjp(CAUSAL, inputs, dout, outputs=saved, engine=e) for e in ("cuda", "reference"))
    for n, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[n], atol=1e-5)
    assert [role for role, _ in driver.forms] == ["rows", "keys"]
    with pytest.raises(ShapeError, match="lse of an earlier evaluate"):
        ra.vjp(CAUSAL, inputs, dout, outputs=saved | {"lse": np.ones((1, 2, 6))}, **ENGINE)


def test_sixteen_bits_stay_on_tensor_cores_and_others_do_not(driver, rng):
    inputs = given(rng, np.float16)
    for dtype, storage in ((np.float16, "float16"), (np.float32, "float32")):
        dout = {"out": rng.standard_normal((1, 2, 5, 4)).astype(dtype)}
        found, expected = (ra.vjp(CAUSAL, inputs, dout, engine=e) for e in ("cuda", "reference"))
        for n, gradient in found.items():
            assert gradient.dtype == np.float16
            np.testing.assert_allclose(gradient.astype(float), expected[n].astype(float), atol=4e-3)
        assert driver.forms[-1][1].storage == storage


def test_rotations_are_carried_back_by_the_tape(driver, rng):
    spec, inputs = ra.SDPA(rotary=ra.RoPE(pairing="half")), given(rng)
    dout = {"out": rng.standard_normal((1, 2, 5, 4)).astype(np.float32)}
    found, expected = (ra.vjp(spec, inputs, dout, engine=e) for e in ("cuda", "reference"))
    for n, gradient in found.items():
        np.testing.assert_allclose(gradient, expected[n], atol=1e-5)


def test_what_is_not_finite_and_hidden_changes_nothing(driver, rng):
    bad = np.nan
    inputs = given(rng) | {"kv_lengths": np.array([6]), "q_lengths": np.array([3])}
    dout = {"out": rng.standard_normal((1, 2, 5, 4)).astype(np.float32)}
    expected = ra.vjp(CAUSAL, inputs, dout, **ENGINE)
    for name, last in (("q", 3), ("k", 6), ("v", 6)):
        inputs[name][:, :, last:] = bad
    dout["out"][:, :, 3:] = bad
    found = ra.vjp(CAUSAL, inputs, dout, **ENGINE)
    for n, gradient in found.items():
        np.testing.assert_array_equal(gradient, expected[n])
    inputs["v"][0, 0, 2] = bad
    with pytest.raises(Unsupported, match="finite numbers alone"):
        ra.vjp(CAUSAL, inputs, dout, **ENGINE)


def test_no_keys(driver):
    inputs = {n: np.ones((1, 1, 3 if n == "q" else 0, 2), np.float32) for n in "qkv"}
    found = ra.vjp(ra.SDPA(), inputs, {"out": np.ones((1, 1, 3, 2), np.float32)}, **ENGINE)
    assert not found.dq.any()
    assert found.dk.shape == (1, 1, 0, 2)


def test_gradients_that_the_engine_has_not(driver, rng):
    dout = {"out": np.ones((1, 2, 5, 4))}
    slopes = {"slopes": np.ones(2, np.float32)}
    spec = ra.SDPA(bias=ra.ALiBi(slopes="learned"), softcap=2.0, causal="bottom_right")
    with pytest.raises(Unsupported, match="no gradients of slopes and tables under a softcap"):
        ra.vjp(spec, given(rng) | slopes, dout, **ENGINE)
    ra.vjp(spec, given(rng) | slopes, dout, wrt=("q",), **ENGINE)
