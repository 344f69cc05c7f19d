"""The ∞-former as a recurrence, in float64 and by other ways than its reference.

The fit is least squares over rows √λ I below ψ(t)ᵀ, not normal equations. A read is a product of Gaussians by natural
parameters, or a quadrature over the parabola's support. Every memory is an affine function of the one before it, so
that one transition serves all segments; sticky memories, whose transition is drawn, have one block of features for
each segment instead, into which every token is written as it will have become by then.
"""

from __future__ import annotations

from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn.plan import Recurrent

Floats = NDArray[np.float64]
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)


class Basis(NamedTuple):
    """Centres and widths (N,)."""

    centres: Floats
    widths: Floats

    def at(self, t: Any) -> Floats:
        """(..., N) values at t."""
        z = (np.asarray(t)[..., None] - self.centres) / self.widths
        return np.asarray(np.exp(-0.5 * z**2) / (np.sqrt(2 * np.pi) * self.widths))


def lower(spec: Any, x: Mapping[str, Any], state: Mapping[str, Any]) -> Recurrent:
    """No loop over tokens: the memories first, then the features by which each query reads its own."""
    grid = np.linspace(0, 1, spec.basis // len(spec.sigmas)) if spec.basis > len(spec.sigmas) else np.zeros(1)
    centres, widths = (a.ravel() for a in np.meshgrid(grid, np.array(spec.sigmas), indexing="ij"))
    basis = Basis(centres, widths)
    tokens, ahead = np.concatenate([state["x"], x["x"]], 1), state["x"].shape[1]
    before = (state["length"] - ahead) // spec.segment
    count = -(-tokens.shape[1] // spec.segment)
    written = features(spec, basis, contracted=spec.contraction is not None)
    own = written[:, -spec.segment :]
    past = written[:, : -spec.segment]

    memories, moves = [state["memory"] * (before > 0)], []
    signal, news = np.zeros(tokens.shape), np.zeros((*tokens.shape[:2], spec.basis))
    for n in range(1, count):
        part = slice((n - 1) * spec.segment, n * spec.segment)
        signal[:, part] = masked(x, tokens[:, part]) if spec.mask else tokens[:, part]
        plain = before + n == 1 or spec.contraction is None
        news[:, part] = (features(spec, basis, contracted=False) if plain else own).T
        drawn = x["drawn"][:, n * spec.segment - ahead] if spec.sticky else None
        moves.append(transition(spec, basis, past, drawn, len(tokens)) * (not plain))
        fresh = np.einsum("bin,bie->bne", news[:, part], signal[:, part])
        memories.append(moves[-1] @ memories[-1] + fresh)

    number = (ahead + np.arange(x["x"].shape[1])) // spec.segment
    read = means(spec, basis, *parameters(spec, basis, x, memories, number))
    values = np.einsum("bie,ged->bgid", signal, x["wv"])
    if spec.sticky:
        read, news, first = unrolled(spec, number, read, news, memory=memories[0], moves=moves)
        moved = None
    else:
        first, moved = memories[0], transition(spec, basis, past, None, 1)[0]
    k = np.broadcast_to(news[:, None], (len(tokens), values.shape[1], *news.shape[1:]))
    memory = np.einsum("bne,ged->bgnd", first, x["wv"])
    return Recurrent(q=read, k=k, v=values, memory=memory, transition=moved, segment=spec.segment)


def unrolled(
    spec: Any, number: Any, read: Floats, news: Floats, *, memory: Floats, moves: list[Floats]
) -> tuple[Floats, Floats, Floats]:
    """A block of N features for each segment; what a token or the first memory is there, all moves until then made."""
    batch, length, n = news.shape
    size = (len(moves) + 1) * n
    q = np.zeros((*read.shape[:3], size))
    k, first = np.zeros((batch, length, size)), np.zeros((batch, size, memory.shape[2]))
    first[:, :n] = memory
    for block in range(len(moves) + 1):
        at = slice(block * n, block * n + n)
        q[..., at] = read * (number == block)[:, None]
        if block:
            back, move = slice(at.start - n, at.start), moves[block - 1]
            first[:, at] = move @ first[:, back]
            k[:, :, at] = np.einsum("bnm,bim->bin", move, k[:, :, back])
            part = slice((block - 1) * spec.segment, block * spec.segment)
            k[:, part, at] = news[:, part]
    return q, k, first


def features(spec: Any, basis: Basis, contracted: bool) -> Floats:
    """(N, P): what each row of the signal adds to the coefficients, by least squares."""
    new = np.arange(1, spec.segment + 1)
    count, centred = spec.segment, spec.positions == "centre_padded"
    t = (new - 0.5) / count if centred else new / count
    if contracted:
        old = spec.contraction * np.arange(1, spec.samples + 1) / spec.samples
        t = np.concatenate([old, spec.contraction + (1 - spec.contraction) * new / count])
        count += spec.samples
    rows = [basis.at(t)]
    if centred:
        rows.append(basis.at(np.array(outside(count, Fraction(1, 2 * spec.segment + spec.samples), contracted), float)))
    rows.append(np.sqrt(spec.ridge) * np.eye(spec.basis))
    stacked = np.concatenate(rows)
    return np.asarray(np.linalg.lstsq(stacked, np.eye(len(stacked), len(t)), rcond=None)[0])


def outside(count: int, shift: Fraction, contracted: bool) -> list[Fraction]:
    """Points of the doubled grid beyond [0, 1]; a segment's own stand at the centres of cells of 1 / count."""
    if not contracted:
        cells = [Fraction(2 * i + 1, 2 * count) for i in range(count // 2)]
        return [-t for t in cells] + [1 + t for t in cells]
    low = shift - Fraction(1, 2)
    step = (Fraction(3, 2) - shift - low) / (2 * count - 1)
    return [t for t in (low + step * i for i in range(2 * count)) if not 0 <= t <= 1]


def transition(spec: Any, basis: Basis, past: Floats, drawn: Any, batch: int) -> Floats:
    """(B, N, N): coefficients to coefficients of the contracted signal; 0 where nothing is contracted."""
    if spec.contraction is None:
        return np.zeros((batch, spec.basis, spec.basis))
    at = np.arange(1, spec.samples + 1) / spec.samples if drawn is None else np.sort(drawn, -1) / spec.bins
    return np.broadcast_to(past @ basis.at(at), (batch, spec.basis, spec.basis))


def masked(x: Mapping[str, Any], tokens: Floats) -> Floats:
    """Tokens weighed by the mask net, a token at a time."""
    out = np.zeros(tokens.shape)
    for i in range(tokens.shape[1]):
        near = range(max(i - 1, 0), min(i + 2, tokens.shape[1]))
        level = x["mask_b"] + sum(tokens[:, j] @ x["mask_w"][:, :, j - i + 1].T for j in near)
        out[:, i] = tokens[:, i] * 0.5 * (1 + np.tanh(level / 2))
    return out


def parameters(
    spec: Any, basis: Basis, x: Mapping[str, Any], memories: list[Floats], number: Any
) -> tuple[Floats, Floats]:
    """μ and σ² (B,Hq,L), token i of memory number[i] (B,N,E): the query goes into its width instead of it into D."""
    batch, heads, count, width = x["q"].shape
    groups = x["wk"].shape[0]
    grouped = x["q"].reshape(batch, groups, heads // groups, count, width)
    wide = np.einsum("bgrid,ged->bgrie", grouped, x["wk"]).reshape(batch, heads, count, x["wk"].shape[1])
    a = np.zeros((batch, heads, count, spec.basis))
    for n, memory in enumerate(memories):
        a[:, :, number == n] = spec.scale * wide[:, :, number == n] @ memory.transpose(0, 2, 1)[:, None]
    if spec.parameters == "moments":
        p = np.exp(a - np.logaddexp.reduce(a, -1, keepdims=True))
        mu = p @ basis.centres
        variance = (p * ((basis.centres - mu[..., None]) ** 2 + basis.widths**2)).sum(-1)
    else:
        level, spread = a @ x["w_mu"], a @ x["w_sigma"]
        if spec.bias:
            level, spread = level + x["b_mu"], spread + x["b_sigma"]
        mu, variance = 0.5 * (1 + np.tanh(level / 2)), np.logaddexp(0, spread)
    return mu, np.maximum(variance, spec.least_variance)


def means(spec: Any, basis: Basis, mu: Floats, variance: Floats) -> Floats:
    """(B,Hq,L,N): each basis function's mean under each density."""
    mu, variance, centre, square = mu[..., None], variance[..., None], basis.centres, basis.widths**2
    if spec.density == "softmax":
        # exp(−α t² + β t + γ) is the product of both; its integral is √(π/α) exp(β²/4α + γ).
        alpha = 1 / (2 * variance) + 1 / (2 * square)
        beta = mu / variance + centre / square
        gamma = -(mu**2) / (2 * variance) - centre**2 / (2 * square)
        size = np.sqrt(np.pi / alpha) / (2 * np.pi * np.sqrt(variance * square))
        return np.asarray(size * np.exp(beta**2 / (4 * alpha) + gamma))
    a = np.cbrt(1.5 * variance)
    found = np.zeros((*mu.shape[:-1], spec.basis))
    panels = 16
    for n in range(panels):
        s = (2 * n + 1 + _NODES) / panels - 1
        p = a**3 / (2 * variance) * (1 - s**2) / panels
        found += np.einsum("...s,...sn->...n", p * _WEIGHTS, basis.at(mu + a * s))
    return found
