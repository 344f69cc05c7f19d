"""Options of SDPA that few backends have: who takes them is asked, who does not is never counted as right."""

import numpy as np
import pytest

import refattn as ra
from refattn.golden import suite
from refattn.golden.build import build
from refattn.oracle import plain, validate

NAMES = (
    "int8/a_scale_for_each_token", "int8/scales_of_padding", "paged/decode_with_entries_of_no_block", "paged/int8",
    "paged/sigmoid", "sigmoid/alibi_and_keep_mask", "sigmoid/plain",
    "sigmoid/poisoned_padding", "sigmoid/softcap_bias_and_mask",
)  # fmt: skip


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    built = {c.name: build(c) for c in suite.cases() if c.name in NAMES}
    target = tmp_path_factory.mktemp("few")
    suite.publish(target, {name: (b.manifest, b.tensors) for name, b in built.items()})
    return target


@pytest.mark.parametrize("fn", ["refattn:reference", "refattn:cpu"])
def test_refattns_own_engines_pass_with_every_gradient(fn, few):
    report = validate(fn, folder=few)
    assert len(report.passed) == len(NAMES), repr(report)
    for line in report.lines:
        real = {n for n in ra.golden.load.load(line.case, few).expected if n.startswith("d")}
        assert real <= set(line.outputs), line.case


def test_a_backend_that_declares_no_such_option_is_not_supported(few):
    report = validate(plain.attention, folder=few)
    assert [line.case for line in report.unsupported] == list(NAMES)
    words = {line.case: line.words for line in report.unsupported}
    assert "takes no normalizer and no sigmoid_bias" in words["sigmoid/plain"]
    assert "takes no k_scale and no v_scale" in words["int8/scales_of_padding"]
    assert "takes no k_scale and no v_scale and no block_table" in words["paged/int8"]


def test_a_softmax_for_a_sigmoid_fails_and_the_library_of_softmax_mistakes_is_silent(few):
    def attend(q, k, v, *, normalizer=None, sigmoid_bias=None, **options):
        return plain.attention(q, k, v, **options)["out"]

    report = validate(attend, folder=few, cases="sigmoid/*")
    assert len(report.failures) == 4
    assert not report.findings


def test_a_sigmoid_written_down_plainly_passes(few):
    def attend(q, k, v, *, normalizer, sigmoid_bias):
        k, v = (np.repeat(a, q.shape[1] // a.shape[1], axis=1) for a in (k, v))
        s = np.einsum("bhid,bhjd->bhij", q, k) * np.float32(q.shape[3] ** -0.5) + np.float32(sigmoid_bias)
        return np.einsum("bhij,bhjd->bhid", 1 / (1 + np.exp(-s)), v)

    report = validate(attend, folder=few, cases="sigmoid/plain")
    assert len(report.passed) == 1, repr(report)


def test_scales_that_are_not_read_fail_without_a_name_for_the_mistake(few):
    def attend(q, k, v, *, k_scale=None, v_scale=None, **options):
        return plain.attention(q, k.astype(q.dtype), v.astype(q.dtype), **options)

    report = validate(attend, folder=few, cases="int8/*")
    assert len(report.failures) == 2
    assert not report.findings


def test_integers_dequantised_first_pass(few):
    def attend(q, k, v, *, k_scale, v_scale, **options):
        return plain.attention(q, k * k_scale[..., None], v * v_scale[..., None], **options)["out"]

    report = validate(attend, folder=few, cases="int8/*")
    assert len(report.passed) == 2, repr(report)


def test_blocks_in_the_order_in_which_they_stand_fail_without_a_name_for_the_mistake(few):
    def attend(q, k, v, *, block_table=None, kv_lengths=None, causal=None):
        rows = [np.concatenate(list(np.roll(a, 1, 0)[: block_table.shape[1]]), 1)[None] for a in (k, v)]
        k, v = (np.repeat(np.nan_to_num(a), len(q), 0) for a in rows)
        return plain.attention(q, k, v, causal=causal, kv_lengths=kv_lengths)["out"]

    report = validate(attend, folder=few, cases="paged/decode*")
    assert len(report.failures) == 1
    assert not report.findings
