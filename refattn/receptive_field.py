r"""How far back an attention layer looks: the sensitivity of its last output to every token, exactly.

    s_m = ‖∂ out_L / ∂ emb_m‖,     c_n = Σ_{m > L − n} s_m / Σ_m s_m,     field = the least n with c_n ≥ 0.99

emb (L, E) the embeddings of the tokens; q = emb W_q, k = emb W_k, v = emb W_v with W_q (Hq,E,D), W_k (Hkv,E,D),
W_v (Hkv,E,Dv); out_L the outputs of all heads at the last token, so that the Jacobian of token m is (Hq·Dv, E). Each of
its rows is one run of the tape backwards over the variant's own text: no step size, no sampling. c_n is the share of
the n most recent tokens, the last itself included.

Source: the cumulative normalised gradient of Chi, Fan, Rudnicky, Ramadge, arXiv 2212.10356 (as recalled), there of a
whole trained model with respect to its embeddings; here of one attention layer with given projections. The norm of a
Jacobian is Frobenius', or the spectral one where asked: the two agree where it has rank one.

For ALiBi with slope m and contents that do not differ s falls like e^(−m n), and the field of an endless context is
⌈ln 100 / m⌉: 10 tokens for m = 1/2.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import api
from refattn.errors import ShapeError, SpecError, Unsupported
from refattn.numeric import einsum, reshape
from refattn.spec import Spec
from refattn.tape import Tape

Floats = NDArray[np.float64]
_NAMES = ("q", "k", "v")


class ReceptiveField(NamedTuple):
    """`sensitivity` (L,) s_m, in the order of the tokens; `cumulated` (L,) c_1, c_2, ...; `tokens`: the field."""

    sensitivity: Floats
    cumulated: Floats
    tokens: int


def receptive_field(
    spec: Spec,
    embeddings: Any,
    projections: Mapping[str, Any],
    *,
    inputs: Mapping[str, Any] | None = None,
    threshold: float = 0.99,
    norm: Literal["frobenius", "spectral"] = "frobenius",
) -> ReceptiveField:
    """Receptive field of one attention layer at its last token, in float64.

    Parameters
    ----------
    spec : Spec
        Masked attention (`sdpa`) or one of its terms, such as `refattn.ALiBi()`.
    embeddings : (L, E)
        One sequence.
    projections : mapping of "q" (Hq,E,D), "k" (Hkv,E,D), "v" (Hkv,E,Dv)
        One matrix a head.
    inputs : mapping of arrays
        What the spec takes beside q, k and v: sinks, slopes, masks.
    threshold : number in (0, 1]
        Share of the sensitivity that the field holds.
    norm : "frobenius" or "spectral"
        Norm of each token's Jacobian.

    Returns
    -------
    ReceptiveField
        Sensitivities, their cumulated shares from the last token back, and the count of tokens.

    Raises
    ------
    ShapeError, SpecError, Unsupported
        What was given and what was expected; or the output depends on no token, or not in finite numbers.
    """
    if norm not in ("frobenius", "spectral"):
        raise SpecError(f"norm is 'frobenius' or 'spectral'; given: {norm!r}")
    if not (isinstance(threshold, float | int) and 0 < threshold <= 1):
        raise SpecError(f"threshold is a number in (0, 1]; given: {threshold!r}")
    emb, weights = _checked(embeddings, projections)
    length = emb.shape[0]
    plain = {name: np.einsum("le,hed->hld", emb, w)[None] for name, w in weights.items()}
    problem = api.build(spec, plain | dict(inputs or {}), "float64", ("out",))
    if not hasattr(problem.variant, "restrict"):
        raise Unsupported(f"{problem.spec.variant} does not offer its last row alone, which a receptive field is of")

    tape = Tape()
    leaf = tape.variable(emb)
    projected = {
        name: reshape(einsum("le,hed->hld", leaf, w), (1, w.shape[0], length, w.shape[2]))
        for name, w in weights.items()
    }
    last = problem.variant.restrict(problem.spec, problem.lift(np.asarray) | projected, (length - 1,))
    out = problem.variant.reference(problem.spec, last)["out"]
    jacobian = np.empty((length, out.value.size, emb.shape[1]))
    for n in range(out.value.size):
        one = np.zeros(out.value.size)
        one[n] = 1.0
        (jacobian[:, n],) = tape.gradients([(out, one.reshape(out.shape))], [leaf])
    s = np.linalg.norm(jacobian, None if norm == "frobenius" else 2, axis=(1, 2))
    if not np.isfinite(s).all() or not s.any():
        raise SpecError("the last output depends on no token, or not in finite numbers: there is no field to measure")
    cumulated = np.cumsum(s[::-1]) / s.sum()
    # The last sum is 1 but for rounding.
    cumulated[-1] = 1.0
    return ReceptiveField(s, cumulated, int(np.argmax(cumulated >= threshold)) + 1)


def _checked(embeddings: Any, projections: Mapping[str, Any]) -> tuple[Floats, dict[str, Floats]]:
    emb = np.asarray(embeddings, np.float64)
    if emb.ndim != 2 or not emb.shape[0]:
        raise ShapeError(f"embeddings are (L, E) with at least one token; given: {emb.shape}")
    if not isinstance(projections, Mapping) or set(projections) != set(_NAMES):
        raise ShapeError("projections are three matrices a head, by the names 'q', 'k' and 'v'")
    weights = {name: np.asarray(projections[name], np.float64) for name in _NAMES}
    for name, w in weights.items():
        if w.ndim != 3 or w.shape[1] != emb.shape[1]:
            raise ShapeError(f"projection {name!r} is (heads, E={emb.shape[1]}, width); given: {w.shape}")
    return emb, weights
