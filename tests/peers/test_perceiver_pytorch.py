"""Perceiver's cross-attention as the package perceiver-pytorch computes it, and where the two part."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
peer = pytest.importorskip(
    "perceiver_pytorch.perceiver_pytorch", reason="perceiver-pytorch is not installed: make peers"
)

import refattn as ra  # noqa: E402
from refattn.variants.perceiver import features  # noqa: E402

HEADS, D = 2, 4
FLOOR = 1e-8


@pytest.fixture(scope="module", autouse=True)
def seeded():
    torch.manual_seed(11)


def projections(attention):
    """W_q, W_k and W_v of the package's layer, a matrix for each head."""
    wk, wv = attention.to_kv.weight.chunk(2)
    made = {"wq": attention.to_q.weight, "wk": wk, "wv": wv}
    return {name: w.reshape(HEADS, D, -1).transpose(1, 2).detach().numpy() for name, w in made.items()}


def unprojected(attention, out):
    """Through W_O and its bias."""
    heads = torch.from_numpy(np.ascontiguousarray(out)).transpose(1, 2)
    return attention.to_out(heads.reshape(*heads.shape[:2], -1)).detach().numpy()


def close(found, expected, tolerance=1e-11):
    np.testing.assert_allclose(found, expected.detach().numpy(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("axes", [(7,), (3, 5), (2, 1, 4)], ids=str)
@pytest.mark.parametrize(("bands", "mu"), [(1, 10.0), (6, 10.0), (3, 7.5)])
def test_features_and_the_array_they_are_appended_to(axes, bands, mu):
    """What its first layer is given as context: channels, then for each axis sines, cosines and the position."""
    model = peer.Perceiver(
        num_freq_bands=bands, depth=1, max_freq=mu, input_axis=len(axes), num_latents=3, latent_dim=8, latent_heads=1
    ).double()
    seen = {}
    model.layers[0].register_forward_pre_hook(lambda _, __, kwargs: seen.update(kwargs), with_kwargs=True)
    data = torch.randn(2, *axes, 3, dtype=torch.float64)
    model(data)
    ours = features(ra.Perceiver(axes=axes, bands=bands, max_frequency=mu), np.zeros(1))
    expected = np.concatenate([data.reshape(2, -1, 3).numpy(), np.broadcast_to(ours, (2, *ours.shape))], -1)
    close(expected, seen["context"])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inverted", [False, True])
def test_the_layer_s_output_and_gradients_are_ours(inverted, masked):
    """Norms, projections, attention and W_O, over an image with its features."""
    axes, bands, mu = (3, 4), 2, 6.0
    spec = ra.Perceiver(norm="layer", axes=axes, bands=bands, max_frequency=mu, inverted=inverted)
    spec = ra.Perceiver(**(vars(spec) | {"floor": FLOOR if inverted else 0.0}))
    width = 3 + spec.channels
    layer = peer.PreNorm(6, peer.Attention(6, width, heads=HEADS, dim_head=D), context_dim=width).double()
    with torch.no_grad():
        for norm in (layer.norm, layer.norm_context):
            norm.weight.normal_()
            norm.bias.normal_()
    latents = torch.randn(2, 5, 6, dtype=torch.float64, requires_grad=True)
    array = torch.randn(2, *axes, 3, dtype=torch.float64, requires_grad=True)
    places = torch.stack(
        torch.meshgrid(*(torch.linspace(-1, 1, n, dtype=torch.float64) for n in axes), indexing="ij"), -1
    )
    encoded = peer.fourier_encode(places, mu, bands).reshape(12, -1)
    context = torch.cat([array.reshape(2, 12, 3), encoded.expand(2, -1, -1)], -1)
    mask = torch.rand(2, 12) < 0.6 if masked else None
    theirs = layer(latents, context=context, mask=mask, inverted_attention=inverted)

    inputs = {"latents": latents, "array": array.reshape(2, 12, 3)}
    inputs |= {"latent_gain": layer.norm.weight, "latent_bias": layer.norm.bias}
    inputs |= {"array_gain": layer.norm_context.weight, "array_bias": layer.norm_context.bias}
    inputs = {name: a.detach().numpy() for name, a in inputs.items()} | projections(layer.fn)
    inputs |= {"mask": mask.numpy()} if masked else {}
    close(unprojected(layer.fn, ra.evaluate(spec, inputs).out), theirs)

    weight = torch.randn_like(theirs)
    (theirs * weight).sum().backward()
    dout = (weight @ layer.fn.to_out.weight).reshape(2, 5, HEADS, D).transpose(1, 2).detach().numpy()
    found = ra.vjp(spec, inputs, {"out": dout})
    close(found.dlatents, latents.grad, 1e-10)
    close(found.darray, array.grad.reshape(2, 12, 3), 1e-10)
    close(found.darray_gain, layer.norm_context.weight.grad, 1e-10)
    dk, dv = layer.fn.to_kv.weight.grad.chunk(2)
    close(found.dwk.transpose(0, 2, 1).reshape(HEADS * D, -1), dk, 1e-10)
    close(found.dwv.transpose(0, 2, 1).reshape(HEADS * D, -1), dv, 1e-10)


def bare(inverted, latents, mask=None):
    """Its attention alone over 4 pixels, and our inputs for it."""
    attention = peer.Attention(6, 5, heads=HEADS, dim_head=D).double()
    array = torch.randn(1, 4, 5, dtype=torch.float64)
    theirs = attention(latents, context=array, mask=mask, inverted_attention=inverted)
    inputs = {"latents": latents.numpy(), "array": array.numpy()} | projections(attention)
    return attention, theirs, inputs | ({} if mask is None else {"mask": mask.numpy()})


def test_a_latent_that_wins_less_than_1e_8_of_all_pixels_is_the_floor_s_there():
    latents = torch.randn(1, 3, 6, dtype=torch.float64) * 1000
    attention, theirs, inputs = bare(True, latents)
    exact = ra.evaluate(ra.Perceiver(inverted=True), inputs, want=("out", "lse"))
    assert (exact.lse < np.log(FLOOR)).any()
    close(unprojected(attention, ra.evaluate(ra.Perceiver(inverted=True, floor=FLOOR), inputs).out), theirs)
    assert np.abs(unprojected(attention, exact.out) - theirs.detach().numpy()).max() > 0.01


@pytest.mark.parametrize("inverted", [False, True])
def test_where_nothing_is_seen_theirs_is_the_mean_of_all_values_or_inverted_0(inverted):
    latents = torch.randn(1, 3, 6, dtype=torch.float64)
    attention, theirs, inputs = bare(inverted, latents, torch.zeros(1, 4, dtype=torch.bool))
    ours = ra.evaluate(ra.Perceiver(inverted=inverted), inputs).out
    assert not ours.any()
    mean = np.einsum("ble,hed->bhld", inputs["array"], inputs["wv"]).mean(2, keepdims=True)
    close(unprojected(attention, ours if inverted else np.broadcast_to(mean, ours.shape)), theirs)
