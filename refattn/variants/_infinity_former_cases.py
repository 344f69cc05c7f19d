"""Golden cases of the ∞-former."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe
from refattn.variants._case_parts import flagged, numbers
from refattn.variants.infinity_former import InfinityFormer

FLAGS: Mapping[str, Flag] = {
    "infinity": Flag("Attention by a density over a continuous memory fitted by ridge regression, with its gradients."),
    "infinity_contracted": Flag("A memory contracted and fitted anew behind which each segment is put."),
    "infinity_sparsemax": Flag("The truncated parabola for a density."),
    "infinity_sticky": Flag("A memory read where drawn bins say, and the histogram that they are drawn from."),
    "infinity_options": Flag("Points l / L, parameters that are moments, a bias, a prior with a mean, or a mask net."),
}
PUBLISHED = ("out", "kl", "state", "vjp")
# Variances that do not come near 0.
CALM = Recipe(exp2=-10)
POSITIVE = Recipe(kind="constant", value=1.0)
SMALL: dict[str, Any] = {"basis": 8, "sigmas": (0.125, 0.25), "samples": 8, "contraction": 0.75}


def cases() -> Iterator[Case]:
    """Both densities and both kinds of parameters; memories fitted once, contracted, drawn from, and begun before."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    options = (spec.positions == "i_over_L", spec.parameters == "moments", spec.bias, spec.mask)
    present = {
        "infinity": True,
        "infinity_contracted": spec.contraction is not None and case.history + case.sizes["L"] > 2 * spec.segment,
        "infinity_sparsemax": spec.density == "sparsemax",
        "infinity_sticky": spec.sticky,
        "infinity_options": any(options) or spec.prior_mean is not None,
        "history": case.history > 0,
        "state": "state" in case.want,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def tokens(
    count: int, heads: tuple[int, int] = (2, 2), widths: tuple[int, int, int] = (5, 4, 4), batch: int = 1
) -> dict[str, int]:
    """Sizes with so many tokens; the widths are E, D and Dv."""
    (hq, hkv), (e, d, dv) = heads, widths
    return {"B": batch, "Hq": hq, "Hkv": hkv, "L": count, "E": e, "D": d, "Dv": dv}


def above(value: float, rank: int = 3) -> Recipe:
    """Numbers around one that is not 0, which a memory keeps where it averages others away."""
    return Recipe(kind="integers", exp2=-4, edits=(Edit(at=(None,) * rank, op="add", value=value),))


def left_half(count: int, rank: int = 3, value: float = 16.0) -> Recipe:
    """A cotangent of histograms that asks how much lies left of the middle."""
    half = Edit(at=(*(None,) * (rank - 1), tuple(range(count // 2))), op="set", value=value)
    return Recipe(kind="constant", edits=(half,))


def bins(count: int) -> Recipe:
    """Drawn bins, from 1 to count − 1 of an even count."""
    return Recipe(
        kind="integers", limit=count // 2 - 1, exp2=0, edits=(Edit(at=(None,) * 3, op="add", value=count / 2),)
    )


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield Case(
        name="infinity_former/one_segment",
        spec=InfinityFormer(segment=5, basis=8, sigmas=(0.125, 0.25)),
        sizes=tokens(13, (4, 2), (5, 4, 3)),
        want=("out", "kl", "vjp"),
        cotangents={"dkl": Recipe(exp2=-12)},
        catches="points at l / L, a fit without the zeros outside [0, 1], a density renormalised to [0, 1]",
    )
    yield Case(
        name="infinity_former/contracted",
        spec=InfinityFormer(segment=4, **SMALL),
        sizes=tokens(14, (2, 1), (4, 5, 3), batch=2),
        want=PUBLISHED,
        cotangents={"dstate_memory": NORMAL, "dstate_x": NORMAL},
        catches="samples of the past read at contraction · m / M instead of m / M; gradients through the past memory",
    )
    yield Case(
        name="infinity_former/points_l_over_l",
        spec=InfinityFormer(segment=3, positions="i_over_L", ridge=0.5, scale=0.75, **SMALL | {"contraction": 0.5}),
        sizes=tokens(12, (2, 2), (4, 4, 4)),
        dtype="bfloat16",
        want=("out", "kl", "vjp"),
        catches="centred points or padding where the paper has neither; a penalty fixed at 1",
    )
    yield Case(
        name="infinity_former/sparsemax",
        spec=InfinityFormer(segment=4, density="sparsemax", bias=True, least_variance=0.0625, **SMALL),
        sizes=tokens(13, (2, 1), (4, 4, 5)),
        inputs={"b_mu": numbers(0.75), "b_sigma": numbers(-2.5)},
        want=("out", "kl", "vjp"),
        cotangents={"dkl": Recipe(exp2=-12)},
        catches="a parabola of half width σ, one that is not normalised, a variance that is not held above its least",
    )
    yield Case(
        name="infinity_former/moments",
        spec=InfinityFormer(segment=5, parameters="moments", prior_mean=0.25, prior_deviation=0.5, **SMALL),
        sizes=tokens(12, (4, 2), (4, 6, 4)),
        dtype="float16",
        inputs={"q": Recipe(exp2=-7)},
        want=("out", "kl", "vjp"),
        cotangents={"dkl": NORMAL},
        catches="the variance of the centres without that of the basis functions; a prior's mean that is left out",
    )
    yield Case(
        name="infinity_former/sticky",
        spec=InfinityFormer(segment=4, sticky=True, bins=16, **SMALL),
        sizes=tokens(15, (2, 2), (4, 4, 3)),
        inputs={"drawn": bins(16), "w_sigma": CALM},
        want=(*PUBLISHED, "histogram"),
        cotangents={"dhistogram": left_half(16), "dstate_histogram": left_half(16, rank=2, value=128.0)},
        catches="samples left in the order drawn, or read inside their bins; a histogram of one head or token",
    )
    yield Case(
        name="infinity_former/sticky_history",
        spec=InfinityFormer(segment=5, sticky=True, bins=8, density="sparsemax", **SMALL),
        sizes=tokens(9, (2, 1), (3, 4, 3)),
        history=13,
        inputs={"drawn": bins(8), "state_histogram": Recipe(kind="constant", value=0.5), "w_sigma": CALM},
        want=(*PUBLISHED, "histogram"),
        cotangents={"dhistogram": left_half(8)},
        catches="a histogram begun by every call: that of 3 tokens of the open segment is there already",
    )
    yield Case(
        name="infinity_former/mask_net",
        spec=InfinityFormer(segment=4, mask=True, **SMALL),
        sizes=tokens(10, (2, 2), (4, 3, 3)),
        history=6,
        want=PUBLISHED,
        cotangents={"dstate_memory": NORMAL},
        catches="a convolution turned round, or one that looks across a segment's end or a call's",
    )
    yield Case(
        name="infinity_former/narrow_basis",
        spec=InfinityFormer(
            segment=8, basis=16, sigmas=(0.03125, 0.0625), samples=16, contraction=0.75, prior_mean=0.5
        ),
        sizes=tokens(20, (1, 1), (3, 4, 3)),
        inputs={"w_sigma": Recipe(exp2=-8, edits=(Edit(at=(None,), op="add", value=-1.0),))},
        want=PUBLISHED,
        catches="basis functions without their 1 / σ_j√2π; widths in the order of the centres, not repeated at each",
    )
    yield Case(
        name="infinity_former/tokens_300",
        spec=InfinityFormer(segment=64, **SMALL | {"samples": 32}),
        sizes=tokens(300, (1, 1), (2, 2, 2)),
        inputs={"x": above(1.0), "q": above(1.0, rank=4), "w_sigma": CALM},
        want=("out", "vjp"),
        cotangents={"dout": POSITIVE},
        catches="a memory fitted a token early or late: the last segment has 44 tokens",
    )
    yield Case(
        name="infinity_former/sticky_257",
        spec=InfinityFormer(segment=100, sticky=True, bins=8, **SMALL | {"samples": 16}),
        sizes=tokens(257, (1, 1), (2, 2, 2)),
        history=150,
        inputs={
            "drawn": bins(8),
            "x": above(-1.0),
            "q": above(1.0, rank=4),
            "w_sigma": CALM,
            "state_histogram": Recipe(kind="constant", value=0.5),
        },
        want=("out", "kl", "state", "vjp"),
        cotangents={"dout": POSITIVE, "dhistogram": left_half(8)},
        catches="a memory fitted where calls end instead of at tokens 50, 150 and 250 of this one",
    )
    yield Case(
        name="infinity_former/tokens_513",
        spec=InfinityFormer(segment=128, contraction=0.5, positions="i_over_L", samples=16, basis=4, sigmas=(0.25,)),
        sizes=tokens(513, (1, 1), (1, 2, 1)),
        dtype="float16",
        inputs={"x": above(1.0)},
        want=("out", "vjp"),
        cotangents={"dout": POSITIVE},
        catches="sums over a segment's tokens in 16 bits",
    )
    yield Case(
        name="infinity_former/sparsemax_259",
        spec=InfinityFormer(segment=129, density="sparsemax", basis=6, sigmas=(0.125,)),
        sizes=tokens(259, (1, 1), (2, 3, 2)),
        inputs={"x": above(-1.0)},
        want=("out", "kl", "vjp"),
        catches="an odd segment padded as an even one: 128 points outside [0, 1], not 129 or 130",
    )
    yield Case(
        name="infinity_former/float64",
        spec=InfinityFormer(segment=3, **SMALL),
        sizes=tokens(8, (2, 1), (3, 3, 3)),
        dtype="float64",
        want=PUBLISHED,
        catches="coefficients in float32 beside double-precision scores",
    )
