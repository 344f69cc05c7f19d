"""Attention alignment against transformers' T5 layer, which has no temperature but parameters that can be divided."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
pytest.importorskip("transformers", reason="transformers is not installed: make peers")

from transformers.models.t5.modeling_t5 import T5Attention, T5Config  # noqa: E402

import refattn as ra  # noqa: E402


@pytest.mark.parametrize("divide", ["logits", "scores"])
@pytest.mark.parametrize("decoder", [False, True])
def test_a_layer_whose_queries_and_table_are_divided(decoder, divide):
    """Its own mask is added by hand; with divide="scores" its table stays as it is."""
    torch.manual_seed(2)
    heads, width, length = 4, 8, 40
    config = T5Config(d_model=heads * width, d_kv=width, num_heads=heads, is_decoder=decoder, dropout_rate=0.0)
    layer = T5Attention(config, has_relative_attention_bias=True, layer_idx=0).double().eval()
    tau = torch.tensor([0.5, 0.75, 1.0, 2.0], dtype=torch.float64)
    table = torch.randn(layer.relative_attention_bias.weight.shape, dtype=torch.float64)
    eye = torch.eye(heads * width, dtype=torch.float64)
    with torch.no_grad():
        for projection in (layer.k, layer.v, layer.o):
            projection.weight.copy_(eye)
        layer.q.weight.copy_(eye / tau.repeat_interleave(width)[:, None])
        layer.relative_attention_bias.weight.copy_(table / tau if divide == "logits" else table)
    hidden = torch.randn(2, length, heads * width, dtype=torch.float64)
    mask = torch.full((length, length), -1e300, dtype=torch.float64).triu(1)[None, None] if decoder else None
    theirs = layer(hidden, mask=mask)[0].detach().numpy()
    split = hidden.reshape(2, length, heads, width).transpose(1, 2).numpy()
    x = {"q": split, "k": split, "v": split, "temperature": tau.numpy(), "t5_table": table.numpy()}
    spec = ra.AttentionAlignment(bias=ra.T5(bidirectional=not decoder), causal=decoder, divide=divide)
    ours = ra.evaluate(spec, x).out.transpose(0, 2, 1, 3).reshape(theirs.shape)
    np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-10)
