import math
from fractions import Fraction

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn.errors import SpecError

SIZES = {
    "one_head": (1, 1, 1, 3, 4, 2, 3),
    "grouped": (2, 6, 2, 3, 5, 4, 2),
    "one_kv_head": (1, 4, 1, 5, 3, 3, 4),
}
EVERY = ("out", "lse", "dq", "dk", "dv")


def column(values):
    """A vector as the keys or values of one head: (1, 1, L, 1)."""
    return np.array(values, np.float64).reshape(1, 1, -1, 1)


def logs(weights):
    """q and k whose softmax weights are proportional to the numbers given, scale 1."""
    return column([1.0]), column([math.log(w) for w in weights])


def sdpa(**options):
    return ra.spec("sdpa", **options)


def inputs_of(a, **more):
    return {name: a[name] for name in ("q", "k", "v")} | more


def compare_with_loops(a, options, more, **plain):
    """Every output and gradient against plain_loops; gives what was found, and what the loops say."""
    lists = [a[name].tolist() for name in ("q", "k", "v", "dout", "dlse")]
    scale = options.get("scale") or 1 / math.sqrt(a["q"].shape[3])
    expected = loops.attention(*lists, scale=scale, **({"sees": lambda *_: True} | plain))
    found = forward_and_gradients(sdpa(**options), inputs_of(a, **more), a["dout"], a["dlse"])
    for name in EVERY:
        near(found[name], expected[name])
    return found, expected


# Numbers worked by hand


def test_weights_1_2_4_of_values_7_14_28():
    q, k = logs([1, 2, 4])
    result = ra.evaluate(sdpa(scale=1.0), {"q": q, "k": k, "v": column([7, 14, 28])}, want=("out", "lse"))
    near(result.out, [[[[Fraction(7 + 28 + 112, 7)]]]])
    near(result.lse, [[[math.log(7)]]])


def test_a_sink_of_weight_1_turns_sevenths_into_eighths():
    q, k = logs([1, 2, 4])
    result = ra.evaluate(
        sdpa(scale=1.0), {"q": q, "k": k, "v": column([8, 16, 32]), "sink": np.zeros(1)}, want=("out", "lse")
    )
    near(result.out, [[[[1 + 4 + 16]]]])
    near(result.lse, [[[math.log(8)]]])


def test_the_gradients_of_two_keys_by_hand():
    """Weights 1/4 and 3/4 of values 0 and 16: out 12; dS = p (v − out) = (−3, 3); dq = Σ dS k, dk = dS q, dv = p."""
    q, k = logs([1, 3])
    g = ra.vjp(sdpa(scale=1.0), {"q": q, "k": k, "v": column([0, 16])}, {"out": np.ones((1, 1, 1, 1))})
    near(g.dv, column([0.25, 0.75]))
    near(g.dk, column([-3, 3]))
    near(g.dq, column([3 * math.log(3)]))


def test_the_default_scale_is_one_over_the_root_of_the_query_width_not_of_the_value_width():
    """q·k = 16 ln 2 over √16 is 4 ln 2: weights 1 and 16, whatever Dv."""
    q, k = np.ones((1, 1, 1, 16)), np.zeros((1, 1, 2, 16))
    k[0, 0, 1] = math.log(2)
    near(ra.attention(q, k, np.array([[[[0.0] * 3, [17.0] * 3]]])), [[[[16.0] * 3]]])


def test_softcap_comes_before_the_bias():
    """2 tanh(s/2) with s = 2 artanh(1/2) is 1; the bias ln 2 is added whole, so the odds are 2e to 1."""
    s = 2 * math.atanh(0.5)
    bias = np.array([[math.log(2), 0.0]])
    out = ra.attention(column([1]), column([s, 0]), column([1, 0]), scale=1.0, softcap=2.0, bias=bias)
    near(out, [[[[2 * math.e / (2 * math.e + 1)]]]])


def test_softcap_comes_before_the_mask():
    """A logit that is masked after the cap keeps no mass; masked before it, it would sit at −c and keep some."""
    out = ra.attention(column([1]), column([0, 0]), column([1, 5]), softcap=2.0, mask=np.array([[True, False]]))
    same(out, column([1.0]))


# Against four plain loops


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("scale", [None, 0.75])
def test_plain(rng, sizes, scale):
    compare_with_loops(qkv(rng, sizes), {"scale": scale}, {})


@pytest.mark.parametrize("lengths", [(3, 5), (5, 3), (4, 4), (1, 6)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("causal", ["top_left", "bottom_right"])
def test_causal_alignment(rng, causal, lengths):
    lq, lk = lengths
    offset = 0 if causal == "top_left" else lk - lq
    a = qkv(rng, (1, 2, 1, lq, lk, 2, 3))
    compare_with_loops(a, {"causal": causal}, {}, sees=lambda b, h, i, j: j <= i + offset)


def test_causal_true_is_either_alignment_of_a_square(rng):
    a = inputs_of(qkv(rng, (1, 2, 2, 4, 4, 3, 2)))
    found = [ra.evaluate(sdpa(causal=c), a).out for c in (True, "top_left", "bottom_right")]
    same(found[0], found[1])
    same(found[0], found[2])


def test_causal_true_of_an_oblong_is_refused_by_naming_both_alignments(rng):
    a = inputs_of(qkv(rng, (1, 1, 1, 2, 3, 2, 2)))
    with pytest.raises(SpecError, match=r"(?s)Lq=2.*Lk=3.*top_left.*bottom_right"):
        ra.evaluate(sdpa(causal=True), a)


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("window", [(0, 0), (1, 2), (2, None), (None, 0), (None, None)], ids=str)
def test_a_window_holds_both_its_ends(rng, window, causal):
    left, right = (math.inf if side is None else side for side in window)
    offset = 0 if causal == "top_left" else 2

    def sees(b, h, i, j):
        ahead = j - (i + offset)
        return -left <= ahead <= right and not (causal and ahead > 0)

    compare_with_loops(qkv(rng, (1, 2, 1, 4, 6, 2, 2)), {"window": window, "causal": causal}, {}, sees=sees)


@pytest.mark.parametrize("cap", [0.5, 3, 50.0])
def test_softcap_bias_mask_and_sink_together(rng, cap):
    a = qkv(rng, SIZES["grouped"])
    bias, mask = rng.standard_normal((2, 6, 3, 5)), rng.random((2, 6, 3, 5)) < 0.7
    sink = rng.standard_normal(6)
    plain = {"sees": lambda *p: mask[p], "bias": lambda *p: bias[p], "softcap": cap, "sink": sink.tolist()}
    found, expected = compare_with_loops(a, {"softcap": cap}, {"bias": bias, "mask": mask, "sink": sink}, **plain)
    near(found["dbias"], expected["dbias"])
    near(found["dsink"], expected["dsink"])


@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (1, 5), (3, 5), (6, 1, 1), (2, 1, 3, 5), (1, 6, 1, 5)], ids=str)
def test_a_bias_of_any_shape_that_broadcasts(rng, shape):
    a = qkv(rng, SIZES["grouped"])
    bias = rng.standard_normal(shape)
    full = np.broadcast_to(bias, (2, 6, 3, 5))
    found, expected = compare_with_loops(a, {}, {"bias": bias}, bias=lambda *p: full[p])
    whole = np.array(expected["dbias"])
    summed = whole.sum(tuple(n for n in range(4) if n < 4 - len(shape) or shape[n - 4] == 1), keepdims=True)
    near(found["dbias"], summed.reshape(shape))


@pytest.mark.parametrize("shape", [(), (5,), (3, 1), (2, 1, 1, 5)], ids=str)
def test_a_mask_of_any_shape_that_broadcasts(rng, shape):
    mask = rng.random(shape) < 0.6
    full = np.broadcast_to(mask, (2, 6, 3, 5))
    compare_with_loops(qkv(rng, SIZES["grouped"]), {}, {"mask": mask}, sees=lambda *p: full[p])


@pytest.mark.parametrize("ids", [("shared", [[0, 0, 7, 7], [1, 1, 1, 2]]), ("row", [3, 3, 3, -1])], ids=lambda p: p[0])
def test_only_equal_segments_see_each_other(rng, ids):
    segments = np.array(ids[1])
    full = np.broadcast_to(segments, (2, 4))
    more = {"q_segment_ids": segments, "k_segment_ids": segments}
    a = qkv(rng, (2, 2, 1, 4, 4, 3, 2))
    compare_with_loops(a, {"causal": True}, more, sees=lambda b, h, i, j: j <= i and full[b, i] == full[b, j])
    pair = ra.attention(*(a[n] for n in "qkv"), causal=True, segment_ids=(segments, segments))
    same(ra.attention(*(a[n] for n in "qkv"), causal=True, segment_ids=segments), pair)


@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
def test_lengths_and_the_alignment_are_those_of_each_sequence(rng, causal):
    lq, lk = [3, 0, 4], [5, 2, 3]

    def sees(b, h, i, j):
        offset = 0 if causal == "top_left" else lk[b] - lq[b]
        return i < lq[b] and j < lk[b] and (not causal or j <= i + offset)

    more = {"q_lengths": np.array(lq), "kv_lengths": np.array(lk)}
    compare_with_loops(qkv(rng, (3, 2, 2, 4, 5, 2, 3)), {"causal": causal}, more, sees=sees)


def test_given_positions_decide_causality_and_windows(rng):
    at_q, at_k = np.array([[10, 3, 0], [2, 2, 9]]), np.array([4, 0, 10, 3])

    def sees(b, h, i, j):
        return 0 <= at_q[b, i] - at_k[j] <= 6

    more = {"q_positions": at_q, "k_positions": at_k}
    compare_with_loops(qkv(rng, (2, 2, 1, 3, 4, 2, 2)), {"causal": "top_left", "window": (6, 0)}, more, sees=sees)


@pytest.mark.parametrize("probability", [0.75, 1.0])
def test_the_keep_mask_divides_after_the_softmax_and_leaves_lse_alone(rng, probability):
    a = qkv(rng, SIZES["grouped"])
    keep = rng.random((2, 6, 3, 5)) < probability
    options = {"keep_probability": probability}
    compare_with_loops(a, options, {"keep": keep}, keep=lambda *p: float(keep[p]) / probability)
    kept = ra.evaluate(sdpa(**options), inputs_of(a, keep=keep), want=("lse",)).lse
    same(kept, ra.evaluate(sdpa(), inputs_of(a), want=("lse",)).lse)


# Heads


def test_query_head_h_reads_key_head_h_over_the_group():
    """Four query heads over two: 0 and 1 read the first, 2 and 3 the second; a remainder would give 0 1 0 1."""
    v = np.array([10.0, 20.0]).reshape(1, 2, 1, 1)
    out = ra.attention(np.zeros((1, 4, 1, 1)), np.zeros((1, 2, 1, 1)), v)
    same(out.ravel(), np.array([10.0, 10.0, 20.0, 20.0]))


def test_heads_and_sequences_do_not_touch_each_other(rng):
    a = qkv(rng, (3, 4, 2, 4, 5, 2, 3))
    whole = ra.attention(a["q"], a["k"], a["v"])
    for b in range(3):
        for h in range(4):
            one = ra.attention(*(a[n][b : b + 1, [g]] for n, g in (("q", h), ("k", h // 2), ("v", h // 2))))
            near(one[0, 0], whole[b, h])


# Laws


def test_keys_in_another_order_give_the_same_answer(rng):
    a = qkv(rng, (1, 2, 1, 3, 6, 4, 2))
    order = rng.permutation(6)
    moved = a | {name: a[name][:, :, order] for name in ("k", "v")}
    one, other = (forward_and_gradients(sdpa(), inputs_of(x), a["dout"], a["dlse"]) for x in (a, moved))
    for name in ("out", "lse", "dq"):
        near(one[name], other[name])
    for name in ("dk", "dv"):
        near(one[name][:, :, order], other[name])


@pytest.mark.parametrize("with_sink", [False, True], ids=["bare", "sink_in_the_first_part"])
def test_split_keys_merge_by_their_lse(rng, with_sink):
    a = qkv(rng, (2, 2, 1, 3, 7, 4, 2))
    sink = {"sink": rng.standard_normal(2)} if with_sink else {}
    whole = ra.evaluate(sdpa(), inputs_of(a, **sink), want=("out", "lse"))
    parts = [
        ra.evaluate(sdpa(), {"q": a["q"], "k": a["k"][:, :, s], "v": a["v"][:, :, s]} | extra, want=("out", "lse"))
        for s, extra in ((slice(0, 4), sink), (slice(4, 7), {}))
    ]
    lse = np.logaddexp(parts[0].lse, parts[1].lse)
    near(whole.lse, lse)
    near(whole.out, sum(p.out * np.exp(p.lse - lse)[..., None] for p in parts))


def test_packed_equals_padded_with_lengths_bit_for_bit_and_one_call_a_sequence(rng):
    """thd with cu_seqlens of 3, 0, 1 and 4 queries over 5, 2, 0 and 4 keys, ALiBi and causality included."""
    cu_q, cu_k = np.array([0, 3, 3, 4, 8]), np.array([0, 5, 7, 7, 11])
    q, k, v = (rng.standard_normal((n, h, d)) for n, h, d in ((8, 4, 3), (11, 2, 3), (11, 2, 2)))
    options = {"causal": "bottom_right", "bias": ra.ALiBi(), "window": (3, None)}
    packed = ra.attention(q, k, v, layout="thd", cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)
    padded = {n: np.full((4, w, *x.shape[1:]), np.nan) for n, w, x in (("q", 4, q), ("k", 5, k), ("v", 5, v))}
    for b in range(4):
        for name, x, cu in (("q", q, cu_q), ("k", k, cu_k), ("v", v, cu_k)):
            padded[name][b, : cu[b + 1] - cu[b]] = x[cu[b] : cu[b + 1]]
    by_length = ra.attention(
        *padded.values(), layout="bshd", q_lengths=np.diff(cu_q), kv_lengths=np.diff(cu_k), **options
    )
    for b in range(4):
        own_q, own_k = slice(cu_q[b], cu_q[b + 1]), slice(cu_k[b], cu_k[b + 1])
        alone = ra.attention(q[None, own_q], k[None, own_k], v[None, own_k], layout="bshd", **options)
        near(packed[own_q], alone[0])
        same(by_length[b, : cu_q[b + 1] - cu_q[b]], packed[own_q])
        assert not by_length[b, cu_q[b + 1] - cu_q[b] :].any()


# Sizes of zero are answered


@pytest.mark.parametrize(
    "sizes",
    [(0, 2, 1, 3, 3, 2, 2), (1, 2, 1, 0, 3, 2, 2), (1, 2, 1, 3, 0, 2, 2), (1, 2, 1, 3, 3, 0, 2), (1, 2, 1, 3, 3, 2, 0)],
    ids=["B", "Lq", "Lk", "D", "Dv"],
)
def test_a_size_of_zero_is_answered(rng, sizes):
    a = qkv(rng, sizes)
    found = forward_and_gradients(sdpa(), inputs_of(a, sink=np.zeros(2)), a["dout"], a["dlse"])
    for name in ("q", "k", "v"):
        assert found[f"d{name}"].shape == a[name].shape
    assert found["out"].shape == a["dout"].shape
    expected = np.log(sizes[4] + 1.0) if sizes[5] == 0 or sizes[4] == 0 else None
    if expected is not None:
        near(found["lse"], np.full_like(a["dlse"], expected))
