"""Golden files are written whole or not at all, and an interrupted run goes on to the same bytes."""

import errno
import os
import resource
import subprocess
import sys
import tempfile

import pytest
from golden_folder import CASES, FILES, NAME, contents, files

from refattn.errors import StorageError
from refattn.files import write
from refattn.golden import generate as generating
from refattn.golden import load, store, suite
from refattn.golden.generate import generate
from refattn.golden.verify import verify

# Writing


@pytest.mark.parametrize("where", ["fsync", "fdopen", "replace", "mkstemp"])
@pytest.mark.parametrize("old", [None, b"old"], ids=["new_file", "old_file"])
def test_a_disk_that_is_full_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, where, old):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / "case.json"
    if old is not None:
        path.write_bytes(old)
    module = {"mkstemp": tempfile, "replace": store.Path}.get(where, os)
    monkeypatch.setattr(module, where, full)
    with pytest.raises(
        StorageError, match=r"cannot write .*case.json \(3 bytes\): No space left on device.*Free space"
    ):
        write(path, b"new")
    assert contents(tmp_path) == ({} if old is None else {"case.json": old})


def test_a_real_limit_of_the_kernel_on_a_files_size(tmp_path):
    """RLIMIT_FSIZE in a process of its own: the write itself fails part of the way."""
    path = tmp_path / "case.safetensors"
    path.write_bytes(b"old")
    code = (
        "import resource, sys; from pathlib import Path; from refattn.files import write\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, resource.RLIM_INFINITY))\n"
        "write(Path(sys.argv[1]), bytes(20000))"
    )
    found = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
    assert "StorageError: cannot write" in found.stderr
    assert "(20000 bytes): File too large" in found.stderr
    assert contents(tmp_path) == {"case.safetensors": b"old"}
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] != 5000


def test_a_folder_that_cannot_be(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="cannot write"):
        write(tmp_path / "file" / "case.json", b"new")


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "case.json", b"new")
    assert contents(tmp_path) == {}


def test_a_written_file_is_whole_and_readable_by_all(tmp_path):
    path = tmp_path / "a" / "b.json"
    write(path, b"one")
    write(path, b"two")
    assert contents(tmp_path) == {"a/b.json": b"two"}
    assert path.stat().st_mode & 0o777 == 0o644


# Generating


@pytest.fixture
def room(tmp_path, monkeypatch):
    """Unfinished runs wait here, and not in the machine's own temporary folder."""
    place = tmp_path / "temporary"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setattr(generating, "fingerprint", lambda: "these-sources")
    return place


@pytest.mark.parametrize("after", [1, 2, 3])
def test_a_generation_that_was_stopped_goes_on_and_ends_in_the_same_bytes(small, tmp_path, room, after):
    folder, told = tmp_path / "suite", []

    def stop(case, built):
        told.append(case.name)
        if len(told) == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        generate(folder, CASES, 1, stop)
    assert not folder.exists()
    again = []
    generate(folder, CASES, 1, lambda case, built: again.append((case.name, built is None)))
    assert sorted(name for name, kept in again if kept) == sorted(told)
    assert {name for name, _ in again} == {case.name for case in CASES}
    assert contents(folder) == contents(small)
    assert contents(room) == {}


def test_a_case_that_fails_leaves_what_was_published(folder, room, monkeypatch):
    before = contents(folder)

    def fail(case):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(suite, "build", fail)
    with pytest.raises(OSError, match="No space left"):
        generate(folder, CASES, 1, lambda case, built: None)
    assert contents(folder) == before


@pytest.mark.parametrize("writes", range(1, 8))
def test_a_disk_that_fills_while_publishing_leaves_only_whole_files_and_can_be_mended(
    small, tmp_path, monkeypatch, writes
):
    """Six files and the index, over a folder whose cases are all older: each is old or new, none is part of either."""
    folder, left = tmp_path / "suite", [writes]
    old = {case.name: (b"{}\n", b"old") for case in CASES}
    suite.publish(folder, old)
    before, after, real = contents(folder), contents(small), os.fsync

    def fills(handle):
        left[0] -= 1
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(os, "fsync", fills)
    with pytest.raises(StorageError, match="run the same command again"):
        suite.publish(folder, files())
    found = contents(folder)
    assert found.keys() == before.keys()
    assert all(data in (before[name], after[name]) for name, data in found.items())
    assert found[load.INDEX] == before[load.INDEX]
    monkeypatch.undo()
    suite.publish(folder, files())
    assert contents(folder) == after


def test_publishing_removes_the_files_of_cases_that_are_gone(folder):
    suite.publish(folder, {NAME: files()[NAME]})
    assert set(contents(folder)) == set(FILES)


def test_verify_names_every_difference(folder, monkeypatch):
    monkeypatch.setattr(suite, "cases", lambda of="core": CASES)
    assert verify(folder, CASES, 1, lambda case, built: None) == []
    first, second, third = (case.name for case in CASES)
    manifest = folder / f"{first}.json"
    manifest.write_bytes(manifest.read_bytes()[:-1] + b" ")
    (folder / f"{second}.safetensors").unlink()
    (folder / "stray.json").write_bytes(b"{}")
    (folder / load.INDEX).write_bytes(b"{}")
    found = {d.file: d.what for d in verify(folder, CASES, 1, lambda case, built: None)}
    assert found.keys() == {f"{first}.json", f"{second}.safetensors", "stray.json", load.INDEX}
    assert found[f"{first}.json"] == f"differs from byte {len(manifest.read_bytes()) - 1} on"
    assert found[f"{second}.safetensors"] == "is missing"
    assert found["stray.json"] == "belongs to no case"
