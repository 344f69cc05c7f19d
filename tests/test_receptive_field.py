import math
import re
from pathlib import Path

import numpy as np
import pytest
from checks import near

import refattn as ra
from refattn.errors import ShapeError, SpecError
from refattn.receptive_field import receptive_field

PAGE = Path(__file__).parents[1] / "docs" / "receptive-field.md"


def alike(length, width=1):
    """Projections and tokens of contents that do not differ: q and k are 0, v is the token."""
    identity = np.eye(width)[None]
    return np.ones((length, width)), {"q": np.zeros((1, width, 1)), "k": np.zeros((1, width, 1)), "v": identity}


def some(rng, length, heads=(4, 2), widths=(3, 2), width=5):
    """Any tokens and projections."""
    (hq, hkv), (d, dv) = heads, widths
    shapes = {"q": (hq, width, d), "k": (hkv, width, d), "v": (hkv, width, dv)}
    return rng.standard_normal((length, width)), {n: rng.standard_normal(s) for n, s in shapes.items()}


def last_output(spec, emb, projections, **inputs):
    """The outputs of all heads at the last token, by plain matrix products."""
    x = {name: np.einsum("le,hed->hld", emb, w)[None] for name, w in projections.items()}
    return ra.evaluate(spec, x | inputs).out[0, :, -1].ravel()


def test_three_equal_tokens_share_alike():
    found = receptive_field(ra.SDPA(causal=True), *alike(3))
    near(found.sensitivity, [1 / 3] * 3)
    near(found.cumulated, [1 / 3, 2 / 3, 1])
    assert found.tokens == 3


def test_a_slope_of_ln_2_halves_every_token():
    """Weights 1/7, 2/7, 4/7: two tokens hold 6/7, one 4/7."""
    spec = ra.ALiBi(slopes=(math.log(2),))
    found = receptive_field(spec, *alike(3), threshold=0.85)
    near(found.sensitivity, [1 / 7, 2 / 7, 4 / 7])
    near(found.cumulated, [4 / 7, 6 / 7, 1])
    assert found.tokens == 2
    assert receptive_field(spec, *alike(3), threshold=0.86).tokens == 3
    assert receptive_field(spec, *alike(3), threshold=1).tokens == 3


@pytest.mark.parametrize(("slope", "tokens"), [(1 / 2, 10), (1 / 4, 19), (1 / 8, 37), (1 / 16, 74), (1 / 256, 1179)])
def test_the_field_of_alibi_is_ln_100_over_the_slope(slope, tokens):
    assert tokens == math.ceil(math.log(100) / slope)
    assert receptive_field(ra.ALiBi(slopes=(slope,)), *alike(3 * tokens)).tokens == tokens


def test_the_field_of_sandwich_grows_with_the_context_where_that_of_alibi_stands():
    """A logarithmic tail holds its hundredth ever farther away."""
    lengths = (256, 512, 1024)
    alibi, sandwich = (
        [receptive_field(spec, *alike(n)).tokens for n in lengths]
        for spec in (ra.ALiBi(slopes=(0.25,)), ra.Sandwich(dimension=32))
    )
    assert alibi == [19, 19, 19]
    assert all(n / 2 < field <= n for n, field in zip(lengths, sandwich, strict=True))


@pytest.mark.parametrize("norm", ["frobenius", "spectral"])
def test_the_jacobian_is_that_of_finite_differences(rng, norm):
    """Central differences of the last output by every entry of every token: through q, k and v together."""
    spec, sink = ra.SDPA(causal=True, softcap=2.0, bias=ra.ALiBi(slopes=(0.5, 0.1, 0.3, 0.2))), rng.standard_normal(4)
    emb, projections = some(rng, 6)
    found = receptive_field(spec, emb, projections, inputs={"sink": sink}, norm=norm)
    h = 2.0**-17
    expected = []
    for m in range(6):
        columns = []
        for e in range(5):
            step = np.zeros(emb.shape)
            step[m, e] = h
            high, low = (last_output(spec, emb + s * step, projections, sink=sink) for s in (1, -1))
            columns.append((high - low) / (2 * h))
        expected.append(np.linalg.norm(np.stack(columns, 1), None if norm == "frobenius" else 2))
    near(found.sensitivity, expected, 1e-8)
    near(found.cumulated, np.cumsum(expected[::-1]) / np.sum(expected), 1e-8)


def test_what_the_last_token_does_not_see_has_no_part(rng):
    emb, projections = some(rng, 8)
    found = receptive_field(ra.SDPA(causal=True, window=(2, 0)), emb, projections)
    assert (found.sensitivity[:5] == 0).all()
    assert (found.sensitivity[5:] > 0).all()
    assert found.tokens == 3


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"embeddings": np.ones(3)}, ShapeError, r"embeddings are \(L, E\) with at least one token; given: \(3,\)"),
        ({"embeddings": np.ones((0, 1))}, ShapeError, "at least one token"),
        ({"embeddings": np.ones((3, 2))}, ShapeError, r"projection 'q' is \(heads, E=2, width\); given: \(1, 1, 1\)"),
        ({"projections": {"q": np.ones((1, 1, 1))}}, ShapeError, "by the names 'q', 'k' and 'v'"),
        ({"threshold": 0}, SpecError, r"number in \(0, 1\]; given: 0"),
        ({"threshold": "most"}, SpecError, r"number in \(0, 1\]"),
        ({"norm": "nuclear"}, SpecError, "'frobenius' or 'spectral'; given: 'nuclear'"),
        ({"embeddings": np.full((3, 1), np.nan)}, SpecError, "not in finite numbers"),
        ({"inputs": {"mask": np.zeros((1, 3), bool)}}, SpecError, "depends on no token"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_is_refused(change, kind, message):
    emb, projections = alike(3)
    given = {"embeddings": emb, "projections": projections} | change
    with pytest.raises(kind, match=message):
        receptive_field(ra.SDPA(causal=True), **given)


@pytest.mark.skipif(not PAGE.exists(), reason="the wheel's tests run outside the repository")
def test_the_page_prints_what_it_says(capsys):
    page = PAGE.read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", page, re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out == printed
