"""Laws of every variant that carries a state: any way of feeding a sequence is the same computation."""

from itertools import pairwise

import numpy as np
import pytest
from checks import near, same

import refattn as ra
from refattn import registry
from refattn.errors import RefattnError, ShapeError, SpecError, StorageError
from refattn.files import safetensors_bytes
from refattn.golden import suite
from refattn.state import FORMAT

STREAMING = {name: info for name, info in ra.variants().items() if hasattr(info.module, "state")}
# One Spec of each set of options that a golden case has.
SPECS = {
    case.name: (case.spec, dict(case.sizes) | {"L": 13, "B": 2})
    for case in suite.cases()
    if case.spec.variant in STREAMING and case.rows is None
}
EVERY = pytest.mark.parametrize("name", SPECS)
ONE_EACH = pytest.mark.parametrize(
    "name", [next(n for n in SPECS if SPECS[n][0].variant == variant) for variant in STREAMING]
)
CUTS = {"token by token": range(14), "primes": (0, 2, 5, 12, 13), "halves": (0, 0, 7, 13), "at once": (0, 13)}


def problem(name, batch=2):
    """Spec, the state before any token, and 13 tokens."""
    spec, sizes = SPECS[name]
    module, sizes, rng = registry.info(spec.variant).module, sizes | {"B": batch}, np.random.default_rng(5)
    made = {n: tokens(rng, a, sizes) for n, a in module.signature(spec).items() if not a.optional}
    needed = {d for a in module.state(spec, 0).values() for d in a.names}
    return spec, ra.init_state(spec, **{d: sizes[d] for d in needed}), made


def tokens(rng, array, sizes):
    shape = array.shape(sizes)
    if array.kind == "real":
        return rng.standard_normal(shape)
    if array.domain.startswith("indices:"):
        limit = array.domain.partition(":")[2]
        return rng.integers(0, int(limit) if limit.isdigit() else sizes[limit], shape)
    return rng.integers(0, 2, shape).astype(bool if array.kind == "bool" else np.int64)


def part(spec, inputs, begin, end):
    """The inputs of tokens begin to end − 1."""
    signature = registry.info(spec.variant).module.signature(spec)
    return {n: along(a, signature[n].dims.split(), begin, end) for n, a in inputs.items()}


def along(array, dims, begin, end):
    return array[tuple(slice(begin, end) if d == "L" else slice(None) for d in dims)]


def fed(spec, state, inputs, cuts):
    """Outputs of every token, and the states after each step."""
    offered = registry.info(spec.variant).module.outputs(spec)
    names, outs, states = [n for n, a in offered.items() if "L" in a.names], [], [state]
    for begin, end in pairwise(cuts):
        found, state = ra.step(spec, state, part(spec, inputs, begin, end), want=tuple(names))
        outs.append(found)
        states.append(state)
    axes = {n: offered[n].dims.split().index("L") for n in names}
    return {n: np.concatenate([found[n] for found in outs], axes[n]) for n in names}, states


@EVERY
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_any_way_of_feeding_gives_the_same_answer(name, cuts):
    spec, state, inputs = problem(name)
    found, states = fed(spec, state, inputs, cuts)
    names = tuple(found)
    whole = ra.evaluate(spec, inputs, want=(*names, "state"))
    for output in names:
        near(found[output], whole[output])
    assert states[-1].length == whole.state.length == 13
    assert list(states[-1]) == list(whole.state)
    for array in whole.state:
        near(states[-1][array], whole.state[array])


@EVERY
def test_a_saved_state_is_the_same_bit_for_bit(name, tmp_path):
    spec, state, inputs = problem(name)
    state = fed(spec, state, inputs, (0, 7))[1][-1]
    state.save(tmp_path / "state.safetensors")
    loaded = ra.load_state(tmp_path / "state.safetensors")
    assert (loaded.spec, loaded.length) == (state.spec, 7)
    for array in state:
        same(loaded[array], np.asarray(state[array]))
    expected = ra.step(spec, state, part(spec, inputs, 7, 13))
    found = ra.step(spec, loaded, part(spec, inputs, 7, 13))
    same(found[0].out, expected[0].out)
    for array in expected[1]:
        same(np.asarray(found[1][array]), np.asarray(expected[1][array]))


@EVERY
def test_the_sequences_of_a_batch_do_not_hear_of_each_other(name):
    spec, state, inputs = problem(name)
    signature = registry.info(spec.variant).module.signature(spec)
    both, states = fed(spec, state, inputs, (0, 6, 13))
    for b in range(2):
        alone = {n: a[b : b + 1] if "B" in signature[n].names else a for n, a in inputs.items()}
        found, others = fed(spec, problem(name, batch=1)[1], alone, (0, 6, 13))
        for output in found:
            near(found[output], both[output][b : b + 1])
        for array, value in others[-1].items():
            near(value, states[-1][array][b : b + 1])


@EVERY
def test_an_old_state_stays_as_it_was(name):
    spec, state, inputs = problem(name)
    _, states = fed(spec, state, inputs, range(14))
    again, branch = fed(spec, states[5], part(spec, inputs, 5, 13), (0, 1, 8))
    for array in states[13]:
        near(branch[-1][array], states[13][array])
    other = {
        n: -a if a.dtype.kind == "f" and "L" in registry.info(spec.variant).module.signature(spec)[n].names else a
        for n, a in part(spec, inputs, 5, 13).items()
    }
    before = {array: np.array(value) for array, value in states[9].items()}
    fed(spec, states[5], other, (0, 8))
    for array, value in before.items():
        same(np.array(states[9][array]), value)


@ONE_EACH
def test_a_step_copies_no_cache(name):
    """Of what a state holds over from the one before, only doubling a buffer may move anything."""
    spec, state, inputs = problem(name)
    _, states = fed(spec, state, inputs, range(14))
    for array in state:
        grown = [(a[array], b[array]) for a, b in pairwise(states) if 0 < a[array].size < b[array].size]
        moved = sum(not np.shares_memory(a, b) for a, b in grown)
        assert moved <= 1, f"{array} was copied {moved} times in {len(grown)} steps"


@ONE_EACH
def test_an_array_of_a_state_cannot_be_written(name):
    spec, state, inputs = problem(name)
    for later in fed(spec, state, inputs, (0, 6))[1]:
        for array in later.values():
            if array.size:
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 0


@ONE_EACH
def test_a_state_in_float32_keeps_its_dtype(name):
    spec, state, inputs = problem(name)
    narrow = ra.init_state(
        spec,
        dtype="float32",
        **{
            d: n
            for a, array in state.items()
            for d, n in zip(registry.info(spec.variant).module.state(spec, 0)[a].dims.split(), array.shape, strict=True)
            if not d.isdigit()
        },
    )
    found, after = ra.step(spec, narrow, inputs)
    assert {array.dtype for array in after.values()} == {np.dtype(np.float32)}
    near(found.out, ra.evaluate(spec, inputs).out, 1e-6)


@ONE_EACH
def test_a_foreign_state_is_refused_with_what_is_wanted(name):
    spec, state, inputs = problem(name)
    other = ra.State(registry.spec("sdpa"), 0, dict(state))
    with pytest.raises(SpecError, match="this state is of SDPA"):
        ra.step(spec, other, inputs)
    with pytest.raises(SpecError, match="state is that of init_state"):
        ra.step(spec, {"k": np.zeros(3)}, inputs)
    array = next(iter(state))
    for arrays in (
        dict(state) | {array: np.zeros((1, 2, 3))},
        {n: a for n, a in state.items() if n != array},
        dict(state) | {"unheard": np.zeros(3)},
    ):
        with pytest.raises(ShapeError, match=f"expected:\n(.*\n)*  state_{array} "):
            ra.step(spec, ra.State(spec, 0, arrays), inputs)


@ONE_EACH
def test_sizes_of_a_first_state_are_checked(name):
    spec, state, inputs = problem(name)
    for sizes in ({}, {"B": -1}, {"B": 2, "unheard": 3}):
        with pytest.raises(ShapeError, match="init_state takes the sizes"):
            ra.init_state(spec, **sizes)


@ONE_EACH
def test_states_and_what_holds_one_show_shapes_in_a_line(name):
    spec, _, inputs = problem(name)
    found = ra.evaluate(spec, inputs, want=("out", "state"))
    assert f"State({spec.variant}, length 13, " in repr(found.state)
    assert repr(found) == f"Outputs(out: {found.out.shape} float64, state: {found.state!r})"


def test_what_carries_no_state_says_so():
    with pytest.raises(SpecError, match="sdpa carries no state"):
        ra.init_state(ra.SDPA(), B=1)
    with pytest.raises(SpecError, match="sdpa carries no state"):
        ra.step(ra.SDPA(), ra.State(ra.SDPA(), 0, {}), {})
    with pytest.raises(SpecError, match="sdpa offers out, lse"):
        ra.evaluate(ra.SDPA(), {n: np.ones((1, 1, 1, 1)) for n in "qkv"}, want=("state",))


def test_states_of_every_dtype_are_kept_bit_for_bit(tmp_path):
    spec, inputs = ra.InfiniAttention(segment=4), {n: np.ones((1, 1, 5, 2)) for n in "qkv"} | {"gate": np.zeros(1)}
    for dtype in ("float64", "float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2"):
        state = ra.step(spec, ra.init_state(spec, B=1, Hkv=1, D=2, Dv=2, dtype=dtype), inputs)[1]
        state.save(tmp_path / dtype)
        loaded = ra.load_state(tmp_path / dtype)
        for array in state:
            assert loaded[array].dtype.name == dtype
            same(loaded[array].astype(float), np.asarray(state[array]).astype(float))


def test_a_file_whose_spec_lacks_an_option_is_refused(tmp_path):
    about = {"format": FORMAT, "spec": '{"variant": "infini_attention"}', "length": "0"}
    (tmp_path / "damaged").write_bytes(safetensors_bytes({"k": np.zeros(1)}, about))
    with pytest.raises(StorageError, match="no default for segment"):
        ra.load_state(tmp_path / "damaged")


def test_a_length_is_a_count_of_tokens():
    for length in (-1, 1.0, None):
        with pytest.raises(SpecError, match="length is a number of tokens from 0 on"):
            ra.State(ra.InfiniAttention(segment=4), length, {})


def test_only_a_step_goes_on_from_a_state():
    """The arrays of a state after whole segments have the shapes of a first one."""
    spec, inputs = ra.InfiniAttention(segment=4), {n: np.ones((1, 1, 4, 2)) for n in "qkv"} | {"gate": np.zeros(1)}
    state = ra.evaluate(spec, inputs, want=("state",)).state
    given = inputs | {f"state_{name}": array for name, array in state.items()}
    with pytest.raises(ShapeError, match=r"unknown array 'state_memory'.*refattn\.step goes on"):
        ra.evaluate(spec, given)
    with pytest.raises(ShapeError, match=r"unknown array 'state_memory'.*refattn\.step goes on"):
        ra.vjp(spec, given, {"out": np.ones((1, 1, 4, 2))})


@pytest.mark.parametrize("damage", [b"", b"garbage", None])
def test_a_damaged_file_is_refused(damage, tmp_path):
    path = tmp_path / "state.safetensors"
    if damage is not None:
        path.write_bytes(damage)
    with pytest.raises(StorageError, match="holds no state that can be read"):
        ra.load_state(path)
    assert issubclass(StorageError, RefattnError)
