"""A problem of the exact-slice tier, run by itself: the kernels are compiled with what the environment or a name says.

python sliced.py hash                 sha256 of t and d of every output
python sliced.py <sabotage>           "refused" by the float64 check, or "wrong" against balls, or "unnoticed"
"""

import hashlib
import sys

import numpy as np


def dyadic(rng, *shape):
    """Sums of twelve bytes, as the recipes have them: |k| ≤ 1530, times 2^-8."""
    return (rng.integers(0, 256, (12, *shape)).sum(0) - 1530) / 256


def wrong_constant(twofold):
    """1/3! off by 2^-30 of itself."""
    twofold._HEADS = tuple(c * (1 + 2.0**-30 * (k == 3)) for k, c in enumerate(twofold._HEADS))


def wrong_last_bits(twofold):
    """1/3! without its lower half: off by 2^-55 of itself, which no float64 evaluation can see."""
    twofold._TAILS = tuple(c * (k != 3) for k, c in enumerate(twofold._TAILS))


def contracted(twofold):
    """A product whose residual a fused or flushed operation has made 0."""

    from refattn.jit import inlined

    @inlined
    def two_prod(a, b):
        return a * b, 0.0

    twofold.two_prod = two_prod


def reassociated(numba):
    """What fastmath does to the residual of a sum."""
    plain = numba.njit
    numba.njit = lambda *args, **options: plain(*args, **(options | {"fastmath": True}))


SABOTAGE = {f.__name__: f for f in (wrong_constant, wrong_last_bits, contracted)}


def problem():
    import refattn as ra
    from refattn import api

    rng = np.random.default_rng(7)
    shapes = (1, 4, 33, 16), (1, 2, 70, 16), (1, 2, 70, 9), (1, 4, 33, 9)
    q, k, v, dout = (dyadic(rng, *shape) for shape in shapes)
    spec = ra.SDPA(causal="bottom_right", bias=ra.ALiBi(), window=(50, None))
    return api.build(spec, {"q": q, "k": k, "v": v}, np.float64, ("out",)), {"out": dout}


def main(name):
    if name == "reassociated":
        import numba

        reassociated(numba)
    from refattn.engines.certified import twofold

    if name in SABOTAGE:
        SABOTAGE[name](twofold)
    from refattn.engines import certified
    from refattn.engines.certified import slices
    from refattn.errors import RefattnError

    given, weights = problem()
    wrt = ("q", "k", "v")
    if name == "hash":
        found = slices.enclose(given, weights, wrt).enclosures
        sums = hashlib.sha256(b"".join(np.ascontiguousarray(a).tobytes() for x in found.values() for a in x))
        print(sums.hexdigest())
        return
    certified.LARGE = 0
    try:
        mine = certified.certify(given, weights, wrt)
    except RefattnError:
        print("refused")
        return
    certified.LARGE = 1 << 60
    balls = certified.certify(given, weights, wrt)
    same = all((mine[n].value == balls[n].value).all() and (mine[n].rne == balls[n].rne).all() for n in balls)
    print("unnoticed" if same else "wrong")


if __name__ == "__main__":
    main(sys.argv[1])
