"""The exact-slice tier against balls: radii that hold the truth, decisions that agree, and proofs broken on purpose."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import flint
import numpy as np
import pytest
from flint import arb
from problems import PROBLEMS, arrays
from sliced import dyadic

import refattn as ra
from refattn import api
from refattn.engines import certified
from refattn.engines.certified import exact_plan as exact_plan_module
from refattn.engines.certified import fixed as fixed_module
from refattn.engines.certified import slices
from refattn.engines.certified.balls import BALLS
from refattn.engines.certified.fixed import fixed
from refattn.engines.certified.rounding import ENCLOSED, round_enclosed
from refattn.errors import RefattnError
from refattn.golden import load, suite
from refattn.golden.build import build

FORWARD_ONLY = {
    # Gradients of tables are left to the next tier.
    *(n for n in PROBLEMS if n.startswith("T5") or ("learned" in n and "symmetric" not in n)),
    "biases of all kinds",
}
REFUSED = {n for n in PROBLEMS if n.startswith(("Sandwich", "interpolated"))} | {"T5, ragged", "softcap", "everything"}


def of_few_bits(given):
    return {n: np.rint(a * 64) / 64 if a.dtype == np.float64 else a for n, a in given.items()}


def named(name, rng):
    inputs, weights = (of_few_bits(given) for given in arrays(PROBLEMS[name], rng))
    problem = api.build(PROBLEMS[name].spec, inputs, np.float64, ("out",))
    return problem, {n: w for n, w in weights.items() if n in problem.outputs}


def agree(problem, weights, wrt):
    """Every radius holds the value that 600 bits give; every decision is theirs. How many elements are undecided."""
    found = slices.enclose(problem, weights, wrt).enclosures
    with flint.ctx.workprec(600):
        exact = problem.differentiate(BALLS.real, weights, wrt)
        assert found.keys() == exact.keys()
        undecided = 0
        for name, (t, d, r) in found.items():
            assert t.shape == exact[name].shape
            np.testing.assert_array_equal(np.where(np.isfinite(t), t + d, t), t)
            for ball, head, rest, radius in zip(exact[name]._balls.flat, t.flat, d.flat, r.flat, strict=True):
                if not np.isfinite(head):
                    assert float(ball) == head == -np.inf
                    continue
                gap = abs(ball - arb(float(head)) - arb(float(rest)))
                assert gap <= arb(float(radius)) or (radius == 0 and gap.contains(0) and gap < 1e-150), (name, gap)
            mine, theirs = round_enclosed(found[name], True), round_enclosed(exact[name], True)
            decided = mine.status != ENCLOSED
            both = decided & (theirs.status != ENCLOSED)
            np.testing.assert_array_equal(mine.odd[both], theirs.odd[both])
            np.testing.assert_array_equal(mine.nearest[both], theirs.nearest[both])
            undecided += (~decided).sum()
    return undecided


@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - FORWARD_ONLY - REFUSED))
def test_radii_hold_what_balls_say(name):
    problem, weights = named(name, np.random.default_rng(3))
    if "lse" not in problem.outputs:
        assert slices.enclose(problem, weights, tuple(problem.real_inputs())) is None
        return
    agree(problem, weights, tuple(problem.real_inputs()))


@pytest.mark.parametrize("name", sorted(FORWARD_ONLY - REFUSED))
def test_forward_alone(name):
    problem, weights = named(name, np.random.default_rng(3))
    assert slices.enclose(problem, weights, tuple(problem.real_inputs())) is None
    agree(problem, {}, ())


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_not_exact_is_refused(name):
    """A softcap; tables of cosines; slopes that the lowering rounds, where the text divides exactly."""
    problem, _ = named(name, np.random.default_rng(3))
    assert slices.enclose(problem, {}, ()) is None


def built(spec, rng, sizes=(1, 4, 2, 19, 37, 8, 5), change=None, **extras):
    b, hq, hkv, lq, lk, d, dv = sizes
    x = {"q": dyadic(rng, b, hq, lq, d), "k": dyadic(rng, b, hkv, lk, d), "v": dyadic(rng, b, hkv, lk, dv)} | extras
    if change is not None:
        change(x)
    problem = api.build(spec, x, np.float64, ("out",))
    return problem, {"out": dyadic(rng, b, hq, lq, dv), "lse": dyadic(rng, b, hq, lq)}


def scaled(name, factor):
    def change(x):
        x[name] *= factor

    return change


def cancelling(x):
    """Keys in equal pairs whose values are opposite but for 2^-8."""
    x["k"][:, :, 1::2] = x["k"][:, :, 0:-1:2]
    x["v"][:, :, 1::2] = -x["v"][:, :, 0:-1:2] + 2.0**-8


def dominant(x):
    """One key far above the others, whose weights are below 2^-129."""
    x["q"][..., 0] = 8.0
    x["k"][..., 0] = 0.0
    x["k"][:, :, 5, 0] = 64.0


def last_key_alone(x):
    x["mask"][:, :, 4] = False
    x["mask"][:, :, 5] = np.arange(x["mask"].shape[3]) == 7


FAMILIES = {
    "odd lengths": (ra.SDPA(), {}, None),
    "huge scores": (ra.SDPA(scale=4.0), {}, scaled("q", 64.0)),
    "tiny scores": (ra.SDPA(), {}, scaled("q", 2.0**-20)),
    "cancelling values": (ra.SDPA(), {}, cancelling),
    "dominant key": (ra.SDPA(scale=1.0), {}, dominant),
    "large values": (ra.SDPA(causal="top_left"), {}, scaled("v", 2.0**40)),
    "small values": (ra.SDPA(causal="top_left"), {}, scaled("v", 2.0**-90)),
    "empty and single rows": (ra.SDPA(), {"mask": np.ones((1, 4, 19, 37), bool)}, last_key_alone),
    "single rows kept": (
        ra.SDPA(keep_probability=0.75),
        {"mask": np.ones((1, 4, 19, 37), bool), "keep": np.arange(37)[None] % 3 > 0},
        last_key_alone,
    ),
    "ALiBi and window": (ra.SDPA(causal="bottom_right", window=(9, None), bias=ra.ALiBi()), {}, None),
    "finite mask": (ra.SDPA(), {"bias": np.where(np.arange(37) < 30, 0.0, -(2.0**100))}, None),
    "masked by infinity": (ra.SDPA(), {"bias": np.where(np.arange(19)[:, None] < 3, -np.inf, np.arange(37.0))}, None),
    **{
        f"biases that cancel from 2^{n}": (
            ra.SDPA(bias=ra.ALiBi(slopes=(2.0**n, 1.0, 0.5, 0.25))),
            {"bias": np.eye(4)[0][:, None, None] * 2.0**n * np.abs(np.arange(18.0, 37.0)[:, None] - np.arange(37.0))},
            None,
        )
        for n in (40, 80)
    },
    "sink above": (ra.SDPA(), {"sink": np.array([0.0, 40.0, -40.0, 300.0])}, None),
    "sink and empty rows": (
        ra.SDPA(),
        {"sink": np.array([0.5, 1.0, -3.0, 7.0]), "mask": np.ones((1, 4, 19, 37), bool)},
        last_key_alone,
    ),
}


@pytest.mark.parametrize("name", FAMILIES)
def test_families(rng, name):
    spec, extras, change = FAMILIES[name]
    problem, weights = built(spec, rng, change=change, **{n: a.copy() for n, a in extras.items()})
    agree(problem, weights, tuple(problem.real_inputs()))


def test_nearly_everything_of_a_plain_problem_is_decided(rng):
    problem, weights = built(ra.SDPA(causal="bottom_right", bias=ra.ALiBi()), rng)
    assert agree(problem, weights, ("q", "k", "v")) == 0


def test_a_row_with_one_key_is_decided(rng):
    """out = v and dq = 0 as identities, which no ball of a quotient shows."""
    problem, weights = built(ra.SDPA(causal="top_left"), rng)
    found = slices.enclose(problem, {"out": weights["out"]}, ("q", "k", "v")).enclosures
    np.testing.assert_array_equal(found["out"].t[:, :, 0], np.repeat(problem.inputs["v"][:, :, 0], 2, 1))
    for name in ("out", "dq"):
        assert not found[name].r[:, :, 0].any() and not found[name].d[:, :, 0].any()
    assert not found["dq"].t[:, :, 0].any()


def test_a_shift_that_is_none_is_refused(rng):
    """All of a row at −2^100: the double next to its maximum is 2^47 away."""
    change = {"bias": np.where(np.arange(19)[:, None] < 3, -(2.0**100), np.zeros(37))}
    problem, _ = built(ra.SDPA(scale=3.0), rng, change=scaled("q", 2.0**55), **change)
    assert slices.enclose(problem, {}, ()) is None


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_numbers_of_too_many_bits_or_none_are_refused(rng, name):
    problem, weights = built(ra.SDPA(), rng)
    for change in (
        lambda a: rng.standard_normal(a.shape),
        lambda a: a * 2.0**-300,
        lambda a: np.where(a > 1, np.nan, a),
    ):
        other = replace(problem, inputs=dict(problem.inputs) | {name: change(problem.inputs[name])})
        assert slices.enclose(other, weights, ("q", "k", "v")) is None
    assert slices.enclose(problem, weights, ("q", "k", "v")) is not None


def test_a_table_over_far_positions_is_refused_before_it_is_made(rng, monkeypatch):
    def never(*given):
        raise AssertionError("lowered on balls")

    problem, _ = built(ra.SDPA(bias=ra.ALiBi(direction="two_sided")), rng, k_positions=np.arange(37) * 2**14)
    assert problem.plan.bias[0].values.size > 2**20
    monkeypatch.setattr(type(problem), "lowered", never)
    assert slices.enclose(problem, {}, ()) is None


def test_blocks_of_keys_and_rows_change_nothing(rng, monkeypatch):
    problem, weights = built(ra.SDPA(), rng, sizes=(1, 2, 1, 23, 41, 8, 5))
    for module in (fixed_module, slices):
        monkeypatch.setattr(module, "BLOCK", 8)
    monkeypatch.setattr(slices, "ROWS", 4)
    assert exact_plan_module.exact_plan(problem, weights, ("q",)).fixed.bits > fixed(1530, 41).bits
    assert agree(problem, weights, ("q", "k", "v")) == 0


def test_slices_one_bit_too_wide_are_refused(rng, monkeypatch):
    problem, weights = built(ra.SDPA(), rng)
    right = fixed_module.fixed
    monkeypatch.setattr(exact_plan_module, "fixed", lambda *a: replace(right(*a), bits=right(*a).bits + 1))
    with pytest.raises(RefattnError, match="not summed exactly"):
        slices.enclose(problem, weights, ("q", "k", "v"))


def test_keys_that_are_not_blocked_are_refused(rng, monkeypatch):
    problem, weights = built(ra.SDPA(), rng, sizes=(1, 2, 1, 3, 41, 8, 5))
    right = fixed_module.fixed
    monkeypatch.setattr(exact_plan_module, "fixed", lambda most, terms: right(most, 8))
    with pytest.raises(RefattnError, match="not summed exactly"):
        slices.enclose(problem, weights, ("q", "k", "v"))


def test_certify_takes_the_tier_and_balls_the_rest(rng, monkeypatch):
    """Two keys with equal values: out is v, which only more than a radius can tell; balls see those rows alone."""
    monkeypatch.setattr(certified, "LARGE", 0)

    def equal(x):
        x["v"][:, :, 1] = x["v"][:, :, 0]

    problem, weights = built(ra.SDPA(causal="top_left"), rng, change=equal)
    seen = []
    of_rows = certified.of_rows
    monkeypatch.setattr(certified, "of_rows", lambda p, rows: seen.append(rows) or of_rows(p, rows))
    found = certified.certify(problem, {"out": weights["out"]}, ("q",), bits=(128,))
    assert seen == [(1,)]
    assert (found["out"].status[:, :, 1] == ENCLOSED).all()
    assert (np.delete(found["out"].status, 1, 2) != ENCLOSED).all()
    monkeypatch.setattr(certified, "LARGE", 1 << 60)
    plain = certified.certify(problem, {"out": weights["out"]}, ("q",), bits=(128,))
    for name, certificate in plain.items():
        decided = certificate.status != ENCLOSED
        np.testing.assert_array_equal(found[name].value[decided], certificate.value[decided])
        np.testing.assert_array_equal(found[name].rne[decided], certificate.rne[decided])


@pytest.mark.parametrize("name", sorted(PROBLEMS.keys() - FORWARD_ONLY - REFUSED))
def test_plain_float64_stays_within_its_limits(name, monkeypatch):
    """Far within: a limit is for any order of summation. And yet not so far that it would refute nothing."""
    monkeypatch.setattr(certified, "LARGE", 0)
    monkeypatch.setattr("refattn.engines.certified.plain_check.ROWS", 2)
    problem, weights = named(name, np.random.default_rng(4))
    for output, found in certified.certify(problem, weights, tuple(problem.real_inputs())).items():
        ok = np.isfinite(found.value)
        np.testing.assert_array_less(np.abs(found.value[ok] - found.centre[ok]), found.bound[ok])
        assert (found.bound[ok] < 1e-9 * (1 + np.abs(found.value[ok]).max(initial=0.0))).all(), output


@pytest.mark.parametrize("name", FAMILIES)
def test_no_family_is_refuted(rng, name, monkeypatch):
    """Weights that count as 0 make gradients of 10^-60, which float64 sees as well as any."""
    monkeypatch.setattr(certified, "LARGE", 0)
    spec, extras, change = FAMILIES[name]
    problem, weights = built(spec, rng, change=change, **{n: a.copy() for n, a in extras.items()})
    certified.certify(problem, weights, tuple(problem.real_inputs()), bits=(128,))


GOLDEN = load.folder_of_suite()


@pytest.mark.parametrize(
    "name", ["numerics/dominant_key", "numerics/scores_of_hundreds", "sink/zero", "window/left_128", "alibi/learned"]
)
def test_the_tier_changes_no_byte_of_a_golden_file(name, monkeypatch):
    """Cases that balls have written; dominant keys give gradients of 10^-56 through weights that count as 0."""
    monkeypatch.setattr(certified, "LARGE", 0)
    case = next(case for case in suite.cases() if case.name == name)
    taken = []
    right = slices.enclose
    monkeypatch.setattr(slices, "enclose", lambda *given: taken.append(right(*given)) or taken[-1])
    built_now = build(case)
    assert taken[0] is not None
    assert built_now.manifest == (GOLDEN / f"{name}.json").read_bytes()
    assert built_now.tensors == (GOLDEN / f"{name}.safetensors").read_bytes()


def test_a_value_far_from_float64_is_refused(rng, monkeypatch):
    monkeypatch.setattr(certified, "LARGE", 0)
    problem, weights = built(ra.SDPA(), rng)
    right = slices.enclose

    def off(*given):
        found = right(*given)
        found.enclosures["dk"].t[0, 1, 4, 2] *= 1 + 2.0**-20
        return found

    monkeypatch.setattr(slices, "enclose", off)
    with pytest.raises(RefattnError, match=r"dk\[0, 1, 4, 2\]"):
        certified.certify(problem, weights, ("q", "k", "v"))


def alone(what, **environment):
    """Output of tests/sliced.py in a process of its own, where kernels are compiled anew."""
    script = Path(__file__).parent / "sliced.py"
    given = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)} | environment
    done = subprocess.run([sys.executable, script, what], env=given, capture_output=True, text=True, check=True)
    return done.stdout.split()


@pytest.mark.slow
def test_a_head_of_more_keys_than_a_block(rng):
    """Rows of 4200 keys, against balls on three of them."""
    q, k, v, dout = (dyadic(rng, 1, 1, 4200, 8) for _ in range(4))
    problem = api.build(
        ra.SDPA(causal=True, bias=ra.ALiBi(slopes=(2.0**-9,))), {"q": q, "k": k, "v": v}, "float64", ("out",)
    )
    found = slices.enclose(problem, {"out": dout}, ("q", "k", "v")).enclosures
    rows = (1, 2100, 4199)
    short = certified.of_rows(problem, rows)
    with flint.ctx.workprec(300):
        exact = short.differentiate(BALLS.real, {"out": dout[:, :, rows]}, ("q",))
        for name in ("out", "lse", "dq"):
            mine = round_enclosed(found[name], True)
            theirs = round_enclosed(exact[name], True)
            assert (mine.status != ENCLOSED).all()
            np.testing.assert_array_equal(mine.odd[:, :, rows], theirs.odd)
            np.testing.assert_array_equal(mine.nearest[:, :, rows], theirs.nearest)


@pytest.mark.slow
@pytest.mark.parametrize(
    "sabotage, verdict",
    [
        ("wrong_constant", "refused"),
        ("reassociated", "refused"),
        # Beyond what float64 can see: it takes balls.
        ("wrong_last_bits", "wrong"),
        ("contracted", "wrong"),
    ],
)
def test_broken_arithmetic_is_noticed(sabotage, verdict):
    assert alone(sabotage) == [verdict]


@pytest.mark.slow
def test_the_bits_depend_on_no_library_and_no_thread():
    settings = [("Haswell", "1"), ("SkylakeX", "2"), ("Prescott", "2")]
    found = {tuple(alone("hash", OPENBLAS_CORETYPE=core, OPENBLAS_NUM_THREADS=n)) for core, n in settings}
    assert len(found) == 1
