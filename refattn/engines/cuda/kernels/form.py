"""What a kernel is compiled for, and what it is called with."""

from __future__ import annotations

from typing import Any, NamedTuple

LANES = 32


class Form(NamedTuple):
    """A kernel's constants.

    depth, width: D and Dv; storage of q, k, v and out: float32, bfloat16 or float16; wide: rows begin at multiples of
    16 bytes. rows, keys: of a tile; threads: of a block, of which `lanes` share the rows of a product in float32.
    positions, segments, mask: whether these hide pairs; slopes, table, dense: which biases there are; softcap.
    split: whether the keys are cut into parts, which `decode` joins; paged: whether they stand in blocks.
    divided, delta, weighed, moved: of a Recurrent plan, whether it has a weight, the delta rule, a weight always
    written, a transition. tabled: of a backward pass, whether it gives the cotangent of a table.
    """

    depth: int
    width: int
    storage: str
    wide: bool
    rows: int
    keys: int
    threads: int
    lanes: int = 16
    positions: bool = False
    segments: bool = False
    mask: bool = False
    slopes: bool = False
    table: bool = False
    dense: bool = False
    softcap: bool = False
    split: bool = False
    paged: bool = False
    divided: bool = False
    delta: bool = False
    weighed: bool = False
    moved: bool = False
    tabled: bool = False

    @property
    def placed(self) -> bool:
        """Whether any score depends on positions."""
        return self.positions or self.slopes or self.table


class Arguments(NamedTuple):
    """What a kernel reads and writes: pointers, and numbers.

    q, k, v with strides (batch, head, row) in elements, rows dense; out (B,Hq,Lq,Dv) and lse (B,Hq,Lq) in C order.
    Queries have batches 0 to B − 1, heads 0 to Hq − 1, of which `share` read one key head. q_at, q_segment (1 or B,Lq),
    k_at, k_segment (1 or B,Lk) int32, at_strides their steps from batch to batch. q_ends (B, tiles, 4) int32: least and
    greatest position and segment of a tile's rows that are inside their length, the least above the greatest where
    none is; k_ends of the keys; q_length, k_length (B,) int32. span: least and greatest visible difference.

    unit: the scale times log₂e; cap: the scale over the softcap, and it times log₂e. Times log₂e: slopes (Hq,), sink
    (Hq,), −∞ for none, and table (Hq, n), its column `zero` for the difference 0. dense in float32, mask a byte each,
    with strides of b, h, i, j, 0 where repeated. splits: parts of the keys; of a split form out is (B,Hq,Lq,splits,Dv)
    float32, lse (B,Hq,Lq,splits). Of a paged form k and v are blocks of `page` keys, (N,Hkv,page,D), and key j of
    sequence b stands in block pages[b, j div page], of (B, entries) int32.
    """

    q: Any
    k: Any
    v: Any
    out: Any
    lse: Any
    q_at: Any
    k_at: Any
    q_segment: Any
    k_segment: Any
    q_ends: Any
    k_ends: Any
    q_length: Any
    k_length: Any
    slopes: Any
    sink: Any
    table: Any
    dense: Any
    mask: Any
    heads: Any
    share: Any
    lq: Any
    lk: Any
    q_strides: Any
    k_strides: Any
    v_strides: Any
    at_strides: Any
    span: Any
    unit: Any
    cap: Any
    columns: Any
    zero: Any
    dense_strides: Any
    mask_strides: Any
    splits: Any
    pages: Any
    page: Any
    entries: Any


def padded(count: int, unit: int) -> int:
    """The next multiple."""
    return -(-count // unit) * unit


_BUSY = ("mask", "table", "dense", "softcap")  # take registers of each pair


def tiled(*, depth: int, width: int, storage: str, **others: bool) -> Form:
    """A form with its tiles: what its scores and outputs leave of 255 registers is enough, which the gate checks."""
    busy = any(others.get(name) for name in _BUSY)
    deep = storage == "float32" and max(depth, width) > 64
    rows, keys = 32 if busy and deep else 64, 32 if busy or deep else 64
    if others.get("split"):
        return Form(depth, width, storage, rows=16, keys=keys, threads=64 if busy and deep else 32, **others)
    return Form(depth, width, storage, rows=rows, keys=keys, threads=128, **others)


def squared(form: Form, name: str) -> Form:
    """The form with tiles for the backward kernel "rows" or "keys": those it keeps, and those that it meets."""
    deep, busy = max(form.depth, form.width) > 64, any(getattr(form, option) for option in _BUSY)
    own = 32 if deep and form.storage == "float32" else 64
    if name == "rows":
        return form._replace(rows=own, keys=32)
    return form._replace(rows=16 if deep and busy and form.storage != "float32" else 32, keys=own)


def chunked(features: int, width: int, **options: bool) -> Form:
    """The form of a Recurrent plan: chunks of 32 rows and columns, of 16 where there are many features."""
    size, lanes = 32 if features <= 256 else 16, 16 if features <= 64 else 32
    wide = features % 4 == 0
    return Form(features, width, "float32", wide=wide, rows=size, keys=size, threads=128, lanes=lanes, **options)
