"""Infini-attention against numbers worked by hand, plain loops, its identities, and memories that recall exactly."""

import gc
import math
import tracemalloc
from itertools import product

import numpy as np
import pytest
from checks import near

import refattn as ra
from refattn.errors import ShapeError, SpecError

MODULE = ra.variants()["infini_attention"].module
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "L": 11, "D": 4, "Dv": 3}
CHOICES = {
    "update": ("linear", "delta"),
    "first": ("zero_memory", "skip"),
    "divisor": ("exact", "clamp", "add"),
    "weighs": ("memory", "local"),
    "z_update": ("always", "linear_only"),
}
# At 2, features of 4 channels are below, at and above it.
OPTIONS = [dict(zip(CHOICES, chosen, strict=True)) | {"epsilon": 8.0} for chosen in product(*CHOICES.values())]


def arrays(spec, rng, **changed):
    sizes = SIZES | changed
    return {name: rng.standard_normal(a.shape(sizes)) for name, a in MODULE.signature(spec).items()}


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def stream(spec, values, keys=None, gate=0):
    """One head of width 1, queries 0; keys 0 unless given, whose features are 1."""
    v = np.array(values, float).reshape(1, 1, -1, 1)
    k = np.zeros_like(v) if keys is None else np.array(keys, float).reshape(v.shape)
    return {"q": np.zeros_like(v), "k": k, "v": v, "gate": np.array([float(gate)])}


# Numbers worked by hand


def test_segments_of_one_token_read_the_mean_of_what_went_before():
    """near is the token's own value; far 0, 3, (3 + 5)/2, (3 + 5 + 10)/3; the gate of 0 gives half of each."""
    spec = ra.InfiniAttention(segment=1)
    found = ra.evaluate(spec, stream(spec, (3, 5, 10, 2)), want=("out", "state"))
    near(found.out.ravel(), [1.5, 4, 7, 4])
    near(found.state["memory"].ravel(), [20.0])
    near(found.state["weight"].ravel(), [4.0])
    assert found.state["k"].shape == (1, 1, 0, 1)


def test_gradients_of_that_stream():
    """dv_t = ½ + ½ Σ_{n ≥ t} 1/n over later readings; dgate = ¼ Σ (far − near) = ¼ (0+3+4+6 − 20)."""
    spec = ra.InfiniAttention(segment=1)
    found = ra.vjp(spec, stream(spec, (3, 5, 10, 2)), {"out": np.ones((1, 1, 4, 1))})
    near(found.dv.ravel(), [0.5 + 0.5 * (1 + 1 / 2 + 1 / 3), 0.5 + 0.5 * (1 / 2 + 1 / 3), 0.5 + 0.5 / 3, 0.5])
    near(found.dgate, [(0 + 3 + 4 + 6 - 20) / 4])


def test_two_tokens_a_segment():
    """Keys 0, ln 2 have features 1, 1 + ln 2, and weigh 1 : 1 at a query of 0; the third token reads both."""
    spec, b = ra.InfiniAttention(segment=2), 1 + math.log(2)
    found = ra.evaluate(spec, stream(spec, (1, 3, 5), (0, math.log(2), 0), gate=math.log(3)), want=("out", "state"))
    near(found.out.ravel(), [1 / 4, 2 / 4, 3 / 4 * (1 + 3 * b) / (1 + b) + 5 / 4])
    near(found.state["memory"].ravel(), [1 + 3 * b])
    near(found.state["v"].ravel(), [5.0])


def test_negative_keys_have_features_of_an_exponential():
    """elu(−ln 2) + 1 = ½: the second token reads ½·6 / ½, the third (½·6 + 2·1) / 2½; a query of 0 has feature 1."""
    spec = ra.InfiniAttention(segment=1)
    found = ra.evaluate(spec, stream(spec, (6, 1, 0), (-math.log(2), 1, 0)))
    near(found.out.ravel(), [3, (6 + 1) / 2, (5 / 2.5) / 2])


@pytest.mark.parametrize(
    ("options", "read"),
    [
        ({"update": "linear"}, (0, 6, 6, 6, 6)),
        ({"update": "delta"}, (0, 6, 3, 3, 3)),
        ({"update": "delta", "z_update": "linear_only"}, (0, 6, 6, 6, 6)),
        ({"update": "linear", "z_update": "linear_only"}, (0, 6, 6, 6, 6)),
    ],
    ids=str,
)
def test_a_binding_written_again_and_again(options, read):
    """The delta rule leaves S = V where z grows to 2: V/2, and from there on adds V/2 to S and 1 to z each time."""
    spec = ra.InfiniAttention(segment=1, **options)
    found = ra.evaluate(spec, stream(spec, (6,) * 5))
    near(found.out.ravel(), [(far + 6) / 2 for far in read])


@pytest.mark.parametrize(
    ("options", "gate", "out"),
    [
        ({"first": "skip"}, 0, (4, (4 + 6) / 2, (5 + 9) / 2)),
        ({"weighs": "local"}, math.log(3), (3 / 4 * 4, 1 / 4 * 4 + 3 / 4 * 6, 1 / 4 * 5 + 3 / 4 * 9)),
        ({"divisor": "add", "epsilon": 1.0}, 0, (2, (2 + 6) / 2, (10 / 3 + 9) / 2)),
        ({"divisor": "clamp", "epsilon": 1.5}, 0, (2, (8 / 3 + 6) / 2, (5 + 9) / 2)),
    ],
    ids=str,
)
def test_other_conventions(options, gate, out):
    """Values 4, 6, 9: far is 0, 4/1, 10/2; with 1 added to the divisor 0, 4/2, 10/3; with one of at least 1½ 4/1½."""
    spec = ra.InfiniAttention(segment=1, **options)
    near(ra.evaluate(spec, stream(spec, (4, 6, 9), gate=gate)).out.ravel(), out)


def test_the_memory_of_the_paper_s_twelve_layers():
    """8 heads of 128 channels: 12 · 8 · (128 · 128 + 128) = 1,585,152 numbers, whatever has been read."""
    spec = ra.InfiniAttention(segment=2048)
    sizes = {"B": 1, "Hq": 8, "Hkv": 8, "D": 128, "Dv": 128}
    for length in (0, 2048, 2048 * 10**6):
        carried = MODULE.state(spec, length)
        assert 12 * sum(math.prod(a.shape(sizes)) for a in carried.values()) == 1_585_152


# Plain loops


def loops(spec, x, rotate=lambda row, position: row):
    """out, by Python floats, token by token."""
    q, k, v, gate = (x[name].tolist() for name in ("q", "k", "v", "gate"))
    batch, heads, groups = len(q), len(q[0]), len(k[0])
    out = [[None] * heads for _ in range(batch)]
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            out[b][h] = one_head(spec, (q[b][h], k[b][g], v[b][g]), sigmoid(gate[h]), rotate)
    return np.array(out)


def one_head(spec, qkv, share, rotate):
    q, k, v = qkv
    width, dv, n = len(k[0]), len(v[0]), spec.segment
    s, z, outs, written = [[0.0] * dv for _ in range(width)], [0.0] * width, [], False
    share = share if spec.weighs == "memory" else 1 - share
    for begin in range(0, len(q), n):
        end = min(begin + n, len(q))
        for i in range(begin, end):
            turned = rotate(q[i], i - begin)
            scores = [spec.scale * dot(turned, rotate(k[j], j - begin)) for j in range(begin, i + 1)]
            weights = [math.exp(score - max(scores)) for score in scores]
            local = [
                math.fsum(w * v[begin + j][d] for j, w in enumerate(weights)) / math.fsum(weights) for d in range(dv)
            ]
            far = read(spec, feature(q[i]), s, z)
            alone = spec.first == "skip" and not written
            outs.append(local if alone else [share * f + (1 - share) * c for f, c in zip(far, local, strict=True)])
        if end - begin == n:
            before = [row[:] for row in s], z[:]
            for j in range(begin, end):
                f = feature(k[j])
                gone = read(spec, f, *before) if spec.update == "delta" else [0.0] * dv
                for c, d in product(range(width), range(dv)):
                    s[c][d] += f[c] * (v[j][d] - gone[d])
                if not (written and spec.update == "delta" and spec.z_update == "linear_only"):
                    z = [a + b for a, b in zip(z, f, strict=True)]
            written = True
    return outs


def dot(a, b):
    return math.fsum(x * y for x, y in zip(a, b, strict=True))


def feature(row):
    return [x + 1 if x > 0 else math.exp(x) for x in row]


def read(spec, f, s, z):
    size = dot(f, z)
    size = {"exact": size, "clamp": max(size, spec.epsilon), "add": size + spec.epsilon}[spec.divisor]
    return [dot(f, column) / size if size else 0.0 for column in zip(*s, strict=True)]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
@pytest.mark.parametrize("segment", [1, 4, 20])
def test_against_plain_loops(options, segment, rng):
    spec = ra.InfiniAttention(segment=segment, scale=0.75, **options)
    x = arrays(spec, rng)
    near(ra.evaluate(spec, x).out, loops(spec, x), 1e-11)


@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_rotation_is_inside_the_segment_and_not_in_the_memory(pairing, rng):
    spec = ra.InfiniAttention(segment=4, scale=0.5, update="delta", rotary=ra.RoPE(pairing=pairing, base=16.0))
    x = arrays(spec, rng)
    pairs = [(0, 2), (1, 3)] if pairing == "half" else [(0, 1), (2, 3)]

    def rotate(row, position):
        turned = list(row)
        for t, (a, b) in enumerate(pairs):
            angle = position * 16.0 ** (-t / 2)
            turned[a] = row[a] * math.cos(angle) - row[b] * math.sin(angle)
            turned[b] = row[a] * math.sin(angle) + row[b] * math.cos(angle)
        return turned

    near(ra.evaluate(spec, x).out, loops(spec, x, rotate), 1e-11)


def test_a_rotation_by_a_table_takes_its_rows_by_place_in_the_segment(rng):
    turning = ra.RoPE(pairing="half", angles="table")
    spec = ra.InfiniAttention(segment=3, rotary=turning)
    x = arrays(spec, rng, P=3, R=2)
    cos, sin = x["rope_cos"], x["rope_sin"]

    def rotate(row, position):
        (c, s), (a, b) = (cos[position], sin[position]), (np.array(row[:2]), np.array(row[2:]))
        return [*(a * c - b * s), *(a * s + b * c)]

    near(ra.evaluate(spec, x).out, loops(ra.InfiniAttention(segment=3, scale=0.5), x, rotate), 1e-11)


# Identities


@pytest.mark.parametrize("update", CHOICES["update"])
def test_a_segment_longer_than_the_sequence_is_causal_attention_times_what_the_gate_leaves(update, rng):
    spec = ra.InfiniAttention(segment=50, update=update)
    x = arrays(spec, rng)
    local = ra.evaluate(ra.SDPA(causal=True), {n: x[n] for n in "qkv"}).out
    g = 1 / (1 + np.exp(-x["gate"]))
    near(ra.evaluate(spec, x).out, (1 - g)[:, None, None] * local)
    near(ra.evaluate(ra.InfiniAttention(segment=50, update=update, first="skip"), x).out, local)


@pytest.mark.parametrize("update", CHOICES["update"])
def test_orthogonal_features_recall_every_value_exactly(update, rng):
    """Features are a unit vector each, for e^−1000 is 0 in float64; the gate is open to the memory alone."""
    count = 6
    keys = np.where(np.eye(count, dtype=bool), 0.0, -1000.0)
    v, order = rng.standard_normal((2, 1, count, 3)), rng.permutation(count)
    x = {
        "q": np.concatenate([keys, keys[order]])[None, None],
        "k": np.concatenate([keys, keys])[None, None],
        "v": np.concatenate([v[0], np.zeros((1, count, 3))], 1)[None],
        "gate": np.array([1000.0]),
    }
    found = ra.evaluate(ra.InfiniAttention(segment=count, update=update), x).out
    near(found[:, :, count:], v[0][None, :, order], 0)


def test_the_gate_s_sides_are_mirrored(rng):
    memory, local = (ra.InfiniAttention(segment=4, weighs=side) for side in CHOICES["weighs"])
    x = arrays(memory, rng)
    near(ra.evaluate(memory, x).out, ra.evaluate(local, x | {"gate": -x["gate"]}).out)


def test_grouped_heads_are_heads_with_their_keys_repeated(rng):
    spec = ra.InfiniAttention(segment=4, update="delta")
    x = arrays(spec, rng)
    each = {name: np.repeat(x[name], 2, 1) for name in "kv"}
    near(ra.evaluate(spec, x | each).out, ra.evaluate(spec, x).out)


def test_order_inside_a_segment_that_has_ended_does_not_show_later(rng):
    spec = ra.InfiniAttention(segment=4)
    x = arrays(spec, rng)
    order = np.r_[rng.permutation(4), 4 + rng.permutation(4), 8:11]
    mixed = x | {name: x[name][:, :, order] for name in "kv"}
    near(ra.evaluate(spec, mixed).out[:, :, 8:], ra.evaluate(spec, x).out[:, :, 8:])


# Memory of constant size


def test_the_state_stays_as_large_as_a_segment_makes_it(rng):
    spec = ra.InfiniAttention(segment=8)
    state, sizes = ra.init_state(spec, B=1, Hkv=2, D=4, Dv=3), []
    for length in rng.integers(0, 30, 60):
        state = ra.step(spec, state, arrays(spec, rng, B=1, L=int(length)))[1]
        sizes.append(sum(a.size for a in state.values()))
    assert state.length > 500
    assert max(sizes) <= 2 * (4 * 3 + 4 + 7 * (4 + 3))


@pytest.mark.slow
@pytest.mark.parametrize("update", CHOICES["update"])
def test_a_long_stream_holds_no_more_memory_than_a_short_one(update, rng):
    spec = ra.InfiniAttention(segment=64, update=update)
    state, held = ra.init_state(spec, B=1, Hkv=1, D=4, Dv=3), []
    x = arrays(spec, rng, B=1, Hq=1, Hkv=1, L=1000)
    tracemalloc.start()
    for length in range(1000, 40_001, 1000):
        state = ra.step(spec, state, x)[1]
        if length in (8000, 40_000):
            gc.collect()
            held.append(tracemalloc.get_traced_memory()[0])
    tracemalloc.stop()
    assert state.length == 40_000
    # 32,000 keys and values more would be 1.8 MB.
    assert held[1] - held[0] < 100_000


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment is a number of tokens from 1 on; given: 0"),
        ({"segment": 2.0}, "segment is a number of tokens from 1 on; given: 2.0"),
        ({"segment": True}, "segment is a number of tokens from 1 on; given: True"),
        ({"update": "add"}, "update is one of 'linear', 'delta'; given: 'add'"),
        ({"first": None}, "first is one of 'zero_memory', 'skip'; given: None"),
        ({"divisor": "eps"}, "divisor is one of 'exact', 'clamp', 'add'; given: 'eps'"),
        ({"weighs": 1}, "weighs is one of 'memory', 'local'; given: 1"),
        ({"z_update": "never"}, "z_update is one of 'always', 'linear_only'; given: 'never'"),
        ({"epsilon": 0.0}, "epsilon is a positive number; given: 0"),
        ({"epsilon": None}, "epsilon is a positive number; given: None"),
        ({"epsilon": math.nan}, "epsilon is a finite number"),
        ({"scale": math.inf}, "scale is a finite number"),
        ({"rotary": ra.ALiBi()}, "rotary takes a Spec such as RoPE"),
        ({"rotary": "half"}, "rotary takes a Spec such as RoPE"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.InfiniAttention(**({"segment": 4} | options))


def test_heads_that_do_not_divide_and_gates_of_other_heads(rng):
    spec = ra.InfiniAttention(segment=4)
    with pytest.raises(ShapeError, match="Hq must be a multiple of Hkv; given: Hq=3, Hkv=2"):
        ra.evaluate(spec, arrays(spec, rng, Hq=3))
    with pytest.raises(ShapeError, match=r"(?s)gate has Hq=5, but .* Hq=4.*gate \(Hq\) real"):
        ra.evaluate(spec, arrays(spec, rng) | {"gate": np.zeros(5)})


def test_a_table_of_fewer_rows_than_a_segment_is_refused_where_it_is_read(rng):
    spec = ra.InfiniAttention(segment=6, rotary=ra.RoPE(pairing="half", angles="table"))
    with pytest.raises(ShapeError, match="rope_cos has 5 rows"):
        ra.evaluate(spec, arrays(spec, rng, P=5, R=2))
    ra.evaluate(spec, arrays(spec, rng, P=5, R=2, L=5))
    state = ra.init_state(spec, B=2, Hkv=2, D=4, Dv=3)
    state = ra.step(spec, state, arrays(spec, rng, P=5, R=2, L=4))[1]
    with pytest.raises(ShapeError, match=r"rope_cos has 5 rows, .* stand at 0 to 5"):
        ra.step(spec, state, arrays(spec, rng, P=5, R=2, L=2))


def test_operations_are_linear_in_the_length():
    """2 B Hq L ((D + Dv) segment + D Dv) reading, 2 B Hkv L D Dv writing; the score matrix of one segment."""
    spec = ra.InfiniAttention(segment=8)
    one, two = (ra.explain(spec, SIZES | {"L": 64 * n}) for n in (1, 2))
    assert one["operations"] == 2 * 2 * 4 * 64 * (7 * 8 + 12) + 2 * 2 * 2 * 64 * 12
    assert two["operations"] == 2 * one["operations"]
    assert one["score_matrix_bytes"] == two["score_matrix_bytes"] == 8 * 2 * 4 * 8 * 8
