from fractions import Fraction

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn.errors import ShapeError, SpecError
from refattn.plan import Dense, Slope, execute
from refattn.variants._place import place
from refattn.variants.alibi_interpolation import lower_term, resolve, term


def bias(keys, /, heads=4, **options):
    """The logits (Hq, keys, keys) added to the scores of one sequence."""
    x = {"q": np.zeros((1, heads, keys, 1)), "k": np.zeros((1, heads, keys, 1))}
    spec = resolve(ra.ALiBiInterpolation(**options), {"Hq": heads})
    logits, allowed = term(spec, x, place(False, x))
    assert allowed is None
    return logits[0]


def penalties(slopes, length, share):
    """−m · share · |i − j| in exact rationals, rounded once."""
    return [[[float(-Fraction(m) * share * abs(i - j)) for j in range(length)] for i in range(length)] for m in slopes]


# The four heads' slopes are 2^-2, 2^-4, 2^-6, 2^-8
FOUR = (0.25, 0.0625, 0.015625, 0.00390625)


@pytest.mark.parametrize(
    ("length", "share"), [(3, 1), (6, 1), (7, Fraction(6, 7)), (12, Fraction(1, 2)), (18, Fraction(1, 3))]
)
def test_slopes_shrink_by_the_trained_length_over_the_length(length, share):
    expected = penalties(FOUR, length, share)
    near(bias(length, train_length=6), expected, 1e-15)
    near(bias(5, train_length=6, mode="static", length=length), penalties(FOUR, 5, share), 1e-15)


def test_by_hand():
    """Trained on 3 keys, given 6: slope 1 becomes 1/2, and the farthest key is 5/2 away instead of 5."""
    found = bias(6, heads=1, train_length=3, slopes=(1.0,))
    same(found[0, 5], np.array([-2.5, -2.0, -1.5, -1.0, -0.5, 0.0]))


# Identities


def test_the_bias_at_twice_the_length_is_that_of_half_integer_positions():
    """B'(2L)[i, j] is ALiBi's −m |i/2 − j/2|; at even i and j it is ALiBi's own matrix at the trained length."""
    found = bias(16, train_length=8)
    halves = np.arange(16) / 2
    same(found, -np.array(FOUR)[:, None, None] * np.abs(halves[:, None] - halves))
    same(found[:, ::2, ::2], bias(8, train_length=8))


@pytest.mark.parametrize("length", [6, 7, 11, 64, 1000])
def test_the_penalty_at_distance_l_stays_that_of_training(length):
    """m' L = m L_train: the farthest key, at L − 1, comes to m L_train (1 − 1/L)."""
    found = bias(length, train_length=6)
    near(found.min((1, 2)), -np.array(FOUR) * 6 * (1 - 1 / length), 1e-15)


@pytest.mark.parametrize("length", [1, 5, 9])
def test_up_to_the_trained_length_it_is_alibi(rng, length):
    a = qkv(rng, (2, 12, 4, length, length, 3, 3))
    x = {name: a[name] for name in "qkv"}
    for slopes in ("interleaved", "geometric", tuple(rng.random(12).tolist())):
        plain = ra.evaluate(ra.ALiBi(slopes=slopes), x, want=("out", "lse"))
        for options in ({}, {"mode": "static", "length": 8}):
            spec = ra.ALiBiInterpolation(train_length=9, slopes=slopes, **options)
            found = ra.evaluate(spec, x, want=("out", "lse"))
            same(found.out, plain.out)
            same(found.lse, plain.lse)


def test_dynamic_is_static_at_the_length_it_counts(rng):
    a = qkv(rng, (1, 4, 2, 3, 10, 3, 3))
    x = {name: a[name] for name in "qkv"}
    one, other = (
        ra.SDPA(causal="bottom_right", bias=ra.ALiBiInterpolation(train_length=4, **options))
        for options in ({}, {"mode": "static", "length": 10})
    )
    same(ra.evaluate(one, x).out, ra.evaluate(other, x).out)


def test_dynamic_counts_the_keys_of_each_sequence(rng):
    a = qkv(rng, (3, 2, 1, 4, 9, 3, 3))
    x = {name: a[name] for name in "qkv"}
    count = [9, 6, 2]
    spec = ra.SDPA(causal="bottom_right", bias=ra.ALiBiInterpolation(train_length=4))
    found = ra.evaluate(spec, x | {"kv_lengths": np.array(count)}).out
    for b, n in enumerate(count):
        alone = {"q": a["q"][b : b + 1], "k": a["k"][b : b + 1, :, :n], "v": a["v"][b : b + 1, :, :n]}
        near(found[b : b + 1], ra.evaluate(spec, alone).out)


def test_decoding_is_the_last_row_of_every_length_and_not_the_rows_of_one_pass(rng):
    a = qkv(rng, (1, 2, 2, 8, 8, 3, 3))
    spec = ra.SDPA(causal="bottom_right", bias=ra.ALiBiInterpolation(train_length=2))

    def attend(rows, keys):
        return ra.evaluate(spec, {"q": a["q"][:, :, rows], "k": a["k"][:, :, :keys], "v": a["v"][:, :, :keys]}).out

    near(attend([7], 8)[:, :, 0], attend(range(8), 8)[:, :, 7])
    assert np.abs(attend([4], 5)[:, :, 0] - attend(range(8), 8)[:, :, 4]).max() > 1e-3


# Against four plain loops


@pytest.mark.parametrize("lengths", [(6, 6), (4, 9), (9, 4)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("options", [{}, {"mode": "static", "length": 7}], ids=["dynamic", "static"])
def test_both_modes_and_every_alignment(rng, options, causal, lengths):
    lq, lk = lengths
    a = qkv(rng, (2, 4, 2, lq, lk, 3, 2))
    slopes = rng.random(4).tolist()
    length, offset = options.get("length", lk), 0 if causal == "top_left" else lk - lq
    share = 5 / length if length > 5 else 1.0
    spec = ra.SDPA(causal=causal, bias=ra.ALiBiInterpolation(train_length=5, slopes=tuple(slopes), **options))
    found = forward_and_gradients(spec, {name: a[name] for name in "qkv"}, a["dout"], a["dlse"])
    expected = loops.attention(
        *(a[n].tolist() for n in ("q", "k", "v", "dout", "dlse")),
        scale=3**-0.5,
        sees=lambda b, h, i, j: not (causal and j > i + offset),
        bias=lambda b, h, i, j: -slopes[h] * share * abs(i + offset - j),
    )
    for name in ("out", "lse", "dq", "dk", "dv"):
        near(found[name], expected[name])


# The plan


@pytest.mark.parametrize(
    ("count", "kind"), [([9, 9], Slope), ([4, 2], Slope), ([9, 6], Dense)], ids=["equal", "both short", "different"]
)
def test_slopes_stay_slopes_unless_sequences_differ(rng, count, kind):
    a = qkv(rng, (2, 4, 2, 3, 9, 3, 3))
    x = {name: a[name] for name in "qkv"} | {"kv_lengths": np.array(count)}
    spec = resolve(ra.ALiBiInterpolation(train_length=4), {"Hq": 4})
    (lowered,) = lower_term(spec, x, place("bottom_right", x))
    assert isinstance(lowered, kind)


def test_no_sequence_at_all():
    x = dict.fromkeys("qkv", np.zeros((0, 2, 3, 4))) | {"kv_lengths": np.zeros(0, int)}
    assert ra.evaluate(ra.ALiBiInterpolation(train_length=1), x).out.shape == (0, 2, 3, 4)
    problem = ra.api.build(ra.ALiBiInterpolation(train_length=1), x, "float64", ("out",))
    assert execute(problem.plan)["out"].shape == (0, 2, 3, 4)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_length": 0}, "train_length is a positive integer where mode='dynamic'; given: 0"),
        ({"train_length": 8.0}, "train_length is a positive integer"),
        ({"train_length": True}, "train_length is a positive integer"),
        ({"mode": "linear"}, "mode is 'static' or 'dynamic'; given: 'linear'"),
        ({"mode": "static"}, "length is a positive integer where mode='static'; given: None"),
        ({"mode": "static", "length": -4}, "length is a positive integer"),
        ({"length": 8}, "length needs mode='static'"),
        ({"slopes": "learned"}, "nothing is learned here"),
        ({"slopes": "linear"}, "'interleaved', 'geometric', 'learned'"),
        ({"slopes": [0.5]}, "tuple of numbers"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.ALiBiInterpolation(**options)


def test_slopes_of_another_number_of_heads():
    q = np.zeros((1, 3, 2, 4))
    with pytest.raises(ShapeError, match="2 numbers for Hq=3"):
        ra.evaluate(ra.ALiBiInterpolation(slopes=(0.5, 0.25)), {"q": q, "k": q, "v": q})
