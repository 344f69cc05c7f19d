"""The public functions: one attention call, and evaluate and vjp for every variant."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from refattn import layout as layouts
from refattn import registry
from refattn.arrays import from_numpy, to_numpy
from refattn.dtypes import format_of, round_to
from refattn.errors import DTypeError, ShapeError, SpecError, Unsupported
from refattn.problem import WIDE, Problem, Shaped, fit, inner_outputs, is_kind, state_arrays, within
from refattn.spec import Array, Outputs, Spec
from refattn.state import State


def attention(
    q: Any,
    k: Any,
    v: Any,
    *,
    causal: Any = False,
    window: tuple[int | None, int | None] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    rotary: Spec | None = None,
    bias: Any = None,
    mask: Any = None,
    sink: Any = None,
    segment_ids: Any = None,
    cu_seqlens_q: Any = None,
    cu_seqlens_k: Any = None,
    q_lengths: Any = None,
    kv_lengths: Any = None,
    q_positions: Any = None,
    k_positions: Any = None,
    keep: tuple[Any, float] | None = None,
    layout: str = "bhsd",
    dtype: Any = None,
    engine: str = "reference",
) -> Any:
    r"""Softmax attention, exact to the rounding of its dtype.

        out = Σ_j softmax_j(softcap(scale q·k) + bias | visible, sink) v_j

    Weights by sigmoid, keys and values in int8 or in blocks are options of `refattn.SDPA`, for `evaluate` and `vjp`.

    Parameters
    ----------
    q, k, v : arrays (B,Hq,Lq,D), (B,Hkv,Lk,D), (B,Hkv,Lk,Dv)
        In `layout` "bhsd"; "bshd" swaps heads and length; "thd" is packed, (T,H,D), with cu_seqlens. Query head h
        reads key head h // (Hq / Hkv). NumPy, torch, JAX or anything with DLPack on the CPU.
    causal : False, True, "top_left" or "bottom_right"
        True only where Lq = Lk, for elsewhere the two alignments differ.
    window : (left, right)
        Keys to either side that are visible, inclusive; None is unbounded.
    scale, softcap : float
        Default scale D^-1/2; softcap c replaces a logit s by c tanh(s/c), before bias and mask.
    rotary : Spec
        A term that turns q and k by their positions, such as `refattn.RoPE(pairing="half")`.
    bias : array, Spec, or a sequence of Specs with at most one array
        An array broadcastable to (B,Hq,Lq,Lk) is added to the logits, −∞ masks; a Spec such as `refattn.ALiBi()`
        is a bias given by its formula.
    mask : boolean array broadcastable to (B,Hq,Lq,Lk)
        True may attend.
    sink : (Hq,)
        A logit per head that takes part in the softmax and has no value.
    segment_ids : (B,L) integers, or a pair for queries and keys
        Only equal segments see each other.
    cu_seqlens_q, cu_seqlens_k : (B+1,) integers
        Where each packed sequence begins; keys as queries where not given.
    q_lengths, kv_lengths : (B,) integers
        Lengths of padded sequences; what lies beyond is never read.
    q_positions, k_positions : (B,L) integers
        Where queries and keys stand, for causality, windows, biases by distance and rotations.
    keep : (boolean mask, probability)
        Dropout as given: weights where True are divided by the probability, others are 0.
    dtype : result's dtype
        Default: that of q.
    engine : "reference", "certified", "cpu" or "cuda"
        No engine stands in for another.

    Returns
    -------
    out (B,Hq,Lq,Dv) in the layout and array kind of q.

    Raises
    ------
    ShapeError, DTypeError, SpecError, LayoutError
        What was given, what was expected, and what to do.
    Unsupported
        The engine does not take this problem; the message says why.

    Examples
    --------
    Rotated halves, as Llama has them, and two key heads of which each serves two query heads:

    >>> import numpy as np
    >>> import refattn as ra
    >>> q, k, v = np.ones((1, 4, 6, 8)), np.ones((1, 2, 6, 8)), np.ones((1, 2, 6, 8))
    >>> ra.attention(q, k, v, causal=True, rotary=ra.RoPE(pairing="half")).shape
    (1, 4, 6, 8)

    Source: arXiv 1706.03762, equation 1.
    """
    given = {"q": q, "k": k, "v": v, "mask": mask, "sink": sink, "q_lengths": q_lengths, "kv_lengths": kv_lengths}
    given |= {"q_positions": q_positions, "k_positions": k_positions}
    pair = segment_ids if isinstance(segment_ids, tuple) else (segment_ids, segment_ids)
    if len(pair) != 2:
        raise ShapeError(f"segment_ids is one array or a pair for queries and keys; given: a tuple of {len(pair)}")
    given |= {"q_segment_ids": pair[0], "k_segment_ids": pair[1]}
    terms, given["bias"] = _split_bias(bias)
    probability = None
    if keep is not None:
        if not isinstance(keep, tuple) or len(keep) != 2 or any(part is None for part in keep):
            raise SpecError(f"keep is a pair (boolean mask, probability); given: {type(keep).__name__}")
        given["keep"], probability = keep
    packing = _numpy({"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k})
    arrays, q_at = layouts.inward(_taken(given, engine), layout, **packing)
    options = {"causal": causal, "window": window, "scale": scale, "softcap": softcap, "keep_probability": probability}
    whole = None
    with suppress(TypeError):  # of an option that has no hash
        whole = _sdpa(rotary, terms, _kinds(window), **options)
    if whole is None:
        whole = _sdpa.__wrapped__(rotary, terms, (), **options)
    out = _run(build(whole, arrays, dtype, ("out",)), engine)["out"]
    laid = layouts.outward(out, layout, q_at)
    return _given(np.ascontiguousarray(laid) if isinstance(laid, np.ndarray) else laid, q)


def evaluate(
    spec: Spec,
    inputs: Mapping[str, Any],
    *,
    engine: str = "reference",
    dtype: Any = None,
    want: Sequence[str] = ("out",),
) -> Outputs:
    """Outputs of a variant: `want` names them ("out", "lse", ...); arrays of the kind and dtype of the first input.

    lse is natural, of the final logits, sink included: float64 for float64 input, else float32. Of softmax attention
    `want` may name "scores" (the final logits, −∞ where masked) and "probs", both (B,Hq,Lq,Lk) and wide as lse is. The
    certified engine adds `status`, a code per element. A streaming variant offers "state" too, the `State` after the
    last token; `step` goes on from it. Raises as `attention`.
    """
    given, names = _stateless(inputs), _names("want", want)
    problem = build(spec, _taken(given, engine), dtype, names)
    return _collected(_run(problem, engine), problem, names, next(iter(given.values()), None))


def vjp(
    spec: Spec,
    inputs: Mapping[str, Any],
    cotangents: Mapping[str, Any],
    *,
    outputs: Mapping[str, Any] | None = None,
    wrt: Sequence[str] | None = None,
    engine: str = "reference",
    dtype: Any = None,
) -> Outputs:
    """Gradients d<name> of the real inputs (all, or those in `wrt`) for cotangents of outputs: {"out": dout, ...}.

    `outputs` of an earlier `evaluate` (out and lse) spare an engine its forward pass. Raises as `attention`.
    """
    given, duals = _stateless(inputs), _present("cotangents", cotangents)
    problem = build(spec, _numpy(given), dtype, ("out",))
    shapes = {name: a.shape(problem.sizes) for name, a in problem.outputs.items()}
    shapes = {name: shape for name, shape in shapes.items() if name not in problem.integer_outputs}
    weights = {name: to_numpy(c, f"d{name}") for name, c in duals.items()}
    if not weights:
        raise ShapeError(f"cotangents are empty: give that of at least one output of {shapes}")
    for name, c in weights.items():
        if shapes.get(name) != c.shape:
            raise ShapeError(f"cotangent of {name!r} has shape {c.shape}; expected one of {shapes}, by these names")
        if not is_kind(c.dtype, "real"):
            raise DTypeError(f"cotangent of {name!r} is {c.dtype}; expected a real dtype, such as that of the output")
    real = tuple(problem.real_inputs())
    names = real if wrt is None else _names("wrt", wrt)
    if set(names) - set(real):
        raise SpecError(f"wrt names {sorted(set(names) - set(real))}, but the real inputs given are {list(real)}")
    saved = None if outputs is None else _numpy(_present("outputs", outputs))
    problem = replace(problem, want=tuple(weights))
    found = _engine(engine, problem).vjp(problem, weights, names, saved)
    kept = _rounded(Outputs({f"d{n}": found[f"d{n}"] for n in names}, found.status), problem)
    like = next(iter(given.values()), None)
    status = {name: code for name, code in kept.status.items() if name in kept}
    return Outputs({name: from_numpy(a, like) for name, a in kept.items()}, status)


def build(spec: Spec, arrays: Mapping[str, Any], dtype: Any, want: tuple[str, ...], length: int = 0) -> Problem:
    """A checked Problem: shapes against the signature, options against the sizes.

    `length` tokens have gone before; the arrays of the state after them stand among the others as state_<name>.
    """
    shaped = tuple([(name, a.shape, a.dtype) for name, a in arrays.items()])
    form = None
    with suppress(TypeError):  # of a spec that has no hash
        form = _form(spec, shaped, dtype, want, length)
    if form is None:
        form = _form.__wrapped__(spec, shaped, dtype, want, length)
    if form.bounded:
        within(form.bounded, {name: arrays[name] for name in form.bounded}, form.sizes)
    if hasattr(form.module, "validate"):
        form.module.validate(form.spec, arrays)
    return Problem(
        spec=form.spec,
        variant=form.module,
        inputs=dict(arrays),
        sizes=dict(form.sizes),
        dtype=form.dtype,
        want=want,
        length=length,
    )


class _Form(NamedTuple):
    """What a problem is before any number is read: equal for equal specs and shapes.

    bounded: the arrays whose values lie in a domain; dtype: of the results.
    """

    spec: Spec
    module: Any
    sizes: Mapping[str, int]
    bounded: Mapping[str, Array]
    dtype: np.dtype[Any]


@lru_cache(maxsize=256)
def _form(spec: Spec, shaped: tuple[tuple[str, Any, Any], ...], dtype: Any, want: Any, length: int) -> _Form:
    whole, module = _whole(spec)
    arrays = {name: Shaped(shape, kind) for name, shape, kind in shaped}
    given = state_arrays(module, whole, length) if any(name.startswith("state_") for name in arrays) else {}
    signature = module.signature(whole) | given
    sizes = fit(signature, arrays)
    resolved = module.resolve(whole, sizes)
    bounded = {name: signature[name] for name in arrays if signature[name].domain != "any"}
    carried = ["state"] if hasattr(module, "state") else []
    offered = [*module.outputs(resolved), *carried, *inner_outputs(module, resolved)]
    unknown = sorted(set(want) - set(offered))
    if unknown:
        raise SpecError(f"want names {unknown[0]!r}; {resolved.variant} offers {', '.join(offered)}")
    first = next(iter(module.signature(resolved)))
    asked = np.dtype(format_of(arrays[first].dtype if dtype is None else dtype).numpy)
    return _Form(resolved, module, sizes, bounded, asked)


def _run(problem: Problem, engine: str, state_dtype: Any = None) -> Outputs:
    found = _engine(engine, problem).run(problem)
    carried = [n for n in found if n.startswith("state_")] if "state" in problem.want else []
    names = [*(n for n in problem.want if n != "state"), *carried]
    kept = Outputs({n: found[n] for n in names}, {n: s for n, s in found.status.items() if n in names})
    return _rounded(kept, problem, state_dtype)


def _collected(results: Outputs, problem: Problem, want: Sequence[str], like: Any) -> Outputs:
    """Results in the caller's kind of array, those of the state as one State."""
    arrays = {n: _given(results[n], like) for n in want if n != "state"}
    if "state" in want:
        carried = {n.removeprefix("state_"): a for n, a in results.items() if n.startswith("state_")}
        arrays["state"] = State(problem.spec, problem.length + problem.sizes.get("L", 0), carried)
    return Outputs(arrays, results.status)


def _engine(name: str, problem: Problem) -> Any:
    engine = registry.engine(name)
    reason = engine.refuses(problem)
    if reason is not None:
        raise Unsupported(f"engine {name!r} does not take this problem: {reason}")
    return engine


def _rounded(outputs: Outputs, problem: Problem, state_dtype: Any = None) -> Outputs:
    """Each output rounded once: to the problem's dtype, lse to float64 or float32, a state to its own; or int64."""
    wide = np.dtype(np.float64 if problem.dtype == np.float64 else np.float32)

    def rounded(name: str, array: Any) -> Any:
        dtype = wide if name in WIDE else problem.dtype
        if name.startswith("state_") and state_dtype is not None:
            dtype = state_dtype
            # The caches of a float64 stream are not touched, so not copied.
            if dtype == array.dtype:
                return array
        # Engines that compute in fewer bits than float64 round by themselves.
        if array.dtype == dtype != np.float64:
            return array
        if name in problem.integer_outputs:
            return array.astype(np.int64)
        return round_to(array.astype(np.float64, copy=False), dtype)

    return Outputs({n: rounded(n, a) for n, a in outputs.items()}, outputs.status)


def _whole(spec: Any) -> tuple[Spec, Any]:
    if not isinstance(spec, Spec):
        raise SpecError(f"spec is a Spec such as refattn.SDPA() or refattn.ALiBi(); given: {type(spec).__name__}")
    return registry.whole(spec)


def _present(what: str, given: Any) -> dict[str, Any]:
    """The entries of a mapping by name that are not None."""
    if not isinstance(given, Mapping) or not all(isinstance(name, str) for name in given):
        raise SpecError(f"{what} is a mapping by name, such as {{'q': ...}}; given: {type(given).__name__}")
    return {name: a for name, a in given.items() if a is not None}


def _stateless(inputs: Any) -> dict[str, Any]:
    """Inputs of a sequence from its first token on."""
    given = _present("inputs", inputs)
    carried = next((name for name in given if name.startswith("state_")), None)
    if carried is not None:
        raise ShapeError(
            f"unknown array {carried!r}: inputs here begin with the first token; refattn.step goes on from a State"
        )
    return given


def _names(what: str, given: Any) -> tuple[str, ...]:
    if isinstance(given, str) or not isinstance(given, Iterable) or not all(isinstance(n, str) for n in given):
        raise SpecError(f"{what} is a sequence of names, such as ('out',); given: {given!r}")
    return tuple(given)


def _numpy(given: Mapping[str, Any]) -> dict[str, Any]:
    return {name: to_numpy(a, name) for name, a in given.items() if a is not None}


def _taken(given: Mapping[str, Any], engine: str) -> dict[str, Any]:
    """As `_numpy`, but arrays that the engine reads elsewhere are left where they are."""
    take = getattr(registry.engine(engine), "take", None)
    if take is None:
        return _numpy(given)
    present = {name: a for name, a in given.items() if a is not None}
    there = {name: take(a, name) for name, a in present.items()}
    return {name: to_numpy(a, name) if there[name] is None else there[name] for name, a in present.items()}


def _given(a: Any, like: Any) -> Any:
    """A result in the caller's kind of array: of the host, or as it is where an engine left it on its device."""
    return from_numpy(a, like) if isinstance(a, np.ndarray) else a.handed_out()


_ARGUMENTS = frozenset(
    "q k v bias mask sink keep q_lengths kv_lengths q_positions k_positions q_segment_ids k_segment_ids".split()
)


@lru_cache(maxsize=256, typed=True)
def _sdpa(rotary: Any, terms: tuple[Spec, ...], kinds: Any, **options: Any) -> Spec:
    """The Spec of one attention call; `kinds` tells windows apart that are equal and not all allowed."""
    whole = registry.spec("sdpa", rotary=rotary, bias=terms, **options)
    others = [name for name in registry.info("sdpa").module.signature(whole) if name not in _ARGUMENTS]
    if others:
        inputs = ", ".join(f"{name!r}: ..." for name in others)
        raise SpecError(f"attention has no argument for {', '.join(others)}: evaluate(SDPA(...), {{'q': q, {inputs}}})")
    return whole


def _kinds(option: Any) -> Any:
    return tuple(map(_kinds, option)) if isinstance(option, tuple) else type(option)


def _split_bias(bias: Any) -> tuple[tuple[Spec, ...], Any]:
    """Term Specs and the one array of a bias argument."""
    if bias is None:
        return (), None
    if isinstance(bias, Spec):
        return (bias,), None
    if not isinstance(bias, (tuple, list)) or not any(isinstance(b, Spec) for b in bias):
        return (), bias
    dense = [b for b in bias if not isinstance(b, Spec)]
    if len(dense) > 1:
        raise SpecError(f"bias takes term Specs and at most one array; given: {len(dense)} arrays")
    return tuple(b for b in bias if isinstance(b, Spec)), dense[0] if dense else None
