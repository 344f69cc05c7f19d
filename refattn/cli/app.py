"""The command tree."""

from __future__ import annotations

from dataclasses import MISSING
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from refattn import registry
from refattn.cli import golden
from refattn.cli.validate import validate
from refattn.cli.warmup import warmup
from refattn.spec import describe

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Exact attention, certified."
)
app.add_typer(golden.app, name="golden")
app.command()(validate)
app.command()(warmup)
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
    # Formulas keep their lines, however narrow the terminal.
    console.print(escape(found.doc.strip()), highlight=False, soft_wrap=True)
    console.print("\noptions", style="bold")
    for field in found.spec.__dataclass_fields__.values():
        default = "(to be given)" if field.default is MISSING else f"= {field.default!r}"
        console.print(f"  {field.name} {default}", markup=False)
    arrays = {"arrays": found.module.signature(found.example)}
    if hasattr(found.module, "outputs"):
        arrays["outputs"] = found.module.outputs(found.example)
    if hasattr(found.module, "state"):
        arrays["state"] = found.module.state(found.example, 0)
    for title, listed in arrays.items():
        console.print(f"\n{title}", style="bold")
        console.print(describe(listed) or "  none", markup=False, soft_wrap=True)
