"""`BlockMap`: which key blocks each query block visits, built once and reused over layers. Holds no kernel code."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.checks import check_count, check_leaves, check_static_lengths
from attnjax.core.tiles import Grid, Sizes, operand_form, with_leaves
from attnjax.masks import as_mask

Array = jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockMap:
    """The blocks of a mask in three values: 0 empty, 1 partial, 2 full.

    Attributes:
      kinds: int8 `[*B or 1, N or 1, query blocks, key blocks]`.
      query_length, key_length: T and S.
      block_q, block_k: the size of a block.

    Example:
      >>> from attnjax import BlockMap, Causal
      >>> BlockMap.build(Causal(), 4, 4, block_q=2, block_k=2).kinds.tolist()
      [[[1, 0], [2, 1]]]
    """

    kinds: Array
    query_length: int = dataclasses.field(metadata=dict(static=True))
    key_length: int = dataclasses.field(metadata=dict(static=True))
    block_q: int = dataclasses.field(metadata=dict(static=True))
    block_k: int = dataclasses.field(metadata=dict(static=True))

    @classmethod
    def build(
        cls,
        mask: Any,
        query_length: int,
        key_length: int,
        *,
        batch: tuple[int, ...] = (),
        heads: int = 1,
        block_q: int = 512,
        block_k: int = 512,
    ) -> BlockMap:
        """Classifies the blocks of a mask, in time and memory O(blocks).

        A `Where(predicate, scan=True)` in it is looked at pair by pair, a block at a time.

        Args:
          mask: a Mask.
          query_length, key_length: T and S.
          batch: the batch axes, when arrays of the mask have them or its functions read b.
          heads: N, when arrays of the mask have heads or its functions read h.
          block_q, block_k: size of a block; the call that uses the map takes these.
        """
        check_count("BlockMap: block_q", block_q)
        check_count("BlockMap: block_k", block_k)
        check_count("BlockMap: query_length", query_length, least=0)
        check_count("BlockMap: key_length", key_length, least=0)
        mask = as_mask(mask)
        check_leaves(mask, "mask", tuple(batch), {"t": query_length, "s": key_length, "h": heads})
        check_static_lengths(mask, "mask", query_length, key_length)
        block_q, block_k = min(block_q, max(query_length, 1)), min(block_k, max(key_length, 1))
        sizes = Sizes(tuple(batch), 0, query_length, key_length, heads, heads)
        leaves = [operand_form(leaf, axes, len(sizes.batch)) for _, leaf, axes in mask.operands()]
        kinds = Grid(sizes, block_q, block_k).kinds(with_leaves(mask, leaves))
        return cls(jnp.asarray(kinds), query_length, key_length, block_q, block_k)

    def counts(self) -> dict[str, int]:
        """How many blocks are empty, partial and full, over all batch entries and heads that differ."""
        kinds = np.asarray(self.kinds)
        return {name: int((kinds == kind).sum()) for kind, name in enumerate(("empty", "partial", "full"))}
