"""Sphinx configuration. The variant pages are written here, from the registry, before Sphinx collects its sources."""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from _generate import write_flags, write_variant_pages  # noqa: E402  (found through the line above)

project = "refattn"
author = "The refattn authors"
project_copyright = "2026, The refattn authors"
release = metadata.version("refattn")

extensions = ["myst_parser"]
exclude_patterns = ["_build", "_flags.md"]
myst_heading_anchors = 3
nitpicky = True

html_theme = "furo"
html_title = f"refattn {release}"
html_show_sourcelink = False

write_variant_pages(HERE / "variants")
write_flags(HERE / "_flags.md")
