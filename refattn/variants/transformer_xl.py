r"""Transformer-XL: segments of tokens that also see a memory of hidden states, by relative positions.

    s[h,i,j] = scale ((q[h,i] + u[h])·k[g,j] + (q[h,i] + w[h])·r[h,i−j]),     r[h,d] = PE(d) wr[h],    g = h // (Hq/Hkv)
    out[h,i] = Σ_j softmax_j(s[h,i]) v[g,j]          over the tokens j up to i of i's segment and of its memory
    q = x wq,   k = x̃ wk,   v = x̃ wv,   PE(d) = [sin(d f_0), sin(d f_1), ..., cos(d f_0), cos(d f_1), ...]

x (B,L,E) the hidden states of a layer; wq (Hq,E,D), wk (Hkv,E,D), wv (Hkv,E,Dv), wr (Hq,R,D) with PE of width R and
f_t = 10000^(−2t/R), u and w (Hq,D) all learned. A segment has `segment` tokens; its memory are the `memory` tokens
before its first, fewer at the beginning. x̃ is x with the memory detached: no gradient of a segment reaches a token
before it, though it reaches wk and wv by way of the memory. What is kept are hidden states, not keys: these are
projected anew in every segment. State: `hidden`, the memory and the tokens of the unfinished segment.

clamp: distances beyond it count as it. same_length: every query sees `memory` tokens and itself, so that the first of
a segment sees no more than its last, and where segments end shows in gradients alone. detach=False lets gradients
through the memory. A distance is read by the indices of query and key; no matrix is shifted.

Source: Dai et al., arXiv 1901.02860, section 3.2 (segments), 3.3 and its last equations (scores). The authors' code,
whose TensorFlow form has `same_length` as here, and `clamp_len`, 0 or less there for None.

Differs from: the authors' PyTorch code under same_length, where a query sees `memory` tokens with itself among them:
memory − 1 here; XLNet, whose scores these are beside those of a sentence segment, and which may look both ways; the
usual shift of a matrix of scores by rank, whose entries of keys after the query are those of other rows: where nothing
masks them, they are wrong; x-transformers and others, which keep keys and values, the same while weights do not
change; the odd R that the code cannot have: the last cosine is left out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from refattn.errors import SpecError
from refattn.numeric import concatenate, einsum, extend, real, reshape
from refattn.plan import Relative, Score
from refattn.spec import Array, Spec, dyadic
from refattn.variants import _xl, sdpa
from refattn.variants._segments import pieces
from refattn.variants.sdpa import SDPA


@dataclass(frozen=True, kw_only=True)
class TransformerXL(Spec):
    """Attention over a segment and a memory of hidden states.

    segment: tokens in one. memory: tokens before it that it sees. clamp: the largest distance told apart, or None.
    same_length: a query sees `memory` tokens before it, no more. detach: no gradient through the memory. scale: of
    both parts of a score; None is D^-1/2.
    """

    segment: int
    memory: int
    clamp: int | None = None
    same_length: bool = False
    detach: bool = True
    scale: float | None = None

    def __post_init__(self) -> None:
        _xl.count("segment", self.segment, 1)
        _xl.count("memory", self.memory, 0)
        if self.clamp is not None:
            _xl.count("clamp, where not None,", self.clamp, 0)
        for name in ("same_length", "detach"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"{name} is True or False; given: {getattr(self, name)!r}")
        if self.scale is not None:
            object.__setattr__(self, "scale", dyadic("scale", self.scale))


def signature(spec: TransformerXL) -> dict[str, Array]:
    """Hidden states and weights."""
    return _xl.signature()


def outputs(spec: TransformerXL) -> dict[str, Array]:
    """The mean of the values, and the natural logarithm of the softmax's denominator."""
    return {"out": Array("B Hq L Dv"), "lse": Array("B Hq L")}


def state(spec: TransformerXL, length: int) -> dict[str, Array]:
    """The hidden states of the memory and of the unfinished segment."""
    open_ = length % spec.segment
    return {"hidden": Array(f"B {min(length - open_, spec.memory) + open_} E")}


def resolve(spec: TransformerXL, sizes: Mapping[str, int]) -> TransformerXL:
    """The scale as a definite value; heads that do not divide are refused."""
    return replace(spec, scale=_xl.scale_of(spec.scale, sizes))


def validate(spec: TransformerXL, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def reference(spec: TransformerXL, x: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Piece by piece, none of which crosses a segment's end."""
    batch, tokens, _ = x["x"].shape
    window = (spec.memory, None) if spec.same_length else None
    attention = SDPA(causal="bottom_right", scale=spec.scale, window=window)
    hidden, outs, lses = state["hidden"], [], []
    for new, there in pieces(state["length"], tokens, spec.segment):
        hidden = extend(hidden, x["x"][:, new], 1)
        seen = _xl.detached(hidden, hidden.shape[1] - there) if spec.detach else hidden
        given = _xl.scores(x, seen, new.stop - new.start, spec.scale, spec.clamp)
        found = sdpa.reference(attention, given)
        outs.append(found["out"])
        lses.append(found["lse"])
        if there == spec.segment:
            hidden = hidden[:, max(hidden.shape[1] - spec.memory, 0) :]
    heads, dv, like = x["wq"].shape[0], x["wv"].shape[2], x["x"]
    return {
        "out": concatenate(outs or [real(np.zeros((batch, heads, 0, dv)), like)], 2),
        "lse": concatenate(lses or [real(np.zeros((batch, heads, 0)), like)], 2),
        "state": {"hidden": hidden},
    }


def lower(spec: TransformerXL, x: Mapping[str, Any], state: Mapping[str, Any]) -> Score:
    """No loop: one masked softmax, the keys of a row being those from its memory's beginning on."""
    hidden = concatenate([state["hidden"], x["x"]], 1)
    rows, keys = x["x"].shape[1], hidden.shape[1]
    place = np.arange(state["length"] + rows - keys, state["length"] + rows)
    q = einsum("ble,hed->bhld", x["x"], x["wq"])
    heads, width = x["u"].shape
    # Of the distances keys − 1 to 0, then of keys after the row, which no row meets.
    distances = np.arange(keys - 1, -1, -1)
    table = _xl.vectors_by_distance(x["wr"], distances if spec.clamp is None else np.minimum(distances, spec.clamp))
    table = concatenate([table, real(np.zeros((heads, max(rows - 1, 0), width)), table)], 1)
    begin = place[keys - rows :] // spec.segment * spec.segment - spec.memory
    return Score(
        q=q + reshape(x["u"], (heads, 1, width)),
        k=einsum("ble,hed->bhld", hidden, x["wk"]),
        v=einsum("ble,hed->bhld", hidden, x["wv"]),
        scale=spec.scale or 0.0,
        positions=(place[None, keys - rows :], place[None]),
        causal=True,
        window=(spec.memory if spec.same_length else None, None),
        relative=(
            Relative(
                rows=q + reshape(x["w"], (heads, 1, width)), values=table * real(spec.scale, table), offset=keys - 1
            ),
        ),
        mask=(place >= begin[:, None])[None, None],
    )


def no_gradient(spec: TransformerXL) -> str | None:
    """A key of a plan is one array, whoever reads it."""
    return "its memory is detached, and a plan's keys are not" if spec.detach else None


def operations(spec: TransformerXL, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations, forward, and bytes of the float64 scores."""
    return _xl.operations(sizes, min(spec.segment + spec.memory, sizes["L"]))
