"""The exactness test: which values that balls leave open are a double, a tie or 0 exactly, because terms cancel.

A ball that no precision decides holds one breakpoint of the rounding. The reference's own text runs over a prime field
(`field.py`), and a value whose residue is that breakpoint's is proved equal to it but for a chance of 2^-100 at most.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from fractions import Fraction
from hashlib import sha256
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
from flint import ctx, fmpq
from numpy.typing import NDArray

from refattn.dtypes import odd_fraction
from refattn.engines.certified.elements import Field
from refattn.engines.certified.enclosure import End
from refattn.engines.certified.escalation import concerned, of_rows, still_open
from refattn.engines.certified.field import FieldSpace
from refattn.engines.certified.modulus import draw
from refattn.engines.certified.rounding import EXACT, IDENTITY, ROUNDED, Rounded
from refattn.engines.certified.tier import Task

# log2 of the chance of a false identity that is accepted, and the bits of the primes tried until it is reached.
CHANCE = -100
PRIME_BITS = (256, 384, 768)
# Those of the numerator or denominator of a double or a midpoint, and one for the difference.
CANDIDATE_BITS = 1077
# Ends of balls are widened to multiples of 2^-LEAST: no breakpoint but 0 is nearer to 0 than 2^-1075.
_LEAST = 20000


def exactness(task: Task, decided: Mapping[str, Rounded], bits: int) -> dict[str, Rounded]:
    """What the field says of the elements still enclosed, with balls of `bits` bits, which have been found enough."""
    open_ = still_open(decided)
    part, rows = concerned(task, open_)
    seed, chosen = identity(task), {name: of_rows(where, rows) for name, where in open_.items()}
    found, needed = dict(decided), 0.0
    before, ctx.prec = ctx.prec, bits
    try:
        for size in PRIME_BITS:
            if size < needed:
                continue
            space, needed = FieldSpace(draw(seed, size)), math.inf
            values = part.problem.differentiate(space.real, part.cotangents, part.wrt)
            for name, where in chosen.items():
                verdicts = _verdicts(values[name], where, part.problem.dtype == np.float64)
                found[name] = _taken(decided[name], open_[name], verdicts, space.modulus.bits)
                needed = min([needed, *(v.bits for v in verdicts if v and v.bits > space.modulus.bits)])
    finally:
        ctx.prec = before
    return {name: found[name] for name in open_}


class Verdict(NamedTuple):
    """An exact value, its status, and the bits that a prime needs for the chance accepted."""

    value: Fraction
    status: int
    bits: float


def identity(task: Task) -> bytes:
    """sha256 of everything that the values depend on."""
    problem, digest = task.problem, sha256()
    digest.update(json.dumps([problem.spec.to_json(), problem.length], sort_keys=True).encode())
    for arrays in (problem.inputs, task.cotangents):
        for name in sorted(arrays):
            a = np.ascontiguousarray(arrays[name])
            digest.update(f"{name} {a.dtype.name} {a.shape} ".encode() + a.tobytes())
    return digest.digest()


def breakpoint_in(low: Fraction, high: Fraction, middle: float, to_nearest: bool) -> Fraction | None:
    """0 if it lies in [low, high], else the only breakpoint there: an even double, or a midpoint; `middle` is near."""
    if low <= 0 <= high:
        return Fraction(0)
    around = [middle]
    for _ in range(2):
        around = [math.nextafter(around[0], -math.inf), *around, math.nextafter(around[-1], math.inf)]
    if not np.isfinite(around).all() or not Fraction(around[0]) < low <= high < Fraction(around[-1]):
        return None
    numbers = [Fraction(x) for x in around]
    points = [q for x, q in zip(around, numbers, strict=True) if not np.float64(x).view(np.int64) & 1]
    if to_nearest:
        points += [(a + b) / 2 for a, b in pairwise(numbers)]
    inside = [q for q in points if low <= q <= high]
    return inside[0] if len(inside) == 1 else None


def _verdicts(values: Field, where: NDArray[np.bool_], to_nearest: bool) -> list[Verdict | None]:
    """Of the elements chosen: what each is, or None where that is not known."""
    space = values.space
    t, _, r = values.balls.enclosure()
    bounded = np.isfinite(t) & np.isfinite(r) & where
    ends = iter(values.balls.endpoints(bounded))
    found: list[Verdict | None] = []
    for at in zip(*np.nonzero(where), strict=True):
        if not bounded[at]:
            found.append(None)
            continue
        low, high = next(ends)
        rational = values.rational[at]
        if rational is not None and not space.chosen:
            value = Fraction(int(rational.p), int(rational.q))
            found.append(Verdict(value, EXACT if float(value) == value else ROUNDED, 0))
            continue
        point = breakpoint_in(_widened(low, False), _widened(high, True), float(t[at]), to_nearest)
        if point is None or space.lift(fmpq(point.numerator, point.denominator)) != values.residue[at]:
            found.append(None)
            continue
        short = space.chance(values.weight[at] + CANDIDATE_BITS) - CHANCE
        found.append(Verdict(point, IDENTITY, space.modulus.bits + short))
    return found


def _widened(end: End, up: bool) -> Fraction:
    """An end as a rational of tame size, moved outwards if at all."""
    man, exp = end
    if exp >= -_LEAST:
        return man * Fraction(2) ** exp
    shift = -exp - _LEAST
    return Fraction(-(-man >> shift) if up else man >> shift, 1 << _LEAST)


def _taken(old: Rounded, open_: NDArray[np.bool_], verdicts: Sequence[Verdict | None], bits: int) -> Rounded:
    """The old roundings with what the verdicts settle for a prime of that many bits."""
    copies: Any = (part.copy() for part in old)
    new = Rounded(*copies)
    for at, verdict in zip(zip(*np.nonzero(open_), strict=True), verdicts, strict=True):
        if verdict is not None and verdict.bits <= bits:
            # Division of integers rounds to nearest, ties to even.
            new.nearest[at] = near = float(verdict.value)
            new.odd[at] = near if near == verdict.value else odd_fraction(verdict.value)
            new.status[at], new.width[at] = verdict.status, 0.0
    return new
