"""The Compressive Transformer against numbers worked by hand, plain loops, Transformer-XL, and its range."""

import math

import numpy as np
import plain_loops as loops
import pytest
from checks import near

import refattn as ra
from refattn.errors import ShapeError, SpecError

SIZES = {"B": 2, "L": 19, "E": 3, "R": 4, "Hq": 4, "Hkv": 2, "D": 3, "Dv": 2}
FUNCTIONS = ("conv", "dilated", "mean", "max", "most_used")
EVERY = pytest.mark.parametrize("compression", FUNCTIONS)
ALL = ("out", "lse", "reconstruction")


def spec_of(compression, **options):
    return ra.Compressive(
        **({"segment": 4, "memory": 6, "compressed": 3, "rate": 2, "compression": compression} | options)
    )


def arrays(spec, rng, **changed):
    signature = ra.variants()["compressive"].module.signature(spec)
    return {n: rng.standard_normal(a.shape(SIZES | changed)) for n, a in signature.items()}


def alike(*values, **more):
    """One head of width 1 whose queries and positions are 0, so that all it sees weighs the same."""
    one, zero = np.ones((1, 1, 1)), np.zeros((1, 1))
    hidden = np.array(values, float).reshape(1, -1, 1)
    x = {"x": hidden, "wq": 0 * one, "wk": one, "wv": one, "wr": np.zeros((1, 2, 1)), "u": zero, "w": zero}
    return x | {name: np.reshape(a, shape).astype(float) for name, (a, shape) in more.items()}


# Numbers worked by hand

KERNEL = {"kernel": ((10, 1), (2, 1, 1)), "kernel_bias": ((0.5,), (1,))}
BY_HAND = {"mean": (2, 6), "max": (3, 7), "conv": (13.5, 57.5), "dilated": (13.5, 57.5), "most_used": (1, 5)}


@EVERY
def test_slots_of_two_tokens_and_the_means_over_what_a_segment_sees(compression):
    """Segments {1, 3}, {5, 7}, {9, 11}, {13}; 1, 3 leave after the second, 5, 7 after the third; one slot is kept.

    Of equal weights 1/n over n keys, token 1 has had 1, 1/2, 1/3, 1/4, token 3 then 1/2, 1/3, 1/4: the mean of the
    first is larger, and so it is for 5 and 7. Taps one apart are those of the plain convolution.
    """
    spec = ra.Compressive(segment=2, memory=2, compressed=1, rate=2, compression=compression, dilation=1)
    more = KERNEL if compression in ("conv", "dilated") else {}
    found = ra.evaluate(spec, alike(1, 3, 5, 7, 9, 11, 13, **more), want=(*ALL, "state"))
    one, two = BY_HAND[compression]
    expected = [1, 4 / 2, 9 / 3, 16 / 4, (one + 21) / 4, (one + 32) / 5, (two + 33) / 4]
    near(found.out.ravel(), expected)
    near(found.lse.ravel(), np.log([1, 2, 3, 4, 4, 5, 4]))
    near(found.reconstruction.ravel(), [0, 0, 0, (2 - one) ** 2, 0, (6 - two) ** 2, 0])
    near(found.state["slots"].ravel(), [two])
    near(found.state["hidden"].ravel(), [9, 11, 13])


def test_usage_is_the_sum_of_a_token_s_weights():
    """After two segments of 2 and a memory of 4, tokens have had 1 + 1/2 + 1/3 + 1/4, then without 1, ..."""
    spec = ra.Compressive(segment=2, memory=4, compressed=1, rate=2, compression="most_used")
    found = ra.evaluate(spec, alike(1, 3, 5, 7), want=("state",)).state
    near(found["usage"].ravel(), [25 / 12, 13 / 12, 7 / 12, 3 / 12])


def test_what_was_used_most_on_average_is_kept_in_its_order():
    """Keys 0, 9, 0, 9 and a query of 1 (u): tokens 1 and 3 hold nearly all weight, and token 0 its own row's.

    Weights sum to 1, 1 + 1 + ½, 0 and ½, their means over 4, 3, 2 and 1 queries are ¼, 0.83, 0 and ½, to 1e-3. Of
    keys 0, 9, 7, −9 they are ¼, 0.92, 0.12 and 0.
    """
    spec = ra.Compressive(segment=4, memory=0, compressed=2, rate=2, compression="most_used")
    x = alike(0, 9, 0, 9) | {"u": np.ones((1, 1))}
    near(ra.evaluate(spec, x, want=("state",)).state["slots"].ravel(), [9, 9])
    x = alike(0, 9, 7, -9) | {"u": np.ones((1, 1))}
    near(ra.evaluate(spec, x, want=("state",)).state["slots"].ravel(), [0, 9])


def test_dilated_taps_are_centred_and_0_outside_what_leaves():
    """Of tokens 1 to 6, taps 3 apart: slot 0 reads −2, 1, 4 and slot 1 reads 1, 4, 7, counted from 0."""
    spec = ra.Compressive(segment=6, memory=0, compressed=9, rate=3, compression="dilated", dilation=3)
    x = alike(*range(1, 13), kernel=((1, 10, 100), (3, 1, 1)))
    slots = ra.evaluate(spec, x, want=("state",)).state["slots"].ravel()
    near(slots, [20 + 500, 2 + 50, 80 + 1100, 8 + 110])


def test_a_kernel_takes_old_channels_to_new_ones():
    """Tokens (1, 2), (3, 4); kernel[0] = [[1, 10], [0, 0]], kernel[1] = [[0, 0], [0, 100]]."""
    spec = ra.Compressive(segment=2, memory=0, compressed=1, rate=2)
    kernel = np.zeros((2, 2, 2))
    kernel[0, 0] = 1, 10
    kernel[1, 1, 1] = 100
    x = arrays(spec, np.random.default_rng(0), B=1, L=2, E=2) | {"x": np.array([[[1.0, 2], [3, 4]]]), "kernel": kernel}
    found = ra.evaluate(spec, x | {"kernel_bias": np.array([0.5, 0])}, want=("state",)).state
    near(found["slots"].ravel(), [1.5, 10 + 400])


# Plain loops


def pe(distance, width):
    angles = [distance / 10000 ** (2 * t / width) for t in range(width // 2)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


def times(row, matrix):
    return [loops.dot(row, column) for column in zip(*matrix, strict=True)]


def added(*rows):
    return [math.fsum(parts) for parts in zip(*rows, strict=True)]


def softmax(s):
    top = max(s)
    lse = top + math.log(math.fsum(math.exp(a - top) for a in s))
    return [math.exp(a - lse) for a in s], lse


def compressed(spec, x, old, usage):
    """Slots of the rows `old`, where usage[j] is the mean weight of row j."""
    c, step = spec.rate, {"conv": 1, "dilated": spec.dilation}.get(spec.compression)
    groups = [old[n : n + c] for n in range(0, len(old), c)]
    if spec.compression == "mean":
        return [[math.fsum(column) / c for column in zip(*group, strict=True)] for group in groups]
    if spec.compression == "max":
        return [[max(column) for column in zip(*group, strict=True)] for group in groups]
    if spec.compression == "most_used":
        best = sorted(range(len(old)), key=lambda j: -usage[j])[: len(groups)]
        return [old[j] for j in sorted(best)]
    kernel, made = x["kernel"].tolist(), []
    for a in range(len(groups)):
        reads = [a * c + step * n - (c - 1) * (step - 1) // 2 for n in range(c)]
        parts = [times(old[j], kernel[n]) for n, j in enumerate(reads) if 0 <= j < len(old)]
        made.append(added(x["kernel_bias"].tolist(), *parts))
    return made


def simulated(spec, x, b):
    """out[h][i], lse[h][i], loss[i], and the memories after it, of sequence b: one token after another."""
    tokens, scale = x["x"][b].tolist(), spec.scale or SIZES["D"] ** -0.5
    wq, wk, wv, wr, u, w = (x[n].tolist() for n in ("wq", "wk", "wv", "wr", "u", "w"))
    heads, groups = len(wq), len(wk)
    slots, memory, segment, used = [], [], [], []
    out, lse, loss = [[] for _ in wq], [[] for _ in wq], []
    for token in tokens:
        segment.append(token)
        used.append([])
        row = slots + memory + segment
        weights = []
        for h in range(heads):
            g, q = h // (heads // groups), times(token, wq[h])
            s = []
            for j, key in enumerate(row):
                r = times(pe(len(row) - 1 - j, SIZES["R"]), wr[h])
                s.append(scale * (loops.dot(added(q, u[h]), times(key, wk[g])) + loops.dot(added(q, w[h]), r)))
            p, total = softmax(s)
            lse[h].append(total)
            values = [times(key, wv[g]) for key in row]
            out[h].append([loops.dot(p, column) for column in zip(*values, strict=True)])
            weights.append(p)
        for j, history in enumerate(used):
            history.append(math.fsum(p[len(slots) + j] for p in weights) / heads)
        loss.append(0.0)
        if len(segment) == spec.segment:
            everything = memory + segment
            left = max(len(everything) - spec.memory, 0)
            old, memory = everything[:left], everything[left:]
            if left and spec.compressed:
                fresh = compressed(spec, x, old, [math.fsum(a) / len(a) for a in used])
                loss[-1] = difference(segment, old, fresh, scale, (wq, wk, wv))
                slots = (slots + fresh)[-spec.compressed :]
            segment, used = [], used[left:]
    return {"out": out, "lse": lse, "reconstruction": loss, "slots": slots, "hidden": memory + segment}


def difference(segment, old, fresh, scale, weights):
    wq, wk, wv = weights
    squares = []
    for h in range(len(wq)):
        g = h // (len(wq) // len(wk))
        for token in segment:
            q, means = times(token, wq[h]), []
            for keys in (old, fresh):
                p, _ = softmax([scale * loops.dot(q, times(key, wk[g])) for key in keys])
                means.append([loops.dot(p, c) for c in zip(*[times(key, wv[g]) for key in keys], strict=True)])
            squares += [(a - b) ** 2 for a, b in zip(*means, strict=True)]
    return math.fsum(squares) / len(squares)


@pytest.mark.parametrize(
    "spec",
    [
        *(spec_of(compression) for compression in FUNCTIONS),
        spec_of("dilated", segment=6, memory=3, rate=3, dilation=4, compressed=5, scale=0.75),
        spec_of("conv", memory=0, compressed=1, detach=False),
        spec_of("most_used", memory=2, compressed=2),
        spec_of("mean", memory=12),
        spec_of("max", segment=3, memory=3, rate=1, compressed=7),
    ],
    ids=lambda s: f"{s.compression}-{s.segment}-{s.memory}-{s.compressed}-{s.rate}",
)
def test_against_plain_loops(spec, rng):
    x = arrays(spec, rng)
    found = ra.evaluate(spec, x, want=(*ALL, "state"))
    expected = [simulated(spec, x, b) for b in range(2)]
    for name in ALL:
        near(found[name], [e[name] for e in expected], 1e-11)
    for name in ("slots", "hidden"):
        near(found.state[name], np.array([e[name] for e in expected]).reshape(2, -1, 3), 1e-11)


# Transformer-XL, and what bounds the look back


@EVERY
def test_without_slots_it_is_transformer_xl(compression, rng):
    spec, other = spec_of(compression, compressed=0, detach=False), ra.TransformerXL(segment=4, memory=6, detach=False)
    x = arrays(spec, rng)
    plain = {n: a for n, a in x.items() if "kernel" not in n}
    found, expected = (ra.evaluate(s, a, want=("out", "lse", "state")) for s, a in ((spec, x), (other, plain)))
    near(found.out, expected.out, 0)
    near(found.lse, expected.lse, 0)
    near(found.state["hidden"], expected.state["hidden"], 0)
    assert not ra.evaluate(spec, x, want=("reconstruction",)).reconstruction.any()
    dout = rng.standard_normal(found.out.shape)
    gradients, theirs = ra.vjp(spec, x, {"out": dout}), ra.vjp(other, plain, {"out": dout})
    for name, value in theirs.items():
        near(gradients[name], value)


def test_slots_of_one_token_each_are_a_longer_memory(rng):
    """rate = 1 and a kernel of the identity: distances and contents are those of Transformer-XL with both memories."""
    spec = spec_of("conv", memory=3, rate=1, compressed=5)
    x = arrays(spec, rng) | {"kernel": np.eye(3)[None], "kernel_bias": np.zeros(3)}
    expected = ra.evaluate(
        ra.TransformerXL(segment=4, memory=8), {n: a for n, a in x.items() if "kernel" not in n}, want=("out", "lse")
    )
    found = ra.evaluate(spec, x, want=ALL)
    near(found.out, expected.out)
    near(found.lse, expected.lse)
    near(found.reconstruction, np.zeros((2, 19)))


@pytest.mark.parametrize("compression", ["conv", "mean"])
@pytest.mark.parametrize("layers", [1, 2])
def test_a_segment_looks_back_the_memory_and_rate_times_the_slots_in_each_layer(compression, layers, rng):
    """The paper's l (n_m + c n_cm): with 4 + 2 · 3 = 10, a segment that begins at 24 looks back to 24 − 10 l."""
    spec = spec_of(compression, segment=2, memory=4, detach=False)
    weights = [{n: a / 4 for n, a in arrays(spec, rng, E=4, D=2).items() if n != "x"} for _ in range(layers)]
    changed = rng.standard_normal((26, 4))

    def last(x):
        for w in weights:
            out = ra.evaluate(spec, w | {"x": x}).out
            x = out.transpose(0, 2, 1, 3)[:, :, :2].reshape(*x.shape)
        return x[:, 24]

    x = rng.standard_normal((1, 26, 4))
    before, moved = last(x), []
    for t in range(26):
        other = x.copy()
        other[0, t] = changed[t]
        moved.append(bool((last(other) != before).any()))
    assert moved == [24 - 10 * layers <= t <= 24 for t in range(26)]


# Gradients: what is detached


@pytest.mark.parametrize("compression", ["conv", "dilated"])
def test_the_loss_alone_reaches_the_kernel_and_nothing_else(compression, rng):
    spec = spec_of(compression)
    x = arrays(spec, rng)
    of_out = ra.vjp(spec, x, {"out": rng.standard_normal((2, 4, 19, 2)), "lse": rng.standard_normal((2, 4, 19))})
    of_loss = ra.vjp(spec, x, {"reconstruction": rng.standard_normal((2, 19))})
    for name in of_out:
        is_compression = name in ("dkernel", "dkernel_bias")
        assert bool(of_out[name].any()) != is_compression, name
        assert bool(of_loss[name].any()) == is_compression, name


def test_attached_the_output_reaches_the_kernel_and_the_tokens_of_a_slot(rng):
    """Of the segment from 16 on: the memory are 10 to 15, and 3 slots stand for 4 to 9."""
    x, dout = arrays(spec_of("conv"), rng), np.zeros((2, 4, 19, 2))
    dout[:, :, 16:] = 1
    stopped = ra.vjp(spec_of("conv"), x, {"out": dout})
    through = ra.vjp(spec_of("conv", detach=False), x, {"out": dout})
    assert np.any(stopped.dx, -1).all(0).tolist() == [t >= 16 for t in range(19)]
    assert np.any(through.dx, -1).all(0).tolist() == [t >= 4 for t in range(19)]
    assert not stopped.dkernel.any()
    assert through.dkernel.any()


def test_a_maximum_s_gradient_goes_to_the_first_of_equals():
    """Tokens 2, 2 leave as one slot of 2, which the two tokens of the next segment weigh a half and a third."""
    spec = ra.Compressive(segment=2, memory=0, compressed=1, rate=2, compression="max", detach=False)
    dout = np.array([0.0, 0, 1, 1]).reshape(1, 1, 4, 1)
    near(ra.vjp(spec, alike(2, 2, 5, 6), {"out": dout}).dx.ravel(), [5 / 6, 0, 5 / 6, 1 / 3])


@EVERY
def test_a_nan_goes_where_its_slots_go(compression, rng):
    """Token 5 is NaN: seen from 5 to 15 (memory from 6 on), then, unless it was not used, by way of a slot."""
    spec = spec_of(compression)
    x = arrays(spec, rng)
    expected = ra.evaluate(spec, x)
    x["x"][1, 5] = np.nan
    found = ra.evaluate(spec, x)
    near(found.out[0], expected.out[0], 0)
    near(found.out[1, :, :5], expected.out[1, :, :5], 0)
    assert np.isnan(found.out[1, :, 5:12]).all()


# What is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"segment": 0}, "segment is an integer from 1 on; given: 0"),
        ({"compressed": -1}, "compressed is an integer from 0 on; given: -1"),
        ({"rate": 0}, "rate is an integer from 1 on; given: 0"),
        ({"rate": 4}, "rate divides segment and memory.*given: rate=4, segment=4, memory=6"),
        ({"segment": 5}, "rate divides segment and memory.*given: rate=2, segment=5, memory=6"),
        ({"dilation": 0}, "dilation is an integer from 1 on; given: 0"),
        ({"compression": "median"}, "compression is one of 'conv', 'dilated', .*; given: 'median'"),
        ({"compression": None}, "compression is one of .*; given: None"),
        ({"detach": 1}, "detach is True or False; given: 1"),
        ({"scale": math.inf}, "scale is a finite number"),
    ],
    ids=str,
)
def test_options_out_of_range(options, message):
    with pytest.raises(SpecError, match=message):
        spec_of(**({"compression": "conv"} | options))


def test_a_kernel_of_another_rate_or_where_none_is_asked_is_refused(rng):
    x = arrays(spec_of("conv"), rng)
    with pytest.raises(ShapeError, match="kernel has size 2 where 3 is expected"):
        ra.evaluate(spec_of("conv", segment=3, rate=3), x)
    with pytest.raises(ShapeError, match="unknown array 'kernel'"):
        ra.evaluate(spec_of("mean"), x)


def test_the_bias_of_a_kernel_is_optional(rng):
    x = arrays(spec_of("conv"), rng)
    without = {n: a for n, a in x.items() if n != "kernel_bias"}
    near(ra.evaluate(spec_of("conv"), without).out, ra.evaluate(spec_of("conv"), x | {"kernel_bias": np.zeros(3)}).out)
