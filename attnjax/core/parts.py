"""`Parts`: what kernels that load single elements load of a call's arrays: rows, pieces of a tile, block lists.

The kernel says how an element is loaded. Written for kernels whose arrays lie as the user gave them.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from attnjax.core.program import Problem
from attnjax.core.softmax import Rows, finite, inverse, log_sum_exp, tainted
from attnjax.core.split import Split, entry_of
from attnjax.core.view import View, unit
from attnjax.core.visits import Kinds, Lists, block_kinds, visits
from attnjax.tuning import power_of_two

Array = jax.Array
Refs = dict[str, Any]
Chunks = tuple[Array, ...]  # rows, cut along their axis of features
Load = Callable[[Any, tuple[Any, ...], Any], Array]
Store = Callable[[Any, tuple[Any, ...], Array, Array], None]


_CHUNK = 64  # features of float32 rows: a product's operand of more, in three parts, fills the registers of a thread


class Parts:
    """A call's arrays with one batch axis, and how a kernel loads from them.

    `refs` are the arrays inside the kernel, by the names of `given`. Tiles are as in `View`.

    Attributes:
      given: the arrays that every kernel of the call may load from, by name.
      entries: how many batch entries there are.
      chunked: whether rows are cut into chunks.
    """

    def __init__(self, problem: Problem, operands: list[Array], load: Load, store: Store):
        self.problem, self.sizes, self.batch = problem, problem.sizes, problem.sizes.batch
        self.entries = math.prod(self.batch)
        self.split = Split(problem, operands)
        self._operands, self._load, self._store = operands, load, store
        n, names = len(self.batch), ("query", "key", "value")
        self._lanes = {name: tuple(x.shape[:n]) for name, x in zip(names, operands[:3], strict=True)}
        self.given: Refs = {name: x.reshape(-1, *x.shape[n:]) for name, x in zip(names, operands[:3], strict=True)}
        self.given |= {f"piece{i}": jnp.asarray(x) for i, x in enumerate(self.split.arrays)}
        self.chunked = problem.dtype == "float32" and max(problem.head_size, problem.value_size) > _CHUNK

    def take_rows(self, rows: Rows, delta: Array, ct_out: Array) -> None:
        """What the backward starts from: weights are `power` of logits less `highest`, both times `unit`.

        With the log-sum-exp for `highest` they add up to 1 but for its rounding, which half precision does not show. In
        float32 the cotangents are divided by the total instead.
        """
        if self.problem.dtype == "float32":
            share = inverse(rows.total)
            named = {"highest": finite(rows.highest) * unit(self.problem), "delta": delta * share, "share": share}
        else:
            named = {"highest": finite(log_sum_exp(rows.highest, rows.total)) * unit(self.problem), "delta": delta}
        named["ct_out"] = ct_out = ct_out.astype(self.problem.dtype)
        if self.problem.program.mask:  # who sees such a query has it by way of its weights
            named["highest"] = tainted(named["highest"], delta, ct_out)
        n = len(self.batch)
        self.given |= {name: x.reshape(self.entries, *x.shape[n:]) for name, x in named.items()}

    def lists(self, block_q: int, block_k: int, *, by_key: bool = False, group: int = 1) -> Lists:
        """What each block of queries, or of keys, visits."""
        found = visits(self.problem, self._operands, block_q, block_k, by_key=by_key, group=group)
        return Lists(found, self.batch)

    def kinds(self, block_q: int, block_k: int) -> Kinds:
        """The block map itself."""
        known = block_kinds(self.problem, self._operands, block_q, block_k) if self.problem.program.mask else None
        return Kinds(known, self.batch)

    def rows(self, refs: Refs, name: str, b: Any, rows: Any, head: Any, limit: int | None) -> Chunks:
        """Rows [r, size] of query, key, value or `ct_out` of one head; `limit`: rows from there on give 0."""
        ref = refs[name]
        entry = entry_of(self._lanes.get(name, self.batch), self.batch, b)
        before = None if limit is None else rows < limit
        chunks = []
        for column, all_ in self._columns(ref.shape[-1]):
            inside = before if all_ else column < ref.shape[-1] if before is None else before & (column < ref.shape[-1])
            chunks.append(self._load(ref, (entry, rows, head, column), inside))
        return tuple(chunks)

    def zeros(self, name: str, rows: int) -> Chunks:
        """So many rows to add up what is like rows of query, key or value."""
        columns = self._columns(self.given[name].shape[-1])
        return tuple(jnp.zeros((rows, column.shape[1]), jnp.float32) for column, _ in columns)

    def _columns(self, size: int) -> list[tuple[Array, bool]]:
        """The features of each chunk, [1, c], and whether all of them are there; c is a power of 2."""
        width = min(power_of_two(size), _CHUNK) if self.problem.dtype == "float32" else power_of_two(size)
        every = range(0, size, width)
        return [(start + lax.broadcasted_iota(jnp.int32, (1, width), 1), start + width <= size) for start in every]

    def cotangents(self, refs: Refs, b: Any, rows: Array, head: Any, limit: int | None) -> Chunks:
        """Rows of the cotangent of the output, times `share` where there is one."""
        found = self.rows(refs, "ct_out", b, rows, head, limit)
        if "share" not in refs:
            return found
        share = self.row_values(refs, "share", b, rows, head)
        return tuple(x * share for x in found)

    def row_values(self, refs: Refs, name: str, b: Any, q: Array, h: Any) -> Array:
        """One number for each query, in the shape of q."""
        return self._load(refs[name], (b, q, h), q < self.sizes.query_length)

    def store_rows(self, ref: Any, b: Any, rows: Array, head: Any, value: Chunks, inside: Array) -> None:
        """Stores rows [r, *] where they are `inside`, without what was added to make their size a power of 2."""
        for (column, all_), chunk in zip(self._columns(ref.shape[-1]), value, strict=True):
            self._store(ref, (b, rows, head, column), chunk, inside if all_ else inside & (column < ref.shape[-1]))

    def view(
        self,
        refs: Refs,
        at: tuple[Any, Any],
        q: Array,
        k: Array,
        raw: Array,
        masked: bool,
        known: dict[int, Array],
        taint: Array | None = None,
    ) -> View:
        """A tile; the pieces of the mask are loaded only where it is needed, those that are `known` are loaded."""
        pieces = range(len(self.split.pieces))
        needed = [n for n in pieces if n not in known and (masked or n not in self.split.of_mask)]
        loaded = known | {n: self.piece(refs, n, *at, q, k) for n in needed}
        return View(self.split, at, q, k, [loaded.get(n) for n in pieces], raw, masked, taint)

    def piece(self, refs: Refs, n: int, b: Any, h: Any, q: Array, k: Array) -> Array:
        """A piece at these pairs."""
        piece, sizes, ref = self.split.pieces[n], self.sizes, refs[f"piece{n}"]
        entry, head = piece.entry(self.batch, b), h if piece.heads else 0
        in_q, in_k = q < sizes.query_length, k < sizes.key_length
        if piece.by_distance:
            return self._load(ref, (entry, head, 0, k - q + (sizes.query_length - 1)), in_q & in_k)
        inside = in_q if piece.queries else None
        inside = inside if not piece.keys else in_k if inside is None else inside & in_k
        return self._load(ref, (entry, head, q if piece.queries else 0, k if piece.keys else 0), inside)

    def before(self, refs: Refs, b: Any, h: Any, q: Array | None, k: Array | None) -> dict[int, Array]:
        """The pieces that only depend on what is known before a loop: on q, or on k, or on neither."""
        none = jnp.zeros((1, 1), jnp.int32)
        return {
            n: self.piece(refs, n, b, h, none if q is None else q, none if k is None else k)
            for n, piece in enumerate(self.split.pieces)
            if not piece.by_distance and not (piece.queries and q is None) and not (piece.keys and k is None)
        }
