"""Informer's attention as transformers computes it, its sample, counts and sums by the options that name them."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
pytest.importorskip("transformers", reason="transformers is not installed: make peers")

from transformers.models.informer import modeling_informer as peer  # noqa: E402

import refattn as ra  # noqa: E402

HEADS, WIDTH = 2, 4


def layer(length, monkeypatch, *, decoder=False, masked=True, factor=1, batch=2):
    """A layer of theirs on hidden states of that length: q, k, v, the drawn keys, and its output."""
    torch.manual_seed(length)
    attention = peer.InformerProbSparseAttention(HEADS * WIDTH, HEADS, is_decoder=decoder, sampling_factor=factor)
    attention = attention.double().eval()
    with torch.no_grad():
        attention.out_proj.weight.copy_(torch.eye(HEADS * WIDTH))
        attention.out_proj.bias.zero_()
    hidden = torch.randn(batch, length, HEADS * WIDTH, dtype=torch.float64)
    drawn, draw = [], torch.randint
    monkeypatch.setattr(torch, "randint", lambda *a, **b: drawn.append(draw(*a, **b)) or drawn[-1])
    mask = None
    if decoder and masked:
        # In float64, which holds less than this as −∞ would be: nothing of a later key is left.
        mask = torch.full((length, length), -1e300, dtype=torch.float64).triu(1).expand(batch, 1, -1, -1)
    out = attention(hidden, attention_mask=mask)[0]
    parts = (attention.q_proj, attention.k_proj, attention.v_proj)
    split = [part(hidden).reshape(batch, length, HEADS, WIDTH).transpose(1, 2) for part in parts]
    x = {name: a.detach().numpy() for name, a in zip("qkv", split, strict=True)}
    # One draw for all queries together: equal rows.
    x["sample"] = np.broadcast_to(drawn[0].numpy(), (length, len(drawn[0])))
    return x, out.reshape(batch, length, HEADS, WIDTH).transpose(1, 2).detach().numpy()


def counts(length, factor):
    """What they sample and choose: log1p, and a sample factor · Lq times as large as the paper's."""
    log = math.ceil(math.log1p(length))
    return min(factor * length * log, length), min(factor * log, length)


@pytest.mark.parametrize(("length", "factor"), [(13, 1), (20, 2), (30, 5)])
def test_the_encoder_s_attention_is_the_mean_and_u_rows(length, factor, monkeypatch):
    x, theirs = layer(length, monkeypatch, factor=factor)
    samples, queries = counts(length, factor)
    assert x["sample"].shape == (length, samples)
    found = ra.evaluate(ra.Informer(queries=queries), x, want=("out", "margin"))
    assert (found.margin > 1e-6).all()
    np.testing.assert_allclose(found.out, theirs, rtol=1e-11, atol=1e-12)


def test_the_decoder_s_attention_adds_values_up_without_dividing(monkeypatch):
    x, theirs = layer(17, monkeypatch, decoder=True)
    queries = counts(17, 1)[1]
    ours = ra.evaluate(ra.Informer(queries=queries, causal=True, lazy="cumsum"), x).out
    # Their context goes through float32.
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)
    divided = ra.evaluate(ra.Informer(queries=queries, causal=True, lazy="cummean"), x).out
    assert np.abs(divided - theirs).max() > 0.1


def test_without_a_mask_the_decoder_s_chosen_rows_see_every_key_beside_sums_of_the_past(monkeypatch):
    """No option of ours reproduces the mixture: chosen rows are those of the encoder, the others the decoder's."""
    x, theirs = layer(17, monkeypatch, decoder=True, masked=False)
    queries = counts(17, 1)[1]
    whole = ra.evaluate(ra.Informer(queries=queries), x, want=("out", "indices"))
    sums = ra.evaluate(ra.Informer(queries=queries, causal=True, lazy="cumsum"), x).out
    chosen = np.zeros((2, HEADS, 17, 1), bool)
    np.put_along_axis(chosen, whole.indices[..., None], True, 2)
    np.testing.assert_allclose(np.where(chosen, whole.out, sums), theirs, rtol=1e-5, atol=1e-6)


def test_their_count_of_queries_is_not_the_paper_s(monkeypatch):
    """⌈ln(1 + 20)⌉ = 4 where ⌈ln 20⌉ = 3: the default u gives one row less."""
    x, theirs = layer(20, monkeypatch)
    ours = ra.evaluate(ra.Informer(factor=1), x, want=("out", "indices"))
    assert ours.indices.shape[-1] == 3
    rows = np.abs(ours.out - theirs).max(-1) > 1e-9
    np.testing.assert_array_equal(rows.sum(-1), np.ones((2, HEADS)))


def test_their_sample_of_a_self_attention_is_as_large_as_the_keys():
    """min(factor · L ⌈ln(1 + L)⌉, L) = L, so that both divisors agree and nothing is spared in the measure."""
    assert all(counts(n, 1)[0] == n for n in range(1, 200))
