"""Runs a plan's kernels in the simulator, as the launcher runs them on a device."""

import numpy as np

from refattn.engines.cuda import memory, operands, sim, simulator
from refattn.engines.cuda.kernels import backward, decode, forward, recurrent
from refattn.scoring import differences

# Tiles and blocks small enough that a few rows and keys make several of each.
SMALL = {"float32": {"rows": 8, "keys": 4, "threads": 32, "lanes": 4}}
SMALL |= {storage: {"rows": 32, "keys": 16, "threads": 64} for storage in ("bfloat16", "float16")}

SPLIT = {"rows": 16, "keys": 16, "threads": 32}
# Tiles of the backward pass, either side of which is met by the other.
SQUARE = {"float32": {"rows": 8, "keys": 8, "threads": 32, "lanes": 4}}
SQUARE |= {storage: {"rows": 32, "keys": 32, "threads": 64} for storage in ("bfloat16", "float16")}


def pointer(array):
    """To the whole memory of an array, of which it is the beginning."""
    flat = (array if array.flags.c_contiguous else array.base).reshape(-1)
    assert flat.ctypes.data == array.ctypes.data
    return sim.Pointer(flat.view(np.uint16) if flat.dtype.itemsize == 2 else flat)


def run(plan, q, k, v, *, seed=0, ops=sim, wide=False, limit=30.0, splits=0, **tile):
    """Out in the dtype of q and lse, which hold NaN where nothing was written; by decode if the keys are split."""
    storage = q.dtype.name
    batch, heads, lq, _ = q.shape
    parts = (batch, heads, lq, splits) if splits else (batch, heads, lq)
    out = np.full((*parts, v.shape[3]), np.nan, np.float32 if splits else q.dtype)
    lse = np.full(parts, np.nan, np.float32)
    sizes = SPLIT if splits else SMALL[storage]
    form = operands.form_of(plan, storage, wide, split=splits > 0)._replace(**sizes | tile)
    x = operands.arguments(plan, form, q, k, v, out, lse, splits=splits or 1)
    x = type(x)(*(pointer(a) if isinstance(a, np.ndarray) else a for a in x))
    kernel = forward.make(ops, form)
    grid = (splits, k.shape[1], batch) if splits else (-(-lq // form.rows), heads, batch)
    simulator.launch(kernel.run, grid, form.threads, kernel.words, (x,), seed=seed, limit=limit)
    if splits:
        out, lse = np.full((*q.shape[:3], v.shape[3]), np.nan, q.dtype), np.full(q.shape[:3], np.nan, np.float32)
        joined = decode.Parts(x.out, x.lse, pointer(out), pointer(lse), splits)
        made = decode.make(ops, form)
        simulator.launch(made.run, (lse.size, 1, 1), form.threads, made.words, (joined,), seed=seed, limit=limit)
    return out, lse


def gradients(plan, q, k, v, given, *, seed=0, ops=sim, wide=False, limit=30.0, **tile):
    """Dq, dk, dv and the sums of a slope, which hold NaN where nothing was written; given: dout, out, lse, dlse."""
    batch, heads, _, _ = q.shape
    found = [np.full(a.shape, np.nan, np.float32) for a in (q, k, v, given[2])]
    size = (SQUARE[q.dtype.name] | tile)["rows"]
    found.append(np.zeros((batch, heads, -(-q.shape[2] // size), differences(plan)[1]), np.float32))
    y = operands.cotangents(plan, *given, *found)
    y = type(y)(*(pointer(a) if isinstance(a, np.ndarray) else a for a in y))
    for make, kernel in ((backward.make_rows, "rows"), (backward.make_keys, "keys")):
        form = operands.form_of(plan, q.dtype.name, wide)
        form = form._replace(tabled=form.table, **SQUARE[q.dtype.name] | tile)
        x = operands.arguments(plan, form, q, k, v, np.zeros(0, q.dtype), np.zeros(0, np.float32))
        x = type(x)(*(pointer(a) if isinstance(a, np.ndarray) else a for a in x))
        made = make(ops, form)
        tiles = (-(-q.shape[2] // form.rows), heads) if kernel == "rows" else (-(-k.shape[2] // form.keys), k.shape[1])
        simulator.launch(made.run, (*tiles, batch), form.threads, made.words, (x, y), seed=seed, limit=limit)
    return found


def recur(plan, *, seed=0, ops=sim, limit=30.0):
    """Out of a Recurrent plan, which holds NaN where nothing was written."""
    out = np.full((*plan.q.shape[:3], plan.v.shape[3]), np.nan, np.float32)
    form = memory.form_of(plan)._replace(rows=8, keys=8, threads=32, lanes=4)
    x = memory.arguments(plan, out)
    x = type(x)(*(pointer(a) if isinstance(a, np.ndarray) else a for a in x))
    made = recurrent.make(ops, form)
    grid = (-(-form.width // form.keys), plan.k.shape[1], len(out))
    simulator.launch(made.run, grid, form.threads, made.words, (x,), seed=seed, limit=limit)
    return out
