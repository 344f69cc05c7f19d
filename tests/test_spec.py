import json
import math

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import refattn as ra
from refattn import registry
from refattn.errors import SpecError
from refattn.spec import Array, Outputs, describe, dyadic

reals = st.floats(allow_nan=False, allow_infinity=False)
ends = st.none() | st.integers(0, 2**40)
slopes = st.sampled_from(["interleaved", "geometric", "learned"]) | st.lists(reals, max_size=4).map(tuple)
terms = st.builds(ra.ALiBi, slopes=slopes, direction=st.sampled_from(["symmetric", "half", "two_sided"])) | st.builds(
    ra.ALiBi, slopes=st.just("geometric"), slopes_right=st.lists(reals).map(tuple), direction=st.just("two_sided")
)
specs = terms | st.builds(
    ra.SDPA,
    causal=st.sampled_from([False, True, "top_left", "bottom_right"]),
    window=st.none() | st.tuples(ends, ends),
    scale=st.none() | reals,
    softcap=st.none() | st.floats(2.0**-1074, 1e300),
    bias=st.lists(terms, max_size=2).map(tuple),
    keep_probability=st.none() | st.floats(2.0**-1074, 1),
    kv=st.sampled_from([None, "int8"]),
    paged=st.booleans(),
)
specs |= st.builds(ra.SDPA, normalizer=st.just("sigmoid"), sigmoid_bias=st.just("keys") | reals)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(specs)
def test_json_gives_the_same_spec_back(spec):
    text = json.dumps(spec.to_json(), allow_nan=False)
    again = registry.from_json(json.loads(text))
    assert again == spec
    assert hash(again) == hash(spec)
    assert json.dumps(again.to_json()) == text


def test_the_json_of_a_spec_by_hand():
    spec = ra.SDPA(causal=True, window=(3, None), scale=0.5, bias=(ra.ALiBi(slopes=(0.1,)),))
    assert spec.to_json() == {
        "variant": "sdpa",
        "causal": True,
        "window": [3, None],
        "scale": "0x1.0000000000000p-1",
        "bias": [{"variant": "alibi", "slopes": ["0x1.999999999999ap-4"], "direction": "symmetric"}],
    }


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "an object with the field 'variant'; given: None"),
        ([], "an object with the field 'variant'"),
        ({}, "an object with the field 'variant'"),
        ({"variant": 3}, "unknown variant 3"),
        ({"variant": ["sdpa"]}, r"unknown variant \['sdpa'\]"),
        ({"variant": "flash"}, "unknown variant 'flash'; there are: alibi, .*sdpa"),
        ({"variant": "sdpa", "dropout": 1}, "unknown field 'dropout' of variant 'sdpa'; its fields are causal"),
        ({"variant": "sdpa", "bias": [{"variant": "alibi", "x": 1}]}, "unknown field 'x' of variant 'alibi'"),
        ({"variant": "sdpa", "bias": [{"variant": "sdpa"}]}, "bias takes Specs such as"),
        ({"variant": "sdpa", "scale": "half"}, "scale is a finite number"),
        ({"variant": "sdpa", "scale": "inf"}, "scale is a finite number"),
        ({"variant": "sdpa", "scale": "0x1p+99999"}, "0x1p.99999 is beyond the largest float64"),
        ({"variant": "sdpa", "window": [1]}, "window is .left, right."),
    ],
    ids=str,
)
def test_json_that_is_no_spec(data, message):
    with pytest.raises(SpecError, match=message):
        registry.from_json(data)


@pytest.mark.parametrize("name", ["scale", "softcap", "keep_probability"])
@pytest.mark.parametrize(
    "value",
    [0.5, np.float64(0.5), np.float32(0.5), np.float16(0.5), ml_dtypes.bfloat16(0.5)],
    ids=lambda x: type(x).__name__,
)
def test_a_real_of_any_number_type_is_the_double_it_is(name, value):
    held = getattr(ra.spec("sdpa", **{name: value}), name)
    assert type(held) is float
    assert held == 0.5


@pytest.mark.parametrize(
    "value",
    [
        *(True, np.True_, "0.5", None, 1j, np.ones(1), [0.5], np.longdouble("0.1")),
        *(math.nan, math.inf, -math.inf, np.float32(np.inf), 10**400, 2**53 + 1),
    ],
    ids=str,
)
def test_what_is_no_dyadic_number(value):
    with pytest.raises(SpecError, match="scale is a finite number that float64 holds; given"):
        dyadic("scale", value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        *(
            ({"causal": c}, "causal is False, True, 'top_left' or 'bottom_right'")
            for c in ("left", 1, 0, None, np.True_, [])
        ),
        ({"causal": np.array([1, 0])}, "causal is False"),
        *(({"window": w}, "window is .left, right., integers or None") for w in (3, [1, 2], (1,), (1, 2, 3), (1.0, 2))),
        ({"window": (True, 1)}, "window is .left, right."),
        ({"window": "ab"}, "window is .left, right."),
        *(({"window": w}, "neither may be negative") for w in ((-1, 0), (0, -1), (None, -5))),
        *(({"softcap": c}, "softcap is a positive number") for c in (0, -1.0)),
        *(({"keep_probability": p}, r"keep_probability lies in \(0, 1\]") for p in (0, -0.5, 1.5)),
        ({"keep_probability": math.nan}, "keep_probability is a finite number"),
        *(({"bias": b}, "bias takes Specs such as ALiBi") for b in (0.5, (0.5,), "alibi", [ra.ALiBi()], ra.SDPA())),
    ],
    ids=str,
)
def test_sdpa_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.spec("sdpa", **options)


def test_one_term_is_a_tuple_of_one():
    assert ra.SDPA(bias=ra.ALiBi()) == ra.SDPA(bias=(ra.ALiBi(),))


def test_specs_are_frozen_and_keyword_only():
    with pytest.raises(AttributeError):
        ra.SDPA().scale = 1.0
    with pytest.raises(TypeError):
        ra.SDPA(True)


def test_a_signature_as_text():
    arrays = {"q": Array("B Hq Lq D"), "mask": Array("Lq Lk", "bool", "choice", optional=True, broadcast=True)}
    assert describe(arrays) == "  q (B, Hq, Lq, D) real\n  mask (Lq, Lk) bool optional broadcastable"


def test_outputs_without_arrays():
    assert repr(Outputs({})) == "Outputs()"
    with pytest.raises(AttributeError, match="there are: none"):
        _ = Outputs({}).out


def test_a_dimension_may_be_the_product_of_two_sizes():
    array = Array("B 3 M*S", broadcast=True)
    assert array.names == ["B", "M", "S"]
    assert array.shape({"B": 2, "M": 5, "S": 4}) == (2, 3, 20)
    assert str(array) == "(B, 3, M*S) real broadcastable"
