"""Whatever is wrong with the arrays or options of any variant is refused in words, and nothing else is ever raised.

Problems are made from each variant's signature, so that a new module is under this test without an edit: valid ones
are answered, and each way to break one array gives an error that says what was given, by the array's name, and what
was expected, by the signature.
"""

import inspect

import ml_dtypes
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import refattn as ra
from refattn import problem as problem_module
from refattn import registry
from refattn.errors import DTypeError, RefattnError, ShapeError, SpecError
from refattn.spec import describe

# Specs that between them take every kind of array; other variants and terms by their defaults.
SPECS = {info.name: info.example for info in ra.variants().values()} | {
    "learned slopes": ra.ALiBi(slopes="learned", direction="two_sided"),
    "keep": ra.SDPA(keep_probability=0.75, window=(1, None), softcap=5.0),
    "half": ra.SDPA(bias=ra.ALiBi(direction="half")),
    "axial": ra.Axial(width=1),
    "causal_transformer": ra.CausalTransformer(final_layer=True),
    "axial_deeplab": ra.AxialDeepLab(span=1),
    "axial_deeplab with norms": ra.AxialDeepLab(span=1, axis="width", norm=True),
    "latents on both sides": ra.DBA(form="two_sided"),
    "mixtures of a head": ra.Linformer(sharing="kv", heads="per_head"),
    "drawn bins": ra.InfinityFormer(segment=2, basis=2, samples=3, contraction=0.5, sticky=True, bins=4, bias=True),
    "mask net": ra.InfinityFormer(segment=2, basis=4, parameters="moments", density="sparsemax", mask=True),
    "a temperature": ra.AttentionAlignment(bias=ra.ALiBi(slopes="learned"), divide="scores"),
    "part turned": ra.RoPE(pairing="interleaved", width=0, angles="float32"),
    "columns of exact sums": ra.Skeinformer(normalisation="none", reuse_pilot=False),
    "chosen queries, causal": ra.Informer(causal=True, lazy="cumsum", measure="lse_mean", divisor="samples", factor=1),
    "what is found, jointly": ra.Memorizing(segment=2, memory=3, top=2, combine="joint", normalise=True, bias=ra.T5()),
    "tokens by hidden states": ra.Unlimiformer(top=2, score="hidden"),
}
FLOATS = (np.float64, np.float32, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e5m2)
FOREIGN = {
    "complex": lambda a: a.astype(complex),
    "longdouble": lambda a: a.astype(np.longdouble),
    "object": lambda a: a.astype(object),
    "text": lambda a: a.astype(str),
    "time": lambda a: np.zeros(a.shape, "M8[s]"),
    "masked": lambda a: np.ma.masked_array(a.astype(float), np.zeros(a.shape, bool)),
}
OTHER_KINDS = {"real": (np.int64, np.bool_), "int": (np.float64, np.bool_), "bool": (np.float64, np.int64)}


def signature_of(spec):
    whole, module = registry.whole(spec)
    return module.signature(whole)


@pytest.mark.parametrize(
    "spec",
    [ra.Perceiver(), ra.Perceiver(inverted=True), ra.AxialDeepLab(span=2), ra.CausalTransformer(final_layer=True)],
)
def test_no_heads_at_all_are_no_heads_of_output(spec):
    module = registry.whole(spec)[1]
    sizes = dict.fromkeys(("B", "Lq", "Lk", "S", "E", "C", "D", "Dv"), 2) | {"Hq": 0, "Hkv": 1}
    x = {name: np.ones(a.shape(sizes)) for name, a in module.signature(spec).items() if not a.optional}
    out = ra.evaluate(spec, x)["out"]
    assert out.shape == module.outputs(spec)["out"].shape(sizes)
    assert not out.any()
    assert set(ra.vjp(spec, x, {"out": out})) == {f"d{name}" for name in x}


def limit(array, sizes):
    """What the domain of lengths or indices is counted by: a dimension's size, or a number."""
    dim = array.domain.partition(":")[2]
    return int(dim) if dim.isdigit() else sizes[dim]


@st.composite
def problems(draw, least=0):
    """A spec, and valid arrays: any sizes, some of the optional ones, broadcast ones in any shape they may have."""
    spec = SPECS[draw(st.sampled_from(sorted(SPECS)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    groups, length = draw(st.integers(1, 3)), draw(st.integers(least, 5))
    size = st.integers(least, 4)
    sizes = {"Hkv": groups, "Hq": groups * 2 * draw(st.integers(1, 2)), "Lq": length, "Lk": length}
    dtype = draw(st.sampled_from(FLOATS))
    arrays = {}
    for name, array in signature_of(spec).items():
        if array.optional and not draw(st.booleans()):
            continue
        for dim in array.names:
            sizes[dim] = sizes[dim] if dim in sizes else draw(size)
            if dim == "D" and spec.variant == "rope":
                # Channels turn in pairs.
                sizes[dim] += sizes[dim] % 2
        shape = list(array.shape(sizes))
        if array.broadcast:
            shape = [n if draw(st.booleans()) else 1 for n in shape][draw(st.integers(0, len(shape))) :]
        if array.kind == "real":
            values = np.asarray(rng.standard_normal(shape))
            # From 1 on, a type of few bits does not round to 0.
            arrays[name] = (1 + np.abs(values) if array.domain == "positive" else values).astype(dtype)
        elif array.kind == "bool":
            arrays[name] = np.asarray(rng.random(shape) < 0.5)
        else:
            high = limit(array, sizes) if ":" in array.domain else 5
            high -= array.domain.startswith("indices")
            assume(high >= 0 or 0 in shape)
            integer = draw(st.sampled_from([np.int64, np.int32, np.uint8]))
            arrays[name] = np.asarray(rng.integers(0, max(high, 0) + 1, shape), integer)
    for one, other in (("q_segment_ids", "k_segment_ids"), ("k_segment_ids", "q_segment_ids")):
        if one in arrays and other not in arrays:
            arrays[other] = arrays[one]
    return spec, arrays


def refusal(spec, arrays, *kinds):
    """The message of the error that evaluate and vjp both raise, of one of the kinds."""
    messages = set()
    for call in (lambda: ra.evaluate(spec, arrays), lambda: ra.vjp(spec, arrays, {"out": np.ones(1)})):
        with pytest.raises(RefattnError) as caught:
            call()
        assert isinstance(caught.value, kinds), caught.value
        messages.add(str(caught.value))
    (message,) = messages
    return message


def hypothetical(examples):
    return settings(max_examples=examples, derandomize=True, deadline=None)


@hypothetical(200)
@given(problems())
def test_what_is_valid_is_answered_whatever_the_sizes(problem):
    spec, arrays = problem
    whole, module = registry.whole(spec)
    sizes = problem_module.check(module.signature(whole), arrays)
    offered = module.outputs(module.resolve(whole, sizes))
    result = ra.evaluate(spec, arrays, want=tuple(offered))
    assert result.out.dtype == arrays[next(iter(module.signature(whole)))].dtype
    for name, array in result.items():
        assert array.shape == offered[name].shape(sizes), name
        assert (array.dtype == np.int64) == (offered[name].kind == "int"), name
    gradients = ra.vjp(spec, arrays, {"out": np.ones(result.out.shape)})
    for name, gradient in gradients.items():
        assert gradient.shape == arrays[name[1:]].shape


@hypothetical(100)
@given(problems(), st.data())
def test_a_missing_or_an_unknown_array(problem, data):
    spec, arrays = problem
    signature = signature_of(spec)
    gone = data.draw(st.sampled_from([name for name, a in signature.items() if not a.optional]))
    message = refusal(spec, {n: a for n, a in arrays.items() if n != gone}, ShapeError)
    assert message.startswith(f"missing array {gone!r}\ngiven: ")
    assert message.endswith(f"expected:\n{describe(signature)}")
    message = refusal(spec, arrays | {"queries": np.ones((2, 3))}, ShapeError)
    assert message.startswith("unknown array 'queries'\ngiven: ")
    assert "queries (2, 3)" in message
    assert describe(signature) in message


@hypothetical(150)
@given(problems(least=2), st.data())
def test_a_wrong_rank_or_a_wrong_size(problem, data):
    spec, arrays = problem
    signature = signature_of(spec)
    name = data.draw(st.sampled_from([n for n in arrays if not signature[n].broadcast]))
    wrong = data.draw(st.sampled_from(["rank less", "rank more", "size"]))
    a = arrays[name]
    if wrong == "size":
        shared = [n for n, d in enumerate(signature[name].dims.split()) if shares(d, name, arrays, signature)]
        assume(shared)
        axis = data.draw(st.sampled_from(shared))
        changed = np.concatenate([a, a[(slice(None),) * axis + (slice(0, 1),)]], axis)
    else:
        changed = a[0] if wrong == "rank less" else a[None]
    message = refusal(spec, arrays | {name: changed}, ShapeError, SpecError)
    if wrong != "size":
        assert message.startswith(f"{name} has {changed.ndim} dimensions, not {a.ndim}\ngiven: ")
        assert f"{name} {changed.shape}" in message
        assert describe(signature) in message
    else:
        assert "given" in message or "is ambiguous where" in message


def shares(dim, name, arrays, signature):
    """Whether the size is a number, or another array that cannot broadcast has the dimension as well."""
    others = (signature[n] for n in arrays if n != name)
    return dim.isdigit() or any(dim in other.names for other in others if not other.broadcast)


@hypothetical(150)
@given(problems(least=2), st.data())
def test_an_array_that_does_not_broadcast(problem, data):
    spec, arrays = problem
    signature = signature_of(spec)
    names = [n for n, a in signature.items() if a.broadcast]
    assume(names)
    name = data.draw(st.sampled_from(names))
    kind = {"real": float, "int": int, "bool": bool}[signature[name].kind]
    rank = len(signature[name].dims.split())
    shape = data.draw(st.sampled_from([(7,), (7,) * rank, (1,) * (rank + 1)]))
    pair = {"q_segment_ids": np.zeros(1, int), "k_segment_ids": np.zeros(1, int)} if "segment" in name else {}
    message = refusal(spec, arrays | pair | {name: np.zeros(shape, kind)}, ShapeError)
    assert message.startswith(f"{name} {shape} does not broadcast to its dimensions\ngiven: ")
    assert describe(signature) in message


@hypothetical(150)
@given(problems(), st.data())
def test_another_kind_of_number(problem, data):
    """An integer q, a float mask, a boolean bias, float lengths, ..."""
    spec, arrays = problem
    signature = signature_of(spec)
    name = data.draw(st.sampled_from(sorted(arrays)))
    other = data.draw(st.sampled_from(OTHER_KINDS[signature[name].kind]))
    changed = arrays[name].astype(other)
    message = refusal(spec, arrays | {name: changed}, DTypeError)
    assert message.startswith(f"{name} is {changed.dtype}, where ")
    assert describe(signature) in message


@hypothetical(100)
@given(problems(), st.data())
def test_a_dtype_that_no_signature_knows(problem, data):
    spec, arrays = problem
    name = data.draw(st.sampled_from(sorted(arrays)))
    foreign = data.draw(st.sampled_from(sorted(FOREIGN)))
    changed = FOREIGN[foreign](arrays[name].astype(float))
    message = refusal(spec, arrays | {name: changed}, DTypeError)
    assert message.startswith(name)
    assert "allowed are bool, int8" in message or "masked array" in message


@hypothetical(100)
@given(problems(least=1), st.data())
def test_lengths_and_positions_out_of_range(problem, data):
    spec, arrays = problem
    signature = signature_of(spec)
    names = [n for n, a in signature.items() if a.domain.startswith(("lengths", "positions", "indices"))]
    assume(names)
    name = data.draw(st.sampled_from(names))
    sizes = problem_module.check(signature, arrays)
    kind = signature[name].domain.partition(":")[0]
    changed = np.zeros(signature[name].shape(sizes), np.int64)
    beyond = (
        [-(2**53), 2**63 - 1]
        if kind == "positions"
        else [-1, limit(signature[name], sizes) + (kind == "lengths"), 2**40]
    )
    changed.flat[-1] = data.draw(st.sampled_from(beyond))
    message = refusal(spec, arrays | {name: changed}, ShapeError)
    assert message.startswith(f"{name} must lie between ")
    assert "given: " in message


plain = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=5)
small = st.integers(-3, 3)
objects = [np.ones((1, 2, 3, 4)), np.ones(3), {}, object(), ra.ALiBi(), ra.SDPA(), ra]
anything = plain | st.lists(small, max_size=3) | st.tuples(small, small) | st.sampled_from(objects)
OPTIONS = sorted(set(inspect.signature(ra.attention).parameters))


@hypothetical(600)
@given(st.dictionaries(st.sampled_from(OPTIONS), anything, min_size=1, max_size=3))
def test_attention_answers_or_refuses_whatever_it_is_given(options):
    x = np.ones((1, 2, 3, 4))
    try:
        out = ra.attention(**({"q": x, "k": x, "v": x} | options))
    except RefattnError as error:
        assert str(error)
    else:
        assert out.shape[-2:] == np.shape(options.get("v", x))[-2:] or "q" in options


@hypothetical(200)
@given(anything, anything, anything)
def test_evaluate_vjp_explain_and_spec_refuse_whatever_is_no_problem(one, two, three):
    x = dict.fromkeys("qkv", np.ones((1, 2, 3, 4)))
    calls = (
        lambda: ra.evaluate(one, x),
        lambda: ra.evaluate(ra.SDPA(), one, want=two),
        lambda: ra.evaluate(ra.SDPA(), x, want=one, engine=two, dtype=three),
        lambda: ra.vjp(ra.SDPA(), x, one),
        lambda: ra.vjp(ra.SDPA(), x, {"out": one}, wrt=two, outputs=three),
        lambda: ra.explain(one, two, three),
        lambda: ra.explain(ra.SDPA(), one, two),
        lambda: ra.spec(one),
        lambda: ra.spec("sdpa", causal=one, window=two, bias=three),
        lambda: ra.spec("alibi", slopes=one, slopes_right=two, direction=three),
    )
    for call in calls:
        try:
            call()
        except RefattnError as error:
            assert str(error)


@pytest.mark.parametrize(
    ("heads", "message"), [((4, 3), "Hq=4, Hkv=3"), ((1, 2), "Hq=1, Hkv=2"), ((2, 0), "Hq=2, Hkv=0")], ids=str
)
def test_heads_that_do_not_divide(heads, message):
    q, k = (np.ones((1, n, 3, 4)) for n in heads)
    with pytest.raises(ShapeError, match=f"Hq must be a multiple of Hkv; given: {message}"):
        ra.attention(q, k, k)


def test_no_query_head_is_answered():
    assert ra.attention(np.ones((1, 0, 3, 4)), np.ones((1, 2, 3, 4)), np.ones((1, 2, 3, 5))).shape == (1, 0, 3, 5)
