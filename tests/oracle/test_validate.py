"""What a backend is asked, what becomes of its answers, and the command."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from refattn.cli.validate import validate as command
from refattn.errors import SpecError
from refattn.golden.load import load
from refattn.oracle import validate
from refattn.oracle.adapters import resolve
from refattn.oracle.offer import declared, offer
from refattn.oracle.plain import attention


def softmax(q, k, v):
    """No options, out only."""
    group = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a.astype(np.float64), group, 1) for a in (k, v))
    s = q.astype(np.float64) @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1])
    p = np.exp(s - s.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True) @ v).astype(q.dtype)


def asked(name, folder, fn=attention):
    return offer(load(name, folder), declared(fn))


def test_a_backend_is_told_only_what_the_case_uses(folder):
    assert set(asked("t/plain", folder).arguments) == {"q", "k", "v"}
    assert asked("t/scale", folder).arguments["scale"] == 0.5
    assert asked("t/top_left", folder).arguments["causal"] == "top_left"
    assert asked("t/window", folder).arguments["window"] == (5, 3)
    mask, probability = asked("t/keep", folder).arguments["keep"]
    assert mask.dtype == bool and probability == 0.75
    q_segment, k_segment = asked("t/segments", folder).arguments["segment_ids"]
    assert q_segment.shape == k_segment.shape == (1, 24)


def test_alibi_is_offered_as_slopes_where_declared_and_else_as_a_dense_bias(folder):
    def dense(q, k, v, *, causal=False, bias=None): ...

    slopes = asked("t/alibi_twelve", folder).arguments["alibi_slopes"]
    bias = asked("t/alibi_twelve", folder, dense).arguments["bias"]
    distance = np.abs(np.arange(24)[:, None] - np.arange(24))
    assert slopes.dtype == bias.dtype == np.float32
    np.testing.assert_array_equal(bias[0], -slopes[:, None, None] * distance.astype(np.float32))


def test_a_bias_of_two_directions_is_never_offered_as_slopes(folder):
    arguments = asked("t/alibi_half", folder).arguments
    assert "alibi_slopes" not in arguments
    past, future = arguments["bias"][0, 0], arguments["bias"][0, 3]
    assert np.isneginf(past[np.triu_indices(24, 1)]).all() and np.isneginf(future[np.tril_indices(24, -1)]).all()


def test_what_a_backend_does_not_take_is_not_supported_and_never_passed(folder):
    report = validate(softmax, folder=folder)
    assert report.ok
    assert [line.case for line in report.passed] == ["t/long", "t/plain"]
    sink = next(line for line in report.unsupported if line.case == "t/sink")
    assert sink.words == "takes no causal and no sink"


def test_options_by_double_star_declare_everything(folder):
    def forward(q, k, v, **options):
        return attention(q, k, v, **options)["out"]

    report = validate(forward, folder=folder)
    assert report.ok and not report.unsupported
    assert {line.outputs for line in report.lines} == {("out",)}


def test_a_backend_may_decline_and_an_exception_fails_its_case_alone(folder):
    def fussy(q, k, v, *, scale=None):
        if scale is not None:
            raise NotImplementedError("only the default scale\nand nothing else")
        raise ZeroDivisionError("a bug")

    report = validate(fussy, folder=folder, cases="t/[ps]*")
    by_name = {line.case: line for line in report.lines}
    assert by_name["t/scale"].verdict == "not supported" and by_name["t/scale"].words == "only the default scale"
    assert by_name["t/plain"].verdict == "fail" and by_name["t/plain"].words == "raised ZeroDivisionError: a bug"
    assert not report.ok


def test_ctrl_c_stops_the_run(folder):
    def interrupted(q, k, v):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        validate(interrupted, folder=folder)


@pytest.mark.parametrize(
    ("returned", "words"),
    [
        ((1, 2), "it gave tuple"),
        ({"lse": 1}, "a backend returns 'out'; it gave lse"),
        (np.zeros((1, 33, 4, 16)), "heads and length swapped"),
        (np.zeros(3), r"out has shape (3,); expected (1, 4, 33, 16)"),
        ("text", "allowed are bool"),
    ],
)
def test_a_wrong_answer_is_a_clear_failure(returned, words, folder):
    def wrong(q, k, v):
        return returned

    (line,) = validate(wrong, folder=folder, cases="t/plain").lines
    assert line.verdict == "fail" and words in line.words


def test_nothing_supported_is_not_ok(folder):
    assert not validate(softmax, folder=folder, cases="t/sink").ok


def test_the_reference_passes_everything(folder):
    assert validate("refattn:reference", folder=folder).ok


def test_a_profile_changes_the_bound(folder):
    strict = validate(attention, folder=folder, cases="t/bfloat16", profile="float32")
    own = validate(attention, folder=folder, cases="t/bfloat16")
    wide = validate(attention, folder=folder, cases="t/plain", profile="flash-bf16")
    tight = validate(attention, folder=folder, cases="t/plain")
    assert strict.lines[0].worst_ratio > own.lines[0].worst_ratio
    assert wide.lines[0].worst_ratio < tight.lines[0].worst_ratio


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"arrays": "tensorflow"}, "arrays is one of numpy, torch, jax"),
        ({"profile": "exact"}, "profile is one of"),
        ({"cases": "nothing*"}, "no case matches 'nothing"),
    ],
)
def test_bad_options_are_refused(options, words, folder):
    with pytest.raises(SpecError, match=words):
        validate(softmax, folder=folder, **options)


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("torch", "a target is torch:sdpa"),
        ("no_such_module:f", "module 'no_such_module' cannot be imported: ModuleNotFoundError"),
        ("math:no_such_function", "math has no 'no_such_function'; its functions are acos"),
        ("math:pi", "math:pi is a float; a backend is a function"),
    ],
)
def test_a_bad_target_says_what_is_wrong(target, words):
    with pytest.raises(SpecError, match=words):
        resolve(target)


def test_a_function_of_other_names_is_refused():
    with pytest.raises(SpecError, match="it takes key, query, value, not q, k, v"):
        declared(lambda query, key, value: None)
    with pytest.raises(SpecError, match="given: int"):
        declared(3)


KERNEL = """
from refattn.oracle.plain import attention as right

def attention(q, k, v, *, causal=None):
    return right(q * q.shape[-1] ** 0.5, k, v, causal=causal)["out"]
"""


def test_the_command_prints_a_line_a_case_the_words_and_its_exit_code(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    Path("kernel_under_test.py").write_text(KERNEL)
    app = typer.Typer()
    app.command()(command)

    def run(target, *options):
        return CliRunner().invoke(app, [target, "--folder", str(folder), *options])

    good = run("refattn.oracle.plain:attention", "--cases", "t/[lw]*")
    assert good.exit_code == 0
    assert "t/long_bfloat16" in good.stdout and "6 pass, 0 fail" in good.stdout
    wrong = run("kernel_under_test:attention", "--json", "report.json", "--cases", "t/*")
    assert wrong.exit_code == 1
    assert "your output equals scores without the scale" in " ".join(wrong.stdout.split())
    data = json.loads(Path("report.json").read_text())
    assert data["mistakes"] == ["no_scale"] and not data["ok"]
    assert {c["verdict"] for c in data["cases"]} == {"fail", "not supported"}
    assert isinstance(run("kernel_under_test:softmax").exception, SpecError)
