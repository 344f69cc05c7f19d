r"""Compressive Transformer: what leaves the memory of a segment is compressed, c tokens to a slot, before it is lost.

    ([C; M; X] the row that a segment X sees: slots, memory, itself;  i, j indices in it)
    s[h,i,j] = scale ((q[h,i] + u[h])·k[g,j] + (q[h,i] + w[h])·r[h,i−j]),     r[h,d] = PE(d) wr[h],    g = h // (Hq/Hkv)
    out[h,i] = Σ_{j ≤ i} softmax_j(s[h,i]) v[g,j]

    where X ends:     M' = the last `memory` of [M; X],     old = what of [M; X] is no longer in M'
                      C' = the last `compressed` of [C; f(old)],     f(old) of size |old| / rate

x (B,L,E), wq, wk, wv, wr (Hq,R,D), u, w, PE as in Transformer-XL, which this is without slots (compressed=0). A slot's
position is its index in the row: all distances are 1 from one slot to the next, though each stands for `rate` tokens.
A layer so looks back memory + rate · compressed tokens before a segment, and l layers l times as far. Memories change
after the segment has been attended to. State: `hidden`, the memory and the unfinished segment; `slots`.

`compression` is f. "mean", "max": of every `rate` tokens. "conv": slot a is Σ_τ old[rate a + τ] kernel[τ], kernel
(rate,E,E) from old to new channels, and kernel_bias (E,) where given. "dilated": taps `dilation` apart, centred:
old[rate a + dilation τ − ⌊(rate − 1)(dilation − 1)/2⌋], 0 outside old. "most_used": the |old| / rate of the tokens that
have had the largest mean weight, over the heads and over the queries from their own on, in the order in which they
came; the state has their `usage`, the weights' sum over heads and queries. No gradient goes through it.

detach: no gradient of a segment reaches memory or slots, hence none of `out` the kernel, which has a loss of its own:
`reconstruction` (B,L) has, at the last token of a segment that compresses something, and 0 elsewhere, the mean over
heads, the segment's queries and Dv of

    (A(old) − A(f(old)))²,     A(m)[h,i] = Σ_j softmax_j(scale q[h,i]·(m_j wk[g])) (m_j wv[g])

that is attention by contents alone. Its gradient reaches kernel and kernel_bias alone. detach=False lets those of out
and lse go back through slots and memory (BPTT).

Source: Rae et al., arXiv 1911.05507, section 3 with its two algorithms, as recalled: functions, losses, range. The
paper's memories begin with zeros, here with nothing; it says of dilated convolutions no more than their name, and of
usage no more than that memories are sorted by their average attention; the loss has no scale there, and a norm.

Differs from: compressive-transformer-pytorch, which has learned vectors for distances and neither u nor w, weighs in
its loss the whole memory against what is compressed of its oldest (the same where memory = segment), pads what leaves
by zeros on its left where `rate` does not divide it (refused here), forgets a piece shorter than a segment, and stops
for good the gradient of its keys' and values' weights; transformer-sequential (recalled), which compresses tokens that
stay in the memory too and hides a query's own token; a position of a slot that counts the tokens it stands for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.errors import SpecError
from refattn.numeric import (
    amax,
    broadcast,
    concatenate,
    einsum,
    extend,
    real,
    reshape,
    stop,
    stored,
    take,
    top_k,
    total,
    transpose,
)
from refattn.plan import Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import _compressive_plan, _xl, sdpa
from refattn.variants._segments import pieces
from refattn.variants.sdpa import SDPA

_FUNCTIONS = ("conv", "dilated", "mean", "max", "most_used")


@dataclass(frozen=True, kw_only=True)
class Compressive(Spec):
    """Attention over a segment, a memory of hidden states and slots into which older ones are compressed.

    segment: tokens in one. memory: tokens before it that it sees. compressed: slots before these. rate: tokens to a
    slot, which divides segment and memory. compression: "conv", "dilated" (taps `dilation` apart), "mean", "max" or
    "most_used". detach: no gradient through memory and slots. scale: None is D^-1/2.
    """

    segment: int
    memory: int
    compressed: int
    rate: int
    compression: Literal["conv", "dilated", "mean", "max", "most_used"] = "conv"
    dilation: int = 2
    detach: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        for name, least in (("segment", 1), ("memory", 0), ("compressed", 0), ("rate", 1), ("dilation", 1)):
            _xl.count(name, getattr(self, name), least)
        if self.segment % self.rate or self.memory % self.rate:
            given = f"rate={self.rate}, segment={self.segment}, memory={self.memory}"
            raise SpecError(f"rate divides segment and memory, so that slots come out even; given: {given}")
        if not isinstance(self.compression, str) or self.compression not in _FUNCTIONS:
            raise SpecError(f"compression is one of {', '.join(map(repr, _FUNCTIONS))}; given: {self.compression!r}")
        if type(self.detach) is not bool:
            raise SpecError(f"detach is True or False; given: {self.detach!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: Compressive) -> dict[str, Array]:
    """Hidden states, weights, and those of a convolution."""
    if spec.compression not in ("conv", "dilated"):
        return _xl.signature()
    kernel = Array(f"{spec.rate} E E", role="learned")
    return _xl.signature() | {"kernel": kernel, "kernel_bias": Array("E", role="learned", optional=True)}


def outputs(spec: Compressive) -> dict[str, Array]:
    """The mean of the values, the logarithm of the softmax's denominator, and the loss where a segment ends."""
    return {"out": Array("B Hq L Dv"), "lse": Array("B Hq L"), "reconstruction": Array("B L")}


def state(spec: Compressive, length: int) -> dict[str, Array]:
    """Memory and unfinished segment, slots, and how much each token has been used."""
    open_ = length % spec.segment
    left = max(length - open_ - spec.memory, 0)
    carried = {
        "hidden": Array(f"B {length - left} E"),
        "slots": Array(f"B {min(left // spec.rate, spec.compressed)} E"),
    }
    return carried | ({"usage": Array(f"B {length - left}")} if spec.compression == "most_used" else {})


def resolve(spec: Compressive, sizes: Mapping[str, int]) -> Compressive:
    """The scale as a definite value; heads that do not divide are refused."""
    return replace(spec, scale=_xl.scale_of(spec.scale, sizes))


def validate(spec: Compressive, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def reference(spec: Compressive, x: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Piece by piece, none of which crosses a segment's end."""
    batch, tokens, _ = x["x"].shape
    like, attention = x["x"], SDPA(causal="bottom_right", scale=spec.scale)
    hidden, slots, usage = state["hidden"], state["slots"], state.get("usage")
    heads, dv = x["wq"].shape[0], x["wv"].shape[2]
    outs, lses = [real(np.zeros((batch, heads, 0, dv)), like)], [real(np.zeros((batch, heads, 0)), like)]
    losses = [real(np.zeros((batch, 0)), like)]
    for new, there in pieces(state["length"], tokens, spec.segment):
        rows, hidden = new.stop - new.start, extend(hidden, x["x"][:, new], 1)
        seen = concatenate([slots, hidden], 1)
        seen = _xl.detached(seen, seen.shape[1] - there) if spec.detach else seen
        given = _xl.scores(x, seen, rows, spec.scale)
        found = sdpa.reference(attention, given)
        outs.append(found["out"])
        lses.append(found["lse"])
        if usage is not None:
            usage = extend(usage, real(np.zeros((batch, rows)), like), 1)
            usage = usage + _weights(attention, given)[:, slots.shape[1] :]
        loss = real(np.zeros((batch, 1)), like)
        if there == spec.segment:
            left = max(hidden.shape[1] - spec.memory, 0)
            old, hidden = hidden[:, :left], hidden[:, left:]
            if left and spec.compressed:
                chosen = None if usage is None else _most_used(spec, usage, left)
                slots = extend(slots, _compress(spec, x, old, chosen), 1)
                slots = slots[:, max(slots.shape[1] - spec.compressed, 0) :]
                loss = _reconstruction(spec, x, seen[:, seen.shape[1] - there :], old, chosen)
            usage = None if usage is None else usage[:, left:]
        losses += [real(np.zeros((batch, rows - 1)), like), loss]
    carried = {"hidden": hidden, "slots": slots} | ({} if usage is None else {"usage": usage})
    results = {"out": concatenate(outs, 2), "lse": concatenate(lses, 2), "reconstruction": concatenate(losses, 1)}
    return results | {"state": carried}


def _weights(attention: SDPA, given: Mapping[str, Any]) -> Any:
    """The weights of each key, summed over heads and queries (B,n): the means of one-hot values."""
    batch, groups, keys, _ = given["k"].shape
    inputs = {name: stop(array) for name, array in given.items()}
    inputs["v"] = broadcast(real(np.eye(keys), inputs["q"]), (batch, groups, keys, keys))
    return total(sdpa.reference(attention, inputs)["out"], (1, 2))


def _most_used(spec: Compressive, usage: Any, left: int) -> Any:
    """Which of the first `left` tokens had the largest mean weight (B,n): each had one from every query since."""
    queries = usage.shape[1] - np.arange(left)
    return np.sort(top_k(usage[:, :left] / real(queries, usage), left // spec.rate), -1)


def _compress(spec: Compressive, x: Mapping[str, Any], old: Any, chosen: Any) -> Any:
    """Slots (B, n / rate, E) of the hidden states `old` (B,n,E)."""
    batch, count, width = old.shape
    rate, slots = spec.rate, count // spec.rate
    if spec.compression == "most_used":
        return concatenate([take(old[b : b + 1], chosen[b], 1) for b in range(batch)] or [old[:, :slots]], 0)
    apart = reshape(old, (batch, slots, rate, width))
    if spec.compression == "max":
        return amax(transpose(apart, (0, 1, 3, 2)), np.ones(1, bool))
    # A kernel may keep what it computes of the slots, and backwards their gradients, in its storage type.
    if spec.compression == "mean":
        return stored(stored(total(apart, 2) / rate), cotangent=True)
    step = spec.dilation if spec.compression == "dilated" else 1
    ahead = (rate - 1) * (step - 1) // 2
    around = [real(np.zeros((batch, n, width)), old) for n in (ahead, (rate - 1) * (step - 1) - ahead)]
    padded = concatenate([around[0], old, around[1]], 1)
    last = (slots - 1) * rate + 1
    taps = concatenate([padded[:, step * n : step * n + last : rate] for n in range(rate)], 2)
    made = einsum("bac,cf->baf", taps, reshape(x["kernel"], (rate * width, width)))
    made = made + x["kernel_bias"] if "kernel_bias" in x else made
    return stored(stored(made), cotangent=True)


def _reconstruction(spec: Compressive, x: Mapping[str, Any], segment: Any, old: Any, chosen: Any) -> Any:
    """Mean square (B,1) of what attention to the old memory and to its slots differ by; gradients to f alone."""
    wq, wk, wv = (stop(x[name]) for name in ("wq", "wk", "wv"))
    q, old = _xl.project(stop(segment), wq), stop(old)

    def attended(rows: Any) -> Any:
        given = {"q": q, "k": _xl.project(rows, wk), "v": _xl.project(rows, wv)}
        return sdpa.reference(SDPA(scale=spec.scale), given)["out"]

    gap = attended(old) - attended(_compress(spec, x, old, chosen))
    mean = total(gap * gap, (1, 2, 3)) / max(int(np.prod(gap.shape[1:])), 1)
    return reshape(mean, (gap.shape[0], 1))


def lower(spec: Compressive, x: Mapping[str, Any], state: Mapping[str, Any]) -> Score:
    """All slots and all tokens as keys, positions as a dense bias."""
    return _compressive_plan.lower(spec, x, state)


def no_gradient(spec: Compressive) -> str:
    """As for Transformer-XL, and slots are worked out before there is a plan."""
    return "what its plan holds of memories and slots are numbers alone"


def operations(spec: Compressive, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations but for compression and loss, forward, and bytes of the float64 scores."""
    return _xl.operations(sizes, min(spec.segment + spec.memory, sizes["L"]) + spec.compressed)
