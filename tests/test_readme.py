"""README's example prints what README says."""

from __future__ import annotations

import doctest
from pathlib import Path

import pytest

README = Path(__file__).parents[1] / "README.md"


@pytest.mark.skipif(not README.exists(), reason="the wheel's tests run outside the repository")
def test_example() -> None:
    """Run the first Python block."""
    block = README.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    examples = doctest.DocTestParser().get_doctest(block, {}, "README.md", str(README), 0)
    assert examples.examples
    runner = doctest.DocTestRunner()
    assert runner.run(examples).failed == 0
