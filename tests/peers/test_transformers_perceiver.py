"""Fourier features as transformers' Perceiver orders them, against ours: the same numbers in other columns."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
pytest.importorskip("transformers", reason="transformers is not installed: make peers")

from transformers.models.perceiver.modeling_perceiver import (  # noqa: E402
    build_linear_positions,
    generate_fourier_features,
)

import refattn as ra  # noqa: E402
from refattn.variants.perceiver import features  # noqa: E402


def test_positions_first_then_all_sines_then_all_cosines():
    """μ is the size of an axis there, so one μ for both axes is a square."""
    size, bands = 6, 3
    positions = build_linear_positions((size, size)).reshape(1, -1, 2)
    theirs = generate_fourier_features(positions, bands, max_resolution=(size, size))[0].numpy()
    ours = features(ra.Perceiver(axes=(size, size), bands=bands, max_frequency=float(size)), np.zeros(1))
    axis = np.arange(2 * (2 * bands + 1)).reshape(2, -1)
    order = [*axis[:, -1], *axis[:, :bands].ravel(), *axis[:, bands:-1].ravel()]
    np.testing.assert_allclose(theirs, ours[:, order], atol=2e-6)
    assert np.abs(theirs - ours).max() > 0.5
