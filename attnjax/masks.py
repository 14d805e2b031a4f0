"""Masks: who may see whom. Each is data with two rules: one for tiles of indices, one for blocks. No kernel code here.

What all of them share, and how they are combined, is in `core.mask`.
"""

from __future__ import annotations

import functools
import operator
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.checks import check_integer, check_integers, number_of
from attnjax.core.functions import IndexFunction, trace
from attnjax.core.integers import bounded, chunk_and_offset, same_as_int32, stride_and_offset
from attnjax.core.mask import And as And
from attnjax.core.mask import Dense as Dense
from attnjax.core.mask import Mask as Mask
from attnjax.core.mask import Not as Not
from attnjax.core.mask import Or as Or
from attnjax.core.mask import as_mask as as_mask
from attnjax.core.mask import either, is_axis, three
from attnjax.core.node import describe
from attnjax.core.tiles import Grid, Tile, Values

Array = jax.Array
Number = int | Array


def _shift(mask: Causal | Window | Chunked | Dilated, where: Tile | Grid) -> Values:
    """How far queries are moved: by the mask's `offset`, and by S - T when it is aligned to the end."""
    shift = where.take(mask.offset, "")
    return shift + (where.key_length - where.query_length) if mask.at_end else shift


class _AtOffset(Mask):
    """Masks of positions whose queries are moved by `offset`, and by S - T more where they are aligned to the end."""

    reads: ClassVar = "qk"

    def settled(self, query_length: Any, key_length: Any, dtype: Any = None) -> Mask:
        at_end = self.at_end  # type: ignore[attr-defined]  # a field of every one of them
        return self._around(key_length - query_length if at_end else 0)

    def moved(self, start: Array) -> Mask:
        return self._around(start)

    def _around(self, more: Any) -> Mask:
        """With the offset, and `more`, in integers that stay in their type."""
        raise NotImplementedError


class Causal(_AtOffset):
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
        _check_integers(self, "offset")

    def _around(self, more: Any) -> Causal:
        return self.replaced(offset=bounded((1, self.offset), (1, more)), at_end=False)

    def reach(self) -> tuple[int | None, int | None]:
        return None, _number(self.offset)

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
        return three(full=grid.k_max <= grid.q_min + shift, empty=grid.k_min > grid.q_max + shift)

    def __repr__(self) -> str:
        return _placed_repr("Causal", [] if _is_zero(self.offset) else [describe(self.offset)], self.at_end)


class Window(_AtOffset):
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
        given = [name for name in ("left", "right") if getattr(self, name) is not None]
        _check_integers(self, *given, least=0)
        _check_integers(self, "offset")

    def _around(self, more: Any) -> Window:
        left = None if self.left is None else bounded((1, self.left), (-1, self.offset), (-1, more))
        right = None if self.right is None else bounded((1, self.right), (1, self.offset), (1, more))
        return self.replaced(left=left, right=right, offset=0, at_end=False)

    def reach(self) -> tuple[int | None, int | None]:
        left, right, offset = map(_number, (self.left, self.right, self.offset))
        before = None if left is None or offset is None else left - offset
        return before, None if right is None or offset is None else right + offset

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
        centre = tile.q if _is_zero(self.offset) and not self.at_end else tile.q + _shift(self, tile)
        bounds = [] if self.left is None else [tile.k >= centre - tile.take(self.left, "")]
        bounds += [] if self.right is None else [tile.k <= centre + tile.take(self.right, "")]
        return _all(bounds, tile)

    def blocks(self, grid: Grid) -> Any:
        shift = _shift(self, grid)
        kinds = np.int8(2)
        if self.left is not None:
            reach = shift - grid.take(self.left, "")
            left = three(full=grid.k_min >= grid.q_max + reach, empty=grid.k_max < grid.q_min + reach)
            kinds = either(np.minimum, jnp.minimum, kinds, left)
        if self.right is not None:
            reach = shift + grid.take(self.right, "")
            right = three(full=grid.k_max <= grid.q_min + reach, empty=grid.k_min > grid.q_max + reach)
            kinds = either(np.minimum, jnp.minimum, kinds, right)
        return kinds

    def __repr__(self) -> str:
        sides = (("left", self.left), ("right", self.right))
        parts = [f"{name}={describe(side)}" for name, side in sides if side is not None]
        parts += [] if _is_zero(self.offset) else [f"offset={describe(self.offset)}"]
        return _placed_repr("Window", parts, self.at_end)


class Chunked(_AtOffset):
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
        _check_integers(self, "size", least=1)
        _check_integers(self, "offset")

    def _around(self, more: Any) -> Chunked:
        size, offset = chunk_and_offset(self.size, self.offset, more)
        return self.replaced(size=size, offset=offset, at_end=False)

    def reach(self) -> tuple[int | None, int | None]:
        size, offset = _number(self.size), _number(self.offset)
        return (None, None) if size is None or offset is None else (size - 1 - offset, size - 1 + offset)

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
    reads: ClassVar = "k"
    limits: ClassVar = {"length": "s"}
    length: Number

    def __post_init__(self) -> None:
        _check_integers(self, "length", least=0)

    def moved(self, start: Array) -> Prefix:
        return self

    def evaluate(self, tile: Tile) -> Array:
        return tile.k < tile.take(self.length, "")

    def blocks(self, grid: Grid) -> Any:
        length = grid.take(self.length, "")
        return three(full=grid.k_max < length, empty=grid.k_min >= length)


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
    always: ClassVar = ("query_ids", "key_ids")
    reads: ClassVar = ""
    query_ids: Array
    key_ids: Array | None = None

    def __post_init__(self) -> None:
        if self.key_ids is None and not is_axis(self.query_ids):
            object.__setattr__(self, "key_ids", self.query_ids)
        _take_ids(self, "query_ids", "key_ids")

    def settled(self, query_length: Any, key_length: Any, dtype: Any = None) -> Mask:
        pairs = zip(*same_as_int32(self.query_ids, self.key_ids), strict=True)
        return functools.reduce(And, (self.replaced(query_ids=query, key_ids=key) for query, key in pairs))

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
    reads: ClassVar = "qk"
    limits: ClassVar = {"key": "s", "query": "t"}
    key: Number | None = None
    query: Number | None = None

    def __post_init__(self) -> None:
        _check_integers(self, *(name for name in ("key", "query") if getattr(self, name) is not None), least=0)

    def moved(self, start: Array) -> Lengths:
        return self if self.query is None else self.replaced(query=bounded((1, self.query), (-1, start)))

    def evaluate(self, tile: Tile) -> Array:
        bounds = [] if self.key is None else [tile.k < tile.take(self.key, "")]
        bounds += [] if self.query is None else [tile.q < tile.take(self.query, "")]
        return _all(bounds, tile)

    def blocks(self, grid: Grid) -> Any:
        kinds = np.int8(2)
        for length, low, high in ((self.key, grid.k_min, grid.k_max), (self.query, grid.q_min, grid.q_max)):
            if length is not None:
                length = grid.take(length, "")
                kinds = either(np.minimum, jnp.minimum, kinds, three(full=high < length, empty=low >= length))
        return kinds


class Dilated(_AtOffset):
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
        _check_integers(self, "stride", least=1)
        _check_integers(self, "offset")

    def _around(self, more: Any) -> Dilated:
        stride, offset = stride_and_offset("Dilated", self.stride, self.offset, more)
        return self.replaced(stride=stride, offset=offset, at_end=False)

    def evaluate(self, tile: Tile) -> Array:
        stride = tile.take(self.stride, "")
        return (tile.q + _shift(self, tile)) % stride == tile.k % stride

    def blocks(self, grid: Grid) -> Any:
        return np.int8(2) if isinstance(self.stride, int) and self.stride == 1 else np.int8(1)


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

    @property
    def reads(self) -> str:  # type: ignore[override]  # of each function, not of the class
        return "".join(index for index, used in zip("bhqk", self.predicate.uses, strict=True) if used)

    def __post_init__(self) -> None:
        if not isinstance(self.predicate, IndexFunction):  # which it is in dataclasses.replace
            function, constants = trace(self.predicate, score=False, name="Where")
            object.__setattr__(self, "_function", self.predicate)  # to be pickled; no part of the pytree
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
    always: ClassVar = ("order", "key_order")
    reads: ClassVar = ""
    order: Array
    strict: bool = False
    key_order: Array | None = None

    def __post_init__(self) -> None:
        _take_ids(self, "order")
        object.__setattr__(self, "key_order", self.order)

    def settled(self, query_length: Any, key_length: Any, dtype: Any = None) -> Mask:
        words = list(zip(*same_as_int32(self.order, self.key_order), strict=True))
        (query, key), *upper = reversed(words)
        made: Mask = self.replaced(order=query, key_order=key)
        for query, key in upper:  # what is above decides, and where it is equal what is below
            made = And(Segments(query, key), made)
            made = Or(self.replaced(order=query, key_order=key, strict=True), made)
        return made

    def evaluate(self, tile: Tile) -> Array:
        query, key = tile.take(self.order, "t"), tile.take(self.key_order, "s")
        return key < query if self.strict else key <= query

    def blocks(self, grid: Grid) -> Any:
        (q_low, q_high), (k_low, k_high) = grid.ends(self.order, "t"), grid.ends(self.key_order, "s")
        if self.strict:
            return three(full=k_high < q_low, empty=k_low >= q_high)
        return three(full=k_high <= q_low, empty=k_low > q_high)

    def __repr__(self) -> str:
        return f"Permutation({describe(self.order)}{', strict=True' if self.strict else ''})"


def _all(bounds: list[Any], tile: Tile) -> Any:
    """All of the bounds hold; true where there are none."""
    return functools.reduce(operator.and_, bounds) if bounds else tile.k == tile.k


def _three_ranges(q_low: Any, q_high: Any, k_low: Any, k_high: Any) -> Any:
    """The three values of "equal", for values that lie in known ranges."""
    full = (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    return three(full=full, empty=(q_high < k_low) | (k_high < q_low))


def _check_integers(mask: Mask, *names: str, least: int | None = None) -> None:
    """Checks fields that are integers, or arrays of them. Known ones become int32, which no transformation cuts."""
    for name in names:
        value = check_integer(type(mask).__name__, name, getattr(mask, name), least=least)
        object.__setattr__(mask, name, value)


def _take_ids(mask: Mask, *names: str) -> None:
    """Checks fields that are arrays of ids. Known ones become int32 that are equal, and in order, where they were."""
    values = [getattr(mask, name) for name in names]
    if any(map(is_axis, values)):
        return
    values = check_integers(type(mask).__name__, names, values)
    for name, value in zip(names, values, strict=True):
        object.__setattr__(mask, name, value)


def _number(value: Any) -> int | None:
    """The integer, where it is one that is known; `None`: not, or there is none."""
    return number_of(value) if isinstance(value, (int, np.ndarray, np.generic)) else None  # type: ignore[return-value]


def _is_zero(value: Any) -> bool:
    return isinstance(value, int) and value == 0


def _placed_repr(name: str, parts: list[str], at_end: bool) -> str:
    return f"{name}{'.aligned_end' if at_end else ''}({', '.join(parts)})"
