"""Keys left out under a falling bias: which they are, that what they weigh is within its share, and hostile inputs."""

from itertools import pairwise

import numpy as np
import pytest
from checks import same

import refattn as ra
from refattn import api
from refattn.engines import cpu
from refattn.engines.cpu import adjoint, fast, pool, skipping
from refattn.engines.cpu.work import KEYS

UNIT = 2.0**-24
ROWS = 64  # of the largest tile


def inputs_of(rng, heads=4, length=1024, *, depth=16, width=16, groups=None):
    shapes = {"q": heads, "k": groups or heads, "v": groups or heads}
    sizes = {"q": depth, "k": depth, "v": width}
    return {n: rng.standard_normal((1, h, length, sizes[n])).astype(np.float32) for n, h in shapes.items()}


def prepared(spec, inputs):
    return api.build(spec, inputs, None, ("out", "lse")).score


def run(plan, **changed):
    q, k, v = (np.ascontiguousarray(changed.get(n, getattr(plan, n)), np.float32) for n in "qkv")
    return fast.run(plan, q, k, v)[:2]


def left_out(plan, monkeypatch):
    """Which row leaves out which tile of keys, (Hq,Lq,tiles): a tile of NaN that the norms do not tell of shows it."""
    given = {}
    monkeypatch.setattr(fast, "norms", lambda *x: given.setdefault("norms", skipping.norms(*x)))
    run(plan)
    assert given["norms"].on
    found = []
    for n in range(plan.k.shape[2] // KEYS):
        v = np.array(plan.v, np.float32)
        v[:, :, n * KEYS : (n + 1) * KEYS] = np.nan
        found.append(~np.isnan(run(plan, v=v)[0][0]).any(-1))
    monkeypatch.undo()
    return np.stack(found, -1)


def exact(plan, hidden=None):
    """Out, lse and Σ p|v| of the first sequence in float64, without the pairs (Hq,Lq,Lk) that are hidden."""
    q, k, v = (np.asarray(a, np.float64)[0] for a in (plan.q, plan.k, plan.v))
    share = q.shape[0] // k.shape[0]
    k, v = np.repeat(k, share, 0), np.repeat(v, share, 0)
    away = plan.positions[1][0][None, :] - plan.positions[0][0][:, None]
    s = plan.scale * q @ k.transpose(0, 2, 1) - plan.bias[0].slopes[:, None, None] * np.abs(away)
    s = np.where(away <= 0, s, -np.inf) if plan.causal else s
    s = s if hidden is None else np.where(hidden, -np.inf, s)
    m = s.max(-1, keepdims=True)
    w = np.exp(s - m)
    z = w.sum(-1, keepdims=True)
    return w @ v / z, (m + np.log(z))[..., 0], w @ np.abs(v) / z


@pytest.mark.parametrize("causal", ["top_left", False])
@pytest.mark.parametrize("kind", ["normal", "zero column", "large value", "long key", "grouped", "off centre"])
def test_what_is_left_out_weighs_less_than_its_share(kind, causal, rng, monkeypatch):
    inputs = inputs_of(rng, groups=2 if kind == "grouped" else None)
    if kind == "zero column":
        inputs["v"][..., 3] = 0.0
    if kind == "large value":
        inputs["v"][:, 1, 100, 5] = 1e30
    if kind == "long key":
        inputs["k"][:, 1, 100] *= 50.0
    if kind == "off centre":
        inputs["k"] += 5 * rng.standard_normal(inputs["k"].shape[-1]).astype(np.float32)
    plan = prepared(ra.SDPA(causal=causal, bias=ra.ALiBi()), inputs)
    seen = np.ones((plan.q.shape[2],) * 2, bool) if not causal else np.tri(plan.q.shape[2], dtype=bool)
    gone = left_out(plan, monkeypatch)
    hidden = np.repeat(gone, KEYS, -1) & seen
    assert hidden[0].mean() > 0.2
    if kind in {"large value", "long key"}:
        assert hidden[1].sum() < hidden[0].sum()
    out, lse, size = exact(plan)
    less, less_lse, _ = exact(plan, hidden)
    assert (np.abs(less - out) <= skipping.EPSILON * 12 * UNIT * size).all()
    assert (np.abs(less_lse - lse) <= skipping.EPSILON * 4 * UNIT).all()
    found, found_lse = run(plan)
    assert np.abs(found[0] / np.maximum(size, 1e-30) - out / np.maximum(size, 1e-30)).max() < 2e-5
    assert np.abs(found_lse[0] - lse).max() < 1e-4


def test_a_far_key_that_weighs_most_is_read(rng):
    """A key a thousand places away, parallel to its query and so long that the bias does not matter."""
    inputs = inputs_of(rng, length=1536)
    inputs["k"][0, :, 40] = inputs["q"][0, :, 1500] * 500.0
    plan = prepared(ra.SDPA(causal="top_left", bias=ra.ALiBi()), inputs)
    out, lse, _ = exact(plan)
    found, found_lse = run(plan)
    assert np.abs(found[0] - out)[:, 1500].max() < 1e-4 * np.abs(out).max()
    same(found[0][:, 1500].argmax(-1), plan.v[0][:, 40].argmax(-1))
    assert np.abs(found_lse[0] / lse - 1)[:, 1500].max() < 1e-5


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_far_number_that_is_not_finite_reaches_all_rows_that_see_it(name, bad, rng):
    inputs = inputs_of(rng, heads=2, length=640)
    inputs[name][0, 0, 10, 2] = bad
    found = ra.evaluate(ra.SDPA(causal="top_left", bias=ra.ALiBi()), inputs, engine="cpu", want=("out", "lse"))
    reached = slice(10, 11) if name == "q" else slice(10, None)
    rows = np.isnan(found["out"][0, 0]).any(-1)
    assert rows[reached].all()
    assert rows.sum() == len(rows[reached])
    assert not np.isnan(found["out"][0, 1]).any()


def test_values_of_which_some_cancel_are_not_taken_for_small(rng, monkeypatch):
    """Every out_d is 0 but for rounding, so nothing is known of Σ p|v|, and next to nothing may go."""
    inputs = inputs_of(rng, heads=1, length=1024, width=4)
    inputs["k"][:], inputs["q"][:] = 0.0, 0.0
    inputs["v"][:] = np.where(np.arange(1024) % 2, 1.0, -1.0)[:, None]
    plan = prepared(ra.SDPA(bias=ra.ALiBi()), inputs)
    gone = np.repeat(left_out(plan, monkeypatch), KEYS, -1)
    out, _, size = exact(plan)
    less, _, _ = exact(plan, gone)
    assert (np.abs(less - out) <= skipping.EPSILON * 12 * UNIT * size).all()


@pytest.mark.parametrize("spec", [ra.SDPA(), ra.SDPA(bias=ra.T5())])
def test_nothing_is_left_out_where_no_bias_falls(spec, rng):
    inputs = inputs_of(rng, heads=2) | {"t5_table": rng.standard_normal((32, 2)).astype(np.float32)}
    plan = prepared(spec, inputs if spec.bias else {n: inputs[n] for n in "qkv"})
    assert not skipping.norms(fast.arrays(plan, *(np.ascontiguousarray(inputs[n]) for n in "qkv")), 16, 0).on


def test_a_variable_turns_it_off(rng, monkeypatch):
    inputs = inputs_of(rng, heads=2)
    x = fast.arrays(prepared(ra.SDPA(bias=ra.ALiBi()), inputs), *(inputs[n] for n in "qkv"))
    assert skipping.norms(x, 16, 0).on
    monkeypatch.setenv(skipping.VARIABLE, "0")
    assert not skipping.norms(x, 16, 0).on


def test_norms_are_the_greatest_and_never_less(rng):
    inputs = inputs_of(rng, heads=2, length=700, depth=19, width=7)
    inputs["k"][0, 0, 130, 4], inputs["v"][0, 1, 3, 2], inputs["v"][0, 0, :, 5] = np.nan, -np.inf, 0.0
    x = fast.arrays(prepared(ra.SDPA(bias=ra.ALiBi()), inputs), *(inputs[n] for n in "qkv"))
    found = skipping.norms(x, 16, 0)
    starts = np.arange(0, 700, KEYS)
    away = inputs["k"][0].astype(np.float64) - found.centre[0][:, None]
    lengths = np.maximum.reduceat(np.sqrt((away**2).sum(-1)), starts, axis=1)
    assert np.abs(found.centre[0, 1] - inputs["k"][0, 1, ::3].mean(0)).max() < 1e-6
    assert found.keys[0, 0, 2] == np.inf
    finite = np.isfinite(lengths)
    assert (found.keys[0][finite] >= lengths[finite]).all()
    assert (found.keys[0][finite] <= lengths[finite] * 1.01).all()
    assert (found.before[0, 0, 2:] == np.inf).all()
    peaks = np.abs(inputs["v"][0]).max(1)
    assert found.scales[0, 1, 2] == found.scales[0, 0, 5] == found.absent[0, 1, 2] == 0.0
    assert found.absent[0, 0, 5] > 1e20
    live = np.isfinite(peaks) & (peaks > 0)
    assert (found.scales[0][live] * peaks[live] <= 1).all()
    assert (found.scales[0][live] * peaks[live] >= 0.99).all()


def test_threads_change_no_bit(rng, monkeypatch):
    monkeypatch.setattr(pool, "_SMALL", 0)
    inputs = inputs_of(rng)
    found = []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv(pool.VARIABLE, threads)
        found.append(cpu.run(api.build(ra.SDPA(causal="top_left", bias=ra.ALiBi()), inputs, None, ("out", "lse"))))
    for other in found[1:]:
        same(other["out"], found[0]["out"])
        same(other["lse"], found[0]["lse"])


def test_explain_tells_of_it(monkeypatch):
    sizes = {"B": 1, "Hq": 4, "Hkv": 4, "Lq": 2048, "Lk": 2048, "D": 16, "Dv": 16}
    told = ra.explain(ra.SDPA(causal="top_left", bias=ra.ALiBi()), sizes)["skipping"]
    assert list(told) == ["cpu"]
    distances = [int(n) for n in told["cpu"].rpartition(": ")[2].split("; ")[0].split(", ")]
    assert distances == sorted(distances)
    assert "gradients" in told["cpu"]
    assert [round(b / a) for a, b in pairwise(distances)] == [4, 4, 4]
    assert ra.explain(ra.SDPA(causal="top_left"), sizes)["skipping"] == {}
    assert ra.explain(ra.SDPA(bias=ra.ALiBi()), sizes | {"Lk": 300, "Lq": 300})["skipping"] == {}
    monkeypatch.setenv(skipping.VARIABLE, "0")
    assert "=0" in ra.explain(ra.SDPA(bias=ra.ALiBi()), sizes)["skipping"]["cpu"]


def test_what_all_keys_have_in_common_changes_little(rng, monkeypatch):
    """A long vector that is added to every key moves all logits of a row alike."""
    inputs = inputs_of(rng, heads=2)
    spec = ra.SDPA(causal="top_left", bias=ra.ALiBi())
    plain = left_out(prepared(spec, inputs), monkeypatch).sum()
    inputs["k"] += 8 * rng.standard_normal(16).astype(np.float32)
    assert left_out(prepared(spec, inputs), monkeypatch).sum() > 0.9 * plain


def gradients_of(inputs, dout, causal="top_left"):
    spec = ra.SDPA(causal=causal, bias=ra.ALiBi(slopes="learned"))
    slopes = np.exp2(-np.arange(inputs["q"].shape[1], dtype=np.float32))
    return ra.vjp(spec, inputs | {"slopes": slopes}, {"out": dout}, engine="cpu")


@pytest.mark.parametrize("causal", ["top_left", False])
def test_gradients_leave_out_only_what_changes_no_bit(causal, rng, monkeypatch):
    inputs = inputs_of(rng, heads=4, length=1000, depth=24, groups=2)
    inputs["k"][0, 1, 30] *= 40
    dout = rng.standard_normal((*inputs["q"].shape[:3], 16)).astype(np.float32)
    found = gradients_of(inputs, dout, causal)
    monkeypatch.setattr(adjoint, "norms", lambda *x: skipping._NONE)
    for n, whole in gradients_of(inputs, dout, causal).items():
        same(found[n], whole)


def test_gradients_do_leave_out(rng, monkeypatch):
    """Lengths of keys that are said to be 0 let what counts go too, so the lengths are asked."""
    inputs = inputs_of(rng, heads=2, length=640)
    inputs["k"][0, :, 5] = inputs["q"][0, :, 600] * 40
    dout = rng.standard_normal(inputs["q"].shape).astype(np.float32)
    right = gradients_of(inputs, dout)
    monkeypatch.setattr(
        adjoint, "norms", lambda *x: (n := skipping.norms(*x))._replace(keys=0 * n.keys, centre=0 * n.centre)
    )
    assert not np.array_equal(gradients_of(inputs, dout)["dk"], right["dk"])
