"""The public function `explain`: what a problem of given sizes is, before any array of it exists."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from refattn import plan as plans
from refattn import registry
from refattn.api import _present, _whole, build
from refattn.dtypes import format_of
from refattn.errors import EngineUnavailable, ShapeError, Unsupported
from refattn.spec import Spec, describe


def explain(spec: Spec, sizes: Mapping[str, int], dtype: str = "float32") -> dict[str, Any]:
    """What a problem of these sizes is: resolved spec, signature, engines, plan, operations, memory, skipping.

    Engines that take it have None, others the reason; a variant without a plan has the reason in its place. "skipping"
    is what an engine leaves out of such a problem because it is proved not to count, by engine.
    `sizes` are those of the signature: {"B": 1, "Hq": 8, "Hkv": 8, "Lq": 128, "Lk": 128, "D": 64, "Dv": 64}. The
    arrays that the spec requires are assumed, optional ones not.
    """
    whole, module = _whole(spec)
    signature = module.signature(whole)
    sizes = _present("sizes", sizes)
    missing = sorted({d for a in signature.values() if not a.optional for d in a.names} - set(sizes))
    if missing:
        raise ShapeError(f"sizes lacks {', '.join(missing)}; the signature is\n{describe(signature)}")
    for dim, size in sizes.items():
        if type(size) is not int or size < 0:
            raise ShapeError(f"sizes are integers from 0 on; given: {dim}={size!r}")
    kinds = {"real": format_of(dtype).numpy, "bool": bool}
    needed = {n: a for n, a in signature.items() if not a.optional}
    inputs = {n: np.full(a.shape(sizes), a.kind == "real", kinds.get(a.kind, a.integers)) for n, a in needed.items()}
    problem = build(whole, inputs, dtype, ("out",))
    engines: dict[str, str | None] = {}
    skipping: dict[str, str] = {}
    for name in registry.ENGINES:
        try:
            engine = registry.engine(name)
            engines[name] = engine.refuses(problem)
            skips = engine.skips(problem) if engines[name] is None and hasattr(engine, "skips") else None
            if skips is not None:
                skipping[name] = skips
        except (EngineUnavailable, Unsupported) as error:
            engines[name] = str(error)
    told = module.operations(problem.spec, sizes) if hasattr(module, "operations") else (None, None)
    return {
        "spec": problem.spec,
        "signature": {name: str(a) for name, a in signature.items()},
        "engines": engines,
        "plan": problem.unplanned or plans.describe(problem.plan),
        "operations": told[0],
        "input_bytes": sum(a.nbytes for a in inputs.values()),
        "score_matrix_bytes": told[1],
        "skipping": skipping,
    }
