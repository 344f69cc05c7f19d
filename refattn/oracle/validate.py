"""The suite against one backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from refattn.errors import RefattnError, SpecError
from refattn.golden import build, inputs
from refattn.golden.load import Golden, folder_of_suite, load, names
from refattn.oracle.adapters import Target, resolve
from refattn.oracle.compare import compare
from refattn.oracle.diagnose import Diagnosis
from refattn.oracle.frameworks import ARRAYS, call, framework
from refattn.oracle.offer import Declared, declared, offer
from refattn.oracle.report import Line, Report
from refattn.profiles import PROFILES

Progress = Callable[[int, int, Line], None]


def validate(
    fn: Callable[..., Any] | str,
    *,
    suite: str = "core",
    arrays: str | None = None,
    profile: str | None = None,
    folder: Path | None = None,
    cases: str = "*",
    progress: Progress | None = None,
) -> Report:
    """Run the golden suite against a backend; where it fails, say what it does differently.

    Parameters
    ----------
    fn : callable or str
        Called `fn(q=, k=, v=, **options)` with the names of `refattn.attention`, each option only where the case uses
        it and passed only if the signature declares it (**options declares all): causal "top_left" or "bottom_right";
        window (left, right); scale where it is not D^-1/2; softcap; bias, dense; mask; sink; segment_ids, a pair;
        q_lengths, kv_lengths, q_positions, k_positions; keep (mask, probability); alibi_slopes (Hq,), else a dense
        bias; normalizer "sigmoid" and its sigmoid_bias; int8 k and v with k_scale and v_scale; k and v in blocks
        with block_table and kv_lengths; rotary, and content, terms as plain data, {"variant": "rope", "pairing":
        "half", ...}, and their arrays by name. A parameter `dout` (and `dlse`) receives the cotangents, so that
        gradients can be returned.
        A variant beside SDPA is asked by the names of its own arrays and options, all of which fn must declare.
        Returns out, or a mapping with out, lse, dq, dk, dv, dbias, dsink, ...; NotImplementedError declines a case.
        A string names an adapter such as "torch:sdpa", or "package.module:function".
    arrays : "numpy", "torch" or "jax"
        What fn is given; default: what the adapter needs, else NumPy. With torch and JAX gradients come from their
        own differentiation unless fn returns them.
    profile : a name in `refattn.profiles.PROFILES`, such as "float32" or "flash-bf16"
        The precision whose hard bound applies; default: that of each case's dtype.
    folder : Path
        A suite's folder; default: the committed one.
    cases : str
        A pattern of case names, such as "alibi/*".
    progress : callable
        progress(done, total, line) after each case.

    Returns
    -------
    Report

    Raises
    ------
    SpecError
        fn, arrays, profile or cases name nothing.
    EngineUnavailable
        The framework is not installed.
    GoldenFormatError
        The suite is missing or damaged.
    """
    target = resolve(fn) if isinstance(fn, str) else Target(_name_of(fn), fn, "numpy")
    kind = arrays or target.arrays
    if kind not in ARRAYS:
        raise SpecError(f"arrays is one of {', '.join(ARRAYS)}; given: {kind!r}")
    if profile is not None and profile not in PROFILES:
        raise SpecError(f"profile is one of {', '.join(PROFILES)}; given: {profile!r}")
    takes = declared(target.fn)
    framework(kind)
    folder = folder or folder_of_suite(suite)
    chosen = [name for name in names(suite, folder) if fnmatch(name, cases)]
    if not chosen:
        raise SpecError(f"no case matches {cases!r}; `refattn golden list` names them")
    diagnosis, lines = Diagnosis(), []
    for done, name in enumerate(chosen, 1):
        golden = load(name, folder)
        line = _run(golden if profile is None else _with_profile(golden, profile), target.fn, takes, kind, diagnosis)
        lines.append(line)
        if progress is not None:
            progress(done, len(chosen), line)
    verdict = diagnosis.explain()
    explained = tuple(replace(line, words=verdict.words.get(line.case, line.words)) for line in lines)
    return Report(target.name, explained, verdict.findings, verdict.mistakes)


def _run(golden: Golden, fn: Callable[..., Any], takes: Declared, kind: str, diagnosis: Diagnosis) -> Line:
    try:
        asked = offer(golden, takes)
        results = call(fn, takes, asked, golden.cotangents(), kind)
        found = tuple(compare(golden, results))
    except NotImplementedError as error:
        return Line(golden.name, "not supported", words=_one_line(error))
    except Exception as error:  # whatever a foreign function raises is its answer to the case
        name = "" if isinstance(error, RefattnError) else f"{type(error).__name__}: "
        return Line(golden.name, "fail", words=f"raised {name}{_one_line(error)}")
    if all(c.verdict == "pass" for c in found):
        return Line(golden.name, "pass", found)
    if _of_reals(golden.spec):  # what may be wrong with anything else nobody has written down
        diagnosis.note(golden, results, found)
    return Line(golden.name, "fail", found)


def _of_reals(spec: Any) -> bool:
    """Whether a case is a softmax over keys and values that are real numbers in a row."""
    return bool(spec.variant == "sdpa" and spec.normalizer == "softmax" and spec.kv is None and not spec.paged)


def _with_profile(golden: Golden, profile: str) -> Golden:
    case = golden.case()
    problem = build.problem_of(case, golden.inputs())
    duals = inputs.cotangents(case)
    wrt = tuple(problem.real_inputs()) if duals else ()
    limits = build.bounds(problem, duals, wrt, PROFILES[profile])
    return replace(golden, profile=profile, bound={n: build.rows_of(case, n, limits[n]) for n in golden.expected})


def _name_of(fn: Any) -> str:
    return f"{getattr(fn, '__module__', '')}:{getattr(fn, '__qualname__', type(fn).__name__)}"


def _one_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).strip().splitlines()[0]
