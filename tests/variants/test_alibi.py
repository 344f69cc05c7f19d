import math
from fractions import Fraction

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn.errors import ShapeError, SpecError
from refattn.variants.alibi import rule

EIGHT = [2.0**-n for n in range(1, 9)]
ROOT_HALF = float(np.float32(2**-0.5))  # 0x1.6a09e6p-1, and 2^-1.5, ... are it over powers of two


def slopes_of(heads, **options):
    sizes = {"B": 1, "Hq": heads, "Hkv": heads, "Lq": 2, "Lk": 2, "D": 1, "Dv": 1}
    return ra.explain(ra.ALiBi(**options), sizes)["spec"].bias[0].slopes


def bias_by_hand(left, right, direction="symmetric"):
    """−(left past + right future), −∞ where a head may not look."""

    def bias(h, i, j):
        back = h < len(left) // 2
        if direction == "half" and (j > i if back else j < i):
            return -math.inf
        return -left[h] * (i - j) if j <= i else -right[h] * (j - i)

    return bias


# Slopes


def test_eight_heads_are_powers_of_one_half_by_either_rule():
    assert slopes_of(8) == slopes_of(8, slopes="geometric") == tuple(EIGHT)


def test_sixteen_heads_step_by_the_root_of_one_half():
    found = slopes_of(16)
    assert found[1::2] == tuple(EIGHT)
    assert found[::2] == tuple(ROOT_HALF / 2**n for n in range(8))
    assert found == slopes_of(16, slopes="geometric")


def test_twelve_heads_interleaved_are_not_monotone():
    found = slopes_of(12)
    assert found == (*EIGHT, *(ROOT_HALF / 2**n for n in range(4)))
    assert found[8] > found[0]


@pytest.mark.parametrize("heads", [1, 2, 3, 7, 12, 24, 40, 71, 128])
def test_geometric_slopes_are_the_float32_nearest_to_the_power(heads):
    """Exact: the float32 m is nearest to 2^−(8h/n) where the midpoints to its neighbours enclose it; raise to n."""
    for h, m in enumerate(slopes_of(heads, slopes="geometric"), start=1):
        step = Fraction(float(np.spacing(np.float32(m))))
        below = step / 2 if math.frexp(m)[0] == 0.5 else step
        low, high, exact = Fraction(m) - below / 2, Fraction(m) + step / 2, Fraction(1, 2 ** (8 * h))
        assert low**heads <= exact <= high**heads


def test_forty_heads_interleave_thirty_two_with_the_odd_ones_of_sixty_four():
    quarter = Fraction(1, 4)
    assert rule("interleaved", 40) == [h * quarter for h in range(1, 33)] + [h * quarter / 2 for h in range(1, 16, 2)]
    assert rule("geometric", 40) == [Fraction(h, 5) for h in range(1, 41)]


@pytest.mark.parametrize("heads", range(1, 129))
def test_the_rule_written_as_the_models_write_it(heads):
    """The start 2^(−2^−(log2 c − 3)) and its powers; then every other power of the root of it."""
    c = 2 ** math.floor(math.log2(heads))
    base = 2.0 ** -(2.0 ** -(math.log2(c) - 3))
    expected = [base**n for n in range(1, c + 1)]
    expected += [math.sqrt(base) ** n for n in range(1, 2 * (heads - c), 2)]
    near(slopes_of(heads), expected, 2.0**-23)


def test_half_gives_each_half_the_slopes_of_half_the_heads():
    assert slopes_of(16, direction="half") == (*EIGHT, *EIGHT)
    assert slopes_of(6, direction="half") == slopes_of(3) * 2


# Numbers worked by hand: with slope ln 2 and equal contents key j weighs 2^−|i−j|, so all is rational


def rational_attention(length, values, causal):
    """Outputs, and the gradient of Σ out by the slope: −Σ p (v − out) |i − j|, in Fractions."""
    outs, slope = [], Fraction(0)
    for i in range(length):
        keys = range(i + 1) if causal else range(length)
        weight = {j: Fraction(1, 2 ** abs(i - j)) for j in keys}
        z = sum(weight.values())
        out = sum(w * values[j] for j, w in weight.items()) / z
        slope -= sum(w / z * (values[j] - out) * abs(i - j) for j, w in weight.items())
        outs.append(out)
    return outs, slope


def test_the_last_of_three_keys_weighs_4_of_7():
    assert rational_attention(3, [0, 0, 7], causal=True)[0] == [0, 0, 4]


@pytest.mark.parametrize("causal", [True, False])
def test_outputs_and_slope_gradient_are_the_rational_numbers(causal):
    values = [3, -1, 4, 1, -5]
    zero = np.zeros((1, 1, 5, 1))
    x = {"q": zero, "k": zero, "v": np.array(values, float).reshape(1, 1, 5, 1), "slopes": np.array([math.log(2)])}
    spec = ra.SDPA(causal=causal, bias=(ra.ALiBi(slopes="learned"),))
    outs, slope = rational_attention(5, values, causal)
    near(ra.evaluate(spec, x).out.ravel(), outs)
    near(ra.vjp(spec, x, {"out": np.ones((1, 1, 5, 1))}).dslopes, [slope])


@pytest.mark.parametrize(("slope", "window"), [(2.0**-1, 10), (2.0**-8, 1179)])
def test_the_nearest_ceil_ln_100_over_m_keys_hold_99_percent(slope, window):
    """Of an endless context of equal contents; 2^-1: 10 keys, 2^-8: 1179, self included."""
    assert window == math.ceil(math.log(100) / slope)
    length = 3 * window
    v = np.zeros((1, 1, length, 1))
    zero = np.zeros((1, 1, length, 1))

    def mass(nearest):
        v[0, 0] = 0
        v[0, 0, -nearest:] = 1
        return ra.attention(zero[:, :, -1:], zero, v, causal="bottom_right", bias=ra.ALiBi(slopes=(slope,))).item()

    assert mass(window) >= 0.99 > mass(window - 1)


# Against four plain loops


@pytest.mark.parametrize("lengths", [(4, 4), (3, 5), (5, 3)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("direction", ["symmetric", "half", "two_sided"])
@pytest.mark.parametrize("learned", [False, True], ids=["numbers", "learned"])
def test_every_direction_and_alignment(rng, learned, direction, causal, lengths):
    lq, lk = lengths
    a = qkv(rng, (2, 4, 2, lq, lk, 3, 2))
    left = rng.random(4).tolist()
    right = rng.random(4).tolist() if direction == "two_sided" else left
    by_hand, offset = bias_by_hand(left, right, direction), 0 if causal == "top_left" else lk - lq
    x = {name: a[name] for name in "qkv"}
    if learned:
        term = ra.ALiBi(slopes="learned", direction=direction)
        x["slopes"] = np.array(left)
        if direction == "two_sided":
            x["slopes_right"] = np.array(right)
    else:
        both = {"slopes_right": tuple(right)} if direction == "two_sided" else {}
        term = ra.ALiBi(slopes=tuple(left), direction=direction, **both)

    def sees(b, h, i, j):
        return by_hand(h, i + offset, j) > -math.inf and not (causal and j > i + offset)

    found = forward_and_gradients(ra.SDPA(causal=causal, bias=(term,)), x, a["dout"], a["dlse"])
    expected = loops.attention(
        *(a[n].tolist() for n in ("q", "k", "v", "dout", "dlse")),
        scale=3**-0.5,
        sees=sees,
        bias=lambda b, h, i, j: by_hand(h, i + offset, j),
    )
    for name in ("out", "lse", "dq", "dk", "dv"):
        near(found[name], expected[name])
    if learned:
        ds, distance = np.array(expected["dbias"]), np.arange(lk) - (np.arange(lq) + offset)[:, None]
        past, future = -np.minimum(distance, 0), np.maximum(distance, 0)
        if direction == "two_sided":
            near(found["dslopes"], -(ds * past).sum((0, 2, 3)))
            near(found["dslopes_right"], -(ds * future).sum((0, 2, 3)))
        else:
            near(found["dslopes"], -(ds * (past + future)).sum((0, 2, 3)))


def test_two_sided_without_right_slopes_is_symmetric(rng):
    a = qkv(rng, (1, 4, 4, 5, 5, 2, 2))
    one, other = (ra.attention(a["q"], a["k"], a["v"], bias=ra.ALiBi(direction=d)) for d in ("symmetric", "two_sided"))
    near(other, one)


def test_distances_follow_given_positions(rng):
    a = qkv(rng, (1, 2, 2, 3, 4, 2, 2))
    at_q, at_k = np.array([7, 0, 3]), np.array([[1, 9, 3, 3]])
    bias = -np.array([0.5, 0.25]).reshape(2, 1, 1) * np.abs(at_q[:, None] - at_k)
    given = {"q_positions": at_q, "k_positions": at_k}
    found = ra.attention(a["q"], a["k"], a["v"], bias=ra.ALiBi(slopes=(0.5, 0.25)), **given)
    near(found, ra.attention(a["q"], a["k"], a["v"], bias=bias))


def test_distances_are_those_of_each_sequence_where_lengths_differ(rng):
    a = qkv(rng, (2, 1, 1, 2, 4, 2, 2))
    lengths = {"q_lengths": np.array([2, 1]), "kv_lengths": np.array([4, 3])}
    term = ra.ALiBi(slopes=(0.5,))
    both = ra.attention(a["q"], a["k"], a["v"], causal="bottom_right", bias=term, **lengths)
    second = ra.attention(a["q"][1:, :, :1], a["k"][1:, :, :3], a["v"][1:, :, :3], causal="bottom_right", bias=term)
    near(both[1:, :, :1], second)


def test_the_bias_is_not_scaled(rng):
    a = qkv(rng, (1, 1, 1, 4, 4, 2, 2))
    bias = -0.5 * np.abs(np.arange(4)[:, None] - np.arange(4))
    found = ra.attention(a["q"], a["k"], a["v"], scale=0.125, bias=ra.ALiBi(slopes=(0.5,)))
    near(found, ra.attention(a["q"], a["k"], a["v"], scale=0.125, bias=bias))


def test_a_term_alone_is_causal_attention_with_that_bias(rng):
    a = qkv(rng, (1, 8, 8, 4, 4, 2, 2))
    x = {name: a[name] for name in "qkv"}
    same(ra.evaluate(ra.ALiBi(), x).out, ra.evaluate(ra.SDPA(causal=True, bias=(ra.ALiBi(),)), x).out)


def test_two_terms_add_and_an_array_with_them(rng):
    a = qkv(rng, (1, 2, 2, 3, 3, 2, 2))
    dense = rng.standard_normal((3, 3))
    terms = (ra.ALiBi(slopes=(0.5, 0.25)), ra.ALiBi(slopes=(0.25, 0.5)))
    found = ra.attention(a["q"], a["k"], a["v"], bias=(*terms, dense))
    one = -0.75 * np.abs(np.arange(3)[:, None] - np.arange(3))
    near(found, ra.attention(a["q"], a["k"], a["v"], bias=one + dense))


# The absolute form +m j


@pytest.mark.parametrize("extra", ["nothing", "sink", "softcap_after"])
def test_the_absolute_form_is_equal_only_without_sink_and_later_softcap(rng, extra):
    """Both forms as dense logits; they differ by m i, a constant of the row that only a bare softmax forgets."""
    a = qkv(rng, (1, 2, 2, 6, 6, 4, 3))
    slopes, n = np.array([0.5, 0.25]).reshape(2, 1, 1), np.arange(6)
    relative, absolute = -slopes * (n[:, None] - n), slopes * (n + 0 * n[:, None])
    x = {name: a[name] for name in "qkv"}
    if extra == "sink":
        x["sink"] = np.array([0.5, -0.5])
    if extra == "softcap_after":
        scores = 0.5 * np.einsum("bhid,bhjd->bhij", a["q"], a["k"])
        relative, absolute = (2 * np.tanh((scores + b) / 2) - scores for b in (relative, absolute))
    one, other = (ra.evaluate(ra.SDPA(causal=True), x | {"bias": b}, want=("out", "lse")) for b in (relative, absolute))
    if extra == "nothing":
        near(one.out, other.out)
        near(other.lse - one.lse, np.broadcast_to(slopes[..., 0] * n, (1, 2, 6)), 1e-11)
    else:
        assert np.abs(one.out - other.out).max() > 1e-3
        assert np.abs(one.lse - other.lse).max() > 1e-3


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slopes": "linear"}, "'interleaved', 'geometric', 'learned'"),
        ({"slopes": (1.0, math.nan)}, "a number of slopes is a finite number"),
        ({"slopes": (True,)}, "a number of slopes is a finite number"),
        ({"slopes": [0.5]}, "tuple of numbers"),
        ({"direction": "left"}, "'symmetric', 'half' or 'two_sided'"),
        ({"slopes_right": (0.5,)}, "direction='two_sided'"),
        ({"slopes": "learned", "slopes_right": (0.5,), "direction": "two_sided"}, "not learned"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.ALiBi(**options)


@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        (3, {"direction": "half"}, "even number of heads; given: Hq=3"),
        (3, {"slopes": (0.5, 0.25)}, "2 numbers for Hq=3"),
        (
            2,
            {"slopes": (1, 2), "slopes_right": (1,), "direction": "two_sided"},
            "slopes_right holds 1 numbers for Hq=2",
        ),
    ],
    ids=["odd_half", "few_slopes", "few_right_slopes"],
)
def test_options_that_contradict_the_heads(heads, options, message):
    with pytest.raises(ShapeError, match=message):
        slopes_of(heads, **options)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_learned_slopes_are_finite(rng, value):
    q = rng.standard_normal((1, 2, 3, 4))
    with pytest.raises(ShapeError, match="slopes must hold finite numbers"):
        ra.evaluate(ra.ALiBi(slopes="learned"), {"q": q, "k": q, "v": q, "slopes": np.full(2, value)})
