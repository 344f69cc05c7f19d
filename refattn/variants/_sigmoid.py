"""Weights of each key by itself: the end of sigmoid attention, as `numeric.softmax_attend` is that of softmax."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal, localcontext
from fractions import Fraction
from typing import Any

import numpy as np

from refattn.dtypes import nearest
from refattn.errors import SpecError
from refattn.numeric import (
    clean,
    concatenate,
    exp,
    finite,
    reached,
    real,
    reshape,
    row_max,
    stop,
    stored,
    total,
    weighted,
    where,
)
from refattn.space import Bools, Integers
from refattn.spec import dyadic


def checked(normalizer: Any, bias: Any) -> Any:
    """The bias as a double, "keys", or None for a softmax.

    Raises
    ------
    SpecError
        There is no such normalizer, or the bias does not go with it.
    """
    if not isinstance(normalizer, str) or normalizer not in ("softmax", "sigmoid"):
        raise SpecError(f"normalizer is 'softmax' or 'sigmoid'; given: {normalizer!r}")
    if normalizer == "softmax":
        if bias is not None:
            raise SpecError(f"sigmoid_bias goes with normalizer='sigmoid'; given: {bias!r}")
        return None
    if bias is None:
        raise SpecError(
            "sigmoid attention has no default bias: give sigmoid_bias, a number such as −ln n where n keys are seen, "
            "or 'keys' for −ln Lk"
        )
    return bias if isinstance(bias, str) and bias == "keys" else dyadic("sigmoid_bias", bias)


def sigmoid_attend(
    s: Any, live: Bools, v: Any, *, keep: Any, spoiled: Bools, relative: Sequence[tuple[Integers, Any]]
) -> Any:
    r"""Out (B,H,Lq,Dv) of logits s (B,H,Lq,Lk); the other arguments are those of `numeric.softmax_attend`.

        p_ij = exp(s_ij − m_ij) / (exp(s_ij − m_ij) + exp(−m_ij)) [live_ij],   out_i = Σ_j keep_ij p_ij v_j

    m_ij = max(s_ij, 0) cancels, and neither exponential overflows. There is no normaliser: what is not finite spoils
    the weight of its own pair, so the sum of its row, and backwards no other pair.
    """
    live = np.broadcast_to(live, s.shape)
    bad = live & (spoiled | ~finite(s))
    s = stored(where(live, clean(s), 0), cotangent=True)
    pairs = concatenate([reshape(stop(s), (*s.shape, 1)), real(np.zeros((*s.shape, 1)), s)], -1)
    m = reshape(row_max(pairs, np.ones((1, 2), bool)), s.shape)
    own = exp(s - m)
    w = stored(where(live, own / (own + exp(-m)), 0))
    if bad.any():
        w = w * where(bad, real(np.nan, s), real(1, s))
    w = w if keep is None else w * keep
    out = weighted(w, v, relative)
    v_ok = finite(v)
    if not v_ok.all():
        hidden = np.repeat(~v_ok.all(-1), s.shape[1] // v.shape[1], axis=1)[:, :, None]
        hit = where(reached(live, ~v_ok), real(np.nan, s), real(0, s))
        out = out + total(where(live & hidden, w, 0), -1, keepdims=True) * hit
    return out


def minus_log(n: int) -> float:
    """−ln n, rounded once to float32, for an integer n > 0; no n > 1 has a rational logarithm, so there is no tie."""
    with localcontext() as context:
        context.prec = 60
        return nearest(-Fraction(Decimal(n).ln()), "float32")
