"""Infini-attention as the package infini-transformer-pytorch computes it, segment by segment, against ours.

Its departures are options here: a gate that weighs the local part, no gate while the memory is empty, a divisor of at
least 1e-10. What it writes while decoding through its cache is what it writes of whole segments, as with us.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
peer = pytest.importorskip(
    "infini_transformer_pytorch.infini_transformer", reason="infini-transformer-pytorch is not installed: make peers"
)

import refattn as ra  # noqa: E402

HEADS, WIDTH, SEGMENT = 3, 4, 5
DELTA = pytest.mark.parametrize("delta", [False, True], ids=["linear", "delta"])


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(5)


def layer_of(delta):
    layer = peer.CausalAttention(HEADS * WIDTH, dim_head=WIDTH, heads=HEADS, use_mem_delta_rule=delta).double()
    torch.nn.init.normal_(layer.fastweight_mem.head_gates)
    return layer


def spec_of(delta):
    turning = ra.RoPE(pairing="interleaved", angles="table")
    return ra.InfiniAttention(
        segment=SEGMENT, update="delta" if delta else "linear", weighs="local", first="skip", divisor="clamp",
        epsilon=1e-10, rotary=turning,
    )  # fmt: skip


def inputs_of(layer, x):
    """q, k, v, and the peer's own frequencies, which are float32's, as a table of one segment."""
    q, k, v = layer.split_heads(layer.to_qkv(layer.norm(x)))
    angles = torch.arange(SEGMENT)[:, None] * layer.rotary_emb.freqs
    found = {"q": q, "k": k, "v": v, "gate": layer.fastweight_mem.head_gates}
    found |= {"rope_cos": angles.cos(), "rope_sin": angles.sin()}
    return {name: a.detach().numpy().astype(np.float64) for name, a in found.items()}


def by_segments(layer, x):
    outs, memories = [], None
    for begin in range(0, x.shape[1], SEGMENT):
        piece = x[:, begin : begin + SEGMENT]
        out, _, memories = layer(piece, past_memories=memories, return_new_memories=piece.shape[1] == SEGMENT)
        outs.append(out)
    return torch.cat(outs, 1), memories


def by_tokens(layer, x):
    outs, cache, memories = [], None, None
    for t in range(x.shape[1]):
        ends = (t + 1) % SEGMENT == 0
        out, cache, memories = layer(x[:, t : t + 1], cache, memories, return_new_memories=ends)
        outs.append(out)
    return torch.cat(outs, 1), memories


@DELTA
@pytest.mark.parametrize("feed", [by_segments, by_tokens])
def test_the_layer_s_output_and_memory_are_ours(feed, delta):
    layer = layer_of(delta)
    x = torch.randn(2, 18, HEADS * WIDTH, dtype=torch.float64)
    expected, memories = feed(layer, x)
    found = ra.evaluate(spec_of(delta), inputs_of(layer, x), want=("out", "state"))
    out = layer.to_out(layer.merge_heads(torch.from_numpy(found.out)))
    np.testing.assert_allclose(out.detach().numpy(), expected.detach().numpy(), rtol=1e-10, atol=1e-12)
    for name, theirs in zip(("memory", "weight"), memories, strict=True):
        np.testing.assert_allclose(found.state[name], theirs.detach().numpy(), rtol=1e-10, atol=1e-12)


@DELTA
def test_gradients_through_the_memory_are_ours(delta):
    layer = layer_of(delta)
    x = torch.randn(2, 18, HEADS * WIDTH, dtype=torch.float64)
    parts = []
    hook = layer.split_heads.register_forward_hook(lambda *call: parts.append(call[-1]))
    out = by_segments(layer, x)[0]
    hook.remove()
    for part in parts:
        part.retain_grad()
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    dout = layer.split_heads((weight @ layer.to_out.weight).repeat(1, 1, 3))[0].detach().numpy()
    found = ra.vjp(spec_of(delta), inputs_of(layer, x), {"out": dout}, wrt=("q", "k", "v", "gate"))
    theirs = torch.cat([part.grad for part in parts], 3).numpy()
    for name, grad in zip(("dq", "dk", "dv"), theirs, strict=True):
        np.testing.assert_allclose(found[name], grad, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.dgate, layer.fastweight_mem.head_gates.grad.numpy(), rtol=1e-9, atol=1e-11)
