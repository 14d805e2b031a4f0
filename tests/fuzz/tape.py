"""Reverse-mode differentiation of NumPy programs, of any order, in any precision. Knows neither JAX nor attention.

Every operation is written on `Var`, and so is its derivative: the gradient is a program of the same kind, which can be
differentiated again. Forward mode is the derivative of the reverse-mode product, which is linear in its cotangent.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import ml_dtypes
import numpy as np


class Precision:
    """How results are rounded: to a dtype, and with a `seed` once more, at random, by at most half of its epsilon.

    The second is what another order of the same operations does; without it a sum of few numbers may be lucky.
    """

    def __init__(self, dtype: str, seed: int | None = None):
        self.eps = float(ml_dtypes.finfo(dtype).eps)
        self.work = np.float64 if dtype == "float64" else np.float32
        self.stored = {"bfloat16": ml_dtypes.bfloat16, "float16": np.float16}.get(dtype, self.work)
        self.rng = None if seed is None else np.random.default_rng(seed)

    def rounded(self, value: np.ndarray) -> np.ndarray:
        if self.rng is not None:
            value = value * (1 + self.eps / 2 * self.rng.uniform(-1, 1, value.shape).astype(self.work))
        return self.exact(value)

    def exact(self, value: Any) -> np.ndarray:
        value = np.asarray(value, self.work)
        return value if self.stored is self.work else value.astype(self.stored).astype(self.work)


class Var:
    """A number array that remembers what it was computed from.

    Args:
      value: the numbers; `kind`: the precision to which every result is rounded.
      parents: pairs of a Var and a function from the cotangent of this Var to that of the parent.
      rounds: whether it was computed, and not only moved from one place to another.
    """

    __array_ufunc__ = None

    def __init__(
        self,
        value: Any,
        kind: Precision,
        parents: Sequence[tuple[Var, Callable[[Var], Var]]] = (),
        rounds: bool = False,
    ):
        self.value = kind.rounded(np.asarray(value, kind.work)) if rounds else kind.exact(value)
        self.kind, self.parents = kind, parents

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def like(self, value: Any) -> Var:
        return value if isinstance(value, Var) else Var(value, self.kind)

    def __add__(self, other: Any) -> Var:
        other = self.like(other)
        parents = [(self, lambda c: summed(c, self.shape)), (other, lambda c: summed(c, other.shape))]
        return Var(self.value + other.value, self.kind, parents, rounds=True)

    def __mul__(self, other: Any) -> Var:
        other = self.like(other)
        parents = [(self, lambda c: summed(c * other, self.shape)), (other, lambda c: summed(c * self, other.shape))]
        return Var(self.value * other.value, self.kind, parents, rounds=True)

    def __neg__(self) -> Var:
        return Var(-self.value, self.kind, [(self, lambda c: -c)])

    def __sub__(self, other: Any) -> Var:
        return self + -self.like(other)

    def __rsub__(self, other: Any) -> Var:
        return self.like(other) - self

    def __truediv__(self, other: Any) -> Var:
        other = self.like(other)
        parents = [
            (self, lambda c: summed(c / other, self.shape)),
            (other, lambda c: summed(-(c * self / other / other), other.shape)),
        ]
        return Var(self.value / other.value, self.kind, parents, rounds=True)

    def __rtruediv__(self, other: Any) -> Var:
        return self.like(other) / self

    __radd__, __rmul__ = __add__, __mul__


def _unary(value: Callable, derivative: Callable[[Var, Var], Var]) -> Callable[[Var], Var]:
    def operation(x: Var) -> Var:
        y = Var(value(x.value), x.kind, [(x, lambda c: c * derivative(x, y))], rounds=True)
        return y

    return operation


exp = _unary(np.exp, lambda x, y: y)
log = _unary(np.log, lambda x, y: 1.0 / x)
tanh = _unary(np.tanh, lambda x, y: 1.0 - y * y)
sin = _unary(np.sin, lambda x, y: cos(x))
cos = _unary(np.cos, lambda x, y: -sin(x))
sqrt = _unary(np.sqrt, lambda x, y: 0.5 / y)
absolute = _unary(np.abs, lambda x, y: x.like(np.sign(x.value)))


def stop(x: Var) -> Var:
    """The same numbers, of which nothing depends on anything."""
    return Var(x.value, x.kind)


def where(choice: Any, one: Any, other: Any) -> Var:
    """`one` where `choice` (booleans), else `other`; both broadcast to a common shape."""
    some = one if isinstance(one, Var) else other
    one, other, choice = some.like(one), some.like(other), np.asarray(choice, bool)
    zero = some.like(0.0)
    parents = [
        (one, lambda c: summed(where(choice, c, zero), one.shape)),
        (other, lambda c: summed(where(choice, zero, c), other.shape)),
    ]
    return Var(np.where(choice, one.value, other.value), some.kind, parents)


def summed(x: Var, shape: tuple[int, ...]) -> Var:
    """Summed over what broadcasting had repeated: the inverse of `spread`."""
    if x.shape == tuple(shape):
        return x
    lead = len(x.shape) - len(shape)
    axes = tuple(range(lead)) + tuple(lead + n for n, size in enumerate(shape) if size == 1 != x.shape[lead + n])
    return Var(x.value.sum(axes).reshape(shape), x.kind, [(x, lambda c: spread(c, x.shape))], rounds=True)


def spread(x: Var, shape: tuple[int, ...]) -> Var:
    """Broadcast to `shape`."""
    return Var(np.broadcast_to(x.value, shape), x.kind, [(x, lambda c: summed(c, x.shape))])


def total(x: Var, axis: int) -> Var:
    """The sum over an axis, which is dropped."""
    shape = list(x.shape)
    shape[axis] = 1
    return reshape(summed(x, tuple(shape)), tuple(np.delete(x.shape, axis)))


def reshape(x: Var, shape: tuple[int, ...]) -> Var:
    return Var(x.value.reshape(shape), x.kind, [(x, lambda c: reshape(c, x.shape))])


def moved(x: Var, source: int, target: int) -> Var:
    """The array with one of its axes at another place."""
    return Var(np.moveaxis(x.value, source, target), x.kind, [(x, lambda c: moved(c, target, source))])


def take(x: Var, index: Any) -> Var:
    """x[index], for integer arrays, slices, integers."""
    return Var(x.value[index], x.kind, [(x, lambda c: scattered(c, index, x.shape))])


def scattered(x: Var, index: Any, shape: tuple[int, ...]) -> Var:
    """Zeros of `shape` to which x is added at `index`."""
    value = np.zeros(shape, x.value.dtype)
    np.add.at(value, index, x.value)
    return Var(value, x.kind, [(x, lambda c: take(c, index))], rounds=True)


def stacked(parts: Sequence[Var], axis: int = 0) -> Var:
    """Arrays of one shape along a new axis."""
    parents = [(part, lambda c, n=n: take(moved(c, axis, 0), n)) for n, part in enumerate(parts)]
    return Var(np.stack([part.value for part in parts], axis), parts[0].kind, parents)


def einsum(rule: str, a: Var, b: Var) -> Var:
    """A product of two arrays, no letter of which is on one side only."""
    left, result = rule.split("->")
    one, other = left.split(",")
    value = np.einsum(rule, a.value, b.value, optimize=True)
    parents = [
        (a, lambda c: einsum(f"{result},{other}->{one}", c, b)),
        (b, lambda c: einsum(f"{one},{result}->{other}", a, c)),
    ]
    return Var(value, a.kind, parents, rounds=True)


def pull(results: Sequence[Var], cotangents: Sequence[Var], inputs: Sequence[Var]) -> list[Var]:
    """The vector-Jacobian product: what a change of each input does to sum(results * cotangents)."""
    known: dict[int, Var] = {}
    for result, cotangent in zip(results, cotangents, strict=True):
        known[id(result)] = known[id(result)] + cotangent if id(result) in known else cotangent
    for var in _latest_first(results):
        cotangent = known.get(id(var))
        if cotangent is not None and var.parents:
            for parent, back in var.parents:
                part = back(cotangent)
                known[id(parent)] = known[id(parent)] + part if id(parent) in known else part
    return [known.get(id(x), x.like(np.zeros(x.shape))) for x in inputs]


def push(results: Sequence[Var], inputs: Sequence[Var], tangents: Sequence[Var]) -> list[Var]:
    """The Jacobian-vector product: how the results move when the inputs do."""
    seeds = [Var(np.zeros(y.shape), y.kind) for y in results]
    pulled = pull(results, seeds, inputs)
    return pull(pulled, list(tangents), seeds)


def _latest_first(results: Sequence[Var]) -> list[Var]:
    """Everything that the results were computed from, each before what it was computed from."""
    order, seen, waiting = [], set(), [(y, False) for y in results]
    while waiting:
        var, done = waiting.pop()
        if done:
            order.append(var)
        elif id(var) not in seen:
            seen.add(id(var))
            waiting.append((var, True))
            waiting.extend((parent, False) for parent, _ in var.parents)
    return order[::-1]
