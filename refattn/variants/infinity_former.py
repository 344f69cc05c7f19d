r"""∞-former: attention by a density over a memory that is a continuous signal, of one size whatever it has seen.

    x̄(t) = Bᵀ ψ(t),  t in [0, 1],     ψ_j(t) = N(t; μ_j, σ_j²),  j = 1..N
    a = scale (B W_K[g]) q[h,i],      μ = σ(w_mu·a),      σ² = max(softplus(w_sigma·a), least_variance)
    out[h,i] = Σ_j r_j (B W_V[g])_j,  r_j = ∫ p(t) ψ_j(t) dt,     g = h // (Hq / Hkv)

p is N(t; μ, σ²), or with density="sparsemax" the parabola [a² − (t − μ)²]₊ / 2σ² with a³ = 3σ²/2; either over the whole
line, so that what lies outside [0, 1] is lost. Where a segment of `segment` tokens X has ended and another begins, the
memory B (N,E), which all queries of the segment have read, is fitted anew by ridge regression:

    the first time    B  = argmin Σ_l ‖x_l − Bᵀψ(t_l)‖² + ridge ‖B‖²
    ever after        B' = the same of M samples B̄ᵀψ(m/M) at contraction·m/M, m = 1..M, and of X behind them, x_l at
                           contraction + (1 − contraction) l/L,  l = 1..L

with t_l = (l − ½)/L in the first fit, and in both with zeros at those points of a grid over [−½, 1½], of twice as many,
that lie outside [0, 1] (positions="centre_padded"). No gradient goes through B̄. What is n segments old fills (1 − τ) τⁿ
of [0, 1], τ the contraction. A first segment finds no memory: out, kl and histogram are 0. `out` is added to the
short-term attention by the caller, before W_O.

x (B,L,E) the layer's input on its way to long-term memory; q (B,Hq,L,D); wk (Hkv,E,D); wv (Hkv,E,Dv); w_mu, w_sigma
(N,), one for all heads. kl (B,Hq,L) is the divergence (σ²/s² − ln(σ²/s²) − 1 + (μ − m)²/s²) / 2 of N(μ, σ²) from a
prior, its last term where `prior_mean` is given. State: the memory, and the tokens of the segment, of a full one until
the next begins.

Sticky memories: samples are read at the left ends of M drawn bins of [0, 1], sorted, and placed where the others are.
`histogram` (B,L,bins) is the mass that N(μ, σ²) of all queries of the segment so far put into each bin, normalised; its
row of a segment's last token is what the authors draw from, and `drawn` (B,L,M) is read at the first token of the next.

Source: Martins, Marinho, Martins, arXiv 2109.00301, sections 3 and 4, and its authors' code, deep-spin/infinite-former,
that was read: centred points and padding, samples at m/M, clamping, left ends, the divergence, parameters="moments"
(μ and σ² of the mixture of the basis by softmax(a)) and the mask net (x times σ of a convolution of width 3 over the
segment) are from there. The paper's section numbers are recalled.

Differs from: the paper, which sets t_l = l/L, has no zeros (positions="i_over_L") and draws inside a bin; the GPT-2
code, which adds the prior's mean only where it is not positive (so prior_mean=None where it is); the authors' code
throughout, which fails where an odd segment is contracted. None of it runs as published: there is no live peer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from refattn.dtypes import sqrt_reciprocal
from refattn.errors import ShapeError, SpecError
from refattn.numeric import (
    clean,
    concatenate,
    einsum,
    extend,
    finite,
    maximum,
    real,
    reshape,
    row_max,
    sigmoid,
    softplus,
    stop,
    stored,
    take,
    total,
    where,
)
from refattn.plan import Recurrent
from refattn.spec import Array, Spec, dyadic
from refattn.variants import _densities as densities
from refattn.variants import _ridge as ridge
from refattn.variants._segments import pieces

_CHOICES = {
    "positions": ("centre_padded", "i_over_L"),
    "density": ("softmax", "sparsemax"),
    "parameters": ("affine", "moments"),
}
_COUNTS = ("segment", "basis", "samples", "bins")
_SIZES = ("ridge", "least_variance", "prior_deviation")


@dataclass(frozen=True, kw_only=True)
class InfinityFormer(Spec):
    """Continuous attention over an unbounded memory.

    segment: tokens between two fits. basis: N, a multiple of the number of `sigmas`, the widths. ridge: the penalty.
    contraction: τ between 0 and 1; None keeps the last segment alone. samples: M. positions: "centre_padded" or
    "i_over_L". density: "softmax" or "sparsemax". parameters: "affine" or "moments"; bias: whether the affine ones add
    b_mu and b_sigma. sticky: samples from `bins` bins. prior_deviation, prior_mean: of the divergence. mask: whether a
    mask net weighs x. scale: None is D^-1/2.
    """

    segment: int
    basis: int = 512
    sigmas: tuple[float, ...] = (0.01, 0.05)
    ridge: float = 1.0
    contraction: float | None = None
    samples: int = 512
    positions: Literal["centre_padded", "i_over_L"] = "centre_padded"
    density: Literal["softmax", "sparsemax"] = "softmax"
    parameters: Literal["affine", "moments"] = "affine"
    bias: bool = False
    least_variance: float = 1e-6
    sticky: bool = False
    bins: int = 128
    prior_deviation: float = 0.05
    prior_mean: float | None = None
    mask: bool = False
    scale: float | None = None

    def __post_init__(self) -> None:
        for name, known in _CHOICES.items():
            given = getattr(self, name)
            if not isinstance(given, str) or given not in known:
                raise SpecError(f"{name} is one of {', '.join(map(repr, known))}; given: {given!r}")
        for name in _COUNTS:
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise SpecError(f"{name} is an integer from 1 on; given: {getattr(self, name)!r}")
        for name in ("bias", "sticky", "mask"):
            if type(getattr(self, name)) is not bool:
                raise SpecError(f"{name} is True or False; given: {getattr(self, name)!r}")
        if not isinstance(self.sigmas, tuple) or not self.sigmas or self.basis % len(self.sigmas):
            raise SpecError(f"sigmas is a tuple whose length divides basis={self.basis}; given: {self.sigmas!r}")
        object.__setattr__(self, "sigmas", tuple(dyadic("sigmas", sigma) for sigma in self.sigmas))
        for name in (*_SIZES, "contraction", "prior_mean", "scale"):
            if name in _SIZES or getattr(self, name) is not None:
                object.__setattr__(self, name, dyadic(name, getattr(self, name)))
        if min(self.sigmas) <= 0 or min(getattr(self, name) for name in _SIZES) <= 0:
            raise SpecError(f"sigmas, {', '.join(_SIZES)} are positive; given: {self}")
        if self.contraction is not None and not 0 < self.contraction < 1:
            raise SpecError(f"contraction lies between 0 and 1, or is None; given: {self.contraction}")
        if self.bias and self.parameters == "moments":
            raise SpecError("bias=True adds to affine parameters, and parameters is 'moments'")


def signature(spec: InfinityFormer) -> dict[str, Array]:
    """Tokens, queries, projections, the parameters' weights, and what the mask net and sticky memories take."""
    found = {"x": Array("B L E"), "q": Array("B Hq L D")}
    found |= {"wk": Array("Hkv E D", role="learned"), "wv": Array("Hkv E Dv", role="learned")}
    if spec.parameters == "affine":
        found |= dict.fromkeys(("w_mu", "w_sigma"), Array(f"{spec.basis}", role="learned"))
    if spec.bias:
        found |= dict.fromkeys(("b_mu", "b_sigma"), Array("1", role="learned"))
    if spec.mask:
        found |= {"mask_w": Array("E E 3", role="learned"), "mask_b": Array("E", role="learned")}
    if spec.sticky:
        found["drawn"] = Array(f"B L {spec.samples}", "int", "choice", f"indices:{spec.bins}")
    return found


def outputs(spec: InfinityFormer) -> dict[str, Array]:
    """What the memory gives, the divergence of each density, and where the segment has looked so far."""
    found = {"out": Array("B Hq L Dv"), "kl": Array("B Hq L")}
    return found | ({"histogram": Array(f"B L {spec.bins}")} if spec.sticky else {})


def state(spec: InfinityFormer, length: int) -> dict[str, Array]:
    """The memory, the tokens of the segment, and the mass that its queries have put into each bin."""
    held = length - spec.segment * (max(length - 1, 0) // spec.segment)
    found = {"memory": Array(f"B {spec.basis} E"), "x": Array(f"B {held} E")}
    return found | ({"histogram": Array(f"B {spec.bins}")} if spec.sticky else {})


def resolve(spec: InfinityFormer, sizes: Mapping[str, int]) -> InfinityFormer:
    """The scale as a definite value; heads that do not divide are refused."""
    if not sizes["Hkv"] or sizes["Hq"] % sizes["Hkv"]:
        raise ShapeError(f"Hq must be a multiple of Hkv; given: Hq={sizes['Hq']}, Hkv={sizes['Hkv']}")
    default = sqrt_reciprocal(sizes["D"]) if sizes["D"] else 1.0
    return replace(spec, scale=default if spec.scale is None else spec.scale)


def validate(spec: InfinityFormer, x: Mapping[str, Any]) -> None:
    """Any numbers will do: what is not finite propagates."""


def reference(spec: InfinityFormer, x: Mapping[str, Any], state: Mapping[str, Any]) -> dict[str, Any]:
    """Piece by piece, none of which crosses a segment's end; a segment's first token finds the memory fitted anew."""
    memory, held, seen = state["memory"], state["x"], state.get("histogram")
    found = [_nothing(spec, x, 0)]
    for new, _ in pieces(state["length"], x["q"].shape[2], spec.segment):
        begin = state["length"] + new.start
        if begin and begin % spec.segment == 0:
            first = begin == spec.segment or spec.contraction is None
            drawn = np.sort(np.asarray(x["drawn"], np.int64)[:, new.start], -1) if spec.sticky else None
            memory = _fitted(spec, x, held, None if first else stop(memory), drawn)
            held, seen = held[:, spec.segment :], real(np.zeros((held.shape[0], spec.bins)), memory)
        held = extend(held, x["x"][:, new], 1)
        if begin < spec.segment:
            found.append(_nothing(spec, x, new.stop - new.start))
            continue
        mu, variance = _parameters(spec, x, x["q"][:, :, new], memory)
        part = {"kl": densities.divergence(mu, variance, spec.prior_deviation, spec.prior_mean)}
        part["out"] = _read(spec, x, memory, mu, variance)
        if spec.sticky:
            part["histogram"], seen = _looked(spec, mu, variance, seen)
        found.append(part)
    carried = {"memory": memory, "x": held} | ({"histogram": seen} if spec.sticky else {})
    axes = {"out": 2, "kl": 2, "histogram": 1}
    return {n: concatenate([part[n] for part in found], axes[n]) for n in outputs(spec)} | {"state": carried}


def _nothing(spec: InfinityFormer, x: Mapping[str, Any], count: int) -> dict[str, Any]:
    """What so many tokens get that find no memory."""
    sizes = {"B": x["q"].shape[0], "Hq": x["q"].shape[1], "L": count, "Dv": x["wv"].shape[2]}
    return {name: real(np.zeros(array.shape(sizes)), x["q"]) for name, array in outputs(spec).items()}


def _fitted(spec: InfinityFormer, x: Mapping[str, Any], tokens: Any, past: Any, drawn: Any) -> Any:
    """The memory (B,N,E) of a whole segment of tokens, behind samples of the past one where there is one."""
    signal = _masked(x, tokens) if spec.mask else tokens
    if past is not None:
        if drawn is None:
            samples = einsum("mn,bne->bme", ridge.samples(spec, past), past)
        else:
            samples = einsum("bmn,bne->bme", take(ridge.bin_starts(spec, past), drawn, 0), past)
        signal = concatenate([samples, signal], 1)
    return einsum("pn,bpe->bne", ridge.fit(spec, past is not None, signal), signal)


def _masked(x: Mapping[str, Any], tokens: Any) -> Any:
    """Tokens times the sigmoid of a convolution over each and its two neighbours in the segment, 0 beyond the ends."""
    batch, count, width = tokens.shape
    nothing = real(np.zeros((batch, 1, width)), tokens)
    near = concatenate([nothing, tokens, nothing], 1)
    sums = (einsum("bie,oe->bio", near[:, n : n + count], x["mask_w"][:, :, n]) for n in range(3))
    return tokens * sigmoid(sum(sums, reshape(x["mask_b"], (1, 1, width))))


def _parameters(spec: InfinityFormer, x: Mapping[str, Any], q: Any, memory: Any) -> tuple[Any, Any]:
    """The mean μ and variance σ² (B,Hq,L) of each query's density."""
    batch, heads, count, width = q.shape
    groups = x["wk"].shape[0]
    grouped = reshape(q, (batch, groups, heads // groups, count, width))
    keys = einsum("bne,ged->bgnd", memory, x["wk"])
    a = real(spec.scale, q) * einsum("bgrid,bgnd->bgrin", grouped, keys)
    a = reshape(a, (batch, heads, count, spec.basis))
    if spec.parameters == "affine":
        level, spread = (einsum("bhin,n->bhi", a, x[name]) for name in ("w_mu", "w_sigma"))
        if spec.bias:
            level, spread = level + x["b_mu"], spread + x["b_sigma"]
        mu, variance = sigmoid(level), softplus(spread)
    else:
        p = densities.softmax(a, row_max(a, np.ones(a.shape, bool)))
        centres, widths = ridge.centres(spec, memory), ridge.widths(spec, memory)
        mu = einsum("bhin,n->bhi", p, centres)
        variance = einsum("bhin,n->bhi", p, centres * centres + widths * widths) - mu * mu
    return mu, maximum(variance, real(spec.least_variance, variance))


def _read(spec: InfinityFormer, x: Mapping[str, Any], memory: Any, mu: Any, variance: Any) -> Any:
    """Values averaged by the densities."""
    batch, heads, count = mu.shape
    values = stored(stored(einsum("bne,ged->bgnd", memory, x["wv"])), cotangent=True)
    mean = densities.softmax_mean if spec.density == "softmax" else densities.sparsemax_mean
    basis = ridge.centres(spec, memory), ridge.widths(spec, memory)
    r = stored(mean(mu[..., None], variance[..., None], *basis))
    grouped = reshape(r, (batch, values.shape[1], heads // values.shape[1], count, spec.basis))
    return stored(reshape(einsum("bgrin,bgnd->bgrid", grouped, values), (batch, heads, count, values.shape[3])))


def _looked(spec: InfinityFormer, mu: Any, variance: Any, seen: Any) -> tuple[Any, Any]:
    """The histogram up to each token, and the mass in each bin after the last."""
    each = total(densities.histogram(mu[..., None], variance[..., None], ridge.edges(spec, mu)), 1)
    until = real(np.tri(mu.shape[2], dtype=np.int64), mu)
    mass = einsum("ij,bjn->bin", until, clean(each)) + seen[:, None]
    spoiled = np.logical_or.accumulate(~finite(each), 1)
    if spoiled.any():
        # 0 NaN is NaN: no token may hear of one that comes after it.
        mass = mass * where(spoiled, real(np.nan, mass), real(1, mass))
    return mass / total(mass, -1, keepdims=True), mass[:, -1]


def operations(spec: InfinityFormer, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Floating-point operations of fitting, projecting and reading, forward; bytes of all float64 scores and means."""
    fits, rows = sizes["L"] // spec.segment, sizes["B"] * sizes["Hq"] * sizes["L"]
    past = 0 if spec.contraction is None else 2 * spec.samples
    fitting = sizes["B"] * sizes["E"] * spec.basis * (spec.segment + past)
    projecting = sizes["B"] * sizes["Hkv"] * spec.basis * sizes["E"] * (sizes["D"] + sizes["Dv"])
    reading = rows * spec.basis * (sizes["D"] + sizes["Dv"])
    return 2 * (fits * (fitting + projecting) + reading), 16 * rows * spec.basis


def lower(spec: InfinityFormer, x: Mapping[str, Any], state: Mapping[str, Any]) -> Recurrent:
    """One recurrence: the memory's coefficients, projected already, read by features r, written by those of a fit."""
    from refattn.variants._infinity_former_plan import lower as lowered

    return lowered(spec, x, state)
