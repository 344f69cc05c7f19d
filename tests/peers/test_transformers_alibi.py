"""ALiBi slopes as transformers computes them, for 1 to 128 heads, against ours."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
pytest.importorskip("transformers", reason="transformers is not installed: make peers")

from refattn import registry  # noqa: E402

HEADS = range(1, 129)
alibi = registry.info("alibi").module


def ours(heads):
    """The default slopes, as the doubles that float32 holds."""
    return np.array(alibi.resolve(registry.spec("alibi"), {"Hq": heads}).slopes)


def bloom(heads):
    """BLOOM's tensor holds slope · position; position 1 gives the slope."""
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    mask = torch.ones(1, 2)
    return build_alibi_tensor(mask, heads, torch.float32).reshape(heads, 2)[:, 1].double().numpy()


def mpt(heads):
    """MPT's tensor holds slope · (j − L + 1); the last but one position gives −slope."""
    from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor

    return -build_mpt_alibi_tensor(heads, 2).reshape(heads, 2)[:, 0].double().numpy()


@pytest.mark.parametrize("heads", HEADS)
def test_bloom_s_slopes_are_ours_to_eleven_ulp_of_float32(heads):
    np.testing.assert_array_max_ulp(bloom(heads).astype(np.float32), ours(heads).astype(np.float32), maxulp=11)


@pytest.mark.parametrize("heads", [2**n for n in range(8)])
def test_bloom_departs_because_it_raises_a_rounded_base_to_powers(heads):
    base = np.float64(np.float32(2.0 ** (-8 / heads)))
    powers = (base ** np.arange(1, heads + 1)).astype(np.float32)
    np.testing.assert_array_max_ulp(bloom(heads).astype(np.float32), powers, maxulp=1)
    assert (heads >= 16) == bool((bloom(heads) != ours(heads)).any())


@pytest.mark.parametrize("heads", HEADS)
def test_mpt_s_slopes_are_ours_to_one_rounding(heads):
    np.testing.assert_array_max_ulp(mpt(heads).astype(np.float32), ours(heads).astype(np.float32), maxulp=1)


def test_powers_of_two_that_are_dyadic_agree_exactly():
    for heads in (1, 2, 4, 8):
        np.testing.assert_array_equal(bloom(heads), ours(heads))
        np.testing.assert_array_equal(mpt(heads), ours(heads))
