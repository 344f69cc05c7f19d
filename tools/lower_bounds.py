"""Print the lowest version of everything that refattn and its golden and test extras admit, one requirement a line.

With names as arguments, of these packages alone.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parent.parent


def lowest(line: str) -> str:
    requirement = Requirement(line)
    bounds = [s.version for s in requirement.specifier if s.operator == ">="]
    if len(bounds) != 1:
        raise SystemExit(f"pyproject.toml: {line!r} has {len(bounds)} lower bounds; write it as 'name>=version'")
    return f"{requirement.name}=={bounds[0]}"


def main() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [lowest(line) for line in (*project["dependencies"], *extras["golden"], *extras["test"])]
    if sys.argv[1:]:
        lines = [line for line in lines if line.partition("==")[0] in sys.argv[1:]]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
