"""Sinusoidal tables and a layer as transformers has them, against ours, which is exact where theirs is in float32."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
pytest.importorskip("transformers", reason="transformers is not installed: make peers")

from transformers import MarianConfig  # noqa: E402
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding  # noqa: E402
from transformers.models.marian.modeling_marian import (  # noqa: E402
    MarianAttention,
    MarianSinusoidalPositionalEmbedding,
)
from transformers.models.speech_to_text.modeling_speech_to_text import (  # noqa: E402
    Speech2TextSinusoidalPositionalEmbedding,
)

import refattn as ra  # noqa: E402
from refattn.variants.sinusoidal import table  # noqa: E402

FAIRSEQ = ra.Sinusoidal(layout="concatenated", denominator="half_minus_one")
LENGTH, PADDING = 6000, 1


@pytest.mark.parametrize("width", [8, 9, 64])
def test_marian_s_table_is_ours_rounded_to_float32(width):
    """Its angles are in float64: what differs is one rounding of each sine and cosine."""
    theirs = MarianSinusoidalPositionalEmbedding(LENGTH, width).create_weight().numpy()
    ours = table(ra.Sinusoidal(layout="concatenated"), LENGTH, width, np.zeros(1))
    assert np.abs(theirs - ours).max() <= 2.0**-25 * 1.001


@pytest.mark.parametrize("width", [8, 9, 64])
@pytest.mark.parametrize("peer", [M2M100SinusoidalPositionalEmbedding, Speech2TextSinusoidalPositionalEmbedding])
def test_fairseq_s_table_is_ours_but_for_angles_in_float32(peer, width):
    """Near position 0 by some units of float32; farther on in proportion to the position, to more than 1e-5."""
    theirs = peer.get_embedding(LENGTH, width).numpy()
    gap = np.abs(theirs - table(FAIRSEQ, LENGTH, width, np.zeros(1))).max(1)
    assert (gap <= 2.0**-22 * (1 + np.arange(LENGTH))).all()
    assert gap.max() > 1e-5


@pytest.mark.parametrize("peer", [M2M100SinusoidalPositionalEmbedding, Speech2TextSinusoidalPositionalEmbedding])
def test_the_other_denominator_and_the_other_layout_are_not_fairseq_s(peer):
    theirs = peer.get_embedding(9, 8).numpy()
    for other in (ra.Sinusoidal(layout="concatenated"), ra.Sinusoidal(denominator="half_minus_one")):
        assert np.abs(theirs - table(other, 9, 8, np.zeros(1))).max() > 0.01


@pytest.mark.parametrize("peer", [M2M100SinusoidalPositionalEmbedding, Speech2TextSinusoidalPositionalEmbedding])
def test_positions_begin_after_the_padding_index_and_padding_has_none(peer):
    """offset = padding_idx + 1; a padded token has an embedding of 0, and those after it count on as if it were not."""
    layer = peer(32, 8, padding_idx=PADDING)
    spec = ra.Sinusoidal(layout="concatenated", denominator="half_minus_one", offset=PADDING + 1)
    ours = table(spec, 5, 8, np.zeros(1))
    found = layer(torch.tensor([[5, 6, 7, 8, 9], [5, 6, 7, PADDING, PADDING], [PADDING, PADDING, 7, 8, 9]])).numpy()
    np.testing.assert_allclose(found[0], ours, atol=2e-6)
    np.testing.assert_allclose(found[1, :3], ours[:3], atol=2e-6)
    np.testing.assert_allclose(found[2, 2:], ours[:3], atol=2e-6)
    assert not found[1, 3:].any()
    assert not found[2, :2].any()


def test_width_2_and_3_divide_by_0_there_and_have_a_frequency_of_1_here():
    with pytest.raises(ZeroDivisionError):
        M2M100SinusoidalPositionalEmbedding.get_embedding(4, 3)
    p = np.arange(4)
    np.testing.assert_allclose(
        table(FAIRSEQ, 4, 3, np.zeros(1)), np.stack([np.sin(p), np.cos(p), 0 * p], 1), atol=1e-15
    )


@pytest.mark.parametrize("causal", [False, True])
def test_marian_s_first_layer_is_ours(causal):
    """Embeddings times √E plus its table, then its attention: output and the gradient of the embeddings."""
    torch.manual_seed(7)
    heads, width, length = 4, 16, 11
    config = MarianConfig(d_model=width, decoder_attention_heads=heads, attn_implementation="eager")
    layer = MarianAttention(width, heads, is_decoder=causal, is_causal=causal, config=config, bias=False).double()
    with torch.no_grad():
        layer.out_proj.weight.copy_(torch.eye(width))
    positions = MarianSinusoidalPositionalEmbedding(length, width).create_weight().double()
    x = torch.randn(2, length, width, dtype=torch.float64, requires_grad=True)
    mask = torch.full((length, length), -1e300, dtype=torch.float64).triu(1)[None, None] if causal else None
    theirs = layer(width**0.5 * x + positions, attention_mask=mask)[0]
    weight = torch.randn_like(theirs)
    (theirs * weight).sum().backward()

    def split(matrix):
        return matrix.weight.detach().reshape(heads, width // heads, width).transpose(1, 2).numpy()

    spec = ra.Sinusoidal(layout="concatenated", multiplier="sqrt", causal=causal)
    inputs = {"x": x.detach().numpy(), "wq": split(layer.q_proj), "wk": split(layer.k_proj), "wv": split(layer.v_proj)}
    ours = ra.evaluate(spec, inputs).out.transpose(0, 2, 1, 3).reshape(theirs.shape)
    np.testing.assert_allclose(ours, theirs.detach().numpy(), atol=2e-7)
    dout = weight.reshape(2, length, heads, -1).transpose(1, 2).numpy()
    np.testing.assert_allclose(ra.vjp(spec, inputs, {"out": dout}).dx, x.grad.numpy(), atol=5e-6)
