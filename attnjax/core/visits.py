"""`Visits`: a block map as lists, for kernels whose program has one row of blocks: which blocks it visits. No loops.

`Lists` and `Kinds` are what a kernel loads of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.program import Problem
from attnjax.core.split import entry_of

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Visits:
    """For each block of queries the blocks of keys that it visits, the partial ones first; or the other way round.

    Attributes:
      counts: int32 `[entries, N or 1, rows, 2]`: how many are partial, and how many are visited in all.
      blocks: int32 `[entries, N or 1, rows, columns]`: their numbers, in ascending order within each kind; what stands
        behind them repeats the last of them, so that it may be loaded and is not loaded twice.
      lanes: how many entries of each batch axis there are, all or 1; `entries` is their product.
    """

    counts: Any
    blocks: Any
    lanes: tuple[int, ...]

    def entry(self, batch: tuple[int, ...], b: Any) -> Any:
        """Which entry belongs to the batch entry `b` (row-major over all batch axes)."""
        return entry_of(self.lanes, batch, b)

    def head(self, h: Any) -> Any:
        """Which of its heads belongs to the query head (or, of lists of groups, to the group) `h`."""
        return h if self.counts.shape[1] > 1 else 0

    @property
    def longest(self) -> int:
        """The length of the longest list, where it is known; else of the longest there may be."""
        known = isinstance(self.counts, np.ndarray)
        return int(self.counts[..., 1].max(initial=0)) if known else self.blocks.shape[-1]


def visits(
    problem: Problem, operands: list[Any], block_q: int, block_k: int, *, by_key: bool = False, group: int = 1
) -> Visits:
    """The lists for these block sizes; numpy where the mask is known.

    Args:
      by_key: for each block of keys the blocks of queries, instead.
      group: so many neighbouring heads share one list, with all that any of them visits.
    """
    kinds = block_kinds(problem, operands, block_q, block_k)
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    if group > 1 and kinds.shape[-3] > 1:
        apart = kinds.reshape(*kinds.shape[:-3], -1, group, *kinds.shape[-2:])
        least, most = apart.min(-3), apart.max(-3)
        kinds = xp.where(least == most, least, np.int8(1))
    kinds = xp.swapaxes(kinds, -1, -2) if by_key else kinds
    lanes, (heads, rows, columns) = kinds.shape[:-3], kinds.shape[-3:]
    kinds = kinds.reshape(math.prod(lanes), heads, rows, columns)
    rank = np.array([2, 0, 1], np.int8)  # empty last, then partial, then full
    ranks = rank[kinds] if xp is np else jnp.asarray(rank)[kinds]
    order = xp.argsort(ranks, axis=-1, stable=True).astype(np.int32)
    partial, visited = (kinds == 1).sum(-1), (kinds > 0).sum(-1)
    every = np.arange(columns).reshape((1,) * visited.ndim + (columns,))
    place = xp.minimum(every, xp.maximum(visited[..., None] - 1, 0))
    blocks = xp.take_along_axis(order, place, axis=-1) if columns else order
    counts = xp.stack([partial, visited], -1).astype(np.int32)
    return Visits(counts, blocks.astype(np.int32), tuple(lanes))


def block_kinds(problem: Problem, operands: list[Any], block_q: int, block_k: int) -> Any:
    """The block map, int8 `[*lanes, N or 1, query blocks, key blocks]`; a block that reaches beyond the end is partial.

    A map that the user gave is cut finer, where these blocks are parts of its own.
    """
    sizes = problem.sizes
    kinds = problem.kinds(operands, block_q, block_k)
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    rows, columns = -(-sizes.query_length // block_q), -(-sizes.key_length // block_k)
    if problem.blocks is not None and problem.blocks != (block_q, block_k):
        given_q, given_k = problem.blocks
        kinds = xp.take(kinds, np.arange(rows) * block_q // given_q, axis=-2)
        kinds = xp.take(kinds, np.arange(columns) * block_k // given_k, axis=-1)
    whole_q = np.arange(rows) < sizes.query_length // block_q
    whole_k = np.arange(columns) < sizes.key_length // block_k
    most = np.where(whole_q[:, None] & whole_k, 2, 1).astype(np.int8)
    return xp.minimum(kinds, most.reshape((1,) * (kinds.ndim - 2) + most.shape))


class Lists:
    """Visits in the form that a kernel loads.

    Lists that are known and name neighbouring blocks are kept as the first of them. Where moreover all rows have the
    same list there is nothing to load.

    Attributes:
      rows: how many lists there are for a head.
      given: the arrays to load from, by name.
      has_partial, has_full: whether any list may have blocks of the kind.
    """

    def __init__(self, found: Visits, batch: tuple[int, ...]):
        self._found, self._batch = found, batch
        counts, blocks = found.counts, found.blocks
        self.rows = counts.shape[2]
        self.has_partial = self.has_full = True
        self._runs: Any = None
        if isinstance(counts, np.ndarray):
            self.has_partial = bool(counts[..., 0].any())
            self.has_full = bool((counts[..., 1] > counts[..., 0]).any())
            self._runs = _runs(counts, blocks)
        if self._runs is None:
            self.given = {"counts": jnp.asarray(counts), "blocks": jnp.asarray(blocks)}
        else:
            same = (self._runs == self._runs[:1, :1, :1]).all()
            self.given = {} if same else {"counts": jnp.asarray(self._runs)}

    def of(self, refs: dict[str, Any], b: Any, h: Any, row: Any) -> tuple[Any, Any, Callable[[Any, bool], Any]]:
        """The list of a row of blocks: how many are partial, how many there are, and a function that gives them.

        The function takes the place in the list, and whether it is among the partial ones.
        """
        at = (self._found.entry(self._batch, b), self._found.head(h), row)
        if self._runs is None:
            partial, visited = (refs["counts"][*at, i] for i in range(2))
            return partial, visited, lambda place, _: refs["blocks"][*at, place]
        if self.given:
            partial, visited, first, first_full = (refs["counts"][*at, i] for i in range(4))
        else:
            partial, visited, first, first_full = (np.int32(x) for x in self._runs[0, 0, 0])
        return partial, visited, lambda place, masked: place + (first if masked else first_full - partial)


class Kinds:
    """A block map in the form that a kernel loads, whose programs own blocks of pairs; `kinds` is None for no mask."""

    def __init__(self, kinds: Any, batch: tuple[int, ...]):
        self._batch = batch
        self.given: dict[str, Any] = {}
        if kinds is not None:
            self._lanes, shape = tuple(kinds.shape[:-3]), kinds.shape[-3:]
            self._heads = shape[0] > 1
            self.given = {"kinds": jnp.asarray(kinds.reshape(-1, *shape))}

    def visited(self, refs: dict[str, Any], b: Any, h: Any, i: Any, j: Any) -> Any:
        """Whether any pair of the block is seen; True where that is known."""
        if not self.given:
            return True
        return refs["kinds"][entry_of(self._lanes, self._batch, b), h if self._heads else 0, i, j] > 0


def _runs(counts: np.ndarray, blocks: np.ndarray) -> np.ndarray | None:
    """[..., partial, visited, the first partial, the first full] where both kinds are neighbours in all lists."""
    place = np.arange(blocks.shape[-1])
    partial, visited = counts[..., :1], counts[..., 1:]
    first = blocks[..., :1]
    first_full = np.take_along_axis(blocks, np.minimum(partial, blocks.shape[-1] - 1), -1)
    run = np.where(place < partial, first + place, first_full + place - partial)
    if (run != blocks)[place < visited].any():
        return None
    return np.concatenate([counts, first, first_full], -1).astype(np.int32)
