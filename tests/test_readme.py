"""README's examples print what README says."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the wheel's tests run outside the repository")
def test_example() -> None:
    """Run the Python blocks with a prompt, one after the other."""
    blocks = [part.partition("```")[0] for part in README.read_text(encoding="utf-8").split("```python\n")[1:]]
    text = "".join(block for block in blocks if ">>>" in block)
    examples = doctest.DocTestParser().get_doctest(text, {}, "README.md", str(README), 0)
    assert len(examples.examples) > 10
    runner = doctest.DocTestRunner()
    assert runner.run(examples).failed == 0
