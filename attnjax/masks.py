"""Masks: who may see whom. Each is data with two rules: one for tiles of indices, one for blocks. No kernel code here.

A mask is combined with `&`, `|` and `~`. `evaluate` states the rule once, for index arrays that broadcast together;
`blocks` states it for whole blocks in three values (empty 0, partial 1, full 2), from the ends of their index ranges.
"Partial" is always a right answer.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.checks import check_integer
from attnjax.core.functions import trace
from attnjax.core.node import Node, describe, is_array
from attnjax.core.tiles import Grid, Tile, Values, everything, rows_of

Array = jax.Array
Number = int | Array


class Mask(Node):
    """Base class of all masks."""

    def evaluate(self, tile: Tile) -> Array:
        """Booleans that broadcast to the tile: true where the query may see the key."""
        raise NotImplementedError

    def blocks(self, grid: Grid) -> Any:
        """The rule for blocks, int8: 0 nothing is seen, 2 all is seen, 1 anything else."""
        raise NotImplementedError

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


class And(Mask):
    """Both masks allow it; written `a & b`."""

    left: Mask
    right: Mask

    def evaluate(self, tile: Tile) -> Array:
        return self.left.evaluate(tile) & self.right.evaluate(tile)

    def blocks(self, grid: Grid) -> Any:
        return _either(np.minimum, jnp.minimum, self.left.blocks(grid), self.right.blocks(grid))

    def __repr__(self) -> str:
        return f"({self.left!r} & {self.right!r})"


class Or(Mask):
    """One of two masks allows it; written `a | b`."""

    left: Mask
    right: Mask

    def evaluate(self, tile: Tile) -> Array:
        return self.left.evaluate(tile) | self.right.evaluate(tile)

    def blocks(self, grid: Grid) -> Any:
        return _either(np.maximum, jnp.maximum, self.left.blocks(grid), self.right.blocks(grid))

    def __repr__(self) -> str:
        return f"({self.left!r} | {self.right!r})"


class Not(Mask):
    """The mask forbids it; written `~a`."""

    mask: Mask

    def evaluate(self, tile: Tile) -> Array:
        return tile.inverted(self.mask.evaluate(tile))

    def blocks(self, grid: Grid) -> Any:
        return np.int8(2) - self.mask.blocks(grid)

    def __repr__(self) -> str:
        return f"~{self.mask!r}"


def _shift(mask: Causal | Window | Chunked | Dilated, where: Tile | Grid) -> Values:
    """How far queries are moved: by the mask's `offset`, and by S - T when it is aligned to the end."""
    shift = where.take(mask.offset, "")
    return shift + (where.key_length - where.query_length) if mask.at_end else shift


class Causal(Mask):
    """Query t sees keys s <= t + offset: the first query and the first key are aligned, as in `jax.nn` and torch.

    Args:
      offset: integer, or integers `[*B]`; how many keys lie before the first query (a cache, say).

    Example:
      >>> from attnjax import Causal
      >>> Causal(offset=1).to_array(2, 3).astype(int).tolist()
      [[1, 1, 0], [1, 1, 1]]
    """

    axes: ClassVar = {"offset": ""}
    offset: Number = 0
    at_end: bool = False

    def __post_init__(self) -> None:
        check_integer("Causal", "offset", self.offset)

    @classmethod
    def aligned_end(cls, offset: Number = 0) -> Causal:
        """Query t sees keys s <= t + S - T + offset: the last query sees the last key, as in flash-attention.

        Example:
          >>> from attnjax import Causal
          >>> Causal.aligned_end().to_array(2, 3).astype(int).tolist()
          [[1, 1, 0], [1, 1, 1]]
        """
        return cls(offset, at_end=True)

    def evaluate(self, tile: Tile) -> Array:
        return tile.k <= tile.q + _shift(self, tile)

    def blocks(self, grid: Grid) -> Any:
        shift = _shift(self, grid)
        return _three(full=grid.k_max <= grid.q_min + shift, empty=grid.k_min > grid.q_max + shift)

    def __repr__(self) -> str:
        return _placed_repr("Causal", [] if _is_zero(self.offset) else [describe(self.offset)], self.at_end)


class Window(Mask):
    """Query t sees keys s with t + offset - left <= s <= t + offset + right, both ends included.

    Args:
      left, right: integers >= 0, or integers `[*B]`; `None` is unbounded.
      offset: integer, or integers `[*B]`.

    Example:
      >>> from attnjax import Window
      >>> Window(left=1, right=0).to_array(3, 3).astype(int).tolist()
      [[1, 0, 0], [1, 1, 0], [0, 1, 1]]

    References:
      Beltagy et al., "Longformer: The Long-Document Transformer", 2020, section 3.1.
    """

    axes: ClassVar = {"left": "", "right": "", "offset": ""}
    left: Number | None = None
    right: Number | None = None
    offset: Number = 0
    at_end: bool = False

    def __post_init__(self) -> None:
        for name in ("left", "right"):
            if getattr(self, name) is not None:
                check_integer("Window", name, getattr(self, name), least=0)
        check_integer("Window", "offset", self.offset)

    @classmethod
    def aligned_end(cls, left: Number | None = None, right: Number | None = None, offset: Number = 0) -> Window:
        """The same window around t + S - T: the last query stands at the last key.

        Example:
          >>> from attnjax import Window
          >>> Window.aligned_end(left=1, right=0).to_array(1, 4).astype(int).tolist()
          [[0, 0, 1, 1]]
        """
        return cls(left, right, offset, at_end=True)

    def evaluate(self, tile: Tile) -> Array:
        centre = tile.q + _shift(self, tile)
        bounds = [] if self.left is None else [tile.k >= centre - tile.take(self.left, "")]
        bounds += [] if self.right is None else [tile.k <= centre + tile.take(self.right, "")]
        return _all(bounds, tile)

    def blocks(self, grid: Grid) -> Any:
        shift = _shift(self, grid)
        kinds = np.int8(2)
        if self.left is not None:
            reach = shift - grid.take(self.left, "")
            left = _three(full=grid.k_min >= grid.q_max + reach, empty=grid.k_max < grid.q_min + reach)
            kinds = _either(np.minimum, jnp.minimum, kinds, left)
        if self.right is not None:
            reach = shift + grid.take(self.right, "")
            right = _three(full=grid.k_max <= grid.q_min + reach, empty=grid.k_min > grid.q_max + reach)
            kinds = _either(np.minimum, jnp.minimum, kinds, right)
        return kinds

    def __repr__(self) -> str:
        sides = (("left", self.left), ("right", self.right))
        parts = [f"{name}={describe(side)}" for name, side in sides if side is not None]
        parts += [] if _is_zero(self.offset) else [f"offset={describe(self.offset)}"]
        return _placed_repr("Window", parts, self.at_end)


class Chunked(Mask):
    """Query t sees keys in its own chunk: (t + offset) // size == s // size.

    Args:
      size: integer >= 1, the length of a chunk.
      offset: integer, or integers `[*B]`.

    Example:
      >>> from attnjax import Causal, Chunked
      >>> (Chunked(2) & Causal()).to_array(4, 4).astype(int).tolist()
      [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]

    References:
      "The Llama 4 herd", Meta AI, 2025 (chunked local attention).
    """

    axes: ClassVar = {"size": "", "offset": ""}
    size: Number
    offset: Number = 0
    at_end: bool = False

    def __post_init__(self) -> None:
        check_integer("Chunked", "size", self.size, least=1)
        check_integer("Chunked", "offset", self.offset)

    def evaluate(self, tile: Tile) -> Array:
        size = tile.take(self.size, "")
        return (tile.q + _shift(self, tile)) // size == tile.k // size

    def blocks(self, grid: Grid) -> Any:
        size, shift = grid.take(self.size, ""), _shift(self, grid)
        q_first, q_last = (grid.q_min + shift) // size, (grid.q_max + shift) // size
        return _three_ranges(q_first, q_last, grid.k_min // size, grid.k_max // size)


class Prefix(Mask):
    """Every query sees the keys s < length. `Causal() | Prefix(n)` is a prefix language model.

    Args:
      length: integer >= 0, or integers `[*B]`.

    Example:
      >>> from attnjax import Causal, Prefix
      >>> (Causal() | Prefix(2)).to_array(3, 3).astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [1, 1, 1]]

    References:
      Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 3.2.1.
    """

    axes: ClassVar = {"length": ""}
    length: Number

    def __post_init__(self) -> None:
        check_integer("Prefix", "length", self.length, least=0)

    def evaluate(self, tile: Tile) -> Array:
        return tile.k < tile.take(self.length, "")

    def blocks(self, grid: Grid) -> Any:
        length = grid.take(self.length, "")
        return _three(full=grid.k_max < length, empty=grid.k_min >= length)


class Segments(Mask):
    """Query and key belong to the same segment (packed documents): their ids are equal.

    Args:
      query_ids: integers `[T]` or `[*B, T]`.
      key_ids: integers `[S]` or `[*B, S]`; the query's when not given.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax import Segments
      >>> Segments(jnp.array([0, 0, 1])).to_array(3, 3).astype(int).tolist()
      [[1, 1, 0], [1, 1, 0], [0, 0, 1]]
    """

    axes: ClassVar = {"query_ids": "t", "key_ids": "s"}
    query_ids: Array
    key_ids: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_ids", self.query_ids if self.key_ids is None else self.key_ids)
        for name in ("query_ids", "key_ids"):
            object.__setattr__(self, name, _integers("Segments", name, getattr(self, name)))

    def evaluate(self, tile: Tile) -> Array:
        return tile.take(self.query_ids, "t") == tile.take(self.key_ids, "s")

    def blocks(self, grid: Grid) -> Any:
        return _three_ranges(*grid.ends(self.query_ids, "t"), *grid.ends(self.key_ids, "s"))

    def __repr__(self) -> str:
        keys = "" if self.key_ids is self.query_ids else f", {describe(self.key_ids)}"
        return f"Segments({describe(self.query_ids)}{keys})"


class Lengths(Mask):
    """Only the first `key` keys are seen, and only the first `query` queries see: padding at the end of each row.

    Args:
      key: integer, or integers `[*B]`; `None` is all.
      query: integer, or integers `[*B]`; `None` is all.

    Example:
      >>> from attnjax import Lengths
      >>> Lengths(key=2).to_array(2, 3).astype(int).tolist()
      [[1, 1, 0], [1, 1, 0]]
    """

    axes: ClassVar = {"key": "", "query": ""}
    key: Number | None = None
    query: Number | None = None

    def __post_init__(self) -> None:
        for name in ("key", "query"):
            if getattr(self, name) is not None:
                check_integer("Lengths", name, getattr(self, name), least=0)

    def evaluate(self, tile: Tile) -> Array:
        bounds = [] if self.key is None else [tile.k < tile.take(self.key, "")]
        bounds += [] if self.query is None else [tile.q < tile.take(self.query, "")]
        return _all(bounds, tile)

    def blocks(self, grid: Grid) -> Any:
        kinds = np.int8(2)
        for length, low, high in ((self.key, grid.k_min, grid.k_max), (self.query, grid.q_min, grid.q_max)):
            if length is not None:
                length = grid.take(length, "")
                kinds = _either(np.minimum, jnp.minimum, kinds, _three(full=high < length, empty=low >= length))
        return kinds


class Dilated(Mask):
    """Query t sees every `stride`-th key, counted from itself: (t + offset - s) % stride == 0.

    Args:
      stride: integer >= 1.
      offset: integer, or integers `[*B]`.

    Example:
      >>> from attnjax import Causal, Dilated
      >>> (Causal() & Dilated(2)).to_array(3, 3).astype(int).tolist()
      [[1, 0, 0], [0, 1, 0], [1, 0, 1]]

    References:
      Child et al., "Generating Long Sequences with Sparse Transformers", 2019, section 4.2.
    """

    axes: ClassVar = {"stride": "", "offset": ""}
    stride: Number
    offset: Number = 0
    at_end: bool = False

    def __post_init__(self) -> None:
        check_integer("Dilated", "stride", self.stride, least=1)
        check_integer("Dilated", "offset", self.offset)

    def evaluate(self, tile: Tile) -> Array:
        stride = tile.take(self.stride, "")
        return (tile.q + _shift(self, tile)) % stride == tile.k % stride

    def blocks(self, grid: Grid) -> Any:
        return np.int8(2) if isinstance(self.stride, int) and self.stride == 1 else np.int8(1)


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
    broadcasts: ClassVar = True
    array: Array

    def __post_init__(self) -> None:
        if not is_array(self.array) or self.array.dtype != np.bool_:
            raise TypeError(
                f"Dense takes a boolean array, true where the query may see the key; got {describe(self.array)}. "
                "An additive mask of floats is a score: attnjax.Bias(array)."
            )

    def evaluate(self, tile: Tile) -> Array:
        return tile.take(self.array, "hts")

    def blocks(self, grid: Grid) -> Any:
        lowest, highest = grid.ends(self.array, "hts")
        return _three(full=lowest, empty=jnp.logical_not(highest))


class Where(Mask):
    """A mask given as a Python function of four scalar integers: `predicate(b, h, q, k) -> bool`.

    b counts the batch (row-major when there are several batch axes), h the query heads. Arrays that the function
    captures become leaves of the mask. The function must not read arrays of size T x S: use `Dense` for those.

    Args:
      predicate: the function, made of jax.numpy operations.
      scan: look at every pair once, block by block in linear memory, to find blocks that can be skipped; worth it
        when a `BlockMap` is built once and used often. Without it every block is visited.

    Example:
      >>> from attnjax import Where
      >>> Where(lambda b, h, q, k: abs(q - k) <= h).to_array(2, 2, heads=2).astype(int).tolist()
      [[[1, 0], [0, 1]], [[1, 1], [1, 1]]]
    """

    predicate: Any  # a function when it is given, an IndexFunction from then on
    scan: bool = False
    constants: tuple[Array, ...] = ()

    def __post_init__(self) -> None:
        function, constants = trace(self.predicate, score=False, name="Where")
        object.__setattr__(self, "predicate", function)
        object.__setattr__(self, "constants", constants)

    def evaluate(self, tile: Tile) -> Array:
        return tile.apply(self.predicate, self.constants)

    def blocks(self, grid: Grid) -> Any:
        return grid.scan(self, self.predicate.uses) if self.scan else np.int8(1)

    def __repr__(self) -> str:
        captured = ", ".join(map(describe, self.constants))
        return f"Where(function of (b, h, q, k){', capturing ' + captured if captured else ''})"


class Permutation(Mask):
    """Causal in a permuted order: query t sees the keys that come no later in the factorisation (XLNet).

    Args:
      order: integers `[T]` or `[*B, T]`; order[t] is the rank of token t. T and S are equal.
      strict: leave out the token itself (XLNet's query stream).

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax import Permutation
      >>> Permutation(jnp.array([2, 0, 1])).to_array(3, 3).astype(int).tolist()
      [[1, 1, 1], [0, 1, 0], [0, 1, 1]]

    References:
      Yang et al., "XLNet: Generalized Autoregressive Pretraining", 2019, section 2.3.
    """

    axes: ClassVar = {"order": "t", "key_order": "s"}
    order: Array
    strict: bool = False
    key_order: Array | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "order", _integers("Permutation", "order", self.order))
        object.__setattr__(self, "key_order", self.order)

    def evaluate(self, tile: Tile) -> Array:
        query, key = tile.take(self.order, "t"), tile.take(self.key_order, "s")
        return key < query if self.strict else key <= query

    def blocks(self, grid: Grid) -> Any:
        (q_low, q_high), (k_low, k_high) = grid.ends(self.order, "t"), grid.ends(self.key_order, "s")
        if self.strict:
            return _three(full=k_high < q_low, empty=k_low >= q_high)
        return _three(full=k_high <= q_low, empty=k_low > q_high)

    def __repr__(self) -> str:
        return f"Permutation({describe(self.order)}{', strict=True' if self.strict else ''})"


def _all(bounds: list[Any], tile: Tile) -> Any:
    """All of the bounds hold; true where there are none."""
    return functools.reduce(operator.and_, bounds) if bounds else tile.k == tile.k


def _three(*, full: Any, empty: Any) -> Any:
    """0 where empty, 2 where full, 1 elsewhere; numpy stays numpy, so known maps stay known."""
    return np.int8(1) + full.astype(np.int8) - empty.astype(np.int8)


def _three_ranges(q_low: Any, q_high: Any, k_low: Any, k_high: Any) -> Any:
    """The three values of "equal", for values that lie in known ranges."""
    full = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return _three(full=full, empty=(q_high < k_low) | (k_high < q_low))


def _either(with_numpy: Callable, with_jax: Callable, left: Any, right: Any) -> Any:
    known = isinstance(left, (np.ndarray, np.generic)) and isinstance(right, (np.ndarray, np.generic))
    return (with_numpy if known else with_jax)(left, right)


def _integers(node: str, name: str, value: Any) -> Any:
    value = np.asarray(value) if isinstance(value, (list, tuple)) else value
    if not is_array(value) or not np.issubdtype(value.dtype, np.integer):
        raise TypeError(f"{node}: {name} must be an array of integers, got {describe(value)}.")
    return value


def _is_zero(value: Any) -> bool:
    return isinstance(value, int) and value == 0


def _placed_repr(name: str, parts: list[str], at_end: bool) -> str:
    return f"{name}{'.aligned_end' if at_end else ''}({', '.join(parts)})"
