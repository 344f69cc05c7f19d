"""Sinusoidal embeddings against numbers worked by hand, the C library, plain SDPA, identities, and complex step."""

import math

import numpy as np
import pytest
from checks import forward_and_gradients, near, same, slopes_by_complex_step

import refattn as ra
from refattn import api
from refattn.engines.certified.balls import BALLS
from refattn.errors import ShapeError, SpecError
from refattn.plan import execute
from refattn.variants.sinusoidal import table

SIZES = {"B": 3, "L": 7, "E": 6, "Hq": 4, "Hkv": 2, "D": 3, "Dv": 2}
FORMS = [(layout, d) for layout in ("interleaved", "concatenated") for d in ("half", "half_minus_one")]
SPECS = [ra.Sinusoidal(layout=layout, denominator=d) for layout, d in FORMS] + [
    ra.Sinusoidal(layout="concatenated", denominator="half_minus_one", offset=2, multiplier="sqrt", causal=True),
    ra.Sinusoidal(offset=-3, multiplier=0.5, base=50.0, scale=2.0, causal=True),
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.layout}-{s.denominator}-{s.offset}")
LENGTHS = pytest.mark.parametrize("lengths", [None, (7, 0, 3)], ids=["full", "padded"])
WIDTHS = pytest.mark.parametrize("width", [6, 7, 2, 3, 1, 0])


def arrays(spec, rng, lengths=None, **changed):
    """Inputs and cotangents of out and lse."""
    sizes, module = SIZES | changed, ra.variants()["sinusoidal"].module
    made = {
        name: rng.standard_normal(a.shape(sizes))
        for name, a in (module.signature(spec) | module.outputs(spec)).items()
        if a.kind == "real"
    }
    duals = {name: made.pop(name) for name in ("out", "lse")}
    return made if lengths is None else made | {"kv_lengths": np.array(lengths, np.int64)}, duals


def by_hand(spec, length, width):
    """P by the C library's pow, sin and cos, an entry at a time."""
    half, rest = width // 2, width % 2
    sines = half + rest if spec.denominator == "half" else half
    below = width / 2 if spec.denominator == "half" else max(half - 1, 1)
    rows = []
    for p in range(spec.offset, spec.offset + length):
        s = [math.sin(p / spec.base ** (i / below)) for i in range(sines)]
        c = [math.cos(p / spec.base ** (i / below)) for i in range(half)]
        row = s + c
        if spec.layout == "interleaved":
            row[0::2], row[1::2] = s, c
        rows.append(row + [0.0] * (width - len(row)))
    return np.reshape(np.array(rows), (length, width))


# Numbers worked by hand


def test_the_paper_s_columns():
    """E = 4: wavelengths 2π and 200π, so P_1 = (sin 1, cos 1, sin 0.01, cos 0.01); P_0 = (0, 1, 0, 1)."""
    found = table(ra.Sinusoidal(), 2, 4, np.zeros(1))
    near(found, [[0, 1, 0, 1], [math.sin(1), math.cos(1), math.sin(0.01), math.cos(0.01)]])


def test_halves_and_the_slowest_wavelength():
    """Over E/2 − 1 the exponents end at −1: w = (1, 0.0001), where E/2 gives (1, 0.01)."""
    spec = ra.Sinusoidal(layout="concatenated", denominator="half_minus_one", offset=1)
    near(table(spec, 1, 4, np.zeros(1)), [[math.sin(1), math.sin(1e-4), math.cos(1), math.cos(1e-4)]])


def test_attention_by_position_alone():
    """x = 0 and W_q = W_k = I: s = cos(i − j) + cos((i − j)/100), and v = P's first cosine, 1, cos 1."""
    eye = np.eye(4).reshape(1, 4, 4)
    x = {"x": np.zeros((1, 2, 4)), "wq": eye, "wk": eye, "wv": eye[..., 1:2]}
    found = ra.evaluate(ra.Sinusoidal(scale=1.0), x, want=("out", "lse"))
    here, there = math.exp(2), math.exp(math.cos(1) + math.cos(0.01))
    near(
        found.out.ravel(),
        [(here + there * math.cos(1)) / (here + there), (there + here * math.cos(1)) / (here + there)],
    )
    near(found.lse.ravel(), [math.log(here + there)] * 2)


@WIDTHS
@pytest.mark.parametrize("spec", [*SPECS, ra.Sinusoidal(base=1.0), ra.Sinusoidal(base=0.25)], ids=str)
def test_the_table_against_the_c_library(spec, width):
    near(table(spec, 9, width, np.zeros(1)), by_hand(spec, 9, width))


def test_the_table_on_balls_holds_it():
    t, _, r = table(SPECS[4], 5, 6, BALLS.real(np.zeros(1))).enclosure()
    near(t, by_hand(SPECS[4], 5, 6))
    assert r.max() < 1e-14


# Identities


@pytest.mark.parametrize("width", [6, 12, 2])
@pytest.mark.parametrize(("layout", "denominator"), FORMS)
def test_inner_products_know_the_distance_alone(layout, denominator, width):
    """P_p·P_p' = Σ cos((p − p') w_i), whatever the layout and the offset; an odd width has a sine without a cosine."""
    spec = ra.Sinusoidal(layout=layout, denominator=denominator, offset=11)
    p = table(spec, 8, width, np.zeros(1))
    below = width / 2 if denominator == "half" else max(width // 2 - 1, 1)
    expected = [
        [math.fsum(math.cos((i - j) / 10000 ** (n / below)) for n in range(width // 2)) for j in range(8)]
        for i in range(8)
    ]
    near(p @ p.T, np.array(expected))


@pytest.mark.parametrize("width", [6, 7])
@pytest.mark.parametrize("denominator", ["half", "half_minus_one"])
def test_the_layouts_agree_when_the_channels_are_permuted(denominator, width, rng):
    one, other = (ra.Sinusoidal(layout=layout, denominator=denominator) for layout in ("interleaved", "concatenated"))
    x, duals = arrays(one, rng, E=width)
    last = [] if denominator == "half" else [width - 1] * (width % 2)
    ends = range(width - len(last))
    order = [*ends[0::2], *ends[1::2], *last]
    permuted = {"x": x["x"][..., order]} | {n: x[n][:, order] for n in ("wq", "wk", "wv")}
    expected = forward_and_gradients(one, x, duals["out"], duals["lse"])
    found = forward_and_gradients(other, permuted, duals["out"], duals["lse"])
    near(found["dx"], expected["dx"][..., order])
    for name in ("out", "lse"):
        near(found[name], expected[name])


@EVERY
@LENGTHS
def test_it_is_plain_attention_over_the_projections(spec, lengths, rng):
    x, duals = arrays(spec, rng, lengths)
    m = {None: 1.0, "sqrt": math.sqrt(6)}.get(spec.multiplier, spec.multiplier)
    hidden = m * x["x"] + by_hand(spec, 7, 6)
    q, k, v = (np.einsum("ble,hed->bhld", hidden, x[n]) for n in ("wq", "wk", "wv"))
    plain = ra.SDPA(causal="top_left" if spec.causal else False, scale=spec.scale)
    inputs = {"q": q, "k": k, "v": v} | {n: x[n] for n in x if n == "kv_lengths"}
    expected = forward_and_gradients(plain, inputs, duals["out"], duals["lse"])
    found = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name in ("out", "lse"):
        near(found[name], expected[name])
    dx = 0
    for n in "qkv":
        near(found[f"dw{n}"], np.einsum("ble,bhld->hed", hidden, expected[f"d{n}"]), 1e-11)
        dx = dx + m * np.einsum("bhld,hed->ble", expected[f"d{n}"], x[f"w{n}"])
    near(found["dx"], dx, 1e-11)


def test_a_padded_sequence_alone_is_itself(rng):
    """Positions count from the first row, so that a causal query sees what it would see without the padding."""
    spec = SPECS[4]
    x, _ = arrays(spec, rng, (7, 2, 5))
    found = ra.evaluate(spec, x, want=("out", "lse"))
    for b, n in enumerate((7, 2, 5)):
        alone = {name: x[name] for name in ("wq", "wk", "wv")} | {"x": x["x"][b : b + 1, :n]}
        expected = ra.evaluate(spec, alone, want=("out", "lse"))
        near(found.out[b : b + 1, :, :n], expected.out)
        near(found.lse[b : b + 1, :, :n], expected.lse)


def test_a_nan_in_the_padding_reaches_its_own_query_and_no_other(rng):
    spec = ra.Sinusoidal()
    x, duals = arrays(spec, rng, (7, 4, 7))
    clean = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    x["x"][1, 5, 2] = np.nan
    found = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name in ("out", "lse"):
        assert np.isnan(found[name][1, :, 5]).all()
        rest = np.ones((3, 4, 7), bool)
        rest[1, :, 5] = False
        near(found[name][rest], clean[name][rest], 0)


# The plan, and gradients by what shares nothing with the tape


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@LENGTHS
@pytest.mark.parametrize("changed", [{}, {"B": 0}, {"E": 7}, {"E": 3}, {"E": 1}, {"L": 1}], ids=str)
def test_the_plan_means_what_the_reference_says(spec, lengths, changed, rng):
    lengths = None if lengths is None else np.minimum(lengths, changed.get("L", 7))[: changed.get("B", 3)]
    x, _ = arrays(spec, rng, lengths, **changed)
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    found = execute(built(spec, x).plan)
    near(found["out"], expected.out)
    near(found["lse"], expected.lse)


@EVERY
@LENGTHS
def test_the_kernels_agree(spec, lengths, rng):
    x, duals = arrays(spec, rng, lengths)
    expected = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name, value in forward_and_gradients(spec, x, duals["out"], duals["lse"], engine="cpu").items():
        near(value, expected[name], 1e-11)


@EVERY
@LENGTHS
def test_gradients_by_complex_step(spec, lengths, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, duals = arrays(spec, rng, lengths)
    slopes_by_complex_step(spec, x, duals, rng)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "half"}, "layout is 'interleaved' or 'concatenated'; given: 'half'"),
        ({"denominator": None}, "denominator is 'half' or 'half_minus_one'; given: None"),
        ({"offset": 1.0}, "offset is the first position"),
        ({"offset": 2**60}, "offset is the first position"),
        ({"multiplier": "root"}, "multiplier, where not 'sqrt', is a finite number"),
        ({"base": 0}, "base is a positive number; given: 0"),
        ({"base": math.nan}, "base is a finite number"),
        ({"causal": "top_left"}, "causal is True or False; given: 'top_left'"),
        ({"scale": math.inf}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Sinusoidal(**options)


def test_projections_of_another_width_are_refused_with_the_signature(rng):
    x, _ = arrays(ra.Sinusoidal(), rng)
    with pytest.raises(ShapeError, match=r"(?s)wk has E=5, but .* E=6.*wk \(Hkv, E, D\) real"):
        ra.evaluate(ra.Sinusoidal(), x | {"wk": np.ones((2, 5, 3))})


def test_heads_that_do_not_divide(rng):
    x, _ = arrays(ra.Sinusoidal(), rng, Hkv=3)
    with pytest.raises(ShapeError, match="Hq must be a multiple of Hkv; given: Hq=4, Hkv=3"):
        ra.evaluate(ra.Sinusoidal(), x)


def test_operations_grow_with_the_square_of_the_length():
    """2 B L E (Hq D + Hkv (D + Dv)) + 2 B Hq L² (D + Dv); the score matrix has B Hq L² doubles."""
    told = ra.explain(ra.Sinusoidal(), SIZES)
    assert told["operations"] == 2 * 3 * 7 * 6 * (12 + 10) + 2 * 3 * 4 * 49 * 5
    assert told["score_matrix_bytes"] == 8 * 3 * 4 * 49


def test_json_keeps_every_option():
    spec = SPECS[4]
    assert ra.registry.from_json(spec.to_json()) == spec
    same(np.float64(ra.registry.from_json(SPECS[5].to_json()).base), np.float64(50.0))
