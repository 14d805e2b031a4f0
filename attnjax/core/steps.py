"""`Steps`: a block map as one list of tiles, a number each, for kernels that walk it step by step. No loops here.

Rows of blocks stand one after the other in the list, each with the blocks that it visits, so that no step is spent on
the ends of lists that are shorter than others. A number is

    query block << 18 | key block << 4 | last of its row << 3 | first of its row << 2 | 0 empty, 1 partial, 2 full
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.program import Problem
from attnjax.core.split import entry_of
from attnjax.core.visits import block_kinds

Array = jax.Array

EMPTY, PARTIAL, FULL = range(3)  # kinds of tiles
MOST_BLOCKS = 2**13  # of queries, or keys: what a number has room for


class Step(NamedTuple):
    """A number, taken apart; whether it is the `first` or `last` of its row is not 0."""

    query: Any
    key: Any
    first: Any
    last: Any
    kind: Any


def step_of(number: Any) -> Step:
    """The parts of a number, or of an array of them."""
    return Step(number >> 18, (number >> 4) & 0x3FFF, number & 4, number & 8, number & 3)


@dataclasses.dataclass(frozen=True)
class Steps:
    """For each batch entry and head the tiles that are visited, and one of each row that visits none.

    Attributes:
      numbers: int32 `[entries, N or 1, steps]`, numpy where they are known; shorter lists end with empty tiles.
      lanes: how many entries of each batch axis there are, all or 1; `entries` is their product.
    """

    numbers: Any
    lanes: tuple[int, ...]

    def place(self, batch: tuple[int, ...], b: Any, h: Any) -> Any:
        """Where, among all numbers in a row, the list of the batch entry `b` and the query head `h` begins."""
        heads, count = self.numbers.shape[1:]
        return (entry_of(self.lanes, batch, b) * heads + (h if heads > 1 else 0)) * count


def steps(
    problem: Problem, operands: list[Any], block_q: int, block_k: int, *, by_key: bool = False, every: bool = False
) -> Steps:
    """The list for these block sizes; rows are those of queries.

    Args:
      by_key: rows are those of keys, and the heads of a group have the same tiles, empty ones among them.
      every: empty tiles are in the list too.
    """
    kinds = block_kinds(problem, operands, block_q, block_k)
    lanes, (heads, *grid) = tuple(kinds.shape[:-3]), kinds.shape[-3:]
    kinds = kinds.reshape(math.prod(lanes), heads, *grid)
    together = kinds
    if by_key:
        group = problem.sizes.group if heads > 1 else 1
        most = kinds.reshape(len(kinds), heads // group, group, *grid).max(2)
        kinds, together = kinds.swapaxes(-1, -2), most.repeat(group, axis=1).swapaxes(-1, -2)
    listed = _known if isinstance(kinds, np.ndarray) else _traced
    return Steps(listed(kinds, (together > 0) | every, by_key), lanes)


def _number(row: Any, column: Any, first: Any, last: Any, kind: Any, by_key: bool) -> Any:
    query, key = (column, row) if by_key else (row, column)
    flags = first.astype(np.int32) * 4 + last.astype(np.int32) * 8 + kind.astype(np.int32)
    return (query << 18) + (key << 4) + flags


def _known(kinds: np.ndarray, visited: np.ndarray, by_key: bool) -> np.ndarray:
    """The numbers, in numpy: `kinds` and whether they are visited, [entries, heads, rows, columns]."""
    visited = visited.copy()
    visited[..., 0] |= ~visited.any(-1)
    first = visited & (visited.cumsum(-1) == 1)
    last = visited & (visited[..., ::-1].cumsum(-1)[..., ::-1] == 1)
    rows, columns = (np.arange(n, dtype=np.int32) for n in kinds.shape[-2:])
    numbers = _number(rows[:, None], columns, first, last, kinds, by_key)
    lists = [[one[seen] for one, seen in zip(*pair, strict=True)] for pair in zip(numbers, visited, strict=True)]
    longest = max((len(one) for each in lists for one in each), default=0)
    # What is added stays at the last tile, so that nothing is loaded, begun or ended.
    fill = lambda one: np.concatenate([one, np.full(longest - len(one), one[-1:] & ~15, np.int32)])
    return np.array([[fill(one) for one in each] for each in lists], np.int32).reshape(*kinds.shape[:2], longest)


def _traced(kinds: Any, visited: Any, by_key: bool) -> Array:
    """The numbers, where it is not known how many are visited: rows of all columns, the empty ones last."""
    columns = kinds.shape[-1]
    order = jnp.argsort(~visited, axis=-1, stable=True).astype(np.int32)
    counts = visited.sum(-1, keepdims=True, dtype=np.int32)
    row = lambda n, *last: np.arange(n, dtype=np.int32).reshape((1,) * (kinds.ndim - 1 - len(last)) + (n, *last))
    place = row(columns)
    order = jnp.take_along_axis(order, jnp.minimum(place, jnp.maximum(counts - 1, 0)), axis=-1)
    kinds = jnp.where(place < counts, jnp.take_along_axis(kinds, order, axis=-1), np.int8(0))
    numbers = _number(row(kinds.shape[-2], 1), order, place == 0, place == columns - 1, kinds, by_key)
    return numbers.reshape(*kinds.shape[:2], -1)
