"""The backward pass of a plan: what its kernels are given, and the sums of what they find."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from refattn.engines.cuda import launch, operands
from refattn.engines.cuda.kernels.form import squared
from refattn.errors import Unsupported
from refattn.plan import Dense, Score, Slope, Table
from refattn.pullback import of_sink
from refattn.scoring import differences

Array = Any


class Pass(NamedTuple):
    """Arrays of a backward pass in C order: q, k, v, dout in one storage; out (B,Hq,Lq,Dv), lse, dlse in float32."""

    q: Array
    k: Array
    v: Array
    dout: Array
    out: Array
    lse: Array
    dlse: Array


def check(plan: Score, wanted: set[str]) -> None:
    """Whether the kernels give the gradients that are wanted.

    Raises
    ------
    Unsupported
        Those of dense biases, or of slopes and tables under a softcap.
    """
    biases = [b for n, b in enumerate(plan.bias) if f"bias.{n}" in wanted]
    what = "dense biases" if any(isinstance(b, Dense) for b in biases) else None
    if what is None and biases and plan.softcap is not None:
        what = "slopes and tables under a softcap"
    if what is not None:
        raise Unsupported(f"the cuda engine has no gradients of {what}: ask engine='cpu'")


def gradients(plan: Score, given: Pass, wanted: set[str]) -> dict[str, Array]:
    """Cotangents of the leaves wanted, and maybe of others, by the names of `refattn.plan.leaves`, in float32.

    Raises
    ------
    Unsupported
        A row sees a number that is not finite.
    DeviceError
        As `launch.Session.run`.
    """
    given = _without_unseen(plan, given)
    q, k, v = given.q, given.k, given.v
    dq, dk, dv, slope = (np.zeros(a.shape, np.float32) for a in (q, k, v, given.lse))
    tables = {f"bias.{n}": b for n, b in enumerate(plan.bias) if isinstance(b, Table) and f"bias.{n}" in wanted}
    low, count = differences(plan)
    sums = np.zeros((q.shape[1], count))
    if dq.size and dk.size and dv.size:
        sums = _launch(plan, given, (dq, dk, dv, slope), bool(tables))
    found = {"q": dq, "k": dk, "v": dv}
    if "sink" in wanted:
        found["sink"] = of_sink(plan.sink, given.out, given.lse, given.dout.astype(np.float32), given.dlse)
    whole = slope.sum((0, 2), dtype=np.float64)
    found |= {f"bias.{n}": whole for n, b in enumerate(plan.bias) if isinstance(b, Slope)}
    for name, table in tables.items():
        found[name] = np.zeros(table.values.shape)
        found[name][:, low + table.offset : low + table.offset + count] = sums
    return found


def _launch(plan: Score, given: Pass, found: tuple[Array, ...], tabled: bool) -> Array:
    """Dq, dk, dv and the slopes' sums into these arrays; the sums of tables by difference, (Hq, n)."""
    q, k, v = given.q, given.k, given.v
    wide = all(a.shape[3] * a.dtype.itemsize % 16 == 0 for a in (q, v))
    none, whole = (np.zeros(0, q.dtype), np.zeros(0, np.float32)), operands.form_of(plan, q.dtype.name, wide)
    forms = {name: squared(whole, name)._replace(tabled=tabled and name == "rows") for name in ("rows", "keys")}
    tiles = {"rows": -(-q.shape[2] // forms["rows"].rows), "keys": -(-k.shape[2] // forms["keys"].keys)}
    heads = {"rows": q.shape[1], "keys": k.shape[1]}
    sums = np.zeros((*q.shape[:2], tiles["rows"], differences(plan)[1]) if tabled else 0, np.float32)
    y = operands.cotangents(plan, given.dout, given.out, given.lse, given.dlse, *(*found, sums))
    with launch.session() as there:
        for name, form in forms.items():
            x = operands.arguments(plan, form, q, k, v, *none)
            there.run(name, form, (x, y), (tiles[name], heads[name], q.shape[0]), ("dq", "dk", "dv", "slope"))
        there.fetch(*found[: 4 if whole.slopes else 3], *([sums] if tabled else []))
    return sums.sum((0, 2), dtype=np.float64) if tabled else sums


def _without_unseen(plan: Score, given: Pass) -> Pass:
    """The same with 0 for what is not finite in q, k, v, dout and met by no pair.

    The forward pass tells: a row that sees one of q, k or a logit that is not finite has no lse, one of v no out.
    """
    blind: Array = np.isneginf(given.lse)
    if plan.lengths is not None:
        blind |= (np.arange(given.lse.shape[2]) >= np.asarray(plan.lengths[0])[:, None])[:, None]
    seen = ~blind
    whole = [np.isfinite(a.astype(np.float32)).all(-1)[seen] for a in (given.out, given.dout)]
    if not all(a.all() for a in (*whole, np.isfinite(given.lse)[seen], np.isfinite(given.dlse)[seen])):
        raise Unsupported(
            "the cuda engine has gradients of finite numbers alone, and a row sees one that is not: ask engine='cpu'"
        )
    changed = {}
    for name in ("q", "k", "v", "dout"):
        array = getattr(given, name)
        numbers = np.isfinite(array.astype(np.float32))
        if not numbers.all():
            changed[name] = np.where(numbers, array, array.dtype.type(0))
    return given._replace(**changed)
