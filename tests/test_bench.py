"""The benchmark on tiny cells: its answers, statistics, resuming, reasons and page. No time is asserted."""

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from checks import near

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / "bench").is_dir():
    pytest.skip("bench is not part of the wheel", allow_module_level=True)
sys.path.insert(0, str(ROOT))

cells, exact, peers, report, run, store, timing, worker = (
    importlib.import_module(f"bench.{n}")
    for n in ("cells", "exact", "peers", "report", "run", "store", "timing", "worker")
)
Cell = cells.Cell
TINY = Cell(heads=4, kv_heads=2, length=40, width=8)
OTHERS = {
    "backward": replace(TINY, kind="backward", causal=True),
    "decode": cells.decode(40, 8, 8, "f32"),
    "bf16": replace(TINY, dtype="bf16"),
    "int8": cells.decode(40, 8, 8, "int8"),
    "pages": replace(cells.decode(48, 16, 8, "f32"), paged=True),
    "int8 in pages": replace(cells.decode(48, 16, 8, "int8"), paged=True),
    "longer than a window": replace(TINY, length=300, term="window", causal=True),
}
TERMS = {
    f"{term} {causal}": replace(TINY, term=term, causal=causal) for term in cells.TERMS for causal in (False, True)
}


def samples(cell, times, skipped=None, load=0.0):
    """What `run.measure` keeps, with these seconds in both modes."""
    both = {"interleaved": times, "blocks": times if cell.blocks else {}}
    errors = {name: 1.5 for name in times if name != "peak"}
    return {
        "cell": cell.name,
        "load": load,
        "errors": errors,
        "skipped": skipped or {},
        "amounts": {"peak": 1e9},
        **both,
    }


@pytest.mark.parametrize("cell", (TERMS | OTHERS).values(), ids=(TERMS | OTHERS).keys())
def test_every_term_means_the_same_to_numpy_and_to_refattn(cell):
    """The float64 formula of the benchmark beside refattn's reference: two texts, one answer."""
    x = cells.arrays(cell)
    wide = {n: a if a.dtype == np.int8 else a.astype(np.float64) for n, a in x.items()}
    call = peers.load("refattn").prepare(cell, wide, engine="reference")
    found = call.read(call.run())
    for name, want in exact.exact(cell, x).items():
        near(found[name], want, 2e-7 if cell.term == "alibi" else 1e-12)


@pytest.mark.parametrize("name", peers.PEERS)
@pytest.mark.parametrize("cell", (TERMS | OTHERS).values(), ids=(TERMS | OTHERS).keys())
def test_every_peer_that_is_there_is_asked_the_same_question(cell, name):
    peer = peers.load(name)
    if name == "torch_flex" or run.obstacle(cell, name, short=True):
        pytest.skip(run.obstacle(cell, name, short=True) or "compiles for 20 s")
    x = cells.arrays(cell)
    call = peer.prepare(cell, x)
    found = call.read(call.run())
    rows = exact.rows_of(cell)
    found = {n: a[:, :, rows] if n == "out" else a for n, a in found.items()}
    assert exact.units(cell, found, exact.exact(cell, x)) < 64


def test_work_counts_visible_pairs():
    assert cells.flops(replace(TINY, causal=True)) == 4 * 8 * 4 * (40 * 41 / 2)
    assert cells.flops(TINY) == 4 * 8 * 4 * 40 * 40
    assert cells.flops(replace(TINY, kind="backward")) == 10 * 8 * 4 * 40 * 40
    assert cells.flops(Cell(length=1000, term="window", causal=True)) == 4 * 64 * 8 * (256 * 257 / 2 + 744 * 256)
    assert cells.cache_bytes(cells.decode(100, 32, 64, "bf16")) == 2 * 8 * 100 * 64 * 2
    assert cells.cache_bytes(cells.decode(100, 32, 64, "int8")) == 2 * 8 * 100 * (64 + 4)


def test_the_grid_has_each_cell_once_and_the_short_run_is_part_of_it():
    grid, quick = cells.grid(), cells.quick()
    assert len({cell.name for cell in grid}) == len(grid)
    assert len({cell.name for cell in quick}) == len(quick) == 26
    assert set(quick) <= set(grid)
    assert {cell.term for cell in quick} == set(cells.TERMS)


def test_units_are_roundings_of_the_greatest_value():
    want = {"out": np.array([[0.5, -4.0]])}
    found = {"out": np.array([[0.5 + 4 * 3 * 2.0**-24, -4.0]])}
    near(exact.units(TINY, found, want), 3.0, 1e-6)
    with pytest.raises(ValueError, match="has shape"):
        exact.units(TINY, {"out": np.zeros(2)}, want)


def test_plans_give_each_a_share_and_the_rest_to_the_slow():
    planned = timing.plans({"slow": 2.0, "fast": 1e-4, "huge": 100.0}, 9.0)
    assert planned["fast"] == timing.Plan(100, 31, True)
    assert planned["slow"] == timing.Plan(1, 2, False)
    assert planned["huge"] == timing.Plan(1, 1, False)
    assert timing.plans({"slow": 2.0, "fast": 1e-4}, 9.0)["slow"] == timing.Plan(1, 4, False)  # 9 s / 2 would be 2


def test_interleaving_takes_turns_and_blocks_do_not(monkeypatch):
    monkeypatch.setattr(timing.time, "sleep", lambda seconds: None)
    planned = {"a": timing.Plan(1, 4, False), "b": timing.Plan(2, 2, True)}
    order = []

    def sample(name, calls, warm):
        order.append((name, calls, warm))
        return float(len(order))

    timing.interleaved(sample, planned)
    a, b = ("a", 1, False), ("b", 2, True)
    assert order == [a, a, b, a, a, b]
    order.clear()
    assert timing.by_blocks(sample, planned) == {"a": [1.0, 2.0, 3.0, 4.0], "b": [5.0, 6.0]}


def test_statistics():
    assert timing.spread([3.0, 1.0, 2.0]) == timing.Spread(2.0, 1.0, 3.0, 3)
    near(timing.geometric_mean([0.5, 8.0]), 2.0)
    kept = samples(TINY, {"refattn": [2.0, 2.0, 9.0], "torch_sdpa": [3.0], "jax_sdpa": [8.0], "peak": [1.0]})
    assert report.ratio(kept) == (1.5, "torch_sdpa")
    near(report.share(TINY, kept), cells.flops(TINY) / 2.0 / 1e9)
    assert report.ratio(samples(TINY, {"refattn": [1.0]})) is None


def test_results_are_found_again_but_not_those_of_another_run_nor_a_torn_line(tmp_path):
    path = tmp_path / "short.jsonl"
    assert store.read(path, "one") == {}
    store.append(path, "one", {"cell": "a", "n": 1})
    store.append(path, "two", {"cell": "b"})
    with path.open("a") as file:
        file.write('{"cell": "c", "key": "on')
    store.append(path, "one", {"cell": "d"})
    assert sorted(store.read(path, "one")) == ["a", "d"]
    assert store.read(path, "one")["a"]["n"] == 1


def test_why_a_peer_is_not_run(monkeypatch):
    long = Cell(heads=4, kv_heads=4, length=32768, term="plain")
    monkeypatch.setattr(peers, "installed", lambda peer: True)
    assert run.obstacle(long, "jax_sdpa", False) == "needs about 48 GiB"
    assert run.obstacle(replace(TINY, term="softcap"), "torch_sdpa", False) == "no softcap"
    assert run.obstacle(TINY, "torch_flex", False) is None
    assert "short run" in run.obstacle(TINY, "torch_flex", True)
    monkeypatch.setattr(peers, "installed", lambda peer: False)
    assert run.obstacle(TINY, "torch_sdpa", False) == "not installed"


def test_a_reason_tells_no_path():
    assert worker.reason(RuntimeError("no file /home/someone/x.so here\nmore")) == "RuntimeError: no file … here"


def test_a_worker_that_takes_too_long_is_stopped_and_one_that_fails_says_why(tmp_path):
    crew = run.Crew(tmp_path)
    try:
        with pytest.raises(worker.Stopped, match="Error"):
            crew.member("refattn", 1).ask(("prepare", replace(TINY, kv_heads=3)), 120)
        first = crew.member("refattn", 1)
        with pytest.raises(worker.Stopped, match="takes more than 0 s"):
            first.ask(("prepare", Cell(kind="backward")), 0.01)
        assert not first.alive
        assert crew.member("refattn", 1) is not first
    finally:
        crew.dismiss()


def test_a_peer_that_fails_between_samples_costs_only_its_own_figures(tmp_path, monkeypatch):
    class Frail:
        def __init__(self, name):
            self.name, self.timed = name, 0

        def ask(self, order, limit):
            self.timed += order[0] == "time"
            if self.name == "torch_sdpa" and self.timed > 2:
                raise worker.Stopped("its process ended")
            return 0.004 if order[0] == "time" else exact.exact(TINY, cells.arrays(TINY))

    members = {name: Frail(name) for name in ("refattn", "torch_sdpa")}
    crew = run.Crew(tmp_path)
    monkeypatch.setattr(peers, "installed", lambda peer: True)
    monkeypatch.setattr(crew, "member", lambda name, threads: members[name])
    kept = run.measure(TINY, crew, 0.1, list(members))
    assert kept["skipped"] == {"torch_sdpa": "its process ended"}
    assert list(kept["interleaved"]) == ["refattn"]
    assert np.isfinite(kept["interleaved"]["refattn"]).all()


def test_a_cell_from_end_to_end(tmp_path, monkeypatch):
    """refattn and the machine alone, then a second run that finds everything done and only writes the page."""
    driver = importlib.import_module("bench.__main__")
    tiny = [replace(TINY, causal=True, threads=1), cells.decode(64, 8, 8, "f32", 1)]
    monkeypatch.setattr(cells, "grid", lambda: tiny)
    monkeypatch.setattr(peers, "installed", lambda peer: peer.MODULE in ("refattn", "numba"))
    arguments = ["--full", "--seconds", "0.05", "--store", str(tmp_path / "build"), "--docs", str(tmp_path / "docs")]
    pytest.importorskip("rich")
    pytest.importorskip("matplotlib")
    assert driver.main(arguments) == 0
    page = (tmp_path / "docs" / "bench.md").read_text()
    assert "torch SDPA not run: not installed (all cells)" in page
    assert "H4/2 L40 D8 causal plain f32 1 thread" in page
    assert str(tmp_path) not in page
    for name in ("ratio", "peak"):
        assert (tmp_path / "docs" / "bench" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    lines = (tmp_path / "build" / "full.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        assert line["errors"]["refattn"] < 64
        assert set(line["interleaved"]) == {"peak", "refattn"}
    monkeypatch.setattr(run, "measure", lambda *a, **k: pytest.fail("measured again"))
    assert driver.main(arguments) == 0
    assert (tmp_path / "build" / "full.jsonl").read_text().splitlines() == lines


def test_the_page_has_errors_goals_reasons_and_says_when_it_was_noisy():
    cell = Cell(causal=True)
    times = {"refattn": [0.002], "torch_sdpa": [0.003], "peak": [1.0]}
    kept = samples(cell, times, {"jax_sdpa": "one call takes more than 20 s"})
    page = report.page([cell], {cell.name: kept}, {"CPU": "a processor"}, "make bench")
    assert "| 1.7 | 1.50 (torch SDPA) | 1.50 (torch SDPA) |" in page
    assert "2 · 1.5 u" in page
    assert "JAX not run: one call takes more than 20 s" in page
    assert "Provisional" not in page
    noisy = report.page([cell], {cell.name: kept | {"load": 2.0}}, {}, "make bench")
    assert "Provisional" in noisy
    without = samples(cell, {"torch_sdpa": [0.003]}, {"refattn": "one call takes more than 20 s"})
    assert f"in no mean: {cell.name}." in report.page([cell], {cell.name: without}, {}, "make bench")
