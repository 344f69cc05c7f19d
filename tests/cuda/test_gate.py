"""The compile gate: what it finds wrong, and, where the toolkit is installed, one kernel to machine code."""

import ctypes
from collections import Counter

import numpy as np
import pytest
from fake_driver import TUPLES

from refattn.engines.cuda import gate, launch
from refattn.engines.cuda.gate import FORMS, Code, faults
from refattn.engines.cuda.kernels.form import chunked, squared, tiled
from refattn.engines.cuda.kernels.roles import ROLES

PLAIN, TENSOR = FORMS["float32 64 64"], FORMS["bfloat16 128 128"]
SMALLEST = {"rows": squared(tiled(depth=16, width=16, storage="float16", wide=True), "rows")}
SMALLEST |= {"recur": chunked(16, 16)}
GOOD = Counter({"FFMA": 345, "LDGSTS.E.BYPASS.128": 26})
PTX = {ctypes.c_void_p: "u64", ctypes.c_int64: "u64", ctypes.c_int32: "u32", ctypes.c_float: "f32"}


@pytest.mark.parametrize(
    ("form", "code", "told"),
    [
        (PLAIN, Code(200, 0, 0, GOOD), []),
        (PLAIN, Code(255, 16, 0, GOOD), ["16 bytes of stack"]),
        (PLAIN, Code(255, 0, 8, GOOD), ["8 bytes of spills"]),
        (PLAIN, Code(200, 0, 0, GOOD + Counter({"LDL.LU": 2})), ["2 LDL"]),
        (PLAIN, Code(200, 0, 0, GOOD + Counter({"DFMA": 1})), ["float64: DFMA"]),
        (PLAIN, Code(200, 0, 0, GOOD + Counter({"I2F.F64.U16": 1})), ["float64: I2F.F64.U16"]),
        (PLAIN, Code(200, 0, 0, Counter()), ["no asynchronous copies of 16 bytes"]),
        (TENSOR, Code(200, 0, 0, GOOD + Counter({"HMMA.16816.F32.BF16": 128})), []),
        (TENSOR, Code(200, 0, 0, GOOD + Counter({"HMMA.16816.F32.BF16": 120})), ["120 HMMA instead of 128"]),
    ],
)
def test_what_is_wrong_with_machine_code(form, code, told):
    assert faults(form, code) == told


def test_what_is_missing_is_named_with_its_remedy(monkeypatch, capsys):
    monkeypatch.setattr(gate, "_tool", lambda name: None)
    assert "ptxas and cuobjdump: pip install 'refattn[cuda-check]'" in gate.missing()
    assert gate.main(("sm_80",)) == 0
    assert capsys.readouterr().out.startswith("skipped: the compile gate needs")


@pytest.mark.skipif(gate.missing() is not None, reason=str(gate.missing()))
@pytest.mark.parametrize("name", ["forward", "combine", "rows", "recur"])
def test_a_kernel_becomes_the_machine_code_that_its_form_asks(name):
    from refattn.engines.cuda import build

    form = SMALLEST.get(name, TENSOR)
    text = build.compiled(name, form)
    for architecture in gate.ARCHITECTURES:
        assert faults(form, gate.machine_code(text, architecture), name) == []
    # What the launcher packs is what the kernel's parameters are.
    fields = [field for taken in ROLES[name].takes for field in taken._fields]
    numbers = {field: (0,) * TUPLES[field] if field in TUPLES else np.float32(0) for field in fields}
    _, kinds = launch.packed(numbers)
    assert [PTX[kind] for kind in kinds] == gate.parameters(text)
    assert build.entry(text).startswith("_Z")
