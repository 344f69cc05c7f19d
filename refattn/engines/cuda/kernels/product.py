"""What a forward pass asks of the two products of a tile, Q·Kᵀ and P·V, however their numbers lie in threads."""

from __future__ import annotations

from typing import Any, NamedTuple


class Product(NamedTuple):
    """Sizes and device functions.

    A thread has a part of `tall` rows: `broad` scores of each in an array s, `wide` outputs of each in o; `lanes`
    threads beside each other have the rest of them. words: of shared memory.

    fill_q, fill_k, fill_v: a tile's rows to shared memory, as `tiles` makes them. multiply(s): the products q·k.
    accumulate(o, s): o += P·V with weights P from s, which all lanes of a warp call. sweep(search): values that are not
    finite become 0; in a search they become 1, and all others 0. row(r), key(c), column(w): of the tile, where a score
    or output of this thread stands; score(r, c), output(r, w): where in s and o it is. leads(): whether this thread
    speaks for the rows. store(out, i, x): out[i] = x.
    """

    tall: int
    broad: int
    wide: int
    lanes: int
    words: int
    fill_q: Any
    fill_k: Any
    fill_v: Any
    multiply: Any
    accumulate: Any
    sweep: Any
    row: Any
    key: Any
    column: Any
    score: Any
    output: Any
    leads: Any
    store: Any
