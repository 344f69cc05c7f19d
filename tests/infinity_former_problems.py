"""Options, sizes and inputs of the ∞-former that two test files use."""

from refattn.variants import infinity_former as module

BASE = {"segment": 4, "basis": 6, "sigmas": (0.125, 0.25), "samples": 5, "contraction": 0.75}
SIZES = {"B": 2, "Hq": 4, "Hkv": 2, "L": 13, "E": 3, "D": 2, "Dv": 3}


def arrays(spec, rng, **sizes):
    def made(a):
        shape = a.shape(SIZES | sizes)
        return rng.standard_normal(shape) if a.kind == "real" else rng.integers(0, spec.bins, shape)

    return {name: made(a) for name, a in module.signature(spec).items()}
