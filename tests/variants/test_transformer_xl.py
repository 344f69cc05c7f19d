"""Transformer-XL against numbers worked by hand, plain loops, the shift of its authors, and plain attention."""

import math

import numpy as np
import plain_loops as loops
import pytest
from checks import near

import refattn as ra
from refattn.errors import ShapeError, SpecError

SIZES = {"B": 2, "L": 11, "E": 5, "R": 6, "Hq": 4, "Hkv": 2, "D": 3, "Dv": 2}
SPECS = {
    "segments": ra.TransformerXL(segment=4, memory=5),
    "clamp": ra.TransformerXL(segment=3, memory=6, clamp=4),
    "same length": ra.TransformerXL(segment=3, memory=4, same_length=True, scale=0.75),
    "attached": ra.TransformerXL(segment=5, memory=3, detach=False),
    "no memory": ra.TransformerXL(segment=4, memory=0),
}
EVERY = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def arrays(rng, **changed):
    module = ra.variants()["transformer_xl"].module
    sizes = SIZES | changed
    return {n: rng.standard_normal(a.shape(sizes)) for n, a in module.signature(SPECS["segments"]).items()}


def evaluate(spec, x):
    return ra.evaluate(spec, x, want=("out", "lse"))


def alike(*values):
    """One head of width 1 whose queries and positions are 0, so that all it sees weighs the same."""
    one, zero = np.ones((1, 1, 1)), np.zeros((1, 1))
    hidden = np.array(values, float).reshape(1, -1, 1)
    return {"x": hidden, "wq": 0 * one, "wk": one, "wv": one, "wr": np.zeros((1, 2, 1)), "u": zero, "w": zero}


# Numbers worked by hand


def test_means_over_a_segment_and_its_memory():
    """Segments {1, 2}, {3, 4}, {5}, each with the token before it."""
    found = evaluate(ra.TransformerXL(segment=2, memory=1), alike(1, 2, 3, 4, 5))
    near(found.out.ravel(), [1, 3 / 2, (2 + 3) / 2, (2 + 3 + 4) / 3, (4 + 5) / 2])
    near(found.lse.ravel(), np.log([1, 2, 2, 3, 2]))


def test_two_sinusoids_of_the_distance():
    """R = 2 is one frequency, 1: r_d = a sin d + b cos d. With q = u = 0, w = 1 a score is r of the distance."""
    x = alike(1, 2, 4) | {"wr": np.array([[[3.0], [5.0]]]), "w": np.ones((1, 1))}
    found = evaluate(ra.TransformerXL(segment=2, memory=2), x)
    r = [math.exp(3 * math.sin(d) + 5 * math.cos(d)) for d in range(3)]
    sums = [(r[0],), (r[1], r[0]), (r[2], r[1], r[0])]
    near(found.lse.ravel(), [math.log(sum(s)) for s in sums])
    near(found.out.ravel(), [sum(a * b for a, b in zip(s, (1, 2, 4), strict=False)) / sum(s) for s in sums])


def test_four_columns_are_sines_then_cosines_of_1_and_of_a_hundredth():
    """R = 4: frequencies 10000^0 and 10000^(−2/4). Each row of wr alone, at distance 7 (clamp 7, all else alike)."""
    expected = [math.sin(7), math.sin(0.07), math.cos(7), math.cos(0.07)]
    for row, value in enumerate(expected):
        wr = np.zeros((1, 4, 1))
        wr[0, row] = 1
        x = alike(*range(9)) | {"wr": wr, "w": np.ones((1, 1))}
        lse = evaluate(ra.TransformerXL(segment=1, memory=8), x).lse.ravel()
        near(np.exp(lse[7]) - np.exp(lse[6]), math.exp(value), 1e-11)


def test_the_content_stand_in_meets_keys_and_the_scale_covers_both_parts():
    """q = 0, u = 2, w = 3, k = x = (1, 5), r_0 = r_1 = 1 by clamp 0: scores ½ (2·1 + 3), ½ (2·5 + 3)."""
    x = alike(1, 5) | {"wr": np.array([[[0.0], [1.0]]]), "u": np.full((1, 1), 2.0), "w": np.full((1, 1), 3.0)}
    found = evaluate(ra.TransformerXL(segment=2, memory=0, clamp=0, scale=0.5), x)
    near(found.lse.ravel(), [2.5, math.log(math.exp(2.5) + math.exp(6.5))])


# Plain loops


def sees(spec, i, j):
    """By the sentences of the paper: the same segment or the memory before it, and no token to come."""
    begin = i - i % spec.segment
    near_enough = j >= i - spec.memory or not spec.same_length
    return begin - spec.memory <= j <= i and near_enough


def pe(distance, width):
    angles = [distance / 10000 ** (2 * t / width) for t in range((width + 1) // 2)]
    return ([math.sin(a) for a in angles] + [math.cos(a) for a in angles])[:width]


def projected(x, name):
    """(B,H,L,·) of nested lists."""
    hidden, matrix = x["x"].tolist(), x[name].tolist()
    columns = [list(zip(*m, strict=True)) for m in matrix]
    return [[[[loops.dot(row, c) for c in head] for row in b] for head in columns] for b in hidden]


@EVERY
@pytest.mark.parametrize("width", [6, 5, 1])
def test_against_plain_loops(spec, width, rng):
    x = arrays(rng, R=width)
    scale = spec.scale or SIZES["D"] ** -0.5
    q, k, v = (projected(x, name) for name in ("wq", "wk", "wv"))
    wr, u, w = (x[name].tolist() for name in ("wr", "u", "w"))

    def bias(b, h, i, j):
        d = i - j if spec.clamp is None else min(i - j, spec.clamp)
        r = [loops.dot(pe(d, width), column) for column in zip(*wr[h], strict=True)]
        return scale * loops.dot([a + c for a, c in zip(q[b][h][i], w[h], strict=True)], r)

    moved = [[[[a + c for a, c in zip(row, u[h], strict=True)] for row in q[b][h]] for h in range(4)] for b in range(2)]
    dout = loops.zeros(2, 4, SIZES["L"], 2)
    plain = loops.attention(moved, k, v, dout, scale=scale, sees=lambda b, h, i, j: sees(spec, i, j), bias=bias)
    found = evaluate(spec, x)
    near(found.out, plain["out"], 1e-11)
    near(found.lse, plain["lse"], 1e-11)


# Plain attention


def attention(spec, x, **more):
    """The same score in masked attention, positions as a dense bias; every token sees all before it."""
    q, k, v = (np.einsum("ble,hed->bhld", x["x"], x[n]) for n in ("wq", "wk", "wv"))
    place = np.arange(q.shape[2])
    distance = np.maximum(place[:, None] - place, 0)
    table = np.array([pe(d, x["wr"].shape[1]) for d in place])
    r = np.einsum("nr,hrd->hnd", table, x["wr"])
    scale = spec.scale or q.shape[3] ** -0.5
    bias = scale * np.einsum("bhid,hijd->bhij", q + x["w"][:, None], r[:, distance])
    inputs = {"q": q + x["u"][:, None], "k": k, "v": v, "bias": bias} | more
    return ra.evaluate(ra.SDPA(causal=True, scale=spec.scale), inputs, want=("out", "lse"))


@pytest.mark.parametrize(
    "spec",
    [ra.TransformerXL(segment=s, memory=m) for s, m in ((11, 0), (3, 9), (1, 10), (4, 100))],
    ids=lambda s: f"{s.segment}+{s.memory}",
)
def test_a_memory_of_everything_is_full_attention(spec, rng):
    x = arrays(rng)
    found, expected = evaluate(spec, x), attention(spec, x)
    near(found.out, expected.out)
    near(found.lse, expected.lse)


def test_without_a_memory_segments_are_causal_attention_on_their_own(rng):
    x, spec = arrays(rng), SPECS["no memory"]
    ids = np.arange(11) // spec.segment
    found, expected = evaluate(spec, x), attention(spec, x, q_segment_ids=ids, k_segment_ids=ids)
    near(found.out, expected.out)
    near(found.lse, expected.lse)


# Same length


@pytest.mark.parametrize("segment", [1, 3, 5, 20])
def test_of_the_same_length_each_query_sees_m_tokens_and_itself_wherever_segments_end(segment):
    spec = ra.TransformerXL(segment=segment, memory=4, same_length=True)
    counts = np.exp(evaluate(spec, alike(*range(12))).lse.ravel())
    near(counts, [min(t, 4) + 1 for t in range(12)])


def masks(queries, there, memory):
    """What `queries` tokens after `there` in memory see in the authors' code of same_length: TensorFlow, PyTorch."""
    ones = np.ones((queries, there + queries), bool)
    later = np.triu(ones, there + 1)
    tensorflow = later.copy()
    tensorflow[:, :queries] |= np.tril(ones[:, :queries], -1)
    beyond = there + queries - memory
    pytorch = later | np.tril(ones, -(queries - beyond if beyond > 0 else queries))
    return ~tensorflow, ~pytorch


def seen(spec, hidden_before, hidden):
    """Which of memory and segment each query of a segment weighs, by values that are powers of two."""
    x = alike(*(2.0 ** np.arange(hidden_before + hidden)))
    out = ra.evaluate(spec, x).out.ravel()[-hidden:]
    lse = ra.evaluate(spec, x, want=("lse",)).lse.ravel()[-hidden:]
    total = np.rint(out * np.exp(lse)).astype(np.int64)
    return (total[:, None] >> np.arange(hidden_before + hidden)) & 1 == 1


@pytest.mark.parametrize("segment", [2, 4, 7])
def test_the_two_masks_of_the_authors_code_differ_by_one_token(segment):
    """The TensorFlow mask is ours; the PyTorch one counts the query among the M, which is ours of memory M − 1."""
    memory = 7
    before = 7 if segment == 7 else 8
    tensorflow, pytorch = masks(segment, memory, memory)
    ours = {m: seen(ra.TransformerXL(segment=segment, memory=m, same_length=True), before, segment) for m in (7, 6)}
    old = before - memory
    assert (ours[7] == np.concatenate([np.zeros((segment, old), bool), tensorflow], 1)).all()
    assert (ours[6] == np.concatenate([np.zeros((segment, old), bool), pytorch], 1)).all()
    assert tensorflow.sum(1).tolist() == [memory + 1] * segment
    assert pytorch.sum(1).tolist() == [memory] * segment


# The shift


def shifted(scores):
    """The authors' trick: a column of zeros before the (queries, keys) matrix, its rows cut anew, the first dropped."""
    queries, keys = scores.shape
    padded = np.concatenate([np.zeros((queries, 1)), scores], 1)
    return padded.reshape(keys + 1, queries)[1:].reshape(queries, keys)


def test_the_shift_is_the_direct_index_for_keys_that_a_causal_query_sees_and_wrong_for_all_others(rng):
    """For the key n + 1 after query i it holds the product of query i + 1 and the distance keys − n; 0 for n = 0."""
    queries, keys, width = 4, 9, 6
    mlen = keys - queries
    q, r = rng.standard_normal((queries, 3)), rng.standard_normal((keys, 3))
    scores = q @ r[::-1].T
    trick = shifted(scores)
    for i in range(queries):
        for j in range(keys):
            n = j - (i + mlen) - 1
            if n < 0:
                near(trick[i, j], q[i] @ r[i + mlen - j])
            elif n == 0:
                assert trick[i, j] == 0
            else:
                near(trick[i, j], q[i + 1] @ r[keys - n])
                signed = [np.array(pe(d, width)) for d in (-(n + 1), keys - n)]
                assert np.abs(signed[0] - signed[1]).max() > 0.1


def test_scores_by_the_shift_give_our_output(rng):
    """The last segment of 11 tokens in 4s with a memory of 5, all of it: 3 queries over 8 keys."""
    spec, x = SPECS["segments"], arrays(rng, B=1)
    hidden = x["x"][0, 3:]
    q, k, v = (np.einsum("le,hed->hld", hidden, np.repeat(x[n], 4 // len(x[n]), 0)) for n in ("wq", "wk", "wv"))
    q = q[:, 5:]
    r = np.einsum("nr,hrd->hnd", np.array([pe(d, 6) for d in range(7, -1, -1)]), x["wr"])
    by_position = np.array([shifted((q[h] + x["w"][h]) @ r[h].T) for h in range(4)])
    s = ((q + x["u"][:, None]) @ k.transpose(0, 2, 1) + by_position) * 3**-0.5
    s = np.where(np.tri(3, 8, 5, dtype=bool), s, -np.inf)
    p = np.exp(s)
    near(ra.evaluate(spec, x).out[0, :, 8:], p @ v / p.sum(-1, keepdims=True))


# Clamped distances


def test_a_clamp_that_no_distance_reaches_is_none(rng):
    x = arrays(rng)
    found, expected = (evaluate(ra.TransformerXL(segment=4, memory=5, clamp=c), x) for c in (8, None))
    near(found.out, expected.out, 0)
    near(found.lse, expected.lse, 0)


def test_a_clamp_of_0_moves_lse_alone(rng):
    """All of a row's distances are alike: every score has the same scale (q + w)·r_0 more."""
    x, spec = arrays(rng), ra.TransformerXL(segment=4, memory=5, clamp=0)
    found, without = evaluate(spec, x), evaluate(spec, x | {"wr": 0 * x["wr"]})
    q = np.einsum("ble,hed->bhld", x["x"], x["wq"]) + x["w"][:, None]
    r = np.einsum("r,hrd->hd", np.array(pe(0, 6)), x["wr"])
    near(found.out, without.out, 1e-11)
    near(found.lse - without.lse, 3**-0.5 * np.einsum("bhld,hd->bhl", q, r), 1e-11)


# The memory


def test_a_state_holds_the_memory_and_the_open_segment(rng):
    """After 11 tokens in 4s: 3 open, and of the 8 before them the last 5."""
    x = arrays(rng)
    for spec, first in ((SPECS["segments"], 3), (SPECS["no memory"], 8), (SPECS["attached"], 7)):
        found = ra.evaluate(spec, x, want=("state",)).state
        near(found["hidden"], x["x"][:, first:], 0)


def test_no_gradient_reaches_a_token_of_an_earlier_segment_unless_attached(rng):
    """Of an output in the third segment, tokens 8 to 10, whose memory are tokens 3 to 7."""
    x, dout = arrays(rng), np.zeros((2, 4, 11, 2))
    dout[:, :, 8:] = rng.standard_normal((2, 4, 3, 2))
    attached = ra.TransformerXL(segment=4, memory=5, detach=False)
    stopped, through = (ra.vjp(spec, x, {"out": dout}) for spec in (SPECS["segments"], attached))
    assert not stopped.dx[:, :8].any()
    assert not through.dx[:, :3].any()
    assert (np.abs(through.dx[:, 3:8]).max(-1) > 0).all()
    near(stopped.dx[:, 8:], through.dx[:, 8:])
    for weight in ("dwq", "dwk", "dwv", "dwr", "du", "dw"):
        near(stopped[weight], through[weight])


def test_tokens_of_the_open_segment_that_came_before_the_call_have_gradients(rng):
    """Only a memory is detached: of 6 tokens in 4s, with 4 kept, the two of the open segment are none yet."""
    spec = ra.TransformerXL(segment=4, memory=4)
    x, before = arrays(rng, L=2), rng.standard_normal((2, 6, 5))
    from refattn import api

    problem = api.build(spec, x | {"state_hidden": before}, "float64", ("out",), 6)
    dout = rng.standard_normal((2, 4, 2, 2))
    found = problem.differentiate(np.asarray, {"out": dout}, ("x", "state_hidden"))
    whole = ra.vjp(
        spec, x | {"x": np.concatenate([before, x["x"]], 1)}, {"out": np.pad(dout, [(0, 0)] * 2 + [(6, 0), (0, 0)])}
    )
    near(found["dstate_hidden"], whole.dx[:, :6])
    near(found["dx"], whole.dx[:, 6:])
    assert not found["dstate_hidden"][:, :4].any()


def test_a_nan_reaches_the_queries_that_see_its_token_and_no_other(rng):
    x, spec = arrays(rng), SPECS["segments"]
    expected = evaluate(spec, x)
    x["x"][1, 3, 2] = np.nan
    found = evaluate(spec, x)
    hit = np.zeros((2, 4, 11), bool)
    hit[1, :, [t for t in range(11) if sees(spec, t, 3)]] = True
    for name in ("out", "lse"):
        assert np.isnan(found[name][hit]).all()
        near(found[name][~hit], expected[name][~hit], 0)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment is an integer from 1 on; given: 0"),
        ({"memory": -1}, "memory is an integer from 0 on; given: -1"),
        ({"memory": True}, "memory is an integer from 0 on; given: True"),
        ({"clamp": -1}, "clamp, where not None, is an integer from 0 on; given: -1"),
        ({"same_length": 1}, "same_length is True or False; given: 1"),
        ({"detach": None}, "detach is True or False; given: None"),
        ({"scale": math.nan}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.TransformerXL(**({"segment": 2, "memory": 2} | options))


def test_heads_that_do_not_divide_are_refused(rng):
    with pytest.raises(ShapeError, match="Hq must be a multiple of Hkv; given: Hq=4, Hkv=3"):
        ra.evaluate(SPECS["segments"], arrays(rng, Hkv=3))


def test_operations_count_keys_of_a_segment_and_its_memory():
    """2 (B L E (Hq D + Hkv (D + Dv)) + B Hq L keys (2 D + Dv)); a score matrix of B Hq L keys doubles."""
    found = ra.explain(SPECS["segments"], SIZES)
    assert found["operations"] == 2 * (2 * 11 * 5 * (12 + 10) + 2 * 4 * 11 * 9 * 8)
    assert found["score_matrix_bytes"] == 8 * 2 * 4 * 11 * 9
