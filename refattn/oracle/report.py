"""What a validation found: a line a case, and the mistakes in words."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from rich.console import Console
from rich.table import Table

from refattn.oracle.compare import Comparison

Verdict = Literal["pass", "fail", "not supported"]
COLOURS = {"pass": "green", "fail": "bold red", "not supported": "yellow"}


@dataclass(frozen=True)
class Line:
    """One case: what was compared, the verdict, and why (the backend's exception, what it lacks, what it does)."""

    case: str
    verdict: Verdict
    comparisons: tuple[Comparison, ...] = ()
    words: str = ""

    @property
    def worst_ulp(self) -> float:
        """Largest error of any output, in units of the last place."""
        return max((c.worst_ulp for c in self.comparisons), default=0.0)

    @property
    def worst_ratio(self) -> float:
        """Largest error of any output, in units of its hard bound."""
        return max((c.worst_ratio for c in self.comparisons), default=0.0)

    @property
    def outputs(self) -> tuple[str, ...]:
        """Names of what was compared."""
        return tuple(c.name for c in self.comparisons)

    def failing(self) -> tuple[str, ...]:
        """Names of the outputs beyond their bound."""
        return tuple(c.name for c in self.comparisons if c.verdict == "fail")

    def row(self) -> tuple[str, str, str, str, str]:
        """Case, largest error in ulp, in units of the bound, verdict, and what failed or was compared."""
        shown = " ".join(self.failing() or self.outputs)
        if not self.comparisons:
            return (self.case, "", "", self.verdict, self.words)
        return (self.case, f"{self.worst_ulp:.3g}", f"{self.worst_ratio:.3g}", self.verdict, shown)


@dataclass(frozen=True)
class Report:
    """The outcome of a validation.

    `findings` says, for the whole run, what the backend does differently; `mistakes` are the ids of the hypotheses
    that explain it, the one that explains most cases first.
    """

    target: str
    lines: tuple[Line, ...]
    findings: tuple[str, ...] = ()
    mistakes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """At least one case ran, and none failed; a case that is not supported is neither."""
        return bool(self.passed) and not self.failures

    @property
    def passed(self) -> list[Line]:
        """Cases within their bounds."""
        return [line for line in self.lines if line.verdict == "pass"]

    @property
    def failures(self) -> list[Line]:
        """Cases beyond their bounds, or in which the backend raised."""
        return [line for line in self.lines if line.verdict == "fail"]

    @property
    def unsupported(self) -> list[Line]:
        """Cases that need what the backend does not take."""
        return [line for line in self.lines if line.verdict == "not supported"]

    @property
    def summary(self) -> str:
        """Counts, and the worst error of the cases that pass."""
        counts = f"{len(self.passed)} pass, {len(self.failures)} fail, {len(self.unsupported)} not supported"
        worst = max((line.worst_ratio for line in self.passed), default=0.0)
        gradients = sum(any(n.startswith("d") for n in line.outputs) for line in self.lines)
        return f"{self.target}: {counts}; worst passing error {worst:.3g} of its bound; gradients in {gradients} cases"

    def table(self) -> Table:
        """A rich table, one row a case."""
        table = Table(box=None)
        for heading in ("case", "ulp", "of bound", "verdict", ""):
            table.add_column(heading, justify="right" if heading in ("ulp", "of bound") else "left", overflow="fold")
        for line in self.lines:
            table.add_row(*line.row(), style=None if line.verdict == "pass" else COLOURS[line.verdict])
        return table

    def to_json(self) -> dict[str, Any]:
        """Everything, as plain data; infinite ratios as the string "inf"."""
        lines = [asdict(line) for line in self.lines]
        for line in lines:
            for c in line["comparisons"]:
                c["worst_ratio"] = "inf" if c["worst_ratio"] == float("inf") else c["worst_ratio"]
        head = {"target": self.target, "ok": self.ok, "summary": self.summary}
        return head | {"findings": list(self.findings), "mistakes": list(self.mistakes), "cases": lines}

    def __repr__(self) -> str:
        """The table and the findings as text."""
        console = Console(width=140, color_system=None)
        with console.capture() as capture:
            console.print(self.table())
            for text in (self.summary, *self.findings):
                console.print(text, markup=False, highlight=False)
        return capture.get()
