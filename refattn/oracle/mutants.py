"""Planted mistakes: each one step of plain.Plain done wrong, with the hypothesis that must name it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from refattn.dtypes import round_to
from refattn.oracle.plain import Plain


@dataclass(frozen=True)
class Mutant:
    """A backend with one mistake; `named` is the id of the hypothesis that explains it."""

    name: str
    named: str
    fn: Callable[..., Any]


MUTANTS: dict[str, Mutant] = {}


def plant(named: str) -> Callable[[type[Plain]], type[Plain]]:
    """Register a class as a mutant."""

    def register(kind: type[Plain]) -> type[Plain]:
        MUTANTS[kind.__name__] = Mutant(kind.__name__, named, kind())
        return kind

    return register


def bfloat16(x: Any) -> Any:
    """The nearest bfloat16, in the dtype of x."""
    return round_to(np.asarray(x, np.float64), "bfloat16").astype(x.dtype)


@plant("alignment")
class CausalAlignment(Plain):
    """Top-left where bottom-right was asked, and the other way round."""

    def offset(self, a: Any, b: int) -> int:
        """Both conventions exchanged."""
        return a.lk - a.lq if a.causal == "top_left" else 0


@plant("window")
class WindowLeftWider(Plain):
    """A window of one key too many."""

    def window(self, a: Any) -> Any:
        """Left + 1."""
        left, right = a.window or (None, None)
        return None if left is None else left + 1, right


@plant("window")
class WindowLeftNarrower(Plain):
    """The size read as a count that includes the query itself."""

    def window(self, a: Any) -> Any:
        """Left − 1."""
        left, right = a.window or (None, None)
        return None if left is None else left - 1, right


@plant("window")
class WindowRightWider(Plain):
    """One key too many after the query."""

    def window(self, a: Any) -> Any:
        """Right + 1."""
        left, right = a.window or (None, None)
        return left, None if right is None else right + 1


@plant("key_head")
class WrongKeyHead(Plain):
    """Heads dealt out in turn instead of in groups."""

    def key_head(self, h: int, a: Any) -> int:
        """Remainder in place of quotient."""
        return h % int(a.groups)


@plant("no_scale")
class NoScale(Plain):
    """The scores as they come."""

    def scale(self, width: int, given: float | None) -> float:
        """One."""
        return 1.0


@plant("scale_twice")
class ScaleTwice(Plain):
    """Applied to q and again to the scores."""

    def scale(self, width: int, given: float | None) -> float:
        """Squared."""
        return super().scale(width, given) ** 2


@plant("lse_base_2")
class LseBase2(Plain):
    """What a kernel that works with exp2 holds."""

    def log_sum(self, m: Any, z: Any) -> Any:
        """Logarithm to base 2."""
        return super().log_sum(m, z) / np.log(m.dtype.type(2))


@plant("lse_is_maximum")
class LseIsMaximum(Plain):
    """The logarithm of the sum forgotten."""

    def log_sum(self, m: Any, z: Any) -> Any:
        """The row's maximum alone."""
        return m


@plant("softcap_after_mask")
class SoftcapAfterMask(Plain):
    """Masked logits pass through tanh, come out as −c, and take part."""

    def logits(self, a: Any, raw: Any, added: Any, live: Any) -> tuple[Any, Any, Any]:
        """The cap last."""
        if a.softcap is None:
            return super().logits(a, raw, added, live)
        t = np.tanh(np.where(live, raw + added, -np.inf) / a.work(a.softcap))
        return a.work(a.softcap) * t, 1 - t * t, np.ones_like(live)


@plant("geometric_slopes")
class GeometricSlopes(Plain):
    """2^(−8h/n) for every n."""

    def __call__(self, q: Any, k: Any, v: Any, *, alibi_slopes: Any = None, **options: Any) -> dict[str, Any]:
        """Own slopes in place of those given."""
        if alibi_slopes is not None:
            heads = len(alibi_slopes)
            alibi_slopes = (2.0 ** (-8 * np.arange(1, heads + 1) / heads)).astype(np.float32)
        return super().__call__(q, k, v, alibi_slopes=alibi_slopes, **options)


@plant("bias_scaled")
class BiasScaled(Plain):
    """The bias added before the scale, as in Falcon."""

    def added(self, a: Any, b: int, h: int, rows: Any, ahead: Any) -> Any:
        """Every bias times the scale."""
        return super().added(a, b, h, rows, ahead) * a.scale


@plant("mean_of_values")
class MeanOfValues(Plain):
    """A softmax over equal masked logits."""

    def empty(self, f: Any) -> Any:
        """The mean of all values."""
        return np.broadcast_to(f.v.mean(0), f.out.shape)


@plant("nan_on_empty_rows")
class NaNOnEmptyRows(Plain):
    """0 / 0."""

    def empty(self, f: Any) -> Any:
        """Not a number."""
        return np.full_like(f.out, np.nan)


@plant("dropped_key")
class DroppedKey(Plain):
    """A key at the seam of two blocks is never read in long sequences."""

    def visible(self, a: Any, b: int, h: int, rows: Any, ahead: Any) -> Any:
        """All but key 1024 from length 2049 on."""
        live = super().visible(a, b, h, rows, ahead)
        if a.lk >= 2049:
            live[:, 1024] = False
        return live


@plant("last_block")
class LastBlockDropped(Plain):
    """The loop ends at the last whole block of 64 keys."""

    def visible(self, a: Any, b: int, h: int, rows: Any, ahead: Any) -> Any:
        """All but the remainder."""
        live = super().visible(a, b, h, rows, ahead)
        if a.lk > 64:
            live[:, a.lk - a.lk % 64 :] = False
        return live


@plant("bfloat16_accumulator")
class BFloat16Accumulator(Plain):
    """The output summed in bfloat16, 32 keys at a time."""

    def product(self, p: Any, v: Any) -> Any:
        """A rounding after every block."""
        total = np.zeros((len(p), v.shape[1]), p.dtype)
        for j in range(0, len(v), 32):
            total = bfloat16(total + p[:, j : j + 32] @ v[j : j + 32])
        return total


@plant("rounded_weights")
class BFloat16Weights(Plain):
    """Weights cast to bfloat16 before they meet the values."""

    def product(self, p: Any, v: Any) -> Any:
        """Rounded p."""
        return bfloat16(p) @ v


@plant("rounded_inputs")
class BFloat16Inputs(Plain):
    """Queries, keys and values cast to bfloat16."""

    def clean(self, x: Any) -> Any:
        """Rounded input."""
        return bfloat16(super().clean(x))


@plant("dq_scale")
class DqWithoutScale(Plain):
    """The chain rule's last factor forgotten."""

    def results(self, a: Any, r: Any, dtype: Any, wide: Any, gradients: bool) -> dict[str, Any]:
        """The gradient of scale · q."""
        r.dq = r.dq / a.scale
        return super().results(a, r, dtype, wide, gradients)


@plant("group_sum")
class NoGroupSum(Plain):
    """Each query head overwrites its group's gradient."""

    def backward(self, a: Any, r: Any, f: Any, dout: Any, dlse: Any) -> None:
        """What the heads before have left is cleared."""
        if f.h % a.group and f.rows[0] == 0:
            r.dk[f.b, f.g], r.dv[f.b, f.g] = 0, 0
        super().backward(a, r, f, dout, dlse)


@plant("sink_ignored")
class SinkIgnored(Plain):
    """A softmax without the sink."""

    def sink(self, a: Any, h: int) -> Any:
        """None."""
        return a.work(-np.inf)


@plant("sink_scaled")
class SinkScaled(Plain):
    """The sink taken for a score."""

    def sink(self, a: Any, h: int) -> Any:
        """Scaled."""
        return super().sink(a, h) * a.scale


@plant("mask_inverted")
class MaskInverted(Plain):
    """True taken for masked."""

    def __call__(self, q: Any, k: Any, v: Any, *, mask: Any = None, **options: Any) -> dict[str, Any]:
        """The complement."""
        return super().__call__(q, k, v, mask=None if mask is None else ~mask, **options)


@plant("leak")
class Leak(Plain):
    """0 · NaN: what a masked slot holds gets into the sum."""

    def clean(self, x: Any) -> Any:
        """As it is."""
        return x
