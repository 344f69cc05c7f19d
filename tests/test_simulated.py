"""The published bounds hold for correct kernels of every make, and planted faults break them: no tolerance chosen."""

from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import simulated
from simulated import KERNELS, Kernel

import refattn as ra
from refattn import api
from refattn.bound import BoundSpace
from refattn.dtypes import round_to
from refattn.golden import build
from refattn.profiles import FLOAT64, PROFILE_OF, PROFILES

WIDE = ("float32", "bfloat16", "float16")
EIGHT_BITS = ("float8_e4m3fn", "float8_e5m2")


class Given(NamedTuple):
    """What the random problem has: amplitudes of q and v, and options."""

    amplitude: float = 1.0
    values: float = 1.0
    causal: bool = False
    window: tuple[int, int] | None = None
    mask: float = 1.0
    bias: float = 0.0
    softcap: float | None = None
    sink: bool = False


GIVEN = {
    "plain": Given(),
    "flat": Given(amplitude=2.0**-10),
    "peaked": Given(amplitude=8.0),
    "one key takes all": Given(amplitude=60.0),
    "large values": Given(values=200.0),
    "causal": Given(causal=True),
    "few keys seen": Given(mask=0.2),
    "window": Given(window=(9, 2)),
    "bias": Given(bias=3.0),
    "large bias": Given(bias=300.0),
    "bias alone": Given(amplitude=0.0, bias=100.0),
    "softcap": Given(amplitude=6.0, softcap=2.0),
    "sink": Given(sink=True),
    "all at once": Given(2.0, 1.0, True, (7, 0), 0.7, 1.0, 5.0, True),
}
SHAPES = {"small": (2, 2, 1, 7, 9, 4, 3), "square": (1, 2, 2, 33, 65, 16, 8), "long": (1, 1, 1, 5, 257, 8, 8)}


def problem(rng, given, shape, dtype) -> tuple[Any, ...]:
    B, Hq, Hkv, Lq, Lk, D, Dv = shape

    def draw(*dims, size=1.0, dtype=dtype):
        return round_to(rng.standard_normal(dims) * size, dtype)

    x = {"q": draw(B, Hq, Lq, D, size=given.amplitude), "k": draw(B, Hkv, Lk, D), "v": draw(B, Hkv, Lk, Dv)}
    x["v"] = round_to(x["v"].astype(np.float64) * given.values, dtype)
    distance = np.arange(Lk) - np.arange(Lq)[:, None] - (Lk - Lq)
    left, right = given.window or (Lk, Lk + Lq)
    live = (distance >= -left) & (distance <= (min(right, 0) if given.causal else right))
    live = np.broadcast_to(live, (B, Hq, Lq, Lk))
    if given.mask < 1:
        x["mask"] = rng.random((B, 1, Lq, Lk)) < given.mask
        live = live & x["mask"]
    if given.bias:
        x["bias"] = draw(Hq, 1, Lk, size=given.bias)
    if given.sink:
        x["sink"] = draw(Hq, dtype="float32")
    causal = "bottom_right" if given.causal else False
    spec = ra.SDPA(causal=causal, window=given.window, softcap=given.softcap)
    asked = api.build(spec, x, dtype, ("out",))
    weights = {"out": draw(B, Hq, Lq, Dv), "lse": draw(B, Hq, Lq, dtype="float32")}
    options = simulated.Options(asked.spec.scale, live, x.get("bias"), given.softcap, x.get("sink"))
    return asked, x, weights, options


def errors(kernels, asked, x, weights, options):
    """Error over bound of each output of each kernel; the float64 evaluation's own error is added, never subtracted."""
    dtype, wrt = asked.dtype.name, tuple(asked.real_inputs())
    limits = build.bounds(asked, weights, wrt, PROFILES[PROFILE_OF[dtype]])
    with np.errstate(all="ignore"):
        exact = asked.differentiate(BoundSpace(FLOAT64).real, weights, wrt)
    for label, kernel in kernels.items():
        found = simulated.run(kernel, x, options, weights, dtype)
        assert set(found) == set(limits)
        for name, got in found.items():
            ok = np.isfinite(exact[name].x)
            np.testing.assert_array_equal(got[~ok], exact[name].x[~ok])
            assert np.isfinite(limits[name]).all()
            error = np.abs(got[ok] - exact[name].x[ok])
            total = np.where(error == 0, 0, error + exact[name].e[ok])
            bound = limits[name][ok]
            yield label, name, np.max(np.where(total == 0, 0, total / np.maximum(bound, 1e-300)), initial=0.0)


# Normal numbers times 200 or 300 may overflow 8 bits, where nothing is promised.
FITTING = [name for name in GIVEN if name not in ("large values", "large bias")]


@pytest.mark.parametrize(
    ("given", "shape", "dtype"), [*product(GIVEN, SHAPES, WIDE), *product(FITTING, SHAPES, EIGHT_BITS)]
)
def test_correct_kernels_stay_within_the_hard_bound(rng, given, shape, dtype):
    for label, name, worst in errors(KERNELS, *problem(rng, GIVEN[given], SHAPES[shape], dtype)):
        assert worst <= 1, (label, name, worst)


# What each fault must break, in every profile. A bfloat16 accumulator shows where values have one sign and add up.
BROKEN = {
    "dropped key": {"lse", "dv"},
    "fp8 weights": {"dv"},
    "scale missing in dq": {"dq"},
    "bf16 accumulator": {"out"},
}


@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("fault", simulated.FAULTS)
def test_planted_faults_break_it_at_two_thousand_keys(rng, fault, dtype):
    asked, x, weights, options = problem(rng, Given(), (1, 1, 1, 8, 2049, 16, 16), dtype)
    if fault == "bf16 accumulator":
        positive = round_to(np.abs(x["v"].astype(np.float64)) + 0.5, dtype)
        x = x | {"v": positive}
        asked = api.build(ra.SDPA(), x, dtype, ("out",))
    kernels = {"right": Kernel(16), "wrong": Kernel(16, fault=fault)}
    worst = {(label, name): ratio for label, name, ratio in errors(kernels, asked, x, weights, options)}
    assert max(ratio for (label, _), ratio in worst.items() if label == "right") <= 1
    assert all(worst["wrong", name] > 1 for name in BROKEN[fault]), worst
