"""`refattn warmup`, and a disk cache that is damaged, stale or cannot be written: it costs time and nothing else."""

import ast
import os
import shutil
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
from typer.testing import CliRunner

import refattn
from refattn.cli.app import app
from refattn.engines import cpu
from refattn.engines.cpu import warm

PACKAGE = Path(refattn.__file__).parent
OUTPUT = """
import numpy as np
from refattn.engines.cpu import score, warm
kernel = next(k for k in warm.kernels() if k.name == "see row by row, float32")
print(kernel.warm(), warm.folder() is None)
"""


def python(script, folder, code=0, cwd=PACKAGE.parent, **environment):
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env=os.environ | {"NUMBA_CACHE_DIR": str(folder), "PYTHONPATH": str(cwd)} | environment,
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.returncode == code, found.stderr
    return found.stdout


def test_what_is_compiled_in_one_process_is_found_by_the_next(tmp_path):
    assert python(OUTPUT, tmp_path) == "True False\n"
    assert python(OUTPUT, tmp_path) == "False False\n"


@pytest.mark.parametrize("suffix", [".nbi", ".nbc"])
@pytest.mark.parametrize("damage", [b"", b"no pickle", bytes(200)])
def test_a_damaged_file_is_replaced(suffix, damage, tmp_path):
    assert python(OUTPUT, tmp_path) == "True False\n"
    files = list(tmp_path.rglob(f"*{suffix}"))
    assert files
    for file in files:
        file.write_bytes(damage)
    assert python(OUTPUT, tmp_path) == "True False\n"
    assert python(OUTPUT, tmp_path) == "False False\n"


def test_a_folder_that_no_longer_takes_files_is_done_without(tmp_path):
    """Full or read-only after the engine was imported; as root, permissions would not tell."""
    script = """
from numba.core import caching
def full(self, *arguments): raise OSError(28, "No space left on device")
caching.IndexDataCacheFile._save_index = caching.IndexDataCacheFile._save_data = full
"""
    assert python(script + OUTPUT, tmp_path) == "True False\n"
    assert python(OUTPUT, tmp_path) == "True False\n"


NOWHERE = """
from numba.core import caching
caching.CompileResultCacheImpl._locator_classes = []
"""


def test_without_any_folder_kernels_are_compiled_and_not_kept(tmp_path):
    assert python(NOWHERE + OUTPUT, tmp_path) == "True True\n"


def test_warmup_says_in_one_line_that_nothing_can_be_kept(tmp_path):
    script = NOWHERE + "import sys; from refattn.cli import main; sys.argv = ['refattn', 'warmup']; main()"
    printed = python(script, tmp_path / "absent", code=1, COLUMNS="200")
    assert printed.startswith(f"nothing can be kept: {tmp_path / 'absent'} cannot be written; set NUMBA_CACHE_DIR to")
    assert printed.count("\n") == 1


def test_an_edited_file_is_compiled_anew(tmp_path):
    """A copy of the package, of which another file than the kernel's own changes what it computes."""
    shutil.copytree(PACKAGE, tmp_path / "refattn", ignore=shutil.ignore_patterns("__pycache__"))
    script = """
import ml_dtypes, numpy as np
from refattn.engines.cpu import storage
print(storage.widened(np.ones(3, ml_dtypes.bfloat16)))
"""
    assert python(script, tmp_path / "cache", cwd=tmp_path) == "[1. 1. 1.]\n"
    file = tmp_path / "refattn" / "engines" / "cpu" / "tiles.py"
    text, before = file.read_text(), "x.store(x.stored(x.at(source, (at, 2)), width), x.at(to, (at, 4)))"
    assert before in text
    doubled = "x.store(x.b.fadd(wide := x.stored(x.at(source, (at, 2)), width), wide), x.at(to, (at, 4)))"
    file.write_text(text.replace(before, doubled))
    assert python(script, tmp_path / "cache", cwd=tmp_path) == "[2. 2. 2.]\n"


def modules():
    return {path.stem: path for path in Path(cpu.__file__).parent.glob("*.py")}


def compiled_in(path):
    """Names in a file that end up in the machine code of what imports them: functions, intrinsics, constants."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            if {"inner", "inline", "bare", "jit"} & {getattr(d, "id", "") for d in node.decorator_list}:
                yield node.name
        else:
            targets = getattr(node, "targets", [getattr(node, "target", None)])
            names = [n.id for t in targets if t for n in ast.walk(t) if isinstance(n, ast.Name)]
            made = getattr(getattr(getattr(node, "value", None), "func", None), "id", "") == "intrinsic"
            yield from (name for name in names if made or name.isupper())


def imported(path):
    """Modules of the engine of which a file imports such names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("refattn.engines.cpu."):
            module = node.module.rpartition(".")[2]
            if {alias.name for alias in node.names} & set(compiled_in(modules()[module])):
                yield module


def stamped():
    """Every call of `stamp` in the engine: the file, and the names of the modules."""
    for name, path in modules().items():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "stamp":
                scope = vars(import_module(f"refattn.engines.cpu.{name}"))
                yield name, {scope[argument.id].__name__.rpartition(".")[2] for argument in node.args}


def test_stamps_name_every_file_whose_functions_a_kernel_may_call():
    found = list(stamped())
    assert len(found) >= 4
    for name, given in found:
        reached, new = set(), {name}
        while new:
            reached |= new
            new = set().union(*(imported(modules()[n]) for n in new)) - reached
        missing = reached - given - {name}
        assert not missing, f"a kernel of {name}.py does not notice an edit of {missing}"


def invoke(monkeypatch, folder, *kernels):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setattr(warm, "kernels", lambda: iter(kernels))
    monkeypatch.setattr(warm, "folder", lambda: folder)
    found = CliRunner().invoke(app, ["warmup"], terminal_width=200)
    return found.exit_code, found.output.splitlines()


def kernel(name, result):
    def warm_up():
        if isinstance(result, BaseException):
            raise result
        return result

    return SimpleNamespace(name=name, warm=warm_up)


def test_warmup_tells_what_was_compiled_and_what_was_there(monkeypatch, tmp_path):
    code, lines = invoke(monkeypatch, tmp_path, kernel("one", True), kernel("two", False))
    assert code == 0
    assert [line.split()[:2] for line in lines[:2]] == [["one", "compiled"], ["two", "on"]]
    assert lines[-1] == f"1 kernels compiled, 1 found on disk, in {tmp_path}"


def test_a_stopped_warmup_says_what_is_kept(monkeypatch, tmp_path):
    code, lines = invoke(monkeypatch, tmp_path, kernel("one", True), kernel("two", KeyboardInterrupt()))
    assert code == 130
    assert lines[-1] == f"stopped: 1 of 2 kernels are in {tmp_path}; run it again to go on"


def test_the_call_of_each_kernel_needs_it():
    for k in warm.kernels():
        k.warm()
        assert all(f.signatures for f in k.functions), k.name


def test_warmup_knows_every_kernel_that_a_call_compiles():
    """Each function that is compiled and kept stands in the list."""
    listed = {f.py_func.__qualname__ for k in warm.kernels() for f in k.functions}
    kept = set()
    for name, path in modules().items():
        module = import_module(f"refattn.engines.cpu.{name}")
        own = [f for f in vars(module).values() if hasattr(f, "py_func") and f.__module__ == module.__name__]
        kept |= {f.__qualname__ for f in own}
        kept |= {f"{n}.<locals>.{d}" for n, d in inside(path)}
    called = {"begin", "all_true", "bias", "visible", "logits", "softmax", "sigmoids", "weigh", "kept", "cotangents"}
    assert kept - called == listed


def inside(path):
    for outer in ast.parse(path.read_text()).body:
        for node in getattr(outer, "body", ()) if isinstance(outer, ast.FunctionDef) else ():
            decorators = {getattr(d, "id", "") for d in getattr(node, "decorator_list", ())}
            if {"bare", "jit"} & decorators:
                yield outer.name, node.name
