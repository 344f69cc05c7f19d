"""Plans with a memory, through the public function on a driver whose device is the simulator."""

import fake_driver
import infinity_former_problems as former
import numpy as np
import pytest
from fake_driver import Driver

import refattn as ra
from refattn import api
from refattn.bound import BoundSpace
from refattn.engines.cuda import memory
from refattn.errors import Unsupported
from refattn.profiles import FLOAT32

INFINI = {
    "linear": {"segment": 4},
    "delta, clamped": {"segment": 5, "update": "delta", "divisor": "clamp", "epsilon": 0.125},
    "delta, z once, added": {"segment": 3, "update": "delta", "z_update": "linear_only", "divisor": "add"},
}


@pytest.fixture
def driver(monkeypatch):
    made, form_of = Driver(size=1 << 21), memory.form_of
    fake_driver.install(monkeypatch, made)
    small = {"rows": 8, "keys": 8, "threads": 32, "lanes": 4}
    monkeypatch.setattr(memory, "form_of", lambda plan: form_of(plan)._replace(**small))
    return made


def within(spec, inputs):
    """Asserts that out is within the published bound of each element; the problem in float64 numbers of float32."""
    inputs = {n: a.astype(np.float32) if a.dtype == np.float64 else a for n, a in inputs.items()}
    found = ra.evaluate(spec, inputs, engine="cuda").out
    expected = api.build(spec, inputs, None, ("out",)).evaluate(BoundSpace(FLOAT32).real)["out"]
    assert found.dtype == np.float32
    assert (np.abs(found - expected.x) <= expected.e).all()


def infini(rng):
    shapes = {"q": (2, 4, 13, 3), "k": (2, 2, 13, 3), "v": (2, 2, 13, 5), "gate": (4,)}
    return {n: rng.standard_normal(shape) for n, shape in shapes.items()}


@pytest.mark.parametrize("name", INFINI)
def test_infini_attention(name, driver, rng):
    within(ra.InfiniAttention(**INFINI[name]), infini(rng))
    assert {role for role, _ in driver.forms} == {"forward", "recur"}
    assert not driver.live


@pytest.mark.parametrize("sticky", [False, True])
def test_infinity_former(sticky, driver, rng):
    spec = ra.InfinityFormer(**former.BASE, sticky=sticky)
    within(spec, former.arrays(spec, rng))


def test_gradients_are_refused(rng):
    out = {"out": np.ones((2, 4, 13, 5), np.float32)}
    inputs = {n: a.astype(np.float32) for n, a in infini(rng).items()}
    with pytest.raises(Unsupported, match="gradients of Score plans"):
        ra.vjp(ra.InfiniAttention(segment=4), inputs, out, engine="cuda")
