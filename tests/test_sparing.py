"""Keys left out of the backward pass: which they are, that what they add is within its share, and hostile inputs."""

import numpy as np
import pytest
from checks import same

import refattn as ra
from refattn import api
from refattn.bound import BoundSpace
from refattn.engines import cpu
from refattn.engines.cpu import adjoint, pool, skipping, sparing
from refattn.engines.cpu.work import KEYS
from refattn.profiles import FLOAT32

LENGTH = 704
WRT = ("q", "k", "v")


def problem_of(rng, *, heads=2, groups=None, causal="top_left", slope=0.25, **more):
    """A problem whose slopes are given and steep, inputs, and cotangents of out and lse."""
    shapes = {"q": heads, "k": groups or heads, "v": groups or heads}
    inputs = {n: rng.standard_normal((1, h, LENGTH, 16)).astype(np.float32) for n, h in shapes.items()}
    inputs["slopes"] = (slope / 2.0 ** np.arange(heads)).astype(np.float32)
    cotangents = {"out": rng.standard_normal((1, heads, LENGTH, 16)).astype(np.float32)}
    cotangents["lse"] = rng.standard_normal((1, heads, LENGTH)).astype(np.float32)
    return ra.SDPA(causal=causal, bias=ra.ALiBi(slopes="learned")), inputs | more, cotangents


def gradients_of(spec, inputs, cotangents, wrt=WRT):
    return cpu.vjp(api.build(spec, inputs, None, ("out", "lse")), cotangents, wrt)


def left_out(given, monkeypatch):
    """Which row leaves out which tile of keys, (Hq,Lq,tiles): a tile of NaN that nobody was told of shows it.

    A tile of weights that are all 0 in float32 does not show.
    """
    spec, inputs, cotangents = given
    plan = api.build(spec, inputs, None, ("out", "lse")).score
    outputs = cpu.run(api.build(spec, inputs, None, ("out", "lse")))
    known, real = {}, (skipping.norms, sparing.allowed, pool.together)
    monkeypatch.setattr(adjoint, "norms", lambda *x: known.setdefault("norms", real[0](*x)))

    def allowed(*x, by_share):
        if "allowed" not in known:
            known["allowed"] = real[1](*x, by_share=by_share)
        known["allowed"].spent[:] = 0
        return known["allowed"]

    def calm(kernel, arguments, tasks, work):
        real[2](kernel, arguments, tasks, work)
        arguments()[4].doubt[:] = False

    monkeypatch.setattr(sparing, "allowed", allowed)
    monkeypatch.setattr(adjoint, "together", calm)
    q, k, v, dout, dlse = (np.asarray(a, np.float32) for a in (plan.q, plan.k, plan.v, *cotangents.values()))
    found = []
    for n in range(-1, LENGTH // KEYS):
        hidden = v.copy()
        if n >= 0:
            hidden[:, :, n * KEYS : (n + 1) * KEYS] = np.nan
        x = adjoint.Pass(q, k, hidden, outputs["out"], outputs["lse"], dout, dlse)
        found.append(~np.isnan(adjoint.gradients(plan, x, set(WRT))["q"][0]).any(-1))
    assert known["allowed"].on
    assert found[0].all()
    monkeypatch.undo()
    return np.stack(found[1:], -1)


def exact(given, seen):
    """dq, dk, dv in float64 of the pairs (Hq,Lq,Lk) `seen`, by the weights and δ that all visible pairs make."""
    spec, inputs, cotangents = given
    q, k, v = (inputs[n][0].astype(np.float64) for n in WRT)
    dout, dlse = (cotangents[n][0].astype(np.float64) for n in ("out", "lse"))
    share = q.shape[0] // k.shape[0]
    wide = [np.repeat(a, share, 0) for a in (k, v)]
    away = np.arange(LENGTH)[None, :] - np.arange(LENGTH)[:, None]
    s = 0.25 * q @ wide[0].transpose(0, 2, 1) - inputs["slopes"][:, None, None] * np.abs(away).astype(np.float64)
    s = np.where(away <= 0, s, -np.inf) if spec.causal else s
    m = s.max(-1, keepdims=True)
    z = np.exp(s - m).sum(-1, keepdims=True)
    if "sink" in inputs:
        z += np.exp(inputs["sink"].astype(np.float64)[:, None, None] - m)
    p = np.exp(s - m) / z
    dp = dout @ wide[1].transpose(0, 2, 1)
    ds = 0.25 * np.where(seen, p * (dp - (p * dp).sum(-1, keepdims=True) + dlse[..., None]), 0)
    found = ds @ wide[0], ds.transpose(0, 2, 1) @ q, np.where(seen, p, 0).transpose(0, 2, 1) @ dout
    return [found[0], *(a.reshape(-1, share, *a.shape[1:]).sum(1) for a in found[1:])]


def bounds_of(given):
    """The published bounds of dq, dk, dv."""
    spec, inputs, cotangents = given
    checked = api.build(spec, inputs, None, ("out", "lse"))
    found = checked.differentiate(BoundSpace(FLOAT32).real, cotangents, WRT)
    return [found[f"d{n}"].e[0] for n in WRT]


def norms_of(a):
    """For each head and channel, over keys."""
    return np.stack([np.abs(a).sum(1), np.sqrt((a * a).sum(1))])


def shares_of(given, gone, whole, e):
    """The most of the bounds of dq, element by element, and dk and dv, head by head, that hidden pairs take."""
    visible = np.tri(LENGTH, dtype=bool) if given[0].causal else np.ones((LENGTH, LENGTH), bool)
    less = exact(given, visible & ~gone)
    assert (less[0] != whole[0]).any()
    changes = [np.abs(less[0] - whole[0]), *(norms_of(a - b) for a, b in zip(less[1:], whole[1:], strict=True))]
    bounds = [e[0], *(norms_of(bound) for bound in e[1:])]
    # A bound of 0 allows nothing, and one of infinity anything.
    with np.errstate(invalid="ignore", divide="ignore"):
        parts = [np.where(a == 0, 0, a / b) for a, b in zip(changes, bounds, strict=True)]
    return [part.max() for part in parts]


def change(given, kind):
    _, inputs, cotangents = given
    dout = cotangents["out"]
    if kind == "long key":
        inputs["k"][0, 0, 100] *= 60
    if kind == "large value":
        inputs["v"][0, 0, 100, 5] = 1e30
    if kind == "large cotangent":
        dout[0, 0, 600] = 1e30
    if kind == "one row":
        dout[0, :, :690], cotangents["lse"][0, :, :690] = 0, 0
    if kind == "zero columns":
        inputs["k"][..., 3], inputs["q"][..., 4], dout[..., 5] = 0, 0, 0
    if kind == "off centre":
        inputs["k"] += 4 * rng_of(kind).standard_normal(16).astype(np.float32)
    if kind == "tight":
        # Logits are what they are bounded by, and so are |dP|: the bias alone tells keys apart.
        inputs["q"][:], inputs["k"][:], cotangents["lse"][:] = 1.0, 1.0, 0.0
        inputs["slopes"][:] = 0.1, 0.08
        sign = rng_of(kind).choice([-1.0, 1.0], (2, 2, LENGTH, 1))
        inputs["v"][0], dout[0] = sign
    if kind == "sink":
        inputs["sink"] = np.array([30.0, -3.0], np.float32)
    if kind == "small":
        dout *= np.float32(1e-12)
        cotangents["lse"] *= np.float32(1e-12)


def rng_of(kind):
    return np.random.default_rng(len(kind))


KINDS = {
    "normal": {},
    "both sides": {"causal": False},
    "grouped": {"heads": 4, "groups": 2},
    **{
        n: {}
        for n in (
            "tight",
            "long key",
            "large value",
            "large cotangent",
            "one row",
            "zero columns",
            "off centre",
            "sink",
            "small",
        )
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_left_out_is_within_its_share_of_the_published_bounds(kind, rng, monkeypatch):
    given = problem_of(rng, **KINDS[kind])
    change(given, kind)
    visible = np.tri(LENGTH, dtype=bool) if given[0].causal else np.ones((LENGTH, LENGTH), bool)
    gone = np.repeat(left_out(given, monkeypatch), KEYS, -1) & visible
    assert gone[1].mean() > 0.1
    if kind in {"large value", "long key"}:
        assert not gone[0, 0].any() or gone[0].mean() < gone[1].mean()
    whole, e = exact(given, visible), bounds_of(given)
    assert max(shares_of(given, gone, whole, e)) <= skipping.EPSILON * (1 + 1e-6)
    found = gradients_of(*given)
    assert (np.abs(found["dq"][0] - whole[0]) <= e[0]).all()
    for n, b, bound in zip(("dk", "dv"), whole[1:], e[1:], strict=True):
        assert (norms_of(found[n][0] - b) <= norms_of(bound)).all()


def test_a_share_far_too_large_is_noticed(rng, monkeypatch):
    """The worst case is far off: Cauchy, tiles taken for their nearest key, terms of the bounds not counted."""
    given = problem_of(rng)
    change(given, "tight")
    visible, real = np.tri(LENGTH, dtype=bool), sparing._sides
    monkeypatch.setattr(sparing, "_sides", lambda *x: (s := real(*x))._replace(least=s.least + np.float32(30)))
    gone = np.repeat(left_out(given, monkeypatch), KEYS, -1) & visible
    assert min(shares_of(given, gone, exact(given, visible), bounds_of(given))) > skipping.EPSILON


def test_a_share_leaves_out_more_than_weights_of_0(rng, monkeypatch):
    plain, real = left_out(problem_of(rng), monkeypatch), sparing.allowed
    monkeypatch.setattr(sparing, "allowed", lambda *x, by_share: real(*x, by_share=False))
    assert plain.sum() > left_out(problem_of(rng), monkeypatch).sum() + 200


@pytest.mark.parametrize("name", ["slopes", "softcap", "turned off"])
def test_where_there_is_no_share_no_bit_changes(name, rng, monkeypatch):
    spec, inputs, cotangents = problem_of(rng, slope=1.0)
    if name == "softcap":
        spec = ra.SDPA(causal="top_left", softcap=20.0, bias=spec.bias)
    if name == "turned off":
        monkeypatch.setenv(skipping.VARIABLE, "0")
    wrt = (*WRT, "slopes") if name == "slopes" else WRT
    found = gradients_of(spec, inputs, cotangents, wrt)
    monkeypatch.setattr(adjoint, "norms", lambda *x: skipping._NONE)
    for n, whole in gradients_of(spec, inputs, cotangents, wrt).items():
        same(found[n], whole)


def test_a_far_key_that_weighs_most_is_read(rng):
    """A key parallel to a query far from it, so long that the bias does not matter."""
    given = problem_of(rng)
    inputs = given[1]
    inputs["k"][0, :, 40] = inputs["q"][0, :, 700] * 100.0
    found, whole = gradients_of(*given), exact(given, np.tri(LENGTH, dtype=bool))
    assert np.abs(whole[2][:, 40]).max() > 0.5
    for n, b, e in zip(("dq", "dk", "dv"), whole, bounds_of(given), strict=True):
        assert (np.abs(found[n][0] - b) <= e).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("name", ["q", "k", "v", "out", "lse"])
def test_a_far_number_that_is_not_finite_reaches_all_that_it_would_reach(name, bad, rng, monkeypatch):
    given = problem_of(rng, slope=1.0)
    arrays = given[1] if name in given[1] else given[2]
    arrays[name][0, 0, 10 if name in {"k", "v"} else 690] = bad
    found = gradients_of(*given)
    monkeypatch.setenv(skipping.VARIABLE, "0")
    for n, other in gradients_of(*given).items():
        same(np.isfinite(found[n]), np.isfinite(other))
    if name == "out":
        assert not np.isfinite(found["dv"][0, 0, :691]).any()
    elif name in {"k", "v"}:
        assert not np.isfinite(found["dq"][0, 0, 10:]).any()
    else:
        assert not np.isfinite(found["dk"][0, 0, :691]).any()
    assert np.isfinite(found["dk"][0, 1]).all()


@pytest.mark.parametrize("groups", [2, 1])
def test_threads_change_no_bit(groups, rng, monkeypatch):
    monkeypatch.setattr(pool, "_SMALL", 0)
    given, found = problem_of(rng, groups=groups), []
    for threads in ("1", "2", "3"):
        monkeypatch.setenv(pool.VARIABLE, threads)
        found.append(gradients_of(*given))
    for other in found[1:]:
        for n in other:
            same(other[n], found[0][n])
