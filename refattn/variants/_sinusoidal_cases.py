"""Golden cases of sinusoidal embeddings. Weights are small: a sum over E of embeddings near 1 stays near 1."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Flag, Recipe
from refattn.variants._case_parts import edited, flagged, integers, scaled, set_
from refattn.variants.sinusoidal import Sinusoidal

FLAGS: Mapping[str, Flag] = {
    "sinusoidal": Flag("Sines and cosines of positions added before the projections, whose gradients are published."),
    "sinusoidal_concatenated": Flag("Sines in the first half of the columns, cosines in the second."),
    "sinusoidal_half_minus_one": Flag("Exponents over E/2 − 1: the slowest wavelength is reached."),
    "sinusoidal_offset": Flag("A first position that is not 0."),
    "sinusoidal_multiplier": Flag("Embeddings multiplied before positions are added."),
    "sinusoidal_base": Flag("Another base than 10000."),
}


def cases() -> Iterator[Case]:
    """Every layout, denominator, multiplier and an offset; odd widths, far positions, padding."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "sinusoidal": True,
        "sinusoidal_concatenated": spec.layout == "concatenated",
        "sinusoidal_half_minus_one": spec.denominator == "half_minus_one",
        "sinusoidal_offset": spec.offset != 0,
        "sinusoidal_multiplier": spec.multiplier is not None,
        "sinusoidal_base": spec.base != 10000.0,
        "causal_top_left": spec.causal,
        "causal": spec.causal,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def sizes(
    length: int, width: int, heads: tuple[int, int] = (2, 2), widths: tuple[int, int] = (4, 4), batch: int = 1
) -> dict[str, int]:
    """Sizes by name from L, E, (Hq, Hkv), (D, Dv) and B."""
    (hq, hkv), (d, dv) = heads, widths
    return {"B": batch, "L": length, "E": width, "Hq": hq, "Hkv": hkv, "D": d, "Dv": dv}


def weights(exp2: int = -9) -> dict[str, Recipe]:
    """Projections of that size, the standard deviation being 256 · 2^exp2."""
    return {name: Recipe(exp2=exp2) for name in ("wq", "wk", "wv")}


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="sinusoidal/paper",
        spec=Sinusoidal(),
        sizes=sizes(9, 8, (4, 2), (6, 4)),
        inputs=weights(),
        cotangents={"dlse": Recipe()},
        catches="sines and cosines exchanged; exponents −i/E for −2i/E; positions added to the values left out",
    )
    yield Case(
        name="sinusoidal/fairseq",
        spec=Sinusoidal(layout="concatenated", denominator="half_minus_one", offset=2, multiplier="sqrt", causal=True),
        sizes=sizes(12, 10, (2, 2), (5, 4)),
        inputs=weights() | {"x": Recipe(exp2=-10)},
        cotangents={"dlse": Recipe()},
        catches="positions from 0 where padding_idx + 1 is asked; √D for √E; P multiplied as well",
    )
    yield Case(
        name="sinusoidal/marian",
        spec=Sinusoidal(layout="concatenated", multiplier="sqrt", scale=2.0),
        sizes=sizes(6, 4, (2, 1), (2, 3), batch=2),
        dtype="float16",
        inputs=weights(-10) | {"x": Recipe(exp2=-9)},
        catches="columns in turn where halves are asked; E/2 − 1 for E/2",
    )
    yield Case(
        name="sinusoidal/interleaved_minus_one",
        spec=Sinusoidal(denominator="half_minus_one", multiplier=0.5, causal=True, scale=0.25),
        sizes=sizes(10, 6, (2, 1), (8, 3)),
        dtype="float16",
        inputs=weights(-10),
        catches="E/2 for E/2 − 1; the multiplier on the sum instead of the inputs; keys after the query",
    )
    yield Case(
        name="sinusoidal/odd_width",
        spec=Sinusoidal(layout="concatenated", base=100.0, offset=-3),
        sizes=sizes(8, 7, (2, 2), (4, 4)),
        dtype="float16",
        inputs=weights(-10),
        catches="a cosine too many in an odd width; a base of 10000 where 100 is given; negative positions taken for 0",
    )
    yield Case(
        name="sinusoidal/odd_width_minus_one",
        spec=Sinusoidal(layout="interleaved", denominator="half_minus_one", base=64.0, scale=2.0),
        sizes=sizes(6, 5, (2, 2), (2, 4)),
        dtype="bfloat16",
        inputs=weights(-10),
        catches="a sine in the last column of an odd width, which is 0",
    )
    yield Case(
        name="sinusoidal/far_positions",
        spec=Sinusoidal(offset=5001),
        sizes=sizes(8, 8, (2, 2), (4, 4)),
        inputs=weights() | {"x": Recipe(exp2=-10)},
        flags=("position_edges",),
        catches="positions in 16 bits, which at 5001 are multiples of 4 or of 32",
    )
    yield Case(
        name="sinusoidal/padding",
        spec=Sinusoidal(layout="concatenated", causal=True),
        sizes=sizes(9, 8, (2, 1), (4, 4), batch=3),
        dtype="float16",
        inputs=weights(-10)
        | {
            "kv_lengths": integers(9, 5, 2),
            "x": edited(NORMAL, scaled((1, (5, 6, 7, 8), None), 2.0), scaled((2, (2, 3, 4, 5, 6, 7, 8), None), 2.0)),
        },
        catches="positions counted from the end of a sequence; padded keys, larger than others, that are seen",
    )
    yield Case(
        name="sinusoidal/positions_alone",
        spec=Sinusoidal(causal=True, scale=2.0),
        sizes=sizes(16, 8, (2, 2), (8, 8)),
        inputs=weights(-10) | {"x": Recipe(kind="constant")},
        catches="anything but P_i W_q · P_j W_k, all that is left where the embeddings are 0",
    )
    yield Case(
        name="sinusoidal/large_scores",
        spec=Sinusoidal(denominator="half_minus_one"),
        sizes=sizes(5, 8, (2, 2), (4, 4)),
        inputs={
            "x": edited(NORMAL, set_((None, None, 7), 1.0)),
            "wq": edited(Recipe(exp2=-10), set_((None, 7, None), 32.0)),
            "wk": edited(Recipe(exp2=-14), set_((None, 7, None), 0.5)),
            "wv": Recipe(exp2=-9),
        },
        flags=("large_scores",),
        catches="exponentials without their row's maximum: scores lie near each other and above 100",
    )
    yield Case(
        name="sinusoidal/float64",
        spec=Sinusoidal(layout="concatenated", denominator="half_minus_one", offset=1, multiplier="sqrt"),
        sizes=sizes(6, 5, (2, 2), (5, 4)),
        dtype="float64",
        inputs=weights(),
        catches="a table in float32 beside double-precision scores",
    )
    yield Case(
        name="sinusoidal/tokens_300",
        spec=Sinusoidal(causal=True),
        sizes=sizes(300, 4, (1, 1), (2, 2)),
        inputs=weights(-8),
        cotangents={"dlse": Recipe()},
        catches="positions in bfloat16, in which 256 and 257 are one number",
    )
    yield Case(
        name="sinusoidal/concatenated_257",
        spec=Sinusoidal(layout="concatenated", denominator="half_minus_one"),
        sizes=sizes(257, 6, (2, 1), (2, 2)),
        inputs=weights(-8),
        cotangents={"dlse": Recipe()},
        catches="the slowest wavelength of the other denominator, which 256 positions tell apart",
    )
