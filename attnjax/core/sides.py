"""Masks taken apart: rules of (query, key) pairs as comparisons of one number per key with one number per query.

A kernel that cannot run JAX on its tiles (C++, say) evaluates a mask from these. The mask's own rule is run once, on a
`SidedTile`, whose indices remember on which side they stand; what does not come apart raises `NotSeparable`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.node import is_array
from attnjax.core.tiles import Sizes, Tile, tile_form

Array = jax.Array


class NotSeparable(Exception):
    """The rule needs more than comparisons of numbers by key with numbers by query."""


class Rule:
    """Which pairs are seen: `Comparison`, `Pairs`, or a combination of them with & | ~."""

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
    """A rule that is an array: booleans `[*batch or 1, N or 1, T or 1, S or 1]`.

    Attributes:
      given: whether it is an operand, which costs no memory, and not made from a function here.
    """

    array: Any
    given: bool


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
            return Pairs(array, given=True)
        if axes in ("", "t", "s"):
            side = {"": None, "t": "query", "s": "key"}[axes]
            return Sided(side, array[..., None] if side is None else array, self.sizes)
        raise NotSeparable(f"an array with axes {axes!r}")

    def inverted(self, seen: Any) -> Any:
        return ~seen

    def apply(self, function: Any, constants: tuple[Array, ...]) -> Rule:
        """A function of indices is evaluated on all pairs."""
        sizes, n = self.sizes, len(self.sizes.batch)
        spans = (0, sizes.key_heads), (0, sizes.query_length), (0, sizes.key_length)
        tile = Tile(sizes, sizes.batch_index(), sizes.batch, *spans)
        parts = [tile_form(c, "." * (c.ndim - n), n, sizes.group) for c in constants]
        seen = tile.apply(function, tuple(parts))
        return Pairs(seen.reshape(*seen.shape[:n], -1, *seen.shape[-2:]), given=False)


class Sided:
    """Numbers by query, by key, or by neither: `values` are `[*batch or 1, T, S or 1]`."""

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

    def __add__(self, other: Any) -> Sided:
        return self._made(other, lambda a, b: a + b)

    __radd__ = __add__

    def __sub__(self, other: Any) -> Sided:
        return self._made(other, lambda a, b: a - b)

    def __floordiv__(self, other: Any) -> Sided:
        return self._made(other, lambda a, b: a // b)

    def __mod__(self, other: Any) -> Sided:
        return self._made(other, lambda a, b: a % b)

    def __and__(self, other: Any) -> Any:
        return self._joined(other, lambda a, b: a & b) or as_rule(self) & other

    def __or__(self, other: Any) -> Any:
        return self._joined(other, lambda a, b: a | b) or as_rule(self) | other

    def __invert__(self) -> Sided:
        return Sided(self.side, ~self.values, self.sizes)

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
    """Both sides as int32. Where one holds more, numbers beyond that are above, or below, all that the other holds.

    Raises:
      NotSeparable: both hold more.
    """
    wide = [x for x in (key, query) if not np.can_cast(x.values.dtype, np.int32)]
    if len(wide) == 2:
        raise NotSeparable("integers of more than 32 bits on both sides")
    if not wide:
        return Comparison(operator, key.whole().astype(np.int32), query.whole().astype(np.int32))
    (side,) = wide
    dtype, limits = side.values.dtype, np.iinfo(np.int32)
    low, high = (dtype.type(x) for x in (max(limits.min, np.iinfo(dtype).min), min(limits.max, np.iinfo(dtype).max)))
    xp = np if isinstance(side.values, np.ndarray) else jnp
    clipped = Sided(side.side, xp.clip(side.values, low, high).astype(np.int32), side.sizes)
    rule = _comparison(operator, *(clipped if x is side else x for x in (key, query)))
    rule &= as_rule((side >= low) & (side <= high))
    if operator == "equal":
        return rule
    certain = side > high if (side is query) == operator.startswith("less") else side < low
    return rule | as_rule(certain)
