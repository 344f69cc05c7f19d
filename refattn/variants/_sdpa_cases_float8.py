"""Golden cases whose inputs and results are 8-bit floats, and both rules for what lies beyond their largest number."""

from __future__ import annotations

from collections.abc import Iterator

from refattn.case import Case, Recipe, Rows
from refattn.variants._case_parts import NAN, edited, head_marks, rows_of, scaled, sizes
from refattn.variants.sdpa import SDPA

E4M3, E5M2 = "float8_e4m3fn", "float8_e5m2"
QUERIES = Recipe(exp2=-8)
# A seventh of the largest number of each.
LARGE = {E4M3: Recipe(kind="constant", value=64.0), E5M2: Recipe(kind="constant", value=8192.0)}
# The multiples of the least number below the smallest normal one.
SUBNORMAL = {E4M3: Recipe(kind="integers", exp2=-9, limit=7), E5M2: Recipe(kind="integers", exp2=-16, limit=3)}


def cases() -> Iterator[Case]:
    """Plain problems, then overflow."""
    yield from _plain()
    yield from _beyond()


def _plain() -> Iterator[Case]:
    for dtype, short in ((E4M3, "e4m3"), (E5M2, "e5m2")):
        yield Case(
            name=f"float8/plain_{short}",
            spec=SDPA(),
            sizes=sizes((9, 17), (2, 1), (8, 4)),
            dtype=dtype,
            catches="8-bit numbers decoded with the other format's exponent, or queries rounded again after the scale",
        )
        yield Case(
            name=f"float8/causal_heads_{short}",
            spec=SDPA(causal=True),
            sizes=sizes((33, 33), (4, 2), (16, 8)),
            dtype=dtype,
            inputs={"v": head_marks(2)},
            catches="heads mixed up where 8-bit operands are packed by fours",
        )
        yield Case(
            name=f"float8/poison_{short}",
            spec=SDPA(causal="top_left"),
            sizes=sizes((7, 259), (2, 2), (4, 2)),
            dtype=dtype,
            inputs={n: rows_of(Recipe(), (9, 255, 258), NAN) for n in ("k", "v")},
            cotangents={"dout": Recipe(exp2=-5)},
            rows=Rows(q=(0, 3, 6), k=(0, 3, 6, 7, 9, 258)),
            flags=("poison",),
            catches="the one NaN pattern of e4m3, or those of e5m2, multiplied by a weight of 0",
        )
        yield Case(
            name=f"float8/subnormal_{short}",
            spec=SDPA(scale=2.0 ** (6 if dtype == E4M3 else 13)),
            sizes=sizes((8, 12), (2, 1), (8, 8)),
            dtype=dtype,
            inputs={"k": SUBNORMAL[dtype]},
            flags=("subnormal",),
            catches="subnormal keys, of which 8-bit floats have many, flushed to 0 before the scale lifts them",
        )
        yield Case(
            name=f"float8/window_300_{short}",
            spec=SDPA(causal=True, window=(5, 0)),
            sizes=sizes((300, 300), (2, 1), (8, 8)),
            dtype=dtype,
            cotangents={"dlse": Recipe(exp2=-6)},
            rows=Rows(q=(0, 5, 6, 128, 299), k=(0, 5, 6, 127, 128, 299)),
            catches="lse returned in 8 bits; a window that starts a key too early in tiles of 128",
        )
        yield Case(
            name=f"float8/last_key_257_{short}",
            spec=SDPA(causal="bottom_right", scale=1.0),
            sizes=sizes((9, 257), (8, 1), (8, 1)),
            dtype=dtype,
            inputs={"k": edited(Recipe(), scaled((None, None, (0, 128, 255, 256), None), 2.0)), "q": QUERIES},
            cotangents={"dout": Recipe(exp2=-5)},
            rows=Rows(q=tuple(range(9)), k=(0, 128, 255, 256)),
            catches="sums of weights kept in 8 or 16 bits over 257 keys; the last key dropped",
        )


def _beyond() -> Iterator[Case]:
    """The gradient of the only value is a sum over sixteen queries, beyond the largest number but in one column."""
    for dtype, short in ((E4M3, "e4m3"), (E5M2, "e5m2")):
        for overflow in ("nonsaturate", "saturate"):
            yield Case(
                name=f"float8/overflow_{short}_{overflow}",
                spec=SDPA(),
                sizes=sizes((8, 1), (2, 1), (4, 4)),
                dtype=dtype,
                cotangents={"dout": edited(LARGE[dtype], scaled((None, None, None, 1), 2.0**-5))},
                overflow=overflow,
                flags=("overflow",),
                catches=_RULE[short, overflow],
            )


_RULE = {
    ("e4m3", "nonsaturate"): "448 returned for a gradient of 1024 where the rule asks for NaN, e4m3 having no infinity",
    ("e4m3", "saturate"): "NaN returned for a gradient of 1024 where the rule asks for 448",
    ("e5m2", "nonsaturate"): "57344 returned where the rule asks for an infinity",
    ("e5m2", "saturate"): "an infinity returned where the rule asks for 57344",
}
