"""A Score plan whose keys and values are kept otherwise, as one that holds them as numbers."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from refattn.numeric import real, reshape
from refattn.plan import Score


def unpacked(plan: Score) -> Score:
    """The plan with real k and v and no scales, for kernels that read nothing else; of arrays or of tape variables."""
    named = {}
    for name, scale in (("k", plan.k_scale), ("v", plan.v_scale)):
        if scale is not None:
            # In a slot that is not read a scale may be infinite and an integer 0.
            with np.errstate(invalid="ignore", over="ignore"):
                named[name] = real(getattr(plan, name), plan.q) * reshape(scale, (*scale.shape, 1))
    return replace(plan, **named, k_scale=None, v_scale=None) if named else plan
