"""Comparison rules, one by one."""

import dataclasses

import numpy as np
import pytest

from refattn.dtypes import format_of, round_to
from refattn.errors import ShapeError
from refattn.golden import suite
from refattn.golden.build import build
from refattn.golden.load import load
from refattn.oracle.compare import compare


@pytest.fixture(scope="session")
def eight_bits(tmp_path_factory):
    """The committed suite's cases in 8 bits, built afresh."""
    made = {c.name: build(c) for c in suite.cases() if c.name.startswith("float8/")}
    target = tmp_path_factory.mktemp("eight_bits")
    suite.publish(target, {name: (b.manifest, b.tensors) for name, b in made.items()})
    return target


@pytest.fixture
def golden(folder):
    return load("t/empty", folder)


def exact(golden):
    return {name: a.copy() for name, a in golden.expected.items()}


def verdict(golden, results, name):
    return next(c for c in compare(golden, results) if c.name == name)


def test_the_exact_values_have_error_zero(golden):
    assert all(c.worst_ulp == c.worst_ratio == 0 and c.verdict == "pass" for c in compare(golden, exact(golden)))


def test_an_error_is_counted_in_ulp_and_in_bounds_where_it_is(golden):
    results = exact(golden)
    ulp = np.spacing(np.float32(abs(results["out"][0, 2, 5, 7])))
    results["out"][0, 2, 5, 7] += 3 * np.float64(ulp)
    c = verdict(golden, results, "out")
    assert c.index == (0, 2, 5, 7)
    assert c.worst_ulp == pytest.approx(3, rel=1e-6)
    assert c.worst_ratio == pytest.approx(3 * float(ulp) / golden.bound["out"][c.index], rel=1e-6)


def test_just_within_the_bound_passes_and_just_beyond_fails(golden):
    at = (0, 1, 4, 3)
    for factor, expected in ((0.99, "pass"), (1.01, "fail")):
        results = exact(golden)
        results["dq"][at] += factor * golden.bound["dq"][at]
        assert verdict(golden, results, "dq").verdict == expected


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_fails_where_a_number_is_expected(golden, value):
    results = exact(golden)
    results["out"][0, 0, 0, 0] = value
    c = verdict(golden, results, "out")
    assert c.verdict == "fail" and c.worst_ratio == np.inf and "expected" in c.why


@pytest.mark.parametrize("value", [0.0, -1e30, np.nan, np.inf])
def test_an_empty_row_has_lse_minus_infinity_and_nothing_else(golden, value):
    assert np.isneginf(golden.expected["lse"][0, 0, 3])
    results = exact(golden)
    results["lse"][0, 0, 3] = value
    assert verdict(golden, results, "lse").verdict == "fail"


def test_where_nan_is_expected_any_number_that_is_not_finite_passes(folder):
    golden = load("t/live_nan", folder)
    results = exact(golden)
    spoiled = np.isnan(results["out"])
    assert spoiled.any() and not spoiled.all()
    results["out"][spoiled] = np.inf
    assert verdict(golden, results, "out").verdict == "pass"
    results["out"][spoiled] = 0.0
    assert verdict(golden, results, "out").verdict == "fail"


def test_the_sign_of_zero_is_ignored(golden):
    results = exact(golden)
    results["out"] = np.where(results["out"] == 0, -0.0, results["out"])
    assert verdict(golden, results, "out").worst_ratio == 0


def test_a_value_beyond_the_largest_may_be_infinite_with_its_sign(golden):
    value, bound = np.full((1, 1, 1, 1), 3.5e38), np.full((1, 1, 1, 1), 1e31)
    huge = dataclasses.replace(golden, expected={"out": value}, bound={"out": bound})
    assert compare(huge, {"out": np.array([[[[np.inf]]]])})[0].verdict == "pass"
    assert compare(huge, {"out": np.array([[[[-np.inf]]]])})[0].verdict == "fail"


def test_long_cases_take_all_rows_or_the_published_ones_and_name_the_row(folder):
    golden = load("t/long", folder)
    results = exact(golden)
    results["out"][0, 1, 2, 3] += 1
    published = verdict(golden, results, "out")
    whole = np.zeros((1, 2, 2049, 8))
    whole[:, :, list(golden.rows.q)] = results["out"]
    assert published == verdict(golden, {"out": whole}, "out")
    assert published.index == (0, 1, 1024, 3)


def test_a_missing_output_is_not_compared(golden):
    assert [c.name for c in compare(golden, {"lse": golden.expected["lse"]})] == ["lse"]


def test_a_wrong_shape_is_an_error_that_names_both_and_the_layout(golden):
    with pytest.raises(ShapeError, match=r"out has shape \(1, 24, 4, 16\); expected \(1, 4, 24, 16\): the layout is"):
        compare(golden, {"out": golden.expected["out"].swapaxes(1, 2)})
    with pytest.raises(ShapeError, match=r"lse has shape \(3,\); expected \(1, 4, 24\)$"):
        compare(golden, {"lse": np.zeros(3)})


# One key that all queries see: dv is the sum of dout, which is the largest number everywhere but in one column.
OVERFLOWS = {"float8_e4m3fn": np.nan, "float8_e5m2": np.inf}


@pytest.mark.parametrize("dtype", OVERFLOWS)
@pytest.mark.parametrize("rule", ["nonsaturate", "saturate"])
def test_what_lies_beyond_the_largest_number_follows_the_rule_of_the_case(dtype, rule, eight_bits):
    short = "e4m3" if "e4m3" in dtype else "e5m2"
    golden = load(f"float8/overflow_{short}_{rule}", eight_bits)
    largest = format_of(dtype).max_finite
    beyond = np.abs(golden.expected["dv"]) > 2 * largest
    assert beyond.any() and not beyond.all()
    results = exact(golden)
    results["dv"] = round_to(results["dv"], dtype, rule).astype(np.float64)
    assert all(c.verdict == "pass" for c in compare(golden, results))
    other = np.where(beyond, largest if rule == "nonsaturate" else OVERFLOWS[dtype], results["dv"])
    assert verdict(golden, results | {"dv": other}, "dv").verdict == "fail"
    flipped = np.where(beyond, -results["dv"], results["dv"])
    same_after_all = dtype == "float8_e4m3fn" and rule == "nonsaturate"  # a NaN has no sign
    assert verdict(golden, results | {"dv": flipped}, "dv").verdict == ("pass" if same_after_all else "fail")


def test_an_overflow_where_nothing_may_overflow_fails(eight_bits):
    golden = load("float8/plain_e4m3", eight_bits)
    for value in (448.0, np.nan, np.inf):
        results = exact(golden)
        results["out"][0, 0, 0, 0] = value
        assert verdict(golden, results, "out").verdict == "fail"
