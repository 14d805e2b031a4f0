"""`Mask`: the base of masks; how they are combined by `&`, `|` and `~`; `Dense`, an array as a mask. No kernel code.

`evaluate` states the rule once, for index arrays that broadcast together; `blocks` states it for whole blocks in three
values (empty 0, partial 1, full 2), from the ends of their index ranges. "Partial" is always a right answer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.node import Node, describe, is_array
from attnjax.core.tiles import Grid, Tile, everything, rows_of

Array = jax.Array

_MOST_DEPTH = 200


class Mask(Node):
    """Base class of all masks."""

    def __post_init__(self) -> None:
        if type(self) is Mask:
            raise TypeError("Mask is the base of masks: give one of them, such as attnjax.Causal().")

    def evaluate(self, tile: Tile) -> Array:
        """Booleans that broadcast to the tile: true where the query may see the key."""
        raise NotImplementedError

    def blocks(self, grid: Grid) -> Any:
        """The rule for blocks, int8: 0 nothing is seen, 2 all is seen, 1 anything else."""
        return np.int8(1)

    def reach(self) -> tuple[int | None, int | None]:
        """How many keys before its own, and how many after it, a query sees at most; `None`: all, or not known."""
        return None, None

    def __and__(self, other: Mask) -> Mask:
        return And(self, as_mask(other))

    def __rand__(self, other: Mask) -> Mask:
        return And(as_mask(other), self)

    def __or__(self, other: Mask) -> Mask:
        return Or(self, as_mask(other))

    def __ror__(self, other: Mask) -> Mask:
        return Or(as_mask(other), self)

    def __invert__(self) -> Mask:
        return Not(self)

    def to_array(self, query_length: int, key_length: int, *, batch: tuple[int, ...] = (), heads: int = 1) -> Array:
        """The mask as booleans, for looking at and for small problems.

        Args:
          query_length: T.
          key_length: S.
          batch: batch axes that the mask's own arrays do not tell.
          heads: number of query heads, when the mask's own arrays do not tell.

        Returns:
          `[T, S]`, or `[*B, N, T, S]` (N may be 1) when there are batch axes or heads.

        Example:
          >>> from attnjax import Causal
          >>> Causal().to_array(2, 3).astype(int).tolist()
          [[1, 0, 0], [1, 1, 0]]
        """
        tile, node, plain = everything(self, query_length, key_length, batch, heads)
        seen = jnp.broadcast_to(node.evaluate(tile), tile.shape)
        seen = seen.reshape(*seen.shape[:-4], tile.heads, query_length, key_length)
        return seen[0] if plain else seen

    def density(self, query_length: int, key_length: int, *, batch: tuple[int, ...] = (), heads: int = 1) -> float:
        """Share of (query, key) pairs that may see each other, counted a few rows at a time in linear memory.

        Example:
          >>> from attnjax import Causal
          >>> Causal().density(4, 4)
          0.625
        """
        if query_length == 0 or key_length == 0:
            return 0.0
        shares = [
            (tile.size, jnp.broadcast_to(node.evaluate(tile), tile.shape).mean(dtype=jnp.float32))
            for tile, node in rows_of(self, query_length, key_length, batch, heads)
        ]
        total = sum(size for size, _ in shares)
        return float(sum(size * float(share) for size, share in shares) / total)


def as_mask(mask: Any) -> Mask:
    """A `Mask`, or a boolean array taken as `Dense`."""
    if isinstance(mask, Mask):
        return mask
    if isinstance(mask, (jax.Array, np.ndarray, jax.ShapeDtypeStruct)):
        return Dense(mask)  # type: ignore[arg-type]
    hint = ""
    if isinstance(mask, (tuple, list)):
        hint = " Several masks are combined with & or |."
    elif callable(mask) and not isinstance(mask, type):
        hint = " A function of (b, h, q, k) is attnjax.Where(function)."
    raise TypeError(f"mask must be an attnjax Mask or a boolean array, got {type(mask).__name__}.{hint}")


class _Two(Mask):
    """A mask made of two."""

    reads: ClassVar = ""
    left: Mask
    right: Mask

    def __post_init__(self) -> None:
        _check_depth(self)


class And(_Two):
    """Both masks allow it; written `a & b`."""

    def reach(self) -> tuple[int | None, int | None]:
        sides = zip(self.left.reach(), self.right.reach(), strict=True)
        before, after = (min((n for n in side if n is not None), default=None) for side in sides)
        return before, after

    def evaluate(self, tile: Tile) -> Array:
        return self.left.evaluate(tile) & self.right.evaluate(tile)

    def blocks(self, grid: Grid) -> Any:
        return either(np.minimum, jnp.minimum, self.left.blocks(grid), self.right.blocks(grid))

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


class Or(_Two):
    """One of two masks allows it; written `a | b`."""

    def reach(self) -> tuple[int | None, int | None]:
        sides = zip(self.left.reach(), self.right.reach(), strict=True)
        before, after = (None if a is None or b is None else max(a, b) for a, b in sides)
        return before, after

    def evaluate(self, tile: Tile) -> Array:
        return self.left.evaluate(tile) | self.right.evaluate(tile)

    def blocks(self, grid: Grid) -> Any:
        return either(np.maximum, jnp.maximum, self.left.blocks(grid), self.right.blocks(grid))

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


class Not(Mask):
    """The mask forbids it; written `~a`."""

    reads: ClassVar = ""
    mask: Mask

    def __post_init__(self) -> None:
        _check_depth(self)

    def evaluate(self, tile: Tile) -> Array:
        return tile.inverted(self.mask.evaluate(tile))

    def blocks(self, grid: Grid) -> Any:
        return np.int8(2) - self.mask.blocks(grid)

    def __repr__(self) -> str:
        return f"~{self.mask!r}"


class Dense(Mask):
    """A mask given as booleans, true where the query may see the key.

    Args:
      array: booleans that broadcast, aligned at the right, to `[*B, N, T, S]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax import Dense
      >>> Dense(jnp.eye(2, dtype=bool))
      Dense(bool[2, 2])
    """

    axes: ClassVar = {"array": "hts"}
    always: ClassVar = ("array",)
    reads: ClassVar = ""
    broadcasts: ClassVar = True
    array: Array

    def __post_init__(self) -> None:
        if is_axis(self.array):
            return
        if not is_array(self.array) or self.array.dtype != np.bool_:
            raise TypeError(
                f"Dense takes a boolean array, true where the query may see the key; got {describe(self.array)}. "
                "An additive mask of floats is a score: attnjax.Bias(array)."
            )

    def evaluate(self, tile: Tile) -> Array:
        return tile.take(self.array, "hts")

    def blocks(self, grid: Grid) -> Any:
        lowest, highest = grid.ends(self.array, "hts")
        return three(full=lowest, empty=~highest)


def three(*, full: Any, empty: Any) -> Any:
    """0 where empty, 2 where full, 1 elsewhere; numpy stays numpy, so known maps stay known."""
    return np.int8(1) + full.astype(np.int8) - empty.astype(np.int8)


def either(with_numpy: Callable, with_jax: Callable, left: Any, right: Any) -> Any:
    known = isinstance(left, (np.ndarray, np.generic)) and isinstance(right, (np.ndarray, np.generic))
    return (with_numpy if known else with_jax)(left, right)


def is_axis(value: Any) -> bool:
    """Whether it is what stands for an array in the trees of `jax.vmap`: the number of an axis."""
    return isinstance(value, int) and not isinstance(value, bool)


def _check_depth(mask: Mask) -> None:
    """Remembers how deep masks are nested; rules are evaluated by recursion, for which Python has a limit."""
    depth = 1 + max(getattr(part, "_depth", 0) for part in vars(mask).values())
    if depth > _MOST_DEPTH:
        raise ValueError(
            f"masks are nested {depth} deep, the most is {_MOST_DEPTH}: combine them in pairs, and the pairs in pairs, "
            "or say the rule as one attnjax.Where(function) or attnjax.Dense(array)."
        )
    object.__setattr__(mask, "_depth", depth)
