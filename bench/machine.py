"""The machine and the versions in words, without any name or path of it; and the key that one run has."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib import metadata
from pathlib import Path

import llvmlite.binding

from bench import peers

_FEATURES = ("avx2", "fma", "f16c", "avx512f", "avx512vnni", "avx512bf16", "avx512fp16", "amx-bf16", "neon", "sve")
_ONLY_SHOW = ("report.py", "pictures.py", "__main__.py", "test_attention.py")
_ROOT = Path(__file__).resolve().parents[1]


def description(narrow: bool = False) -> dict[str, str]:
    """What a figure depends on, row by row of a table."""
    features = llvmlite.binding.get_host_cpu_features()
    vector = "held to AVX2" if narrow else ", ".join(f for f in _FEATURES if features.get(f)) or "none known"
    versions = {p: version(p) for name in peers.ALL for p in peers.load(name).PACKAGES}
    return {
        "CPU": model(),
        "cores": str(os.cpu_count()),
        "vector features": vector,
        "caches": caches(),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{p} {v}" for p, v in sorted(versions.items()) if v),
    }


def key(narrow: bool = False) -> str:
    """Digest of the description and of the engine's and the benchmark's code, as far as it measures."""
    digest = hashlib.sha256(json.dumps(description(narrow)).encode())
    for folder in ("refattn/engines", "bench"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            if path.name in _ONLY_SHOW:
                continue
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def version(package: str) -> str | None:
    """Of an installed package; refattn's is that of the code that is run."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def model() -> str:
    """The CPU's name as the system gives it, else LLVM's name of its kind."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    kind = llvmlite.binding.get_host_cpu_name()
    return f"{names[0]} ({kind})" if names else kind


def caches() -> str:
    """Sizes of a core's caches."""
    found = []
    for path in sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*")):
        level, kind, size = ((path / n).read_text().strip() for n in ("level", "type", "size"))
        if kind != "Instruction":
            found.append(f"L{level} {size}")
    return ", ".join(found) or "not known"
