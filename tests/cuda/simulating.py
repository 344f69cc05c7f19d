"""Runs a plan's kernels in the simulator, as the launcher runs them on a device."""

import numpy as np

from refattn.engines.cuda import operands, sim, simulator
from refattn.engines.cuda.kernels import forward

# Tiles and blocks small enough that a few rows and keys make several of each.
SMALL = {"float32": {"rows": 8, "keys": 4, "threads": 32, "lanes": 4}}
SMALL |= {storage: {"rows": 32, "keys": 16, "threads": 64} for storage in ("bfloat16", "float16")}


def pointer(array):
    """To the whole memory of an array, of which it is the beginning."""
    flat = (array if array.flags.c_contiguous else array.base).reshape(-1)
    assert flat.ctypes.data == array.ctypes.data
    return sim.Pointer(flat.view(np.uint16) if flat.dtype.itemsize == 2 else flat)


def run(plan, q, k, v, *, seed=0, ops=sim, wide=False, limit=30.0, **tile):
    """Out in the dtype of q and lse, which hold NaN where nothing was written."""
    storage = q.dtype.name
    out = np.full((*q.shape[:3], v.shape[3]), np.nan, q.dtype)
    lse = np.full(q.shape[:3], np.nan, np.float32)
    form = operands.form_of(plan, storage, wide)._replace(**SMALL[storage] | tile)
    x = operands.arguments(plan, form, q, k, v, out, lse)
    x = type(x)(*(pointer(a) if isinstance(a, np.ndarray) else a for a in x))
    kernel = forward.make(ops, form)
    grid = (-(-q.shape[2] // form.rows), q.shape[1], q.shape[0])
    simulator.launch(kernel.run, grid, form.threads, kernel.words, (x,), seed=seed, limit=limit)
    return x.out.memory.view(q.dtype).reshape(out.shape), x.lse.memory.reshape(lse.shape)
