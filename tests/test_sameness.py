"""The tool that compares bytes between configurations: what it covers, and that it sees a result that depends."""

import importlib.util
import json
import os
import subprocess
import sys
from itertools import combinations, product
from pathlib import Path

import pytest

from refattn.golden.load import names

TOOL = Path(__file__).resolve().parent.parent / "tools" / "sameness.py"
pytestmark = pytest.mark.skipif(not TOOL.exists(), reason="the tools are in the repository alone")


@pytest.fixture(scope="module")
def sameness():
    spec = importlib.util.spec_from_file_location("sameness", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("kernels", "rows"), [("abc", 6), ("abcd", 8)])
def test_the_configurations_cover_every_pair_of_settings(sameness, kernels, rows):
    found = sameness.configurations(list(kernels), ["one", "other"])
    assert len(found) == rows
    choices = (list(kernels), [1, 2], ["native", "generic"], ["one", "other"])
    for i, j in combinations(range(4), 2):
        assert {(row[i], row[j]) for row in found} == set(product(choices[i], choices[j]))


def test_a_sample_is_spread_over_the_suite(sameness):
    found = sameness.chosen(40)
    assert len(set(found)) == 40 and set(found) <= set(names())
    assert len({name.partition("/")[0] for name in found}) >= 20
    assert sameness.chosen(None) == names()


def reported(variables, chosen):
    run = subprocess.run(
        [sys.executable, str(TOOL), "--report"],
        input=json.dumps(chosen), env=os.environ | variables, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return json.loads(run.stdout)


# Text of a sitecustomize.py: what is published is plain float64, as NumPy and its BLAS compute it.
PLAIN = """
from dataclasses import replace

import numpy as np

import refattn.engines.certified as certified

proved = certified.certify

def certify(problem, cotangents=None, wrt=(), **options):
    plain = problem.differentiate(np.asarray, cotangents or {}, wrt)
    found = proved(problem, cotangents, wrt, **options)
    return {name: replace(part, value=np.asarray(plain[name], np.float64)) for name, part in found.items()}

certified.certify = certify
"""


def test_a_result_that_depends_on_the_blas_is_seen(sameness, tmp_path):
    """Two kernels give the committed bytes, and two different ones where plain float64 stands for what is proved."""
    kernels = [kernel for kernel, needs in sameness.KERNELS.items() if sameness.features().get(needs)]
    if len(kernels) < 2:
        pytest.skip("this machine has one BLAS kernel")
    case = ["lengths/127x127"]
    (tmp_path / "sitecustomize.py").write_text(PLAIN)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    ends = [{"OPENBLAS_CORETYPE": kernel} for kernel in (kernels[0], kernels[-1])]
    committed = {name: sameness.committed()[name] for name in case}
    assert all(reported(end, case)["cases"] == committed for end in ends)
    one, other = (reported(end | {"PYTHONPATH": path}, case)["cases"] for end in ends)
    assert one != other
