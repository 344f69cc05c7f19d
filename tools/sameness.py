"""Regenerate golden cases under different BLAS kernels, thread counts and CPU features; every byte must stay the same.

Run as `make sameness`. Each configuration is a fresh process of `refattn golden verify`, which compares with the
committed files, so equality between configurations follows.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

# OpenBLAS chooses its kernel by this variable; elsewhere than on x86 it is ignored, and the runs repeat one another.
# A kernel is tried only where the CPU has the instructions it needs.
KERNELS = {"Prescott": "SSE3", "Nehalem": "SSE42", "Haswell": "AVX2", "SkylakeX": "AVX512F"}


def features() -> dict[str, bool]:
    """CPU features as NumPy found them."""
    found: dict[str, bool] = np._core._multiarray_umath.__cpu_features__  # type: ignore[attr-defined]
    return found


def dispatched() -> list[str]:
    """CPU features that NumPy would use here and can be told not to."""
    choices = np._core._multiarray_umath.__cpu_dispatch__  # type: ignore[attr-defined]
    return [name for name in choices if features().get(name)]


def configurations() -> list[tuple[str, dict[str, str]]]:
    """A cover of kernels, threads and NumPy's vector code: every kernel, both thread counts, both kinds of code."""
    plain = {"NPY_DISABLE_CPU_FEATURES": " ".join(dispatched())} if dispatched() else {}
    found = []
    for n, (kernel, needs) in enumerate(KERNELS.items()):
        if not features().get(needs, False):
            continue
        threads = str(1 + n % 2)
        chosen = {"OPENBLAS_CORETYPE": kernel, "OPENBLAS_NUM_THREADS": threads, "OMP_NUM_THREADS": threads}
        vector = plain if n in (0, 3) else {}
        found.append((f"{kernel}, {threads} threads, {'plain' if vector else 'native'} NumPy", chosen | vector))
    return found


def main() -> int:
    """Run every configuration; the exit status counts those that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default="*", help="pattern of case names")
    pattern = parser.parse_args().cases
    command = [str(Path(sys.executable).with_name("refattn")), "golden", "verify", "--cases", pattern]
    wrong = 0
    for label, variables in configurations():
        start = time.perf_counter()
        run = subprocess.run(command, env=os.environ | variables, capture_output=True, text=True, check=False)
        verdict = "identical" if run.returncode == 0 else "DIFFERENT"
        print(f"{label:45s} {verdict}  {time.perf_counter() - start:5.1f} s", flush=True)
        if run.returncode:
            wrong += 1
            print(run.stdout + run.stderr)
    return wrong


if __name__ == "__main__":
    sys.exit(main())
