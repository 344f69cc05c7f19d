"""A Recurrent plan as its kernel takes it, and its run."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.engines.cuda import launch
from refattn.engines.cuda.kernels.form import Form, chunked
from refattn.engines.cuda.kernels.recurrent import Recurrence
from refattn.plan import Recurrent

MOST = 512  # features, for the sums of more would not fit the registers


def refuses(plan: Recurrent) -> str | None:
    """What of a plan the kernel has not, as the end of a sentence, or None."""
    features = plan.q.shape[3]
    if not 1 <= features <= MOST:
        return f"memories of no features, or of more than {MOST}"
    if max(features, plan.v.shape[3]) * max(plan.k.shape[2], features) >= 1 << 31:
        return "so many keys that an index has more than 32 bits"
    return None


def run(plan: Recurrent) -> NDArray[np.float32]:
    """Out (B,Hq,Lq,Dv) of arrays of the host, computed in float32.

    Raises
    ------
    DeviceError
        As `launch.Session.run`.
    """
    out = np.zeros((*plan.q.shape[:3], plan.v.shape[3]), np.float32)
    if out.size:
        form, x = form_of(plan), arguments(plan, out)
        with launch.session() as there:
            there.run("recur", form, (x,), (-(-form.width // form.keys), plan.k.shape[1], len(out)), ("out",))
            there.fetch(out)
    return out


def form_of(plan: Recurrent) -> Form:
    """The form of a plan."""
    options = {"divided": plan.weight is not None, "moved": plan.transition is not None}
    return chunked(plan.q.shape[3], plan.v.shape[3], delta=plan.delta, weighed=plan.weighed, **options)


def arguments(plan: Recurrent, out: Any) -> Recurrence:
    """What the kernel is called with."""
    moved = None if plan.transition is None else plan.transition.T
    q, k, v, memory, weight, transition = (
        np.zeros(0, np.float32) if a is None else np.array(a, np.float32, order="C")
        for a in (plan.q, plan.k, plan.v, plan.memory, plan.weight, moved)
    )
    return Recurrence(
        q=q,
        k=k,
        v=v,
        out=out,
        memory=memory,
        weight=weight,
        transition=transition,
        pages=np.zeros(0, np.int32),
        heads=q.shape[1],
        share=q.shape[1] // k.shape[1],
        lq=q.shape[2],
        lk=k.shape[2],
        segment=plan.segment,
        clamp=np.float32(plan.clamp),
        add=np.float32(plan.add),
    )
