"""The command tree."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refattn import registry
from refattn.cli import golden
from refattn.cli.validate import validate
from refattn.spec import describe

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Exact attention, certified."
)
app.add_typer(golden.app, name="golden")
app.command()(validate)
console = Console()


@app.command()
def variants() -> None:
    """Name every variant and term."""
    table = Table(box=None)
    for heading in ("name", "kind", "cases", "what it is"):
        table.add_column(heading)
    for name, info in registry.variants().items():
        table.add_row(name, info.kind, str(len(list(info.cases()))), escape(info.title))
    console.print(table)


@app.command()
def info(name: Annotated[str, typer.Argument(help="a name that `refattn variants` prints")]) -> None:
    """Print a variant's formula, sources, options and arrays."""
    found = registry.info(name)
    console.print(escape(found.doc.strip()), highlight=False)
    console.print("\noptions", style="bold")
    for field in found.spec.__dataclass_fields__.values():
        console.print(f"  {field.name} = {field.default!r}", markup=False)
    console.print("\narrays", style="bold")
    console.print(describe(found.module.signature(found.example)) or "  none", markup=False)
