"""`BlockMap`: which key blocks each query block visits, built once and reused over layers. Holds no kernel code."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from attnjax.core.checks import check_count, check_leaves, check_static_lengths
from attnjax.core.node import describe, is_array
from attnjax.core.tiles import Grid, Sizes, operand_form
from attnjax.masks import Mask, Where, as_mask

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class BlockMap:
    """The blocks of a mask in three values: 0 empty, 1 partial, 2 full.

    One that `build` made goes with the mask it was built from, whose arrays may be traced but must have the values they
    had. One that was made by hand, or is given with another mask, says more than the mask does: empty blocks are never
    seen, full ones are seen whole, and in partial ones the mask decides.

    Attributes:
      kinds: integers `[*B or 1, N or 1, query blocks, key blocks]`, kept as int8.
      query_length, key_length: T and S.
      block_q, block_k: the size of a block.

    Raises:
      TypeError, ValueError: kinds of another shape or type, or known ones that are not 0, 1 or 2.

    Example:
      >>> from attnjax import BlockMap, Causal
      >>> BlockMap.build(Causal(), 4, 4, block_q=2, block_k=2).kinds.tolist()
      [[[1, 0], [2, 1]]]
    """

    kinds: Array
    query_length: int
    key_length: int
    block_q: int
    block_k: int
    built_from: Any = dataclasses.field(default=None, init=False, repr=False)  # the structure of the mask

    def __post_init__(self) -> None:
        for name, least in (("query_length", 0), ("key_length", 0), ("block_q", 1), ("block_k", 1)):
            object.__setattr__(self, name, check_count(f"BlockMap: {name}", getattr(self, name), least))
        kinds = np.asarray(self.kinds) if isinstance(self.kinds, (list, tuple)) else self.kinds
        if not is_array(kinds) or not jnp.issubdtype(kinds.dtype, jnp.integer):
            raise TypeError(f"BlockMap: kinds must be an array of integers 0, 1 and 2, got {describe(kinds)}.")
        grid = -(-self.query_length // self.block_q), -(-self.key_length // self.block_k)
        if kinds.ndim < 3 or tuple(kinds.shape[-2:]) != grid:
            raise ValueError(
                f"BlockMap: kinds must be [*B or 1, N or 1, {grid[0]}, {grid[1]}] for T = {self.query_length}, S = "
                f"{self.key_length} and blocks of {self.block_q} x {self.block_k}, got {describe(kinds)}."
            )
        if not isinstance(kinds, (Tracer, jax.ShapeDtypeStruct)):
            known = np.asarray(kinds)
            if known.size and not 0 <= known.min() <= known.max() <= 2:
                raise ValueError(f"BlockMap: kinds must be 0, 1 or 2, got {known.min()} to {known.max()}.")
            kinds = jnp.asarray(kinds).astype(jnp.int8)
        object.__setattr__(self, "kinds", kinds)
        object.__setattr__(self, "built_from", jax.tree.structure(None))  # of none

    def effective(self, mask: Mask, batch: tuple[int, ...], heads: int) -> Mask:
        """The mask that is computed when a call has this map and `mask`.

        Raises:
          ValueError: the map was built without batch entries or heads, which functions of the mask tell apart.
        """
        if self.built_from != jax.tree.structure(mask):
            return self._seen(batch, 2) | (self._seen(batch, 1) & mask)
        scanned = [part for part in mask.nodes() if isinstance(part, Where) and part.scan]
        own = (
            (math.prod(self.kinds.shape[:-3]), math.prod(batch), "b", "batch"),
            (self.kinds.shape[-3], heads, "h", "heads"),
        )
        for have, want, index, argument in own:
            if have == 1 < want and any(index in part.reads for part in scanned):
                raise ValueError(
                    f"block_map was built without {argument}, and a function in the mask reads {index}: build it with "
                    f"{argument}={list(batch) if index == 'b' else heads}."
                )
        return mask

    def _seen(self, batch: tuple[int, ...], least: int) -> Where:
        """The pairs in blocks of at least this kind."""
        kinds, (block_q, block_k) = self.kinds, (self.block_q, self.block_k)
        if math.prod(kinds.shape[:-3]) > 1:
            kinds = jnp.broadcast_to(kinds, (*batch, *kinds.shape[-3:]))
        kinds = kinds.reshape(-1, *kinds.shape[-3:])
        entries, heads = (size > 1 for size in kinds.shape[:2])
        at = lambda b, h, q, k: (b if entries else 0, h if heads else 0, q // block_q, k // block_k)
        return Where(lambda b, h, q, k: kinds[at(b, h, q, k)] >= least)

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
        block_q, block_k = check_count("BlockMap: block_q", block_q), check_count("BlockMap: block_k", block_k)
        query_length = check_count("BlockMap: query_length", query_length, least=0)
        key_length = check_count("BlockMap: key_length", key_length, least=0)
        heads = check_count("BlockMap: heads", heads)
        mask = as_mask(mask)
        structure = jax.tree.structure(mask)
        check_leaves(mask, "mask", tuple(batch), {"t": query_length, "s": key_length, "h": heads})
        check_static_lengths(mask, "mask", query_length, key_length)
        block_q, block_k = min(block_q, max(query_length, 1)), min(block_k, max(key_length, 1))
        sizes = Sizes(tuple(batch), 0, query_length, key_length, heads, heads)
        mask = mask.settled(query_length, key_length)
        leaves = [operand_form(leaf, axes, len(sizes.batch)) for _, leaf, axes in mask.operands()]
        known = all(isinstance(leaf, (np.ndarray, np.generic)) for leaf in leaves)
        found = (_kinds if known else _traced_kinds)(jax.tree.structure(mask), sizes, (block_q, block_k), leaves)
        return _made(jax.device_put(found), (query_length, key_length, block_q, block_k, structure))

    def counts(self) -> dict[str, int]:
        """How many blocks are empty, partial and full, over all batch entries and heads that differ."""
        kinds = np.asarray(self.kinds)
        return {name: int((kinds == kind).sum()) for kind, name in enumerate(("empty", "partial", "full"))}


def _made(kinds: Any, static: tuple[Any, ...]) -> BlockMap:
    """A map without checks: while a tree is rebuilt, any object may stand in the place of kinds."""
    block_map = object.__new__(BlockMap)
    names = (field.name for field in dataclasses.fields(BlockMap))
    block_map.__dict__.update(zip(names, (kinds, *static), strict=True))
    return block_map


jax.tree_util.register_pytree_with_keys(
    BlockMap,
    lambda m: (
        ((jax.tree_util.GetAttrKey("kinds"), m.kinds),),
        (m.query_length, m.key_length, m.block_q, m.block_k, m.built_from),
    ),
    lambda static, children: _made(next(iter(children)), static),
)


def _kinds(structure: Any, sizes: Sizes, blocks: tuple[int, int], leaves: list[Any]) -> Any:
    """The blocks of the mask with these leaves; numpy where all of them are known."""
    return Grid(sizes, *blocks).kinds(jax.tree.unflatten(structure, leaves))


_traced_kinds = jax.jit(_kinds, static_argnums=(0, 1, 2))
