"""What a call keeps for the next one, and what its threads do: no stale result, no lost error, no lost task."""

import threading
from dataclasses import replace

import numpy as np
import pytest
from checks import same

import refattn as ra
from refattn import api, registry, unread
from refattn.engines.cpu import pool
from refattn.errors import ShapeError, SpecError

SDPA = type(ra.SDPA())


def qkv(rng, length=6, heads=2):
    return {n: rng.standard_normal((1, heads, length, 4)).astype(np.float32) for n in "qkv"}


def both(spec, inputs):
    found, expected = (ra.evaluate(spec, inputs, engine=engine).out for engine in ("cpu", "reference"))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    return found


CHANGED = {
    "q": (ra.SDPA(causal=True), {}, lambda x: np.negative(x["q"], out=x["q"])),
    "k": (ra.SDPA(causal=True), {}, lambda x: np.negative(x["k"], out=x["k"])),
    "slopes": (ra.ALiBi(slopes="learned"), {"slopes": np.ones(2)}, lambda x: x["slopes"].fill(0.125)),
    "table": (ra.SDPA(bias=ra.T5()), {"t5_table": np.eye(32, 2)}, lambda x: x["t5_table"].fill(0.5)),
    "mask": (ra.SDPA(), {"mask": np.eye(6, dtype=bool)}, lambda x: x["mask"].fill(True)),
    "bias": (ra.SDPA(), {"bias": np.eye(6)}, lambda x: x["bias"].__setitem__(0, 3.0)),
    "segments": (
        ra.SDPA(),
        {"q_segment_ids": np.arange(6) // 3, "k_segment_ids": np.arange(6) // 3},
        lambda x: x["k_segment_ids"].fill(0),
    ),
    "lengths": (ra.SDPA(), {"kv_lengths": np.array([2])}, lambda x: x["kv_lengths"].fill(5)),
    "positions": (ra.SDPA(causal="top_left"), {"k_positions": np.arange(6)}, lambda x: x["k_positions"].fill(-1)),
}


@pytest.mark.parametrize("name", CHANGED)
def test_an_array_changed_in_place_changes_the_result(name, rng):
    spec, extra, change = CHANGED[name]
    inputs = qkv(rng) | {n: a.copy() for n, a in extra.items()}
    before = both(spec, inputs).copy()
    change(inputs)
    assert not np.array_equal(both(spec, inputs), before)


def counted(monkeypatch):
    module, calls = registry.info("sdpa").module, []
    lower = module.lower
    monkeypatch.setattr(module, "lower", lambda *arguments: calls.append(1) or lower(*arguments))
    return calls


def test_equal_calls_are_lowered_once_and_others_once_each(rng, monkeypatch):
    calls = counted(monkeypatch)
    for _ in range(3):
        both(ra.SDPA(causal=True, bias=ra.ALiBi()), qkv(rng))
    assert len(calls) == 1
    both(ra.SDPA(causal=True, bias=ra.ALiBi()), qkv(rng, 7))
    assert len(calls) == 2
    for _ in range(3):
        both(ra.SDPA(), qkv(rng) | {"mask": np.ones((6, 6), bool)})
    assert len(calls) == 5


def test_large_plans_are_not_kept(rng, monkeypatch):
    calls = counted(monkeypatch)
    monkeypatch.setattr(unread, "_LARGEST", 0)
    for _ in range(3):
        both(ra.SDPA(causal=True), qkv(rng))
    assert len(calls) == 3


def test_a_spec_without_a_hash_is_taken(rng, monkeypatch):
    inputs = qkv(rng)
    expected = ra.attention(**inputs, causal=True, window=(2, 0), engine="cpu")

    def none(self):
        raise TypeError("unhashable")

    monkeypatch.setattr(SDPA, "__hash__", none)
    same(ra.attention(**inputs, causal=True, window=(2, 0), engine="cpu"), expected)
    same(both(ra.SDPA(causal=True, window=(2, 0)), inputs), expected)


def test_an_option_that_equals_an_allowed_one_is_refused_all_the_same(rng):
    inputs = qkv(rng)
    ra.attention(**inputs, causal=True, window=(1, 0), engine="cpu")
    for wrong in ({"window": (1.0, 0)}, {"window": (True, 0)}, {"causal": 1}):
        with pytest.raises(SpecError):
            ra.attention(**inputs, **({"causal": True} | wrong), engine="cpu")


def test_what_is_wrong_is_said_at_every_call(rng):
    inputs = qkv(rng) | {"kv_lengths": np.array([4])}
    ra.evaluate(ra.SDPA(), inputs, engine="cpu")
    inputs["kv_lengths"][0] = 7
    for _ in range(2):
        with pytest.raises(ShapeError, match="kv_lengths must lie between 0 and Lk = 6"):
            ra.evaluate(ra.SDPA(), inputs, engine="cpu")
        with pytest.raises(SpecError, match="want names 'weights'"):
            ra.evaluate(ra.SDPA(), qkv(rng), engine="cpu", want=("weights",))


def test_a_problem_may_change_its_own_sizes(rng):
    first, second = (api.build(ra.SDPA(), qkv(rng), None, ("out",)) for _ in range(2))
    assert first.sizes is not second.sizes
    assert replace(first, want=("lse",)).outline is not None


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_a_nan_has_no_sign(name, rng):
    inputs = qkv(rng, 20)
    inputs[name][0, 0, 3] = -np.float32(np.nan)
    inputs["bias"] = np.copysign(np.zeros((20, 20), np.float32), -1)
    found = ra.evaluate(ra.SDPA(), inputs, engine="cpu", want=("out", "lse"))
    assert np.isnan(found.out).any()
    for a in found.values():
        assert not np.signbit(a[np.isnan(a)]).any()


@pytest.mark.parametrize("bad", [np.inf, -np.inf])
@pytest.mark.parametrize("options", [{}, {"softcap": 2.0}, {"sink": np.ones(2, np.float32)}])
def test_an_infinity_in_q_reaches_its_row(bad, options, rng):
    """Logits of −∞ alone, which a sink or a cap would make numbers of."""
    inputs = qkv(rng, 40)
    inputs["k"] = np.abs(inputs["k"])
    inputs["q"][0, 0, 5, 1] = bad
    out = ra.attention(**inputs, **options, engine="cpu")
    assert np.isnan(out[0, 0, 5]).all()
    assert np.isnan(out).sum() == out.shape[3]


# Threads


@pytest.fixture(autouse=True)
def three(monkeypatch):
    monkeypatch.setenv(pool.VARIABLE, "3")


def test_ranges_cover_all_tasks_once_from_several_callers():
    found = np.zeros((4, 1000), int)

    def call(row):
        for _ in range(50):
            pool.spread(lambda a, start, stop: np.add(a[start:stop], 1, out=a[start:stop]), (row,), 1000, 1 << 40)

    callers = [threading.Thread(target=call, args=(row,)) for row in found]
    for caller in callers:
        caller.start()
    for caller in callers:
        caller.join()
    assert (found == 50).all()


def test_no_more_threads_run_than_asked_for():
    before = threading.active_count()
    seen, barrier = set(), threading.Barrier(3)

    def part():
        barrier.wait(timeout=60)
        seen.add(threading.get_ident())

    for _ in range(20):
        pool.together(part, tuple, 9, 1 << 40)
    assert len(seen) == 3
    assert threading.active_count() <= before + 2


class Wrong(Exception):
    pass


@pytest.mark.parametrize("error", [Wrong, KeyboardInterrupt])
@pytest.mark.parametrize("of_caller", [True, False])
def test_an_error_in_any_thread_reaches_the_caller(error, of_caller):
    caller, barrier, done = threading.get_ident(), threading.Barrier(3), []

    def part():
        barrier.wait(timeout=60)
        if (threading.get_ident() == caller) == of_caller:
            raise error
        done.append(1)

    with pytest.raises(error):
        pool.together(part, tuple, 9, 1 << 40)
    assert len(done) == (2 if of_caller else 1)
    pool.together(done.clear, tuple, 9, 1 << 40)
    assert not done


def test_after_an_error_no_further_range_begins():
    begun = []

    def kernel(start, stop):
        begun.append(start)
        raise Wrong

    with pytest.raises(Wrong):
        pool.spread(kernel, (), 1200, 1 << 40)
    assert len(begun) <= 3


def test_a_helper_that_is_busy_elsewhere_is_not_waited_for():
    held, go = threading.Semaphore(0), threading.Event()

    def long():
        held.release()
        go.wait(60)

    other = threading.Thread(target=lambda: pool.together(long, tuple, 9, 1 << 40))
    other.start()
    for _ in range(3):
        assert held.acquire(timeout=60)
    done = []
    pool.together(lambda: done.append(1), tuple, 9, 1 << 40)
    assert done == [1]
    go.set()
    other.join()
