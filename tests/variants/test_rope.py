"""RoPE against numbers worked by hand, plain loops, flint's sines, its plan, complex step, and what it leaves alone."""

import math
from dataclasses import replace

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn import api, registry
from refattn.errors import ShapeError, SpecError
from refattn.plan import execute
from refattn.variants._place import place

MODULE = registry.info("rope").module
PAIRINGS = pytest.mark.parametrize("pairing", ["half", "interleaved"])
SPECS = [
    ra.RoPE(pairing=pairing, angles=angles, width=width, part=part)
    for pairing in ("half", "interleaved")
    for angles in ("exact", "float32", "table")
    for width, part in ((None, "first"), (4, "first"), (4, "last"), (0, "first"))
]
EVERY = pytest.mark.parametrize("spec", SPECS, ids=lambda s: f"{s.pairing}-{s.angles}-{s.width}-{s.part}")
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "Lq": 5, "Lk": 7, "D": 6, "Dv": 3, "P": 9}


def arrays(spec, rng, **changed):
    """Inputs of SDPA with that rotation, and cotangents of out and lse."""
    sizes = SIZES | changed
    sizes["R"] = sizes["D"] // 2
    spec, module = ra.SDPA(causal="bottom_right", rotary=spec), ra.variants()["sdpa"].module
    x = {n: rng.standard_normal(a.shape(sizes)) for n, a in module.signature(spec).items() if not a.optional}
    return spec, x, {n: rng.standard_normal(a.shape(sizes)) for n, a in module.outputs(spec).items()}


def turned(spec, x, positions):
    """Rows x (L, D) turned by the module, as queries at these positions."""
    q = np.asarray(x, float)[None, None]
    x = {"q": q, "k": q, "q_positions": np.asarray(positions)}
    return MODULE.rotate(MODULE.resolve(spec, {"D": q.shape[3]}), x, place(False, x))[0][0, 0]


def turned_by_hand(row, position, pairing, *, width=None, part="first", base=10000.0):
    """One vector in Python floats: each pair of channels is a complex number times e^(i p w)."""
    width, row = len(row) if width is None else width, list(row)
    start = 0 if part == "first" else len(row) - width
    for t in range(width // 2):
        a, b = (start + 2 * t, start + 2 * t + 1) if pairing == "interleaved" else (start + t, start + t + width // 2)
        angle = position * base ** (-2 * t / width)
        z = complex(row[a], row[b]) * complex(math.cos(angle), math.sin(angle))
        row[a], row[b] = z.real, z.imag
    return row


# Numbers worked by hand


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"pairing": "half"}, [-4, -5, -6, 1, 2, 3]),
        ({"pairing": "interleaved"}, [-2, 1, -4, 3, -6, 5]),
        ({"pairing": "half", "width": 4}, [-3, -4, 1, 2, 5, 6]),
        ({"pairing": "half", "width": 4, "part": "last"}, [1, 2, -5, -6, 3, 4]),
        ({"pairing": "interleaved", "width": 2}, [-2, 1, 3, 4, 5, 6]),
        ({"pairing": "interleaved", "width": 2, "part": "last"}, [1, 2, 3, 4, -6, 5]),
        ({"pairing": "half", "width": 0}, [1, 2, 3, 4, 5, 6]),
    ],
    ids=str,
)
def test_a_quarter_turn_makes_minus_b_and_a_of_a_and_b(options, expected):
    """Position 1 of a table whose cosines are 0 and sines 1; position 0 has cosines 1."""
    spec = ra.RoPE(angles="table", **options)
    n = (6 if spec.width is None else spec.width) // 2
    q = np.tile(np.arange(1.0, 7), (1, 1, 2, 1))
    x = {"q": q, "k": q, "rope_cos": np.array([[1.0] * n, [0.0] * n]), "rope_sin": np.array([[0.0] * n, [1.0] * n])}
    resolved = MODULE.resolve(spec, {"D": 6})
    for rotate in (MODULE.rotate, MODULE.lower_rotate):
        for found in rotate(resolved, x, place(False, x)):
            same(found[0, 0], np.array([np.arange(1.0, 7), expected]))


def test_scores_of_equal_contents_are_the_cosine_of_the_distance():
    """q = k = (1, 0), width 2: q_i·k_j = cos(i − j). Row 1 of two: e^1 to e^cos 1."""
    q = np.array([1.0, 0]).reshape(1, 1, 1, 2).repeat(2, 2)
    x = {"q": q, "k": q, "v": np.array([0.0, 1]).reshape(1, 1, 2, 1)}
    found = ra.evaluate(ra.SDPA(causal=True, scale=1.0, rotary=ra.RoPE(pairing="half")), x, want=("out", "lse"))
    near(found.out.ravel(), [0, math.e / (math.e + math.exp(math.cos(1)))])
    near(found.lse.ravel(), [1, math.log(math.e + math.exp(math.cos(1)))])


def test_frequencies_are_powers_of_the_base():
    """Width 4, base 100: 1 and 1/10. At position 10 the second pair has turned by 1 radian."""
    found = turned(ra.RoPE(pairing="interleaved", base=100.0), [[0, 0, 1, 0]], [10])
    near(found, [[0, 0, math.cos(1), math.sin(1)]])


# Plain loops


@pytest.mark.parametrize("lengths", [(5, 5), (3, 6), (6, 3)], ids=lambda p: f"{p[0]}x{p[1]}")
@pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])
@pytest.mark.parametrize("options", [{}, {"width": 4}, {"width": 4, "part": "last", "base": 7.5}], ids=str)
@PAIRINGS
def test_every_pairing_and_alignment(rng, pairing, options, causal, lengths):
    lq, lk = lengths
    a = qkv(rng, (2, 4, 2, lq, lk, 6, 2))
    offset = 0 if causal == "top_left" else lk - lq

    def by_hand(rows, sign, first):
        turn = lambda row, p: turned_by_hand(row, sign * p, pairing, **options)  # noqa: E731
        return [[[turn(r, p + first) for p, r in enumerate(h)] for h in b] for b in rows]

    q, k = by_hand(a["q"].tolist(), 1, offset), by_hand(a["k"].tolist(), 1, 0)
    expected = loops.attention(
        q, k, *(a[n].tolist() for n in ("v", "dout", "dlse")),
        scale=6**-0.5, sees=lambda b, h, i, j: not (causal and j > i + offset),
    )  # fmt: skip
    # Gradients turn back.
    expected |= {"dq": by_hand(expected["dq"], -1, offset), "dk": by_hand(expected["dk"], -1, 0)}
    spec = ra.SDPA(causal=causal, rotary=ra.RoPE(pairing=pairing, **options))
    found = forward_and_gradients(spec, {n: a[n] for n in "qkv"}, a["dout"], a["dlse"])
    for name in ("out", "lse", "dq", "dk", "dv"):
        near(found[name], expected[name])


def test_given_positions_are_those_of_the_turns(rng):
    a = qkv(rng, (2, 2, 1, 3, 4, 4, 2))
    at_q, at_k = np.array([[7, 0, 3], [5, 5, 100]]), np.array([1, 9, 3, 3])
    hand = lambda rows, places: [turned_by_hand(r, int(p), "half") for r, p in zip(rows, places, strict=True)]  # noqa: E731
    q = np.array([[hand(a["q"][b, h], at_q[b]) for h in range(2)] for b in range(2)])
    k = np.array([[hand(a["k"][b, 0], at_k)] for b in range(2)])
    found = ra.attention(
        a["q"], a["k"], a["v"], rotary=ra.RoPE(pairing="half"), q_positions=at_q, k_positions=at_k[None]
    )
    near(found, ra.attention(q, k, a["v"]))


# Identities


@PAIRINGS
@pytest.mark.parametrize("shift", [1, 1000, 2**20])
def test_positions_shifted_together_leave_the_output(rng, pairing, shift):
    """Within the angles' own error, some units of p·2⁻⁵³; certified values, which have none, are the same bits."""
    spec, x, _ = arrays(ra.RoPE(pairing=pairing), rng)
    at = {"q_positions": np.arange(2, 7), "k_positions": np.arange(7)}
    moved = {name: p + shift for name, p in at.items()}
    near(ra.evaluate(spec, x | moved).out, ra.evaluate(spec, x | at).out, 1e-12 + shift * 2.0**-50)
    certified = [ra.evaluate(spec, x | places, engine="certified").out for places in (at, moved)]
    same(*certified)


@EVERY
def test_lengths_of_queries_and_keys_stay(rng, spec):
    if spec.angles == "table":
        return
    rows = rng.standard_normal((4, 6))
    found = turned(spec, rows, [0, 5, 99, 2**20])
    near((found**2).sum(-1), (rows**2).sum(-1))
    same(found[0], rows[0])


def test_interleaved_is_half_after_a_permutation_of_channels(rng):
    """Interleaved channel 2t is channel t of the halves, 2t + 1 is t + width/2."""
    spec, x, duals = arrays(ra.RoPE(pairing="interleaved"), rng)
    order = np.concatenate([np.arange(0, 6, 2), np.arange(1, 6, 2)])
    halves = replace(spec, rotary=ra.RoPE(pairing="half"))
    permuted = x | {name: x[name][..., order] for name in "qk"}
    expected = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    found = forward_and_gradients(halves, permuted, duals["out"], duals["lse"])
    for name, value in expected.items():
        near(found[name], value[..., order] if name in ("dq", "dk") else value)
    other = ra.evaluate(halves, x).out
    assert abs(other - expected["out"]).max() > 0.01


def test_channels_that_do_not_turn_are_those_without_rotation(rng):
    spec, x, duals = arrays(ra.RoPE(pairing="half", width=0), rng)
    expected = forward_and_gradients(replace(spec, rotary=None), x, duals["out"], duals["lse"])
    for name, value in forward_and_gradients(spec, x, duals["out"], duals["lse"]).items():
        same(value, expected[name])


def test_a_table_of_its_own_cosines_is_the_exact_rotation(rng):
    spec, x, _ = arrays(ra.RoPE(pairing="interleaved"), rng)
    angles = np.arange(9)[:, None] * 10000.0 ** (-np.arange(3) / 3)
    table = {"rope_cos": np.cos(angles), "rope_sin": np.sin(angles)}
    by_table = replace(spec, rotary=ra.RoPE(pairing="interleaved", angles="table"))
    near(ra.evaluate(by_table, x | table).out, ra.evaluate(spec, x).out)


def test_a_decode_step_is_the_last_row(rng):
    spec, x, _ = arrays(ra.RoPE(pairing="half"), rng, Lq=7)
    near(ra.evaluate(spec, x | {"q": x["q"][:, :, -1:]}).out, ra.evaluate(spec, x).out[:, :, -1:])


def test_a_term_alone_is_causal_attention_with_that_rotation(rng):
    spec, x, _ = arrays(ra.RoPE(pairing="half"), rng, Lq=7)
    same(ra.evaluate(ra.RoPE(pairing="half"), x).out, ra.evaluate(spec, x).out)
    same(ra.attention(**x, causal=True, rotary=ra.RoPE(pairing="half")), ra.evaluate(spec, x).out)


# The plan, the kernels, and gradients by what shares nothing with the tape


@EVERY
@pytest.mark.parametrize("batch", [2, 0])
def test_the_plan_means_what_the_reference_says(spec, batch, rng):
    spec, x, _ = arrays(spec, rng, B=batch)
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    found = execute(api.build(spec, x, "float64", ("out",)).plan)
    near(found["out"], expected.out)
    near(found["lse"], expected.lse)


@EVERY
def test_the_kernels_agree(spec, rng):
    spec, x, duals = arrays(spec, rng)
    expected = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    for name, value in forward_and_gradients(spec, x, duals["out"], duals["lse"], engine="cpu").items():
        near(value, expected[name], 1e-11)


@EVERY
def test_gradients_by_complex_step(spec, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    spec, x, duals = arrays(spec, rng)
    problem = api.build(spec, x, "float64", ("out",))
    gradients = ra.vjp(spec, x, duals)
    assert ("drope_cos" in gradients) == (spec.rotary.angles == "table")
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.variant.reference(problem.spec, x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-11)


# What is no number


@PAIRINGS
def test_a_nan_in_a_live_key_reaches_every_query_of_its_head_and_in_padding_none(rng, pairing):
    spec, x, duals = arrays(ra.RoPE(pairing=pairing, width=4), rng)
    lengths = {"kv_lengths": np.array([7, 6])}
    expected = forward_and_gradients(spec, x | lengths, duals["out"], duals["lse"])
    for bad in (np.nan, np.inf):
        k = x["k"].copy()
        k[1, :, 6, 1] = bad
        found = forward_and_gradients(spec, x | lengths | {"k": k}, duals["out"], duals["lse"])
        for name, value in expected.items():
            same(found[name], value)
        k[0, 1, 0, 1] = bad
        problem = api.build(spec, x | lengths | {"k": k}, "float64", ("out",))
        # Lowering infinities warns of nothing.
        plan = problem.plan
        with np.errstate(invalid="ignore"):
            both = execute(plan), problem.evaluate(np.asarray)
        for found in both:
            for name in ("out", "lse"):
                assert np.isnan(found[name][0, 2:]).all()
                near(found[name][0, :2], expected[name][0, :2])
                near(found[name][1], expected[name][1])


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"pairing has no default, for checkpoints differ: 'half' pairs .* 'interleaved' 2t"),
        ({"pairing": "neox"}, "pairing is one of 'half', 'interleaved'; given: 'neox'"),
        ({"pairing": ("half",)}, "pairing is one of"),
        ({"pairing": "half", "angles": "float64"}, "angles is one of 'exact', 'float32', 'table'; given: 'float64'"),
        ({"pairing": "half", "part": "middle"}, "part is one of 'first', 'last'; given: 'middle'"),
        ({"pairing": "half", "width": 5}, "width is an even number of channels, two a pair, or None for all; given: 5"),
        ({"pairing": "half", "width": -2}, "width is an even number"),
        ({"pairing": "half", "width": 4.0}, "width is an even number"),
        ({"pairing": "half", "width": True}, "width is an even number"),
        ({"pairing": "half", "base": 1.0}, "base is a number above 1, so that frequencies fall; given: 1.0"),
        ({"pairing": "half", "base": "10000"}, "base is a finite number that float64 holds"),
        ({"pairing": "half", "base": 10000.1, "angles": "float32"}, "base is a number that float32 holds"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.RoPE(**options)
    with pytest.raises(SpecError, match=message):
        ra.spec("rope", **options)


def test_an_odd_head_and_one_that_is_too_narrow():
    q = np.ones((1, 1, 2, 5))
    with pytest.raises(SpecError, match="channels turn in pairs, and D=5 is odd: say width, an even number below it"):
        ra.attention(q, q, q, rotary=ra.RoPE(pairing="half"))
    with pytest.raises(SpecError, match="width=6 channels are to turn, but the head has D=5"):
        ra.attention(q, q, q, rotary=ra.RoPE(pairing="half", width=6))
    assert ra.attention(q, q, q, rotary=ra.RoPE(pairing="half", width=4)).shape == q.shape


def test_a_table_of_another_width(rng):
    spec, x, _ = arrays(ra.RoPE(pairing="half", angles="table"), rng)
    wide = x | {name: np.ones((9, 4)) for name in ("rope_cos", "rope_sin")}
    with pytest.raises(ShapeError, match="rope_cos has 4 columns, where 6 channels have 3 pairs"):
        ra.evaluate(spec, wide)
    with pytest.raises(ShapeError, match="rope_sin has R=4, but an array before it has R=3"):
        ra.evaluate(spec, wide | {"rope_cos": x["rope_cos"]})
    with pytest.raises(SpecError, match="attention has no argument for rope_cos, rope_sin: evaluate"):
        ra.attention(**{n: x[n] for n in "qkv"}, rotary=spec.rotary)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"k_positions": np.arange(3, 10)}, "rope_cos has 9 rows, for positions from 0 on; the keys stand at 0 to 9"),
        ({"q_positions": np.array([0, 1, -1, 2, 3])}, "the queries stand at -1 to 3"),
    ],
    ids=["keys", "queries"],
)
def test_a_position_without_a_row(rng, more, message):
    spec, x, _ = arrays(ra.RoPE(pairing="half", angles="table"), rng)
    with pytest.raises(ShapeError, match=message):
        ra.evaluate(spec, x | more)


def test_padding_needs_no_row(rng):
    """Two queries of five are there, at 5 and 6; the other three would stand at 7 to 9, beyond a table of 8."""
    spec, x, _ = arrays(ra.RoPE(pairing="half", angles="table"), rng, P=8)
    ragged = {"q_lengths": np.array([2, 2]), "kv_lengths": np.array([7, 7])}
    found = ra.evaluate(spec, x | ragged).out
    near(found[:, :, :2], ra.evaluate(spec, x | {"q": x["q"][:, :, :2]}).out)
    assert not found[:, :, 2:].any()


def test_a_table_that_is_no_number(rng):
    spec, x, _ = arrays(ra.RoPE(pairing="half", angles="table"), rng)
    with pytest.raises(ShapeError, match="rope_sin must hold finite numbers"):
        ra.evaluate(spec, x | {"rope_sin": np.full((9, 3), np.nan)})
