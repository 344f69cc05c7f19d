"""`make claims` at a small size: its arithmetic against other formulas, and the page against a fresh run."""

import importlib
import math
import sys
from pathlib import Path

import numpy as np
import pytest
from checks import near

import refattn as ra

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "tools" / "claims").is_dir():
    pytest.skip("tools/claims is not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(ROOT / "tools"))

driver = importlib.import_module("claims.__main__")
CLAIMS = {name: importlib.import_module(f"claims.{name}") for name in driver.ORDER}
NotThere = importlib.import_module("claims.claim").NotThere
PAGE = ROOT / "docs" / "claims.md"


def measured(name):
    try:
        return CLAIMS[name].measure(small=True)
    except NotThere as missing:
        pytest.skip(str(missing))


@pytest.mark.parametrize("name", CLAIMS)
def test_every_claim_gives_whole_rows(name):
    found = measured(name)
    assert found.rows
    for row in found.rows:
        assert all(isinstance(cell, str) and cell and "\n" not in cell for cell in row)
        assert row.reproduced == "yes" or row.reproduced.startswith("no: ")
    assert found.how.endswith(".")


@pytest.mark.parametrize("name", ["alibi_slopes", "windows", "exact_laws"])
def test_what_is_exact_reproduces_at_any_size(name):
    rows = [row for row in measured(name).rows if not row.reproduced.endswith("variant not there yet")]
    assert [row for row in rows if row.reproduced != "yes"] == []


def test_slopes():
    """The two lists of section 3: halves for 8 heads, roots of halves for 16; 12 heads take 4 of these."""
    slopes = CLAIMS["alibi_slopes"].slopes
    near(slopes(8, "interleaved"), [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256])
    near(slopes(16, "geometric"), [math.sqrt(0.5) ** h for h in range(1, 17)], 2**-24)
    near(slopes(12, "interleaved")[8:], [math.sqrt(0.5) ** h for h in (1, 3, 5, 7)], 2**-24)
    exact = [float(e) for e in CLAIMS["alibi_slopes"].exponents(40, "interleaved")]
    assert exact[:3] == [0.25, 0.5, 0.75]
    assert exact[32:] == [n / 8 for n in range(1, 16, 2)]


def test_the_sandwich_curve_is_a_sum_of_cosines():
    w = 10000.0 ** (-np.arange(64) / 64)
    expected = (np.cos(np.arange(50)[:, None] * w).sum(1) - 64) / 8
    near(CLAIMS["sandwich_curve"].curve(50), expected, 1e-9)
    slope, constant = CLAIMS["sandwich_curve"].fit(-0.75 * np.log1p(np.arange(100)) + 2)
    near([slope, constant], [-0.75, 2])


def test_memory_arithmetic():
    """128 (128 + 1) numbers a head, 8 heads, 12 layers."""
    assert CLAIMS["infini_memory"].floats() == 12 * 8 * 128 * 129 == 1585152


def test_re_writes():
    near(CLAIMS["infini_memory"].rewritten("linear", 4), [1, 1, 1, 1])
    near(CLAIMS["infini_memory"].rewritten("delta", 4), [1, 0.5, 0.5, 0.5])


def test_recall_of_keys_whose_features_do_not_meet():
    """Linear: exact. Delta: a key that meets nothing reads, 0/0 but for rounding, what is there: V1 − V0 is written."""
    keys, values = np.where(np.eye(2) == 1, 3.0, -50.0), np.array([[1.0, 2], [5, 9]])
    near(CLAIMS["infini_memory"].recalled(keys, values, "linear"), values)
    near(CLAIMS["infini_memory"].recalled(keys, values, "delta"), [values[0], values[1] - values[0]])


def test_the_whole_budget_of_columns_or_queries_is_exact_attention():
    sketching = CLAIMS["sketching"]
    if not {"informer", "skeinformer"} <= set(ra.variants()):
        pytest.skip("informer, skeinformer: variant not there yet")
    x = sketching.tokens("clusters", 16, 4, 0)
    exact = ra.attention(x["q"], x["k"], x["v"])[0, 0]
    for name in ("Informer", "Skeinformer"):
        near(sketching.approximated(name, x, 16, 0), exact, 1e-11)


def test_the_signal_of_a_memory():
    """One coefficient, N = 4, the widths 0.01 and 0.05 at 0 and at 1; read by N(t, 0.05²) its width is √2 0.05."""
    memory = np.zeros((4, 1))
    memory[1] = 1
    found = CLAIMS["infinity_memory"].signal(memory, np.array([0.0, 0.05]))
    near(found.ravel(), np.array([1, math.exp(-0.5)]) / (0.05 * math.sqrt(2 * math.pi)))
    read = CLAIMS["infinity_memory"].signal(memory, np.array([0.0]), 0.05)
    near(read.ravel(), [1 / (0.1 * math.sqrt(math.pi))])


# The page


@pytest.mark.parametrize("name", ["alibi_slopes", "bias_memory", "sandwich_curve"])
def test_the_page_has_what_a_fresh_run_finds(name):
    found = CLAIMS[name].measure()
    assert driver.section(name, found, found.draw is not None) in PAGE.read_text(encoding="utf-8")


def test_the_page_has_the_memory_arithmetic():
    rows = driver.section("infini_memory", CLAIMS["infini_memory"].measure(small=True)).splitlines()
    page = PAGE.read_text(encoding="utf-8").splitlines()
    for begin in ("| Memory of", "| Against", "| Transformer-XL's", "| The linear", "| The delta"):
        (row,) = (line for line in rows if line.startswith(begin))
        assert row in page


def test_every_claim_has_a_section_and_every_picture_is_there():
    page = PAGE.read_text(encoding="utf-8")
    for name, claim in CLAIMS.items():
        assert f"## {claim.TITLE}\n" in page
        shown = f"(claims/{name}.png)" in page
        assert shown == (PAGE.parent / "claims" / f"{name}.png").is_file()
    for file in (PAGE.parent / "claims").iterdir():
        assert file.stat().st_size < 60_000, file.name


# The driver


def test_a_claim_that_crashes_fails_the_run_and_writes_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(driver, "DOCS", tmp_path)
    monkeypatch.setattr(driver, "ORDER", ("alibi_slopes", "bias_memory"))
    monkeypatch.setattr(driver, "picture", lambda draw: b"")
    monkeypatch.setattr(CLAIMS["bias_memory"], "measure", lambda: 1 / 0)
    assert driver.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_a_variant_that_is_not_there_is_said_so_and_no_failure(monkeypatch, tmp_path):
    def missing():
        raise NotThere("unheard: variant not there yet")

    monkeypatch.setattr(driver, "DOCS", tmp_path)
    monkeypatch.setattr(driver, "ORDER", ("bias_memory", "sketching"))
    monkeypatch.setattr(CLAIMS["sketching"], "measure", missing)
    assert driver.main() == 0
    page = (tmp_path / "claims.md").read_text(encoding="utf-8")
    assert "Not measured: unheard: variant not there yet." in page
    assert "134.2 MB" in page
