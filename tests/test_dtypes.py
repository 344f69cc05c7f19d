import math
import sys
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from refattn.dtypes import (
    FORMATS,
    format_of,
    nearest,
    odd,
    odd_fraction,
    root_of_two,
    round_to,
    round_up_bfloat16,
    significand_bits,
    sqrt_reciprocal,
    ulp,
)
from refattn.errors import DTypeError, SpecError

NARROW = [name for name in FORMATS if name != "float64"]
EIGHT_BITS = ["float8_e4m3fn", "float8_e5m2"]
SHORT = ["bfloat16", "float16", *EIGHT_BITS]
LARGEST = sys.float_info.max
TINIEST = math.ulp(0.0)


def same(a, b):
    return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))


def patterns(name):
    """All finite values that are not negative, ascending, by bit pattern: the pattern's last bit is the value's."""
    dtype = FORMATS[name].numpy
    bits = np.arange(2 ** (8 * dtype.itemsize - 1), dtype=f"u{dtype.itemsize}")
    with np.errstate(invalid="ignore"):  # among the patterns are signalling NaNs
        values = bits.view(dtype).astype(np.float64)
    return values[np.isfinite(values)]


@st.composite
def rationals(draw):
    """Rationals of every size, half of them a hair away from a breakpoint of some format."""
    e = draw(st.integers(-1120, 1040) | st.integers(-160, 140) | st.integers(-20, 17))
    m = draw(st.integers(-(2**54), 2**54) | st.integers(-(2**26), 2**26) | st.integers(-64, 64))
    hair = draw(st.sampled_from([0, 1, -1])) * Fraction(1, draw(st.integers(3, 10**6)))
    return (m + hair * Fraction(2) ** draw(st.integers(-300, 0))) * Fraction(2) ** (e - m.bit_length())


doubles = st.floats(allow_nan=False, allow_infinity=False)


@pytest.mark.parametrize("name", FORMATS)
def test_the_table_agrees_with_finfo(name):
    f = FORMATS[name]
    info = np.finfo(f.numpy) if name in ("float16", "float32", "float64") else ml_dtypes.finfo(f.numpy)
    assert f.name == name
    assert (f.precision, f.emin) == (info.nmant + 1, info.minexp)
    assert f.max_finite == float(info.max)
    assert 2.0**f.quantum == float(info.smallest_subnormal)
    if name != "float64":  # ml_dtypes agrees on what lies beyond
        assert same(f.beyond, float(np.array(np.inf).astype(f.numpy)))


@pytest.mark.parametrize(
    "given_as", ["bfloat16", ml_dtypes.bfloat16, np.dtype(ml_dtypes.bfloat16), np.zeros(1, ml_dtypes.bfloat16).dtype]
)
def test_a_format_is_found_by_name_type_and_dtype(given_as):
    assert format_of(given_as) is FORMATS["bfloat16"]


def test_byte_order_and_aliases_do_not_matter():
    assert format_of(">f4") is format_of(np.float32) is format_of("single") is FORMATS["float32"]
    assert format_of(float) is FORMATS["float64"]


@pytest.mark.parametrize(
    "refused", [np.longdouble, complex, int, bool, "int8", "float7", None, object(), ml_dtypes.float8_e4m3, "V4"]
)
def test_other_types_are_refused_with_the_allowed_ones(refused):
    if refused is np.longdouble and np.dtype(refused) == np.float64:
        pytest.skip("long double is float64 here")
    with pytest.raises(DTypeError, match="float64, float32, bfloat16, float16, float8_e4m3fn, float8_e5m2"):
        format_of(refused)


@pytest.mark.parametrize("name", SHORT)
def test_round_to_at_every_value_and_every_breakpoint(name):
    values = patterns(name)
    a, b = values[:-1], values[1:]
    tie = (a + b) / 2
    even = np.where(np.arange(len(a)) % 2 == 0, a, b)
    for sign in (1, -1):
        for x, expected in ((values, values), (tie, even), (np.nextafter(tie, 0), a), (np.nextafter(tie, np.inf), b)):
            got = round_to(sign * x, name)
            assert got.dtype == FORMATS[name].numpy
            np.testing.assert_array_equal(got.astype(np.float64), sign * expected)
            np.testing.assert_array_equal(np.signbit(got), sign < 0)


@pytest.mark.parametrize("name", ["float16", "float32"])
def test_round_to_agrees_with_numpy_where_numpy_rounds_once(name):
    rng = np.random.default_rng(1)
    bits = rng.integers(0, 2**64, 20_000, dtype=np.uint64).view(np.float64)
    scaled = np.ldexp(rng.uniform(-1, 1, 100_000), rng.integers(-160, 140, 100_000))
    single = rng.integers(0, 2**32, 100_000, dtype=np.uint32).view(np.float32)
    with np.errstate(over="ignore", invalid="ignore"):
        upper = np.nextafter(single, np.float32(np.inf)).astype(np.float64)
        single = single.astype(np.float64)
        ties = single + (upper - single) / 2
        x = np.concatenate([bits, scaled, single, ties, np.nextafter(ties, 0), np.nextafter(ties, np.inf)])
        expected = x.astype(name)
    got = round_to(x, name)
    np.testing.assert_array_equal(got, expected)
    live = ~np.isnan(x)
    np.testing.assert_array_equal(np.signbit(got[live]), np.signbit(expected[live]))


@pytest.mark.parametrize(
    ("x", "name", "nonsaturate", "saturate"),
    [
        (1 + 2**-8 + 2**-40, "bfloat16", 1.0078125, 1.0078125),  # through float32 it would be 1
        (65519.99, "float16", 65504, 65504),
        (65520, "float16", math.inf, 65504),
        (-65520, "float16", -math.inf, -65504),
        (464, "float8_e4m3fn", 448, 448),  # halfway to 480, which is not there: the even one is 448
        (math.nextafter(464, 465), "float8_e4m3fn", math.nan, 448),
        (-465, "float8_e4m3fn", math.nan, -448),
        (math.nextafter(61440, 0), "float8_e5m2", 57344, 57344),
        (61440, "float8_e5m2", math.inf, 57344),
        (LARGEST, "float32", math.inf, FORMATS["float32"].max_finite),
        (LARGEST, "float64", LARGEST, LARGEST),
        (-math.inf, "float64", -math.inf, -LARGEST),
        (math.inf, "float8_e4m3fn", math.nan, 448),
        (-math.inf, "bfloat16", -math.inf, -FORMATS["bfloat16"].max_finite),
        (math.nan, "float8_e4m3fn", math.nan, math.nan),
        (TINIEST, "float64", TINIEST, TINIEST),
        (2**-150, "float32", 0.0, 0.0),
        (math.nextafter(2**-150, 1), "float32", 2**-149, 2**-149),
        (-TINIEST, "float8_e5m2", -0.0, -0.0),
        (-0.0, "bfloat16", -0.0, -0.0),
    ],
)
def test_edges(x, name, nonsaturate, saturate):
    for overflow, expected in (("nonsaturate", nonsaturate), ("saturate", saturate)):
        assert same(float(round_to(float(x), name, overflow)), expected)
        if math.isfinite(x) and not same(x, -0.0):  # a rational has neither infinities nor a zero with a sign
            assert same(nearest(Fraction(x), name, overflow), expected)


@pytest.mark.parametrize("name", FORMATS)
def test_every_nan_becomes_the_same_bytes(name):
    nans = np.array([0x7FF8 << 48, 0xFFF8 << 48, 0x7FF0_0000_0000_0001, 0xFFFF << 48], np.uint64).view(np.float64)
    got = round_to(nans, name)
    assert np.isnan(got).all()
    assert len({x.tobytes() for x in got}) == 1
    assert not np.signbit(got).any()


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (4, 3)])
def test_shapes_are_kept_and_the_argument_is_not_written_to(shape):
    x = np.full(shape, 1.2)[..., ::-1] if shape else np.array(1.2)
    x.flags.writeable = False
    for y in (round_to(x, "bfloat16"), ulp(x, "float16"), round_up_bfloat16(x), significand_bits(x.astype(int), 8)):
        assert isinstance(y, np.ndarray)
        assert y.shape == shape


@settings(max_examples=300, deadline=None)
@given(x=doubles, name=st.sampled_from(list(FORMATS)), overflow=st.sampled_from(["nonsaturate", "saturate"]))
def test_round_to_agrees_with_integer_arithmetic(x, name, overflow):
    expected = nearest(Fraction(x), name, overflow) if x else x
    assert same(float(round_to(x, name, overflow)), expected)


@settings(max_examples=500, deadline=None)
@given(q=rationals())
def test_nearest_to_float64_agrees_with_python(q):
    try:
        expected = float(q)
    except OverflowError:
        expected = math.inf if q > 0 else -math.inf
    assert nearest(q, "float64") == expected


@settings(max_examples=300, deadline=None)
@given(q=rationals(), name=st.sampled_from(EIGHT_BITS))
def test_nearest_is_the_nearest_of_all_values(q, name):
    values = [Fraction(v) for v in patterns(name)]
    values.append(2 * values[-1] - values[-2])  # the first value that is not there
    best = min(abs(v - abs(q)) for v in values)
    at = max((i for i, v in enumerate(values) if abs(v - abs(q)) == best), key=lambda i: i % 2 == 0)
    expected = FORMATS[name].beyond if at == len(values) - 1 else float(values[at])
    assert same(nearest(q, name), math.copysign(expected, -1 if q < 0 else 1))


@settings(max_examples=1000, deadline=None)
@given(q=rationals())
def test_one_rounding_of_a_number_rounded_to_odd_is_the_only_one(q):
    x = odd_fraction(q)
    for name in NARROW:
        for overflow in ("nonsaturate", "saturate"):
            assert same(float(round_to(x, name, overflow)), nearest(q, name, overflow))


@pytest.mark.parametrize("name", EIGHT_BITS)
def test_odd_survives_every_breakpoint_of_the_8_bit_formats(name):
    values = [Fraction(v) for v in patterns(name)]
    ties = [(a + b) / 2 for a, b in zip(values, [*values[1:], 2 * values[-1] - values[-2]], strict=True)]
    for point in (*values, *ties):
        for hair in (0, Fraction(1, 10**30), Fraction(-1, 10**30), Fraction(1, 10**400), Fraction(-1, 10**400)):
            for q in (point + hair, -point - hair):
                assert same(float(round_to(odd_fraction(q), name)), nearest(q, name))


def test_rounding_to_nearest_first_would_not_survive():
    q = 1 + Fraction(1, 2**8) + Fraction(1, 2**80)
    assert nearest(q, "bfloat16") == 1.0078125 == round_to(odd_fraction(q), "bfloat16")
    assert round_to(float(q), "bfloat16") == 1


@settings(max_examples=500, deadline=None)
@given(q=rationals())
def test_odd_fraction_is_the_value_or_the_odd_neighbour(q):
    x = odd_fraction(q)
    if Fraction(x) == q:
        assert same(x, abs(x) if q >= 0 else -abs(x))
        return
    assert np.float64(x).view(np.uint64) & 1
    assert math.copysign(1, x) == (1 if q > 0 else -1)
    below, above = math.nextafter(x, -math.inf), math.nextafter(x, math.inf)
    assert below == -math.inf or Fraction(below) < q
    assert above == math.inf or q < Fraction(above)


@settings(max_examples=500, deadline=None)
@given(
    man=st.integers(-(2**60), 2**60) | st.integers(-(2**300), 2**300),
    exp=st.integers(-1400, 1100) | st.integers(-1100, -1060),
)
def test_odd_agrees_with_odd_fraction(man, exp):
    assert same(odd(man, exp), odd_fraction(man * Fraction(2) ** exp))


@pytest.mark.parametrize(
    ("man", "exp", "expected"),
    [
        (0, 0, 0.0),
        (0, -(10**9), 0.0),
        (1, -(10**9), TINIEST),
        (-1, -1075, -TINIEST),
        (3, -1075, TINIEST),
        (5, -1075, 3 * TINIEST),
        (2, -1075, TINIEST),
        (1, 10**9, LARGEST),
        (1, 1023, 2.0**1023),
        (-1, 1024, -LARGEST),
        (2**1024 - 1, 0, LARGEST),
        (2**53 - 1, 971, LARGEST),
        (2**53 + 1, 0, 2.0**53 + 2),
        (2**54 - 1, 0, 2.0**54 - 2),
    ],
)
def test_odd_by_hand(man, exp, expected):
    assert same(odd(man, exp), expected)


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_ulp_is_numpys_spacing(name):
    rng = np.random.default_rng(2)
    f = FORMATS[name]
    x = np.ldexp(rng.uniform(-1, 1, 2000), rng.integers(f.quantum - 2, 14, 2000))
    x = np.concatenate([x, [0, -0.0, 1, -2, 2.0**f.emin, -(2.0 ** (f.emin + 1))]]).astype(name)
    np.testing.assert_array_equal(ulp(x.astype(np.float64), name), np.spacing(np.abs(x)).astype(np.float64))
    # NumPy looks beyond the largest number; here its own binade counts.
    assert ulp(f.max_finite, name) == f.max_finite - float(
        np.nextafter(np.array(f.max_finite, name), np.array(0, name))
    )


@pytest.mark.parametrize("name", SHORT)
def test_ulp_is_the_distance_to_the_next_value(name):
    values = patterns(name)
    np.testing.assert_array_equal(ulp(values[:-1], name), np.diff(values))
    between = (values[:-1] + values[1:]) / 2
    np.testing.assert_array_equal(ulp(-between, name), np.diff(values))
    last = values[-1] - values[-2]
    np.testing.assert_array_equal(
        ulp(np.array([values[-1], LARGEST, np.inf, np.nan]), name), [last, last, np.nan, np.nan]
    )


@settings(max_examples=300, deadline=None)
@given(x=st.floats(min_value=0, allow_infinity=True) | st.floats(1e-42, 1e-36))
def test_round_up_bfloat16_is_the_least_value_not_below(x):
    y = round_up_bfloat16(x)
    assert y.dtype == ml_dtypes.bfloat16
    y = float(y)
    assert y >= x
    below = float(np.nextafter(np.array(y, ml_dtypes.bfloat16), np.array(-1, ml_dtypes.bfloat16)))
    assert (y == 0 == x) or below < x or x == math.inf


def test_round_up_bfloat16_at_the_ends():
    largest = FORMATS["bfloat16"].max_finite
    x = np.array([0, TINIEST, largest, math.nextafter(largest, math.inf), LARGEST, np.inf])
    np.testing.assert_array_equal(
        round_up_bfloat16(x).astype(np.float64), [0, 2.0**-133, largest, np.inf, np.inf, np.inf]
    )
    assert np.isnan(round_up_bfloat16(np.nan))
    with pytest.raises(SpecError, match=r"least given is -0\.5"):
        round_up_bfloat16(np.array([1, np.nan, -0.5]))


@pytest.mark.parametrize(("name", "bits"), [("bfloat16", 8), ("float16", 11), ("float8_e4m3fn", 4), ("float8_e5m2", 3)])
def test_recipe_integers_become_exact_in_their_format(name, bits):
    k = np.arange(-1530, 1531)
    short = significand_bits(k, bits)
    assert short.dtype == np.int64
    np.testing.assert_array_equal(short / 256, round_to(k / 256, name).astype(np.float64))


@settings(max_examples=300, deadline=None)
@given(k=st.integers(1 - 2**53, 2**53 - 1), bits=st.integers(1, 60))
def test_significand_bits_rounds_to_nearest_even(k, bits):
    unit = 2 ** max(k.bit_length() - bits, 0)
    assert significand_bits(np.array([k]), bits)[0] == round(Fraction(k, unit)) * unit


def test_significand_bits_refuses_what_it_cannot_hold():
    with pytest.raises(DTypeError, match="float64"):
        significand_bits(np.array([1.5]), 8)
    for k, bits in ((2**53, 8), (-(2**62), 8), (1, 0)):
        with pytest.raises(SpecError, match=r"2\^53"):
            significand_bits(np.array([k]), bits)


@settings(max_examples=200, deadline=None)
@given(p=st.integers(-5000, 5000), r=st.integers(1, 200), precision=st.integers(1, 64))
def test_root_of_two_lies_within_half_a_unit(p, r, precision):
    root = root_of_two(Fraction(p, r), precision)
    assert root > 0
    unit = Fraction(2) ** (p // r - precision + 1)  # 2^⌊p/r⌋ ≤ 2^(p/r)
    m = root / unit
    assert m.denominator == 1
    assert 2 ** (precision - 1) <= m <= 2**precision
    if p % r == 0:
        assert root == Fraction(2) ** (p // r)
    else:
        assert (root - unit / 2) ** r < Fraction(2) ** p < (root + unit / 2) ** r


def test_root_of_two_by_hand():
    assert root_of_two(Fraction(-8)) == Fraction(1, 256)
    assert root_of_two(Fraction(1, 2), 4) == Fraction(11, 8)  # 1.4142 lies between 1.3125 and 1.4375
    assert root_of_two(Fraction(-1, 2)) == Fraction(11863283, 2**24)
    assert root_of_two(Fraction(99, 100), 3) == 2  # carries into the next power
    with pytest.raises(SpecError, match="given 0"):
        root_of_two(Fraction(1), 0)


def is_sqrt_reciprocal(x, d):
    below, above = ((Fraction(x) + Fraction(math.nextafter(x, to))) / 2 for to in (0, math.inf))
    return below**2 * d < 1 < above**2 * d


@settings(deadline=None)
@given(d=st.integers(1, 2**300))
def test_sqrt_reciprocal_of_large_numbers(d):
    assert is_sqrt_reciprocal(sqrt_reciprocal(d), d)


def test_sqrt_reciprocal_of_head_sizes():
    assert all(is_sqrt_reciprocal(sqrt_reciprocal(d), d) for d in range(1, 2049))
    assert sqrt_reciprocal(64) == 0.125
    assert sqrt_reciprocal(32) == float.fromhex("0x1.6a09e667f3bcdp-3")
    with pytest.raises(SpecError, match="given 0"):
        sqrt_reciprocal(0)


@pytest.mark.parametrize("call", [lambda x: round_to(x, "float16"), round_up_bfloat16, lambda x: ulp(x, "float16")])
@pytest.mark.parametrize("x", [np.ones(2, np.float32), np.arange(3), 1 + 2j])
def test_only_float64_is_rounded(call, x):
    with pytest.raises(DTypeError, match="expected float64"):
        call(x)


def test_an_unknown_overflow_is_refused_even_where_nothing_overflows():
    for call in (lambda: round_to(1.0, "float16", "wrap"), lambda: nearest(Fraction(1), "float16", "wrap")):
        with pytest.raises(SpecError, match="'nonsaturate' or 'saturate'"):
            call()
