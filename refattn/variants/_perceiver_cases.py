"""Golden cases of Perceiver's cross-attention.

No precision decides a gradient that is a dyadic number only because weights sum to 1. Such are, without a cotangent of
lse, the biases of a norm, and always the rows of the projections for a channel that is constant: those stand beside a
floor. Inverted, the gradient of the latents' bias is 0, for it shifts all latents alike: those cases have no norm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from refattn.case import NORMAL, Case, Edit, Flag, Recipe
from refattn.variants._case_parts import INF, NAN, attend, edited, flagged, scaled, set_
from refattn.variants.perceiver import Perceiver

FLAGS: Mapping[str, Flag] = {
    "perceiver": Flag("Latents that attend to an array, both projected, with the gradients of the projections."),
    "perceiver_norm": Flag(
        "Layer norm of latents and array before the projections, with its learned gains and biases."
    ),
    "perceiver_features": Flag("Fourier features of the positions beside the array's channels."),
    "perceiver_inverted": Flag("Softmax over the latents, then weights that sum to 1 over the keys."),
    "perceiver_floor": Flag("A latent's weights divided by no less than a floor."),
}


def cases() -> Iterator[Case]:
    """Features of one and of two axes, norms, masks, and both directions of the softmax."""
    for case in flagged(listed()):
        yield replace(case, flags=(*case.flags, *own_flags(case)))


def own_flags(case: Case) -> Iterator[str]:
    """What the Spec says of a case."""
    spec: Any = case.spec
    present = {
        "perceiver": True,
        "perceiver_norm": spec.norm is not None,
        "perceiver_features": spec.axes is not None,
        "perceiver_inverted": spec.inverted,
        "perceiver_floor": spec.floor > 0,
        "scale": spec.scale is not None,
    }
    return (name for name, holds in present.items() if holds)


def case_of(
    name: str,
    spec: Perceiver,
    lengths: tuple[int, int],
    channels: tuple[int, int],
    widths: tuple[int, int] = (4, 4),
    *,
    batch: int = 1,
    exp2: int = -9,
    inputs: Mapping[str, Recipe] | None = None,
    **rest: Any,
) -> Case:
    """A case of (Lq, Lk), (E, C), (D, Dv) and two heads; projections have a standard deviation of 256 · 2^exp2."""
    sizes = {"B": batch, "Hq": 2, "Lq": lengths[0], "Lk": lengths[1], "E": channels[0], "C": channels[1]}
    sizes |= {"D": widths[0], "Dv": widths[1]} | ({} if spec.axes is None else {"F": channels[1] + spec.channels})
    made = {name: Recipe(exp2=exp2) for name in ("wq", "wk", "wv")}
    if spec.norm is not None:
        made |= {f"{side}_{what}": Recipe(exp2=-8) for side in ("latent", "array") for what in ("gain", "bias")}
    return Case(name=f"perceiver/{name}", spec=spec, sizes=sizes, inputs=made | dict(inputs or {}), **rest)


def listed() -> Iterator[Case]:
    """The cases, without flags that their form tells."""
    yield case_of(
        "plain",
        Perceiver(),
        (5, 17),
        (6, 5),
        (8, 4),
        cotangents={"dlse": Recipe()},
        catches="keys projected from the latents, or queries from the array; one head's projection for all",
    )
    yield case_of(
        "image_3x5",
        Perceiver(norm="layer", axes=(3, 5), bands=2, max_frequency=6.0),
        (4, 15),
        (6, 3),
        cotangents={"dlse": Recipe()},
        catches="axes exchanged; cosines before sines; positions before the channels; the norm before the features",
    )
    yield case_of(
        "line",
        Perceiver(axes=(9,), scale=1.5),
        (3, 9),
        (4, 2),
        (2, 3),
        exp2=-10,
        dtype="bfloat16",
        catches="frequencies that grow by powers instead of steps; the plain position left out; the default scale",
    )
    yield case_of(
        "one_pixel_axis",
        Perceiver(axes=(1, 7), bands=1, inverted=True, floor=3.0),
        (4, 7),
        (4, 2),
        dtype="float16",
        cotangents={"dlse": Recipe()},
        catches="a position of 0 for an axis of one pixel, which has −1; a last frequency for a first where K = 1",
    )
    yield case_of(
        "fine_axis",
        Perceiver(axes=(33,), bands=4, max_frequency=32.0),
        (3, 33),
        (4, 2),
        catches="arguments in 16 bits: 16 π p at 33 positions; positions from pixel centres instead of pixel edges",
    )
    yield case_of(
        "norm_mask",
        Perceiver(norm="layer", eps=0.125, scale=0.75),
        (4, 11),
        (6, 8),
        (4, 3),
        batch=2,
        exp2=-10,
        dtype="float16",
        inputs={
            "mask": attend(2, 11, hidden=[(0, 3), (1, (5, 6))]),
            "array": edited(NORMAL, set_((0, 3, None), NAN), set_((1, (5, 6), None), INF)),
        },
        cotangents={"dlse": Recipe()},
        flags=("poison",),
        catches="eps beside the root instead of in it; variance over n − 1; a masked pixel normalised with its NaN",
    )
    yield case_of(
        "nothing_seen",
        Perceiver(norm="layer"),
        (3, 6),
        (5, 4),
        batch=2,
        inputs={"mask": attend(2, 6, hidden=[(1, None)])},
        cotangents={"dlse": Recipe()},
        flags=("fully_masked_rows", "fully_masked_head"),
        catches="a mean of all values where the whole array is masked, as a finite mask gives",
    )
    yield case_of(
        "inverted",
        Perceiver(inverted=True),
        (5, 9),
        (6, 4),
        (6, 4),
        cotangents={"dlse": Recipe()},
        catches="softmax over the keys; no second normalisation; a gradient through one of the two alone",
    )
    yield case_of(
        "inverted_mask",
        Perceiver(inverted=True, axes=(3, 3), bands=2, scale=1.25),
        (3, 9),
        (4, 2),
        (3, 4),
        batch=2,
        exp2=-10,
        dtype="float16",
        inputs={
            "mask": attend(2, 9, hidden=[(0, (0, 5)), (1, 7)]),
            "array": edited(NORMAL, set_((0, (0, 5), None), NAN), set_((1, 7, None), 64.0)),
        },
        flags=("poison",),
        catches="masked pixels that latents win all the same",
    )
    yield case_of(
        "inverted_floor",
        Perceiver(inverted=True, floor=1.0),
        (6, 5),
        (4, 4),
        cotangents={"dlse": Recipe()},
        catches="the floor added to the sum, or to the weights, instead of a maximum of both",
    )
    yield case_of(
        "large_scores",
        Perceiver(),
        (4, 9),
        (5, 4),
        inputs={
            "latents": edited(NORMAL, set_((None, None, 0), 1.0)),
            "wq": edited(Recipe(exp2=-10), set_((None, 0, None), 64.0)),
            "array": edited(NORMAL, scaled((None, None, 0), 2.0**-6), Edit(at=(None, None, 0), op="add", value=1.0)),
            "wk": edited(Recipe(exp2=-14), set_((None, 0, None), 1.0)),
        },
        flags=("large_scores",),
        catches="exponentials without their row's maximum: scores lie near each other and above 100",
    )
    yield case_of(
        "float64",
        Perceiver(inverted=True, axes=(5,), bands=3, floor=1.5),
        (4, 5),
        (5, 2),
        (3, 2),
        dtype="float64",
        catches="features in float32 beside double-precision scores",
    )
    yield case_of(
        "array_1025",
        Perceiver(),
        (3, 1025),
        (3, 2),
        (2, 2),
        catches="an array cut to whole tiles, or a mean over 1025 elements in 16 bits",
    )
    yield case_of(
        "features_of_300",
        Perceiver(axes=(300,), bands=2, max_frequency=40.0),
        (4, 300),
        (3, 2),
        (2, 2),
        exp2=-7,
        catches="positions 2/300 apart instead of 2/299, or without the last one",
    )
    yield case_of(
        "inverted_300",
        Perceiver(inverted=True),
        (3, 300),
        (3, 2),
        (2, 2),
        cotangents={"dlse": Recipe()},
        catches="a second normalisation tile by tile",
    )
