"""C10, C11, C12: what must be equal, and is."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

import refattn as ra
from claims.claim import NotThere, Result, Row, variant, verdict

TITLE = "Exact laws"


def qkv(seed: int, length: int, heads: int = 2, width: int = 8) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {name: rng.standard_normal((1, heads, length, width)) for name in "qkv"}


def apart(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference, as a share of the largest number."""
    return float(np.abs(np.asarray(found) - expected).max() / np.abs(expected).max())


def dropping(length: int) -> float:
    """Expire-Span: what has expired for all later queries is overwritten, and nothing may move."""
    spec = variant("expire_span", max_span=16, ramp=4)
    rng = np.random.default_rng(0)
    learned = {"span_weight": rng.standard_normal(3), "span_bias": np.zeros(1)}
    first, later = (qkv(seed, length) | {"hidden": rng.standard_normal((1, length, 3))} | learned for seed in (1, 2))
    _, state = ra.step(spec, ra.init_state(spec, B=1, Hkv=2, D=8, Dv=8), first)
    age = state["spans"].shape[1] - np.arange(state["spans"].shape[1])
    gone = (state["spans"] - age + spec.ramp <= 0)[:, None, :, None]
    changed = {name: np.where(gone, 1e6, state[name]) for name in "kv"}
    outs = [ra.step(spec, s, later)[0].out for s in (state, ra.State(spec, length, dict(state) | changed))]
    return apart(outs[1], outs[0])


def one_segment(length: int) -> float:
    """Infini-attention inside its first segment, the gate closed: plain causal attention."""
    x = qkv(3, length)
    spec = ra.InfiniAttention(segment=length)
    return apart(ra.evaluate(spec, x | {"gate": np.full(2, -60.0)}).out, ra.attention(*x.values(), causal=True))


def identity(length: int) -> float:
    """Linformer with E the identity: exact attention."""
    x = qkv(4, length)
    return apart(ra.evaluate(ra.Linformer(sharing="kv"), x | {"E": np.eye(length)}).out, ra.attention(*x.values()))


def every_column(length: int) -> float:
    """Skeinformer with every column drawn: exact attention."""
    x, spec = qkv(5, length), variant("skeinformer", reuse_pilot=False)
    all_of_them = np.broadcast_to(np.arange(length), (1, 2, length))
    given = x | {"columns": all_of_them, "pilot": np.zeros((1, 1), np.int64)}
    return apart(ra.evaluate(spec, given).out, ra.attention(*x.values()))


def every_query(length: int) -> float:
    """Informer with every query chosen: exact attention."""
    x, spec = qkv(6, length), variant("informer", queries=length)
    given = x | {"sample": np.broadcast_to(np.arange(length), (length, length)).copy()}
    return apart(ra.evaluate(spec, given).out, ra.attention(*x.values()))


def token_by_token(length: int) -> float:
    """Infini-attention token by token against all at once."""
    x, spec = qkv(7, length) | {"gate": np.array([0.5, -1.0])}, ra.InfiniAttention(segment=5, update="delta")
    state, outs = ra.init_state(spec, B=1, Hkv=2, D=8, Dv=8), []
    for n in range(length):
        found, state = ra.step(spec, state, {k: a if k == "gate" else a[:, :, n : n + 1] for k, a in x.items()})
        outs.append(found.out)
    return apart(np.concatenate(outs, 2), ra.evaluate(spec, x).out)


def every_memory(length: int) -> float:
    """Memorizing attention that finds every key of a memory that keeps them all, one softmax: causal attention."""
    spec = variant("memorizing", segment=5, memory=length, top=length, combine="joint")
    x = qkv(8, length)
    return apart(ra.evaluate(spec, x).out, ra.attention(*x.values(), causal=True))


def every_encoded_token(length: int) -> float:
    """Unlimiformer whose window holds all that was encoded: exact attention."""
    x = qkv(9, length)
    return apart(ra.evaluate(variant("unlimiformer", top=length), x).out, ra.attention(*x.values()))


def no_compressed_memory(length: int) -> float:
    """Compressive Transformer without compressed memories: Transformer-XL."""
    rng, kept = np.random.default_rng(10), {"segment": 4, "memory": 8}
    xl = variant("transformer_xl", **kept)
    compressive = variant("compressive", **kept, compressed=0, rate=2, compression="mean")
    sizes = {"B": 1, "L": length, "E": 6, "Hq": 2, "Hkv": 2, "D": 4, "Dv": 4, "R": 6}
    signature = ra.variants()["transformer_xl"].module.signature(xl)
    x = {name: rng.standard_normal(array.shape(sizes)) / 3 for name, array in signature.items() if not array.optional}
    return apart(ra.evaluate(compressive, x).out, ra.evaluate(xl, x).out)


LAWS: dict[str, Callable[[int], float]] = {
    "Expire-Span: dropping what has expired changes nothing": dropping,
    "Infini-attention within one segment is causal attention": one_segment,
    "Infini-attention token by token is the whole": token_by_token,
    "Linformer with E = I is exact attention": identity,
    "Memorizing attention that finds every key is causal attention": every_memory,
    "Unlimiformer with every encoded token is exact attention": every_encoded_token,
    "Compressive Transformer without compressed memory is Transformer-XL": no_compressed_memory,
    "Skeinformer with every column is exact attention": every_column,
    "Informer with every query is exact attention": every_query,
}


def costs() -> list[Row]:
    """Operations as `explain` counts them, of axial and of full attention."""
    height, width = 32, 64
    sizes = {"B": 1, "Hq": 1, "Hkv": 1, "Lq": height * width, "Lk": height * width, "D": 8, "Dv": 8}
    axial = ra.explain(ra.Axial(width=width), sizes)["operations"]
    full = ra.explain(ra.SDPA(), sizes)["operations"]
    exact = height * width / (height + width)
    told = f"{full / axial:.2f} times fewer operations at {height} by {width}"
    holds = verdict(abs(full / axial / exact - 1) < 0.05, "another ratio")
    latents = {"B": 1, "Hq": 1, "Lq": 64, "E": 8, "C": 8, "D": 8, "Dv": 8}
    one, two = (ra.explain(variant("perceiver"), latents | {"Lk": n})["operations"] for n in (2048, 4096))
    grows = verdict(abs(two / one / 2 - 1) < 0.02, "another ratio")
    return [
        Row("Axial attention costs HW (H + W), full (HW)²", f"{exact:.2f} times", told, holds),
        Row("A Perceiver's cost is linear in the array", "2 times", f"{two / one:.2f} times for twice as much", grows),
    ]


def measure(small: bool = False) -> Result:
    """One row a law."""
    rows = []
    for name, law in LAWS.items():
        try:
            gap = law(12 if small else 48)
        except NotThere as missing:
            rows.append(Row(name, "equal", "-", f"no: {missing}"))
            continue
        rows.append(Row(name, "equal", f"apart by {gap:.0e}", verdict(gap < 1e-12, "they differ")))
    return Result(rows + costs(), "Largest difference in float64, as a share of the largest number.")
