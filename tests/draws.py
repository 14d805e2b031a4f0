"""How the arrays of a case are drawn: functions of a NumPy generator and a shape. What they are for is in cases.py."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from oracle import Arrays, Shape

Draw = Callable[[np.random.Generator, Shape], Arrays]


def nothing(rng: np.random.Generator, shape: Shape) -> Arrays:
    return {}


def integers(low: int, high: int, *axes: str) -> Draw:
    """Draws arrays `a`, `b`, ... of integers in [low, high): axes "" is [*batch], "t" is [*batch, T], "-" is []."""

    def draw(rng: np.random.Generator, shape: Shape) -> Arrays:
        sizes = {"t": shape.T, "s": shape.S}
        tail = lambda a: () if a == "-" else (*shape.batch, *(sizes[c] for c in a))
        return {name: rng.integers(low, high, tail(a)).astype(np.int32) for name, a in zip("abc", axes, strict=False)}

    return draw


def booleans(axes: str, batched: bool = False, share: float = 0.4) -> Draw:
    """Draws one boolean array `a` with the given share of True; axes of "nts", "1" for an axis of size one."""

    def draw(rng: np.random.Generator, shape: Shape) -> Arrays:
        sizes = {"n": shape.N, "t": shape.T, "s": shape.S, "1": 1}
        return {"a": rng.random((*(shape.batch if batched else ()), *(sizes[c] for c in axes))) < share}

    return draw


def documents(rng: np.random.Generator, shape: Shape) -> Arrays:
    """Ids of packed documents: sorted, different per example, some keys without any query."""
    ids = lambda length: np.sort(rng.integers(0, 5, (*shape.batch, length)), axis=-1).astype(np.int32)
    return {"a": ids(shape.T), "b": ids(shape.S)}


def order(rng: np.random.Generator, shape: Shape) -> Arrays:
    """The rank of every token in one random order."""
    return {"a": rng.permutation(shape.T).astype(np.int32)}


def normal(size: float = 1.0, /, **axes: str) -> Draw:
    """Draws normal arrays by name; axes of "nts", "1" for an axis of size one, a leading "*" for the batch axes."""

    def draw(rng: np.random.Generator, shape: Shape) -> Arrays:
        sizes = {"n": (shape.N,), "t": (shape.T,), "s": (shape.S,), "1": (1,), "*": shape.batch, "8": (8,)}
        return {name: size * rng.normal(size=sum((sizes[c] for c in a), ())) for name, a in axes.items()}

    return draw


def slopes(axes: str) -> Draw:
    """Draws one array `a` of slopes as ALiBi has them: positive and below 1."""
    draw = normal(a=axes)
    return lambda rng, shape: {"a": 0.1 + 0.2 * np.abs(draw(rng, shape)["a"])}


def join(*draws: Draw) -> Draw:
    """All the arrays that several draw."""
    return lambda rng, shape: {name: a for draw in draws for name, a in draw(rng, shape).items()}
