"""`Program` and `Problem`: an attention call, split into what is static and its list of operands. Computes nothing big.

The operands are, in this order: query, key, value, [sinks], [dropout's seeds by head], mask leaves, score leaves,
[block map]. All are in operand form (see `core.tiles`) with all batch axes present.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.dropout import keep
from attnjax.core.operations import HARMLESS
from attnjax.core.tiles import Grid, Sizes, Tile

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Program:
    """The meaning of a call: scale, scores, mask, sinks and dropout, without any array."""

    scale: float
    scores: tuple[Any, ...]  # tree structures
    mask: tuple[Any, ...]  # a tree structure, or nothing
    sinks: bool
    dropout: float  # rate; 0 for none
    axes: tuple[str, ...]  # of every operand
    has_map: bool

    @property
    def _leaves_start(self) -> int:
        return 3 + self.sinks + bool(self.dropout)

    @property
    def _scores_start(self) -> int:
        return self._leaves_start + sum(structure.num_leaves for structure in self.mask)

    @property
    def count(self) -> int:
        """Number of operands."""
        return len(self.axes)

    def mask_of(self, operands: list[Any]) -> Any:
        """The mask with these operands as leaves, or `None`."""
        if not self.mask:
            return None
        return jax.tree.unflatten(self.mask[0], operands[self._leaves_start : self._scores_start])

    def score_positions(self) -> tuple[int, ...]:
        """Where the operands of the scores stand."""
        return tuple(range(self._scores_start, self.count - self.has_map))

    def map_positions(self) -> tuple[int, ...]:
        """Where the operands stand that decide which blocks are visited."""
        return (self.count - 1,) if self.has_map else tuple(range(self._leaves_start, self._scores_start))

    def name_of(self, position: int) -> str:
        """What the operand at this position is called: "query", "ALiBi.slopes"; "Where.constants[0]" was captured."""
        names = dict(enumerate(("query", "key", "value", *(("sinks",) if self.sinks else ()))))
        leaves = iter(range(self._leaves_start, self.count - self.has_map))
        for structure in (*self.mask, *self.scores):
            node = jax.tree.unflatten(structure, [np.zeros(()) for _ in range(structure.num_leaves)])
            names |= {next(leaves): name for name, _, _ in node.operands()}
        return names.get(position, f"operand {position}")

    def reads_index(self) -> tuple[bool, bool]:
        """Whether anything but arrays tells batch entries apart, and heads: a rule that reads indices."""
        read = [False, False]
        for structure in (*self.mask, *self.scores):
            node = jax.tree.unflatten(structure, [np.zeros(()) for _ in range(structure.num_leaves)])
            for part in node.nodes():
                read = [known or index in part.reads for known, index in zip(read, "bh", strict=True)]
        return read[0], read[1]

    def holds_code(self) -> bool:
        """Whether users wrote some of its rules: a function of indices, or a class of mask or score."""
        for structure in (*self.mask, *self.scores):
            node = jax.tree.unflatten(structure, [np.zeros(()) for _ in range(structure.num_leaves)])
            homes = {type(part).__module__.partition(".")[0] for part in node.nodes()}
            if homes != {"attnjax"} or any(node.functions()):
                return True
        return False

    def sinks_of(self, operands: list[Any]) -> Array | None:
        """The sinks, [*batch, N], or `None`."""
        return operands[3] if self.sinks else None

    def map_of(self, operands: list[Any]) -> Array | None:
        """The block map a user passed, or `None`."""
        return operands[self.count - 1] if self.has_map else None

    def modify(self, logits: Array, tile: Any, leaves: list[Any]) -> Array:
        """Applies the scores in their order; `leaves` are the score operands in tile form."""
        position = 0
        for n, structure in enumerate(self.scores):
            node = jax.tree.unflatten(structure, leaves[position : position + structure.num_leaves])
            if n and tile.counted is not None:
                logits = jnp.where(tile.counted, logits, HARMLESS)
            position += structure.num_leaves
            logits = node.evaluate(logits, tile)
        return logits

    def hides(self, dtype: Any) -> bool:
        """Whether a score may make -inf of logits that another has a derivative by: those pairs do not count then.

        Args:
          dtype: of the logits.
        """
        infinite = multiplied = False
        for structure in self.scores:
            node = jax.tree.unflatten(structure, [np.zeros(()) for _ in range(structure.num_leaves)])
            infinite, more = node.infinities(infinite, np.dtype(dtype).name)
            multiplied |= more
        return multiplied

    def visible(self, tile: Tile, operands: list[Any]) -> Array | None:
        """The mask on a tile, or `None` where there is none; operands in tile form."""
        mask = self.mask_of(operands)
        return None if mask is None else mask.evaluate(tile)

    def drop(self, weights: Array, tile: Tile, operands: list[Any]) -> Array:
        """Applies dropout to softmax weights (or to anything that is multiplied like them)."""
        if not self.dropout:
            return weights
        kept = keep(operands[3 + self.sinks], tile.q, tile.k, self.dropout)
        return jnp.where(kept, weights / (1 - self.dropout), 0)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A call with its sizes and types: everything about it that is static."""

    program: Program
    sizes: Sizes
    dtype: str
    head_size: int
    value_size: int
    differentiable: tuple[int, ...]  # positions of operands that have gradients
    implementation: str | None
    config: Any | None  # frozen, hashable; belongs to the implementation
    blocks: tuple[int, int] | None  # block sizes of the map a user passed
    returns_lse: bool  # where not, the log-sum-exp has no cotangent

    @property
    def accumulate(self) -> Any:
        """float64 for float64 problems, float32 for all others."""
        return jnp.dtype("float64" if self.dtype == "float64" else "float32")

    @property
    def pairs(self) -> int:
        """Pairs of query and key, over all batch entries; with none there is nothing to compute."""
        return math.prod((*self.sizes.batch, self.sizes.query_length, self.sizes.key_length))

    def wide(self, x: Any) -> Any:
        """Floats of at least the accumulator's type, so that sums over them, and of their gradients, are of that."""
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < self.accumulate.itemsize
        return x.astype(self.accumulate) if narrow else x

    def with_batch(self, size: int) -> Problem:
        """The problem with one more mapped batch axis in front."""
        sizes = dataclasses.replace(self.sizes, batch=(size, *self.sizes.batch), mapped=self.sizes.mapped + 1)
        return dataclasses.replace(self, sizes=sizes)

    def out_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of the output and the log-sum-exp."""
        rows = (*self.sizes.batch, self.sizes.query_length, self.sizes.heads)
        return (*rows, self.value_size), rows

    def kinds(self, operands: list[Any], block_q: int, block_k: int) -> Any:
        """The block map, int8 [*batch or 1, heads or 1, query blocks, key blocks]; numpy where it is known."""
        given = self.program.map_of(operands)
        if given is not None:
            return given
        return Grid(self.sizes, block_q, block_k).kinds(self.program.mask_of(operands))
