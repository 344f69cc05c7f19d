"""The cuda engine: a problem's plan run on an NVIDIA GPU, in float32 or on tensor cores, on arrays in place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import pullback
from refattn.engines.cuda import adjoint, arrays, launch, memory, operands
from refattn.engines.cuda.arrays import Device
from refattn.engines.cuda.kernels.decode import Parts
from refattn.errors import DTypeError, ShapeError, Unsupported
from refattn.plan import Mix, Plan, Recurrent, Score
from refattn.problem import Problem
from refattn.spec import Outputs

name = "cuda"

_BLOCKS = 65535  # along the second and third axis of a grid


def refuses(problem: Problem) -> str | None:
    """A sentence for what the kernels do not compute, or None; whether there is a device, `run` tells."""
    if problem.unplanned is not None:
        return problem.unplanned
    if problem.dtype.name not in operands.STORAGE:
        return f"the cuda engine gives {', '.join(operands.STORAGE)} and not {problem.dtype}"
    what = _refused(problem.outline or problem.plan)
    if what is not None:
        return what
    others = [output for output in problem.want if output not in ("out", "lse")]
    return f"the cuda engine gives out and lse, and not {' and not '.join(others)}" if others else None


def _refused(plan: Plan) -> str | None:
    if isinstance(plan, Mix):
        return next(filter(None, map(_refused, plan.parts)), None)
    if not isinstance(plan, (Score, Recurrent)):
        return f"the cuda engine runs Score and Recurrent plans and their Mix, and this is a {type(plan).__name__}"
    what = operands.refuses(plan) if isinstance(plan, Score) else memory.refuses(plan)
    if what is not None:
        return f"the cuda engine has no kernel for {what}"
    if max(plan.q.shape[:2]) > _BLOCKS:
        return f"the cuda engine takes at most {_BLOCKS} sequences and as many heads"
    return None


def take(x: Any, name: str) -> Device | None:
    """The array where it lies on a device, or None for one of the host.

    Raises
    ------
    DTypeError
        It cannot be read in place, as nothing can but q, k and v.
    """
    if not arrays.on_device(x):
        return None
    if name not in ("q", "k", "v"):
        raise DTypeError(f"{name} is on a device, where engine 'cuda' reads q, k and v alone: move it to the host")
    return arrays.take(x, name)


def run(problem: Problem) -> Outputs:
    """Out (B,Hq,Lq,Dv) and lse (B,Hq,Lq) in float32, or out in the 16 bits that q, k and v have; on their device.

    Raises
    ------
    EngineUnavailable
        The package or the driver is missing; the message says which and how to get it.
    DeviceError
        Too little memory, or what else the driver tells.
    ShapeError, DTypeError
        q, k and v on different devices, of different dtypes, or in strides that the kernels do not read.
    """
    launch.ready()
    plan = problem.outline or problem.plan
    if not isinstance(plan, Score):
        return Outputs({"out": _positive(_by_parts(plan))})
    q, k, v = (problem.inputs[n] if problem.outline else getattr(plan, n) for n in "qkv")
    there = [isinstance(a, Device) for a in (q, k, v)]
    if any(there):
        return Outputs(dict(zip(("out", "lse"), _in_place(plan, problem.dtype, q, k, v), strict=True)))
    same = all(a.dtype == problem.dtype for a in (q, k, v))
    storage = problem.dtype if same else np.dtype(np.float32)
    q, k, v = (np.ascontiguousarray(a, storage) for a in (q, k, v))
    return Outputs(_on_host(plan, q, k, v))


def vjp(
    problem: Problem, cotangents: Mapping[str, Any], wrt: Sequence[str], outputs: Mapping[str, Any] | None = None
) -> Outputs:
    """Out and lse as `run`, and gradients d<name> in float32; of q, k and v of the host.

    In 16 bits where q, k, v and the cotangent of out are, else in float32. `outputs` spare the forward pass.

    Raises
    ------
    Unsupported
        Another plan than a Score; dense biases; slopes and tables under a softcap; a row that sees what is not finite.
    EngineUnavailable, DeviceError, ShapeError
        As `run`; or out or lse in `outputs` has not the shape this problem gives it.
    """
    if not isinstance(problem.outline or problem.plan, Score):
        raise Unsupported(f"the cuda engine has gradients of Score plans, and {problem.spec.variant} has another")

    def find(plan: Score, wanted: set[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        adjoint.check(plan, wanted)
        launch.ready()
        shapes = {"out": (*plan.q.shape[:3], plan.v.shape[3]), "lse": plan.q.shape[:3]}
        dout, dlse = (cotangents.get(n, np.zeros(shape, problem.dtype)) for n, shape in shapes.items())
        same = all(a.dtype == problem.dtype for a in (plan.q, plan.k, plan.v, dout))
        storage = problem.dtype if same else np.dtype(np.float32)
        q, k, v, dout = (np.ascontiguousarray(a, storage) for a in (plan.q, plan.k, plan.v, dout))
        found = _saved(outputs or {}, shapes)
        if found is None:
            found = _on_host(plan, q, k, v)
        out, lse, dlse = (np.asarray(a, np.float32) for a in (found["out"], found["lse"], dlse))
        return found, adjoint.gradients(plan, adjoint.Pass(q, k, v, dout, out, lse, dlse), wanted)

    return pullback.gradients(problem, wrt, find, name)


def _saved(outputs: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any] | None:
    """The outputs of an earlier evaluate, where they are all there."""
    if not set(shapes) <= set(outputs):
        return None
    for n, shape in shapes.items():
        if outputs[n].shape != shape:
            raise ShapeError(f"{n} of an earlier evaluate has shape {outputs[n].shape}, but this problem's has {shape}")
    return {n: outputs[n] for n in shapes}


def _on_host(plan: Score, q: Any, k: Any, v: Any) -> dict[str, Any]:
    """Out in the storage of q, k and v and lse of arrays of the host."""
    out = np.zeros((*q.shape[:3], v.shape[3]), q.dtype)
    lse = np.full(q.shape[:3], -np.inf, np.float32)
    _launch(plan, q, k, v, out, lse)
    return {"out": _positive(out), "lse": _positive(lse)}


def _by_parts(plan: Plan) -> NDArray[Any]:
    """Out in float32 of a plan whose arrays are those of the host; weights of a Mix are taken there."""
    if isinstance(plan, Mix):
        outs = [_by_parts(part) * weight for part, weight in zip(plan.parts, plan.weights, strict=True)]
        return np.asarray(sum(outs[1:], outs[0]), np.float32)
    if isinstance(plan, Recurrent):
        return memory.run(plan)
    assert isinstance(plan, Score)
    q, k, v = (np.ascontiguousarray(a, np.float32) for a in (plan.q, plan.k, plan.v))
    return np.asarray(_on_host(plan, q, k, v)["out"])


def _in_place(plan: Score, dtype: np.dtype[Any], q: Any, k: Any, v: Any) -> tuple[Device, Device]:
    """Out and lse in new arrays beside q, on the stream on which q is ready."""
    for name, a in zip("qkv", (q, k, v), strict=True):
        if not isinstance(a, Device):
            raise ShapeError(f"{name} is on the host, and others of q, k, v on a device: move it there")
        if a.number != q.number:
            raise ShapeError(f"q is on device {q.number} and {name} on device {a.number}: move one")
        if a.dtype != dtype:
            raise DTypeError(f"{name} is {a.dtype} where the result is {dtype}: on a device both are the same")
        _readable(name, a)
    out = arrays.empty(q, (*q.shape[:3], v.shape[3]), dtype)
    lse = arrays.empty(q, q.shape[:3], np.float32)
    for name, a in (("out", out), ("lse", lse)):
        _readable(name, a)
    _launch(plan, q, k, v, out, lse)
    return out, lse


def _readable(name: str, a: Device) -> None:
    size = a.dtype.itemsize
    if a.size and (a.address % size or any(step % size for step in a.strides)):
        raise ShapeError(f"{name} is not aligned to its {size}-byte numbers: copy it")
    if a.shape[-1] > 1 and a.strides[-1] != size:
        raise ShapeError(
            f"numbers of a row of {name} lie {a.strides[-1]} bytes apart and not {size}: make its last axis contiguous"
        )
    if a.ndim == 4 and abs(a.strides[2]) * a.shape[2] >= 2**31 * size:
        raise ShapeError(f"rows of {name} reach further than 32-bit indices: make it contiguous or shorter")


def _launch(plan: Score, q: Any, k: Any, v: Any, *results: Any) -> None:
    """Out and lse into these arrays, whose numbers are there once the stream, or for the host the call, is done."""
    batch, heads, lq, _ = q.shape
    splits = operands.splits_of(plan)
    form = operands.form_of(plan, q.dtype.name, all(_wide(a) for a in (q, k, v)), split=splits > 0)
    place = {"device": q.number, "stream": q.stream} if isinstance(q, Device) else {}
    blank = ("out", "lse")
    if not results[1].size:
        return
    with launch.session(**place) as there:
        if splits:
            parts = (batch, heads, lq, splits)
            # Places on the device alone: nothing is ever written to these pages of the host.
            outs, lses = np.empty((*parts, v.shape[3]), np.float32), np.empty(parts, np.float32)
            x = operands.arguments(plan, form, q, k, v, outs, lses, splits=splits)
            there.run("forward", form, (x,), (splits, k.shape[1], batch), blank)
            joined = Parts(outs, lses, results[0], results[1], splits)
            there.run("combine", form, (joined,), (lses.size // splits, 1, 1), blank)
        else:
            x = operands.arguments(plan, form, q, k, v, *results)
            there.run("forward", form, (x,), (-(-lq // form.rows), heads, batch), blank)
        if not isinstance(q, Device):
            there.fetch(*results)


def _wide(a: Any) -> bool:
    """Whether every row begins at a multiple of 16 bytes; a copy of a host array begins at one."""
    address = a.address if isinstance(a, Device) else 0
    return all(n % 16 == 0 for n in (address, a.shape[3] * a.dtype.itemsize, *a.strides[:3]))


def _positive(array: NDArray[Any]) -> NDArray[Any]:
    """With no NaN that has a sign."""
    array[np.isnan(array)] = np.nan
    return array
