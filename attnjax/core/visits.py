"""`Visits`: a block map as lists, for kernels whose program has one row of blocks: which blocks it visits. No loops."""

from __future__ import annotations

import dataclasses
import math
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
        """Which of its heads belongs to the query head `h`."""
        return h if self.counts.shape[1] > 1 else 0

    @property
    def longest(self) -> int:
        """The length of the longest list, where it is known; else of the longest there may be."""
        known = isinstance(self.counts, np.ndarray)
        return int(self.counts[..., 1].max(initial=0)) if known else self.blocks.shape[-1]


def visits(problem: Problem, operands: list[Any], block_q: int, block_k: int, *, by_key: bool = False) -> Visits:
    """The lists for these block sizes; numpy where the mask is known.

    Args:
      by_key: for each block of keys the blocks of queries, instead.
    """
    sizes = problem.sizes
    kinds = problem.kinds(operands, block_q, block_k)
    xp: Any = np if isinstance(kinds, np.ndarray) else jnp
    # Blocks that reach beyond the end are partial: what is beyond must not be seen.
    whole_q = np.arange(kinds.shape[-2]) < sizes.query_length // block_q
    whole_k = np.arange(kinds.shape[-1]) < sizes.key_length // block_k
    kinds = xp.minimum(kinds, np.where(whole_q[:, None] & whole_k, 2, 1).astype(np.int8))
    kinds = xp.swapaxes(kinds, -1, -2) if by_key else kinds
    lanes, (heads, rows, columns) = kinds.shape[:-3], kinds.shape[-3:]
    kinds = kinds.reshape(math.prod(lanes), heads, rows, columns)
    rank = np.array([2, 0, 1], np.int8)  # empty last, then partial, then full
    ranks = rank[kinds] if xp is np else jnp.asarray(rank)[kinds]
    order = xp.argsort(ranks, axis=-1, stable=True).astype(np.int32)
    partial, visited = (kinds == 1).sum(-1), (kinds > 0).sum(-1)
    place = xp.minimum(np.arange(columns), xp.maximum(visited[..., None] - 1, 0))
    blocks = xp.take_along_axis(order, place, axis=-1) if columns else order
    counts = xp.stack([partial, visited], -1).astype(np.int32)
    return Visits(counts, blocks.astype(np.int32), tuple(lanes))
