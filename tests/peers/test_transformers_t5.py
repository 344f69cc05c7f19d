"""T5's buckets as transformers computes them, in float32, against ours in integers."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
pytest.importorskip("transformers", reason="transformers is not installed: make peers")

from transformers.models.t5.modeling_t5 import T5Attention, T5Config  # noqa: E402

import refattn as ra  # noqa: E402
from refattn.variants.t5 import bucket  # noqa: E402

KINDS = [(32, 128), (32, 256), (64, 256), (16, 100), (256, 4096)]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("buckets", "max_distance"), KINDS)
def test_no_bucket_differs(buckets, max_distance, bidirectional):
    ahead = range(-max_distance - 50, max_distance + 51)
    theirs = T5Attention._relative_position_bucket(torch.tensor(ahead), bidirectional, buckets, max_distance)
    spec = ra.T5(buckets=buckets, max_distance=max_distance, bidirectional=bidirectional)
    assert [bucket(spec, r) for r in ahead] == theirs.tolist()


@pytest.mark.parametrize("decoder", [False, True])
def test_the_layer_s_attention_is_sdpa_with_scale_1_and_this_bias(decoder):
    """Without its projections: identities in their place, its table ours; its own mask is added by hand."""
    torch.manual_seed(1)
    heads, width, length = 4, 8, 150
    config = T5Config(d_model=heads * width, d_kv=width, num_heads=heads, is_decoder=decoder, dropout_rate=0.0)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    with torch.no_grad():
        for projection in (layer.q, layer.k, layer.v, layer.o):
            projection.weight.copy_(torch.eye(heads * width))
        layer.relative_attention_bias.weight.normal_()
    hidden = torch.randn(2, length, heads * width, dtype=torch.float64)
    mask = torch.full((length, length), -1e300, dtype=torch.float64).triu(1)[None, None] if decoder else None
    theirs = layer(hidden, mask=mask)[0].detach().numpy()
    split = hidden.reshape(2, length, heads, width).transpose(1, 2).numpy()
    x = {"q": split, "k": split, "v": split, "t5_table": layer.relative_attention_bias.weight.detach().numpy()}
    spec = ra.SDPA(causal=decoder, scale=1.0, bias=ra.T5(bidirectional=not decoder))
    ours = ra.evaluate(spec, x).out.transpose(0, 2, 1, 3).reshape(theirs.shape)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
