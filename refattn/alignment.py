r"""The temperature at which a longer context is attended to as sharply as a shorter one.

    mean over rows of max_j p_ij(tau) = target,     or     mean over rows of −Σ_j p_ij ln p_ij = target

p(tau) = softmax_j(l_ij / tau), as `refattn.AttentionAlignment` has it; the target is the same mean at the training
length with tau = 1. With tau the entropy of a row never falls and its largest weight never rises,

    d entropy / d tau = Var_p(l) / tau³,     d ln max p / d tau = (E_p l − max l) / tau²,

so a mean over rows meets a target at one tau, which bisection finds. Rows that see no key have no weights and are left
out; rows of one key, or of equal logits, do not move.

Source: Chi, Fan, Rudnicky, arXiv 2311.00684, who search a grid of temperatures, with means over rows, heads and layers
(as recalled).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from refattn import api
from refattn.arrays import to_numpy
from refattn.errors import ShapeError, SpecError
from refattn.spec import Spec

Floats = NDArray[np.float64]
Reduce = Literal["all", "layer", "head"]
# Statistics of every row, (layers, batch, heads, rows), at temperatures (layers, heads); NaN where no key is seen.
_Rows = Callable[[Floats], "Statistics"]
_AVERAGED = {"all": (0, 1, 2, 3), "layer": (1, 2, 3), "head": (1, 3)}
_FARTHEST, _PRECISION = 2.0**60, 1e-10


class Statistics(NamedTuple):
    """The largest weight and the entropy in nats: of rows, or their means, () or (layers,) or (layers, heads)."""

    max_prob: Floats
    entropy: Floats


def statistics(source: Any, arrays: Any = None, *, reduce: Reduce = "all") -> Statistics:
    """Means over rows of the largest weight and of the entropy.

    `source`, `arrays` and `reduce` are those of `align_temperature`; logits are taken at temperature 1, arrays at the
    temperature that they hold, or at 1.
    """
    rows, held = _rows(source, arrays)
    return _means(rows(held), reduce)


def align_temperature(
    source: Any,
    arrays: Any = None,
    *,
    target: Any,
    criterion: Literal["max_prob", "entropy"] = "max_prob",
    reduce: Reduce = "all",
) -> Floats:
    """The temperature at which a mean over rows is the target, to a relative 1e-10.

    Parameters
    ----------
    source : logits (B,H,Lq,Lk) or (layers,B,H,Lq,Lk), or a Spec
        −∞ masks a logit. The Spec is a `refattn.AttentionAlignment` that divides whole logits.
    arrays : mapping, or a sequence with a mapping for each layer
        The Spec's inputs. A temperature among them does not matter here, and need not be given.
    target : number, or an array of the result's shape
        The mean to be met, such as that of `statistics` at the training length.
    criterion : "max_prob" or "entropy"
        What is averaged.
    reduce : "all", "layer" or "head"
        One temperature, or one for each layer, or one for each head of each layer.

    Returns
    -------
    Temperatures (), (layers,) or (layers, heads).

    Raises
    ------
    ShapeError, SpecError
        What was given and what was expected; or no temperature meets the target, and between what it must lie.
    """
    rows, held = _rows(source, arrays)
    _check_reduce(reduce)
    shape = {"all": (), "layer": held.shape[:1], "head": held.shape}[reduce]
    if criterion not in Statistics._fields:
        raise SpecError(f"criterion is 'max_prob' or 'entropy'; given: {criterion!r}")

    goal = to_numpy(target, "target").astype(np.float64)
    if goal.shape not in ((), shape) or not np.isfinite(goal).all():
        raise ShapeError(f"target is a finite number, or an array {shape} of them; given: {target!r}")

    def mean(tau: Floats) -> Floats:
        of_heads = tau[:, None] if reduce == "layer" else tau
        found: Floats = getattr(_means(rows(np.broadcast_to(of_heads, held.shape)), reduce), criterion)
        return found

    low, high = np.full(shape, 1 / _FARTHEST), np.full(shape, _FARTHEST)
    ends = mean(low), mean(high)
    least, most = np.minimum(*ends), np.maximum(*ends)
    if not ((least < goal) & (goal < most)).all():
        raise SpecError(
            f"no temperature gives a mean {criterion} of {target}: it lies between {least} and {most}, both excluded"
        )
    rising = criterion == "entropy"
    while (high > low * (1 + _PRECISION)).any():
        middle = np.sqrt(low * high)
        beyond = (mean(middle) > goal) == rising
        low, high = np.where(beyond, low, middle), np.where(beyond, middle, high)
    return np.asarray(np.sqrt(low * high))


def _means(found: Statistics, reduce: str) -> Statistics:
    """Over the rows that see a key."""
    _check_reduce(reduce)
    seen = ~np.isnan(found.entropy)
    count = seen.sum(_AVERAGED[reduce])
    if not count.all():
        raise ShapeError(f"no row sees a key, so there is no mean: of {seen.shape} rows by layer, sequence and head")
    return Statistics(*(np.where(seen, a, 0).sum(_AVERAGED[reduce]) / count for a in found))


def _check_reduce(reduce: Any) -> None:
    if not isinstance(reduce, str) or reduce not in _AVERAGED:
        raise SpecError(f"reduce is 'all', 'layer' or 'head'; given: {reduce!r}")


def _rows(source: Any, arrays: Any) -> tuple[_Rows, Floats]:
    """Statistics of every row as a function of the temperatures (layers, heads), and those that the arrays hold."""
    if isinstance(source, Spec):
        return _of_spec(source, arrays)
    if arrays is not None:
        raise SpecError(f"arrays are those of a Spec, and logits need none; given: source {type(source).__name__}")
    return _of_logits(to_numpy(source, "logits").astype(np.float64))


def _of_logits(logits: Floats) -> tuple[_Rows, Floats]:
    if logits.ndim not in (4, 5) or not (logits < np.inf).all():
        raise ShapeError(f"logits are (B,H,Lq,Lk) or (layers,B,H,Lq,Lk), finite or −∞; given: {logits.shape}")
    logits = logits.reshape(-1, *logits.shape[-4:])
    live = ~np.isneginf(logits)
    top = np.max(logits, -1, keepdims=True, initial=-np.inf)
    below = np.where(live, logits - np.where(live.any(-1, keepdims=True), top, 0), 0)

    def rows(tau: Floats) -> Statistics:
        s = below / tau[:, None, :, None, None]
        weights = np.where(live, np.exp(s), 0)
        z = np.where(live.any(-1), weights.sum(-1), np.nan)
        return Statistics(1 / z, np.log(z) - (weights * s).sum(-1) / z)

    return rows, np.ones((logits.shape[0], logits.shape[2]))


def _of_spec(spec: Any, arrays: Any) -> tuple[_Rows, Floats]:
    if spec.variant != "attention_alignment":
        raise SpecError(f"source is logits or a refattn.AttentionAlignment; given: {type(spec).__name__}")
    if spec.divide != "logits":
        raise SpecError(f"with divide={spec.divide!r} the bias keeps its size, and no statistic need move one way")
    layers = [arrays] if isinstance(arrays, Mapping) else arrays
    if not isinstance(layers, Sequence) or not layers or not all(isinstance(x, Mapping) for x in layers):
        raise ShapeError(f"arrays is a mapping, or a sequence with one for each layer; given: {type(arrays).__name__}")
    queries = [np.shape(x.get("q", ())) for x in layers]
    if len(set(queries)) > 1 or len(queries[0]) != 4:
        raise ShapeError(f"every layer has a q (B,Hq,Lq,D) of the same shape; given: {queries}")
    held = np.stack([np.asarray(x.get("temperature", np.ones(queries[0][1])), np.float64) for x in layers])

    def rows(tau: Floats) -> Statistics:
        found = [_evaluated(spec, {**x, "temperature": t}) for x, t in zip(layers, tau, strict=True)]
        return Statistics(*(np.stack([f[n] for f in found]) for n in range(2)))

    return rows, held


def _evaluated(spec: Spec, x: Mapping[str, Any]) -> tuple[Floats, Floats]:
    found = api.evaluate(spec, x, dtype="float64", want=("max_prob", "entropy", "lse"))
    empty = np.isneginf(np.asarray(found["lse"]))
    one, other = (np.where(empty, np.nan, np.asarray(found[name])) for name in Statistics._fields)
    return one, other
