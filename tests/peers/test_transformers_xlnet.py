"""Transformer-XL as the XLNet of transformers still has it, looking one way: memory, masks, sinusoids, clamp.

transformers itself has Transformer-XL no more. x-transformers has memories of hidden states, but no such scores.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
peer = pytest.importorskip(
    "transformers.models.xlnet.modeling_xlnet", reason="transformers is not installed: make peers"
)

import refattn as ra  # noqa: E402

HEADS, WIDTH, HIDDEN, SEGMENT = 3, 4, 12, 5


def model(memory, **options):
    torch.manual_seed(4)
    config = peer.XLNetConfig(
        vocab_size=9, d_model=HIDDEN, n_layer=1, n_head=HEADS, d_inner=8, attn_type="uni", mem_len=memory, dropout=0.0,
        **options,
    )  # fmt: skip
    found = peer.XLNetModel(config).double().eval()
    layer = found.layer[0].rel_attn
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.5)
    return found, layer


def ours_of(layer):
    """The layer's arrays by our names."""
    found = {"wq": layer.q, "wk": layer.k, "wv": layer.v, "wr": layer.r}
    turned = {name: p.permute(1, 0, 2).detach().numpy() for name, p in found.items()}
    return turned | {"u": layer.r_w_bias.detach().numpy(), "w": layer.r_r_bias.detach().numpy()}


def theirs(whole, layer, memory, hidden):
    """(H,L,D) of one segment after a memory, both (n,E), and whatever mask the model makes for it."""
    count, there = len(hidden), len(memory)
    positions = whole.relative_positional_encoding(count, count + there, bsz=1).double()
    both = torch.cat([memory, hidden])[:, None]
    r = torch.einsum("ibh,hnd->ibnd", positions, layer.r)
    q, k, v = (
        torch.einsum("ibh,hnd->ibnd", a, w) for a, w in ((both[there:], layer.q), (both, layer.k), (both, layer.v))
    )
    mask = whole.create_mask(count, there).double()[:, :, None, None]
    return layer.rel_attn_core(q, k, v, r, attn_mask=mask)[:, 0].permute(1, 0, 2)


@pytest.mark.parametrize("clamp", [None, 3])
@pytest.mark.parametrize("same_length", [False, True])
@pytest.mark.parametrize("memory", [5, 7])
def test_segments_of_the_layer_and_their_gradients_are_ours(memory, same_length, clamp):
    """The mask of its same_length is drawn for a full memory, so the comparison begins where the memory is full."""
    whole, layer = model(memory, same_length=same_length, clamp_len=clamp or -1)
    x = torch.randn(4 * SEGMENT, HIDDEN, dtype=torch.float64, requires_grad=True)
    spec = ra.TransformerXL(segment=SEGMENT, memory=memory, same_length=same_length, clamp=clamp)
    inputs = ours_of(layer) | {"x": x.detach().numpy()[None]}
    found = ra.evaluate(spec, inputs).out[0]
    dout, total = torch.randn(HEADS, 4 * SEGMENT, WIDTH, dtype=torch.float64), 0
    for begin in range(2 * SEGMENT, 4 * SEGMENT, SEGMENT):
        rows = slice(begin, begin + SEGMENT)
        expected = theirs(whole, layer, x[begin - memory : begin].detach(), x[rows])
        # The model's sinusoids come from float32 angles.
        np.testing.assert_allclose(found[:, rows], expected.detach().numpy(), rtol=1e-4, atol=1e-5)
        total = total + (expected * dout[:, rows]).sum()
    total.backward()
    weight = dout.numpy()[None].copy()
    weight[:, :, : 2 * SEGMENT] = 0
    gradients = ra.vjp(spec, inputs, {"out": weight})
    pairs = {"wq": layer.q, "wk": layer.k, "wv": layer.v, "wr": layer.r}
    expected = {name: p.grad.permute(1, 0, 2) for name, p in pairs.items()}
    expected |= {"u": layer.r_w_bias.grad, "w": layer.r_r_bias.grad, "x": x.grad[None]}
    for name, gradient in expected.items():
        np.testing.assert_allclose(gradients[f"d{name}"], gradient.numpy(), rtol=1e-3, atol=1e-4)


def test_its_shift_drops_a_distance_first_and_agrees_with_ours():
    """Its sinusoids begin at the distance `keys`, one beyond any, and its shift reads them one column on."""
    whole, layer = model(4)
    positions = whole.relative_positional_encoding(2, 6, bsz=1)
    assert positions.shape[0] == 7
    scores = torch.arange(14.0).reshape(1, 1, 2, 7)
    moved = peer.XLNetRelativeAttention.rel_shift_bnij(scores, klen=6)[0, 0]
    # Query 0 stands at key 4: its own key has the distance 0, column 6 of 7; query 1 at key 5.
    assert moved[0, :5].tolist() == [2.0, 3.0, 4.0, 5.0, 6.0]
    assert moved[1].tolist() == [8.0, 9.0, 10.0, 11.0, 12.0, 13.0]
    # The key after query 0 holds a number of query 1: its row's first.
    assert moved[0, 5] == 7.0
