import math
from fractions import Fraction

import ml_dtypes
import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn.errors import ShapeError, SpecError
from refattn.variants.t5 import bucket, edges

KINDS = {
    "32 to 128": {},
    "32 to 128, bidirectional": {"bidirectional": True},
    "64 to 256": {"buckets": 64, "max_distance": 256},
    "32 to 256": {"max_distance": 256},
    "odd": {"buckets": 7, "max_distance": 11},
    "odd sides": {"buckets": 6, "max_distance": 9, "bidirectional": True},
    "least": {"buckets": 2, "max_distance": 2},
    "least, bidirectional": {"buckets": 4, "max_distance": 2, "bidirectional": True},
}
EVERY = pytest.mark.parametrize("options", KINDS.values(), ids=KINDS)


def by_fractions(r, buckets=32, max_distance=128, bidirectional=False):
    """The definition in exact rationals: (n/e)^(N−e) ≥ (M/e)^b counts one bucket more for each b that holds."""
    count = buckets // 2 if bidirectional else buckets
    n = abs(r) if bidirectional else max(-r, 0)
    e = count // 2
    found = n
    if n >= e:
        grown, step = Fraction(n, e) ** (count - e), Fraction(max_distance, e)
        found = e + sum(grown >= step**b for b in range(1, count - e))
    return found + (count if bidirectional and r > 0 else 0)


def as_models_compute(n, real, e=16, count=32, max_distance=128):
    """Buckets of distances n ≥ e with every operation rounded to a type."""
    ratio = real(np.log(real(real(n) / real(e))))
    share = real(ratio / real(np.log(max_distance / e)))
    return np.minimum(e + (real(share * real(count - e))).astype(np.float64).astype(int), count - 1)


def loop_bias(table, options, offset):
    return lambda h, i, j: table[by_fractions(j - i - offset, **options), h]


# Buckets


@EVERY
def test_buckets_are_those_of_exact_rationals(options):
    spec = ra.T5(**options)
    distances = range(-600, 601)
    expected = [by_fractions(r, **options) for r in distances]
    assert [bucket(spec, r) for r in distances] == expected
    # Bidirectional, the first bucket of the second half would be a key ahead at distance 0.
    unused = {spec.buckets // 2} if spec.bidirectional else set()
    assert set(expected) == set(range(spec.buckets)) - unused


@EVERY
def test_edges_are_where_the_bucket_changes(options):
    spec = ra.T5(**options)
    side = spec.buckets // 2 if spec.bidirectional else spec.buckets
    assert [by_fractions(-n, **options) for n in edges(spec).tolist()] == list(range(side))
    assert [by_fractions(1 - n, **options) for n in edges(spec).tolist()[1:]] == list(range(side - 1))


def test_the_default_edges_by_hand():
    """16 · 8^(b/16) = 16 · 2^(3b/16), rounded up: 18.2, 20.7, 23.6, ..., 112.3."""
    expected = [16, 19, 21, 24, 27, 31, 35, 40, 46, 52, 59, 67, 77, 87, 99, 113]
    assert edges(ra.T5()).tolist() == [*range(16), *expected]


def test_an_edge_that_a_distance_meets_exactly():
    """Bidirectional, 8 · 16^(b/8) = 8 · 2^(b/2): 16, 32 and 64 open their buckets, where a logarithm may fall short."""
    spec = ra.T5(bidirectional=True)
    assert edges(spec).tolist() == [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]
    assert [bucket(spec, r) for r in (-15, -16, -31, -32, -63, -64)] == [9, 10, 11, 12, 13, 14]


def test_keys_ahead_have_bucket_0_or_the_second_half():
    assert [bucket(ra.T5(), r) for r in (0, 1, 1000)] == [0, 0, 0]
    two_sided = ra.T5(bidirectional=True)
    assert [bucket(two_sided, r) for r in (-1000, -1, 0, 1, 1000)] == [15, 1, 0, 17, 31]


def test_distances_that_no_float_holds():
    spec = ra.T5(max_distance=2**52)
    assert [bucket(spec, -(2**52) + d) for d in (-1, 0, 1)] == [31, 31, 31]
    assert bucket(spec, -(2**4) * 2**3 + 1) == 16  # 16 · 2^(48 b/16): every bucket is 8 times as far
    assert bucket(spec, -(2**4) * 2**3) == 17


@pytest.mark.parametrize(
    ("max_distance", "flips"),
    [(128, [76, 112]), (256, [38, 76, 90, 107, 127, 151, 152, 179, 180, 181, 213, 214, 215])],
)
def test_bfloat16_puts_distances_into_the_next_bucket_and_float32_none(max_distance, flips):
    n = np.arange(16, 300)
    exact = np.array([bucket(ra.T5(max_distance=max_distance), -int(d)) for d in n])

    def bfloat16(x):
        return np.asarray(x, ml_dtypes.bfloat16)

    found = {real: as_models_compute(n, real, max_distance=max_distance) for real in (bfloat16, np.float32)}
    assert n[found[bfloat16] != exact].tolist() == flips
    assert (found[bfloat16] - exact).max() == 1
    same(found[np.float32], exact)


# Numbers worked by hand: with table (0, ln 2), buckets 0 and 1, a key before the query weighs 2 and itself 1


def test_out_and_the_gradient_of_the_table_are_rational():
    zero, values = np.zeros((1, 1, 3, 1)), [7, 2, 1]
    x = {"q": zero, "k": zero, "v": np.array(values, float).reshape(1, 1, 3, 1)}
    x["t5_table"] = np.array([[0.0], [math.log(2)]])
    spec = ra.T5(buckets=2, max_distance=2)
    # Rows: 7; (2·7 + 2)/3; (2·7 + 2·2 + 1)/5.
    near(ra.evaluate(spec, x).out.ravel(), [7, 16 / 3, 19 / 5])
    # dtable[1] = Σ p (v − out): 2/3 (7 − 16/3) + 2/5 (7 − 19/5) + 2/5 (2 − 19/5); dtable[0] the negative of it.
    slope = Fraction(2, 3) * (7 - Fraction(16, 3)) + Fraction(2, 5) * (9 - Fraction(38, 5))
    assert slope == Fraction(5 * 50 + 9 * 14, 225)
    near(ra.vjp(spec, x, {"out": np.ones((1, 1, 3, 1))}).dt5_table.ravel(), [-slope, slope])


# Against four plain loops


@pytest.mark.parametrize("lengths", [(12, 12), (7, 11), (11, 7)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("bidirectional", [False, True], ids=["one way", "bidirectional"])
def test_every_direction_and_alignment(rng, bidirectional, causal, lengths):
    lq, lk = lengths
    a = qkv(rng, (2, 4, 2, lq, lk, 3, 2))
    options = {"buckets": 8, "max_distance": 7, "bidirectional": bidirectional}
    x = {name: a[name] for name in "qkv"} | {"t5_table": rng.standard_normal((8, 4))}
    offset = 0 if causal == "top_left" else lk - lq
    by_hand = loop_bias(x["t5_table"], options, offset)
    found = forward_and_gradients(ra.SDPA(causal=causal, scale=1.0, bias=ra.T5(**options)), x, a["dout"], a["dlse"])
    expected = loops.attention(
        *(a[n].tolist() for n in ("q", "k", "v", "dout", "dlse")),
        scale=1.0,
        sees=lambda b, h, i, j: not (causal and j > i + offset),
        bias=lambda b, h, i, j: by_hand(h, i, j),
    )
    for name in ("out", "lse", "dq", "dk", "dv"):
        near(found[name], expected[name])
    table = np.zeros((8, 4))
    for b, h, i, j in np.ndindex(2, 4, lq, lk):
        table[by_fractions(j - i - offset, **options), h] += expected["dbias"][b][h][i][j]
    near(found["dt5_table"], table)


# Identities


def test_a_row_added_to_the_whole_table_changes_lse_alone(rng):
    a = qkv(rng, (1, 2, 2, 5, 5, 2, 2))
    x = {name: a[name] for name in "qkv"} | {"t5_table": rng.standard_normal((6, 2))}
    spec, shift = ra.T5(buckets=6, max_distance=4), np.array([0.5, -2.0])
    one, other = (
        ra.evaluate(spec, x | {"t5_table": t}, want=("out", "lse")) for t in (x["t5_table"], x["t5_table"] + shift)
    )
    near(other.out, one.out)
    near(other.lse, one.lse + shift[:, None])


def test_a_linear_table_within_the_exact_buckets_is_alibi(rng):
    a = qkv(rng, (1, 2, 1, 8, 8, 3, 3))
    x = {name: a[name] for name in "qkv"}
    table = -np.array([0.5, 0.25]) * np.arange(16)[:, None]
    found = ra.evaluate(ra.T5(buckets=16, max_distance=9), x | {"t5_table": table}).out
    near(found, ra.evaluate(ra.ALiBi(slopes=(0.5, 0.25)), x).out)


def test_a_decode_step_has_the_last_row_s_bias(rng):
    a = qkv(rng, (1, 2, 2, 9, 9, 3, 3))
    x = {name: a[name] for name in "qkv"} | {"t5_table": rng.standard_normal((8, 2))}
    spec = ra.SDPA(causal="bottom_right", bias=ra.T5(buckets=8, max_distance=6))
    near(ra.evaluate(spec, x | {"q": a["q"][:, :, -1:]}).out, ra.evaluate(spec, x).out[:, :, -1:])


def test_a_term_alone_is_causal_attention_with_that_bias(rng):
    a = qkv(rng, (1, 2, 2, 4, 4, 2, 2))
    x = {name: a[name] for name in "qkv"} | {"t5_table": rng.standard_normal((32, 2))}
    same(ra.evaluate(ra.T5(), x).out, ra.evaluate(ra.SDPA(causal=True, bias=ra.T5()), x).out)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"buckets": 1}, "2 or more; given: 1"),
        ({"buckets": 32.0}, "buckets is an integer; given: 32.0"),
        ({"buckets": True}, "buckets is an integer"),
        ({"buckets": 7, "bidirectional": True}, "even number from 4 on where bidirectional; given: 7"),
        ({"buckets": 2, "bidirectional": True}, "even number from 4 on"),
        ({"max_distance": 16}, "beyond the 16 distances that have a bucket each; given: 16"),
        ({"max_distance": 8, "bidirectional": True}, "beyond the 8 distances"),
        ({"max_distance": None}, "max_distance is an integer"),
        ({"bidirectional": 1}, "True or False; given: 1"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.T5(**options)


def test_a_table_of_another_number_of_buckets(rng):
    q = rng.standard_normal((1, 2, 3, 4))
    with pytest.raises(ShapeError, match=r"(?s)t5_table has size 31 where 32 is expected.*t5_table \(32, Hq\) real"):
        ra.evaluate(ra.T5(), {"q": q, "k": q, "v": q, "t5_table": np.zeros((31, 2))})


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_the_table_is_finite(rng, value):
    q = rng.standard_normal((1, 2, 3, 4))
    with pytest.raises(ShapeError, match="t5_table must hold finite numbers"):
        ra.evaluate(ra.T5(), {"q": q, "k": q, "v": q, "t5_table": np.full((32, 2), value)})
