"""The Causal Transformer's attention against numbers worked by hand, a plain script, identities, and complex step."""

import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest
from checks import near, same

import refattn as ra
from refattn import api
from refattn.errors import ShapeError, SpecError, Unsupported
from refattn.plan import Mix, execute

SIZES = {"B": 2, "S": 3, "Lq": 5, "Hq": 2, "D": 3, "Dv": 2, "E": 4}
AFTER = ({}, {"residual": True}, {"residual": True, "norm": "code"})
SPECS = [
    ra.CausalTransformer(clip=2, mask=mask, active=active, final_layer=last, **after)
    for mask, active, last, after in product(("exact", "minus_1e9"), ("queries", "keys", "both"), (False, True), AFTER)
]


def words(spec):
    after = "norm" if spec.norm else "residual" if spec.residual else "bare"
    return f"{spec.mask} {spec.active} {after}{' projected' if spec.final_layer else ''}"


EVERY = pytest.mark.parametrize("spec", SPECS, ids=words)
WITHOUT = [ra.CausalTransformer(clip=2, **after) for after in AFTER]


def arrays(spec, rng, *, optional=True, **changed):
    """Inputs of every kind, and the cotangent of out."""
    sizes, module = SIZES | changed, ra.variants()["causal_transformer"].module
    if spec.final_layer:
        sizes = {"E": 5} | {n: size for n, size in sizes.items() if n != "E"}
    drawn = {
        name: rng.random(a.shape(sizes)) < 0.6 if a.kind == "bool" else rng.standard_normal(a.shape(sizes))
        for name, a in module.signature(spec).items()
        if optional or not a.optional
    }
    return drawn, rng.standard_normal(drawn["x"].shape)


def out_of(spec, x):
    return ra.evaluate(spec, x).out


# Numbers worked by hand


def one_number_each(values):
    """Streams of one number a time, no scores, values passed as they are: attention is a mean."""
    streams = len(values)
    x = {"x": np.array(values, float)[None, ..., None], "shaw_k": np.zeros((3, 1)), "shaw_v": np.zeros((3, 1))}
    zero, one = np.zeros((streams, streams, 1, 1, 1)), np.ones((streams, streams, 1, 1, 1))
    return x | {"wq": zero, "wk": zero, "wv": one}


def test_means_of_the_past_of_the_other_stream_as_it_came_in():
    """Streams 1 3 8 and 2 6 1: means up to a time, 1 2 4 and 2 4 3; cross-attention reads x, so they are exchanged.

    shaw_v 6 for keys before the query, 12 at it: its mean adds 12, (6 + 12)/2, (6 + 6 + 12)/3.
    """
    x, spec = one_number_each([[1, 3, 8], [2, 6, 1]]), ra.CausalTransformer(clip=1)
    near(out_of(spec, x)[0, :, :, 0], [[2, 4, 3], [1, 2, 4]])
    x["shaw_v"] = np.array([[6.0], [12], [1000]])
    near(out_of(spec, x)[0, :, :, 0], [[2 + 12, 4 + 9, 3 + 8], [1 + 12, 2 + 9, 4 + 8]])
    # With the residual y = x + its mean, and out = y + the other's mean; the query's input is not projected.
    near(out_of(ra.CausalTransformer(clip=1, residual=True), one_number_each([[1, 3, 8], [2, 6, 1]]))[0, 0, :, 0],
         [2 + 2, 5 + 4, 12 + 3])  # fmt: skip


def test_three_streams_sum_and_one_stays_alone():
    near(out_of(ra.CausalTransformer(clip=1), one_number_each([[1], [2], [4]])).ravel(), [6, 5, 3])
    near(out_of(ra.CausalTransformer(clip=1), one_number_each([[1, 3, 8]])).ravel(), [1, 2, 4])


def test_a_row_of_an_inactive_query_is_the_mean_of_all_or_0():
    x = one_number_each([[1, 3, 8], [2, 6, 1]]) | {"active": np.array([[True, False, True], [True, True, True]])}
    uniform = ra.CausalTransformer(clip=1, mask="minus_1e9")
    near(out_of(uniform, x)[0, :, :, 0], [[2, 3, 3], [1, 2, 4]])
    near(out_of(replace(uniform, mask="exact"), x)[0, :, :, 0], [[2, 0, 3], [1, 2, 4]])
    # As keys: stream 1's rows skip the entry, and see 1, 1, (1 + 8)/2; stream 0's see all of stream 1.
    near(out_of(replace(uniform, active="keys"), x)[0, :, :, 0], [[2, 4, 3], [1, 1, 4.5]])


def test_a_norm_by_hand():
    """(0, 4) about its mean is (−2, 2), its std √8 with E − 1 = 1: ∓2/(√8 + 10⁻⁶), times 3 and plus 1."""
    x = {"x": np.array([[[[0.0, 4.0]]]]), "shaw_k": np.zeros((1, 1)), "shaw_v": np.zeros((1, 2))}
    x |= {"wq": np.zeros((1, 1, 1, 2, 1)), "wk": np.zeros((1, 1, 1, 2, 1)), "wv": np.zeros((1, 1, 1, 2, 2))}
    x |= {"gain": np.full((1, 1, 2), 3.0), "shift": np.ones((1, 1, 2))}
    step = 3 * 2 / (math.sqrt(8) + 1e-6)
    near(out_of(ra.CausalTransformer(clip=0, residual=True, norm="code"), x).ravel(), [1 - step, 1 + step])


# A plain script of the block: Python floats, masks of −10⁹ written as such, biases of keys as the code has them


def product_of(row, matrix, bias):
    return [math.fsum(r * m[d] for r, m in zip(row, matrix, strict=True)) + bias[d] for d in range(len(bias))]


def plain_attention(spec, w, rows, read, active):
    """One pair of streams of one sequence, `w` its weights as lists."""
    length, far, (asks, told) = len(rows), spec.clip, active
    heads = []
    for h in range(len(w["wq"])):
        q = [product_of(a, w["wq"][h], w["bq"][h]) for a in rows]
        k = [product_of(c, w["wk"][h], w["bk"][h]) for c in read]
        v = [product_of(c, w["wv"][h], w["bv"][h]) for c in read]
        out = []
        for i in range(length):
            place = [max(-far, min(far, j - i)) + far for j in range(length)]
            hidden = [
                j > i or (spec.active != "keys" and not asks[i]) or (spec.active != "queries" and not told[j])
                for j in range(length)
            ]
            s = [
                -1e9 if hidden[j] else math.fsum(
                    a * (b + c) for a, b, c in zip(q[i], k[j], w["shaw_k"][place[j]], strict=True)
                ) / math.sqrt(len(q[i]))
                for j in range(length)
            ]  # fmt: skip
            p = [math.exp(e - max(s)) for e in s]
            if spec.mask == "exact" and all(hidden):
                p = [0.0] * length
            z = math.fsum(p) or 1.0
            out.append([
                math.fsum(p[j] * (v[j][d] + w["shaw_v"][place[j]][d]) for j in range(length)) / z
                for d in range(len(v[0]))
            ])  # fmt: skip
        heads.append(out)
    found = []
    for i in range(length):
        row = [number for head in heads for number in head[i]]
        if spec.final_layer:
            flat = [column for head in w["wo"] for column in head]
            row = product_of(row, flat, w["bo"])
        if spec.residual:
            row = [a + b for a, b in zip(row, rows[i], strict=True)]
        if spec.norm:
            mean = math.fsum(row) / len(row)
            std = math.sqrt(math.fsum((a - mean) ** 2 for a in row) / (len(row) - 1))
            row = [g * (a - mean) / (std + 1e-6) + b for g, a, b in zip(w["gain"], row, w["shift"], strict=True)]
        found.append(row)
    return found


def plain_block(spec, x):
    batch, streams, length, _ = x["x"].shape
    active = x.get("active", np.ones((batch, streams, length), bool)).tolist()
    shared = {name: x[name].tolist() for name in ("shaw_k", "shaw_v")}
    of_pairs = {name: a.tolist() for name, a in x.items() if name not in ("x", "active", *shared)}

    def attention(b, s, t, rows):
        w = shared | {name: a[s][t] for name, a in of_pairs.items()}
        return plain_attention(spec, w, rows, x["x"][b, t].tolist(), (active[b][s], active[b][t]))

    out = np.zeros(x["x"].shape)
    for b in range(batch):
        for s in range(streams):
            own = attention(b, s, s, x["x"][b, s].tolist())
            others = [attention(b, s, t, own) for t in range(streams) if t != s]
            out[b, s] = np.sum(others, axis=0) if others else own
    return out


@EVERY
@pytest.mark.parametrize("streams", [1, 2, 3])
def test_against_a_plain_script(spec, streams, rng):
    """Its keys have a bias besides, which changes nothing."""
    x, _ = arrays(spec, rng, S=streams)
    keyed = x | {"bk": rng.standard_normal(x["bq"].shape)}
    near(out_of(spec, x), plain_block(spec, keyed), 1e-11)


# Identities


@EVERY
def test_no_active_array_is_one_of_true_in_any_shape_that_broadcasts(spec, rng):
    x, _ = arrays(spec, rng, optional=False)
    for shape in ((2, 3, 5), (5,), (1, 3, 1), ()):
        same(out_of(spec, x | {"active": np.ones(shape, bool)}), out_of(spec, x))
    shared = rng.random((2, 1, 5)) < 0.5
    same(out_of(spec, x | {"active": shared}), out_of(spec, x | {"active": np.repeat(shared, 3, 1)}))


@EVERY
def test_nothing_later_reaches_a_row_that_sees_something(spec, rng):
    """A change at time 3 leaves rows 0 to 2 as they were; by −10⁹, all but the rows that see nothing."""
    x, _ = arrays(spec, rng)
    if spec.mask == "minus_1e9":
        x["active"][..., 0] = True
        x["active"] |= spec.active != "keys"
    moved = x | {"x": x["x"] + (np.arange(5) >= 3)[:, None] * rng.standard_normal(x["x"].shape)}
    near(out_of(spec, moved)[:, :, :3], out_of(spec, x)[:, :, :3])
    assert (out_of(spec, moved)[:, :, 3:] != out_of(spec, x)[:, :, 3:]).any()


def test_by_minus_1e9_an_inactive_row_sees_the_future(rng):
    spec = ra.CausalTransformer(clip=2, mask="minus_1e9")
    x, _ = arrays(spec, rng)
    x["active"][:] = True
    x["active"][:, :, 1] = False
    moved = x | {"x": x["x"] + (np.arange(5) == 4)[:, None]}
    changed = (out_of(spec, moved) != out_of(spec, x)).any(-1)
    np.testing.assert_array_equal(changed, np.broadcast_to([False, True, False, False, True], (2, 3, 5)))


@EVERY
def test_streams_in_another_order_with_their_weights_are_the_answer_in_that_order(spec, rng):
    x, _ = arrays(spec, rng)
    order = np.array([2, 0, 1])
    pairs = [n for n in x if n not in ("x", "active", "shaw_k", "shaw_v")]
    turned = x | {"x": x["x"][:, order], "active": x["active"][:, order]} | {n: x[n][order][:, order] for n in pairs}
    near(out_of(spec, turned), out_of(spec, x)[:, order])


def test_one_stream_is_shaw_s_causal_attention_of_its_projections(rng):
    spec = ra.CausalTransformer(clip=2)
    x, _ = arrays(spec, rng, S=1, optional=False)
    projected = {n: np.einsum("ble,hed->bhld", x["x"][:, 0], x[f"w{n}"][0, 0]) for n in "qkv"}
    shaw = ra.evaluate(ra.Shaw(clip=2), projected | {n: x[n] for n in ("shaw_k", "shaw_v")}).out
    near(out_of(spec, x)[:, 0], np.swapaxes(shaw, 1, 2).reshape(2, 5, 4))


@pytest.mark.parametrize("spec", WITHOUT, ids=words)
def test_a_final_layer_that_sets_heads_side_by_side_is_none(spec, rng):
    x, _ = arrays(spec, rng)
    layer = np.broadcast_to(np.eye(4).reshape(2, 2, 4), (3, 3, 2, 2, 4))
    near(out_of(replace(spec, final_layer=True), x | {"wo": layer}), out_of(spec, x))


def test_entries_active_up_to_a_length_hide_the_same_as_queries_or_both_where_streams_share_it(rng):
    """Treatments and outcomes, of one length, in the authors' code: rows alone are hidden, and keys by causality."""
    spec = ra.CausalTransformer(clip=2, mask="minus_1e9", residual=True)
    x, _ = arrays(spec, rng)
    x["active"] = np.broadcast_to(np.arange(5) < np.array([3, 5])[:, None, None], (2, 3, 5))
    near(out_of(replace(spec, active="both"), x), out_of(spec, x))
    assert (out_of(replace(spec, active="keys"), x) != out_of(spec, x)).any()


def test_what_is_hidden_on_both_sides_is_never_read(rng):
    spec = ra.CausalTransformer(clip=2, active="both")
    x, dout = arrays(spec, rng)
    x["active"][:, :, 0] = True
    clean = dict(ra.vjp(spec, x, {"out": dout}, wrt=[n for n in x if n != "active"])) | {"out": out_of(spec, x)}
    x["x"][~x["active"]] = np.nan
    found = dict(ra.vjp(spec, x, {"out": dout}, wrt=[n for n in x if n != "active"])) | {"out": out_of(spec, x)}
    for name, value in clean.items():
        same(found[name], value)


def test_a_nan_that_is_there_reaches_later_rows_and_no_earlier_ones(rng):
    spec = ra.CausalTransformer(clip=2)
    x, _ = arrays(spec, rng, optional=False)
    x["x"][1, 0, 2, 1] = np.nan
    expected = np.broadcast_to((np.arange(2) == 1)[:, None, None] & (np.arange(5) >= 2), (2, 3, 5))
    with np.errstate(invalid="ignore"):
        answers = out_of(spec, x), execute(built(spec, x).plan)["out"]
    for found in answers:
        np.testing.assert_array_equal(np.isnan(found).all(-1), expected)
        np.testing.assert_array_equal(np.isnan(found).any(-1), expected)


# The plan, and gradients by what shares nothing with the tape


def built(spec, x):
    return api.build(spec, x, "float64", ("out",))


@EVERY
@pytest.mark.parametrize("optional", [True, False])
@pytest.mark.parametrize(
    "changed", [{"S": 3}, {"S": 2, "B": 0}, {"S": 1, "Lq": 1}, {"S": 2, "Lq": 0}, {"S": 0}], ids=str
)
def test_the_plan_means_what_the_reference_says(spec, optional, changed, rng):
    x, _ = arrays(spec, rng, optional=optional, **changed)
    plan = built(spec, x).plan
    assert isinstance(plan, Mix)
    near(execute(plan)["out"], out_of(spec, x), 1e-11)


@EVERY
def test_gradients_by_complex_step(spec, rng):
    """⟨w, J u⟩ by f(x + ihu) = f + ihJu, for each input u alone, is ⟨Jᵀw, u⟩ by the tape."""
    x, dout = arrays(spec, rng)
    problem = built(spec, x)
    gradients = ra.vjp(spec, x, {"out": dout})
    for name in problem.real_inputs():
        u = rng.standard_normal(x[name].shape)
        moved = problem.variant.reference(problem.spec, x | {name: x[name] + 1e-30j * u})["out"]
        near((gradients[f"d{name}"] * u).sum(), (moved.imag / 1e-30 * dout).sum(), 1e-10)


def test_the_kernels_say_that_they_run_no_mix(rng):
    x, _ = arrays(WITHOUT[0], rng)
    with pytest.raises(Unsupported, match="causal_transformer lowers to Mix"):
        ra.evaluate(WITHOUT[0], x, engine="cpu")


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [({"clip": c}, "clip is the largest difference told apart") for c in (-1, 1.0, True)]
    + [({"mask": m}, "mask is one of 'exact', 'minus_1e9'") for m in (None, -1e9, ["exact"])]
    + [({"active": a}, "active is one of 'queries', 'keys', 'both'") for a in ("rows", None)]
    + [({name: 1}, f"{name} is True or False; given: 1") for name in ("residual", "final_layer")]
    + [({"norm": n}, "norm is None or 'code'") for n in ("layer", True)]
    + [({"scale": math.inf}, "scale is a finite number")],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        ra.CausalTransformer(**options)


def test_a_norm_of_what_is_no_sum_or_one_number(rng):
    x, _ = arrays(ra.CausalTransformer(clip=2, residual=True, norm="code"), rng, Hq=1, Dv=1, E=1)
    with pytest.raises(SpecError, match="set residual=True as well"):
        out_of(ra.CausalTransformer(clip=2, norm="code"), x)
    with pytest.raises(ShapeError, match="E is 2 or more; given: E=1"):
        out_of(ra.CausalTransformer(clip=2, residual=True, norm="code"), x)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            {"wv": np.ones((3, 3, 2, 4, 3)), "shaw_v": np.ones((5, 3))},
            r"E = Hq · Dv; given: E=4, Hq=2, Dv=3; final_layer",
        ),
        ({"wq": np.ones((3, 2, 2, 4, 3))}, r"(?s)wq has S=2, but.*wq \(S, S, Hq, E, D\) real"),
        ({"shaw_k": np.ones((4, 3))}, "shaw_k has size 4 where 5 is expected"),
        ({"shaw_v": np.full((5, 2), np.nan)}, "shaw_v must hold finite numbers"),
        ({"bk": np.ones((3, 3, 2, 3))}, "unknown array 'bk'"),
    ],
    ids=["width", "pairs", "rows", "infinite", "bias of keys"],
)
def test_arrays_that_do_not_fit(changed, message, rng):
    spec = ra.CausalTransformer(clip=2)
    x, _ = arrays(spec, rng, optional=False)
    with pytest.raises(ShapeError, match=message):
        out_of(spec, x | changed)


def test_operations_are_those_of_s_squared_attentions():
    """9 pairs of 2 heads over 5 rows: projections of 4 numbers to 2·3 + 2, and 5 keys times widths 3 + 2, doubled."""
    shown = ra.explain(ra.CausalTransformer(clip=2), SIZES | {"B": 1})
    assert shown["operations"] == 9 * 2 * 5 * 2 * (4 * 8 + 5 * 5)
    assert shown["score_matrix_bytes"] == 8 * 9 * 2 * 5 * 5
