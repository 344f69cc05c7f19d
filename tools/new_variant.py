"""Start a variant: write refattn/variants/NAME.py and tests/variants/test_NAME.py from the templates beside this."""

from __future__ import annotations

import keyword
import re
import sys
from pathlib import Path
from string import Template

HERE = Path(__file__).resolve().parent
TARGETS = {"variant.txt": "refattn/variants/{name}.py", "test.txt": "tests/variants/test_{name}.py"}


def start(name: str, root: Path) -> list[Path]:
    """Write both files under `root`; refuse a name that is no module name or is taken, before writing anything."""
    if not re.fullmatch(r"[a-z][a-z0-9]*(_[a-z0-9]+)*", name) or keyword.iskeyword(name):
        raise SystemExit(
            f"given VARIANT={name!r}; expected a module name such as infini_attention; write: make new VARIANT=name"
        )
    targets = {template: root / place.format(name=name) for template, place in TARGETS.items()}
    for path in targets.values():
        if path.exists():
            raise SystemExit(f"{path.relative_to(root)} exists already; choose another name, or edit that file")
    words = name.split("_")
    fields = {"name": name, "cls": "".join(word.capitalize() for word in words), "title": " ".join(words).capitalize()}
    for template, path in targets.items():
        text = (HERE / "templates" / template).read_text(encoding="utf-8")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(text).substitute(fields), encoding="utf-8")
    return list(targets.values())


if __name__ == "__main__":
    root = HERE.parent
    for path in start(sys.argv[1] if len(sys.argv) > 1 else "", root):
        sys.stdout.write(f"wrote {path.relative_to(root)}\n")
