"""Memorizing attention as the package memorizing-transformers-pytorch computes it, segment by segment, against ours.

The package asks for faiss-gpu, which no current Python has a wheel of, so the extra `peers` cannot name it:
`pip install faiss-cpu einops einops-exts joblib`, then `pip install --no-deps memorizing-transformers-pytorch==0.4.1`.
Its search is approximate, and exact among as few keys as here; all is float32. It keeps no keys of the segment before.
"""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
for needed in ("faiss", "joblib", "einops_exts"):
    pytest.importorskip(needed, reason=f"{needed} is not installed, nor by make peers: see the head of this file")
peer = pytest.importorskip(
    "memorizing_transformers_pytorch.memorizing_transformers_pytorch", reason="see the head of this file"
)
knn = pytest.importorskip("memorizing_transformers_pytorch.knn_memory")

import refattn as ra  # noqa: E402

HEADS, WIDTH, SEGMENT, TOP, COUNT = 3, 4, 6, 4, 29


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(7)


def spec_of(biased, memory=COUNT):
    return ra.Memorizing(
        segment=SEGMENT, memory=memory, top=TOP, combine="joint", normalise=True, temperature="exponential",
        epsilon=0, bias=(ra.T5(),) if biased else (),
    )  # fmt: skip


def peer_s(tmp_path, layer, x, bias=None, capacity=64):
    """The layer's outputs over segments, and which tokens its search found."""
    memory = knn.KNNMemory(WIDTH, capacity, x.shape[0], tmp_path / "memory", multiprocessing=False)
    outs, found = [], []
    for begin in range(0, COUNT, SEGMENT):
        piece = x[:, begin : begin + SEGMENT]
        q = torch.nn.functional.normalize(layer.to_q(piece).reshape(*piece.shape[:2], HEADS, WIDTH), dim=-1)
        for b, index in enumerate(memory.knns):
            rows = np.ascontiguousarray(q[b].detach().numpy().reshape(-1, WIDTH))
            found.append(index.search(rows, TOP).reshape(-1, HEADS, TOP))
        relative = None if bias is None else bias(*[piece.shape[1]] * 2, device="cpu")
        outs.append(layer(piece, knn_memory=memory, rel_pos_bias=relative)[0])
    found = [np.concatenate(found[b :: x.shape[0]]) for b in range(x.shape[0])]
    return torch.cat(outs, 1), np.stack(found).transpose(0, 2, 1, 3)


def inputs_of(layer, x, bias):
    """q, k, v of one key head, the temperatures, and the table of the bias with its factor."""
    k, v = layer.to_kv(x).chunk(2, dim=-1)
    q = layer.to_q(x).reshape(*x.shape[:2], HEADS, WIDTH).transpose(1, 2)
    found = {"q": q, "k": k[:, None], "v": v[:, None], "sharpness": layer.scale.reshape(HEADS)}
    if bias is not None:
        found["t5_table"] = bias.relative_attention_bias.weight * bias.scale
    return {name: a.detach().numpy().astype(np.float64) for name, a in found.items()}


@pytest.mark.parametrize("biased", [False, True])
def test_the_layer_s_output_and_what_it_finds_are_ours(biased, tmp_path):
    layer = peer.KNNAttention(dim=HEADS * WIDTH, heads=HEADS, dim_head=WIDTH, num_retrieved_memories=TOP)
    torch.nn.init.normal_(layer.scale)
    bias = peer.T5RelativePositionBias(scale=1.5, heads=HEADS) if biased else None
    x = torch.randn(2, COUNT, HEADS * WIDTH)
    expected, tokens = peer_s(tmp_path, layer, x, bias)
    found = ra.evaluate(spec_of(biased), inputs_of(layer, x, bias), want=("out", "indices", "margin"))
    assert found.margin[:, :, SEGMENT:].min() > 1e-6, "two products that float32 does not tell apart"
    np.testing.assert_array_equal(found.indices, tokens)
    out = layer.to_out(torch.from_numpy(found.out).float().transpose(1, 2).reshape(2, COUNT, -1))
    np.testing.assert_allclose(out.detach().numpy(), expected.detach().numpy(), rtol=1e-4, atol=1e-5)


def test_gradients_stop_at_the_memory_as_ours_do(tmp_path):
    layer = peer.KNNAttention(dim=HEADS * WIDTH, heads=HEADS, dim_head=WIDTH, num_retrieved_memories=TOP)
    x = torch.randn(2, COUNT, HEADS * WIDTH)
    out = peer_s(tmp_path, layer, x)[0]
    weight = torch.randn_like(out)
    (out * weight).sum().backward()
    dout = (weight @ layer.to_out.weight).reshape(2, COUNT, HEADS, WIDTH).transpose(1, 2).detach().numpy()
    found = ra.vjp(spec_of(False), inputs_of(layer, x, None), {"out": dout.astype(np.float64)})
    rows = x.numpy().astype(np.float64).reshape(-1, HEADS * WIDTH)
    dq = found.dq.transpose(0, 2, 1, 3).reshape(-1, HEADS * WIDTH)
    dkv = np.concatenate([found.dk[:, 0], found.dv[:, 0]], -1).reshape(-1, 2 * WIDTH)
    np.testing.assert_allclose(layer.to_q.weight.grad.numpy(), dq.T @ rows, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(layer.to_kv.weight.grad.numpy(), dkv.T @ rows, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(layer.scale.grad.numpy().reshape(-1), found.dsharpness, rtol=1e-3, atol=1e-4)


def test_a_memory_that_is_full_is_emptied_where_ours_forgets_the_oldest(tmp_path):
    """Once more than its capacity has come, the search starts from what was written last, one segment."""
    layer = peer.KNNAttention(dim=HEADS * WIDTH, heads=HEADS, dim_head=WIDTH, num_retrieved_memories=TOP)
    x = torch.randn(1, COUNT, HEADS * WIDTH)
    _, tokens = peer_s(tmp_path, layer, x, capacity=2 * SEGMENT)
    assert (tokens[:, :, 2 * SEGMENT : 3 * SEGMENT] >= 0).all()
    # The third segment has been written, and counts from 0 again; ours keeps the second beside it.
    assert tokens[:, :, 3 * SEGMENT : 4 * SEGMENT].max() < SEGMENT
    found = ra.evaluate(spec_of(False, 2 * SEGMENT), inputs_of(layer, x, None), want=("indices",)).indices
    assert (found[:, :, 3 * SEGMENT : 4 * SEGMENT] < 2 * SEGMENT).any()
    assert found[:, :, 3 * SEGMENT : 4 * SEGMENT].min() >= SEGMENT
