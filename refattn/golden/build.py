"""One case from its recipes to certified tensors and manifest: the same bytes on every machine."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn import api, registry
from refattn.bound import Bounded, BoundSpace
from refattn.case import NORMAL, Case, as_json
from refattn.dtypes import format_of, round_up_bfloat16
from refattn.engines import certified, reference
from refattn.errors import GoldenError, SpecError, Undecided
from refattn.files import safetensors_bytes
from refattn.golden import inputs as recipes
from refattn.golden.condition import condition
from refattn.golden.store import METADATA, json_bytes
from refattn.problem import WIDE, Problem, inner_outputs
from refattn.profiles import PROFILE_OF, PROFILES

SCHEMA = "refattn.golden/1"


@dataclass(frozen=True)
class Tally:
    """What the run's report says of a case; none of it is stored."""

    name: str
    elements: int
    status: Mapping[str, int]
    tiers: Mapping[str, int]
    distance: float
    size: int
    seconds: float


@dataclass(frozen=True)
class Built:
    """A case's two files and its tally."""

    manifest: bytes
    tensors: bytes
    tally: Tally


def build(case: Case) -> Built:
    """Generate, certify and bound one case.

    Raises
    ------
    GoldenError
        Some of its values are neither decided nor proved identities: such a case is not published.
    """
    start = time.perf_counter()
    arrays, weights = recipes.inputs(case), recipes.cotangents(case)
    problem = problem_of(case, arrays)
    wrt = tuple(problem.real_inputs()) if weights else ()
    found = certified.certify(problem, weights, wrt)
    wanted = {n for n in found if n in case.want or (n.startswith("state_") and "state" in case.want)}
    names = [n for n in found if n in wanted or n.startswith("d")]
    limits = bounds(problem, weights, wrt, PROFILES[PROFILE_OF[case.dtype]])
    plain = reference.vjp(problem, weights, wrt)

    tensors: dict[str, NDArray[Any]] = {}
    status: dict[str, Any] = {}
    tally = {"elements": 0, "distance": 0.0}
    counts, tiers = dict.fromkeys(certified.STATUS, 0), dict.fromkeys(certified.TIERS, 0)
    for name in names:
        certificate = certified.Certificate(*(rows_of(case, name, a) for a in vars(found[name]).values()))
        tensors[name] = certificate.value
        limit = np.where(np.isfinite(certificate.value), rows_of(case, name, limits[name]), 0.0)
        tensors[f"{name}.bound"] = round_up_bfloat16(limit)
        if case.dtype == "float64":
            tensors[f"{name}.nearest"] = certificate.rne
        status[name] = _status(case.name, name, certificate)
        tally["elements"] += certificate.value.size
        tally["distance"] = max(tally["distance"], _distance(certificate, rows_of(case, name, plain[name])))
        for code, label in enumerate(certified.STATUS):
            counts[label] += int((certificate.status == code).sum())
        for code, label in enumerate(certified.TIERS):
            tiers[label] += int((certificate.tier == code).sum())
    kappa = condition(problem, weights, {name: certificate.value for name, certificate in found.items()})
    manifest = json_bytes(
        _manifest(case, problem, arrays=arrays, weights=weights, tensors=tensors, status=status)
        | ({} if kappa is None else {"condition": kappa})
    )
    packed = safetensors_bytes(tensors, METADATA)
    seconds = time.perf_counter() - start
    size = len(manifest) + len(packed)
    elements, distance = int(tally["elements"]), tally["distance"]
    return Built(manifest, packed, Tally(case.name, elements, counts, tiers, distance, size, seconds))


def problem_of(case: Case, arrays: Mapping[str, NDArray[Any]]) -> Problem:
    """The checked problem of a case, restricted to its published query rows."""
    spec, module = registry.whole(case.spec)
    inside = [name for name in case.want if name in inner_outputs(module, spec)]
    problem = api.build(case.spec, arrays, case.dtype, ("out", *inside), case.history)
    return problem if case.rows is None else problem.restricted(case.rows.q)


def rows_of(case: Case, name: str, array: NDArray[Any]) -> NDArray[Any]:
    """The published part of an output: the problem has the chosen query rows already, keys are picked here."""
    return array[:, :, list(case.rows.k)] if case.rows is not None and name in ("dk", "dv") else array


def bounds(problem: Problem, weights: Mapping[str, Any], wrt: tuple[str, ...], profile: Any) -> dict[str, Any]:
    """Hard bound per element: the running bound of the variant's text under the profile, and one output rounding."""
    space = BoundSpace(profile)
    with np.errstate(invalid="ignore", over="ignore", under="ignore", divide="ignore"):
        try:
            found = problem.differentiate(space.real, weights, wrt)
        except Undecided as error:
            raise SpecError(
                f"a choice in this {problem.spec.variant} problem hangs on less than what a {profile.name} kernel may "
                f"be off by, so it has no verdict: give inputs that are further apart ({error})"
            ) from None
        limits = {name: _with_output_rounding(name, b, problem) for name, b in found.items()}
    # An index is the right one or a wrong one.
    return limits | {name: np.zeros(found[name].shape) for name in problem.integer_outputs}


def _with_output_rounding(name: str, b: Bounded, problem: Problem) -> NDArray[np.float64]:
    wide = name in WIDE or name[1:] in recipes.FLOAT32_INPUTS
    fmt = format_of("float32" if wide and problem.dtype != np.float64 else problem.dtype)
    rounding = 0.0 if b.settled else 2.0**-fmt.precision * (np.abs(b.x) + 2 * b.e) + 2.0 ** (fmt.emin - fmt.precision)
    total = np.where((b.e == 0) & (b.x == 0), 0.0, b.e + rounding)
    # −∞ is the exact lse of an empty row; anything else that is not finite has overflowed.
    return np.where(np.isneginf(b.x), 0.0, np.where(np.isfinite(b.x), total, np.inf))


def _distance(certificate: certified.Certificate, plain: NDArray[np.float64]) -> float:
    """Worst distance between the float64 reference and the certified value, in units of the float64 bound."""
    ok = np.isfinite(certificate.value)
    gap = np.abs(plain[ok] - certificate.value[ok])
    limit = (certificate.bound + np.spacing(np.abs(certificate.value)) + certificate.width)[ok]
    return float((gap / limit).max(initial=0.0))


def _status(case: str, output: str, certificate: certified.Certificate) -> dict[str, Any]:
    """What is true of an output whatever the precision of the run."""
    open_, same = (np.flatnonzero(certificate.status == code) for code in (certified.ENCLOSED, certified.IDENTITY))
    if open_.size:
        raise GoldenError(
            f"{case}, {output}: elements {open_.tolist()} stay undecided at {certified.BITS[-1]} bits, and the "
            f"exactness test proves no identity; they lie within {certificate.width.max():.3g} of what balls say. "
            "Change the case: a value that is not proved is not published"
        )
    entry: dict[str, Any] = {"status": "correctly_rounded"}
    return entry | ({"identity": same.tolist()} if same.size else {})


def _manifest(
    case: Case, problem: Problem, *, arrays: Any, weights: Any, tensors: Mapping[str, Any], status: Mapping[str, Any]
) -> dict[str, Any]:
    def described(name: str, array: NDArray[Any], recipe: Any) -> dict[str, Any]:
        return {
            "shape": list(array.shape),
            "dtype": array.dtype.name,
            "recipe": as_json(recipe),
            "sha256": recipes.sha256(array),
        }

    given = {n: described(n, a, case.inputs.get(n, NORMAL)) for n, a in arrays.items()}
    duals = {n: described(n, a, case.cotangents.get(f"d{n}", NORMAL)) for n, a in weights.items()}
    outputs = {
        n: entry | {"shape": list(tensors[n].shape), "sha256": recipes.sha256(tensors[n])}
        for n, entry in status.items()
    }
    for name in problem.integer_outputs & outputs.keys():
        outputs[name]["kind"] = "int"
    manifest = {
        "schema": SCHEMA,
        "id": case.name,
        "flags": sorted(case.flags),
        "catches": case.catches,
        "spec": problem.spec.to_json(),
        "sizes": dict(case.sizes),
        "dtype": case.dtype,
        "seed": case.seed,
        "profile": PROFILE_OF[case.dtype],
        "inputs": given,
        "cotangents": duals,
        "outputs": outputs,
        "conventions": {"empty_row": "zero", "lse_base": "e", "overflow": case.overflow, "rounding": "odd"},
    }
    if case.suite != "core":
        manifest["suite"] = case.suite
    if case.history:
        manifest["history"] = case.history
    if case.rows is not None:
        manifest["rows"] = {"q": list(case.rows.q), "k": list(case.rows.k)}
    return manifest
