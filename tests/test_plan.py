"""Laws of plans: what a variant lowers to means what its reference says."""

import math

import numpy as np
import pytest
from checks import near
from hypothesis import given, settings
from hypothesis import strategies as st
from problems import EXTRAS, OF_TERMS, PROBLEMS, Problem, Sizes, arrays

import refattn as ra
from refattn import api, plan
from refattn.plan import Mix, Relative, Score, Table, ValueTable, execute, leaves, map_leaves


def built(problem, inputs):
    return api.build(problem.spec, inputs, "float64", ("out",))


def obeys(problem, inputs):
    expected = ra.evaluate(problem.spec, inputs, want=("out", "lse"))
    found = execute(built(problem, inputs).plan)
    near(found["out"], expected.out)
    near(found["lse"], expected.lse)


@pytest.mark.parametrize("name", PROBLEMS)
def test_a_plan_means_what_the_reference_says(name, rng):
    obeys(PROBLEMS[name], arrays(PROBLEMS[name], rng)[0])


@st.composite
def problems(draw):
    groups = draw(st.integers(1, 2))
    lengths = st.sampled_from([0, 1, 2, 3, 4, 5, 7, 8, 9])
    heads = groups * draw(st.integers(1, 3))
    sizes = Sizes(draw(st.integers(0, 2)), heads, groups, draw(lengths), draw(lengths), draw(lengths), draw(lengths))
    ends = st.none() | st.integers(0, 4)
    direction = draw(st.sampled_from([None, "symmetric", "two_sided"] + ["half"] * (heads % 2 == 0)))
    rule = draw(st.sampled_from(["interleaved", "geometric", "learned"]))
    dense = [e for e in EXTRAS if not e.startswith(OF_TERMS)]
    extras = tuple(draw(st.lists(st.sampled_from(dense), unique_by=lambda e: e.split()[0], max_size=5)))
    if direction and rule == "learned":
        extras += ("slopes", "slopes_right") if direction == "two_sided" else ("slopes",)
    spec = ra.SDPA(
        causal=draw(st.sampled_from([False, "top_left", "bottom_right"])),
        window=draw(st.none() | st.tuples(ends, ends)),
        softcap=draw(st.sampled_from([None, 0.5, 30.0])),
        bias=(ra.ALiBi(slopes=rule, direction=direction),) if direction else (),
        keep_probability=0.75 if any(e.startswith("keep") for e in extras) else None,
    )
    return Problem(spec, sizes, extras)


@settings(max_examples=300, derandomize=True, deadline=None)
@given(problems(), st.integers(0, 2**32))
def test_any_combination_of_options_means_what_the_reference_says(problem, seed):
    obeys(problem, arrays(problem, np.random.default_rng(seed))[0])


@pytest.mark.parametrize(
    ("name", "bad"), [(name, bad) for name in "qkv" for bad in (np.nan, np.inf, -np.inf)] + [("bias", np.nan)]
)
def test_a_live_number_that_is_not_finite_makes_its_rows_nan(name, bad, rng):
    problem = Problem(ra.SDPA(causal="bottom_right", softcap=5.0), Sizes(), ("bias of a pair",))
    inputs = arrays(problem, rng)[0]
    inputs[name][(0,) * (inputs[name].ndim - 2) + (3, 1)] = bad
    with np.errstate(invalid="ignore"):
        obeys(problem, inputs)
        assert np.isnan(execute(built(problem, inputs).plan)["out"]).any()


def test_leaves_are_the_real_arrays_by_name_and_map_changes_each(rng):
    problem = PROBLEMS["biases of all kinds"]
    lowered = built(problem, arrays(problem, rng)[0] | {"sink": np.ones(4)}).plan
    assert list(leaves(lowered)) == ["q", "k", "v", "sink", *(f"bias.{n}" for n in range(5))]
    doubled = leaves(map_leaves(lowered, lambda a: 2 * a))
    for name, leaf in leaves(lowered).items():
        np.testing.assert_array_equal(doubled[name], 2 * leaf)
    assert [b.offset for b in map_leaves(lowered, lambda a: a).bias if isinstance(b, Table)] == [6, 6]


def test_description_shows_shapes_and_values(rng):
    problem = PROBLEMS["everything"]
    shown = plan.describe(built(problem, arrays(problem, rng)[0]).plan)
    assert shown["q"] == (2, 6, 9, 5)
    assert shown["window"] == (4, 2)
    assert shown["bias"] == ({"Slope": {"slopes": (6,)}}, {"Dense": {"values": (9, 11)}})


def test_a_mix_is_the_weighted_sum_of_its_parts_which_has_no_lse(rng):
    """Each head's weights as Infini-attention's gate would have them."""
    one, other = (built(PROBLEMS[name], arrays(PROBLEMS[name], rng)[0]).plan for name in ("causal top left", "sink"))
    gate = rng.random((4, 1, 1))
    mixed = Mix(parts=(one, other), weights=(gate, 1 - gate))
    found = execute(mixed)
    assert list(found) == ["out"]
    near(found["out"], gate * execute(one)["out"] + (1 - gate) * execute(other)["out"])


def test_leaves_of_a_mix_are_those_of_its_parts_by_number_and_the_weights(rng):
    score = built(PROBLEMS["sink"], arrays(PROBLEMS["sink"], rng)[0]).plan
    mixed = Mix(parts=(score, Mix(parts=(score,), weights=(np.ones(()),))), weights=(np.ones(4), np.zeros(4)))
    names = ["q", "k", "v", "sink"]
    expected = [*(f"0.{n}" for n in names), *(f"1.0.{n}" for n in names), "1.weight.0", "weight.0", "weight.1"]
    assert list(leaves(mixed)) == expected
    changed = map_leaves(mixed, lambda a: a + 1)
    for name, leaf in leaves(mixed).items():
        np.testing.assert_array_equal(leaves(changed)[name], leaf + 1)
    assert plan.describe(mixed)["weights"] == ((4,), (4,))


# Vectors by relative position

PLACES = np.array([[2, 0, 5]]), np.array([[4, 1, -1, 3], [0, 0, 2, 1]])
LOW, COUNT = -6, 11


def tables(rng, heads):
    """A score with vectors by relative position on both sides and of the values, tables for `heads` heads each."""
    q, k, v = (rng.standard_normal(shape) for shape in ((2, 4, 3, 3), (2, 2, 4, 3), (2, 2, 4, 2)))
    on_q = Relative(rows=rng.standard_normal((2, 4, 3, 5)), values=rng.standard_normal((heads, COUNT, 5)), offset=-LOW)
    on_k = Relative(
        rows=rng.standard_normal((2, 2, 4, 6)), values=rng.standard_normal((heads, COUNT, 6)), offset=-LOW, side="k"
    )
    table = ValueTable(values=rng.standard_normal((heads, COUNT, 2)), offset=-LOW)
    return Score(
        q=q, k=k, v=v, scale=0.5, positions=PLACES, softcap=2.0, relative=(on_q, on_k), v_table=(table, table),
        sink=rng.standard_normal(4), mask=rng.random((2, 1, 3, 4)) < 0.8,
    )  # fmt: skip


@pytest.mark.parametrize("heads", [1, 4])
def test_vectors_by_relative_position_by_plain_loops(heads, rng):
    """Row i's vector, or key j's, meets that of j − i, unscaled and before the softcap; a value gains two."""
    score = tables(rng, heads)
    (on_q, on_k), (table, _) = score.relative, score.v_table
    found = execute(score)
    for b, h, i in np.ndindex(2, 4, 3):
        g, own, weights, values = h // 2, h % heads, [math.exp(score.sink[h])], [[0.0, 0.0]]
        for j in range(4):
            if not score.mask[b, 0, i, j]:
                continue
            n = int(PLACES[1][b, j]) - int(PLACES[0][0, i]) - LOW
            s = 0.5 * sum(score.q[b, h, i, d] * score.k[b, g, j, d] for d in range(3))
            s += sum(on_q.rows[b, h, i, d] * on_q.values[own, n, d] for d in range(5))
            s += sum(on_k.rows[b, g, j, d] * on_k.values[own, n, d] for d in range(6))
            weights.append(math.exp(2 * math.tanh(s / 2)))
            values.append([score.v[b, g, j, d] + 2 * table.values[own, n, d] for d in range(2)])
        near(found["lse"][b, h, i], math.log(sum(weights)))
        near(found["out"][b, h, i], np.array(weights) @ np.array(values) / sum(weights))


def test_leaves_of_vectors_by_relative_position(rng):
    score = tables(rng, 1)
    names = [f"relative.{n}.{leaf}" for n in range(2) for leaf in ("rows", "values")] + ["v_table.0", "v_table.1"]
    assert list(leaves(score)) == ["q", "k", "v", "sink", *names]
    changed = leaves(map_leaves(score, lambda a: a + 1))
    for name, leaf in leaves(score).items():
        np.testing.assert_array_equal(changed[name], leaf + 1)
    shown = {"rows": (2, 2, 4, 6), "values": (1, COUNT, 6), "offset": 6, "side": "k"}
    assert plan.describe(score)["relative"][1] == {"Relative": shown}
