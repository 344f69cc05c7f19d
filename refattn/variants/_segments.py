"""Cutting what comes in where segments end."""

from __future__ import annotations

from collections.abc import Iterator


def pieces(done: int, count: int, segment: int) -> Iterator[tuple[slice, int]]:
    """Stretches of `count` new tokens that lie in one segment each, after `done` tokens that have gone before.

    With each stretch goes how many tokens of its segment are there after it; where that is `segment`, it ends.
    """
    begin = 0
    while begin < count:
        inside = (done + begin) % segment
        end = min(count, begin + segment - inside)
        yield slice(begin, end), inside + end - begin
        begin = end
