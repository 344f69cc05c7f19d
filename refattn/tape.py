"""Reverse-mode differentiation over the vocabulary of `numeric`: gradients of a reference from its own text.

A `Tape` is a space over another space (float64, balls, running bounds), so the same few rules give reference
gradients and certified ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from refattn import numeric
from refattn.space import Bools, Value, space_of

Rule = Callable[[Any], Any]


class Variable(Value):
    """A value of the inner space, with the rules that carry its cotangent to its parents."""

    __slots__ = ("cotangent", "parents", "space", "value")

    def __init__(self, space: Tape, value: Any, parents: Sequence[tuple[Variable, Rule]]) -> None:
        self.space, self.value, self.parents = space, value, parents
        self.cotangent: Any = None

    @property
    def shape(self) -> tuple[int, ...]:  # type: ignore[override]
        """Shape of the value."""
        return tuple(self.value.shape)


class Tape:
    """Records a computation over an inner space and runs it backwards."""

    rank = 1

    def __init__(self) -> None:
        self.nodes: list[Variable] = []

    def variable(self, value: Any) -> Variable:
        """A leaf: an input whose gradient is asked."""
        return self._node(value)

    def gradients(self, pairs: Sequence[tuple[Any, Any]], leaves: Sequence[Variable]) -> list[Any]:
        """Cotangents of the leaves for outputs and their cotangents; zeros where no output depends on a leaf."""
        for node in self.nodes:
            node.cotangent = None
        for output, cotangent in pairs:
            if isinstance(output, Variable):
                output.cotangent = cotangent if output.cotangent is None else output.cotangent + cotangent
        for node in reversed(self.nodes):
            if node.cotangent is None:
                continue
            for parent, rule in node.parents:
                share = rule(node.cotangent)
                parent.cotangent = share if parent.cotangent is None else parent.cotangent + share
            if node.parents:
                node.cotangent = None
        return [zeros_like(leaf.value) if leaf.cotangent is None else leaf.cotangent for leaf in leaves]

    def _node(self, value: Any, *parents: tuple[Any, Rule]) -> Variable:
        node = Variable(self, value, [(p, rule) for p, rule in parents if isinstance(p, Variable)])
        self.nodes.append(node)
        return node

    def coerce(self, value: Any) -> Any:
        """Values of the inner space are constants here; it checks them itself."""
        return value

    def real(self, value: Any) -> Any:
        """A constant: lifted by the inner space of whatever has been recorded."""
        return numeric.real(value, like=self.nodes[0].value)

    def constant(self, formula: Callable[[Any], Any]) -> Any:
        """Of the inner space: no input enters it."""
        return numeric.constant(formula, like=self.nodes[0].value)

    def add(self, a: Any, b: Any) -> Any:
        """d(a + b) = da + db."""
        return self._node(_value(a) + _value(b), (a, lambda g: _fit(g, a)), (b, lambda g: _fit(g, b)))

    def sub(self, a: Any, b: Any) -> Any:
        """d(a − b) = da − db."""
        return self._node(_value(a) - _value(b), (a, lambda g: _fit(g, a)), (b, lambda g: _fit(-g, b)))

    def mul(self, a: Any, b: Any) -> Any:
        """d(ab) = b da + a db."""
        x, y = _value(a), _value(b)
        return self._node(x * y, (a, lambda g: _fit(g * y, a)), (b, lambda g: _fit(g * x, b)))

    def div(self, a: Any, b: Any) -> Any:
        """d(a/b) = (da − (a/b) db) / b; the quotient is read back as it was stored."""
        y = _value(b)
        node = self._node(_value(a) / y, (a, lambda g: _fit(g / y, a)), (b, lambda g: _fit(-(g / y) * node.value, b)))
        return node

    def exp(self, x: Any) -> Any:
        """d exp x = exp x dx."""
        node = self._node(numeric.exp(x.value), (x, lambda g: g * node.value))
        return node

    def log(self, x: Any) -> Any:
        """d log x = dx / x."""
        return self._node(numeric.log(x.value), (x, lambda g: g / x.value))

    def tanh(self, x: Any) -> Any:
        """d tanh x = (1 − tanh² x) dx."""
        node = self._node(numeric.tanh(x.value), (x, lambda g: g * (1 - node.value * node.value)))
        return node

    def sin(self, x: Any) -> Any:
        """d sin x = cos x dx."""
        return self._node(numeric.sin(x.value), (x, lambda g: g * numeric.cos(x.value)))

    def cos(self, x: Any) -> Any:
        """d cos x = −sin x dx."""
        return self._node(numeric.cos(x.value), (x, lambda g: -g * numeric.sin(x.value)))

    def erf(self, x: Any) -> Any:
        """d erf x = (2/√π) exp(−x²) dx."""
        y = x.value
        return self._node(
            numeric.erf(y), (x, lambda g: g * 2 * numeric.exp(-(y * y)) / numeric.sqrt(numeric.pi(like=y)))
        )

    def pi(self) -> Any:
        """Of the inner space."""
        return numeric.pi(like=self.nodes[0].value)

    def solve(self, a: Any, b: Any, least: float) -> Any:
        """With h = a⁻¹ g for the cotangent g of x: db = h, da = −h xᵀ."""
        matrix = _value(a)
        node = self._node(
            numeric.solve(matrix, _value(b), least),
            (a, lambda g: -numeric.einsum("ik,jk->ij", numeric.solve(matrix, g, least), node.value)),
            (b, lambda g: numeric.solve(matrix, g, least)),
        )
        return node

    def sin_pi(self, turns: Any) -> Any:
        """A constant: of the inner space of whatever has been recorded."""
        return numeric.sin_pi(turns, like=self.nodes[0].value)

    def cos_pi(self, turns: Any) -> Any:
        """A constant likewise."""
        return numeric.cos_pi(turns, like=self.nodes[0].value)

    def sqrt(self, x: Any) -> Any:
        """d √x = dx / (2 √x)."""
        node = self._node(numeric.sqrt(x.value), (x, lambda g: g / (2 * node.value)))
        return node

    def maximum(self, a: Any, b: Any) -> Any:
        """The cotangent goes to the larger, half to each of two equals."""
        return self._extreme(numeric.maximum(_value(a), _value(b)), _value(a) - _value(b), a, b)

    def minimum(self, a: Any, b: Any) -> Any:
        """The cotangent goes to the smaller, half to each of two equals."""
        return self._extreme(numeric.minimum(_value(a), _value(b)), _value(b) - _value(a), a, b)

    def _extreme(self, value: Any, ahead: Any, a: Any, b: Any) -> Any:
        return self._node(
            value,
            (a, lambda g: _fit(g * numeric.step(ahead, 0.5), a)),
            (b, lambda g: _fit(g * numeric.step(-ahead, 0.5), b)),
        )

    def clip(self, x: Any, low: Any, high: Any) -> Any:
        """The cotangent passes from low to high, both included; the ends are constants."""
        inside = numeric.step(x.value - low, 1.0) * numeric.step(high - x.value, 1.0)
        return self._node(numeric.clip(x.value, low, high), (x, lambda g: g * inside))

    def step(self, x: Any, at_zero: float) -> Any:
        """Constant but for a jump."""
        return numeric.step(x.value, at_zero)

    def peak(self, x: Any, live: Bools) -> Any:
        """Constant but for jumps."""
        return numeric.peak(x.value, live)

    def amax(self, x: Any, live: Bools) -> Any:
        """The cotangent goes to the first of the largest."""
        return self._node(
            numeric.amax(x.value, live),
            (x, lambda g: numeric.reshape(g, (*x.shape[:-1], 1)) * numeric.peak(x.value, live)),
        )

    def top_k(self, x: Any, k: int) -> Any:
        """Of the value."""
        return numeric.top_k(x.value, k)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """The cotangent takes the old shape."""
        return self._node(numeric.reshape(x.value, shape), (x, lambda g: numeric.reshape(g, x.shape)))

    def transpose(self, x: Any, axes: Sequence[int]) -> Any:
        """The cotangent's axes go back."""
        back = [int(i) for i in np.argsort(axes)]
        return self._node(numeric.transpose(x.value, axes), (x, lambda g: numeric.transpose(g, back)))

    def broadcast(self, x: Any, shape: tuple[int, ...]) -> Any:
        """What was repeated is summed."""
        return self._node(numeric.broadcast(x.value, shape), (x, lambda g: _fit(g, x)))

    def index(self, x: Any, key: Any) -> Any:
        """The cotangent goes back to the places read; the rest is 0. Basic indexing only, each place read once."""
        where = np.full(x.shape, -1)
        picked = np.arange(where.size).reshape(x.shape)[key]
        where.reshape(-1)[picked.reshape(-1)] = np.arange(picked.size)
        return self._node(x.value[key], (x, lambda g: _scatter(g, where)))

    def take(self, x: Any, indices: Any, axis: int) -> Any:
        """An entry read several times sums its cotangents."""

        def back(g: Any) -> Any:
            hits = (np.arange(x.shape[axis])[:, None] == np.asarray(indices).reshape(-1)).astype(np.int64)
            order = [axis] + [i for i in range(x.ndim) if i != axis]
            rest = tuple(x.shape[i] for i in order[1:])
            flat = numeric.reshape(numeric.transpose(g, order), (hits.shape[1], int(np.prod(rest))))
            number = numeric.finite(flat)
            summed = numeric.einsum("ni,id->nd", numeric.real(hits, g), numeric.where(number, flat, 0))
            if not number.all():
                # 0 · NaN is NaN, but what is no number goes to the entry that was read and to no other.
                summed = numeric.where(hits @ ~number > 0, numeric.real(np.nan, g), summed)
            return numeric.transpose(numeric.reshape(summed, (x.shape[axis], *rest)), np.argsort(order).tolist())

        return self._node(numeric.take(x.value, indices, axis), (x, back))

    def concatenate(self, parts: Sequence[Any], axis: int) -> Any:
        """Each part gets its own stretch of the cotangent."""
        edges = np.cumsum([0] + [p.shape[axis] for p in parts])
        ahead = (slice(None),) * (axis % parts[0].ndim)

        def stretch(n: int) -> Rule:
            return lambda g: g[(*ahead, slice(int(edges[n]), int(edges[n + 1])))]

        value = numeric.concatenate([_value(p) for p in parts], axis)
        return self._node(value, *((p, stretch(n)) for n, p in enumerate(parts)))

    def sum(self, x: Any, axis: Any, keepdims: bool) -> Any:
        """The cotangent is repeated along what was summed."""
        kept = [1 if i in np.arange(x.ndim)[np.atleast_1d(axis)] else n for i, n in enumerate(x.shape)]
        return self._node(
            numeric.total(x.value, axis, keepdims),
            (x, lambda g: numeric.broadcast(numeric.reshape(g, tuple(kept)), x.shape)),
        )

    def einsum(self, letters: str, a: Any, b: Any) -> Any:
        """Each operand's cotangent is the einsum of the result's with the other operand."""
        operands, out = letters.split("->")
        left, right = operands.split(",")
        x, y = _value(a), _value(b)
        return self._node(
            numeric.einsum(letters, x, y),
            (a, lambda g: numeric.einsum(f"{out},{right}->{left}", g, y)),
            (b, lambda g: numeric.einsum(f"{left},{out}->{right}", x, g)),
        )

    def where(self, condition: Bools, a: Any, b: Any) -> Any:
        """The cotangent goes where the entry came from."""
        return self._node(
            numeric.where(condition, _value(a), _value(b)),
            (a, lambda g: _fit(numeric.where(condition, g, 0), a)),
            (b, lambda g: _fit(numeric.where(condition, 0, g), b)),
        )

    def finite(self, x: Any) -> Bools:
        """Of the value."""
        return numeric.finite(x.value)

    def clean(self, x: Any) -> Any:
        """The cotangent passes: the slot's number has been replaced, not its place in the formula."""
        return self._node(numeric.clean(x.value), (x, lambda g: g))

    def minus_infinite(self, x: Any) -> Bools:
        """Of the value."""
        return numeric.minus_infinite(x.value)

    def row_max(self, x: Any, live: Bools) -> Any:
        """Detached."""
        return numeric.row_max(x.value, live)

    def certain(self, x: Any, alone: Bools) -> Bools:
        """Of the inner space."""
        space = space_of(x.value)
        return space.certain(x.value, alone) if hasattr(space, "certain") else alone

    def stop(self, x: Any) -> Any:
        """The bare value: no path back."""
        return x.value

    def stored(self, x: Any, cotangent: bool) -> Any:
        """The inner space may round the value in place, so that the backward pass reads what was stored."""
        if cotangent:
            return self._node(x.value, (x, numeric.stored))
        x.value = numeric.stored(x.value)
        return x


def zeros_like(value: Any) -> Any:
    """Zeros in the space and shape of a value."""
    return numeric.real(np.zeros(value.shape), like=value)


def _value(x: Any) -> Any:
    return x.value if isinstance(x, Variable) else x


def _fit(g: Any, operand: Any) -> Any:
    """Sum a cotangent over the axes along which its operand was repeated."""
    shape = operand.shape
    if g.shape == shape:
        return g
    extra = len(g.shape) - len(shape)
    axes = tuple(i for i, n in enumerate(g.shape) if i < extra or shape[i - extra] != n)
    return numeric.reshape(numeric.total(g, axes), shape)


def _scatter(g: Any, where: Any) -> Any:
    flat = numeric.concatenate([numeric.reshape(g, (int(np.prod(g.shape)),)), numeric.real(np.zeros(1), like=g)], 0)
    return numeric.reshape(numeric.take(flat, where.reshape(-1), 0), where.shape)
