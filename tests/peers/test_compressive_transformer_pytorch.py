"""compressive-transformer-pytorch against ours: its convolution, its memories, its loss, and where it departs."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
peer = pytest.importorskip(
    "compressive_transformer_pytorch.compressive_transformer_pytorch",
    reason="compressive-transformer-pytorch is not installed: make peers",
)

import refattn as ra  # noqa: E402
from refattn.errors import SpecError  # noqa: E402

HEADS, WIDTH, SEGMENT, RATE, SLOTS = 2, 3, 4, 2, 3
HIDDEN = HEADS * WIDTH
ALL = ("out", "lse", "reconstruction", "state")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(6)


def layer_of(memory=SEGMENT, rate=RATE, segment=SEGMENT):
    return peer.SelfAttention(HIDDEN, segment, memory, SLOTS, rate, heads=HEADS).double()


def split(matrix):
    """A Linear's weight (H·D, E) as (H, E, D)."""
    return matrix.detach().numpy().reshape(HEADS, WIDTH, HIDDEN).transpose(0, 2, 1)


def heads_of(rows):
    """(B,n,H·D) as (B,H,n,D)."""
    return rows.reshape(*rows.shape[:2], HEADS, WIDTH).transpose(1, 2)


def positions(count):
    """Our wr, and sinusoids times wr: what a layer may have learned as vectors (H,n,D) of the distances 0 to n − 1."""
    wr = torch.randn(HEADS, 8, WIDTH).double()
    angles = torch.arange(count)[:, None] / 10000 ** (torch.arange(4).double() / 4)
    return wr, torch.cat([angles.sin(), angles.cos()], 1) @ wr


def ours_of(layer, wr):
    """The layer's arrays by our names."""
    wk, wv = layer.to_kv.weight.chunk(2)
    conv = layer.compress_mem_fn.conv
    return {
        "wq": split(layer.to_q.weight),
        "wk": split(wk),
        "wv": split(wv),
        "wr": wr.numpy(),
        "u": np.zeros((HEADS, WIDTH)),
        "w": np.zeros((HEADS, WIDTH)),
        "kernel": conv.weight.detach().numpy().transpose(2, 1, 0),
        "kernel_bias": conv.bias.detach().numpy(),
    }


def fed(layer, x, vectors, segment=SEGMENT):
    """Heads' outputs (B,H,L,D), the loss of every segment, and the memories at the end."""
    memories, outs, losses = None, [], []
    layer.to_out = torch.nn.Identity()
    for begin in range(0, x.shape[1], segment):
        # It reads the vectors of distances n − 1 to 0, so those of a segment come last.
        out, memories, loss = layer(x[:, begin : begin + segment], memories=memories, pos_emb=vectors.flip(1))
        outs.append(heads_of(out))
        losses.append(loss.sum())
    return torch.cat(outs, 2), losses, memories


@pytest.mark.parametrize("memory", [SEGMENT, 2 * SEGMENT])
def test_outputs_memories_and_slots_are_ours(memory):
    layer, x = layer_of(memory), torch.randn(2, 7 * SEGMENT, HIDDEN).double()
    wr, vectors = positions(SEGMENT + memory + SLOTS)
    spec = ra.Compressive(segment=SEGMENT, memory=memory, compressed=SLOTS, rate=RATE)
    found = ra.evaluate(spec, ours_of(layer, wr) | {"x": x.numpy()}, want=ALL)
    out, _, memories = fed(layer.eval(), x, vectors)
    np.testing.assert_allclose(found.out, out.detach().numpy(), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(found.state["slots"], memories.compressed_mem.detach().numpy(), rtol=1e-12)
    np.testing.assert_array_equal(found.state["hidden"], memories.mem.detach().numpy())


@pytest.mark.parametrize("memory", [SEGMENT, 2 * SEGMENT])
def test_its_loss_is_ours_where_the_memory_is_one_segment(memory):
    """Otherwise it weighs all of the memory against the slots of its oldest segment."""
    layer, x = layer_of(memory), torch.randn(2, 4 * SEGMENT, HIDDEN).double()
    wr, vectors = positions(SEGMENT + memory + SLOTS)
    spec = ra.Compressive(segment=SEGMENT, memory=memory, compressed=SLOTS, rate=RATE)
    inputs = ours_of(layer, wr) | {"x": x.numpy()}
    found = ra.evaluate(spec, inputs, want=ALL).reconstruction.reshape(2, 4, SEGMENT)
    assert not found[:, :, :-1].any()
    _, losses, _ = fed(layer, x, vectors)
    theirs = np.array([loss.item() for loss in losses])
    per_segment = found[:, :, -1].mean(0)
    first = memory // SEGMENT
    assert not theirs[:first].any()
    assert not per_segment[:first].any()
    if memory != SEGMENT:
        tokens, slots = inputs["x"][:, SEGMENT : 3 * SEGMENT], inputs["x"][:, SEGMENT : 2 * SEGMENT]
        slots = layer.compress_mem_fn(torch.from_numpy(slots))
        q, *rows = (torch.from_numpy(a) for a in (inputs["x"][:, 3 * SEGMENT :], tokens))
        q = heads_of(layer.to_q(q))
        whole, fresh = (peer.full_attn(q, *map(heads_of, layer.to_kv(a).chunk(2, -1))) for a in (*rows, slots))
        np.testing.assert_allclose(theirs[3], (whole - fresh).square().mean().item(), rtol=1e-10)
        assert abs(theirs[2] - per_segment[2]) > 0.1 * per_segment[2]
        return
    np.testing.assert_allclose(per_segment, theirs, rtol=1e-10)
    sum(losses).backward()
    conv = layer.compress_mem_fn.conv
    gradients = ra.vjp(spec, inputs, {"reconstruction": np.full((2, 4 * SEGMENT), 0.5)})
    np.testing.assert_allclose(gradients.dkernel, conv.weight.grad.numpy().transpose(2, 1, 0), rtol=1e-9)
    np.testing.assert_allclose(gradients.dkernel_bias, conv.bias.grad.numpy(), rtol=1e-9)
    assert layer.to_q.weight.grad is None


def test_training_it_once_stops_the_gradient_of_its_keys_and_values():
    layer, x, vectors = layer_of(), torch.randn(1, 2 * SEGMENT, HIDDEN).double(), positions(12)[1]
    assert layer.to_kv.weight.requires_grad
    fed(layer, x, vectors)
    assert not layer.to_kv.weight.requires_grad


def test_a_piece_shorter_than_a_segment_leaves_its_memories_as_they_were():
    """Here its tokens are kept, and the segment ends with the next call."""
    layer, spec = layer_of(), ra.Compressive(segment=SEGMENT, memory=SEGMENT, compressed=SLOTS, rate=RATE)
    x, (wr, vectors) = torch.randn(1, 6, HIDDEN).double(), positions(12)
    _, _, memories = fed(layer.eval(), x, vectors)
    np.testing.assert_array_equal(memories.mem.numpy(), x[:, :4].numpy())
    ours = ra.evaluate(spec, ours_of(layer, wr) | {"x": x.numpy()}, want=("state",)).state
    np.testing.assert_array_equal(ours["hidden"], x.numpy())


def test_what_leaves_is_padded_by_the_remainder_on_its_left_where_the_rate_does_not_divide_it():
    """Of 5 tokens and a rate of 4 one zero goes before them, and the last two are lost; here this is refused."""
    layer = layer_of(memory=5, rate=4, segment=5)
    x, vectors = torch.randn(1, 10, HIDDEN).double(), positions(13)[1]
    _, _, memories = fed(layer.eval(), x, vectors, segment=5)
    read = torch.cat([torch.zeros(1, 1, HIDDEN).double(), x[:, :3]], 1)
    expected = layer.compress_mem_fn(read)
    assert memories.compressed_mem.shape == (1, 1, HIDDEN)
    np.testing.assert_allclose(memories.compressed_mem.detach().numpy(), expected.detach().numpy(), rtol=1e-12)
    with pytest.raises(SpecError, match="rate divides segment and memory"):
        ra.Compressive(segment=5, memory=5, compressed=SLOTS, rate=4)


@pytest.mark.parametrize(("rate", "dilation"), [(2, 1), (2, 2), (2, 3), (3, 2), (3, 3), (4, 3)])
def test_slots_of_a_dilated_convolution_are_those_of_torch(rate, dilation):
    """Zeros on both sides: (rate − 1)(dilation − 1) in all, the odd one on the right."""
    spec = ra.Compressive(
        segment=3 * rate, memory=0, compressed=9, rate=rate, compression="dilated", dilation=dilation
    )  # fmt: skip
    conv = torch.nn.Conv1d(HIDDEN, HIDDEN, rate, stride=rate, dilation=dilation).double()
    x = torch.randn(1, 3 * rate, HIDDEN).double()
    around = (rate - 1) * (dilation - 1)
    padded = torch.nn.functional.pad(x.transpose(1, 2), (around // 2, around - around // 2))
    inputs = ours_of(layer_of(), positions(1)[0]) | {"x": x.numpy()}
    inputs |= {"kernel": conv.weight.detach().numpy().transpose(2, 1, 0), "kernel_bias": conv.bias.detach().numpy()}
    slots = ra.evaluate(spec, inputs, want=("state",)).state["slots"]
    np.testing.assert_allclose(slots, conv(padded).transpose(1, 2).detach().numpy(), rtol=1e-11, atol=1e-13)
