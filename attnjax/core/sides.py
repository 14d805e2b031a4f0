"""Masks taken apart: rules of (query, key) pairs as comparisons of one number per key with one number per query.

A kernel that cannot run JAX on its tiles (C++, say) evaluates a mask from these. The mask's own rule is run once, on a
`SidedTile`, whose indices remember on which side they stand; what does not come apart raises `NotSeparable`.
"""

from __future__ import annotations

import dataclasses
import operator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.integers import same_as_int32
from attnjax.core.node import is_array
from attnjax.core.tiles import Sizes, Tile, tile_form

Array = jax.Array


class NotSeparable(Exception):
    """The rule needs more than comparisons of numbers by key with numbers by query."""


class Rule:
    """Which pairs are seen: `Comparison`, `Pairs`, `Function`, or a combination of them with & | ~."""

    def __and__(self, other: Any) -> Rule:
        return Combined("both", (self, as_rule(other)))

    def __or__(self, other: Any) -> Rule:
        return Combined("either", (self, as_rule(other)))

    def __invert__(self) -> Rule:
        return Combined("negate", (self,))

    __rand__, __ror__ = __and__, __or__


@dataclasses.dataclass(frozen=True, eq=False)
class Comparison(Rule):
    """Keys stand at the left of the operator, one of "less_equal", "less", "equal", "greater_equal", "greater".

    Attributes:
      keys: int32 `[*batch or 1, S]`; queries: int32 `[*batch or 1, T]`.
    """

    operator: str
    keys: Any
    queries: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Pairs(Rule):
    """A rule that is an array: booleans `[*batch or 1, N or 1, T or 1, S or 1]`."""

    array: Any


@dataclasses.dataclass(frozen=True, eq=False)
class Function(Rule):
    """A rule that is a function of indices.

    Attributes:
      function: an `IndexFunction`; constants: what it captured, in tile form.
    """

    function: Any
    constants: tuple[Any, ...]
    sizes: Sizes

    def pairs(self, queries: tuple[Any, int], keys: tuple[Any, int]) -> Array:
        """Evaluates it on a rectangle: booleans `[*batch or 1, N or 1, queries, keys]`.

        Args:
          queries, keys: the first one and how many. Behind the last one of the problem come copies of it.
        """
        sizes, n = self.sizes, len(self.sizes.batch)
        tile = Tile(sizes, sizes.batch_index(), sizes.batch, (0, sizes.key_heads), queries, keys)
        tile.q = jnp.minimum(tile.q, sizes.query_length - 1)
        tile.k = jnp.minimum(tile.k, sizes.key_length - 1)
        seen = tile.apply(self.function, self.constants)
        return seen.reshape(*seen.shape[:n], -1, *seen.shape[-2:])


@dataclasses.dataclass(frozen=True, eq=False)
class Combined(Rule):
    """`operator` is "both", "either" or "negate"."""

    operator: str
    rules: tuple[Rule, ...]


def separate(mask: Any, sizes: Sizes) -> Rule:
    """The rule of a mask whose leaves are in operand form.

    Raises:
      NotSeparable: it does not come apart.
    """
    return as_rule(mask.evaluate(SidedTile(sizes)))


class SidedTile:
    """Stands for all pairs of a problem. Its indices, and slices of leaves, are `Sided`."""

    def __init__(self, sizes: Sizes):
        self.sizes = sizes
        self.query_length, self.key_length = sizes.query_length, sizes.key_length
        rank = (1,) * len(sizes.batch)
        count = lambda n: np.arange(n, dtype=np.int32).reshape(*rank, n)
        self.q, self.k = Sided("query", count(sizes.query_length), sizes), Sided("key", count(sizes.key_length), sizes)

    def take(self, array: Any, axes: str) -> Any:
        if not is_array(array):
            return array
        if axes == "hts":
            return Pairs(array)
        if axes in ("", "t", "s"):
            side = {"": None, "t": "query", "s": "key"}[axes]
            return Sided(side, array[..., None] if side is None else array, self.sizes)
        raise NotSeparable(f"an array with axes {axes!r}")

    @property
    def b(self) -> Any:
        raise NotSeparable("the number of the batch entry")

    @property
    def h(self) -> Any:
        raise NotSeparable("the number of the head")

    def inverted(self, seen: Any) -> Any:
        return ~seen

    def apply(self, function: Any, constants: tuple[Array, ...]) -> Rule:
        n = len(self.sizes.batch)
        parts = (tile_form(c, "." * (c.ndim - n), n, self.sizes.group) for c in constants)
        return Function(function, tuple(parts), self.sizes)


class Sided:
    """Numbers by query, by key, or by neither: `values` are `[*batch or 1, T, S or 1]`."""

    __array_ufunc__ = None  # so that NumPy's numbers leave what is added to them to this class

    def __init__(self, side: str | None, values: Any, sizes: Sizes):
        self.side, self.values, self.sizes = side, values, sizes

    def _with(self, other: Any) -> tuple[str | None, Any]:
        if not isinstance(other, Sided):
            return self.side, other
        if None not in (self.side, other.side) and self.side != other.side:
            raise NotSeparable("arithmetic between queries and keys")
        return self.side or other.side, other.values

    def _made(self, other: Any, function: Any) -> Sided:
        side, values = self._with(other)
        return Sided(side, function(self.values, values), self.sizes)

    def __and__(self, other: Any) -> Any:
        return self._joined(other, lambda a, b: a & b) or as_rule(self) & other

    def __or__(self, other: Any) -> Any:
        return self._joined(other, lambda a, b: a | b) or as_rule(self) | other

    def __invert__(self) -> Sided:
        return Sided(self.side, ~self.values, self.sizes)

    def __neg__(self) -> Sided:
        return Sided(self.side, -self.values, self.sizes)

    def __abs__(self) -> Sided:
        return Sided(self.side, abs(self.values), self.sizes)

    def __getattr__(self, name: str) -> Any:
        raise NotSeparable(f"{name!r} of an index")

    def __jax_array__(self) -> Any:
        raise NotSeparable("a function of jax.numpy")

    def __bool__(self) -> bool:
        raise NotSeparable("a branch")

    def _joined(self, other: Any, function: Any) -> Sided | None:
        """Booleans of one side stay numbers of that side."""
        if isinstance(other, Sided) and (None in (self.side, other.side) or self.side == other.side):
            return self._made(other, function)
        return None

    def _compared(self, other: Any, operator: str, function: Any) -> Any:
        if isinstance(other, Sided) and {self.side, other.side} == {"query", "key"}:
            if self.side == "query":
                return _comparison(_MIRRORED[operator], other, self)
            return _comparison(operator, self, other)
        return self._made(other, function)

    def __le__(self, other: Any) -> Any:
        return self._compared(other, "less_equal", lambda a, b: a <= b)

    def __lt__(self, other: Any) -> Any:
        return self._compared(other, "less", lambda a, b: a < b)

    def __ge__(self, other: Any) -> Any:
        return self._compared(other, "greater_equal", lambda a, b: a >= b)

    def __gt__(self, other: Any) -> Any:
        return self._compared(other, "greater", lambda a, b: a > b)

    def __eq__(self, other: Any) -> Any:
        return self._compared(other, "equal", lambda a, b: a == b)

    __hash__ = None  # type: ignore[assignment]

    def whole(self) -> Any:
        """The values along all queries or keys."""
        length = self.sizes.key_length if self.side == "key" else self.sizes.query_length
        shape = (*self.values.shape[:-1], length)
        xp = np if isinstance(self.values, np.ndarray) else jnp
        return xp.broadcast_to(self.values, shape)


def _arithmetic(operation: Any) -> tuple[Any, Any]:
    """What an operator does with a number of the same side, or of none, standing first and standing second."""
    return (
        lambda self, other: self._made(other, operation),
        lambda self, other: self._made(other, lambda a, b: operation(b, a)),
    )


for _name in ("add", "sub", "mul", "floordiv", "mod", "xor", "lshift", "rshift"):
    _first, _second = _arithmetic(getattr(operator, _name))
    setattr(Sided, f"__{_name}__", _first)
    setattr(Sided, f"__r{_name}__", _second)


_MIRRORED = {
    "less_equal": "greater_equal",
    "less": "greater",
    "equal": "equal",
    "greater_equal": "less_equal",
    "greater": "less",
}


def as_rule(seen: Any) -> Rule:
    """A rule, from what evaluating a mask on a `SidedTile` gave."""
    if isinstance(seen, Rule):
        return seen
    if not isinstance(seen, Sided):
        raise NotSeparable(f"a {type(seen).__name__}")
    rank = (1,) * len(seen.sizes.batch)
    xp = np if isinstance(seen.values, np.ndarray) else jnp
    if seen.side == "key":  # keys <= 0
        return Comparison(
            "less_equal",
            xp.where(seen.whole(), xp.int32(0), xp.int32(1)),
            np.zeros((*rank, seen.sizes.query_length), np.int32),
        )
    return Comparison(  # 0 <= queries
        "less_equal",
        np.zeros((*rank, seen.sizes.key_length), np.int32),
        xp.where(seen.whole(), xp.int32(0), xp.int32(-1)),
    )


def _comparison(operator: str, key: Sided, query: Sided) -> Rule:
    """Both sides as int32; numbers of more bits as several, of which the upper ones decide, where they differ."""
    words = list(zip(*same_as_int32(key.values, query.values), strict=True))
    compare = lambda operator, keys, queries: Comparison(
        operator, Sided("key", keys, key.sizes).whole(), Sided("query", queries, key.sizes).whole()
    )
    rule: Rule = compare(operator, *words[-1])
    for keys, queries in reversed(words[:-1]):
        rule &= compare("equal", keys, queries)
        if operator != "equal":
            rule |= compare(operator.removesuffix("_equal"), keys, queries)
    return rule
