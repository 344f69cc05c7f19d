"""A JAX backend that returns integers beside its numbers: JAX differentiates the numbers, the integers are compared."""

import pytest

jax = pytest.importorskip("jax", reason="jax is not installed: make peers")

from jax import numpy as jnp  # noqa: E402

import refattn as ra  # noqa: E402
from refattn import registry  # noqa: E402
from refattn.golden import suite  # noqa: E402
from refattn.golden.build import build  # noqa: E402


def informer(q, k, v, sample, queries):
    """One head a key head, the mean for whatever is not chosen."""
    products = q @ jnp.swapaxes(k, 2, 3)
    measured = jnp.take_along_axis(products, jnp.broadcast_to(sample, (*q.shape[:2], *sample.shape)), 3)
    measure = measured.max(-1) - measured.sum(-1) / k.shape[2]
    top, indices = jax.lax.top_k(measure, queries + 1)
    attended = jax.nn.softmax(products * q.shape[3] ** -0.5, -1) @ v
    chosen = (indices[..., :queries, None] == jnp.arange(q.shape[2])).any(2)
    out = jnp.where(chosen[..., None], attended, v.mean(2, keepdims=True))
    return {"out": out, "indices": indices[..., :queries], "margin": top[..., -2] - top[..., -1]}


def test_gradients_come_from_jax_and_indices_are_compared(tmp_path):
    name = "informer/divisor_decides"
    case = next(case for case in registry.info("informer").cases() if case.name == name)
    built = build(case)
    suite.publish(tmp_path, {name: (built.manifest, built.tensors)})
    (line,) = ra.validate(informer, arrays="jax", folder=tmp_path).lines
    assert (line.verdict, set(line.outputs)) == ("pass", {"out", "indices", "margin", "dq", "dk", "dv"})
