"""Shaw's keys as transformers computes them ("relative_key" of two speech encoders), against ours; no peer has values.

Both clip the sides at distances of their own, which where equal is our `clip`, and are not causal.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
pytest.importorskip("transformers", reason="transformers is not installed: make peers")

import refattn as ra  # noqa: E402

HEADS, WIDTH, LENGTH, CLIP = 3, 4, 9, 3
OPTIONS = {
    "position_embeddings_type": "relative_key",
    "left_max_position_embeddings": CLIP,
    "right_max_position_embeddings": CLIP,
    "hidden_size": HEADS * WIDTH,
    "attn_implementation": "eager",
}


def wav2vec2_bert():
    from transformers.models.wav2vec2_bert import configuration_wav2vec2_bert as options
    from transformers.models.wav2vec2_bert import modeling_wav2vec2_bert as models

    config = options.Wav2Vec2BertConfig(num_attention_heads=HEADS, attention_dropout=0.0, **OPTIONS)
    return models.Wav2Vec2BertSelfAttention(config)


def seamless_m4t_v2():
    from transformers.models.seamless_m4t_v2 import configuration_seamless_m4t_v2 as options
    from transformers.models.seamless_m4t_v2 import modeling_seamless_m4t_v2 as models

    config = options.SeamlessM4Tv2Config(speech_encoder_attention_heads=HEADS, speech_encoder_dropout=0.0, **OPTIONS)
    return models.SeamlessM4Tv2ConformerSelfAttention(config)


def split(x):
    """(B, L, H·D) to (B, H, L, D)."""
    return x.reshape(*x.shape[:2], HEADS, WIDTH).transpose(1, 2)


@pytest.mark.parametrize("made", [wav2vec2_bert, seamless_m4t_v2])
def test_the_layer_s_output_and_the_table_s_gradient_are_ours(made):
    torch.manual_seed(5)
    layer = made().double().eval()
    x = torch.randn(2, LENGTH, HEADS * WIDTH, dtype=torch.float64)
    inputs = {
        n: split(project(x)).detach().numpy()
        for n, project in zip("qkv", (layer.linear_q, layer.linear_k, layer.linear_v), strict=True)
    }
    inputs["shaw_k"] = layer.distance_embedding.weight.detach().numpy()
    spec = ra.SDPA(content=ra.Shaw(clip=CLIP, values=False))

    expected = layer(x)[0]
    out = torch.from_numpy(ra.evaluate(spec, inputs).out).transpose(1, 2).reshape(2, LENGTH, -1)
    np.testing.assert_allclose(
        layer.linear_out(out).detach().numpy(), expected.detach().numpy(), rtol=1e-11, atol=1e-13
    )

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    dout = split(weight @ layer.linear_out.weight).detach().numpy()
    found = ra.vjp(spec, inputs, {"out": dout}, wrt=("shaw_k",)).dshaw_k
    np.testing.assert_allclose(found, layer.distance_embedding.weight.grad.numpy(), rtol=1e-10, atol=1e-12)
