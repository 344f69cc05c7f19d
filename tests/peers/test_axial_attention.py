"""Axial attention as the package axial-attention computes it: a sum of layers that each project for one axis alone."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
peer = pytest.importorskip("axial_attention.axial_attention", reason="axial-attention is not installed: make peers")

import refattn as ra  # noqa: E402

HEADS, WIDTH, IMAGE = 2, 3, (4, 5)


def layers(*, tied):
    """The package's module, its axes with weights of their own or the same."""
    torch.manual_seed(5)
    module = peer.AxialAttention(dim=HEADS * WIDTH, num_dimensions=2, heads=HEADS, dim_index=-1).double()
    height, width = (part.fn for part in module.axial_attentions)
    if tied:
        width.load_state_dict(height.state_dict())
    return module, {"height": height, "width": width}


def pixels(x):
    """(B, height, width, H·D) to (B, H, L, D)."""
    return x.reshape(x.shape[0], -1, HEADS, WIDTH).transpose(1, 2).detach().numpy()


def projected(layer, x):
    return dict(zip("qkv", map(pixels, (layer.to_q(x), *layer.to_kv(x).chunk(2, dim=-1))), strict=True))


def unprojected(layer, out):
    """Through W_O and its bias."""
    return layer.to_out(torch.from_numpy(out).transpose(1, 2).reshape(2, *IMAGE, -1))


def close(found, expected):
    np.testing.assert_allclose(found.detach().numpy(), expected.detach().numpy(), rtol=1e-11, atol=1e-13)


def test_each_axis_through_its_own_projections_and_the_sum_after_them():
    module, by_axis = layers(tied=False)
    x = torch.randn(2, *IMAGE, HEADS * WIDTH, dtype=torch.float64)
    parts = [
        unprojected(layer, ra.evaluate(ra.Axial(width=IMAGE[1], axes=(axis,)), projected(layer, x)).out)
        for axis, layer in by_axis.items()
    ]
    close(parts[0] + parts[1], module(x))


def test_with_projections_shared_the_sum_before_them_differs_by_one_bias():
    """W_O adds its bias once to our sum, and once for each of the package's axes."""
    module, by_axis = layers(tied=True)
    x, layer = torch.randn(2, *IMAGE, HEADS * WIDTH, dtype=torch.float64), by_axis["height"]
    out = ra.evaluate(ra.Axial(width=IMAGE[1]), projected(layer, x)).out
    close(unprojected(layer, out) + layer.to_out.bias, module(x))


def test_one_after_the_other_is_the_second_axis_of_the_first_s_result():
    module, by_axis = layers(tied=False)
    module.sum_axial_out = False
    x = torch.randn(2, *IMAGE, HEADS * WIDTH, dtype=torch.float64)
    found = x
    for axis, layer in by_axis.items():
        found = unprojected(layer, ra.evaluate(ra.Axial(width=IMAGE[1], axes=(axis,)), projected(layer, found)).out)
    close(found, module(x))


def test_position_sensitive_attention_with_tables_of_zeros_is_the_package_s_along_each_axis():
    _, by_axis = layers(tied=False)
    x = torch.randn(2, *IMAGE, HEADS * WIDTH, dtype=torch.float64)
    for axis, layer in by_axis.items():
        span = IMAGE[axis == "width"]
        tables = dict.fromkeys(("rq", "rk", "rv"), np.zeros((2 * span - 1, WIDTH)))
        spec = ra.AxialDeepLab(span=span, axis=axis, scale=WIDTH**-0.5)
        found = unprojected(layer, ra.evaluate(spec, projected(layer, x) | tables).out)
        lines = x.transpose(1, 2) if axis == "height" else x
        expected = layer(lines.reshape(-1, span, HEADS * WIDTH)).reshape(lines.shape)
        close(found, expected.transpose(1, 2) if axis == "height" else expected)
