"""Temperatures that meet a target: closed forms, what solving promises, and what no temperature reaches."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
from checks import near

import refattn as ra
from refattn.alignment import align_temperature, statistics
from refattn.errors import DTypeError, ShapeError, SpecError

PAGE = Path(__file__).parents[1] / "docs" / "alignment.md"
CRITERION = pytest.mark.parametrize("criterion", ["max_prob", "entropy"])
REDUCE = pytest.mark.parametrize("reduce", ["all", "layer", "head"])
SPEC = ra.AttentionAlignment(bias=ra.T5(buckets=6, max_distance=5), causal="bottom_right")


def inputs(rng, lq=5, lk=9, **more):
    """Two sequences, four heads over two, no temperature."""
    shapes = {"q": (2, 4, lq, 3), "k": (2, 2, lk, 3), "v": (2, 2, lk, 1), "t5_table": (6, 4)}
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()} | more


def binary(p):
    return -p * math.log(p) - (1 - p) * math.log(1 - p)


# Closed forms


@pytest.mark.parametrize("p", [0.5001, 0.6, 0.9, 0.999])
@pytest.mark.parametrize("gap", [1e-3, 1.7, 40])
def test_two_keys_have_their_temperature_in_closed_form(p, gap):
    """P = 1 / (1 + e^(−gap/tau)), so tau = gap / ln(p / (1 − p)), by the weight and by the entropy of it."""
    logits = np.array([3.0, 3.0 + gap]).reshape(1, 1, 1, 2)
    tau = gap / math.log(p / (1 - p))
    near(align_temperature(logits, target=p), tau, 1e-9)
    # Near p = 1/2 the entropy is flat: its own rounding moves tau.
    near(align_temperature(logits, target=binary(p), criterion="entropy"), tau, 1e-9 if p > 0.55 else 1e-6)


def test_a_mean_of_rows_of_which_one_does_not_move():
    """A row of one key has weight 1 and entropy 0 always; one that sees none is no row."""
    inf = math.inf
    logits = np.array([[1.0, 0.0], [7.0, -inf], [-inf, -inf]]).reshape(1, 1, 3, 2)
    near(statistics(logits).max_prob, (1 + 1 / (1 + math.exp(-1))) / 2)
    near(align_temperature(logits, target=0.95), 1 / math.log(9), 1e-9)
    near(align_temperature(logits, target=binary(0.9) / 2, criterion="entropy"), 1 / math.log(9), 1e-9)


# What is promised


@CRITERION
@REDUCE
def test_the_variant_at_the_temperature_found_has_the_target(criterion, reduce, rng):
    """The mean of the variant's own output, not of this module's, over what is reduced."""
    layers = [inputs(rng), inputs(rng)]
    shape = {"all": (), "layer": (2,), "head": (2, 4)}[reduce]
    target = {"max_prob": rng.uniform(0.4, 0.9, shape), "entropy": rng.uniform(0.5, 1.4, shape)}[criterion]
    found = align_temperature(SPEC, layers, target=target, criterion=criterion, reduce=reduce)
    assert found.shape == shape
    tau = np.broadcast_to(found[:, None] if reduce == "layer" else found, (2, 4))
    outputs = [
        ra.evaluate(SPEC, x | {"temperature": t}, want=(criterion,))[criterion]
        for x, t in zip(layers, tau, strict=True)
    ]
    over = {"all": None, "layer": (1, 2, 3), "head": (1, 3)}[reduce]
    near(np.mean(outputs, axis=over), np.asarray(target), 1e-9)


@CRITERION
@REDUCE
def test_logits_and_the_variant_give_the_same(criterion, reduce, rng):
    """Logits by NumPy, masked by −∞: of padded sequences, one of them empty, without a bias."""
    spec, n = ra.AttentionAlignment(bias=None), np.array([9, 0])
    x = inputs(rng, kv_lengths=n)
    del x["t5_table"]
    logits = np.einsum("bgrid,bgjd->bgrij", x["q"].reshape(2, 2, 2, 5, 3), x["k"]).reshape(2, 4, 5, 9)
    logits[1] = -np.inf
    for one, other in zip(statistics(logits, reduce=reduce), statistics(spec, x, reduce=reduce), strict=True):
        near(one, other)
    target = {"max_prob": 0.5, "entropy": 1.1}[criterion]
    given = {"target": target, "criterion": criterion, "reduce": reduce}
    near(align_temperature(logits, **given), align_temperature(spec, x, **given), 1e-9)


@CRITERION
def test_aligning_with_itself_is_the_temperature_1(criterion, rng):
    x = inputs(rng)
    near(align_temperature(SPEC, x, target=getattr(statistics(SPEC, x), criterion), criterion=criterion), 1.0, 1e-9)


def test_statistics_take_the_temperature_that_the_arrays_hold(rng):
    x, tau = inputs(rng), np.array([0.5, 1, 2, 4])
    found = statistics(SPEC, x | {"temperature": tau}, reduce="head")
    expected = ra.evaluate(SPEC, x | {"temperature": tau}, want=("max_prob", "entropy"))
    for one, other in zip(found, expected.values(), strict=True):
        near(one[0], other.mean((0, 2)))


@CRITERION
@pytest.mark.parametrize("seed", range(20))
def test_the_mean_moves_one_way(criterion, seed):
    """Whatever the logits: of any size, tied, masked."""
    rng = np.random.default_rng(seed)
    logits = rng.standard_normal((1, 2, 6, 9)) * 10.0 ** rng.integers(-3, 4, (1, 2, 6, 1))
    logits = np.where(rng.random(logits.shape) < 0.3, logits[..., :1], logits)
    logits[..., 1:] = np.where(rng.random((1, 2, 6, 8)) < 0.3, -np.inf, logits[..., 1:])
    means = [getattr(statistics(logits / tau), criterion) for tau in 2.0 ** np.arange(-12, 13)]
    steps = np.diff(means) * (1 if criterion == "entropy" else -1)
    assert (steps >= -1e-14).all()


# The headline: the longer the context, the colder


def test_gaussian_logits_need_a_temperature_that_falls_with_the_length_and_below_that_of_log_n(rng):
    """512 keys in the paper, 128 here. By entropy 1/tau² → 1 + 2 ln(L/L₀) where no single key dominates."""
    trained, lengths = 128, (256, 512, 1024)
    rows = {n: rng.standard_normal((1, 1, 256, n)) for n in (trained, *lengths)}
    target = statistics(rows[trained])
    found = {
        criterion: [
            float(align_temperature(rows[n], target=getattr(target, criterion), criterion=criterion)) for n in lengths
        ]
        for criterion in ("max_prob", "entropy")
    }
    log_n = [math.log(trained) / math.log(n) for n in lengths]
    for taus in found.values():
        assert all(a > b for a, b in zip([1.0, *taus], taus, strict=False))
        assert all(tau < simple for tau, simple in zip(taus, log_n, strict=True))
    limit = [(1 + 2 * math.log(n / trained)) ** -0.5 for n in lengths]
    np.testing.assert_allclose(found["entropy"], limit, rtol=0.08)


# What is refused


@pytest.mark.parametrize(
    ("target", "criterion", "message"),
    [
        (1.0, "max_prob", "no temperature gives a mean max_prob of 1.0: it lies between 0.25 and 1.0, both excluded"),
        (0.25, "max_prob", "between 0.25 and 1.0"),
        (0.2, "max_prob", "between 0.25 and 1.0"),
        (0.0, "entropy", "no temperature gives a mean entropy of 0.0: it lies between 0.0 and 1.386"),
        (1.5, "entropy", "between 0.0 and 1.386"),
    ],
)
def test_a_target_beyond_reach_is_refused_with_the_range(target, criterion, message):
    logits = np.arange(4.0).reshape(1, 1, 1, 4)
    with pytest.raises(SpecError, match=message):
        align_temperature(logits, target=target, criterion=criterion)


def test_rows_of_one_key_have_no_range():
    with pytest.raises(SpecError, match=r"between 1\.0 and 1\.0"):
        align_temperature(np.zeros((1, 1, 3, 1)), target=1)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"criterion": "mean"}, SpecError, "criterion is 'max_prob' or 'entropy'; given: 'mean'"),
        ({"reduce": "row"}, SpecError, "reduce is 'all', 'layer' or 'head'; given: 'row'"),
        ({"reduce": None}, SpecError, "reduce is 'all', 'layer' or 'head'"),
        ({"reduce": ["all"]}, SpecError, r"reduce is 'all', 'layer' or 'head'; given: \['all'\]"),
        ({"target": "half"}, DTypeError, "target"),
        ({"source": "logits"}, DTypeError, "logits"),
        ({"target": math.nan}, ShapeError, r"target is a finite number, or an array \(\) of them; given: nan"),
        ({"target": [0.5, 0.5], "reduce": "layer"}, ShapeError, r"an array \(1,\) of them"),
        ({"source": np.zeros((3, 4))}, ShapeError, r"logits are \(B,H,Lq,Lk\).*given: \(3, 4\)"),
        ({"source": np.full((1, 1, 1, 2), np.inf)}, ShapeError, "finite or −∞"),
        ({"source": np.full((1, 1, 1, 2), np.nan)}, ShapeError, "finite or −∞"),
        ({"source": np.full((1, 1, 1, 2), -np.inf)}, ShapeError, "no row sees a key"),
        ({"arrays": {}}, SpecError, "arrays are those of a Spec"),
        ({"source": ra.T5(), "arrays": {}}, SpecError, "a refattn.AttentionAlignment; given: T5"),
        ({"source": SPEC}, ShapeError, "arrays is a mapping, or a sequence with one for each layer; given: NoneType"),
        ({"source": SPEC, "arrays": []}, ShapeError, "arrays is a mapping"),
        ({"source": SPEC, "arrays": {"q": 1}}, ShapeError, "every layer has a q"),
        ({"source": ra.AttentionAlignment(divide="scores"), "arrays": {}}, SpecError, "the bias keeps its size"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_refused(change, kind, message):
    given = {"source": np.arange(4.0).reshape(1, 1, 1, 4), "target": 0.5} | change
    with pytest.raises(kind, match=message):
        align_temperature(given.pop("source"), given.pop("arrays", None), **given)


@pytest.mark.skipif(not PAGE.exists(), reason="the wheel's tests run outside the repository")
def test_the_page_prints_what_it_says(capsys):
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == printed
