"""What a backend does differently, in words: the few alternatives that explain its failures, and what remains."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from refattn.errors import RefattnError
from refattn.golden.load import Golden
from refattn.oracle.aftermath import AFTERMATH
from refattn.oracle.alternatives import OUT_OF_PLACE, Alternative, Failure
from refattn.oracle.compare import Comparison, published, ratios
from refattn.oracle.dropped import DROPPED
from refattn.oracle.hypotheses import SCORES
from refattn.oracle.precision import PRECISION, accumulator
from refattn.oracle.texts import TEXTS

LIBRARY = (*SCORES, *TEXTS, *AFTERMATH, *PRECISION, *DROPPED)
ROUNDING = "sums accumulated in "
NEAR = 32  # bounds of the case: an alternative's own bound may be larger, as that of scores without a scale is
SEARCHED = 16  # failing cases, the smallest first, on which the whole library is tried


@dataclass(frozen=True)
class Explanation:
    """An alternative that a failing case agrees with: worst error before and after, in units of the bound.

    `share`: of the outputs that fail, the part that it explains.
    """

    key: str
    words: str
    before: float
    after: float
    share: float

    def __str__(self) -> str:
        """The sentence a line of the report shows."""
        if self.before >= OUT_OF_PLACE:
            return f"it computes {self.words} (which leaves nothing out of place)"
        times = "all of it" if self.after == 0 else f"all but 1/{self.before / self.after:.3g} of the worst error"
        return f"it computes {self.words} (which explains {times})"


@dataclass(frozen=True)
class Verdict:
    """Words for each failing case by its name; what is true of the whole run; ids of the mistakes, most cases first."""

    words: dict[str, str]
    findings: tuple[str, ...]
    mistakes: tuple[str, ...]


def explanations(failure: Failure, found: Sequence[Comparison], keys: Iterable[str] = ()) -> list[Explanation]:
    """Every alternative (or those named by `keys`) that a failing case agrees with, best first.

    An alternative explains when all outputs it speaks of, every failing one that it changes among them, come within
    the bound and at most half as far as before, or near it and 32 times closer: what is not the cause leaves the
    error as it was.
    """
    wanted, agreed = set(keys), []
    for hypothesis in LIBRARY:
        for other in hypothesis(failure):
            if wanted and other.key not in wanted:
                continue
            explained = _tried(failure, found, other)
            if explained is not None:
                agreed.append(explained)
    return sorted(agreed, key=lambda e: (-e.share, e.after))


def _tried(failure: Failure, found: Sequence[Comparison], other: Alternative) -> Explanation | None:
    names = [n for n in failure.results if not other.only or n in other.only]
    failing = {c.name for c in found if c.verdict == "fail"}
    if not failing & set(names):
        return None
    try:
        values = failure.evaluate(other)
    except RefattnError:  # the changed problem is no problem: this backend cannot have computed it
        return None
    names = [n for n in names if n in values]
    before = failure.worst(failure.golden.expected, names)
    after = failure.worst(values, names)
    if (after <= 1 and 2 * after <= before) or (after <= NEAR and 32 * after <= before):
        return Explanation(other.key, other.words, before, after, len(failing & set(names)) / len(failing))
    return None


class Diagnosis:
    """Collects failing cases, then explains as many as possible by as few alternatives as possible."""

    def __init__(self) -> None:
        self._failures: list[tuple[Failure, tuple[Comparison, ...]]] = []

    def note(self, golden: Golden, results: Any, found: tuple[Comparison, ...]) -> None:
        """Keep the results of a failing case."""
        kept = {c.name: published(golden, c.name, results[c.name]) for c in found}
        self._failures.append((Failure(golden, kept), found))

    def explain(self) -> Verdict:
        """Explain all failing cases together."""
        cases = sorted(self._failures, key=lambda pair: _work(pair[0].golden))
        agreed = {f.golden.name: explanations(f, found) for f, found in cases[:SEARCHED]}
        chosen = _cover(agreed)
        for f, found in cases[SEARCHED:]:
            agreed[f.golden.name] = explanations(f, found, chosen) if chosen else []
        words, counts = {}, dict.fromkeys(chosen, 0)
        first: dict[str, str] = {}
        for f, found in cases:
            best = next((e for key in chosen for e in agreed[f.golden.name] if e.key == key), None)
            if best is None:
                words[f.golden.name] = _rounding(f, found) or _symptom(f, found)
            else:
                words[f.golden.name] = str(best)
                counts[best.key] += 1
                first.setdefault(best.key, f"{best.words}, as in {f.golden.name}")
        short = {text.removeprefix(ROUNDING).partition(":")[0] for text in words.values() if text.startswith(ROUNDING)}
        mistakes = (*(key for key in chosen if counts[key]), *(f"{name}_accumulator" for name in sorted(short)))
        return Verdict(words, tuple(_findings(words, counts, first, len(cases))), mistakes)


def _cover(agreed: dict[str, list[Explanation]]) -> list[str]:
    """Keys that between them explain every case that has an explanation, the most telling first."""
    keys = list(dict.fromkeys(e.key for found in agreed.values() for e in found))
    open_, chosen = {name for name, found in agreed.items() if found}, []
    while open_:
        votes = {k: [e.share for n in open_ for e in agreed[n] if e.key == k] for k in keys}
        best = max(keys, key=lambda k: (sum(votes[k]), len(votes[k]), -_closest(agreed, open_, k)))
        chosen.append(best)
        open_ = {n for n in open_ if all(e.key != best for e in agreed[n])}
    return chosen


def _closest(agreed: dict[str, list[Explanation]], names: set[str], key: str) -> float:
    return max((e.after for n in names for e in agreed[n] if e.key == key), default=np.inf)


def _findings(words: dict[str, str], counts: dict[str, int], first: dict[str, str], total: int) -> Iterable[str]:
    for key, count in counts.items():
        if count:
            yield f"your output equals {first[key]}: {count} of {total} failing cases"
    rest: dict[str, list[str]] = {}
    for name, text in words.items():
        if not text.startswith("it computes "):
            rest.setdefault(text if text.startswith(ROUNDING) else "", []).append(name)
    for text, names in rest.items():
        if text:
            yield f"your output has {text}: {len(names)} of {total} failing cases"
        else:
            known = f"{len(names)} of {total} failing cases differ in a way the library does not know"
            yield f"{known}: {names[0]}: {words[names[0]]}"


def _rounding(f: Failure, found: Sequence[Comparison]) -> str:
    """Words where out fails and its errors look like those of a short accumulator."""
    short = accumulator(f) if any(c.name == "out" and c.verdict == "fail" for c in found) else ""
    return short and f"{ROUNDING}{short}: errors of the size and spread of that rounding"


def _symptom(f: Failure, found: Sequence[Comparison]) -> str:
    """Where a case differs first, and what the outputs that are right say of it."""
    failing = {c.name for c in found if c.verdict == "fail"}
    right = {c.name for c in found} - failing
    if "lse" in failing:
        place = "scores, mask or normaliser: lse is wrong already"
    elif "out" in failing:
        place = "the weighted sum of the values: lse is right" if "lse" in right else "out"
    elif failing <= {"dq", "dk", "dbias", "dsink", "dslopes"} and "dv" in right:
        place = "the gradient of the scores: out and dv are right"
    else:
        place = f"the gradients {', '.join(sorted(failing))}: out is right"
    name = next(n for n in ("lse", "out", *sorted(failing)) if n in failing)
    far = ratios(f.golden, name, f.results[name]) > 1
    where = ""
    if far.ndim >= 3:
        heads, rows = (np.unique(np.nonzero(far)[axis]) for axis in (1, 2))
        where = f", heads {_few(heads)}, published rows {_few(rows)}"
    why = next(c.why for c in found if c.name == name)
    return f"differs first in {place}; {int(far.sum())} of {far.size} elements of {name}{where}; worst: {why}"


def _few(numbers: Any) -> str:
    shown = ", ".join(str(n) for n in numbers[:4])
    return f"{shown}, ... ({len(numbers)})" if len(numbers) > 4 else shown


def _work(golden: Golden) -> int:
    s = golden.sizes
    rows = s["Lq"] if golden.rows is None else len(golden.rows.q)
    return s["B"] * s["Hq"] * rows * s["Lk"]
