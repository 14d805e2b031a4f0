"""`Walk`: visits the tiles of a problem that are not empty, in linear memory. Loops only; the sums are the caller's.

    for chunk of lanes:                       (batch entries and heads that are computed together)
        for query block:
            for partial key block: step(masked)
            for full key block:    step(unmasked)
            write the rows
        add what belongs to keys or to nothing

Blocks at a ragged end are moved inwards until they fit, and pairs that were already visited are masked out: nothing
is padded, so no operand is ever copied as a whole.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.program import Problem
from attnjax.core.symbolic import indices, number
from attnjax.core.tiles import Tile, from_tile_form, tile_form
from attnjax.tuning import Blocks

Array = jax.Array
Step = Callable[["Visit", Any, list[Any]], tuple[Any, list[Array]]]


@dataclasses.dataclass(frozen=True)
class Output:
    """One array that a walk makes: its axes, its shape in operand form (batch axes of size 1 are summed over).

    `flipped`: for arrays by key with one free axis, the steps give their parts as [..., free, s], not [..., s, free].
    """

    axes: str
    shape: tuple[int, ...]
    dtype: Any
    flipped: bool = False

    @property
    def by_row(self) -> bool:
        """Whether it belongs to query positions alone, so that a row of tiles completes a part of it."""
        return "t" in self.axes and "s" not in self.axes

    @property
    def by_pair(self) -> bool:
        return "t" in self.axes and "s" in self.axes


@dataclasses.dataclass
class Visit:
    """What a step is told about the tile it computes."""

    tile: Tile
    masked: bool  # whether some pair may be invisible
    fresh: Array | None  # pairs not visited before, at ragged ends
    accumulate: Any
    product: Any  # type in which matrix products take their factors
    only: bool  # whether it is the only tile of its row, so that the state before it is empty
    derived: bool = False  # whether a derivative or transpose of the step is being formed


def reduce_to(x: Array, shape: tuple[int, ...]) -> Array:
    """Sums over the axes in which `shape` has size 1 and `x` has more.

    Keys first, then the rest, with a barrier between that keeps XLA from making one sum of it: two short sums round
    less than a long one, which shows where the terms cancel (the gradient of a bias that is shared by all pairs).
    """
    axes = tuple(i for i, (a, b) in enumerate(zip(x.shape, shape, strict=True)) if b == 1 and a != 1)
    if len(axes) > 1:
        x = lax.optimization_barrier(x.sum(axes[-1], keepdims=True))
        axes = axes[:-1]
    return x.sum(axes, keepdims=True) if axes else x


def level(a: Array, b: Array) -> tuple[Array, Array]:
    """Both arrays at their common shape."""
    shape = jnp.broadcast_shapes(a.shape, b.shape)
    return jnp.broadcast_to(a, shape), jnp.broadcast_to(b, shape)


def push(f: Callable, primals: Iterable[Array], tangents: Iterable[Array]) -> Any:
    """The tangent of `f`. A tangent may be narrower than its primal, and have lanes that this does not depend on."""
    pairs = [level(x, d.astype(x.dtype)) for x, d in zip(primals, tangents, strict=True)]
    return jax.jvp(f, tuple(x for x, _ in pairs), tuple(d for _, d in pairs))[1]


class _Place(NamedTuple):
    """Where a part stands: its chunk of lanes, its query block with its first query, its first key (`None`: all)."""

    chunk: tuple
    i: Any = None
    q_start: Any = None
    k_start: Any = None


@dataclasses.dataclass
class Walk:
    """Runs `step` on every tile that is not empty. There is at least one pair of query and key.

    Attributes:
      problem: the sizes; blocks: how to cut them.
      kinds: int8 block map for these blocks, numpy where known.
      operands: arrays in operand form, and `axes` of each. Floating-point parts reach `step` as float32 (float64) or
        wider.
      outputs: what is made. Those by row come from `finish`, in this order; the others are summed over the steps.
      start: shape of a tile -> state of a row of tiles.
      step: (visit, state, parts of the operands in tile form) -> (state, parts of the outputs that are not by row).
      finish: state -> parts of the outputs by row.
      product: type in which matrix products take their factors.
      overwrite: rows are written instead of added; right only for rows that are computed whole each time.
    """

    problem: Problem
    blocks: Blocks
    kinds: Any
    operands: list[Any]
    axes: list[str]
    outputs: list[Output]
    start: Callable[[tuple[int, ...]], Any]
    step: Step
    finish: Callable[[Any], list[Array]]
    product: Any
    overwrite: bool = False

    def __post_init__(self) -> None:
        self.sizes = self.problem.sizes
        self.n = len(self.sizes.batch)
        self.lengths = {"t": self.sizes.query_length, "s": self.sizes.key_length}
        self.blocks_of = {"t": self.blocks.block_q, "s": self.blocks.block_k}
        self.counts = {a: -(-self.lengths[a] // self.blocks_of[a]) for a in "ts"}
        self.ragged = {a: self.lengths[a] % self.blocks_of[a] != 0 for a in "ts"}  # where it is not known, yes
        lanes = (*self.blocks.lanes, self.blocks.lanes_kv)
        sizes = (*self.sizes.batch, self.sizes.key_heads)
        self.chunks = tuple(size // lane for size, lane in zip(sizes, lanes, strict=True))

    def run(self) -> list[Array]:
        """The outputs, in operand form."""
        buffers = [jnp.zeros(o.shape, o.dtype) for o in self.outputs]
        self.visits = _Visits(self.kinds, self)
        return _loop(math.prod(self.chunks), self._chunk, buffers)

    def _chunk(self, place: Any, buffers: list[Array]) -> list[Array]:
        """One chunk of lanes: slices what is small, walks the query blocks, adds the parts that belong to keys."""
        index = _unravel(place, self.chunks)
        loaded = [
            None if "t" in axes and "s" in axes and x.size else self._slice(x, axes, _Place(index))
            for x, axes in zip(self.operands, self.axes, strict=True)
        ]
        kept = [o for o in self.outputs if not o.by_row and not o.by_pair]
        shapes = [self._part_shape(o, whole=True) for o in kept]
        sums = [
            jnp.zeros(_flip(s) if o.flipped else s, self.problem.accumulate) for o, s in zip(kept, shapes, strict=True)
        ]
        wide = [b for b, o in zip(buffers, self.outputs, strict=True) if o.by_row or o.by_pair]
        wide, sums = _loop(self.counts["t"], lambda i, carry: self._rows(i, carry, index, loaded), (wide, sums))
        wide_, sums_ = iter(wide), iter(sums)
        return [
            next(wide_) if o.by_row or o.by_pair else self._put(b, o, _unflip(next(sums_), o), _Place(index))
            for b, o in zip(buffers, self.outputs, strict=True)
        ]

    def _rows(self, i: Any, carry: Any, index: tuple, loaded: list[Any]) -> Any:
        """One query block: all its key blocks, then its rows of the outputs."""
        wide, sums = carry
        q_start = self._start("t", i)
        tile_shape = (*self.blocks.lanes, self.blocks.lanes_kv, self.sizes.group, *self.blocks_of.values())
        row = [
            x if x is None or "t" not in axes else self._cut(x, "t", q_start)
            for x, axes in zip(loaded, self.axes, strict=True)
        ]
        pairs = [b for b, o in zip(wide, self._wide(), strict=True) if o.by_pair]

        def visit(masked: bool) -> Callable:
            def body(count: Any, carry: Any) -> Any:
                j = self.visits.block(index, i, count)
                return self._tile(i, j, q_start, carry, index, row, masked)

            return body

        state = (self.start(tile_shape), sums, pairs)
        partial, visited = self.visits.ends(index, i)
        if self.visits.any_partial:
            state = _loop(partial, visit(True), state)
        if self.visits.any_full:
            state = _loop(visited, visit(False), state, start=partial)
        rows, sums, pairs = state
        pairs_, rows_ = iter(pairs), iter(self.finish(rows))
        wide = [
            next(pairs_) if o.by_pair else self._put(b, o, next(rows_), _Place(index, i, q_start))
            for b, o in zip(wide, self._wide(), strict=True)
        ]
        return wide, sums

    def _tile(self, i: Any, j: Any, q_start: Any, carry: Any, index: tuple, row: list[Any], masked: bool) -> Any:
        rows, sums, pairs = carry
        k_start = self._start("s", j)
        place = _Place(index, i, q_start, k_start)
        parts = []
        for x, part, axes in zip(self.operands, row, self.axes, strict=True):
            if part is None:
                part = self._slice(x, axes, place)
            elif "s" in axes:
                part = self._cut(part, "s", k_start)
            parts.append(self.problem.wide(part))
        lanes_start = [c * lane for c, lane in zip(index, self.blocks.lanes, strict=False)]
        b = _cut_batch(self.sizes.batch_index(), lanes_start, self.blocks.lanes)
        spans = (index[-1] * self.blocks.lanes_kv, self.blocks.lanes_kv), (q_start, self.blocks.block_q)
        tile = Tile(self.sizes, b, self.blocks.lanes, *spans, (k_start, self.blocks.block_k))
        fresh = self._fresh(tile, i, j) if masked else None
        visit = Visit(tile, masked, fresh, self.problem.accumulate, self.product, self.visits.single)
        rows, made = self.step(visit, rows, parts)
        made = iter(made)
        sums, pairs = iter(sums), iter(pairs)
        new_sums, new_pairs = [], []
        for o in self.outputs:
            if o.by_pair:
                new_pairs.append(self._put(next(pairs), o, next(made), place))
            elif not o.by_row:
                new_sums.append(self._add(next(sums), o, next(made), k_start))
        return rows, new_sums, new_pairs

    def _fresh(self, tile: Tile, i: Any, j: Any) -> Array | None:
        fresh = None
        if self.ragged["t"] and not self.overwrite:
            fresh = tile.q >= i * number(self.blocks.block_q)
        if self.ragged["s"]:
            keys = tile.k >= j * number(self.blocks.block_k)
            fresh = keys if fresh is None else fresh & keys
        return fresh

    def _wide(self) -> list[Output]:
        return [o for o in self.outputs if o.by_row or o.by_pair]

    def _start(self, letter: str, block: Any) -> Any:
        start, last = block * number(self.blocks_of[letter]), self.lengths[letter] - self.blocks_of[letter]
        if isinstance(start, int):
            return min(start, last)
        return jnp.minimum(start, number(last)) if self.ragged[letter] else start

    def _bounds(self, shape: tuple, axes: str, place: _Place) -> tuple[list, list]:
        """Start and size of a chunk's part of an array in operand form; axes of size 1 are taken whole."""
        starts, sizes = [], []
        kv_start, kv = place.chunk[-1] * self.blocks.lanes_kv, self.blocks.lanes_kv
        known: dict[str, tuple[Any, int] | None] = {
            "h": (kv_start * self.sizes.group, kv * self.sizes.group),
            "k": (kv_start, kv),
            "t": None if place.q_start is None else (place.q_start, self.blocks.block_q),
            "s": None if place.k_start is None else (place.k_start, self.blocks.block_k),
        }
        spans = [(c * lane, lane) for c, lane in zip(place.chunk[:-1], self.blocks.lanes, strict=True)]
        for size, span in zip(shape, spans + [known.get(a) for a in axes], strict=True):
            start, taken = (0, size) if span is None or size == 1 else span
            starts.append(start)
            sizes.append(taken)
        return starts, sizes

    def _slice(self, x: Array, axes: str, place: _Place) -> Array:
        starts, sizes = self._bounds(x.shape, axes, place)
        part = _dynamic_slice(x, starts, sizes)
        return tile_form(part, axes, self.n, self.sizes.group)

    def _cut(self, x: Array, letter: str, start: Any) -> Array:
        """A block of positions of an array in tile form."""
        axis = self.n + 2 + "ts".index(letter)
        if x.shape[axis] == 1 or x.shape[axis] == self.blocks_of[letter]:
            return x
        starts = [start if i == axis else 0 for i in range(x.ndim)]
        return _dynamic_slice(x, starts, [self.blocks_of[letter] if i == axis else d for i, d in enumerate(x.shape)])

    def _part_shape(self, o: Output, whole: bool = False) -> tuple[int, ...]:
        """Shape, in tile form, of a chunk's part of an output (`whole`: with all positions)."""
        start = None if whole else 0
        _, sizes = self._bounds(o.shape, o.axes, _Place((0,) * len(self.chunks), start, start, start))
        return self._tile_shape(o, sizes)

    def _tile_shape(self, o: Output, sizes: list[int]) -> tuple[int, ...]:
        part = jax.ShapeDtypeStruct(tuple(sizes), o.dtype)
        return jax.eval_shape(lambda x: tile_form(x, o.axes, self.n, self.sizes.group), part).shape

    def _put(self, buffer: Array, o: Output, part: Array, place: _Place) -> Array:
        """Adds a part, in tile form, to an output (or writes it, where rows are computed whole)."""
        starts, sizes = self._bounds(o.shape, o.axes, place)
        shape = self._tile_shape(o, sizes)
        part = jnp.broadcast_to(reduce_to(part, shape), shape)  # lanes that nothing in the part depends on
        part = from_tile_form(part, o.axes, self.n).astype(o.dtype)
        if tuple(sizes) == buffer.shape and all(isinstance(x, int) for x in starts):
            return part if math.prod(self.chunks) == 1 and not o.by_pair else buffer + part
        if not self.overwrite:
            part = _dynamic_slice(buffer, starts, sizes) + part
        elif self.ragged["t"]:  # rows of the block before are not this block's to write
            axis = self.n + o.axes.index("t")
            new = place.q_start + indices(self.blocks.block_q) >= place.i * number(self.blocks.block_q)
            new = new.reshape([-1 if a == axis else 1 for a in range(part.ndim)])
            part = jnp.where(new, part, _dynamic_slice(buffer, starts, sizes))
        return lax.dynamic_update_slice(buffer, part, [jnp.asarray(x, jnp.int32) for x in starts])

    def _add(self, total: Array, o: Output, part: Array, k_start: Any) -> Array:
        """Adds a tile's part to the chunk's sum of an output that is not by row."""
        shape = self._part_shape(o)
        part = reduce_to(part, _flip(shape) if o.flipped else shape)
        axis = total.ndim - 1 if o.flipped else self.n + 3
        if "s" not in o.axes or part.shape == total.shape:
            return total + part
        starts = [k_start if i == axis else 0 for i in range(total.ndim)]
        part = _dynamic_slice(total, starts, part.shape) + part
        return lax.dynamic_update_slice(total, part, [jnp.asarray(x, jnp.int32) for x in starts])


class _Visits:
    """For each chunk and query block, the list of key blocks to visit: partial ones first, then full ones."""

    def __init__(self, kinds: Any, walk: Walk):
        known = isinstance(kinds, np.ndarray)  # then the lengths are known, too
        xp = np if known else jnp
        n, lanes, sizes = walk.n, (*walk.blocks.lanes, walk.blocks.lanes_kv), walk.sizes
        if kinds.shape[n] != 1:
            kinds = kinds.reshape(*kinds.shape[:n], sizes.key_heads, sizes.group, *kinds.shape[-2:])
        else:
            kinds = kinds[..., None, :, :]
        low, high = kinds.min(n + 1), kinds.max(n + 1)
        for axis, lane in enumerate(lanes):
            if low.shape[axis] != 1 and lane != 1:
                split = lambda x, axis=axis, lane=lane: x.reshape(*x.shape[:axis], -1, lane, *x.shape[axis + 1 :])
                low, high = split(low).min(axis + 1), split(high).max(axis + 1)
        full = low == 2
        if walk.ragged["t"] and not walk.overwrite:
            full = full & _all_but_the_last(low.shape[-2])[:, None]
        if walk.ragged["s"]:
            full = full & _all_but_the_last(low.shape[-1])
        partial = (high > 0) & ~full
        # Stable order: partial 0, full 1, empty 2.
        rank = xp.where(partial, 0, xp.where(full, 1, 2))
        self.order = _argsort(rank)
        self.partial = partial.sum(-1).astype(xp.int32)
        self.visited = self.partial + full.sum(-1).astype(xp.int32)
        self.any_partial = not known or bool(partial.any())
        self.any_full = not known or bool(full.any())
        # One tile in a row: no list is needed, and a block that is empty after all is masked like any other.
        self.single = low.shape[-1] == 1
        if self.single:
            self.any_full = known and bool(full.all())
            self.any_partial = not self.any_full

    def _at(self, array: Any, index: tuple, i: Any) -> Any:
        where = [c if size != 1 else 0 for c, size in zip(index, array.shape, strict=False)]
        if array.ndim > len(index):
            where.append(i)
        return tuple(where)

    def block(self, index: tuple, i: Any, number: Any) -> Any:
        """The number of the `number`-th key block that query block i visits."""
        if self.single:
            return 0
        return jnp.asarray(self.order)[(*self._at(self.order, index, i), number)]

    def ends(self, index: tuple, i: Any) -> tuple[Any, Any]:
        """How many blocks of the list are partial, and how many there are."""
        if self.single:
            return (0, 1) if self.any_full else (1, 1)
        partial, visited = (jnp.asarray(x)[self._at(x, index, i)] for x in (self.partial, self.visited))
        return partial, visited


def _all_but_the_last(count: Any) -> Any:
    return indices(count) < number(count - 1)


def _flip(shape: tuple[int, ...]) -> tuple[int, ...]:
    """[..., s, free] to [..., free, s]; the axes of the query stay before them."""
    return (*shape[:-2], shape[-1], shape[-2])


def _unflip(x: Array, o: Output) -> Array:
    return jnp.swapaxes(x, -1, -2) if o.flipped else x


def _argsort(rank: Any) -> Any:
    if isinstance(rank, np.ndarray):
        return np.argsort(rank, axis=-1, kind="stable").astype(np.int32)
    return jnp.argsort(rank, axis=-1, stable=True).astype(jnp.int32)


def _loop(count: Any, body: Callable, carry: Any, start: Any = 0) -> Any:
    """`fori_loop` that vanishes when it has one known turn."""
    if isinstance(count, int) and isinstance(start, int) and count - start == 1:
        return body(start, carry)
    if isinstance(count, int) and isinstance(start, int) and count == start:
        return carry
    return lax.fori_loop(jnp.int32(start), jnp.int32(number(count)), body, carry)


def _unravel(place: Any, sizes: tuple[int, ...]) -> tuple:
    index = []
    for size in reversed(sizes):
        index.append(0 if size == 1 else place % number(size))
        place = place // number(size)
    return tuple(reversed(index))


def _dynamic_slice(x: Any, starts: list, sizes: Any) -> Any:
    if tuple(sizes) == tuple(x.shape):
        return x
    if all(isinstance(s, int) for s in starts):
        return lax.slice(x, starts, [a + b for a, b in zip(starts, sizes, strict=True)])
    return lax.dynamic_slice(x, [jnp.asarray(s, jnp.int32) for s in starts], sizes)


def _cut_batch(index: Any, starts: list, lanes: tuple[int, ...]) -> Any:
    sizes = [1 if d == 1 else lane for d, lane in zip(index.shape, lanes, strict=True)]
    starts = [0 if d == 1 else s for d, s in zip(index.shape, starts, strict=True)]
    if all(isinstance(s, int) for s in starts):
        return index[tuple(slice(s, s + z) for s, z in zip(starts, sizes, strict=True))]
    return _dynamic_slice(jnp.asarray(index), starts, sizes)
