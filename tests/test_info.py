"""`refattn variants` and `refattn info`: every variant is listed, and shown whole."""

import pytest
from typer.testing import CliRunner

import refattn as ra
from refattn.cli.app import app

ALL = ra.variants()


def printed(*arguments, code=0):
    found = CliRunner().invoke(app, arguments, terminal_width=80)
    assert found.exit_code == code, found.output
    return found.output


def test_every_name_is_listed():
    lines = printed("variants").splitlines()
    assert all(any(line.split()[:1] == [name] for line in lines) for name in ALL)


@pytest.mark.parametrize("name", ALL)
def test_lines_of_the_docstring_stand_as_they_are_written(name):
    found = printed("info", name)
    lines = found.splitlines()
    assert ALL[name].doc.strip().splitlines() == lines[: len(ALL[name].doc.strip().splitlines())]
    assert "MISSING" not in found
    for option in ALL[name].spec.__dataclass_fields__:
        assert any(line.startswith(f"  {option} ") for line in lines), option
    for array in ALL[name].module.signature(ALL[name].example):
        assert any(line.startswith(f"  {array} (") for line in lines), array
    assert ("state" in lines) == hasattr(ALL[name].module, "state")
