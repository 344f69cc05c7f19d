"""`make claims`: measure every claim, print the paper's figure beside ours, write docs/claims.md and its pictures."""

from __future__ import annotations

import io
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from claims.claim import NotThere, Result

ORDER = (
    "alibi_slopes",
    "bias_memory",
    "windows",
    "sandwich_curve",
    "nope_variance",
    "alignment_temperature",
    "infinity_memory",
    "infini_memory",
    "sketching",
    "exact_laws",
)
DOCS = Path(__file__).resolve().parents[2] / "docs"
HEAD = """\
# Claims

What the founding papers claim and a CPU can check, found again by `make claims` through refattn's public functions,
with no training. Each row has the paper's figure beside ours, and says so where a claim does not reproduce. Figures of
the papers are as recalled; perplexities and accuracies of trained models are out of reach here. The code is in
`tools/claims`, one file a section.
"""


def page(sections: dict[str, Result | str], pictures: set[str]) -> str:
    """The Markdown of all sections, in order."""
    return "\n".join([HEAD, *(section(name, found, name in pictures) for name, found in sections.items())])


def section(name: str, found: Result | str, picture: bool = False) -> str:
    """One claim: its table, how it was measured, its picture; or the sentence in its place."""
    title = f"## {import_module(f'claims.{name}').TITLE}\n"
    if isinstance(found, str):
        return f"{title}\n{found}\n"
    lines = ["| claim | paper | here | reproduced |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in row)} |" for row in found.rows]
    shown = f"\n![{import_module(f'claims.{name}').TITLE}](claims/{name}.png)\n" if picture else ""
    return "\n".join([title, *lines, "", found.how, shown])


def whole(path: Path, content: bytes) -> None:
    """Write a file, all of it or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(content)
    part.replace(path)


def picture(draw: Any) -> bytes:
    """A PNG with the same bytes for the same numbers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=90, layout="constrained")
    draw(figure)
    for axes in figure.axes:
        axes.grid(True, lw=0.3)
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def main() -> int:
    """Run, write, and return how many claims crashed."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, sections, pictures, crashed = Console(), {}, {}, 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("left"), console=console) as bar:
        task = bar.add_task("claims", total=len(ORDER))
        for name in ORDER:
            bar.update(task, description=name)
            try:
                found = import_module(f"claims.{name}").measure()
                sections[name] = found
                if found.draw:
                    pictures[name] = picture(found.draw)
                bar.console.print(table(import_module(f"claims.{name}").TITLE, found))
            except NotThere as missing:
                sections[name] = f"Not measured: {missing}."
                bar.console.print(f"{name}: {missing}", style="yellow")
            except Exception:
                crashed += 1
                bar.console.print(f"{name} crashed\n{traceback.format_exc()}", style="red", markup=False)
            bar.advance(task)
    if crashed:
        console.print(f"{crashed} claims crashed; nothing was written", style="bold red")
        return 1
    for name, png in pictures.items():
        whole(DOCS / "claims" / f"{name}.png", png)
    whole(DOCS / "claims.md", page(sections, set(pictures)).encode())
    rows = [row for found in sections.values() if isinstance(found, Result) for row in found.rows]
    missed = [row for row in rows if row.reproduced != "yes"]
    console.print(f"{len(rows) - len(missed)} of {len(rows)} reproduce; written to docs/claims.md", style="bold green")
    for row in missed:
        console.print(f"  {row.claim}: {row.reproduced}", markup=False)
    return 0


def table(title: str, found: Result) -> Any:
    """What the terminal shows of a claim."""
    from rich.table import Table

    shown = Table("claim", "paper", "here", "reproduced", title=title)
    for row in found.rows:
        shown.add_row(*row, style=None if row.reproduced == "yes" else "yellow")
    return shown


if __name__ == "__main__":
    sys.exit(main())
