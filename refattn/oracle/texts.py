"""Mistakes of order and of storage: the formula written another way, in the vocabulary of `numeric`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from refattn.dtypes import format_of, round_to
from refattn.numeric import einsum, finite, real, reshape, softmax_attend, tanh, where
from refattn.oracle.alternatives import FORWARD, Alternative, Failure
from refattn.space import Value

Reference = Callable[..., dict[str, Any]]


def softcap_order(f: Failure) -> Iterator[Alternative]:
    """The softcap after the bias, or after the mask too, so that masked logits become −c and take part."""
    spec: Any = f.golden.spec
    if spec.softcap is None or not _bare(spec):
        return
    words = "a softcap applied after the mask: masked keys keep the logit −c and take part"
    yield Alternative(key="softcap_after_mask", words=words, text=_softcap_last(masked_too=True), only=FORWARD)
    if spec.bias or "bias" in f.arrays:
        words = "a softcap applied after the bias"
        yield Alternative(key="softcap_after_bias", words=words, text=_softcap_last(masked_too=False), only=FORWARD)


def rounded_weights(f: Failure) -> Iterator[Alternative]:
    """Weights relative to the row's maximum, rounded before they meet the values."""
    precision = format_of(f.golden.dtype).precision
    for name in ("bfloat16", "float16"):
        if format_of(name).precision < precision and _bare(f.golden.spec):
            words = f"softmax weights rounded to {name} before they meet the values"
            text = _rounded_weights(name)
            yield Alternative(key="rounded_weights", words=words, text=text, only=("out", "lse"))


def _bare(spec: Any) -> bool:
    """Whether scores are q·k, without rotation and content terms, which these texts do not know."""
    return spec.rotary is None and not spec.content


def _logits(module: Any, spec: Any, x: Any, cap_last: bool) -> tuple[Any, Any]:
    """Scores (B,Hq,Lq,Lk) and who is live; pairs with a bias of −∞ are not."""
    batch, heads, lq, width = x["q"].shape
    groups, lk = x["k"].shape[1:3]
    at = module.place(spec.causal, x)
    live = module.visible(spec, x, at)
    q, k = (where(finite(a), a, 0) for a in (x["q"], x["k"]))
    rows = reshape(q, (batch, groups, heads // groups, lq, width))
    s = real(spec.scale, q) * reshape(einsum("bgrid,bgjd->bgrij", rows, k), (batch, heads, lq, lk))
    if spec.softcap is not None and not cap_last:
        s = _capped(spec, s)
    for term in spec.bias:
        logits, allowed = sys.modules[type(term).__module__].term(term, x, at)
        s, live = s + logits, live if allowed is None else live & allowed
    if "bias" in x:
        masked = ~finite(x["bias"])
        s, live = s + where(masked, 0, x["bias"]), live & ~masked
    return _capped(spec, s) if cap_last else s, np.broadcast_to(live, s.shape)


def _capped(spec: Any, s: Any) -> Any:
    cap = real(spec.softcap, s)
    return cap * tanh(s / cap)


def _softcap_last(masked_too: bool) -> Callable[[Any], Reference]:
    def text(module: Any) -> Reference:
        def reference(spec: Any, x: Any, state: Any = None) -> dict[str, Any]:
            s, live = _logits(module, spec, x, cap_last=True)
            if masked_too:
                s, live = where(live, s, real(-spec.softcap, s)), np.ones_like(live)
            out, lse = softmax_attend(s, live, x["v"], sink=x.get("sink"), keep=_keep(spec, x))
            return {"out": out, "lse": lse}

        return reference

    return text


def _keep(spec: Any, x: Any) -> Any:
    """Factors of the weights where some are dropped."""
    return None if spec.keep_probability is None else x["keep"] / spec.keep_probability


def _rounded_weights(name: str) -> Callable[[Any], Reference]:
    """Values only: rounding has no derivative, so on the tape the weights stay as they are."""

    def text(module: Any) -> Reference:
        def reference(spec: Any, x: Any, state: Any = None) -> dict[str, Any]:
            s, live = _logits(module, spec, x, cap_last=False)
            keep = _keep(spec, x)
            out, lse = softmax_attend(s, live, x["v"], sink=x.get("sink"), keep=keep)
            plain, values = (a.value if isinstance(a, Value) else a for a in (s, x["v"]))  # type: ignore[attr-defined]
            total = lse.value if isinstance(lse, Value) else lse  # type: ignore[attr-defined]
            top = np.max(np.where(live, plain, -np.inf), -1, keepdims=True, initial=-np.inf)
            with np.errstate(invalid="ignore"):
                p = np.where(live, np.exp(plain - top), 0.0) * (1.0 if keep is None else keep)
                p = round_to(p, name).astype(np.float64)
                shrink = np.exp(top[..., 0] - total)[..., None]
            grouped = p.reshape(*values.shape[:2], -1, *p.shape[2:])
            mean = np.einsum("bgrij,bgjd->bgrid", grouped, np.where(np.isfinite(values), values, 0.0))
            exact = out.value if isinstance(out, Value) else out  # type: ignore[attr-defined]
            rounded = np.where(live.any(-1, keepdims=True), mean.reshape(exact.shape) * shrink, 0.0)
            return {"out": out + real(rounded - exact, out), "lse": lse}

        return reference

    return text


TEXTS = (softcap_order, rounded_weights)
