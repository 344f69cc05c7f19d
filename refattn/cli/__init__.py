"""The `refattn` command; its parts are imported only when it runs."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; errors that refattn raises on purpose end it with their message and status 2."""
    try:
        from refattn.cli.app import app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("refattn"):
            raise
        sys.exit(f"the command line needs {error.name}, which is not installed: pip install 'refattn[golden]'")
    from refattn.errors import RefattnError

    try:
        app()
    except RefattnError as error:
        sys.exit(_failed(str(error)))


def _failed(message: str) -> int:
    sys.stderr.write(f"refattn: {message}\n")
    return 2
