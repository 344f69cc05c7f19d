"""Regenerate golden cases under other BLAS kernels, threads, CPU features and NumPy versions: the bytes stay the same.

Run as `make sameness`. Each configuration is a fresh process that builds the cases anew and hashes their files; the
hashes must be those of the committed files. So that agreement says something, each process also hashes attention in
plain NumPy float64: that changes with the configuration, or the configurations changed nothing.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import time
from itertools import combinations, product
from pathlib import Path
from typing import NamedTuple

import numpy as np

# OpenBLAS chooses its kernel by this variable; elsewhere than on x86 it is ignored, and the runs repeat one another.
# A kernel is tried only where the CPU has the instructions it needs.
KERNELS = {"Prescott": "SSE3", "Nehalem": "SSE42", "Haswell": "AVX2", "SkylakeX": "AVX512F"}


class Configuration(NamedTuple):
    """What may change without changing a byte."""

    kernel: str
    threads: int
    cpu: str
    python: str

    def variables(self) -> dict[str, str]:
        """Environment of a process in this configuration."""
        threads = str(self.threads)
        chosen = {"OPENBLAS_CORETYPE": self.kernel, "OPENBLAS_NUM_THREADS": threads, "NUMBA_NUM_THREADS": threads}
        if self.cpu == "generic":
            chosen |= {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched()), "NUMBA_CPU_NAME": "generic"}
        return {name: value for name, value in chosen.items() if value}


def features() -> dict[str, bool]:
    """CPU features as NumPy found them."""
    found: dict[str, bool] = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    return found


def dispatched() -> list[str]:
    """CPU features that NumPy would use here and can be told not to."""
    choices = np._core._multiarray_umath.__cpu_dispatch__  # type: ignore[attr-defined]
    return [name for name in choices if features().get(name)]


def cover(choices: list[list[str]]) -> list[tuple[str, ...]]:
    """Few rows in which any two values of any two factors meet: the row with most new pairs, again and again."""
    places = list(combinations(range(len(choices)), 2))
    left = {(i, a, j, b) for i, j in places for a, b in product(choices[i], choices[j])}
    rows: list[tuple[str, ...]] = []
    while left:
        best = max(product(*choices), key=lambda row: sum((i, row[i], j, row[j]) in left for i, j in places))
        left -= {(i, best[i], j, best[j]) for i, j in places}
        rows.append(best)
    return rows


def configurations(kernels: list[str], pythons: list[str]) -> list[Configuration]:
    """A pairwise cover of kernels, thread counts, vector code and interpreters."""
    rows = cover([kernels, ["1", "2"], ["native", "generic"], pythons])
    return [Configuration(kernel, int(threads), cpu, python) for kernel, threads, cpu, python in rows]


def chosen(count: int | None) -> list[str]:
    """Names of the committed cases: all, or so many spread evenly over the suite."""
    from refattn.golden.load import names

    every = names()
    return every if count is None else [every[i * len(every) // count] for i in range(count)]


def report(names: list[str]) -> None:
    """In a configuration: the hashes of the cases built here, and of plain NumPy's answer to the same question."""
    from refattn.golden import suite
    from refattn.golden.build import build

    found = {}
    for case in suite.cases():
        if case.name in names:
            built = build(case)
            found[case.name] = [hashlib.sha256(data).hexdigest() for data in (built.manifest, built.tensors)]
    print(json.dumps({"cases": found, "plain": plain(), "numpy": np.__version__}))


def plain() -> str:
    """Hash of softmax attention in NumPy float64 on fixed inputs, with the BLAS and exponential of this process."""
    rng = np.random.Generator(np.random.PCG64(1))
    q, k, v = (rng.integers(-512, 512, (192, 64)) / 256 for _ in range(3))
    p = np.exp(q @ k.T / 8)
    out = p @ v / p.sum(-1, keepdims=True)
    return hashlib.sha256(out.tobytes()).hexdigest()


def committed() -> dict[str, list[str]]:
    """The hashes in the index."""
    from refattn.golden.load import folder_of_suite, read_index

    return {entry["name"]: [entry["manifest"], entry["tensors"]] for entry in read_index(folder_of_suite())["cases"]}


def main() -> int:
    """Run every configuration; the exit status counts what is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sample", type=int, help="so many cases, spread over the suite; default: all")
    parser.add_argument("--kernels", type=int, default=len(KERNELS), help="how many BLAS kernels, the newest first")
    parser.add_argument("--other", nargs="*", default=[], help="interpreters of environments with another NumPy")
    parser.add_argument("--report", action="store_true", help="in a configuration: print hashes of the cases on stdin")
    options = parser.parse_args()
    if options.report:
        report(json.load(sys.stdin))
        return 0
    names, expected = chosen(options.sample), committed()
    kernels = [kernel for kernel, needs in KERNELS.items() if features().get(needs)][-options.kernels :] or [""]
    wrong, plain_hashes, versions = 0, set(), set()
    for configuration in configurations(kernels, [sys.executable, *options.other]):
        start = time.perf_counter()
        run = subprocess.run(
            [configuration.python, str(Path(__file__)), "--report"],
            input=json.dumps(names),
            env=os.environ | configuration.variables(),
            capture_output=True,
            text=True,
            check=False,
        )
        label = f"{configuration.kernel or 'one BLAS'}, {configuration.threads} threads, {configuration.cpu} CPU"
        if run.returncode:
            print(f"{label}: failed\n{run.stdout}{run.stderr}")
            wrong += 1
            continue
        found = json.loads(run.stdout)
        differing = [name for name in names if found["cases"].get(name) != expected[name]]
        plain_hashes.add(found["plain"])
        versions.add(found["numpy"])
        verdict = f"DIFFERENT: {', '.join(differing[:5])}" if differing else f"{len(names)} cases identical"
        print(
            f"{label:36s} NumPy {found['numpy']:8s} {verdict}  plain {found['plain'][:8]}"
            f"  {time.perf_counter() - start:5.1f} s",
            flush=True,
        )
        wrong += bool(differing)
    print(f"plain NumPy gave {len(plain_hashes)} different answers under NumPy {', '.join(sorted(versions))}")
    if len(kernels) > 1 and len(plain_hashes) < 2:
        print("the configurations changed nothing, so their agreement proves nothing")
        wrong += 1
    return wrong


if __name__ == "__main__":
    sys.exit(main())
