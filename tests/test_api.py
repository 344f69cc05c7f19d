import math
import subprocess
import sys

import flint
import ml_dtypes
import numpy as np
import pytest
from checks import near, qkv, same

import refattn as ra
from refattn import api, registry
from refattn.dtypes import round_to
from refattn.engines.certified.balls import BALLS
from refattn.engines.certified.rounding import EXACT, ROUNDED
from refattn.errors import DTypeError, EngineUnavailable, LayoutError, ShapeError, SpecError, Unsupported

SIZES = (2, 4, 2, 3, 5, 4, 2)
DTYPES = {
    name: np.dtype(getattr(ml_dtypes, name, name))
    for name in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")
}


@pytest.fixture
def a(rng):
    return qkv(rng, SIZES)


@pytest.fixture
def x(a):
    return {name: a[name] for name in "qkv"}


def cast(arrays, dtype):
    return {name: round_to(value, dtype) for name, value in arrays.items()}


# attention


def test_attention_is_evaluate_of_sdpa(x):
    same(ra.attention(**x, causal="top_left"), ra.evaluate(ra.SDPA(causal="top_left"), x).out)


def test_the_inputs_are_not_modified_and_may_be_read_only_and_strided(x):
    held = {name: np.repeat(value, 2, -1)[..., ::2] for name, value in x.items()}
    for value in held.values():
        value.flags.writeable = False
    same(ra.attention(**held), ra.attention(**x))


def test_bshd_swaps_heads_and_length_of_inputs_and_output(x):
    turned = {name: value.swapaxes(1, 2) for name, value in x.items()}
    out = ra.attention(**turned, layout="bshd", causal="bottom_right")
    same(out.swapaxes(1, 2), ra.attention(**x, causal="bottom_right"))
    assert out.flags.c_contiguous


def test_a_term_alone_or_among_biases_is_a_bias(x, rng):
    dense = rng.standard_normal((3, 5))
    one = ra.attention(**x, bias=ra.ALiBi())
    same(ra.attention(**x, bias=(ra.ALiBi(),)), one)
    same(ra.attention(**x, bias=[ra.ALiBi(), np.zeros(())]), one)
    near(ra.attention(**x, bias=(dense, ra.ALiBi())), ra.attention(**x, bias=[ra.ALiBi(), dense]))


def test_plain_lists_and_numbers_are_arrays(x):
    same(ra.attention(**x, bias=[[0.0] * 5] * 3, mask=True), ra.attention(**x))


# Kinds and dtypes


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_out_is_of_the_dtype_of_q_rounded_once(x, dtype):
    small = cast(x, dtype)
    wide = {name: value.astype(np.float64) for name, value in small.items()}
    result = ra.evaluate(ra.SDPA(), small, want=("out", "lse"))
    exact = ra.evaluate(ra.SDPA(), wide, want=("out", "lse"))
    same(result.out, round_to(exact.out, dtype))
    same(result.lse, exact.lse.astype(np.float64 if dtype == np.float64 else np.float32))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_another_dtype_may_be_asked(x, dtype):
    small = cast(x, np.float32)
    wide = {name: value.astype(np.float64) for name, value in small.items()}
    same(ra.attention(**small, dtype=dtype), round_to(ra.attention(**wide), dtype))
    assert ra.vjp(ra.SDPA(), small, {"out": np.ones((2, 4, 3, 2))}, dtype=dtype).dq.dtype == dtype
    assert ra.attention(**small, dtype=dtype.name).dtype == dtype


def test_inputs_may_have_dtypes_of_their_own(x):
    mixed = x | {"k": x["k"].astype(np.float32)}
    same(ra.attention(**mixed), ra.attention(**(x | {"k": mixed["k"].astype(np.float64)})))


# evaluate and vjp


def test_outputs_are_a_mapping_with_attributes_and_a_telling_repr(x):
    result = ra.evaluate(ra.SDPA(), x, want=("lse", "out"))
    assert list(result) == ["lse", "out"]
    assert len(result) == 2
    assert result["out"] is result.out
    assert repr(result) == "Outputs(lse: (2, 4, 3) float64, out: (2, 4, 3, 2) float64)"
    assert result.status == {}
    with pytest.raises(AttributeError, match=r"no output 'state'; there are: lse, out \(ask for it in want=\)"):
        _ = result.state
    with pytest.raises(TypeError):
        result["out"] = 0


def test_an_input_that_is_none_is_not_given(x):
    same(ra.evaluate(ra.SDPA(), x | {"mask": None, "bias": None}).out, ra.attention(**x))


def test_wrt_chooses_gradients_and_no_cotangent_is_zero(a, x):
    whole = ra.vjp(ra.SDPA(), x, {"out": a["dout"], "lse": a["dlse"]})
    assert list(whole) == ["dq", "dk", "dv"]
    part = ra.vjp(ra.SDPA(), x, {"out": a["dout"], "lse": a["dlse"]}, wrt=("v",))
    assert list(part) == ["dv"]
    same(part.dv, whole.dv)
    by_parts = [ra.vjp(ra.SDPA(), x, {name: a[f"d{name}"]}) for name in ("out", "lse")]
    for name in whole:
        near(whole[name], by_parts[0][name] + by_parts[1][name])


def test_saved_outputs_do_not_change_the_gradients(a, x):
    saved = ra.evaluate(ra.SDPA(), x, want=("out", "lse"))
    same(ra.vjp(ra.SDPA(), x, {"out": a["dout"]}, outputs=saved).dq, ra.vjp(ra.SDPA(), x, {"out": a["dout"]}).dq)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"spec": "sdpa"}, SpecError, r"spec is a Spec such as refattn.SDPA\(\).*given: str"),
        ({"inputs": [1]}, SpecError, "inputs is a mapping by name.*given: list"),
        ({"inputs": {}}, ShapeError, "(?s)missing array 'q'.*given: nothing.*expected:"),
        ({"want": "out"}, SpecError, "want is a sequence of names, such as .*given: 'out'"),
        ({"want": ("state",)}, SpecError, "want names 'state'; sdpa offers out, lse"),
        ({"engine": "gpu"}, SpecError, "unknown engine 'gpu'; there are: reference, certified, cpu"),
        ({"dtype": "int8"}, DTypeError, "dtype is 'int8'; allowed are float64"),
    ],
    ids=lambda p: str(p)[:30],
)
def test_evaluate_refuses(x, change, error, message):
    given = {"spec": ra.SDPA(), "inputs": x} | change
    with pytest.raises(error, match=message):
        ra.evaluate(given.pop("spec"), given.pop("inputs"), **given)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"cotangents": {}}, "cotangents are empty"),
        (
            {"cotangents": {"dout": np.ones((2, 4, 3, 2))}},
            r"cotangent of 'dout'.*expected one of .*'out': \(2, 4, 3, 2\)",
        ),
        ({"cotangents": {"out": np.ones((2, 4, 3, 9))}}, r"shape \(2, 4, 3, 9\); expected .*'out': \(2, 4, 3, 2\)"),
        ({"cotangents": {"out": np.ones((2, 4, 3, 2), int)}}, "cotangent of 'out' is int64; expected a real dtype"),
        ({"cotangents": np.ones(3)}, "cotangents is a mapping by name.*given: ndarray"),
        ({"wrt": "q"}, "wrt is a sequence of names.*given: 'q'"),
        ({"wrt": ("q", "mask")}, r"wrt names \['mask'\], but the real inputs given are \['q', 'k', 'v'\]"),
    ],
    ids=lambda p: str(p)[:30],
)
def test_vjp_refuses(a, x, change, message):
    given = {"cotangents": {"out": a["dout"]}} | change
    with pytest.raises(ra.errors.RefattnError, match=message):
        ra.vjp(ra.SDPA(), x, given.pop("cotangents"), **given)


# The certified engine


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_certified_is_the_correct_rounding_of_what_balls_enclose(a, x, dtype):
    """Both ends of a ball of 300 bits round to the same number, and that is the one."""
    small, spec = cast(x, dtype), ra.SDPA(causal="bottom_right", bias=(ra.ALiBi(),))
    names = ("out", "lse")
    found = dict(ra.evaluate(spec, small, engine="certified", want=names))
    found |= ra.vjp(spec, small, {"out": a["dout"]}, engine="certified")
    problem = api.build(spec, small, dtype, names)
    flint.ctx.prec, before = 300, flint.ctx.prec
    try:
        balls = problem.differentiate(BALLS.real, {"out": a["dout"]}, ("q", "k", "v"))
    finally:
        flint.ctx.prec = before
    for name, enclosed in balls.items():
        t, d, r = enclosed.enclosure()
        wide = np.float64 if dtype == np.float64 else np.float32
        ends = [odd_sum(t, d + sign * r) for sign in (-1, 1)] if dtype != np.float64 else [t + (d - r), t + (d + r)]
        low, high = (round_to(end, wide if name == "lse" else dtype) for end in ends)
        same(low, high)
        same(found[name], low)


def odd_sum(t, d):
    """t + d rounded to odd: t where d is 0 or t is odd, else the neighbour on the side of d."""
    towards = np.nextafter(t, np.where(d > 0, np.inf, -np.inf))
    return np.where((d == 0) | (t.view(np.int64) % 2 == 1), t, towards)


def test_certified_names_a_status_per_element(a, x):
    result = ra.evaluate(ra.SDPA(causal="top_left"), x, engine="certified", want=("out", "lse"))
    assert result.status.keys() == {"out", "lse"}
    same(result.status["out"][:, :, 0], np.full((2, 4, 2), EXACT, np.uint8))
    same(result.out[:, :, 0], np.repeat(x["v"][:, :, 0], 2, axis=1))
    same(result.status["out"][:, :, 1:], np.full((2, 4, 2, 2), ROUNDED, np.uint8))
    g = ra.vjp(ra.SDPA(), x, {"out": a["dout"]}, wrt=("k",), engine="certified")
    assert g.status.keys() == {"dk"}


def test_the_reference_lies_within_a_few_ulp_of_the_certified(x):
    spec = ra.SDPA(softcap=3.0, bias=(ra.ALiBi(),))
    near(ra.evaluate(spec, x).out, ra.evaluate(spec, x, engine="certified").out, 1e-15)


def test_certified_answers_where_float64_overflows_on_the_way():
    """Scores of ±2e400/√2: the first key takes all; equal ones share; equal values near the largest double survive."""
    q, k = np.full((1, 1, 1, 2), 1e200), np.array([1e200, 1.0, -1e200]).reshape(1, 1, 3, 1) * np.ones(2)
    v = np.array([3.0, 5.0, 7.0]).reshape(1, 1, 3, 1)
    result = ra.evaluate(ra.SDPA(), {"q": q, "k": k, "v": v}, engine="certified", want=("out", "lse"))
    same(result.out, np.full((1, 1, 1, 1), 3.0))
    same(result.lse, np.full((1, 1, 1), np.inf))
    result = ra.evaluate(ra.SDPA(), {"q": q, "k": np.full_like(k, 1e200), "v": v}, engine="certified")
    same(result.out, np.full((1, 1, 1, 1), 5.0))
    result = ra.evaluate(ra.SDPA(), {"q": q, "k": k * 0, "v": np.full_like(v, 1.7e308)}, engine="certified")
    same(result.out, np.full((1, 1, 1, 1), 1.7e308))


@pytest.mark.parametrize("slot", ["q", "k", "v"])
def test_certified_propagates_what_is_no_number_as_the_reference_does(a, x, slot):
    x[slot][0, 1, 1, 0] = np.nan
    spec = ra.SDPA(causal="bottom_right")
    plain, proved = (ra.vjp(spec, x, {"out": a["dout"]}, engine=engine) for engine in ("reference", "certified"))
    for name in plain:
        near(plain[name], proved[name], 1e-14)
    assert np.isnan(proved.dq).any()
    assert not np.isnan(proved.dq).all()


# explain, variants, spec


def test_explain_tells_engines_operations_and_memory():
    sizes = {"B": 2, "Hq": 8, "Hkv": 4, "Lq": 16, "Lk": 32, "D": 8, "Dv": 4}
    told = ra.explain(ra.SDPA(causal="bottom_right", bias=(ra.ALiBi(),)), sizes, "bfloat16")
    assert told["engines"].keys() == set(registry.ENGINES)
    assert told["engines"]["reference"] is None
    assert told["engines"]["certified"] is None
    assert told["operations"] == 2 * 2 * 8 * 16 * 32 * (8 + 4)
    assert told["score_matrix_bytes"] == 8 * 2 * 8 * 16 * 32
    assert told["input_bytes"] == 2 * 2 * (8 * 16 * 8 + 4 * 32 * 8 + 4 * 32 * 4)
    assert told["spec"].scale == math.ldexp(1.4142135623730951, -2)
    assert told["spec"].bias[0].slopes[0] == 0.5
    assert told["signature"]["q"] == "(B, Hq, Lq, D) real"
    assert "Slope" in str(told["plan"])


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"B": 1}, "sizes lacks D, Dv, Hkv, Hq, Lk, Lq; the signature is"),
        (3, "sizes is a mapping by name"),
        ({"B": 1, "Hq": 1, "Hkv": 1, "Lq": -1, "Lk": 1, "D": 1, "Dv": 1}, "sizes are integers from 0 on; given: Lq=-1"),
        ({"B": 1, "Hq": 1, "Hkv": 1, "Lq": 1.5, "Lk": 1, "D": 1, "Dv": 1}, "integers from 0 on; given: Lq=1.5"),
    ],
    ids=["missing", "number", "negative", "fraction"],
)
def test_explain_refuses(sizes, message):
    with pytest.raises(ra.errors.RefattnError, match=message):
        ra.explain(ra.SDPA(), sizes)


def test_explain_asks_for_arrays_that_have_a_direction():
    spec = ra.Memorizing(segment=2, memory=2, top=2, normalise=True, epsilon=0.0)
    told = ra.explain(spec, {"B": 1, "Hq": 2, "Hkv": 1, "L": 4, "D": 2, "Dv": 2})
    assert told["engines"]["reference"] is None


def test_an_engine_that_does_not_take_a_problem_says_why(x, monkeypatch):
    monkeypatch.setattr(registry.engine("certified"), "refuses", lambda problem: "too hard, for once")
    with pytest.raises(Unsupported, match="engine 'certified' does not take this problem: too hard, for once"):
        ra.attention(**x, engine="certified")
    sizes = dict.fromkeys(("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv"), 1)
    assert ra.explain(ra.SDPA(), sizes)["engines"]["certified"] == "too hard, for once"


def test_an_engine_without_its_extra_names_the_extra(x, monkeypatch):
    for name in [m for m in sys.modules if m.startswith("refattn.engines.certified")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "flint", None)
    with pytest.raises(EngineUnavailable, match=r"needs flint.*pip install 'refattn\[golden\]'"):
        ra.attention(**x, engine="certified")


@pytest.mark.parametrize("layout", ["bdhs", 3, None], ids=str)
def test_an_unknown_layout(x, layout):
    with pytest.raises(LayoutError, match="layout is one of bhsd, bshd, thd; given"):
        ra.attention(**x, layout=layout)


def test_rotary_takes_a_rotary_term_only(x):
    with pytest.raises(SpecError, match="rotary takes a Spec such as RoPE"):
        ra.attention(**x, rotary=ra.ALiBi())


@pytest.mark.parametrize(
    ("option", "arrays"),
    [
        ({"rotary": ra.RoPE(pairing="half", angles="table")}, "rope_cos, rope_sin"),
        ({"bias": (ra.ALiBi(), ra.T5())}, "t5_table"),
    ],
)
def test_terms_with_arrays_of_their_own_are_for_evaluate(x, option, arrays):
    with pytest.raises(SpecError, match=rf"attention has no argument for {arrays}: evaluate\(SDPA"):
        ra.attention(**x, **option)


# Import


def test_importing_refattn_imports_no_compiler_no_framework_and_no_variant():
    code = (
        "import sys, refattn\n"
        "heavy = {'numba', 'llvmlite', 'flint', 'torch', 'jax', 'jsonschema', 'scipy', 'safetensors', 'rich'}\n"
        "print(sorted(heavy & set(sys.modules)), [m for m in sys.modules if m.startswith('refattn.variants.')],"
        " [m for m in sys.modules if m.startswith(('refattn.engines.', 'refattn.golden', 'refattn.oracle'))])"
    )
    found = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split("\n")[0] == "[] [] []"


def test_names_are_found_when_asked_for():
    assert ra.ALiBi is ra.alibi is registry.spec_class("alibi")
    assert ra.SDPA().variant == "sdpa"
    assert ra.__version__.count(".") == 2
    with pytest.raises(AttributeError, match="refattn has no 'Flash'"):
        _ = ra.Flash


# Outputs that are integers, and variants without a plan


CHOICE = {"q": np.eye(3)[None, None], "k": np.eye(3)[None, None], "v": np.ones((1, 1, 3, 2))}
CHOICE["sample"] = np.array([[1], [1], [2]])


@pytest.mark.parametrize("engine", ["reference", "certified"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_an_integer_output_is_int64_whatever_the_dtype(dtype, engine):
    """Only queries 1 and 2 meet their own key: M = 1 − 1/3; they tie, the lower first."""
    x = {name: a.astype(DTYPES[dtype]) for name, a in CHOICE.items() if name != "sample"}
    found = ra.evaluate(ra.Informer(queries=2), x | {"sample": CHOICE["sample"]}, want=("indices",), engine=engine)
    same(found.indices, np.array([[[1, 2]]]))
    assert set(found.status) == ({"indices"} if engine == "certified" else set())


def test_an_integer_output_has_no_cotangent():
    with pytest.raises(ShapeError, match=r"cotangent of 'indices' has shape .* expected one of {'out': .* 'margin': "):
        ra.vjp(ra.Informer(), CHOICE, {"indices": np.ones((1, 1, 3))})


def test_a_variant_without_a_plan_says_why():
    problem = api.build(ra.Informer(), CHOICE, "float64", ("out",))
    with pytest.raises(Unsupported, match="informer has no plan: a plan has no rows chosen by rank"):
        _ = problem.score
    with pytest.raises(Unsupported, match="engine 'cpu' does not take this problem: informer has no plan: a plan"):
        ra.evaluate(ra.Informer(), CHOICE, engine="cpu")
