"""`Tile` and `Grid`: what a mask or score is asked about. Index arrays and slices of operands; no loops, no kernels.

Two forms of an operand appear everywhere:
  operand form  [*batch, *axes]: as the user gave it, with all batch axes present (size 1 where it does not depend).
  tile form     [*lanes, K, G, t, s, *free]: broadcasts with a tile of logits [*lanes, K, G, t, s].
The letters of `axes`: h query heads, k key/value heads, t query positions, s key positions, `.` never split.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.checks import check_count, check_leaves
from attnjax.core.functions import IndexFunction
from attnjax.core.node import Node, is_array
from attnjax.core.operations import Visible
from attnjax.core.symbolic import indices, is_known, number

Array = jax.Array
_LEAST_AND_MOST = ((np.min, jnp.min), (np.max, jnp.max))
Values = Any  # an array of indices, or a Python integer


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of a problem. The first `mapped` batch axes came from vmap and do not count as `b`."""

    batch: tuple[int, ...]
    mapped: int
    query_length: int
    key_length: int
    heads: int
    key_heads: int

    @property
    def group(self) -> int:
        return self.heads // self.key_heads

    @property
    def known(self) -> bool:
        """Whether all sizes are integers, and none a symbol."""
        return all(map(is_known, (*self.batch, self.query_length, self.key_length)))

    def batch_index(self) -> Any:
        """int32 [*batch], 1 on the mapped axes: the row-major number of each batch entry."""
        own = self.batch[self.mapped :]
        return indices(math.prod(own)).reshape((1,) * self.mapped + own)


def operand_form(leaf: Any, axes: str, batch_ndim: int) -> Any:
    """Adds the missing leading axes, so that the leaf has all batch axes and all of its own."""
    missing = batch_ndim + len(axes) - leaf.ndim
    if not missing:
        return leaf
    shape = (1,) * missing + tuple(leaf.shape)
    return jax.ShapeDtypeStruct(shape, leaf.dtype) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf.reshape(shape)


def tile_form(x: Any, axes: str, batch_ndim: int, group: int) -> Any:
    """Operand form to tile form: splits h into (K, G), orders the axes and inserts the absent ones with size 1."""
    order = [axes.index(a) for a in "hkts" if a in axes] + [i for i, a in enumerate(axes) if a == "."]
    if order != sorted(order):
        x = x.transpose(*range(batch_ndim), *(batch_ndim + i for i in order))
    sizes = {a: x.shape[batch_ndim + n] for n, a in enumerate(a for a in "hkts" if a in axes)}
    free = x.shape[batch_ndim + sum(a in axes for a in "hkts") :]
    heads = (sizes.get("k", 1), 1)
    if "h" in axes:
        heads = (1, 1) if sizes["h"] == 1 else (sizes["h"] // group, group)
    return x.reshape(*x.shape[:batch_ndim], *heads, sizes.get("t", 1), sizes.get("s", 1), *free)


def from_tile_form(x: Array, axes: str, batch_ndim: int) -> Array:
    """The inverse of `tile_form`, for arrays whose absent axes have size 1."""
    lead, (kv, group, t, s), free = (
        x.shape[:batch_ndim],
        x.shape[batch_ndim : batch_ndim + 4],
        x.shape[batch_ndim + 4 :],
    )
    sizes = {"h": kv * group, "k": kv, "t": t, "s": s}
    present = [a for a in "hkts" if a in axes]
    x = x.reshape(*lead, *(sizes[a] for a in present), *free)
    order = present + [f".{i}" for i in range(len(free))]
    names = iter(f".{i}" for i in range(len(free)))
    wanted = [a if a != "." else next(names) for a in axes]
    if wanted != order:
        x = x.transpose(*range(batch_ndim), *(batch_ndim + order.index(a) for a in wanted))
    return x


def with_leaves(node: Any, leaves: list[Any]) -> Any:
    """The node with other leaves in place of its own."""
    return jax.tree.unflatten(jax.tree.structure(node), leaves)


class Tile:
    """A rectangle of (query, key) pairs, for some batch entries and heads.

    Attributes:
      b, h, q, k: int32 index arrays that broadcast to `shape`.
      shape: [*lanes, K, G, t, s].
      query_length, key_length: the whole problem's T and S.
    """

    def __init__(
        self,
        sizes: Sizes,
        b: Any,
        lanes: tuple[int, ...],
        kv: tuple[Any, int],
        q: tuple[Any, int],
        k: tuple[Any, int],
    ):
        (kv_start, kv_size), (q_start, q_size), (k_start, k_size) = kv, q, k
        group = sizes.group
        self.query_length, self.key_length = sizes.query_length, sizes.key_length
        self.lanes = lanes
        self.shape = (*lanes, kv_size, group, q_size, k_size)
        self.b = b.reshape(*b.shape, 1, 1, 1, 1)
        rank = (1,) * len(lanes)
        count = lambda start, size, *shape: (start + indices(size)).reshape(*rank, *shape)
        self.h = count(kv_start * group, kv_size * group, kv_size, group, 1, 1)
        self.q = count(q_start, q_size, 1, 1, q_size, 1)
        self.k = count(k_start, k_size, 1, 1, 1, k_size)
        self._first_distance = k_start - q_start
        self.counted: Array | None = None

    @property
    def heads(self) -> int:
        return self.shape[-4] * self.shape[-3]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def take(self, array: Any, axes: str) -> Any:
        """The tile's part of a leaf with these axes; here the leaves come sliced already."""
        return array

    def inverted(self, seen: Any) -> Any:
        """Where not."""
        return ~seen

    def by_distance(self, values: Any) -> Array:
        """Spreads `values(d)`, a function of the distances d = k - q as a vector, over the tile.

        Each distance is asked for once, and the diagonals are laid out by reshaping: no gather, and a gradient that
        is a plain sum.
        """
        t, s = self.shape[-2:]
        length = t + s - 1
        distances = self._first_distance + (indices(length) - number(t - 1))
        by_diagonal = values(distances)
        lead = by_diagonal.shape[:-3]  # [*lanes, K, G, 1, 1, length]
        # Two more of each row, where one would do: a size that is a symbol is then seen to be positive.
        by_diagonal = jnp.pad(by_diagonal.reshape(*lead, 1, length), [(0, 0)] * (len(lead) + 1) + [(0, 2)])
        skewed = jnp.broadcast_to(by_diagonal, (*lead, t, length + 2)).reshape(*lead, t * (length + 2))
        skewed = lax.slice_in_dim(skewed, 0, t * (length + 1), axis=-1).reshape(*lead, t, length + 1)
        return lax.slice_in_dim(skewed, t - 1, length, axis=-1)

    def counting(self, pairs: Array | None) -> Tile:
        """The same tile for derivatives: at pairs that do not count, those of scores are 0, whatever the scores are.

        Args:
          pairs: booleans that broadcast to `shape`, with its last two axes; `None`: all count.
        """
        made = copy.copy(self)
        made.counted = pairs
        return made

    def apply(self, function: IndexFunction, constants: tuple[Array, ...], logits: Array | None = None) -> Array:
        """Evaluates a function of scalars at every pair of the tile; what depends on one index is computed once."""
        n = len(self.lanes)
        over_lanes = logits is not None or function.uses[0] or any(_several(c.shape[:n]) for c in constants)
        over_heads = logits is not None or function.uses[1]
        lanes, heads = self.lanes if over_lanes else (1,) * n, self.shape[n : n + 2] if over_heads else (1, 1)
        b = jnp.broadcast_to(self.b[..., 0, 0, 0, 0], lanes) if over_lanes else jnp.zeros(lanes, jnp.int32)
        h = jnp.asarray(self.h).reshape(-1) if over_heads else jnp.zeros(1, jnp.int32)
        given = [*(self._by_axis(c) for c in constants)]
        scored = logits is not None
        if logits is not None:
            given.append(self._by_axis(jnp.broadcast_to(logits, self.shape)))
        alone = lambda axes: tuple(axis in axes for axis in range(n + 3))
        given += [(b, alone(range(n))), (h, alone([n]))]
        given += [(jnp.asarray(x).reshape(-1), alone([n + i])) for i, x in ((1, self.q), (2, self.k))]
        visible = None if self.counted is None or not scored else Visible.of(self.counted)
        if visible is not None:
            given += map(self._by_axis, visible)

        def scalar(*some: Any) -> Array:
            constants_, rest = some[: len(constants)], some[len(constants) :]
            return function(constants_, *rest[: 4 + scored], visible=Visible(*rest[4 + scored :]) if visible else None)

        f = scalar
        for axis in reversed(range(n + 3)):
            f = jax.vmap(f, in_axes=tuple(0 if over[axis] else None for _, over in given))
        out = f(*(x for x, _ in given))
        return out.reshape(*lanes, *heads, *out.shape[-2:])

    def _by_axis(self, x: Array) -> tuple[Array, tuple[bool, ...]]:
        """An array in tile form without the axes of size 1, and which of [*lanes, heads, t, s] are left in front."""
        n = len(self.lanes)
        heads = x.shape[n : n + 2]
        if _several(heads) and heads != self.shape[n : n + 2]:
            heads = self.shape[n : n + 2]
            x = jnp.broadcast_to(x, (*x.shape[:n], *heads, *x.shape[n + 2 :]))
        sizes = (*x.shape[:n], math.prod(heads), *x.shape[n + 2 : n + 4])
        return x.reshape(*(d for d in sizes if d != 1), *x.shape[n + 4 :]), tuple(d != 1 for d in sizes)


class Grid:
    """All blocks of a problem at once, as the ends of their index ranges. Leaves are in operand form.

    Attributes:
      q_min, q_max: int32 `[..., query blocks, 1]`; k_min, k_max: int32 `[..., 1, key blocks]`; both ends included.
      shape: (query blocks, key blocks).
    """

    def __init__(self, sizes: Sizes, block_q: int, block_k: int):
        self.sizes, self.block_q, self.block_k = sizes, block_q, block_k
        self.query_length, self.key_length = sizes.query_length, sizes.key_length
        self.shape = (-(-sizes.query_length // block_q), -(-sizes.key_length // block_k))
        rank = (1,) * (len(sizes.batch) + 1)
        self.q_min, self.q_max = (x.reshape(*rank, -1, 1) for x in _ranges(sizes.query_length, block_q))
        self.k_min, self.k_max = (x.reshape(*rank, 1, -1) for x in _ranges(sizes.key_length, block_k))

    def kinds(self, mask: Any) -> Any:
        """The blocks of a mask, int8 `[*batch or 1, heads or 1, query blocks, key blocks]`; numpy where known."""
        kinds = np.int8(2) if mask is None else mask.blocks(self)
        xp = np if isinstance(kinds, (np.ndarray, np.generic)) and all(map(is_known, self.shape)) else jnp
        kinds = xp.asarray(kinds, xp.int8)
        missing = len(self.sizes.batch) + 3 - kinds.ndim
        kinds = kinds.reshape((1,) * missing + kinds.shape)
        return xp.broadcast_to(kinds, (*kinds.shape[:-2], *self.shape))

    def take(self, array: Any, axes: str) -> Any:
        """A leaf without positions, shaped to broadcast to `[*batch, heads, query blocks, key blocks]`."""
        return array.reshape(*array.shape, 1, 1, 1) if is_array(array) else array

    def ends(self, array: Any, axes: str) -> tuple[Any, Any]:
        """Smallest and largest value of a leaf in each block: two arrays that broadcast to the grid."""
        batch_ndim = len(self.sizes.batch)
        low = high = array
        least, most = ((np.all, jnp.all), (np.any, jnp.any)) if array.dtype == np.bool_ else _LEAST_AND_MOST
        for axis, letter in enumerate(axes):
            block = {"t": self.block_q, "s": self.block_k}.get(letter)
            if block is not None and array.shape[batch_ndim + axis] != 1:
                low = _reduce(low, batch_ndim + axis, block, *least)
                high = _reduce(high, batch_ndim + axis, block, *most)
        shape = [array.shape[batch_ndim + axes.index("h")] if "h" in axes else 1]
        shape += [low.shape[batch_ndim + axes.index(a)] if a in axes else 1 for a in "ts"]
        low, high = (x.reshape(*x.shape[:batch_ndim], *shape) for x in (low, high))
        return low, high

    def scan(self, mask: Any, uses: tuple[bool, ...]) -> Array:
        """Looks at every pair, a block at a time: int8 `[*batch or 1, heads or 1, query blocks, key blocks]`."""
        sizes, n = self.sizes, len(self.sizes.batch)
        leaves = [tile_form(leaf, axes, n, sizes.group) for _, leaf, axes in mask.operands()]
        per_batch = uses[0] or any(_several(leaf.shape[:n]) for leaf in leaves)
        lanes = sizes.batch if per_batch else (1,) * n
        b = sizes.batch_index() if per_batch else np.zeros(lanes, np.int32)
        heads = sizes.key_heads if uses[1] else 1
        node = with_leaves(mask, leaves)

        def block(i: Array, j: Array) -> Array:
            first_q, first_k = i * number(self.block_q), j * number(self.block_k)
            q = jnp.minimum(first_q, number(max(sizes.query_length - self.block_q, 0)))
            k = jnp.minimum(first_k, number(max(sizes.key_length - self.block_k, 0)))
            spans = (q, min(self.block_q, sizes.query_length)), (k, min(self.block_k, sizes.key_length))
            tile = Tile(sizes, b, lanes, (0, heads), *spans)
            seen = jnp.broadcast_to(node.evaluate(tile), tile.shape)
            seen = seen if uses[1] else seen[..., :1, :, :]
            fresh = (tile.q >= first_q) & (tile.k >= first_k)
            full = jnp.all(seen | ~fresh, axis=(-2, -1))
            some = jnp.any(seen & fresh, axis=(-2, -1))
            return (full.astype(jnp.int8) + some.astype(jnp.int8)).reshape(*lanes, tile.heads if uses[1] else 1)

        rows, columns = (jnp.asarray(indices(count)) for count in self.shape)
        kinds = lax.map(lambda i: lax.map(lambda j: block(i, j), columns), rows)
        return jnp.moveaxis(kinds, (0, 1), (-2, -1))


def everything(
    node: Node, query_length: int, key_length: int, batch: tuple[int, ...] = (), heads: int = 1
) -> tuple[Tile, Any, bool]:
    """One tile with all pairs, the node ready to be evaluated on it, and whether it has neither batch nor heads."""
    sizes = _sizes_of(node, query_length, key_length, batch, heads)
    plain = not sizes.batch and sizes.heads == 1 and heads == 1 and not _has_heads(node)
    settled = node.settled(query_length, key_length, np.float32)
    return *_rows(settled, sizes, slice(0, query_length)), plain


def rows_of(
    node: Node, query_length: int, key_length: int, batch: tuple[int, ...] = (), heads: int = 1
) -> Iterator[tuple[Tile, Any]]:
    """The same a few rows at a time, at most about four million pairs each."""
    sizes = _sizes_of(node, query_length, key_length, batch, heads)
    node = node.settled(query_length, key_length, np.float32)
    step = max(1, 2**22 // max(1, math.prod(sizes.batch) * sizes.heads * key_length))
    for start in range(0, query_length, step):
        yield _rows(node, sizes, slice(start, min(start + step, query_length)))


def _rows(node: Node, sizes: Sizes, rows: slice) -> tuple[Tile, Any]:
    n = len(sizes.batch)
    leaves = []
    for _, leaf, axes in node.operands():
        leaf = operand_form(jnp.asarray(leaf), axes, n)
        if "t" in axes and leaf.shape[n + axes.index("t")] > 1:
            leaf = leaf[(slice(None),) * (n + axes.index("t")) + (rows,)]
        leaves.append(tile_form(leaf, axes, n, 1))
    span = (rows.start, rows.stop - rows.start)
    tile = Tile(sizes, sizes.batch_index(), sizes.batch, (0, sizes.heads), span, (0, sizes.key_length))
    return tile, with_leaves(node, leaves)


def _sizes_of(node: Node, query_length: int, key_length: int, batch: tuple[int, ...], heads: int) -> Sizes:
    query_length, key_length = check_count("query_length", query_length, 0), check_count("key_length", key_length, 0)
    for _, leaf, axes in node.operands():
        shape = tuple(leaf.shape)
        own = len(shape) - len(axes)
        batch = np.broadcast_shapes(batch, shape[: max(own, 0)])
        if "h" in axes and own + axes.index("h") >= 0:
            heads = max(heads, shape[own + axes.index("h")])
    check_leaves(node, type(node).__name__, tuple(batch), {"t": query_length, "s": key_length, "h": heads})
    return Sizes(tuple(batch), 0, query_length, key_length, heads, heads)


def _has_heads(node: Node) -> bool:
    return any("h" in axes and leaf.ndim >= len(axes) - axes.index("h") for _, leaf, axes in node.operands())


def _several(sizes: tuple[Any, ...]) -> bool:
    """Whether one of the sizes is not 1."""
    return any(size != 1 for size in sizes)


def _ranges(length: Any, block: Any) -> tuple[Any, Any]:
    """The first and the last index of each block."""
    first = indices(-(-length // block)) * number(block)
    least = np.minimum if is_known(length) else jnp.minimum
    return first, least(first + number(block - 1), number(length - 1))


def _reduce(x: Any, axis: int, block: int, with_numpy: Any, with_jax: Any) -> Any:
    """Reduces runs of `block` along an axis; the last run is filled up with its last value."""
    known, length = isinstance(x, np.ndarray), x.shape[axis]
    if not is_known(length):
        count = -(-length // block)
        x = jnp.take(x, jnp.minimum(indices(count * block), number(length - 1)), axis)
        return with_jax(x.reshape(*x.shape[:axis], count, block, *x.shape[axis + 1 :]), axis=axis + 1)
    short = -length % block
    if short:
        widths = [(0, short if i == axis else 0) for i in range(x.ndim)]
        x = np.pad(x, widths, mode="edge") if known else jnp.pad(x, widths, mode="edge")
    x = x.reshape(*x.shape[:axis], x.shape[axis] // block, block, *x.shape[axis + 1 :])
    return (with_numpy if known else with_jax)(x, axis=axis + 1)
