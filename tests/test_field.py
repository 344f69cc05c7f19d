"""The exactness test: identities that no precision decides are proved, near ties are not, and a wrong field shows."""

from dataclasses import replace
from fractions import Fraction

import flint
import numpy as np
import pytest

import refattn as ra
from refattn import api
from refattn.case import Case, Recipe
from refattn.dtypes import odd_fraction
from refattn.engines import certified
from refattn.engines.certified import ENCLOSED, EXACT, IDENTITY, ROUNDED, balls, certify, escalation, identities
from refattn.engines.certified.balls import BALLS
from refattn.engines.certified.field import FieldSpace
from refattn.engines.certified.modulus import Modulus
from refattn.engines.certified.rounding import round_enclosed
from refattn.errors import GoldenError, Undecided
from refattn.golden import build as building
from refattn.golden import load
from refattn.golden.audit import audit

TIE = 1 + 2.0**-52


def made(spec, dtype=np.float32, **x):
    """A problem of arrays that the dtype holds, with cotangents of its outputs that vary."""
    real = {n: np.asarray(a, dtype) if np.asarray(a).dtype.kind == "f" else np.asarray(a) for n, a in x.items()}
    problem = api.build(spec, real, dtype, ("out",))
    rng = np.random.default_rng(7)
    weights = {n: rng.integers(-8, 9, a.shape(problem.sizes)) / 4 for n, a in problem.outputs.items()}
    return problem, {n: w.astype(dtype) for n, w in weights.items()}


def all_of(problem, weights, **options):
    return certify(problem, weights, tuple(problem.real_inputs()), **options)


def without_the_test(monkeypatch, problem, weights):
    """Certificates by balls alone."""

    def nothing(task, decided, bits):
        raise Undecided

    with monkeypatch.context() as m:
        m.setattr(certified, "exactness", nothing)
        return all_of(problem, weights)


def qkv(rng, heads=4, groups=2, lq=3, lk=4):
    q, k, v = ((heads, lq, 4), (groups, lk, 4), (groups, lk, 3))
    return {n: rng.integers(-20, 21, (1, *shape)) / 8 for n, shape in (("q", q), ("k", k), ("v", v))}


def twice(x, sign=-1):
    """Each key twice, its value once more with the sign; equal positions, so that biases do not tell them apart."""
    lk = x["k"].shape[2]
    doubled = {"k": np.concatenate([x["k"]] * 2, 2), "v": np.concatenate([x["v"], sign * x["v"]], 2)}
    return x | doubled | {"k_positions": np.tile(np.arange(lk), 2)}


ALIBI = ra.ALiBi(direction="symmetric")
CANCELLING = {
    "GQA": (ra.SDPA(), {}),
    "sink": (ra.SDPA(), {"sink": np.array([0.5, -1.25, 3.0, 0.0])}),
    "rational slopes": (ra.SDPA(bias=ALIBI), {}),
    "slopes of a learned kind": (
        ra.SDPA(bias=ra.ALiBi(slopes="learned")),
        {"slopes": np.array([0.1, 0.7, 1 / 3, 2.0])},
    ),
    "irrational bias": (ra.SDPA(bias=ra.Sandwich(dimension=4)), {}),
    "softcap": (ra.SDPA(softcap=2.0), {}),
    "rotation": (ra.SDPA(rotary=ra.RoPE(pairing="half")), {}),
    "sigmoid": (ra.SDPA(normalizer="sigmoid", sigmoid_bias=-0.5), {}),
    "keep": (ra.SDPA(keep_probability=0.75), {"keep": np.ones((1, 1, 1, 8), bool)}),
}


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", CANCELLING)
def test_values_that_cancel_in_pairs_give_0(rng, monkeypatch, name, dtype):
    spec, extras = CANCELLING[name]
    problem, weights = made(spec, dtype, **twice(qkv(rng)), **extras)
    assert (without_the_test(monkeypatch, problem, weights)["out"].status == ENCLOSED).any()
    found = all_of(problem, weights)
    assert (found["out"].value == 0).all() and np.isin(found["out"].status, (IDENTITY, EXACT)).all()
    assert all((part.status != ENCLOSED).all() for part in found.values())


def test_equal_values_give_that_value_and_a_sink_takes_its_share(rng):
    x = qkv(rng)
    x["v"] = np.full_like(x["v"], 1.5)
    found = all_of(*made(ra.SDPA(), **x))
    assert (found["out"].value == 1.5).all() and (found["out"].status == IDENTITY).all()
    shared = all_of(*made(ra.SDPA(), **x, sink=np.zeros(4)))["out"]
    assert (shared.value < 1.5).all() and (shared.status == ROUNDED).all()


def test_equal_keys_give_the_mean_which_is_rational(rng):
    x = qkv(rng, lk=3)
    x["k"][:] = x["k"][:, :, :1]
    found = all_of(*made(ra.SDPA(), np.float64, **x))["out"]
    mean = np.repeat([[Fraction(sum(map(Fraction, col)), 3) for col in v.T] for v in x["v"][0]], 2, 0)[:, None]
    expected = np.broadcast_to(np.vectorize(odd_fraction)(mean), (4, 3, 3))
    np.testing.assert_array_equal(found.value[0], expected)


def test_a_tie_of_float64_is_rounded_to_even_and_to_odd(rng, monkeypatch):
    """Both groups of equal keys have the mean 1 + 2^-53, which lies between two doubles."""
    x = qkv(rng, lk=2) | {"v": np.ones((1, 2, 2, 3))}
    x = twice(x, sign=1)
    x["v"][:, :, 2:] = TIE
    problem, weights = made(ra.SDPA(), np.float64, **x)
    assert (without_the_test(monkeypatch, problem, weights)["out"].status == ENCLOSED).all()
    found = all_of(problem, weights)["out"]
    assert (found.status == IDENTITY).all() and (found.rne == 1).all() and (found.value == TIE).all()
    # Rounding to odd alone is decided: no even double is near.
    odd = all_of(*made(ra.SDPA(), np.float32, **x | {"v": x["v"].round()}))["out"]
    assert (odd.status == IDENTITY).all()


def test_a_single_key_and_the_gradients_that_vanish(rng, monkeypatch):
    x = qkv(rng, lk=1)
    problem, weights = made(ra.SDPA(), **x)
    del weights["lse"]
    found = all_of(problem, weights)
    assert (found["dq"].value == 0).all() and (found["dk"].value == 0).all() and (found["dq"].status == EXACT).all()
    # Were a lone key weighed as any other, by exp(s − m) / z with a midpoint m, balls would not see it.
    for space in (balls.BallSpace, FieldSpace):
        monkeypatch.setattr(space, "certain", lambda self, x, alone: np.zeros_like(alone), raising=False)
    again = all_of(problem, weights)
    for name in ("out", "dq", "dk", "dv"):
        np.testing.assert_array_equal(again[name].value, found[name].value)
        assert (again[name].status != ENCLOSED).all()


def test_equal_coordinates_of_the_visible_keys_have_no_gradient(rng, monkeypatch):
    x = qkv(rng)
    x["k"][..., 0] = 0.625
    problem, weights = made(ra.SDPA(), **x)
    del weights["lse"]
    assert (without_the_test(monkeypatch, problem, weights)["dq"].status[..., 0] == ENCLOSED).any()
    found = all_of(problem, weights)["dq"]
    assert (found.value[..., 0] == 0).all() and (found.value[..., 1:] != 0).any()


def test_a_zero_query_that_alone_sees_a_key_moves_it_nowhere(rng):
    x = qkv(rng)
    x["q"][:, :, -1] = 0
    mask = np.ones((1, 1, 3, 4), bool)
    mask[..., :-1, 2] = False
    found = all_of(*made(ra.SDPA(), **x, mask=mask))
    assert (found["dk"].value[:, :, 2] == 0).all() and (found["dk"].status != ENCLOSED).all()
    assert (found["dv"].value[:, :, 2] != 0).any()


def test_lse_is_exact_where_one_term_is_live_and_never_called_an_identity(rng):
    x = qkv(rng)
    lone = np.zeros((1, 1, 3, 4), bool)
    lone[..., 1] = True
    lse = all_of(*made(ra.SDPA(), **x, mask=lone))["lse"]
    assert (lse.status == EXACT).all()
    assert (all_of(*made(ra.SDPA(), **x, mask=lone, sink=np.zeros(4)))["lse"].status == ROUNDED).all()


# Near ties


def near(scores, values, dtype=np.float32):
    """One query and keys of those scores: out is Σ exp(s) v / Σ exp(s)."""
    k, v = (np.asarray(a, np.float64).reshape(1, 1, -1, 1) for a in (scores, values))
    return made(ra.SDPA(scale=1.0), dtype, q=np.ones((1, 1, 1, 1)), k=k, v=v)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("gap", "bits"), [(139, 128), (500, 512)])
def test_a_value_beside_a_breakpoint_is_no_identity(gap, bits, dtype):
    problem, weights = near([0, -gap], [1, 2], dtype)
    assert (all_of(problem, weights, bits=(bits,))["out"].status == ENCLOSED).all()
    found = all_of(problem, weights)["out"]
    assert found.value.item() == TIE and found.rne.item() == 1 and found.status.item() == ROUNDED


def test_the_field_alone_tells_e_from_its_neighbours(monkeypatch):
    """e^-400 − e^-405 is not 0, though in a field where e has order 5 it is."""
    problem, weights = near([0, -400, -405], [1, 2, 0])
    assert certify(problem, bits=(512,))["out"].status.item() == ENCLOSED
    wrong = Modulus(prime=11, order=5, base=4, bits=256, seed=b"")
    with monkeypatch.context() as m:
        m.setattr(identities, "draw", lambda seed, bits: wrong)
        assert certify(problem, bits=(512,))["out"].status.item() == IDENTITY
        # One that says how small it is proves nothing.
        m.setattr(identities, "draw", lambda seed, bits: wrong._replace(bits=3))
        assert certify(problem, bits=(512,))["out"].status.item() == ENCLOSED
    assert certify(problem)["out"].value.item() == TIE


def test_what_is_too_near_for_4096_bits_stays_enclosed_and_is_not_published(monkeypatch):
    problem, weights = near([0, -3000], [1, 2])
    found = all_of(problem, weights)["out"]
    assert found.status.item() == ENCLOSED and found.value.item() == 1 and 0 < found.width.item() < 1e-300
    sizes = {"B": 1, "Hq": 1, "Hkv": 1, "Lq": 1, "Lk": 2, "D": 1, "Dv": 1}
    inputs = {
        "q": Recipe(kind="constant", value=1.0),
        "k": Recipe(kind="values", values=(0, -3000)),
        "v": Recipe(kind="values", values=(1, 2)),
    }
    case = Case(
        name="numerics/too_near",
        spec=ra.SDPA(scale=1.0),
        sizes=sizes,
        inputs=inputs,
        flags=(),
        catches="",
        want=("out",),
    )
    with pytest.raises(GoldenError, match=r"numerics/too_near, out: elements \[0\] stay undecided at 4096 bits"):
        building.build(case)
    assert building.build(replace(case, inputs=inputs | {"v": Recipe(kind="constant", value=2.0)})).tally.elements == 1


# Many problems


def drawn(seed):
    """A small problem of few different numbers, so that much in it coincides."""
    rng = np.random.default_rng(seed)

    def some(*shape):
        return rng.integers(-2, 3, shape) / 2

    groups, each, lq, lk, d = (int(n) for n in rng.integers(1, (3, 3, 4, 5, 3)))
    sigmoid, bias = seed % 5 == 0, ((), (ALIBI,), (ra.Sandwich(dimension=4),))[seed % 3]
    options = {"normalizer": "sigmoid", "sigmoid_bias": 0.0} if sigmoid else {}
    spec = ra.SDPA(
        causal=(False, "bottom_right", "top_left")[rng.integers(3)],
        softcap=2.0 if seed % 4 == 0 else None,
        scale=0.5,
        bias=bias,
        **options,
    )
    x = {"q": some(1, groups * each, lq, d), "k": some(1, groups, lk, d), "v": some(1, groups, lk, 2)}
    if rng.random() < 0.4 and not sigmoid:
        x["sink"] = some(groups * each)
    return made(spec, (np.float32, np.float64)[seed % 2], **x)


def test_every_identity_survives_4096_bits_and_nothing_else_is_left():
    count = 0
    for seed in range(50):
        problem, weights = drawn(seed)
        found = all_of(problem, weights)
        with flint.ctx.workprec(4096):
            exact = problem.differentiate(BALLS.real, weights, tuple(problem.real_inputs()))
        for name, part in found.items():
            assert (part.status != ENCLOSED).all(), (seed, name)
            same = part.status == IDENTITY
            count += same.sum()
            assert (exact[name].enclosure()[2][same] < 1e-300).all()
            again = round_enclosed(exact[name], problem.dtype == np.float64)
            decided = (again.status != ENCLOSED) & ~same
            np.testing.assert_array_equal(part.value[decided], again.odd[decided])
            # Numbers this small make no ties of float64: what is an identity is a double.
            np.testing.assert_array_equal(part.value[same], exact[name].enclosure()[0][same].round(30))
            np.testing.assert_array_equal(part.rne[same], part.value[same])
    assert count > 10


def test_the_rows_concerned_give_what_the_whole_problem_does(rng, monkeypatch):
    x = qkv(rng, lq=6)
    x["v"] += 1 / 16  # No 0, so that only pairs vanish.
    mask = np.ones((1, 1, 6, 8), bool)
    mask[..., (0, 1, 3, 5), 0] = False
    problem, weights = made(ra.SDPA(causal="top_left", softcap=3.0), **twice(x), q_positions=np.arange(6), mask=mask)
    seen, plain = [], problem.variant.restrict
    monkeypatch.setattr(problem.variant, "restrict", lambda *a: seen.append(a[2]) or plain(*a))
    assert (certify(problem)["out"].status[:, :, (2, 4)] == IDENTITY).all()
    assert seen == [(2, 4)] * 2  # balls of 512 bits, and the test
    found = all_of(problem, weights)
    asked = len(seen)
    assert asked > 2
    monkeypatch.setattr(escalation, "by_row", lambda problem, name: False)
    again = all_of(problem, weights)
    assert len(seen) == asked
    for output, part in found.items():
        np.testing.assert_array_equal(part.status, again[output].status)
        np.testing.assert_array_equal(part.value, again[output].value)


def test_the_candidate_is_0_or_the_one_breakpoint_of_the_interval():
    tiny, half = Fraction(2) ** -200, Fraction(2) ** -53

    def find(middle, reach, to_nearest):
        return identities.breakpoint_in(middle - reach, middle + reach, float(middle), to_nearest)

    assert find(Fraction(1), tiny, False) == find(Fraction(1), tiny, True) == 1
    assert find(1 + half, tiny, False) is None and find(1 + half, tiny, True) == 1 + half
    assert find(1 + 2 * half, tiny, True) is None
    assert find(Fraction(1), half, True) is None and find(Fraction(1), half, False) == 1
    assert find(Fraction(0), tiny, True) == find(Fraction(1), Fraction(2), True) == 0
    assert find(Fraction(1), 4 * half, False) is None and find(Fraction(1), 8 * half, False) is None
    largest = Fraction(np.finfo(np.float64).max)
    assert find(largest, largest / 2**54, True) is None
    least = Fraction(2) ** -1074
    assert find(least, least / 8, False) is None and find(2 * least, least / 8, False) == 2 * least
    assert find(-2 * least, least / 8, False) == -2 * least


# Published identities


@pytest.mark.parametrize(
    ("change", "wrong"),
    [(None, ()), (list(range(9)), ("identity",)), ("lse", ("identity",)), ("value", ("are not what 256 bits prove",))],
)
def test_an_audit_finds_the_identities_again(monkeypatch, change, wrong):
    golden = load.load("numerics/constant_values")
    outputs, expected = dict(golden.manifest["outputs"]), dict(golden.expected)
    if change == "lse":
        outputs["lse"] = outputs["lse"] | {"identity": [0]}
    elif change == "value":
        expected["out"] = expected["out"] + 2.0**-52
    elif change:
        outputs["out"] = outputs["out"] | {"identity": change}
    altered = replace(golden, manifest=golden.manifest | {"outputs": outputs}, expected=expected)
    monkeypatch.setattr(load, "load", lambda name, folder: altered)
    finding = audit(golden.name, load.folder_of_suite(), 256)
    assert len(finding.wrong) == len(wrong) and all(w in f for w, f in zip(wrong, finding.wrong, strict=True))
