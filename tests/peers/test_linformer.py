"""Linformer as the package linformer computes it, against ours: its weights, its slicing, one key head, shared keys."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
peer = pytest.importorskip("linformer.linformer", reason="linformer is not installed: make peers")

import refattn as ra  # noqa: E402

HEADS, WIDTH, R, LENGTH = 4, 3, 5, 11


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(3)


def split(x):
    """(B, L, H·D) to (B, H, L, D)."""
    return x.reshape(*x.shape[:2], -1, WIDTH).transpose(1, 2)


@pytest.mark.parametrize("keys", [LENGTH, 7], ids=["full", "shorter"])
@pytest.mark.parametrize("one_kv_head", [False, True])
@pytest.mark.parametrize("share_kv", [False, True])
def test_the_layer_s_output_and_gradients_are_ours(share_kv, one_kv_head, keys):
    layer = peer.LinformerSelfAttention(
        HEADS * WIDTH, LENGTH, k=R, heads=HEADS, one_kv_head=one_kv_head, share_kv=share_kv
    ).double()
    x, context = (torch.randn(2, n, HEADS * WIDTH, dtype=torch.float64) for n in (6, keys))
    q, k = split(layer.to_q(x)), split(layer.to_k(context))
    v = k if share_kv else split(layer.to_v(context))
    inputs = {"q": q, "k": k, "v": v, "E": layer.proj_k.T[:, :keys]}
    if not share_kv:
        inputs["F"] = layer.proj_v.T[:, :keys]
    spec = ra.Linformer(sharing="kv" if share_kv else "none")
    inputs = {name: a.detach().numpy() for name, a in inputs.items()}

    expected = layer(x, context=context)
    out = torch.from_numpy(ra.evaluate(spec, inputs).out).transpose(1, 2).reshape(2, 6, -1)
    np.testing.assert_allclose(layer.to_out(out).detach().numpy(), expected.detach().numpy(), rtol=1e-11, atol=1e-13)

    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    dout = split(weight @ layer.to_out.weight).detach().numpy()
    found = ra.vjp(spec, inputs, {"out": dout})
    full = np.zeros((R, LENGTH))
    full[:, :keys] = found.dE
    np.testing.assert_allclose(full, layer.proj_k.grad.T.numpy(), rtol=1e-10, atol=1e-12)
