"""Whether this process computes as the proofs assume: IEEE 754, to nearest even, nothing flushed, nothing contracted.

A library built with -ffast-math may switch a thread to flushing when it is loaded, any library may leave another
rounding mode behind, and a compiler may be told to contract. None of that raises anything; so it is asked.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from refattn.engines.certified.twofold import two_prod, two_sum
from refattn.errors import RefattnError

# So many copies that vector instructions and the rest of a loop are both asked.
_COPIES = 19
_X = 1 + 2.0**-30
INPUTS = (1.0, 2.0**-53, 2.0**-1022, 5e-324, _X, 1 + 2.0**-29)
EXPECTED = (
    (1.0, "sums are not rounded to nearest even"),
    (1 + 2.0**-51, "sums are not rounded to nearest even"),
    (-1 - 2.0**-51, "sums are not rounded to nearest even"),
    (2.0**-1023, "results below 2^-1022 are flushed to 0"),
    (5e-324, "numbers below 2^-1022 are read as 0"),
    (0.0, "a product and a sum are contracted into one operation"),
    (2.0**-53, "what a sum leaves is not found (contracted, or reordered)"),
    (2.0**-59, "what a product leaves is not found (contracted, or reordered)"),
)


def answering(two_sum: Callable[..., Any], two_product: Callable[..., Any]) -> Callable[..., Any]:
    """The probes: plain operations on numbers or arrays, to run as they stand or compiled.

    x² stands once: a product that is needed twice might not be contracted.
    """

    def answers(one: Any, unit: Any, least: Any, tiny: Any, x: Any, square: Any) -> Any:  # noqa: PLR0917
        return (
            one + unit,
            one + 3 * unit,
            -one - 3 * unit,
            least / 2,
            tiny * one,
            x * x - square,
            two_sum(one, unit)[1],
            two_product(x, square)[1],
        )

    return answers


_in_numpy = answering(two_sum.py_func, two_prod.py_func)  # type: ignore[attr-defined]


def check(answers: Callable[..., Sequence[NDArray[np.float64]]] = _in_numpy, where: str = "NumPy") -> None:
    """Ask the probes.

    Raises
    ------
    RefattnError
        An answer is another than that of IEEE 754; the message names what is wrong.
    """
    found = answers(*(np.full(_COPIES, x) for x in INPUTS))
    for answer, (expected, wrong) in zip(found, EXPECTED, strict=True):
        # Bit by bit: where subnormal numbers are read as 0, they also compare so.
        if (np.asarray(answer).view(np.int64) != np.float64(expected).view(np.int64)).any():
            raise RefattnError(
                f"{where} does not compute as IEEE 754 says: {wrong}. Nothing can be certified in this process; look "
                "for a library that was built with -ffast-math, or that has changed the rounding mode"
            )
