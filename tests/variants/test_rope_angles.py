"""RoPE's angles: exact ones against flint's, float32 ones against float32 arithmetic, near and far."""

import flint
import numpy as np
import pytest
from checks import near, same

import refattn as ra
from refattn import registry
from refattn.dtypes import round_to
from refattn.variants._frequencies import float32_frequencies
from refattn.variants._place import place

MODULE = registry.info("rope").module
PAIRINGS = pytest.mark.parametrize("pairing", ["half", "interleaved"])


def turned(spec, x, positions):
    """Rows x (L, D) turned by the module, as queries at these positions."""
    q = np.asarray(x, float)[None, None]
    x = {"q": q, "k": q, "q_positions": np.asarray(positions)}
    return MODULE.rotate(MODULE.resolve(spec, {"D": q.shape[3]}), x, place(False, x))[0][0, 0]


def exactly(position, t, width, base=10000.0):
    """Cosine and sine of position · base^(−2t/width) with 200 bits, as balls."""
    with flint.ctx.workprec(200):
        angle = flint.arb(position) * (flint.arb(base).log() * flint.fmpq(-2 * t, width)).exp()
        return angle.cos(), angle.sin()


@pytest.mark.parametrize("position", [1, 77, 32768, 99991, 2**20, -(2**20) - 1])
@pytest.mark.parametrize("base", [10000.0, 500000.0])
def test_far_positions_keep_the_digits_that_double_precision_has(position, base):
    spec, width = ra.RoPE(pairing="half", base=base), 16
    found = turned(spec, [[1.0] * 8 + [0.0] * 8], [position])[0]
    expected = np.array([exactly(position, t, width, base) for t in range(8)], object).T.astype(float)
    error = np.abs(found.reshape(2, 8) - expected).max()
    assert error < 2.0**-52 * (1 + abs(position))
    lowered = MODULE.lower_rotate(MODULE.resolve(spec, {"D": 16}), *_queries([[1.0] * 8 + [0.0] * 8], [position]))
    assert np.abs(lowered[0].reshape(2, 8) - expected).max() < 2.0**-52 * (1 + abs(position))


def _queries(rows, positions):
    q = np.asarray(rows)[None, None]
    x = {"q": q, "k": q, "q_positions": np.asarray(positions)}
    return x, place(False, x)


@pytest.mark.parametrize("position", [32769, 2**20, 2**40 + 1])
def test_certified_turns_are_correctly_rounded_however_far(position):
    """Four heads, each a query of one channel at the position and a key of one at 0: lse is their cosine or sine."""
    q, k = np.zeros((1, 4, 1, 4)), np.eye(4).reshape(1, 4, 1, 4)
    q[0, :2, 0, 0] = q[0, 2:, 0, 1] = 1
    k = k[:, [0, 2, 1, 3]]
    x = {"q": q, "k": k, "v": k, "q_positions": np.array([position]), "k_positions": np.array([0])}
    spec = ra.SDPA(scale=1.0, rotary=ra.RoPE(pairing="half"))
    found = ra.evaluate(spec, x, engine="certified", want=("lse",)).lse.ravel()
    expected = [float(turn) for t in range(2) for turn in exactly(position, t, 4)]
    same(found, np.array(expected))


@pytest.mark.parametrize(("base", "width"), [(10000.0, 128), (10000.0, 6), (500000.0, 64), (1e6, 10), (2.0, 24)])
def test_float32_frequencies_are_three_correct_roundings(base, width):
    found = float32_frequencies(base, width)
    for t in range(width // 2):
        exponent = np.float32(2 * t) / np.float32(width)
        with flint.ctx.workprec(200):
            power = flint.arb(base) ** flint.arb(float(exponent))
        power = np.float32(round_to(np.float64(float(power)), np.float32))
        assert found[t] == np.float32(1) / power
    # A vendor's function may be off by an ulp in the power, its reciprocal then by two.
    vendor = np.float32(1) / np.float32(base) ** (np.arange(0, width, 2, dtype=np.float32) / np.float32(width))
    np.testing.assert_array_max_ulp(found, vendor, maxulp=2)


@PAIRINGS
@pytest.mark.parametrize("position", [3, 32769, 2**24 + 3])
def test_float32_angles_are_products_rounded_to_float32(pairing, position):
    width = 8
    angles = np.float32(position) * float32_frequencies(10000.0, width)
    assert angles.dtype == np.float32
    row = np.ones(8)
    if pairing == "half":
        row[4:] = 0
    else:
        row[1::2] = 0
    found = turned(ra.RoPE(pairing=pairing, angles="float32"), [row], [position])[0]
    found = found.reshape(2, 4) if pairing == "half" else found.reshape(4, 2).T
    near(found, np.array([np.cos(angles.astype(float)), np.sin(angles.astype(float))]))


def test_float32_angles_are_off_by_a_thousandth_at_32768():
    positions, rows = np.arange(32768, 33268), np.tile([1.0] * 64 + [0.0] * 64, (500, 1))
    exact, rounded = (turned(ra.RoPE(pairing="half", angles=a), rows, positions) for a in ("exact", "float32"))
    assert 0.5e-3 < np.abs(exact - rounded).max() < 4e-3
