"""A small golden suite, built once, for tests that damage, interrupt or fill it."""

from functools import cache

from refattn.golden import load, suite
from refattn.golden.build import build

CASES = sorted(suite.cases(), key=suite.work)[:3]
NAME = CASES[-1].name
COMMITTED = load.folder_of_suite()
FILES = (load.INDEX, f"{NAME}.json", f"{NAME}.safetensors")


@cache
def files():
    """Manifest and tensors of three cases by name."""
    built = {case.name: build(case) for case in CASES}
    return {name: (b.manifest, b.tensors) for name, b in built.items()}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
