"""The compile gate: every kernel to machine code, with no GPU and no driver. `python -m refattn.engines.cuda.gate`.

It prints the registers of each and fails where a thread has a stack or spills, where tensor-core instructions or
asynchronous copies are not as many as the form asks, or where float64 has slipped in.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from refattn.engines.cuda.kernels.form import Form, chunked, padded, squared, tiled

ARCHITECTURES = ("sm_80", "sm_90")
NIGHTLY = (*ARCHITECTURES, "sm_90a", "sm_100", "sm_120")

_ALL = dict.fromkeys(("positions", "segments", "mask", "slopes", "table", "dense", "softcap"), True)


def _form(storage: str, depth: int, width: int, *, wide: bool = True, **options: bool) -> tuple[str, Form]:
    told = "+".join(
        ["everything", *(o for o in options if o not in _ALL)] if options.keys() >= _ALL.keys() else options
    )
    name = " ".join(filter(None, (storage, str(depth), str(width), "" if wide else "not aligned", told)))
    return name, tiled(storage=storage, depth=depth, width=width, wide=wide, **options)


# What a few users meet first, then each option in one form or another.
FORMS = dict(
    [
        _form("float32", 64, 64),
        _form("float32", 128, 128, positions=True),
        _form("float32", 64, 64, positions=True, slopes=True),
        _form("float32", 64, 64, **_ALL),
        _form("float32", 128, 128, **_ALL),
        _form("float32", 80, 33, wide=False),
        _form("bfloat16", 64, 64, positions=True),
        _form("bfloat16", 128, 128),
        _form("bfloat16", 128, 128, positions=True, segments=True),
        _form("bfloat16", 128, 128, **_ALL),
        _form("float16", 128, 128, positions=True, slopes=True),
        _form("float16", 40, 24, wide=False),
        _form("float32", 128, 128, split=True),
        _form("bfloat16", 128, 128, positions=True, split=True),
        _form("bfloat16", 128, 128, positions=True, split=True, paged=True),
        _form("float32", 128, 128, split=True, paged=True, **_ALL),
        _form("bfloat16", 128, 128, split=True, paged=True, **_ALL),
    ]
)

MEMORIES = {
    "64 features": chunked(64, 64, divided=True),
    "128 features, delta rule": chunked(128, 128, divided=True, delta=True, weighed=True),
    "512 features, moved": chunked(512, 64, moved=True),
    "150 features, everything": chunked(150, 33, divided=True, delta=True, weighed=True, moved=True),
}


class Code(NamedTuple):
    """What ptxas and the machine code tell of a kernel."""

    registers: int
    stack: int
    spills: int
    instructions: Counter[str]


def missing() -> str | None:
    """What the gate needs and is not there, and how to get it, or None."""
    absent = [name for name in ("numba_cuda",) if find_spec(name) is None]
    absent += [name for name in ("ptxas", "cuobjdump") if _tool(name) is None]
    how = "pip install 'refattn[cuda-check]' (Linux or Windows)"
    return f"the compile gate needs {' and '.join(absent)}: {how}" if absent else None


def machine_code(text: str, architecture: str) -> Code:
    """PTX assembled for an architecture.

    Raises
    ------
    subprocess.CalledProcessError
        ptxas refuses it.
    """
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        source.write_text(text)
        told = _run("ptxas", "-v", "-arch", architecture, str(source), "-o", str(cubin)).stderr
        sass = _run("cuobjdump", "-sass", str(cubin)).stdout
    stack, stores, loads = map(int, re.findall(r"(\d+) bytes (?:stack frame|spill stores|spill loads)", told))
    registers = re.search(r"Used (\d+) registers", told)
    found = Counter(re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", sass))
    return Code(int(registers[1]) if registers else 0, stack, stores + loads, found)


def faults(form: Form, code: Code, name: str = "forward") -> list[str]:
    """What is wrong with the machine code of a form's kernel of that name."""
    found = [f"{code.stack} bytes of stack"] if code.stack else []
    if code.spills:
        found.append(f"{code.spills} bytes of spills")
    spread = Counter({name.partition(".")[0]: 0 for name in code.instructions})
    for kind, count in code.instructions.items():
        spread[kind.partition(".")[0]] += count
    wide = [kind for kind in code.instructions if re.match(r"D(ADD|MUL|FMA|SETP|MNMX)|.*\bF64\b", kind)]
    if wide:
        found.append(f"float64: {', '.join(wide)}")
    found += [f"{spread[memory]} {memory}" for memory in ("LDL", "STL") if spread[memory]]
    expected = products(name, form)
    if spread["HMMA"] != expected:
        found.append(f"{spread['HMMA']} HMMA instead of {expected}")
    if name != "combine" and form.wide and not code.instructions["LDGSTS.E.BYPASS.128"]:
        found.append("no asynchronous copies of 16 bytes")
    return found


def products(name: str, form: Form) -> int:
    """The tensor-core instructions, each 16×16 by 16×8, of a warp's 16 rows and one tile that they meet."""
    if form.storage == "float32" or name == "combine":
        return 0
    met, deep, wide = form.rows if name == "keys" else form.keys, padded(form.depth, 16), padded(form.width, 16)
    if name == "forward":
        return met * (deep + wide) // 128
    # Columns beyond those of a gradient are never written, and so not computed.
    columns = padded(form.depth, 8) + (padded(form.width, 8) if name == "keys" else 0)
    return met * (deep + wide + columns) // 128


def parameters(text: str) -> list[str]:
    """Types of the kernel's parameters, in order."""
    return re.findall(r"\.param \.(\w+)", text[text.index(".entry") : text.index(".maxntid")])


def _tool(name: str) -> str | None:
    own = Path(sysconfig.get_path("purelib"), "nvidia", "cu13", "bin", name)
    return str(own) if own.exists() else shutil.which(name)


def _run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([_tool(name) or name, *arguments], check=True, capture_output=True, text=True)


def main(architectures: tuple[str, ...]) -> int:
    """Prints a line for each kernel and architecture; 1 where one is at fault."""
    absent = missing()
    if absent is not None:
        print(f"skipped: {absent}")
        return 0
    from refattn.engines.cuda import build

    bad = 0
    kernels = [(name, "forward", form) for name, form in FORMS.items()]
    kernels += [(f"joins the parts of {name}", "combine", form) for name, form in FORMS.items() if form.split]
    for name, form in FORMS.items():
        if not form.split:
            rows, keys = (squared(form, role) for role in ("rows", "keys"))
            kernels += [
                (f"dq of {name}", "rows", rows._replace(tabled=form.table)),
                (f"dk, dv of {name}", "keys", keys),
            ]
    kernels += [(f"memory of {name}", "recur", form) for name, form in MEMORIES.items()]
    for told, name, form in kernels:
        start = time.perf_counter()
        text = build.compiled(name, form)
        seconds = time.perf_counter() - start
        for architecture in architectures:
            code = machine_code(text, architecture)
            wrong = faults(form, code, name)
            bad += bool(wrong)
            count = sum(n for kind, n in code.instructions.items() if kind.startswith("HMMA"))
            print(
                f"{told:56} {architecture:7} {code.registers:3} registers  {code.spills} spilled  {code.stack} stack  "
                f"{count:3} HMMA of {sum(code.instructions.values()):5}  PTX in {seconds:4.1f} s  "
                f"{'; '.join(wrong) or 'ok'}",
                flush=True,
            )
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main(tuple(sys.argv[1:]) or ARCHITECTURES))
