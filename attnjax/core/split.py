"""An attention's mask and scores as kernels on tiles can run them: small arrays made outside, elementwise rules inside.

A Pallas kernel cannot slice, gather or capture arrays while it computes a tile. So the mask and the scores are run
once on a `_Recorder`, which writes down every array they ask for as a `Piece`: a leaf as it is, a function of distance
as a vector over all distances, and of a `Where` or `ScoreFn` what depends on the query, or on the key, alone. Kernels
load the pieces of a tile and run the same rules again on a `PairTile`, which hands the pieces out in the same order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.functions import IndexFunction
from attnjax.core.node import is_array
from attnjax.core.program import Problem
from attnjax.core.residual import NotSplittable, Residual, opposite
from attnjax.core.tiles import tile_form

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is known about an array that a kernel loads a part of for each tile.

    The array itself is `[entries, N or 1, T or 1, S or 1]`; one by distance is `[entries, N or 1, 1, T + S - 1]`, and
    key k stands k - q + T - 1 from query q.

    Attributes:
      lanes: how many entries of each batch axis it has, all or 1; `entries` is their product.
      heads, queries, keys: whether it has that axis.
      by_distance: whether its last axis counts distances.
      dtype: its type; booleans are bool.
      sources: positions of the operands that it is made of and that may have gradients.
    """

    lanes: tuple[int, ...]
    heads: bool
    queries: bool
    keys: bool
    by_distance: bool
    dtype: str
    sources: tuple[int, ...] = ()

    def entry(self, batch: tuple[int, ...], b: Any) -> Any:
        """Which of its entries belongs to the batch entry `b` (row-major over all batch axes)."""
        return entry_of(self.lanes, batch, b)


def entry_of(lanes: tuple[int, ...], batch: tuple[int, ...], b: Any) -> Any:
    """The row-major number, in an array with these lanes (all of a batch axis, or 1), of the batch entry `b`."""
    if lanes == batch:
        return b
    index, after, own_after = 0, 1, 1
    for own, size in zip(reversed(lanes), reversed(batch), strict=True):
        if own > 1:
            index = index + (b // after) % size * own_after
        after, own_after = after * size, own_after * own
    return index


def member_of(lanes: tuple[int, ...], batch: tuple[int, ...], entry: Any, number: Any) -> Any:
    """The batch entry that is the `number`-th of those which `entry_of` gives this `entry`."""
    b, stride = np.int32(0), 1
    for own, size in zip(reversed(lanes), reversed(batch), strict=True):
        if own > 1:
            b, entry = b + entry % np.int32(size) * np.int32(stride), entry // np.int32(size)
        elif size > 1:
            b, number = b + number % np.int32(size) * np.int32(stride), number // np.int32(size)
        stride *= size
    return b


def widened(operands: list[Any], shapes: dict[int, tuple[int, ...]], batch_ndim: int) -> list[Any]:
    """The operands with those batch axes that their gradients are wanted for (`shapes`, by position)."""
    wide = lambda x, shape: jnp.broadcast_to(x, (*shape[:batch_ndim], *x.shape[batch_ndim:]))
    return [wide(x, shapes[i]) if i in shapes else x for i, x in enumerate(operands)]


class Split:
    """The mask, scores, sinks and dropout of a problem, split.

    Attributes:
      pieces: what they need: the sinks and dropout's seeds (if there are any), then the mask's, then the scores'.
      arrays: the pieces themselves, in the same order.
      primitives: names of the JAX primitives that functions of indices run on tiles.

    Raises:
      NotSplittable: a function of indices needs more than elementwise operations where query and key meet.
    """

    def __init__(self, problem: Problem, operands: list[Any], counted: dict[int, Array] | None = None):
        """`counted`: by number, where pieces of a `ScoreFn` count. Their derivatives are 0 elsewhere."""
        self.problem, self.operands = problem, operands
        program = problem.program
        recorder = _Recorder(problem, counted or {})
        self.sinks = recorder.note(operands[3], "h", (3,)) if program.sinks else None
        self.seeds = recorder.note(operands[3 + program.sinks], "h") if program.dropout else None
        self._mask_start = len(recorder.pieces)
        mask = program.mask_of(operands)
        if mask is not None:
            mask.evaluate(recorder)
        self._scores_start = len(recorder.pieces)
        logits = jnp.zeros((1, 1), problem.accumulate)
        positions = program.score_positions()
        for structure in program.scores:
            own, positions = positions[: structure.num_leaves], positions[structure.num_leaves :]
            recorder.sources = tuple(i for i in own if i in problem.differentiable)
            logits = jax.tree.unflatten(structure, [operands[i] for i in own]).evaluate(logits, recorder)
        self.pieces, self.arrays = tuple(recorder.pieces), recorder.arrays
        self._residuals = tuple(recorder.residuals)
        self._mask_residuals = sum(residual.of_mask for residual in self._residuals)
        self.primitives = frozenset(name for residual in self._residuals for name in residual.primitives)

    @classmethod
    def described(cls, problem: Problem, operands: list[Any]) -> Split:
        """The split of a problem whose operands may be `jax.ShapeDtypeStruct`: its pieces, without usable arrays."""
        found: list[Split] = []

        def split(operands: list[Any]) -> list[Any]:
            made = cls(problem, operands)
            arrays, made.operands, made.arrays = made.arrays, list(described), []
            found.append(made)  # without tracers, which must not be seen outside
            return arrays

        described = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in operands]
        found[0].arrays = jax.eval_shape(split, described)
        return found[0]

    def lacking(self, lacks: frozenset[str], compiler: str) -> str | None:
        """Why a compiler that lacks these primitives cannot run it, or `None`."""
        found = ", ".join(sorted(self.primitives & lacks))
        return f"cannot run this mask or score on its tiles: {compiler} has no {found}" if found else None

    @property
    def of_mask(self) -> range:
        """The numbers of the mask's pieces."""
        return range(self._mask_start, self._scores_start)

    def wanted(self, operands: Sequence[int]) -> tuple[int, ...]:
        """The pieces, scores' only, whose gradients the gradients of these operands are made of."""
        found = range(self._scores_start, len(self.pieces))
        float_ = lambda n: jnp.issubdtype(self.pieces[n].dtype, jnp.floating)
        return tuple(n for n in found if float_(n) and set(self.pieces[n].sources) & set(operands))

    def pulled(self, gradients: dict[int, Array], wanted: Sequence[int]) -> dict[int, Array]:
        """Gradients of the operands in `wanted`, in their own shapes, from those of the pieces.

        Args:
          gradients: by number of the piece: `[entries or batch entries, N, T, S]` with any axis summed over, or not,
            that the piece does not have.
        """
        moved = [i for i in wanted if any(i in self.pieces[n].sources for n in gradients)]

        def pieces(*some: Array) -> list[Array]:
            operands = list(self.operands)
            for i, x in zip(moved, some, strict=True):
                operands[i] = x
            arrays = Split(self.problem, operands, counted).arrays
            return [arrays[n].astype(self.problem.accumulate) for n in gradients]

        reduced = [self._reduced(n, x, self.arrays[n].shape) for n, x in gradients.items()]
        # What no pair that counts depends on may be singular: its derivative times 0 is 0 all the same.
        counted = {n: x != 0 for n, x in zip(gradients, reduced, strict=True)}
        _, pull = jax.vjp(pieces, *(self.problem.wide(self.operands[i]) for i in moved))
        nothing = {i: jnp.zeros(self.operands[i].shape, self.problem.accumulate) for i in wanted}
        return nothing | dict(zip(moved, pull(reduced), strict=True))

    def _reduced(self, n: int, gradient: Array, shape: tuple[int, ...]) -> Array:
        """A gradient summed to the shape of its piece; its first axis may count all batch entries."""
        lanes, batch = self.pieces[n].lanes, self.problem.sizes.batch
        if gradient.shape[0] != shape[0]:
            apart = gradient.reshape(*batch, *gradient.shape[1:])
            gradient = summed(apart, (*lanes, *gradient.shape[1:])).reshape(shape[0], *gradient.shape[1:])
        return summed(gradient, shape).astype(self.problem.accumulate)

    def tile(self, q: Array, k: Array, b: Any, h: Any, values: Sequence[Any]) -> PairTile:
        """A tile whose queries and keys are q and k (int32, they broadcast together to its shape).

        Args:
          b: row-major number of the batch entry, over all batch axes; h: the query head.
          values: the tile's part of every piece, each of a shape that broadcasts to the tile.
        """
        return PairTile(self, q, k, b, h, list(values))


class PairTile:
    """A tile of pairs of one batch entry and head inside a kernel: what masks and scores are asked about there."""

    def __init__(self, split: Split, q: Array, k: Array, b: Any, h: Any, values: list[Any]):
        sizes = split.problem.sizes
        self._split, self._all = split, values
        self.q, self.k, self.h = q, k, h
        own = math.prod(sizes.batch[sizes.mapped :])
        self.b = b % own if sizes.mapped else b
        self.query_length, self.key_length = sizes.query_length, sizes.key_length
        self._values, self._residuals = iter(()), iter(())
        self.counted: Array | None = None

    def visible(self) -> Array | None:
        """The mask on the tile, or `None` where there is none."""
        split = self._split
        mask = split.problem.program.mask_of(split.operands)
        if mask is None:
            return None
        self._values = iter(self._all[split._mask_start : split._scores_start])
        self._residuals = iter(split._residuals[: split._mask_residuals])
        self.counted = None
        return jax.tree.map(_placeholder, mask).evaluate(self)

    def modify(self, logits: Array) -> Array:
        """The scores applied to the tile's logits."""
        return self._modify(logits, self._all[self._split._scores_start :])

    def pull(
        self, logits: Array, d_modified: Array, wanted: Sequence[int], counted: Array | None = None
    ) -> tuple[Array, list[Array]]:
        """The cotangents of the logits, and of the values of the pieces in `wanted`, from that of `modify`.

        Args:
          counted: the pairs that count, of the tile's shape; `None`: all. At others the cotangents are 0.
        """
        start = self._split._scores_start

        def modify(logits: Array, *some: Array) -> Array:
            values = list(self._all)
            for n, value in zip(wanted, some, strict=True):
                values[n] = value
            return self._modify(logits, values[start:], counted)

        wide = [self._split.problem.wide(self._all[n]) for n in wanted]
        _, pull = jax.vjp(modify, logits, *wide)
        d_logits, *d_values = pull(d_modified)
        return d_logits, d_values

    def drop(self, weights: Array) -> Array:
        """Dropout applied to softmax weights."""
        split, program = self._split, self._split.problem.program
        if split.seeds is None:
            return weights
        return program.drop(weights, self, [None] * (3 + program.sinks) + [self._all[split.seeds]])  # type: ignore[arg-type]

    def take(self, array: Any, axes: str) -> Any:
        """The tile's part of a leaf: the next piece. Tables come as placeholders, their values by distance."""
        if not is_array(array) or "." in axes:
            return array
        return next(self._values)

    def inverted(self, seen: Array) -> Array:
        return opposite(seen)

    def by_distance(self, values: Any) -> Array:
        return next(self._values)

    def apply(self, function: IndexFunction, constants: tuple[Array, ...], logits: Array | None = None) -> Array:
        residual = next(self._residuals)
        pieces = [next(self._values) for _ in range(residual.count)]
        made = residual(self.b, self.h, self.q, self.k, pieces, logits, self.counted)
        return made if logits is None else jnp.broadcast_to(made, logits.shape)

    def _modify(self, logits: Array, values: list[Any], counted: Array | None = None) -> Array:
        split, program = self._split, self._split.problem.program
        self._values, self.counted = iter(values), counted
        self._residuals = iter(split._residuals[split._mask_residuals :])
        return program.modify(logits, self, [_placeholder(split.operands[i]) for i in program.score_positions()])


class _Recorder:
    """Stands in for a tile of one pair, and writes down what is asked of it."""

    def __init__(self, problem: Problem, counted: dict[int, Array]):
        self.counted: Any = None  # of pairs: all do
        self._counted = counted
        self.sizes, self.accumulate = problem.sizes, problem.accumulate
        self.query_length, self.key_length = problem.sizes.query_length, problem.sizes.key_length
        self.q = self.k = np.zeros((1, 1), np.int32)
        self.b = self.h = np.zeros((), np.int32)
        self.pieces: list[Piece] = []
        self.arrays: list[Any] = []
        self.residuals: list[Residual] = []
        self.sources: tuple[int, ...] = ()

    def note(self, array: Any, axes: str, sources: tuple[int, ...] = (), by_distance: bool = False) -> int:
        """Adds an array in operand form as a piece; gives its number."""
        n = len(self.sizes.batch)
        sizes = [array.shape[n + axes.index(a)] if a in axes else 1 for a in "hts"]
        order = [n + axes.index(a) for a in "hts" if a in axes]
        if order != sorted(order):
            array = array.transpose(*range(n), *order)
        lanes = tuple(array.shape[:n])
        heads, queries, keys = (size > 1 for size in sizes)
        self.pieces.append(Piece(lanes, heads, queries, keys, by_distance, np.dtype(array.dtype).name, sources))
        self.arrays.append(array.reshape(math.prod(lanes), *sizes))
        return len(self.pieces) - 1

    def take(self, array: Any, axes: str) -> Any:
        if not is_array(array):
            return array
        if "." in axes:  # a table, for by_distance
            return tile_form(array, axes, len(self.sizes.batch), self.sizes.group)
        self.note(array, axes, self.sources)
        return jnp.zeros((1, 1), array.dtype)

    def inverted(self, seen: Any) -> Any:
        return ~seen

    def by_distance(self, values: Any) -> Array:
        """`values` of all distances, as a piece [*lanes, N or 1, 1, T + S - 1]."""
        n = len(self.sizes.batch)
        made = values(np.arange(1 - self.query_length, self.key_length, dtype=np.int32))
        self.note(made.reshape(*made.shape[:n], -1, 1, made.shape[-1]), "hts", self.sources, by_distance=True)
        return jnp.zeros((1, 1), made.dtype)

    def apply(self, function: IndexFunction, constants: tuple[Array, ...], logits: Array | None = None) -> Array:
        try:
            residual = Residual(function, None if logits is None else self.accumulate)
        except NotSplittable as reason:
            raise NotSplittable(f"{reason}, in a {'Where' if logits is None else 'ScoreFn'}") from None
        counted = [self._counted.get(len(self.pieces) + n) for n in range(residual.count)]
        for array, axes in residual.hoisted(constants, self.sizes, counted):
            self.note(array, axes, self.sources)
        self.residuals.append(residual)
        return jnp.zeros((1, 1), bool if logits is None else self.accumulate)


def _placeholder(leaf: Any) -> Any:
    """An array of no memory in place of a leaf."""
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)


def summed(x: Array, shape: tuple[int, ...]) -> Array:
    """Summed over the axes that have size 1 in `shape`."""
    axes = tuple(i for i, (have, want) in enumerate(zip(x.shape, shape, strict=True)) if have != want)
    return x.sum(axes, keepdims=True) if axes else x
