"""The variant pages: one Markdown file per registered name, its text the docstring of the module itself."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import refattn as ra
from refattn.golden import flags

INDEX = """\
# Variants

Each page is the docstring of the module that implements the variant: claim, formula, symbols, source, differences.
A *variant* is evaluated by itself; a *term* is a part of masked dot-product attention (`sdpa`) and combines freely.

| name | kind | what it is |
|---|---|---|
{rows}

```{{toctree}}
:hidden:

{names}
```
"""


def write_variant_pages(folder: Path) -> None:
    """Write `folder`/index.md and one page per variant; pages of variants that are gone are removed."""
    folder.mkdir(exist_ok=True)
    infos = ra.variants()
    pages = {f"{name}.md": page(info) for name, info in infos.items()}
    rows = (f"| [`{name}`]({name}.md) | {info.kind} | {escaped(info.title)} |" for name, info in infos.items())
    pages["index.md"] = INDEX.format(rows="\n".join(rows), names="\n".join(infos))
    for stale in folder.glob("*.md"):
        if stale.name not in pages:
            stale.unlink()
    for name, text in pages.items():
        (folder / name).write_text(text, encoding="utf-8")


def write_flags(file: Path) -> None:
    """Write the tables of flags, which the page of the suite includes."""
    file.write_text(flags.table(), encoding="utf-8")


def page(info: Any) -> str:
    """The name as a heading, then the docstring: indented blocks stay as they are, prose becomes paragraphs."""
    blocks = re.split(r"\n\s*\n", inspect.cleandoc(info.doc))
    body = "\n\n".join(shown(block) for block in blocks)
    return f"# {info.name}\n\n*{info.kind}*\n\n{body}\n"


def shown(block: str) -> str:
    """Lines indented by four or more are a formula, each run of them shown as written; all else is prose."""
    parts: list[str] = []
    for indented, lines in runs(block.splitlines()):
        text = "\n".join(lines)
        parts.append(f"```text\n{inspect.cleandoc(text)}\n```" if indented else escaped(text))
    return "\n\n".join(parts)


def runs(lines: list[str]) -> list[tuple[bool, list[str]]]:
    grouped: list[tuple[bool, list[str]]] = []
    for line in lines:
        indented = line.startswith("    ")
        if not grouped or grouped[-1][0] != indented:
            grouped.append((indented, []))
        grouped[-1][1].append(line)
    return grouped


def escaped(text: str) -> str:
    """Docstrings are plain text: nothing in a formula may be read as Markdown, save what stands in backticks."""
    parts = re.split(r"(`+[^`]*`+)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([\\*_\[\]<>|#{}~$])", r"\\\1", part) for part in parts)
