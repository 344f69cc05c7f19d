"""Keys and values in blocks: the same numbers as in a row, whatever unused slots and entries hold."""

from dataclasses import replace

import numpy as np
import pytest
from checks import near, same, slopes_by_complex_step
from problems import PROBLEMS, Problem, Sizes, arrays

import refattn as ra
from refattn import api, unread
from refattn.bound import BoundSpace
from refattn.engines import certified, cpu
from refattn.engines.cpu import fast, pool
from refattn.errors import ShapeError, SpecError
from refattn.plan import execute, keys
from refattn.profiles import FLOAT32
from refattn.tape import Tape
from refattn.unpack import unpacked

WANT = ("out", "lse")
EACH = pytest.mark.parametrize("name", PROBLEMS)
SIZE, ENTRIES, SPARE = 4, 3, 2


def in_a_row(problem, rng, dtype=np.float64):
    """The problem with twelve keys (none, if it had none), its lengths given, and its cotangents."""
    length = SIZE * ENTRIES if problem.sizes.Lk else 0
    extras = tuple(e for e in problem.extras if e != "kv_lengths")
    x, duals = arrays(Problem(problem.spec, problem.sizes._replace(Lk=length), extras), rng, dtype)
    x["kv_lengths"] = rng.integers(0, length + 1, problem.sizes.B)
    if len(x["kv_lengths"]):
        x["kv_lengths"][-1] = length
    return problem.spec, x, duals


def in_blocks(spec, x, rng, size=SIZE):
    """The same problem, its keys in blocks out of order among others full of NaN, its table full of nonsense."""
    batch, groups, length, _ = x["k"].shape
    count = -(-length // size) if length else ENTRIES
    blocks = batch * count + SPARE
    table = np.full((batch, count), -(2**40))
    found = dict(x)
    order = iter(rng.permutation(blocks))
    named = [n for n in ("k", "v", "k_scale", "v_scale") if n in x]
    for n in named:
        odd = np.nan if x[n].dtype.kind == "f" else 77
        found[n] = np.full((blocks, groups, size if length else 0, *x[n].shape[3:]), odd, x[n].dtype)
    for b, there in enumerate(x["kv_lengths"]):
        for m in range(-(-int(there) // size)):
            table[b, m] = next(order)
            own = slice(m * size, min((m + 1) * size, int(there)))
            for n in named:
                found[n][table[b, m], :, : own.stop - own.start] = x[n][b, :, own]
    return replace(spec, paged=True), found | {"block_table": table}


def back(gradient, x, length):
    """Gradients of blocks as those of keys in a row; of slots that are read by nobody they are exactly 0."""
    table, size = x["block_table"], gradient.shape[2]
    found = np.zeros((len(table), gradient.shape[1], length, *gradient.shape[3:]))
    rest = gradient.copy()
    for b, there in enumerate(x["kv_lengths"]):
        for j in range(there):
            found[b, :, j] = gradient[table[b, j // size], :, j % size]
            rest[table[b, j // size], :, j % size] = 0
    assert not rest.any()
    return found


def everything(spec, inputs, cotangents, engine):
    found = dict(ra.evaluate(spec, inputs, engine=engine, want=WANT, dtype="float64"))
    return found | dict(ra.vjp(spec, inputs, cotangents, engine=engine, dtype="float64"))


def test_blocks_by_hand():
    """Blocks of two slots; the keys of the first sequence are in blocks 2 and 0, the one of the second in block 1."""
    v = np.array([[30.0, 99.0], [7.0, np.nan], [10.0, 20.0]]).reshape(3, 1, 2, 1)
    x = {"q": np.zeros((2, 1, 1, 1)), "k": np.zeros((3, 1, 2, 1)), "v": v}
    x |= {"block_table": np.array([[2, 0], [1, -1]]), "kv_lengths": np.array([3, 1])}
    near(ra.evaluate(ra.SDPA(paged=True), x).out.ravel(), [20.0, 7.0])


@pytest.mark.parametrize("size", [1, 4, 6, 12])
@EACH
def test_the_reference_gives_the_same_bits_as_for_keys_in_a_row(name, size, rng):
    spec, x, _ = in_a_row(PROBLEMS[name], rng)
    paged, blocks = in_blocks(spec, x, rng, size)
    expected, found = ra.evaluate(spec, x, want=WANT), ra.evaluate(paged, blocks, want=WANT)
    for n in WANT:
        same(found[n], expected[n])


@pytest.mark.parametrize("size", [5, 7, 16])
@pytest.mark.parametrize("name", ["plain", "window", "sink", "ragged ALiBi", "T5, ragged", "q_lengths"])
def test_places_beyond_all_lengths_change_no_number(name, size, rng):
    """Twelve keys leave room in the last block; sums over more places differ in their last bits."""
    spec, x, _ = in_a_row(PROBLEMS[name], rng)
    paged, blocks = in_blocks(spec, x, rng, size)
    expected, found = ra.evaluate(spec, x, want=WANT), ra.evaluate(paged, blocks, want=WANT)
    for n in WANT:
        near(found[n], expected[n])


@pytest.mark.parametrize("engine", ["reference", "cpu"])
@EACH
def test_gradients_go_to_the_slots_that_were_read(name, engine, rng):
    spec, x, duals = in_a_row(PROBLEMS[name], rng)
    paged, blocks = in_blocks(spec, x, rng)
    expected, found = everything(spec, x, duals, "reference"), everything(paged, blocks, duals, engine)
    assert list(found) == list(expected)
    for n in expected:
        near(back(found[n], blocks, x["k"].shape[2]) if n in ("dk", "dv") else found[n], expected[n])


@EACH
def test_a_plan_means_what_the_reference_says_in_blocks_and_unpacked(name, rng):
    spec, x, _ = in_a_row(PROBLEMS[name], rng)
    paged, blocks = in_blocks(spec, x, rng)
    plan = api.build(paged, blocks, "float64", ("out",)).plan
    assert plan.k.shape[0] == len(blocks["k"])
    assert keys(plan) == x["k"].shape[2]
    plain = unpacked(plan)
    assert plain.pages is None
    expected = ra.evaluate(spec, x, want=WANT)
    for found in (execute(plan), execute(plain)):
        for n in WANT:
            near(found[n], expected[n])


@EACH
def test_gradients_are_those_of_the_text(name, rng):
    spec, x, duals = in_a_row(PROBLEMS[name], rng)
    paged, blocks = in_blocks(spec, x, rng)
    for n in ("k", "v"):
        blocks[n] = np.where(np.isnan(blocks[n]), 0.5, blocks[n])
    slopes_by_complex_step(paged, blocks, duals, rng)


@EACH
def test_the_cpu_engine_in_float32_is_within_the_bound_of_each_element(name, rng):
    spec, x, duals = in_a_row(PROBLEMS[name], rng, np.float32)
    paged, blocks = in_blocks(spec, x, rng)
    checked = api.build(paged, blocks, None, WANT)
    wrt = tuple(checked.real_inputs())
    with np.errstate(invalid="ignore"):
        bounds = checked.differentiate(BoundSpace(FLOAT32).real, duals, wrt)
    alone, found = cpu.run(checked), cpu.vjp(checked, duals, wrt)
    for n, bound in bounds.items():
        live = ~np.isneginf(bound.x)
        for results in (alone, found):
            if n in results:
                same(np.isneginf(results[n]), ~live)
                assert (np.abs(results[n][live] - bound.x[live]) <= bound.e[live]).all(), n


@pytest.mark.parametrize("name", ["plain", "softcap", "ragged ALiBi", "mask", "no key", "everything"])
def test_certified_values_are_all_decided(name, rng):
    spec, x, duals = in_a_row(PROBLEMS[name], rng)
    paged, blocks = in_blocks(spec, x, rng)
    checked = api.build(paged, blocks, "float64", ("out",))
    proved = certified.certify(checked, duals, tuple(checked.real_inputs()))
    other = api.build(spec, x, "float64", ("out",))
    for n, expected in certified.certify(other, duals, tuple(other.real_inputs())).items():
        assert not (proved[n].status == certified.ENCLOSED).any(), n
        value = proved[n].rne
        same(back(value, blocks, x["k"].shape[2]) if n in ("dk", "dv") else value, expected.rne)


def shared(rng):
    """Three sequences over one block, with what each reads in a row."""
    x = {"q": rng.standard_normal((3, 4, 2, 3)), "k": rng.standard_normal((4, 2, 2, 3))}
    x |= {"v": rng.standard_normal((4, 2, 2, 5)), "kv_lengths": np.array([4, 2, 3])}
    x["block_table"] = np.array([[1, 3], [1, 1], [1, 0]])
    row = dict(x)
    del row["block_table"]
    for n in ("k", "v"):
        row[n] = np.stack([np.concatenate([x[n][i] for i in entries], 1) for entries in x["block_table"]])
    return x, row, {"out": rng.standard_normal((3, 4, 2, 5)), "lse": rng.standard_normal((3, 4, 2))}


@pytest.mark.parametrize("engine", ["reference", "cpu", "certified"])
def test_gradients_of_a_block_are_summed_over_the_sequences_that_share_it(engine, rng):
    x, row, duals = shared(rng)
    found, parts = (ra.vjp(ra.SDPA(paged=p), a, duals, engine=engine) for p, a in ((True, x), (False, row)))
    near(found.dq, parts.dq)
    for n in ("dk", "dv"):
        expected = np.zeros(x[n[1:]].shape)
        for b, entries in enumerate(x["block_table"]):
            for m, block in enumerate(entries):
                expected[block] += parts[n][b, :, 2 * m : 2 * m + 2]
        near(found[n], expected)
        assert not found[n][2].any()


@pytest.mark.parametrize("engine", ["reference", "cpu", "certified"])
def test_a_live_nan_reaches_the_blocks_that_its_rows_see_and_no_others(engine, rng):
    x, _, duals = shared(rng)
    x["k"][3, 0, 1, 2] = np.nan
    with np.errstate(invalid="ignore"):
        found = everything(ra.SDPA(paged=True), x, duals, engine)
    hit = np.zeros((3, 4), bool)
    hit[0, :2] = True
    same(np.isnan(found["out"]).any((2, 3)), hit)
    blocks = np.zeros((4, 2), bool)
    blocks[[1, 3], 0] = True
    for n in ("dk", "dv"):
        same(np.isnan(found[n]).any((2, 3)), blocks)


def test_what_is_read_of_an_array_hears_of_no_other_entry(rng):
    tape = Tape()
    leaf = tape.variable(rng.standard_normal((3, 2)))
    read = tape.take(leaf, np.array([2, 0, 2]), 0)
    weights = np.array([[1.0, 2.0], [np.nan, 3.0], [4.0, np.inf]])
    (found,) = tape.gradients([(read, weights)], [leaf])
    same(found, np.array([[np.nan, 3.0], [0.0, 0.0], [5.0, np.nan]]))


@pytest.mark.parametrize("engine", ["reference", "cpu"])
def test_int8_in_blocks(engine, rng):
    spec, x, duals = in_a_row(PROBLEMS["everything"], rng)
    for n in ("k", "v"):
        x[n] = rng.integers(-128, 128, x[n].shape, np.int8)
        x[f"{n}_scale"] = (0.5 + rng.random(x[n].shape[:3])) / 64
    spec = replace(spec, kv="int8")
    paged, blocks = in_blocks(spec, x, rng)
    expected, found = everything(spec, x, duals, "reference"), everything(paged, blocks, duals, engine)
    for n in expected:
        near(back(found[n], blocks, x["k"].shape[2]) if n.endswith("_scale") else found[n], expected[n])
    plan = api.build(paged, blocks, "float64", ("out",)).plan
    assert plan.k_scale.shape == plan.k.shape[:3]
    near(execute(plan)["out"], expected["out"])


def test_int8_in_blocks_with_one_scale_a_head(rng):
    x, row, _ = shared(rng)
    for n in ("k", "v"):
        x[n], row[n] = (np.rint(8 * a[n]).astype(np.int8) for a in (x, row))
        x[f"{n}_scale"] = row[f"{n}_scale"] = rng.random((2, 1))
    found, expected = (ra.evaluate(ra.SDPA(paged=p, kv="int8"), a, want=WANT) for p, a in ((True, x), (False, row)))
    for n in WANT:
        same(found[n], expected[n])


def test_turned_keys_are_turned_where_they_are_read(rng):
    """A block that two sequences share stands at other positions in each."""
    x, row, duals = shared(rng)
    x["block_table"] = np.array([[1, 3], [3, 1], [0, 1]])
    for n in ("k", "v"):
        row[n] = np.stack([np.concatenate([x[n][i] for i in entries], 1) for entries in x["block_table"]])
    options = {"rotary": ra.RoPE(pairing="half", width=2), "content": (ra.Shaw(clip=1, values=False),)}
    for a in (x, row):
        a["shaw_k"] = np.linspace(-1, 1, 9).reshape(3, 3)
    paged, plain = ra.SDPA(paged=True, **options), ra.SDPA(**options)
    expected = ra.evaluate(plain, row, want=WANT)
    for found in (ra.evaluate(paged, x, want=WANT), execute(api.build(paged, x, "float64", WANT).plan)):
        for n in WANT:
            near(found[n], expected[n])
    slopes_by_complex_step(paged, x, duals, rng)


def test_chosen_rows_are_those_of_the_whole(rng):
    spec, x, _ = in_a_row(PROBLEMS["ragged ALiBi"], rng)
    paged, blocks = in_blocks(spec, x, rng)
    problem = api.build(paged, blocks, "float64", WANT)
    short = problem.variant.restrict(problem.spec, problem.inputs, (1, 4))
    near(problem.variant.reference(problem.spec, short)["out"], ra.evaluate(paged, blocks).out[:, :, [1, 4]])


def test_the_fast_kernel_reads_what_was_gathered_and_any_number_of_threads_gives_the_same_bits(rng, monkeypatch):
    spec = ra.SDPA(causal="bottom_right")
    inputs, _ = arrays(Problem(spec, Sizes(B=3, Hq=4, Hkv=2, Lq=5, Lk=96, D=16, Dv=8)), rng, np.float32)
    inputs["kv_lengths"] = np.array([96, 33, 0])
    paged, blocks = in_blocks(spec, inputs, rng, 16)
    problem = api.build(paged, blocks, None, WANT)
    plan = unread.plan(problem)
    assert plan.k is blocks["k"]
    assert fast.takes(unpacked(plan))
    monkeypatch.setattr(pool, "_SMALL", 0)
    row = api.build(spec, inputs, None, WANT)
    for threads in ("1", "2", "3"):
        monkeypatch.setenv(pool.VARIABLE, threads)
        found, expected = cpu.run(problem), cpu.run(row)
        for n in WANT:
            near(found[n], expected[n], 1e-6)
            if threads == "1":
                first = dict(found)
            same(found[n], first[n])


def test_no_block_at_all(rng):
    x = {"q": rng.standard_normal((2, 2, 3, 4)), "k": np.zeros((0, 1, 8, 4)), "v": np.zeros((0, 1, 8, 5))}
    x |= {"block_table": np.array([[7], [-1]]), "kv_lengths": np.array([0, 0])}
    for engine in ("reference", "cpu", "certified"):
        found = ra.evaluate(ra.SDPA(paged=True), x, want=WANT, engine=engine)
        assert not found.out.any()
        assert np.isneginf(found.lse).all()
        assert ra.vjp(ra.SDPA(paged=True), x, {"out": found.out}, engine=engine).dk.shape == (0, 1, 8, 4)


def test_entries_that_are_used_name_blocks(rng):
    x, _, _ = shared(rng)
    spec = ra.SDPA(paged=True)
    for wrong in (4, -1):
        bad = x["block_table"].copy()
        bad[2, 1] = wrong
        with pytest.raises(ShapeError, match=rf"block_table\[2, 1\] is {wrong}, but there are N = 4 blocks"):
            ra.evaluate(spec, x | {"block_table": bad})
        ra.evaluate(spec, x | {"block_table": bad, "kv_lengths": np.array([4, 2, 2])})
    with pytest.raises(ShapeError, match=r"kv_lengths must lie between 0 and M\*S = 4"):
        ra.evaluate(spec, x | {"kv_lengths": np.array([5, 0, 0])})
    with pytest.raises(ShapeError, match="missing array 'kv_lengths'"):
        ra.evaluate(spec, {n: a for n, a in x.items() if n != "kv_lengths"})
    with pytest.raises(ShapeError, match="unknown array 'block_table'"):
        ra.evaluate(ra.SDPA(), x)
    with pytest.raises(ShapeError, match=r"mask \(2, 5\) does not broadcast"):
        ra.evaluate(spec, x | {"mask": np.ones((2, 5), bool)})
    with pytest.raises(SpecError, match="Lq=2 differs from Lk=4"):
        ra.evaluate(ra.SDPA(paged=True, causal=True), x)
    with pytest.raises(SpecError, match="paged is True or False"):
        ra.SDPA(paged=1)


def test_explain_asks_for_the_sizes_of_blocks():
    sizes = {"B": 2, "Hq": 8, "Hkv": 2, "Lq": 1, "D": 64, "Dv": 64, "N": 9, "S": 16, "M": 8}
    told = ra.explain(ra.SDPA(paged=True), sizes)
    assert told["plan"]["pages"] == (2, 8)
    assert told["operations"] == 2 * 2 * 8 * 1 * 128 * 128
    assert told["signature"]["mask"] == "(B, Hq, Lq, M*S) bool optional broadcastable"
    with pytest.raises(ShapeError, match="sizes lacks M"):
        ra.explain(ra.SDPA(paged=True), {n: v for n, v in sizes.items() if n != "M"})
