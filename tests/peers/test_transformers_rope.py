"""RoPE as transformers computes it: Llama, which pairs halves, and GPT-J, which pairs neighbours, against ours."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed: make peers")
pytest.importorskip("transformers", reason="transformers is not installed: make peers")

from transformers.models.gptj import modeling_gptj as gptj  # noqa: E402
from transformers.models.llama import modeling_llama as llama  # noqa: E402

import refattn as ra  # noqa: E402
from refattn.variants._frequencies import float32_frequencies  # noqa: E402

NEAR, FAR = np.arange(12), np.array([0, 7, 4095, 32768, 32771, 65535, 99991, 131071])
PLACES = pytest.mark.parametrize("positions", [NEAR, FAR], ids=["near", "far"])


def llama_tables(width, positions, base=10000.0, dtype=torch.float32):
    """Cosines and sines (L, width/2) of LlamaRotaryEmbedding, and its frequencies."""
    config = llama.LlamaConfig(
        hidden_size=2 * width, num_attention_heads=2, head_dim=width, max_position_embeddings=2**20,
        rope_parameters={"rope_type": "default", "rope_theta": base},
    )  # fmt: skip
    embedding = llama.LlamaRotaryEmbedding(config)
    cos, sin = embedding(torch.zeros(1, dtype=dtype), torch.tensor(positions)[None])
    return cos[0, :, : width // 2], sin[0, :, : width // 2], embedding.inv_freq.numpy()


def gptj_tables(width, positions):
    """Cosines and sines (L, width/2) of the table of sines that GPT-J indexes by position."""
    table = gptj.create_sinusoidal_positions(int(positions.max()) + 1, width)[torch.tensor(positions)]
    return table[:, width // 2 :], table[:, : width // 2]


def inputs(rng, length, head):
    return {name: rng.standard_normal((2, heads, length, head)) for name, heads in (("q", 4), ("k", 2), ("v", 2))}


def peer(x, q, k):
    """Causal attention of q and k as the peer has turned them, in float64, by torch."""
    v = torch.tensor(x["v"])
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).numpy()


def by_llama(x, cos, sin):
    """The peer's own rotation, of double-precision q and k."""
    both = (torch.cat((t, t), -1).double()[None] for t in (cos, sin))
    return peer(x, *llama.apply_rotary_pos_emb(torch.tensor(x["q"]), torch.tensor(x["k"]), *both))


def by_gptj(x, cos, sin, width):
    """GPT-J's rotation of the first `width` channels; its heads stand behind the length."""

    def turned(a):
        a = torch.tensor(a).transpose(1, 2)
        batch = (t.double()[None] for t in (sin, cos))
        own = gptj.apply_rotary_pos_emb(a[..., :width], *batch)
        return torch.cat((own, a[..., width:]), -1).transpose(1, 2)

    return peer(x, turned(x["q"]), turned(x["k"]))


def ours(x, positions, **options):
    places = {"q_positions": positions, "k_positions": positions}
    tables = {name: np.asarray(options.pop(name), np.float64) for name in ("rope_cos", "rope_sin") if name in options}
    return ra.evaluate(ra.SDPA(causal=True, rotary=ra.RoPE(**options)), x | places | tables).out


def scattered(table, positions):
    """Rows by position, as our table is indexed."""
    full = np.zeros((int(positions.max()) + 1, table.shape[1]))
    full[positions] = table.double().numpy()
    return full


@PLACES
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_llama_is_half_with_its_cosines_as_a_table(rng, positions, dtype):
    x = inputs(rng, len(positions), 16)
    cos, sin, _ = llama_tables(16, positions, dtype=dtype)
    table = {"rope_cos": scattered(cos, positions), "rope_sin": scattered(sin, positions)}
    found = ours(x, positions, pairing="half", angles="table", **table)
    np.testing.assert_allclose(found, by_llama(x, cos, sin), rtol=0, atol=1e-13)
    other = ours(x, positions, pairing="interleaved", angles="table", **table)
    assert abs(other - found).max() > 0.01


@PLACES
@pytest.mark.parametrize("width", [8, 12])
def test_gptj_is_interleaved_with_its_cosines_as_a_table(rng, positions, width):
    x = inputs(rng, len(positions), 12)
    cos, sin = gptj_tables(width, positions)
    table = {"rope_cos": scattered(cos, positions), "rope_sin": scattered(sin, positions)}
    found = ours(x, positions, pairing="interleaved", angles="table", width=width, **table)
    np.testing.assert_allclose(found, by_gptj(x, cos, sin, width), rtol=0, atol=1e-13)


@pytest.mark.parametrize("base", [10000.0, 500000.0, 1000000.0])
@pytest.mark.parametrize("width", [6, 16, 64, 80, 128])
def test_its_frequencies_are_ours_but_for_the_power_s_last_bit(width, base):
    """The power is a vendor's: one ulp there makes two at most in the reciprocal."""
    *_, theirs = llama_tables(width, NEAR, base)
    np.testing.assert_array_max_ulp(theirs, float32_frequencies(base, width), maxulp=2)


@pytest.mark.parametrize("kind", ["llama", "gptj"])
def test_float32_angles_are_theirs_to_the_rounding_of_a_cosine(rng, kind):
    """Where frequencies agree; with exact angles the same layers are off by a thousandth far out."""
    width = 16
    cos, sin, frequencies = llama_tables(width, FAR)
    if kind == "gptj":
        cos, sin = gptj_tables(width, FAR)
    same = frequencies == float32_frequencies(10000.0, width)
    assert same.sum() >= width // 2 - 2
    angles = np.float32(FAR)[:, None] * float32_frequencies(10000.0, width)
    for theirs, function in ((cos, np.cos), (sin, np.sin)):
        np.testing.assert_allclose(
            theirs.numpy()[:, same], function(angles.astype(np.float64))[:, same], rtol=0, atol=2e-7
        )
    x = inputs(rng, len(FAR), width)
    pairing = {"llama": "half", "gptj": "interleaved"}[kind]
    theirs = by_llama(x, cos, sin) if kind == "llama" else by_gptj(x, cos, sin, width)
    exact, rounded = (ours(x, FAR, pairing=pairing, angles=a) for a in ("exact", "float32"))
    if same.all():
        np.testing.assert_allclose(rounded, theirs, rtol=0, atol=2e-6)
    assert abs(exact - theirs).max() > 2e-5
