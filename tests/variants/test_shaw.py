"""Shaw's vectors by relative position against numbers worked by hand, plain loops, identities, and complex step."""

import math

import numpy as np
import plain_loops as loops
import pytest
from checks import forward_and_gradients, near, qkv, same

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError, Unsupported
from refattn.plan import execute

SPECS = [ra.Shaw(clip=n, values=v, heads=h) for n in (0, 2, 20) for v in (True, False) for h in ("shared", "per_head")]
EVERY = pytest.mark.parametrize(
    "shaw", SPECS, ids=lambda s: f"clip {s.clip}, {s.heads}{', values' if s.values else ''}"
)
CAUSAL = pytest.mark.parametrize("causal", [False, "top_left", "bottom_right"])


def problem(rng, shaw, sizes=(2, 4, 2, 6, 8, 3, 2), **extra):
    """Inputs, and cotangents of out and lse."""
    made = qkv(rng, sizes)
    rows, heads = 2 * shaw.clip + 1, (sizes[1],) if shaw.heads == "per_head" else ()
    x = {name: made[name] for name in "qkv"} | {"shaw_k": rng.standard_normal((*heads, rows, sizes[5]))}
    x |= {"shaw_v": rng.standard_normal((*heads, rows, sizes[6]))} if shaw.values else {}
    return x | extra, {"out": made["dout"], "lse": made["dlse"]}


# Numbers worked by hand


def test_weights_and_values_by_hand():
    """k = 0, q = 1, tables e^shaw_k = (2, 1, 3), shaw_v = (10, 0, 20), v = (1, 2, 4), L = 1.

    Row 0: (1·1 + 3·22 + 3·24)/7, the last key clipped; row 1: (2·11 + 2 + 3·24)/6; row 2: (2·11 + 2·12 + 4)/5.
    """
    one, v = np.ones((1, 1, 3, 1)), np.array([1.0, 2, 4]).reshape(1, 1, 3, 1)
    tables = {"shaw_k": np.log([[2.0], [1], [3]]), "shaw_v": np.array([[10.0], [0], [20]])}
    spec = ra.SDPA(content=ra.Shaw(clip=1))
    found = ra.evaluate(spec, {"q": one, "k": 0 * one, "v": v} | tables, want=("out", "lse"))
    near(found.out.ravel(), [139 / 7, 16, 10])
    near(found.lse.ravel(), np.log([7, 6, 5]))
    # dshaw_v sums the weights of each row: 2/6 + 4/5; 1/7 + 1/6 + 1/5; 6/7 + 3/6.
    gradient = ra.vjp(spec, {"q": one, "k": 0 * one, "v": v} | tables, {"out": one}).dshaw_v.ravel()
    near(gradient, [2 / 6 + 4 / 5, 1 / 7 + 1 / 6 + 1 / 5, 6 / 7 + 3 / 6])


def test_the_scale_covers_the_relative_part():
    """D = 4, q = (2, 0, 0, 0), shaw_k of the next key (ln 3, ...): ½ · 2 ln 3 weighs it 3 : 1."""
    q, v = np.zeros((1, 1, 2, 4)), np.array([4.0, 8]).reshape(1, 1, 2, 1)
    q[..., 0] = 2
    table = np.zeros((3, 4))
    table[2, 0] = math.log(3)
    spec = ra.SDPA(content=ra.Shaw(clip=1, values=False))
    near(ra.evaluate(spec, {"q": q, "k": 0 * q, "v": v, "shaw_k": table}).out.ravel(), [7, 6])


# Plain loops


def by_loops(x, duals, shaw, *, scale, offset, sees):
    """Out, lse and all gradients, by pairs: a key and a value of its own for each."""
    q, k, v, dout, dlse = (a.tolist() for a in (x["q"], x["k"], x["v"], duals["out"], duals["lse"]))
    batch, heads, lq, width = loops.shape(q)
    groups, lk, dv = len(k[0]), len(k[0][0]), len(v[0][0][0])
    tables = {n: np.broadcast_to(x[n], (heads, *x[n].shape[-2:])).tolist() for n in ("shaw_k", "shaw_v") if n in x}
    found = {"out": duals["out"] * 0, "lse": duals["lse"] * 0} | {f"d{n}": 0 * a for n, a in x.items()}
    for b in range(batch):
        for h in range(heads):
            g = h // (heads // groups)
            for i in range(lq):
                row = {j: max(-shaw.clip, min(shaw.clip, j - i - offset)) + shaw.clip for j in range(lk) if sees(i, j)}
                key = {
                    j: [c + a for c, a in zip(k[b][g][j], tables["shaw_k"][h][n], strict=True)] for j, n in row.items()
                }
                value = {j: v[b][g][j] for j in row}
                if shaw.values:
                    value = {
                        j: [c + a for c, a in zip(value[j], tables["shaw_v"][h][n], strict=True)]
                        for j, n in row.items()
                    }
                if not row:
                    found["lse"][b, h, i] = -math.inf
                    continue
                s = {j: scale * loops.dot(q[b][h][i], key[j]) for j in row}
                top = max(s.values())
                lse = top + math.log(math.fsum(math.exp(a - top) for a in s.values()))
                p = {j: math.exp(s[j] - lse) for j in row}
                out = [math.fsum(p[j] * value[j][d] for j in row) for d in range(dv)]
                found["out"][b, h, i], found["lse"][b, h, i] = out, lse
                mean = loops.dot(out, dout[b][h][i])
                for j, n in row.items():
                    ds = scale * p[j] * (loops.dot(dout[b][h][i], value[j]) - mean + dlse[b][h][i])
                    place = (h, n) if shaw.heads == "per_head" else n
                    found["dq"][b, h, i] += ds * np.array(key[j])
                    found["dk"][b, g, j] += ds * x["q"][b, h, i]
                    found["dshaw_k"][place] += ds * x["q"][b, h, i]
                    found["dv"][b, g, j] += p[j] * duals["out"][b, h, i]
                    if shaw.values:
                        found["dshaw_v"][place] += p[j] * duals["out"][b, h, i]
    return found


@EVERY
@CAUSAL
@pytest.mark.parametrize("lengths", [(5, 8), (8, 5)], ids=["5x8", "8x5"])
def test_against_plain_loops(shaw, causal, lengths, rng):
    x, duals = problem(rng, shaw, (2, 4, 2, *lengths, 3, 2))
    spec = ra.SDPA(causal=causal, scale=0.75, content=shaw)
    offset = 0 if causal == "top_left" else lengths[1] - lengths[0]
    expected = by_loops(x, duals, shaw, scale=0.75, offset=offset, sees=lambda i, j: not causal or j <= i + offset)
    found = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        near(found[name], value, 1e-11)


# Identities


@EVERY
def test_tables_of_zeros_are_no_tables(shaw, rng):
    x, duals = problem(rng, shaw)
    x |= {name: 0 * x[name] for name in ("shaw_k", "shaw_v") if name in x}
    found = forward_and_gradients(ra.SDPA(content=shaw), x, duals["out"], duals["lse"])
    plain = forward_and_gradients(ra.SDPA(), {n: x[n] for n in "qkv"}, duals["out"], duals["lse"])
    for name, value in plain.items():
        near(found[name], value)


def test_a_vector_for_all_keys_moves_lse_alone_and_one_for_all_values_moves_out_alone(rng):
    shaw = ra.Shaw(clip=0)
    x, _ = problem(rng, shaw)
    found = ra.evaluate(ra.SDPA(scale=0.5, content=shaw), x, want=("out", "lse"))
    plain = ra.evaluate(ra.SDPA(scale=0.5), {n: x[n] for n in "qkv"}, want=("out", "lse"))
    near(found.out, plain.out + x["shaw_v"][0])
    near(found.lse, plain.lse + 0.5 * x["q"] @ x["shaw_k"][0])


def test_a_clip_beyond_every_difference_reads_the_middle_of_the_table(rng):
    wide, narrow = ra.Shaw(clip=20), ra.Shaw(clip=7)
    x, _ = problem(rng, wide)
    middle = {name: x[name][13:28] for name in ("shaw_k", "shaw_v")}
    near(ra.evaluate(ra.SDPA(content=narrow), x | middle).out, ra.evaluate(ra.SDPA(content=wide), x).out)


def test_causal_attention_reads_the_first_half_and_the_middle(rng):
    x, duals = problem(rng, ra.Shaw(clip=3), (1, 2, 2, 6, 6, 3, 2))
    found = forward_and_gradients(ra.Shaw(clip=3), x, duals["out"])
    for name in ("dshaw_k", "dshaw_v"):
        assert not found[name][4:].any()
        assert found[name][:4].all()


def test_the_sequence_reversed_with_both_tables_is_the_answer_reversed(rng):
    shaw = ra.Shaw(clip=3)
    x, _ = problem(rng, shaw, (1, 2, 1, 7, 7, 3, 2))
    turned = {name: a[..., ::-1, :] for name, a in x.items()}
    near(ra.evaluate(ra.SDPA(content=shaw), turned).out, ra.evaluate(ra.SDPA(content=shaw), x).out[:, :, ::-1])


@EVERY
def test_only_differences_of_positions_count(shaw, rng):
    x, _ = problem(rng, shaw)
    places = {"q_positions": np.array([3, 1, 1, 0, 9, 2]), "k_positions": rng.integers(-2, 9, (2, 8))}
    spec, moved = ra.SDPA(content=shaw, window=(5, 3)), {name: a + 1000 for name, a in places.items()}
    near(ra.evaluate(spec, x | moved).out, ra.evaluate(spec, x | places).out)


def test_tables_per_head_that_are_equal_are_one_shared(rng):
    shared, own = ra.Shaw(clip=2), ra.Shaw(clip=2, heads="per_head")
    x, duals = problem(rng, shared)
    each = {name: np.broadcast_to(x[name], (4, *x[name].shape)) for name in ("shaw_k", "shaw_v")}
    found = forward_and_gradients(ra.SDPA(content=own), x | each, duals["out"], duals["lse"])
    for name, value in forward_and_gradients(ra.SDPA(content=shared), x, duals["out"], duals["lse"]).items():
        near(found[name].sum(0) if "shaw" in name else found[name], value, 1e-11)


def test_a_decode_step_is_the_last_row(rng):
    shaw = ra.Shaw(clip=3)
    x, _ = problem(rng, shaw, (1, 2, 2, 9, 9, 3, 3))
    spec = ra.SDPA(causal="bottom_right", content=shaw)
    near(ra.evaluate(spec, x | {"q": x["q"][:, :, -1:]}).out, ra.evaluate(spec, x).out[:, :, -1:])


def test_a_term_alone_is_causal_attention_with_it(rng):
    x, _ = problem(rng, ra.Shaw(), (1, 2, 2, 4, 4, 2, 2))
    same(ra.evaluate(ra.Shaw(), x).out, ra.evaluate(ra.SDPA(causal=True, content=ra.Shaw()), x).out)


# What is not finite, the plan, and gradients by what shares nothing with the tape


def test_a_masked_nan_is_never_read_and_a_live_one_stays_in_its_row(rng):
    shaw = ra.Shaw(clip=2)
    x, duals = problem(rng, shaw, kv_lengths=np.array([8, 5]))
    spec = ra.SDPA(content=shaw)
    clean = forward_and_gradients(spec, x, duals["out"], duals["lse"])
    x["k"][1, :, 5:], x["v"][1, :, 6:] = np.nan, np.inf
    for name, value in forward_and_gradients(spec, x, duals["out"], duals["lse"]).items():
        same(value, clean[name])
    x["q"][0, 1, 2, 0] = np.nan
    found = ra.evaluate(spec, x).out
    assert np.isnan(found[0, 1, 2]).all()
    assert np.isnan(found).sum() == 2


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@pytest.mark.parametrize("sizes", [(2, 4, 2, 6, 8, 3, 2), (1, 2, 1, 3, 0, 2, 2), (0, 2, 2, 3, 4, 2, 2)], ids=str)
@pytest.mark.parametrize("placed", [False, True])
def test_the_plan_means_what_the_reference_says(shaw, sizes, placed, rng):
    x, _ = problem(rng, shaw, sizes)
    if placed:
        x |= {"q_positions": rng.integers(-5, 30, sizes[3]), "k_positions": rng.integers(0, 30, (sizes[0], sizes[4]))}
    spec = ra.SDPA(causal="bottom_right", softcap=3.0, content=(shaw, shaw), bias=ra.ALiBi())
    expected = ra.evaluate(spec, x, want=("out", "lse"))
    found = execute(built(spec, x).plan)
    near(found["out"], expected.out)
    near(found["lse"], expected.lse)


def test_the_kernels_say_that_they_have_none(rng):
    x, _ = problem(rng, ra.Shaw(clip=2))
    with pytest.raises(Unsupported, match="no kernel yet for vectors by relative position"):
        ra.evaluate(ra.SDPA(content=ra.Shaw(clip=2)), x, engine="cpu")


@EVERY
def test_gradients_by_complex_step(shaw, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, duals = problem(rng, shaw, sink=rng.standard_normal(4))
    given = built(ra.SDPA(causal="bottom_right", softcap=2.0, content=shaw), x)
    gradients = ra.vjp(given.spec, x, duals)
    for name in given.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = given.variant.reference(given.spec, x | {name: x[name] + 1e-30j * u})
        forward = sum((moved[n].imag / 1e-30 * w).sum() for n, w in duals.items())
        near((gradients[f"d{name}"] * u).sum(), forward, 1e-11)


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clip": c}, "clip is the largest difference told apart") for c in (-1, 2.0, True, None)]
    + [({"values": 1}, "values is True or False; given: 1")]
    + [({"heads": h}, "heads is 'shared' or 'per_head'") for h in (None, "each", ["shared"])],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.Shaw(**options)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"shaw_k": np.ones((4, 3))}, r"(?s)shaw_k has size 4 where 5 is expected.*shaw_k \(5, D\) real"),
        ({"shaw_v": np.ones((5, 3))}, "shaw_v has Dv=3, but"),
        ({"shaw_v": np.full((5, 2), np.inf)}, "shaw_v must hold finite numbers"),
    ],
    ids=["rows", "width", "infinite"],
)
def test_tables_that_do_not_fit(changed, message, rng):
    x, _ = problem(rng, ra.Shaw(clip=2))
    with pytest.raises(ShapeError, match=message):
        ra.evaluate(ra.SDPA(content=ra.Shaw(clip=2)), x | changed)


def test_a_table_for_values_is_no_input_without_them_and_a_content_term_is_no_bias(rng):
    x, _ = problem(rng, ra.Shaw(clip=2))
    with pytest.raises(ShapeError, match="unknown array 'shaw_v'"):
        ra.evaluate(ra.SDPA(content=ra.Shaw(clip=2, values=False)), x)
    with pytest.raises(SpecError, match="bias takes Specs such as ALiBi"):
        ra.SDPA(bias=ra.Shaw())
