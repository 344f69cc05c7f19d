"""`refattn golden`: list, generate, verify, audit and compare golden files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

import refattn
from refattn.case import Case
from refattn.engines.certified import TIERS
from refattn.errors import SpecError
from refattn.golden import audit as auditing
from refattn.golden import errata, load, suite
from refattn.golden import verify as verifying
from refattn.golden.build import Tally
from refattn.golden.generate import generate as generate_suite
from refattn.golden.load import CORE

app = typer.Typer(no_args_is_help=True, help="Certified golden files.", pretty_exceptions_enable=False)
console = Console()

Pattern = Annotated[str, typer.Option("--cases", help="only cases whose name matches this pattern, such as 'alibi/*'")]
Folder = Annotated[Path | None, typer.Option("--folder", help="the suite's folder; default: the committed one")]
Suite = Annotated[str, typer.Option("--suite", help="core, or large, of which only recipes and hashes are stored")]
Jobs = Annotated[int | None, typer.Option("--jobs", help="processes; default: one a core", min=1)]


@app.command("list")
def list_(folder: Folder = None, cases: Pattern = "*", of: Suite = CORE) -> None:
    """Name the committed cases: dtype, sizes, flags, and the mistake each is there to catch."""
    table = Table(box=None)
    for heading in ("case", "dtype", "Lq × Lk"):
        table.add_column(heading, no_wrap=True)
    table.add_column("the mistake it catches, and its flags")
    folder = folder or load.folder_of_suite(of)
    chosen = [name for name in load.names(of, folder) if fnmatch(name, cases)]
    for name in chosen:
        manifest = load.read_manifest(folder / f"{name}.json")
        lengths = " × ".join(str(manifest["sizes"][dim]) for dim in ("Lq", "Lk", "L") if dim in manifest["sizes"])
        about = Text.assemble(manifest["catches"], "\n", (" ".join(manifest["flags"]), "dim"))
        table.add_row(name, manifest["dtype"], lengths, about)
    console.print(table)
    console.print(f"{len(chosen)} cases")


@app.command()
def verify(folder: Folder = None, cases: Pattern = "*", jobs: Jobs = None, of: Suite = CORE) -> None:
    """Regenerate the cases, prove every number again, and compare each byte with the committed files."""
    folder = folder or load.folder_of_suite(of)
    todo = _chosen(cases, of)
    tallies: list[Tally] = []
    with _progress("verifying", len(todo)) as step:

        def done(case: Case, built: Any) -> None:
            tallies.append(built.tally)
            step(case.name)

        differences = verifying.verify(folder, todo, jobs, done)
    _print_tallies(tallies)
    if differences:
        for difference in differences:
            console.print(f"  {difference.file} {difference.what}", style="red", markup=False)
        console.print(f"{len(differences)} differences from the committed files", style="bold red")
        raise typer.Exit(1)
    console.print("identical to the committed files", style="bold green")


@app.command()
def generate(
    folder: Annotated[Path | None, typer.Option("--folder", help="where to write; default: golden/v1")] = None,
    cases: Pattern = "*",
    jobs: Jobs = None,
    of: Suite = CORE,
    erratum: Annotated[str, typer.Option("--erratum", help="why released files change")] = "",
) -> None:
    """Generate and certify a suite; a run that was stopped goes on where it was."""
    folder = folder or Path("golden") / load.folder_name(of)
    todo = _chosen(cases, of)
    tallies: list[Tally] = []
    with _progress("generating", len(todo)) as step:

        def done(case: Case, built: Any) -> None:
            if built is not None:
                tallies.append(built.tally)
            step(case.name)

        generate_suite(folder, todo, jobs, done, erratum)
    _print_tallies(tallies)
    kept = len(todo) - len(tallies)
    console.print(f"written to {folder}" + (f"; {kept} cases were finished by an earlier run" if kept else ""))


@app.command()
def release(folder: Folder = None, of: Suite = CORE) -> None:
    """Record the hashes of every case that is new: from now on its files change only with an erratum."""
    folder = folder or load.folder_of_suite(of)
    count = errata.release(folder, refattn.__version__)
    console.print(f"{count} cases are new in the record of {folder}", highlight=False)


@app.command()
def audit(
    *,
    folder: Folder = None,
    cases: Pattern = "*",
    bits: Annotated[int, typer.Option("--arb", help="bits of the balls that recompute every value", min=192)] = 1024,
    seeds: Annotated[int, typer.Option("--seeds", help="audit the fast tiers on so many other seeds instead")] = 0,
    jobs: Jobs = None,
    of: Suite = CORE,
) -> None:
    """Recompute committed values on balls with far more bits than they were made with; of large cases, some rows."""
    if seeds:
        todo = auditing.jobs_of_seeds(_chosen(cases, of), seeds, bits)
    else:
        folder = folder or load.folder_of_suite(of)
        todo = auditing.jobs_of(folder, [name for name in load.names(of, folder) if fnmatch(name, cases)], bits)
    findings = []
    with _progress("auditing", len(todo)) as step:
        for finding in auditing.audit_all(todo, jobs):
            findings.append(finding)
            step(finding.name)
    for finding in findings:
        if finding.note:
            console.print(f"  {finding.name}: {finding.note}", style="dim", markup=False)
    wrong = [f for f in findings if f.wrong]
    for finding in wrong:
        console.print(f"  {finding.name}: {'; '.join(finding.wrong)}", style="red", markup=False)
    elements = sum(f.elements for f in findings)
    console.print(f"{len(findings)} cases, {elements:,} values recomputed at {bits} bits, {len(wrong)} cases refuted")
    if wrong:
        raise typer.Exit(1)


@app.command()
def compare(
    file: Annotated[Path, typer.Argument(help="safetensors file with out, lse, dq, ... as your backend computed them")],
    case: Annotated[str, typer.Option("--case", help="the case they answer; default: the file's name")] = "",
    folder: Folder = None,
) -> None:
    """Compare a file of results, written by any language, with a case's certified values and bounds."""
    from refattn.golden.store import read_bytes, read_safetensors
    from refattn.oracle.compare import compare as compare_results

    golden = load.load(case or file.stem.replace("__", "/"), folder)
    remedy = "write out, lse, dq, ... with any safetensors library"
    comparisons = compare_results(golden, read_safetensors(read_bytes(file, remedy), str(file), remedy))
    for c in comparisons:
        line = f"{c.name}: worst {c.worst_ulp:.3g} ulp, {c.worst_ratio:.3g} of the bound, {c.verdict}"
        console.print(line, markup=False)
    if not comparisons or any(c.verdict != "pass" for c in comparisons):
        raise typer.Exit(1)


def _chosen(pattern: str, of: str) -> list[Case]:
    chosen = [case for case in suite.cases(of) if fnmatch(case.name, pattern)]
    if not chosen:
        raise SpecError(f"no case matches {pattern!r}; `refattn golden list` names them")
    return chosen


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[str], None]]:
    """A progress bar with the time left; the step function is told what has just been done."""
    columns = (
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), TextColumn("{task.fields[last]}"),
    )  # fmt: skip
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task(what, total=total, last="")
        yield lambda name: progress.update(task, advance=1, last=name)


def _print_tallies(tallies: list[Tally]) -> None:
    """Cases, elements, how each was certified, worst distance, size; one row a folder and a total."""
    table = Table(box=None)
    for heading in ("group", "cases", "elements", "rounded", "exact", "identity", "NaN", "distance", "KiB"):
        table.add_column(heading, justify="left" if heading == "group" else "right")
    groups = sorted({t.name.partition("/")[0] for t in tallies})
    for group in groups:
        _row(table, group, [t for t in tallies if t.name.startswith(f"{group}/")])
    table.add_section()
    _row(table, "total", tallies)
    console.print(table)
    seconds = sum(t.seconds for t in tallies)
    tiers = {label: sum(t.tiers[label] for t in tallies) for label in TIERS}
    console.print("decided by " + ", ".join(f"{label} {count:,}" for label, count in tiers.items() if count))
    console.print(
        "rounded: correctly rounded, proved; exact: a double, proved equal;\n"
        "identity: a double or a tie by an identity, proved over a prime field; NaN: asked by convention;\n"
        "distance: worst |float64 reference − certified| in units of its float64 bound,\n"
        f"which every value was checked against. {seconds:.1f} seconds of work",
        highlight=False,
    )


def _row(table: Table, group: str, tallies: list[Tally]) -> None:
    labels = ("correctly_rounded", "exact", "identity", "propagated")
    status = {label: sum(t.status[label] for t in tallies) for label in labels}
    worst = max((t.distance for t in tallies), default=0.0)
    table.add_row(
        group, str(len(tallies)), f"{sum(t.elements for t in tallies):,}", *(f"{n:,}" for n in status.values()),
        f"{worst:.3f}", f"{sum(t.size for t in tallies) / 1024:,.0f}",
    )  # fmt: skip


