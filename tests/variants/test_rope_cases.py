"""RoPE's golden cases: what they let pass and what they catch."""

from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest

import refattn as ra
from refattn import api, registry
from refattn.golden import build
from refattn.golden import inputs as recipes
from refattn.profiles import PROFILE_OF, PROFILES
from refattn.variants._place import place

MODULE = registry.info("rope").module
CASES = list(ra.variants()["rope"].cases())


def case(name):
    return next(c for c in CASES if c.name == f"rope/{name}")


def with_turns(case, turn, storage=None):
    """By how much out and lse exceed the bound where q and k are turned by `turn(row, position)` and kept so."""
    problem = build.problem_of(case, recipes.inputs(case))
    at = place(problem.spec.causal, problem.inputs)
    x = {n: a if a.dtype.kind in "biu" else a.astype(np.float64) for n, a in problem.inputs.items()}
    truth = problem.evaluate(np.asarray)
    limit = build.bounds(problem, {}, (), PROFILES[PROFILE_OF[case.dtype]])
    for name, places in (("q", at.i[:, 0, :, 0]), ("k", at.j[:, 0, 0, :])):
        rows = x[name]
        stand = np.broadcast_to(places, (len(rows), places.shape[1]))
        made = np.array(
            [[[turn(r, p) for r, p in zip(h, stand[b], strict=True)] for h in rows[b]] for b in range(len(rows))]
        )
        x[name] = made if storage is None else made.astype(storage).astype(np.float64)
    signature = problem.variant.signature(replace(problem.spec, rotary=None))
    bare = {n: a for n, a in x.items() if n in signature}
    found = api.build(replace(problem.spec, rotary=None), bare, "float64", ("out",)).evaluate(np.asarray)
    return {n: np.nanmax(np.abs(found[n] - truth[n]) - limit[n]) for n in ("out", "lse")}


def by_table(rope, head, circle):
    """turn(row, position) by cosines and sines of float32 as `circle(position, exponents)` gives them."""
    width = rope.width if rope.width is not None else head

    def turn(row, position):
        c, s = circle(int(position), np.arange(width // 2) * 2 / width)
        spec = ra.RoPE(pairing=rope.pairing, angles="table", width=width, part=rope.part)
        q = row[None, None, None]
        x = {"q": q, "k": q, "rope_cos": np.float64(c)[None], "rope_sin": np.float64(s)[None]}
        return MODULE.rotate(spec, x, place(False, x))[0][0, 0, 0].astype(np.float32).astype(np.float64)

    return turn


def double(base):
    """Angles in double precision, cosines and sines rounded to float32: what a careful backend hands over."""

    def circle(position, exponents):
        angles = position * base**-exponents
        return np.float32(np.cos(angles)), np.float32(np.sin(angles))

    return circle


def narrow(base, dtype):
    """Positions, frequencies and angles in a narrow type."""

    def circle(position, exponents):
        w = np.asarray(base**-exponents).astype(dtype)
        angles = (np.asarray(position).astype(dtype) * w).astype(np.float32)
        return np.cos(angles), np.sin(angles)

    return circle


EXACT = [c for c in CASES if registry.whole(c.spec)[0].rotary.angles == "exact" and c.dtype != "float64"]


@pytest.mark.parametrize("case", EXACT, ids=lambda c: c.name)
def test_double_angles_and_float32_cosines_are_within_the_bound(case):
    rope = registry.whole(case.spec)[0].rotary
    storage = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(case.dtype)
    turn = by_table(rope, case.sizes["D"], double(rope.base))
    assert max(with_turns(case, turn, storage).values()) <= 0


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("far_exact", np.float32), ("far_exact", ml_dtypes.bfloat16), ("far_bfloat16", ml_dtypes.bfloat16)],
)
def test_angles_in_a_narrow_type_are_caught_far_out(name, dtype):
    rope = registry.whole(case(name).spec)[0].rotary
    turn = by_table(rope, case(name).sizes["D"], narrow(rope.base, dtype))
    assert max(with_turns(case(name), turn).values()) > 0


def mistakes(rope):
    """Other rotations than the one that is asked."""
    width, other = rope.width, {"half": "interleaved", "interleaved": "half"}[rope.pairing]
    yield replace(rope, pairing=other)
    yield replace(rope, width=0)
    if rope.angles != "table":
        yield replace(rope, base=rope.base * 4)
    if width is not None and rope.angles != "table":
        yield replace(rope, width=width - 2)
        yield replace(rope, part={"first": "last", "last": "first"}[rope.part])


def wrong(case, rotary):
    """Whether another rotation's out or lse lies outside the bound."""
    problem = build.problem_of(case, recipes.inputs(case))
    limit = build.bounds(problem, {}, (), PROFILES[PROFILE_OF[case.dtype]])
    x = {n: a if a.dtype.kind in "biu" else a.astype(np.float64) for n, a in problem.inputs.items()}
    if rotary.width == 0:
        x = {n: a for n, a in x.items() if not n.startswith("rope_")}
        rotary = None
    found = api.build(replace(problem.spec, rotary=rotary), x, "float64", ("out",)).evaluate(np.asarray)
    truth = problem.evaluate(np.asarray)
    return any((np.abs(found[n] - truth[n]) > limit[n]).any() for n in ("out", "lse"))


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_other_rotation_is_caught_by_every_case(case):
    rope = registry.whole(case.spec)[0].rotary
    passed = [r for r in mistakes(rope) if not wrong(case, r)]
    assert passed == []


def test_exact_angles_are_caught_where_float32_ones_are_asked():
    for name in ("far_float32", "far_float32_last"):
        assert wrong(case(name), replace(case(name).spec.rotary, angles="exact"))


def test_the_cases_exercise_every_option():
    ropes = [registry.whole(c.spec)[0].rotary for c in CASES]
    assert {r.pairing for r in ropes} == {"half", "interleaved"}
    assert {r.angles for r in ropes} == {"exact", "float32", "table"}
    assert {r.part for r in ropes if r.width is not None} == {"first", "last"}
    assert {r.base for r in ropes} > {10000.0}
