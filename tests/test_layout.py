import numpy as np
import pytest
from checks import near, same

import refattn as ra
from refattn.errors import LayoutError, ShapeError
from refattn.layout import inward, offsets, outward, pack, unpack


@pytest.fixture
def packed(rng):
    """Three sequences of 2, 0 and 3 queries over 1, 2 and 3 keys."""
    return {name: rng.standard_normal((n, h, d)) for name, n, h, d in (("q", 5, 2, 3), ("k", 6, 1, 3), ("v", 6, 1, 2))}


CU_Q, CU_K = np.array([0, 2, 2, 5]), np.array([0, 1, 3, 6])


def test_unpack_and_pack_are_inverse(rng):
    tokens = rng.standard_normal((5, 2))
    padded = unpack(tokens, CU_Q)
    assert padded.shape == (3, 3, 2)
    same(padded[0], np.concatenate([tokens[:2], np.zeros((1, 2))]))
    same(padded[1], np.zeros((3, 2)))
    same(pack(padded, CU_Q), tokens)


@pytest.mark.parametrize("cu", [[0], [0, 0], [0, 0, 0]], ids=str)
def test_no_sequence_and_empty_sequences(cu):
    cu = np.array(cu)
    nothing = np.zeros((0, 2, 3))
    assert unpack(nothing, cu).shape == (len(cu) - 1, 0, 2, 3)
    same(pack(unpack(nothing, cu), cu), nothing)
    out = ra.attention(nothing, nothing, nothing, layout="thd", cu_seqlens_q=cu)
    assert out.shape == (0, 2, 3)


def test_inward_and_outward_of_each_layout(rng):
    arrays = {name: rng.standard_normal((2, 3, 4, 5)) for name in "qkv"}
    held, at = inward(arrays, "bhsd")
    assert held is arrays
    assert at is None
    turned, at = inward(arrays, "bshd")
    assert turned["q"].shape == (2, 4, 3, 5)
    same(outward(turned["q"], "bshd", at), arrays["q"])


def test_inward_of_packed_sequences(packed):
    given = packed | {"k_positions": np.arange(6), "sink": np.zeros(2)}
    padded, at = inward(given, "thd", cu_seqlens_q=CU_Q, cu_seqlens_k=CU_K)
    assert padded["q"].shape == (3, 2, 3, 3)
    assert padded["v"].shape == (3, 1, 3, 2)
    same(padded["k_positions"], np.array([[0, 0, 0], [1, 2, 0], [3, 4, 5]]))
    same(padded["q_lengths"], np.array([2, 0, 3]))
    same(padded["kv_lengths"], np.array([1, 2, 3]))
    assert padded["sink"] is given["sink"]
    same(outward(padded["q"], "thd", at), packed["q"])


def test_keys_are_packed_as_queries_where_nothing_else_is_said(rng):
    q, k, v = rng.standard_normal((3, 5, 2, 3))
    one = ra.attention(q, k, v, layout="thd", cu_seqlens_q=CU_Q, causal=True)
    same(ra.attention(q, k, v, layout="thd", cu_seqlens_q=CU_Q, cu_seqlens_k=CU_Q.tolist(), causal=True), one)
    same(one[:1], v[:1])


def test_keys_packed_otherwise_than_queries_of_the_same_number(rng):
    q, v = rng.standard_normal((2, 5, 1, 2))
    out = ra.attention(q * 0, q, v, layout="thd", cu_seqlens_q=[0, 2, 5], cu_seqlens_k=[0, 1, 5])
    near(out, np.concatenate([v[[0, 0]], np.broadcast_to(v[1:].mean(0), (3, 1, 2))]))


def test_packed_segments_and_positions_go_with_their_tokens(packed):
    options = {"layout": "thd", "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K}
    ids = np.array([0, 1, 0, 0, 9]), np.array([0, 0, 0, 0, 0, 1])
    out = ra.attention(*packed.values(), segment_ids=ids, **options)
    assert not out[[1, 4]].any()
    same(out[0], np.repeat(packed["v"][0], 2, 0))
    same(ra.attention(*packed.values(), q_positions=np.arange(5), **options), ra.attention(*packed.values(), **options))


@pytest.mark.parametrize(
    ("cu", "message"),
    [
        ([0.0, 5.0], "vector of B . 1 integers; given: shape .2,., float64"),
        ([[0, 5]], "vector of B . 1 integers; given: shape .1, 2."),
        ([], "vector of B . 1 integers"),
        ([1, 5], "rise from 0 to the packed length 5; given: .1, 5."),
        ([0, 4], "rise from 0 to the packed length 5"),
        ([0, 6], "rise from 0 to the packed length 5"),
        ([0, 4, 3, 5], "rise from 0 to the packed length 5"),
    ],
    ids=str,
)
def test_offsets_refuse(cu, message):
    with pytest.raises(ShapeError, match=message):
        offsets("cu_seqlens_q", np.array(cu), 5)


def test_unsigned_offsets_that_fall_are_refused():
    with pytest.raises(ShapeError, match="rise from 0"):
        offsets("cu_seqlens_q", np.array([0, 4, 3, 5], np.uint32), 5)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"layout": "bhsd"}, LayoutError, "layout='thd' goes with cu_seqlens_q"),
        ({"cu_seqlens_q": None}, LayoutError, "layout='thd' goes with cu_seqlens_q"),
        ({"cu_seqlens_k": [0, 6]}, ShapeError, "the same number of sequences"),
        ({"cu_seqlens_k": None}, ShapeError, "packed k begins with 5 tokens.*given: .6, 1, 3."),
        ({"v": np.zeros((5, 1, 2))}, ShapeError, "packed v begins with 6 tokens.*given: .5, 1, 2."),
        ({"q_positions": np.arange(4)}, ShapeError, "packed q_positions begins with 5 tokens"),
        ({"kv_lengths": [1, 2, 3]}, LayoutError, "has its lengths in cu_seqlens_q and cu_seqlens_k"),
        ({"q": np.zeros((1, 5, 2, 3))}, ShapeError, "needs q of 3 dimensions, .token, head, width.; given: q .1, 5"),
        ({"v": None}, ShapeError, "needs v of 3 dimensions"),
        ({"mask": np.ones((5, 6), bool)}, ShapeError, "mask .5, 6. does not broadcast"),
    ],
    ids=lambda p: str(p)[:30],
)
def test_packed_attention_refuses(packed, change, error, message):
    given = packed | {"layout": "thd", "cu_seqlens_q": CU_Q, "cu_seqlens_k": CU_K} | change
    with pytest.raises(error, match=message):
        ra.attention(**given)


def test_offsets_of_keys_without_packing_are_not_passed_over():
    x = np.zeros((1, 1, 2, 2))
    with pytest.raises(LayoutError, match="cu_seqlens_k"):
        ra.attention(x, x, x, cu_seqlens_k=[0, 2])
