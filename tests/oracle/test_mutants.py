"""Every planted mistake fails, and is named; a mistake that the library does not know is not given a wrong name."""

import pytest

from refattn.oracle import validate
from refattn.oracle.mutants import MUTANTS
from refattn.oracle.plain import Plain

# Cases on which a mistake shows; the others would only repeat it.
SHOWS = {
    "CausalAlignment": "t/*o*",
    "WindowLeftWider": "t/window*",
    "WindowLeftNarrower": "t/*wi*",
    "WindowRightWider": "t/window",
    "WrongKeyHead": "t/b*",
    "NoScale": "t/s*",
    "ScaleTwice": "t/s*",
    "LseBase2": "t/s*",
    "LseIsMaximum": "t/[ks]*",
    "SoftcapAfterMask": "t/softcap",
    "GeometricSlopes": "t/alibi*",
    "BiasScaled": "t/*bi*",
    "MeanOfValues": "t/[el]*",
    "NaNOnEmptyRows": "t/[el]*",
    "DroppedKey": "t/long*",
    "LastBlockDropped": "t/[ps]*",
    "BFloat16Accumulator": "t/[bkps]*",
    "BFloat16Weights": "t/[kps]*",
    "BFloat16Inputs": "t/[kps]*",
    "DqWithoutScale": "t/[bs]*",
    "NoGroupSum": "t/[bw]*",
    "SinkIgnored": "t/sink",
    "SinkScaled": "t/sink",
    "MaskInverted": "t/empty",
    "Leak": "t/[lp]*",
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_mistake_is_named(name, folder):
    report = validate(MUTANTS[name].fn, folder=folder, cases=SHOWS[name])
    assert report.failures
    assert report.mistakes[:1] == (MUTANTS[name].named,), report.findings


def test_every_failing_case_of_a_mistake_is_explained(folder):
    report = validate(MUTANTS["WrongKeyHead"].fn, folder=folder)
    assert report.mistakes == ("key_head",)
    assert all(line.words.startswith("it computes key head h % Hkv") for line in report.failures)


class SumOfSquares(Plain):
    """A mistake nobody makes: weights squared."""

    def product(self, p, v):
        return (p * p) @ v


class ReversedValues(Plain):
    """Values in the wrong order."""

    def product(self, p, v):
        return p @ v[::-1]


class Tripled(Plain):
    """A factor."""

    def results(self, a, r, dtype, wide, gradients):
        r.dk = r.dk * 3
        return super().results(a, r, dtype, wide, gradients)


@pytest.mark.parametrize(
    ("kind", "place"),
    [(SumOfSquares, "the weighted sum of the values: lse is right"), (ReversedValues, "the weighted sum of the values"),
     (Tripled, "the gradient of the scores: out and dv are right")],
)  # fmt: skip
def test_an_unknown_mistake_gets_no_name_but_its_place(kind, place, folder):
    report = validate(kind(), folder=folder, cases="t/[pswb]*")
    assert report.failures and not report.mistakes
    assert all(place in line.words for line in report.failures), report.findings
