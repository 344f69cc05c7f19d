"""What a case asks of a backend, in the names and forms that the backend declares."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import api, registry
from refattn.dtypes import sqrt_reciprocal
from refattn.errors import SpecError, Unsupported
from refattn.golden.inputs import signature_of
from refattn.golden.load import Golden
from refattn.plan import Bias, Dense, Score, Slope
from refattn.spec import Spec

_PASSED_AS_THEY_ARE = (
    "mask", "sink", "q_lengths", "kv_lengths", "q_positions", "k_positions", "k_scale", "v_scale",
    "block_table",
)  # fmt: skip

_SCALES = ("k_scale", "v_scale")


@dataclass(frozen=True)
class Declared:
    """The parameters of a backend: names, or everything where it takes **options."""

    names: frozenset[str]
    everything: bool

    def __contains__(self, name: object) -> bool:
        return self.everything or name in self.names


@dataclass(frozen=True)
class Offer:
    """Keyword arguments, as NumPy arrays and plain numbers; `leaves` maps one to the input that it is."""

    arguments: Mapping[str, Any]
    leaves: Mapping[str, str]


def declared(fn: Callable[..., Any]) -> Declared:
    """Read a backend's parameters from its signature.

    Raises
    ------
    SpecError
        fn cannot be called, has no signature that Python can read, or takes by name neither q, k and v nor all that
        another variant requires.
    """
    if not callable(fn):
        raise SpecError(f"a backend is a function fn(q, k, v, **options); given: {type(fn).__name__}")
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (ValueError, TypeError):
        raise SpecError(f"{fn!r} has no signature to read: wrap it in a function of q, k, v and its options") from None
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names = frozenset(p.name for p in parameters if p.kind in by_name)
    found = Declared(names, any(p.kind == inspect.Parameter.VAR_KEYWORD for p in parameters))
    lacking = [name for name in ("q", "k", "v") if name not in found]
    if lacking and not any(inputs <= names for inputs in _inputs_of_variants()):
        takes = ", ".join(sorted(names)) or "nothing"
        raise SpecError(f"a backend is called fn(q=, k=, v=, ...); it takes {takes}, not {', '.join(lacking)}")
    return found


def _inputs_of_variants() -> list[set[str]]:
    """The arrays that each variant's example requires."""
    alone = [info for info in registry.variants().values() if info.kind == "variant"]
    signatures = [info.module.signature(info.example) for info in alone]
    return [{name for name, array in signature.items() if not array.optional} for signature in signatures]


def offer(golden: Golden, takes: Declared) -> Offer:
    """The arguments of a case: q, k, v, and an option only where the case uses it.

    A bias −m|i − j| goes to `alibi_slopes` (Hq,) where that is declared, every other bias to a dense `bias`.

    Raises
    ------
    Unsupported
        The case needs an option that the backend does not declare.
    """
    spec: Any = golden.spec
    arrays = golden.inputs()
    if spec.variant != "sdpa":
        return _offer_by_name(golden, arrays, takes)
    arguments: dict[str, Any] = {name: arrays[name] for name in ("q", "k", "v")}
    leaves = {name: name for name in (*arguments, *_SCALES) if name in arrays and arrays[name].dtype.kind not in "iu"}
    for name in ("causal", "window", "softcap", "normalizer", "sigmoid_bias"):
        given = getattr(spec, name)
        if given is not False and given not in (None, (None, None), "softmax"):
            arguments[name] = given
    arguments |= {"overflow": golden.overflow} if golden.overflow != "nonsaturate" else {}
    if spec.scale != sqrt_reciprocal(golden.sizes["D"]):
        arguments["scale"] = spec.scale
    arguments |= {name: arrays[name] for name in _PASSED_AS_THEY_ARE if name in arrays}
    if "sink" in arrays:
        leaves["sink"] = "sink"
    if "q_segment_ids" in arrays:
        arguments["segment_ids"] = (arrays["q_segment_ids"], arrays["k_segment_ids"])
    for term in spec.terms:
        if term in spec.bias:
            continue
        # A rotation or a content term as plain data: its registry name, its options, and its arrays by their names.
        if term is spec.rotary:
            arguments["rotary"] = _plain_options(term)
        else:
            arguments["content"] = (*arguments.get("content", ()), _plain_options(term))
        own = [name for name in registry.info(term.variant).module.signature(term) if name in arrays]
        arguments |= {name: arrays[name] for name in own}
        leaves |= {name: name for name in own}
    if "keep" in arrays:
        arguments["keep"] = (arrays["keep"], spec.keep_probability)
    _offer_bias(golden, arrays, takes, arguments, leaves)
    missing = [name for name in arguments if name not in takes]
    if missing:
        raise Unsupported(f"takes no {' and no '.join(missing)}")
    return Offer(arguments, leaves)


def _plain(option: Any) -> Any:
    if isinstance(option, tuple):
        return tuple(map(_plain, option))
    return _plain_options(option) if isinstance(option, Spec) else option


def _plain_options(term: Any) -> dict[str, Any]:
    return {"variant": term.variant} | {f.name: getattr(term, f.name) for f in fields(term)}


def _offer_by_name(golden: Golden, arrays: Mapping[str, Any], takes: Declared) -> Offer:
    """Another variant's arrays and options by their own names, each of which the backend must declare itself.

    **options is not enough: q, k and v mean plain attention to whoever does not know the variant.
    """
    spec: Any = golden.spec
    defaults = {f.name: f.default for f in fields(spec)}
    options = {name: getattr(spec, name) for name, default in defaults.items() if getattr(spec, name) != default}
    if "scale" in options:
        # The scale where none is said is not everywhere D^-1/2.
        unsaid: Any = registry.info(spec.variant).module.resolve(replace(spec, scale=defaults["scale"]), golden.sizes)
        if options["scale"] == unsaid.scale:
            del options["scale"]
    options = {name: _plain(option) for name, option in options.items()}
    if golden.history:
        options["history"] = golden.history
    missing = [name for name in (*arrays, *options) if name not in takes.names]
    if missing:
        raise Unsupported(f"takes no {' and no '.join(missing)}, which {spec.variant} needs")
    real = {name for name, array in signature_of(golden.case()).items() if array.kind == "real"}
    return Offer({**arrays, **options}, {name: name for name in arrays if name in real})


def _offer_bias(
    golden: Golden, arrays: Mapping[str, Any], takes: Declared, arguments: dict[str, Any], leaves: dict[str, str]
) -> None:
    """ALiBi's slopes where the backend has a word for them; what remains, added up, as a dense bias."""
    if not golden.spec.bias and "bias" not in arrays:  # type: ignore[attr-defined]
        return
    plan = api.build(golden.spec, arrays, golden.dtype, ("out",)).score
    rest = list(plan.bias)
    by_index = not {"q_positions", "k_positions"} & set(arrays)
    slopes = [b for b in rest if isinstance(b, Slope)]
    if slopes and by_index and "alibi_slopes" in takes:
        arguments["alibi_slopes"] = np.asarray(slopes[0].slopes, _wide(golden))
        leaves["alibi_slopes"] = "slopes"
        rest.remove(slopes[0])
    if len(rest) == 1 and "bias" in arrays:
        arguments["bias"], leaves["bias"] = arrays["bias"], "bias"
    elif rest:
        total: Any = sum(dense(b, plan) for b in rest)
        arguments["bias"] = total.astype(_wide(golden))


def _wide(golden: Golden) -> Any:
    return np.float64 if golden.dtype == "float64" else np.float32


def dense(bias: Bias, plan: Score) -> NDArray[np.float64]:
    """A bias as logits (1 or B, Hq, Lq, Lk), −∞ where a pair may not attend."""
    if isinstance(bias, Dense):
        full: NDArray[np.float64] = bias.values.reshape((1,) * (4 - bias.values.ndim) + bias.values.shape)
        return full
    q_position, k_position = plan.positions
    ahead = (k_position[:, None, :] - q_position[:, :, None])[:, None]
    if isinstance(bias, Slope):
        slopes = np.asarray(bias.slopes).reshape(1, -1, 1, 1)
        return np.asarray(-slopes * np.abs(ahead))
    heads = np.arange(bias.values.shape[0]).reshape(1, -1, 1, 1)
    return np.asarray(bias.values[heads, ahead + bias.offset])
