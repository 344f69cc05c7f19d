"""Rows that see nothing, and numbers that are none: what is masked touches nothing, what is live spoils its row."""

import numpy as np
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn.errors import ShapeError

GROUPED = (2, 6, 2, 3, 5, 4, 2)
EVERY = ("out", "lse", "dq", "dk", "dv")


def sdpa(**options):
    return ra.spec("sdpa", **options)


def inputs_of(a, **more):
    return {name: a[name] for name in ("q", "k", "v")} | more


# Rows that see nothing


@pytest.mark.parametrize("how", ["mask", "bias", "causal", "lengths", "segments", "window"])
def test_a_row_that_sees_nothing_is_0_with_lse_minus_infinity_and_no_gradient(rng, how):
    a = qkv(rng, (1, 2, 1, 3, 3, 2, 2))
    empty, options, more = [0], {}, {}
    if how == "mask":
        more["mask"] = np.array([[False] * 3, [True] * 3, [True] * 3])
    elif how == "bias":
        more["bias"] = np.array([[-np.inf] * 3, [0.0] * 3, [-np.inf, 0.0, -np.inf]])
    elif how == "causal":
        a = qkv(rng, (1, 2, 1, 3, 2, 2, 2))
        options["causal"] = "bottom_right"
    elif how == "lengths":
        more["kv_lengths"], empty = np.array([0]), [0, 1, 2]
    elif how == "segments":
        more |= {"q_segment_ids": np.array([5, 0, 0]), "k_segment_ids": np.array([0, 0, 1])}
    else:
        options["window"] = (0, 0)
        more["k_positions"], more["q_positions"] = np.array([1, 2, 3]), np.array([0, 1, 2])
    found = forward_and_gradients(sdpa(**options), inputs_of(a, **more), a["dout"], a["dlse"])
    assert not found["out"][:, :, empty].any()
    assert not found["dq"][:, :, empty].any()
    assert np.isneginf(found["lse"][:, :, empty]).all()
    assert np.isfinite(np.delete(found["lse"], empty, 2)).all()
    if how == "lengths":
        assert not found["dk"].any()
        assert not found["dv"].any()


def test_an_empty_row_with_a_sink_has_its_lse_and_hands_it_the_cotangent(rng):
    a = qkv(rng, (1, 2, 1, 1, 3, 2, 2))
    sink = rng.standard_normal(2)
    found = forward_and_gradients(sdpa(), inputs_of(a, sink=sink, mask=np.array(False)), a["dout"], a["dlse"])
    same(found["lse"], sink.reshape(1, 2, 1))
    same(found["dsink"], a["dlse"].reshape(2))
    for name in ("out", "dq", "dk", "dv"):
        assert not found[name].any()


def test_a_huge_sink_stands_inside_the_maximum(rng):
    """Outside it exp(900 − m) would overflow; out then is e^−900 of what it was, a subnormal above 0."""
    a = qkv(rng, (1, 1, 1, 2, 3, 2, 2))
    result = ra.evaluate(sdpa(), inputs_of(a, sink=np.array([700.0])), want=("out", "lse"))
    near(result.lse, np.full((1, 1, 2), 700.0))
    bare = ra.evaluate(sdpa(), inputs_of(a), want=("out", "lse"))
    near(result.out, bare.out * np.exp(bare.lse - 700.0)[..., None], 1e-11)


# Numbers that are not numbers


def test_minus_infinity_in_a_bias_equals_a_mask(rng):
    a = qkv(rng, GROUPED)
    mask = rng.random((3, 5)) < 0.6
    one = forward_and_gradients(sdpa(), inputs_of(a, mask=mask), a["dout"], a["dlse"])
    other = forward_and_gradients(sdpa(), inputs_of(a, bias=np.where(mask, 0.0, -np.inf)), a["dout"], a["dlse"])
    for name in EVERY:
        same(other[name], one[name])
    assert not other["dbias"][~mask].any()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 1e30, 1e300])
@pytest.mark.parametrize("scale", [None, 0.0])
def test_what_a_masked_slot_holds_touches_nothing(rng, poison, scale):
    """The last two keys are out of everybody's sight, and the last query sees nothing; 0 · 1e600 is no number."""
    a = qkv(rng, (1, 4, 2, 3, 5, 2, 3))
    live = np.array([[True] * 3 + [False] * 2] * 2 + [[False] * 5])
    dirty = {name: a[name].copy() for name in ("q", "k", "v")}
    dirty["q"][:, :, 2], dirty["k"][:, :, 3:], dirty["v"][:, :, 3:] = poison, poison, poison
    bias = np.where(live, 0.25, poison if poison != np.inf else np.nan)
    options = {"scale": scale, "softcap": 5.0}
    x = inputs_of(a, mask=live, bias=np.where(live, 0.25, 0))
    clean = forward_and_gradients(sdpa(**options), x, a["dout"], a["dlse"])
    found = forward_and_gradients(sdpa(**options), dirty | {"mask": live, "bias": bias}, a["dout"], a["dlse"])
    for name in (*EVERY, "dbias"):
        same(found[name], clean[name])


@pytest.mark.parametrize(
    ("slot", "poison"), [(s, x) for s in "qkv" for x in (np.nan, np.inf, -np.inf)] + [("bias", np.nan)]
)
def test_a_live_slot_makes_the_rows_nan_that_see_it_and_no_others(rng, slot, poison):
    """Causal over two key heads: key 2 of the second is seen by queries 2 and 3 of query heads 2 and 3.

    Backwards, a row that is NaN spoils dq of its query and dk of every key it sees; dv is made of weights, which a
    value cannot spoil.
    """
    a = qkv(rng, (1, 4, 2, 4, 4, 2, 3))
    more = {"bias": np.zeros((1, 4, 4, 4))}
    hit = np.zeros((1, 4, 4), bool)
    if slot == "bias":
        more["bias"][0, 3, 3, 1] = poison
        hit[0, 3, 3] = True
    elif slot == "q":
        a["q"][0, 1, 2, 0] = poison
        hit[0, 1, 2] = True
    else:
        a[slot][0, 1, 2, 1] = poison
        hit[0, 2:, 2:] = True
    spec, x = sdpa(causal=True), inputs_of(a, **more)
    found = ra.evaluate(spec, x, want=("out", "lse"))
    columns = np.arange(3) == 1 if slot == "v" else np.ones(3, bool)
    same(np.isnan(found.out), hit[..., None] & columns)
    same(np.isnan(found.lse), hit if slot != "v" else np.zeros_like(hit))
    g = ra.vjp(spec, x, {"out": a["dout"]})
    same(np.isnan(g.dq), np.repeat(hit[..., None], 2, -1))
    sees = np.tril(np.ones((4, 4), bool))
    by_key = (hit[:, :, :, None] & sees).any(2).reshape(1, 2, 2, 4).any(2)
    same(np.isnan(g.dk), np.repeat(by_key[..., None], 2, -1))
    same(np.isnan(g.dv), np.repeat(by_key[..., None], 3, -1) & (slot != "v"))


@pytest.mark.parametrize("name", ["bias", "sink"])
def test_plus_infinity_is_refused_where_no_softmax_can_weigh_it(rng, name):
    a = qkv(rng, (1, 2, 1, 2, 2, 2, 2))
    shape = {"bias": (2, 2), "sink": (2,)}[name]
    with pytest.raises(ShapeError, match=f"{name} holds"):
        ra.evaluate(sdpa(), inputs_of(a, **{name: np.full(shape, np.inf)}))


def test_a_nan_in_a_sink_spoils_its_head_alone(rng):
    a = qkv(rng, (1, 2, 1, 2, 2, 2, 2))
    out = ra.attention(a["q"], a["k"], a["v"], sink=np.array([np.nan, 0.0]))
    assert np.isnan(out[:, 0]).all()
    assert np.isfinite(out[:, 1]).all()


@pytest.mark.parametrize("with_sink", [False, True])
def test_a_cotangent_that_is_no_number_stays_out_of_the_gradients_where_its_row_sees_nothing(rng, with_sink):
    a = qkv(rng, (1, 2, 1, 3, 4, 2, 2))
    mask = np.array([[True], [False], [True]])
    more = {"mask": mask} | ({"sink": np.zeros(2)} if with_sink else {})
    found = ra.vjp(sdpa(), inputs_of(a, **more), {"out": np.where(mask, a["dout"], np.nan)})
    clean = ra.vjp(sdpa(), inputs_of(a, **more), {"out": np.where(mask, a["dout"], 0.0)})
    for name in clean:
        same(found[name], clean[name])
