"""A small certified suite of its own: one case for every kind of mistake that the diagnosis must name."""

import pytest

from refattn import registry
from refattn.case import Case, Edit, Recipe, Rows
from refattn.golden import suite
from refattn.golden.build import build

SDPA, ALIBI = registry.spec_class("sdpa"), registry.spec_class("alibi")
SOME_MASKED = Recipe(kind="bernoulli", true=160)
NAN = float("nan")


def case(name, spec, *, heads=(4, 2), lengths=(24, 24), width=(16, 16), batch=1, **rest):
    sizes = dict(zip(("B", "Hq", "Hkv", "Lq", "Lk", "D", "Dv"), (batch, *heads, *lengths, *width), strict=True))
    return Case(name=f"t/{name}", spec=spec, sizes=sizes, catches="a planted mistake", **rest)


NOTHING = Edit(at=(None, None, (3, 17), None), op="set", value=0.0)
EMPTY = Recipe(kind="bernoulli", true=200, shape=(1, 1, 24, 24), edits=(NOTHING,))
POISON = Recipe(edits=(Edit(at=(None, None, (20, 23), None), op="set", value=NAN),))
CHOSEN = Rows(q=(0, 1, 1024, 1500, 2048), k=(0, 1023, 1024, 2048))
LONG = {"lengths": (2049, 2049), "heads": (2, 1), "width": (16, 8), "rows": CHOSEN}
CASES = [
    case("plain", SDPA(), lengths=(33, 65)),
    case("top_left", SDPA(causal="top_left"), lengths=(17, 31)),
    case("bottom_right", SDPA(causal="bottom_right"), lengths=(17, 31), heads=(6, 3), cotangents={"dlse": Recipe()}),
    case("window", SDPA(window=(5, 3)), width=(16, 8)),
    case("window_causal", SDPA(causal=True, window=(7, 0)), lengths=(40, 40)),
    case("softcap", SDPA(causal=True, softcap=2.0), inputs={"q": Recipe(exp2=-6)}),
    case("sink", SDPA(causal=True), inputs={"sink": Recipe(exp2=-7)}),
    case("scale", SDPA(scale=0.5), lengths=(9, 12)),
    case("empty", SDPA(), inputs={"mask": EMPTY}, cotangents={"dlse": Recipe()}),
    case("bias", SDPA(), inputs={"bias": Recipe(kind="normal12", shape=(1, 4, 24, 24))}),
    case(
        "lengths",
        SDPA(causal="bottom_right"),
        batch=3,
        inputs={
            "q_lengths": Recipe(kind="values", values=(24, 5, 0)),
            "kv_lengths": Recipe(kind="values", values=(24, 9, 7)),
        },
    ),
    case(
        "segments",
        SDPA(causal=True),
        inputs={
            "q_segment_ids": Recipe(kind="values", values=(0,) * 10 + (1,) * 14, shape=(1, 24)),
            "k_segment_ids": Recipe(kind="values", values=(0,) * 10 + (1,) * 14, shape=(1, 24)),
        },
    ),
    case(
        "positions",
        SDPA(causal="bottom_right", window=(6, 0)),
        inputs={
            "q_positions": Recipe(kind="values", values=tuple(range(3, 75, 3)), shape=(1, 24)),
            "k_positions": Recipe(kind="values", values=tuple(range(0, 72, 3)), shape=(1, 24)),
        },
    ),
    case("keep", SDPA(keep_probability=0.75), inputs={"keep": SOME_MASKED}),
    case(
        "poison",
        SDPA(causal="bottom_right"),
        lengths=(20, 24),
        inputs={"k": POISON, "v": POISON, "kv_lengths": Recipe(kind="values", values=(20,))},
    ),
    case("live_nan", SDPA(causal=True), lengths=(24, 24), inputs={"v": POISON}),
    case("alibi_twelve", ALIBI(), heads=(12, 4), width=(8, 8)),
    case("alibi_half", ALIBI(direction="half"), heads=(4, 4)),
    case("alibi_learned", ALIBI(slopes="learned"), inputs={"slopes": Recipe(kind="normal12", exp2=-10)}),
    case("seventy", SDPA(causal=True), lengths=(70, 70), heads=(2, 2)),
    case("bfloat16", SDPA(causal=True), dtype="bfloat16", lengths=(65, 65)),
    case("float16", SDPA(window=(9, None)), dtype="float16", lengths=(33, 47)),
    case("float64", SDPA(causal=True, softcap=3.0), dtype="float64", lengths=(17, 17)),
    case("long", SDPA(), **LONG),
    case("long_bfloat16", SDPA(causal=True), dtype="bfloat16", **LONG),
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The cases, built and written as a suite."""
    built = {c.name: build(c) for c in CASES}
    target = tmp_path_factory.mktemp("suite")
    suite.publish(target, {name: (b.manifest, b.tensors) for name, b in built.items()})
    return target
