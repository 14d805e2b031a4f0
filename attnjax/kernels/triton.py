"""implementation="triton": kernels for NVIDIA GPUs in Pallas on Triton, forward and backward; none for other devices.

A program of the forward, and of the gradient of the queries, owns a block of queries and goes through the keys that it
visits; one of the gradients of keys and values owns a block of keys; one of the gradient of a bias a block of pairs.
Each is the only one that writes what it owns, so results are the same to the last bit. Masks and scores are run on
tiles by `core.split`. How large the blocks are is decided in `tuning`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import mlir

from attnjax.core.program import Problem
from attnjax.core.residual import NotSplittable
from attnjax.core.softmax import Rows, add_sinks, finite, inverse, log_sum_exp, merge_rows, row_delta, sink_gradient
from attnjax.core.split import Split, entry_of, member_of, summed, widened
from attnjax.core.view import LOG2E, View
from attnjax.core.visits import Lists, block_kinds, visits
from attnjax.tuning import Blocks

Array = jax.Array
Refs = dict[str, Any]

PARTS = ("forward", "backward")
_MOST_SIZE = 256  # of heads: more does not fit into the registers of a block
_LEAST = 16  # rows of a tile: what tensor cores multiply, and fewer crash the compiler of jax 0.12


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels run. `None` chooses.

    Attributes:
      block_q, block_k: queries and keys of a tile, powers of 2 from 16 to 256.
      warps: 1, 2, 4 or 8 warps work on a tile.
      stages: so many tiles of the inner loop are in flight, 1 to 5.
      backward_block_q, backward_block_k, backward_warps, backward_stages: the same, of the backward.
      splits: so many programs share the keys of a block of queries, in the forward; default: more than one only where
        queries are few.
      tf32: float32 is multiplied with 11 bits of precision, which is several times as fast.
      interpret: run as plain XLA, on any device, to see what the kernels compute; slow.
    """

    block_q: int | None = None
    block_k: int | None = None
    warps: int | None = None
    stages: int | None = None
    backward_block_q: int | None = None
    backward_block_k: int | None = None
    backward_warps: int | None = None
    backward_stages: int | None = None
    splits: int | None = None
    tf32: bool = False
    interpret: bool = False

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            name = field.name.removeprefix("backward_")
            if name in ("tf32", "interpret"):
                if not isinstance(value, bool):
                    raise ValueError(f"Config: {name} must be True or False, got {value!r}.")
                continue
            allowed = {"warps": (1, 2, 4, 8), "stages": range(1, 6), "splits": range(1, 257)}.get(name, _BLOCKS)
            if value is not None and (type(value) is not int or value not in allowed):
                shown = f"from 1 to {allowed[-1]}" if isinstance(allowed, range) else f"one of {list(allowed)}"
                raise ValueError(f"Config: {field.name} must be {shown} or None, got {value!r}.")


_BLOCKS = (16, 32, 64, 128, 256)


@dataclasses.dataclass(frozen=True)
class _Tiling:
    """The sizes of one kernel, all known."""

    block_q: int
    block_k: int
    warps: int = 4
    stages: int = 2


def unsupported(problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """A reason why this implementation cannot take a part of the problem, or `None`."""
    config = problem.config
    if part not in PARTS:
        return "has forward and backward; other derivatives are those of the tiled code"
    if config is not None and not isinstance(config, Config):
        return "config is not one of triton"
    if platform != "cuda" and not (config is not None and config.interpret):
        return f"runs on NVIDIA GPUs only, not on {platform}; elsewhere with Config(interpret=True), to look at"
    if problem.dtype == "float64":
        return "takes float32, bfloat16 and float16, not float64"
    if not 1 <= min(problem.head_size, problem.value_size) <= max(problem.head_size, problem.value_size) <= _MOST_SIZE:
        return f"takes head sizes from 1 to {_MOST_SIZE}"
    return _unsupported_pieces(problem, operands)


def _unsupported_pieces(problem: Problem, operands: list[Any]) -> str | None:
    try:
        Split.described(problem, operands)
    except NotSplittable as reason:
        return f"cannot run this mask or score on its tiles: {reason}"
    return None


def gradients(problem: Problem, operands: list[Any]) -> tuple[int, ...]:
    """Positions of the operands whose gradients `backward` can give: not of those that make a score by distance.

    A tile would add to every diagonal that it crosses, as would others, in no fixed order.
    """
    pieces = Split.described(problem, operands).pieces
    diagonal = {i for piece in pieces if piece.by_distance for i in piece.sources}
    return tuple(i for i in problem.differentiable if i not in diagonal)


def blocks(problem: Problem, platform: str) -> Blocks:
    """The tiles of the forward."""
    tiling = _tiling(problem, "forward")
    return Blocks(tiling.block_q, tiling.block_k, (1,) * len(problem.sizes.batch), 1)


def temporary_bytes(problem: Problem, platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results."""
    rows = math.prod(problem.out_shapes()[1]) * problem.accumulate.itemsize
    splits = _Decoding.of(problem).splits
    return {"forward": rows * (problem.value_size + 2) * splits if splits > 1 else 0, "backward": 2 * rows}


def _tiling(problem: Problem, part: str) -> _Tiling:
    config = problem.config or Config()
    prefix = "" if part == "forward" else "backward_"
    q, k = getattr(config, prefix + "block_q") or 64, getattr(config, prefix + "block_k") or 64
    return _Tiling(q, k, getattr(config, prefix + "warps") or 4, getattr(config, prefix + "stages") or 2)


@dataclasses.dataclass(frozen=True)
class _Decoding:
    """How the forward shares out few queries: heads of a group in one tile, and several programs for its keys."""

    together: int = 1
    splits: int = 1

    @classmethod
    def of(cls, problem: Problem) -> _Decoding:
        sizes, config = problem.sizes, problem.config or Config()
        rows = sizes.query_length * sizes.group
        if rows > _DECODED_ROWS:
            return cls(1, config.splits or 1)
        return cls(sizes.group, config.splits or 1)


_DECODED_ROWS = 64  # at most so many rows, queries times heads of a group, are one tile


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    out_shape, row_shape = problem.out_shapes()
    sinks = problem.program.sinks_of(operands)
    if not math.prod((*out_shape, problem.sizes.key_length)):  # no pairs
        rows = Rows(jnp.zeros(out_shape, problem.dtype), jnp.full(row_shape, -jnp.inf), jnp.zeros(row_shape))
        rows = rows._replace(
            highest=rows.highest.astype(problem.accumulate), total=rows.total.astype(problem.accumulate)
        )
        return rows if sinks is None else add_sinks(rows, sinks[..., None, :].astype(problem.accumulate))
    call = _Call(problem, operands, "forward")
    splits = call.decoding.splits
    kept = problem.dtype if splits == 1 else problem.accumulate
    flat = lambda shape: (splits * call.entries, *shape[len(call.batch) :])
    results = {"out": jax.ShapeDtypeStruct(flat(out_shape), kept)}
    results |= {name: jax.ShapeDtypeStruct(flat(row_shape), problem.accumulate) for name in ("highest", "total")}
    lists = call.lists("query")
    programs = lists.rows * (call.sizes.heads // call.decoding.together) * call.entries * splits
    made = call.run("forward", lambda refs: _forward(call, lists, refs), programs, lists.given, results)
    if splits == 1:
        return Rows(made[0].reshape(out_shape), *(x.reshape(row_shape) for x in made[1:]))
    rows = merge_rows(
        *(x.reshape(splits, *shape) for x, shape in zip(made, (out_shape, row_shape, row_shape), strict=True))
    )
    rows = rows if sinks is None else add_sinks(rows, sinks[..., None, :].astype(problem.accumulate))
    return rows._replace(out=rows.out.astype(problem.dtype))


def backward(
    problem: Problem,
    operands: list[Array],
    rows: Rows,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[tuple[int, tuple[int, ...]], ...],
) -> list[Array]:
    """Gradients of the operands in `wanted`: pairs of position and shape (batch axes of size 1 are summed over)."""
    program, shapes = problem.program, dict(wanted)
    delta = row_delta(rows, ct_out, ct_lse)
    made = {}
    if program.sinks and 3 in shapes:
        made[3] = sink_gradient(operands[3], rows, delta, shapes[3])
    if not math.prod((*problem.out_shapes()[0], problem.sizes.key_length)):  # no pairs
        made = {i: jnp.zeros(shape, problem.accumulate) for i, shape in wanted} | made
        return [made[i] for i, _ in wanted]
    scores = {i: shape for i, shape in shapes.items() if i in program.score_positions()}
    call = _Call(problem, widened(operands, scores, len(problem.sizes.batch)), "backward")
    call.take_rows(rows, delta, ct_out)
    gradients = _Gradients(call, shapes, call.split.wanted(tuple(scores)))
    made |= gradients.of_operands() | call.split.pulled(gradients.of_pieces(), tuple(scores))
    return [made[i] for i, _ in wanted]


class _Gradients:
    """The kernels of the backward, each run where something of what it gives is wanted."""

    def __init__(self, call: _Call, shapes: dict[int, tuple[int, ...]], wanted: tuple[int, ...]):
        self.call, self.shapes = call, shapes
        pieces = call.split.pieces
        pairs = [n for n in wanted if pieces[n].queries and pieces[n].keys]
        by_key = [n for n in wanted if pieces[n].keys and n not in pairs]
        by_query = [n for n in wanted if n not in (*pairs, *by_key)]
        sizes, problem, entries = call.sizes, call.problem, call.entries
        queries = (entries, sizes.query_length, sizes.heads)
        keys = (entries, sizes.key_length, sizes.key_heads)
        self.made: dict[str, Array] = {}
        first = {"d_query": (*queries, problem.head_size)} if 0 in shapes else {}
        first |= {f"d_piece{n}": (entries, sizes.heads, sizes.query_length, 1) for n in by_query}
        if first:
            self._run("query", _backward_query, sizes.heads, first, by_query)
        first = {"d_key": (*keys, problem.head_size)} if 1 in shapes else {}
        first |= {"d_value": (*keys, problem.value_size)} if 2 in shapes else {}
        first |= {f"d_piece{n}": (entries, sizes.heads, 1, sizes.key_length) for n in by_key}
        if first:
            self._run("key", _backward_key, sizes.key_heads, first, by_key)
        for n in pairs:
            self._run_pairs(n)

    def _run(self, side: str, body: Any, heads: int, results: dict[str, tuple[int, ...]], wanted: list[int]) -> None:
        call, lists = self.call, self.call.lists(side)
        shapes = {name: jax.ShapeDtypeStruct(shape, call.problem.accumulate) for name, shape in results.items()}
        programs = lists.rows * heads * call.entries
        made = call.run(side, lambda refs: body(call, lists, refs, wanted), programs, lists.given, shapes)
        self.made |= dict(zip(results, made, strict=True))

    def _run_pairs(self, n: int) -> None:
        call = self.call
        shape = call.split.arrays[n].shape
        kinds = _Kinds(call)
        results = {f"d_piece{n}": jax.ShapeDtypeStruct(shape, call.problem.accumulate)}
        programs = kinds.rows * kinds.columns * shape[0] * shape[1]
        body = lambda refs: _backward_pairs(call, kinds, refs, n)
        (self.made[f"d_piece{n}"],) = call.run("pairs", body, programs, kinds.given, results)

    def of_operands(self) -> dict[int, Array]:
        """Gradients of query, key and value."""
        names = {0: "d_query", 1: "d_key", 2: "d_value"}
        batch = self.call.batch
        return {
            i: summed(self.made[name].reshape(*batch, *self.made[name].shape[1:]), self.shapes[i])
            for i, name in names.items()
            if i in self.shapes
        }

    def of_pieces(self) -> dict[int, Array]:
        """Gradients of pieces, by their numbers."""
        return {int(name[7:]): x for name, x in self.made.items() if name.startswith("d_piece")}


class _Call:
    """A call's arrays with one batch axis, and how kernels load from them.

    Attributes:
      given: the arrays that all kernels load from, by name.
      tiling, decoding: the sizes of the tiles.
    """

    def __init__(self, problem: Problem, operands: list[Array], part: str):
        self.problem, self.sizes, self.batch = problem, problem.sizes, problem.sizes.batch
        self.config = problem.config or Config()
        self.entries = math.prod(self.batch)
        self.split = Split(problem, operands)
        self.tiling = _tiling(problem, part)
        self.decoding = _Decoding.of(problem) if part == "forward" else _Decoding()
        self.operands = operands
        n = len(self.batch)
        self._lanes = {name: tuple(x.shape[:n]) for name, x in zip(("query", "key", "value"), operands, strict=False)}
        self.given: dict[str, Any] = {
            name: x.reshape(-1, *x.shape[n:]) for name, x in zip(self._lanes, operands, strict=False)
        }
        self.given |= {f"piece{i}": jnp.asarray(x) for i, x in enumerate(self.split.arrays)}
        self.head_size, self.value_size = _wide(problem.head_size), _wide(problem.value_size)

    def take_rows(self, rows: Rows, delta: Array, ct_out: Array) -> None:
        """What the backward starts from: weights are 2 ** (logit - highest).

        With the log-sum-exp for `highest` they add up to 1 but for its rounding, which half precision does not show. In
        float32 the cotangents are divided by the total instead.
        """
        if self.problem.dtype == "float32":
            share = inverse(rows.total)
            named = {"highest": finite(rows.highest) * LOG2E, "delta": delta * share, "share": share}
        else:
            named = {"highest": finite(log_sum_exp(rows.highest, rows.total)) * LOG2E, "delta": delta}
        named["ct_out"] = ct_out.astype(self.problem.dtype)
        n = len(self.batch)
        self.given |= {name: x.reshape(self.entries, *x.shape[n:]) for name, x in named.items()}

    def run(self, name: str, body: Callable[[Refs], None], programs: int, more: Refs, results: Refs) -> list[Array]:
        """Runs a kernel: so many programs, each of which is given all arrays by name."""
        given = self.given | more
        launch = _Launch(f"attnjax_{name}", body, programs, tuple(given), results, self.tiling, self.config.interpret)
        return list(
            launch(*given.values()) if self.config.interpret else _kernel_p.bind(*given.values(), launch=launch)
        )

    def rows(self, refs: Refs, name: str, b: Any, rows: Any, head: Any, size: int, limit: int | None) -> Array:
        """Rows [r, size] of query, key, value or a cotangent of one head; `limit`: rows from there on give 0."""
        ref = refs[name]
        column = lax.broadcasted_iota(jnp.int32, (1, _wide(size)), 1)
        inside = None if limit is None else rows < limit
        if _wide(size) != size:
            inside = column < size if inside is None else inside & (column < size)
        lanes = self._lanes.get(name, self.batch)
        return _load(ref, (entry_of(lanes, self.batch, b), rows, head, column), inside)

    def store_rows(
        self, refs: Refs, name: str, b: Any, rows: Array, head: Any, value: Array, size: int, inside: Array
    ) -> None:
        """Stores rows [r, size] where they are `inside`."""
        column = lax.broadcasted_iota(jnp.int32, (1, value.shape[1]), 1)
        inside = inside if value.shape[1] == size else inside & (column < size)
        _store(refs[name], (b, rows, head, column), value, inside)

    def cotangents(self, refs: Refs, b: Any, rows: Array, head: Any, limit: int | None) -> Array:
        """Rows of the cotangent of the output, times `share` where there is one."""
        found = self.rows(refs, "ct_out", b, rows, head, self.problem.value_size, limit)
        return found * self.row_values(refs, "share", b, rows, head) if "share" in refs else found

    def row_values(self, refs: Refs, name: str, b: Any, q: Array, h: Any) -> Array:
        """One number for each query, in the shape of q."""
        return _load(refs[name], (b, q, h), q < self.sizes.query_length)

    def lists(self, side: str) -> Lists:
        """What each block of queries, or of keys, visits."""
        sizes, together = self.sizes, self.decoding.together
        block_q = self.tiling.block_q if together == 1 else sizes.query_length
        by_key = side == "key"
        found = visits(self.problem, self.operands, block_q, self.tiling.block_k, by_key=by_key, group=together)
        return Lists(found, self.batch)

    def view(
        self, refs: Refs, at: tuple[Any, Any], q: Array, k: Array, raw: Array, masked: bool, known: dict[int, Array]
    ) -> View:
        """A tile; the pieces of the mask are loaded only where it is needed, those that are `known` are loaded."""
        needed = [
            n for n in range(len(self.split.pieces)) if n not in known and (masked or n not in self.split.of_mask)
        ]
        loaded = known | {n: self.piece(refs, n, *at, q, k) for n in needed}
        values = [loaded.get(n) for n in range(len(self.split.pieces))]
        return View(self.split, at, q, k, values, raw, masked)

    def piece(self, refs: Refs, n: int, b: Any, h: Any, q: Array, k: Array) -> Array:
        """A piece at these pairs."""
        piece, sizes, ref = self.split.pieces[n], self.sizes, refs[f"piece{n}"]
        entry, head = piece.entry(self.batch, b), h if piece.heads else 0
        in_q, in_k = q < sizes.query_length, k < sizes.key_length
        if piece.by_distance:
            return _load(ref, (entry, head, 0, k - q + (sizes.query_length - 1)), in_q & in_k)
        inside = in_q if piece.queries else None
        inside = inside if not piece.keys else in_k if inside is None else inside & in_k
        return _load(ref, (entry, head, q if piece.queries else 0, k if piece.keys else 0), inside)

    def before(self, refs: Refs, b: Any, h: Any, q: Array | None, k: Array | None) -> dict[int, Array]:
        """The pieces that only depend on what is known before a loop: on q, or on k, or on neither."""
        some = jnp.zeros((1, 1), jnp.int32)
        q, k, has_q, has_k = some if q is None else q, some if k is None else k, q is not None, k is not None
        return {
            n: self.piece(refs, n, b, h, q, k)
            for n, piece in enumerate(self.split.pieces)
            if not piece.by_distance and (has_q or not piece.queries) and (has_k or not piece.keys)
        }

    def dot(self, x: Array, y: Array, across: tuple[int, int]) -> Array:
        """The product over these axes, in float32."""
        precision: Any = lax.Precision.DEFAULT
        if self.problem.dtype == "float32" and not self.config.tf32:
            exact = lax.DotAlgorithmPreset.TF32_TF32_F32_X3
            precision = lax.Precision.HIGHEST if self.config.interpret else exact
        dimensions = (((across[0],), (across[1],)), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)


def _wide(size: int) -> int:
    """The next power of 2, at least that of the smallest product."""
    return max(_LEAST, 1 << (size - 1).bit_length())


def _load(ref: Any, index: tuple[Any, ...], inside: Array | None) -> Array:
    """Loads single elements at index arrays that broadcast together; 0 where they are not `inside`."""
    from jax.experimental.pallas import triton as plt

    shape = np.broadcast_shapes(*(np.shape(i) for i in index), () if inside is None else inside.shape)
    index = tuple(i if np.ndim(i) == 0 else jnp.broadcast_to(i, shape) for i in index)
    if not any(map(np.ndim, index)):
        return jnp.full(shape, ref[index])
    if inside is None:
        return plt.load(ref.at[index])
    other = jnp.zeros((), ref.dtype)
    return plt.load(ref.at[index], mask=jnp.broadcast_to(inside, shape), other=other)


def _store(ref: Any, index: tuple[Any, ...], value: Array, inside: Array) -> None:
    """Stores single elements where they are `inside`."""
    from jax.experimental.pallas import triton as plt

    index = tuple(i if np.ndim(i) == 0 else jnp.broadcast_to(i, value.shape) for i in index)
    plt.store(ref.at[index], value.astype(ref.dtype), mask=jnp.broadcast_to(inside, value.shape))


class _Kinds:
    """The block map, for programs that own a block of pairs."""

    def __init__(self, call: _Call):
        self._batch, tiling = call.batch, call.tiling
        self.rows = -(-call.sizes.query_length // tiling.block_q)
        self.columns = -(-call.sizes.key_length // tiling.block_k)
        self.given: dict[str, Any] = {}
        if call.problem.program.mask:
            kinds = block_kinds(call.problem, call.operands, tiling.block_q, tiling.block_k)
            self._lanes, shape = tuple(kinds.shape[:-3]), kinds.shape[-3:]
            self._heads = shape[0] > 1
            self.given = {"kinds": jnp.asarray(kinds.reshape(-1, *shape))}

    def visited(self, refs: Refs, b: Any, h: Any, i: Any, j: Any) -> Any:
        """Whether any pair of the block is seen."""
        if not self.given:
            return True
        return refs["kinds"][entry_of(self._lanes, self._batch, b), h if self._heads else 0, i, j] > 0


def _forward(call: _Call, lists: Lists, refs: Refs) -> None:
    """Attention of a block of queries: all of their keys, or a part of them."""
    sizes, tiling, splits = call.sizes, call.tiling, call.decoding.splits
    split, row, group, b = _place(splits, lists.rows, sizes.heads // call.decoding.together)
    q, h = _query_rows(call, row, group)
    kv = group if call.decoding.together > 1 else lax.div(h, np.int32(sizes.group))
    whole = sizes.query_length % tiling.block_q == 0 and call.decoding.together == 1
    query = call.rows(refs, "query", b, q, h, call.problem.head_size, None if whole else sizes.query_length)
    known = call.before(refs, b, h, q, None)
    partial, visited, block_of = lists.of(refs, b, group, row)
    share = lax.div(visited + np.int32(splits - 1), np.int32(splits))
    first, last = (np.int32(0), visited) if splits == 1 else (split * share, jnp.minimum(visited, (split + 1) * share))

    def step(masked: bool, place: Any, state: Any) -> Any:
        out, highest, total = state
        start, end = block_of(place, masked) * tiling.block_k, sizes.key_length if masked else None
        k, columns = _both(start, tiling.block_k)
        key = call.rows(refs, "key", b, columns, kv, call.problem.head_size, end)
        view = call.view(refs, (b, h), q, k, call.dot(query, key, (1, 1)), masked, known)
        new = jnp.maximum(highest, view.logits.max(1, keepdims=True))
        safe = finite(new)
        shrink, weights = jnp.exp2(highest - safe), jnp.exp2(view.logits - safe)
        value = view.seen(call.rows(refs, "value", b, columns, kv, call.problem.value_size, end))
        product = call.dot(view.drop(weights).astype(value.dtype), value, (1, 0))
        return out * shrink + product, new, total * shrink + weights.sum(1, keepdims=True)

    rows = q.shape[0]
    state = (
        jnp.zeros((rows, call.value_size), jnp.float32),
        jnp.full((rows, 1), -jnp.inf, jnp.float32),
        jnp.zeros((rows, 1), jnp.float32),
    )
    state = _loops(lists, first, partial, last, step, state)
    _finish(call, refs, split * call.entries + b, b, q, h, state)


def _finish(call: _Call, refs: Refs, at: Any, b: Any, q: Array, h: Any, state: Any) -> None:
    """Writes the rows of a block. `highest` leaves the units of log 2, and `total` goes with what it is rounded to."""
    out, highest, total = state
    if call.split.sinks is not None and call.decoding.splits == 1:
        sink = call.piece(refs, call.split.sinks, b, h, q, q).astype(jnp.float32) * LOG2E
        most = jnp.maximum(highest, sink)
        shrink = jnp.exp2(highest - finite(most))
        out, highest, total = out * shrink, most, total * shrink + jnp.exp2(sink - finite(most))
    natural = highest * math.log(2)
    rounded = jnp.where(highest == -jnp.inf, 0.0, highest - finite(natural) * LOG2E)
    if call.decoding.splits == 1:
        out = out * inverse(total)
    else:
        out = out * jnp.exp2(rounded)
    inside = q < call.sizes.query_length
    call.store_rows(refs, "out", at, q, h, out, call.problem.value_size, inside)
    _store(refs["highest"], (at, q, h), natural, inside)
    _store(refs["total"], (at, q, h), total * jnp.exp2(rounded), inside)


def _backward_query(call: _Call, lists: Lists, refs: Refs, wanted: list[int]) -> None:
    """Gradients of a block of queries, and of pieces by query."""
    problem, sizes, tiling = call.problem, call.sizes, call.tiling
    row, h, b = _place(lists.rows, sizes.heads)
    _, q = _both(row * tiling.block_q, tiling.block_q)
    kv = lax.div(h, np.int32(sizes.group))
    limit = None if sizes.query_length % tiling.block_q == 0 else sizes.query_length
    query = call.rows(refs, "query", b, q, h, problem.head_size, limit)
    ct_out = call.cotangents(refs, b, q, h, limit)
    highest, delta = (call.row_values(refs, name, b, q, h) for name in ("highest", "delta"))
    known = call.before(refs, b, h, q, None)
    known |= {n: jnp.broadcast_to(known[n], q.shape) for n in wanted}
    partial, visited, block_of = lists.of(refs, b, h, row)

    def step(masked: bool, place: Any, state: Any) -> Any:
        d_query, d_pieces = state
        start, end = block_of(place, masked) * tiling.block_k, sizes.key_length if masked else None
        k, columns = _both(start, tiling.block_k)
        key = call.rows(refs, "key", b, columns, kv, problem.head_size, end)
        value = call.rows(refs, "value", b, columns, kv, problem.value_size, end)
        view = call.view(refs, (b, h), q, k, call.dot(query, key, (1, 1)), masked, known)
        weights = jnp.exp2(view.logits - highest)
        d_weights = view.drop(call.dot(ct_out, value, (1, 1)))
        d_raw, more = view.pulled(weights * (d_weights - delta), wanted)
        if d_query is not None:
            d_query = d_query + call.dot(d_raw.astype(key.dtype), view.seen(key), (1, 0))
        return d_query, tuple(d + one.astype(jnp.float32) for d, one in zip(d_pieces, more, strict=True))

    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)
    state = (
        zeros(tiling.block_q, call.head_size) if "d_query" in refs else None,
        tuple(zeros(tiling.block_q, 1) for _ in wanted),
    )
    d_query, d_pieces = _loops(lists, np.int32(0), partial, visited, step, state)
    inside = q < sizes.query_length
    if d_query is not None:
        call.store_rows(refs, "d_query", b, q, h, d_query * problem.program.scale, problem.head_size, inside)
    for n, d in zip(wanted, d_pieces, strict=True):
        _store(refs[f"d_piece{n}"], (b, h, q, 0), d, inside)


def _backward_key(call: _Call, lists: Lists, refs: Refs, wanted: list[int]) -> None:
    """Gradients of a block of keys and values, over all heads of their group, and of pieces by key."""
    problem, sizes, tiling = call.problem, call.sizes, call.tiling
    row, kv, b = _place(lists.rows, sizes.key_heads)
    _, k = _both(row * tiling.block_k, tiling.block_k)
    inside = k < sizes.key_length
    limit = None if sizes.key_length % tiling.block_k == 0 else sizes.key_length
    key = call.rows(refs, "key", b, k, kv, problem.head_size, limit)
    value = call.rows(refs, "value", b, k, kv, problem.value_size, limit)

    def step(masked: bool, place: Any, state: Any, block_of: Any, h: Any, known: Any) -> Any:
        d_key, d_value, d_pieces = state
        start, end = block_of(place, masked) * tiling.block_q, sizes.query_length if masked else None
        q, rows = _both(start, tiling.block_q)
        query = call.rows(refs, "query", b, rows, h, problem.head_size, end)
        view = call.view(refs, (b, h), q, k, call.dot(key, query, (1, 1)), masked, known)
        highest, delta = (call.row_values(refs, name, b, q, h) for name in ("highest", "delta"))
        weights = jnp.exp2(view.logits - highest)
        ct_out = view.seeing(call.cotangents(refs, b, rows, h, end))
        if d_value is not None:
            d_value = d_value + call.dot(view.drop(weights).astype(ct_out.dtype), ct_out, (1, 0))
        d_weights = view.drop(call.dot(value, ct_out, (1, 1)))
        d_raw, more = view.pulled(weights * (d_weights - delta), wanted)
        if d_key is not None:
            d_key = d_key + call.dot(d_raw.astype(query.dtype), view.seeing(query), (1, 0))
        return d_key, d_value, tuple(d + one.astype(jnp.float32) for d, one in zip(d_pieces, more, strict=True))

    zeros = lambda *shape: jnp.zeros(shape, jnp.float32)

    def head(n: Any, state: Any) -> Any:
        h = kv * np.int32(sizes.group) + n
        known = call.before(refs, b, h, None, k)
        known |= {n: jnp.broadcast_to(known[n], k.shape) for n in wanted}
        partial, visited, block_of = lists.of(refs, b, h, row)
        one = functools.partial(step, block_of=block_of, h=h, known=known)
        state = (*state, tuple(zeros(tiling.block_k, 1) for _ in wanted))
        *state, d_pieces = _loops(lists, np.int32(0), partial, visited, one, state)
        for n, d in zip(wanted, d_pieces, strict=True):
            _store(refs[f"d_piece{n}"], (b, h, 0, k), d, inside)
        return tuple(state)

    state = tuple(
        zeros(tiling.block_k, size) if name in refs else None
        for name, size in (("d_key", call.head_size), ("d_value", call.value_size))
    )
    one_head = sizes.group == 1
    d_key, d_value = (
        head(np.int32(0), state) if one_head else lax.fori_loop(np.int32(0), np.int32(sizes.group), head, state)
    )
    if d_key is not None:
        call.store_rows(refs, "d_key", b, k, kv, d_key * problem.program.scale, problem.head_size, inside)
    if d_value is not None:
        call.store_rows(refs, "d_value", b, k, kv, d_value, problem.value_size, inside)


def _backward_pairs(call: _Call, kinds: _Kinds, refs: Refs, n: int) -> None:
    """The gradient of a piece by query and key at a block of pairs, over all batch entries and heads that share it."""
    problem, sizes, tiling, piece = call.problem, call.sizes, call.tiling, call.split.pieces[n]
    entries, heads = call.split.arrays[n].shape[:2]
    j, i, own_head, entry = _place(kinds.columns, kinds.rows, heads)
    k, columns = _both(j * tiling.block_k, tiling.block_k)
    _, q = _both(i * tiling.block_q, tiling.block_q)
    shared = np.int32(1 if piece.heads else sizes.heads)

    def visit(b: Any, h: Any, gradient: Array) -> Array:
        kv = lax.div(h, np.int32(sizes.group))
        query = call.rows(refs, "query", b, q, h, problem.head_size, sizes.query_length)
        key = call.rows(refs, "key", b, columns, kv, problem.head_size, sizes.key_length)
        view = call.view(refs, (b, h), q, k, call.dot(query, key, (1, 1)), True, {})
        highest, delta = (call.row_values(refs, name, b, q, h) for name in ("highest", "delta"))
        ct_out = call.cotangents(refs, b, q, h, sizes.query_length)
        value = call.rows(refs, "value", b, columns, kv, problem.value_size, sizes.key_length)
        d_weights = view.drop(call.dot(ct_out, value, (1, 1)))
        weights = jnp.exp2(view.logits - highest)
        _, (more,) = view.pulled(weights * (d_weights - delta), [n])
        return gradient + more.astype(jnp.float32)

    def one(number: Any, gradient: Array) -> Array:
        b = member_of(piece.lanes, call.batch, entry, lax.div(number, shared))
        h = own_head if piece.heads else lax.rem(number, shared)
        visited = kinds.visited(refs, b, h, i, j)
        if visited is True:
            return visit(b, h, gradient)
        return lax.cond(visited, functools.partial(visit, b, h), lambda gradient: gradient, gradient)

    gradient = jnp.zeros((tiling.block_q, tiling.block_k), jnp.float32)
    count = call.entries // entries * int(shared)
    gradient = lax.fori_loop(np.int32(0), np.int32(count), one, gradient)
    inside = (q < sizes.query_length) & (k < sizes.key_length)
    _store(refs[f"d_piece{n}"], (entry, own_head, q, k), gradient, inside)


def _place(*counts: int) -> tuple[Any, ...]:
    """The program's number as indices, the first the fastest; the last counts what is left."""
    from jax.experimental import pallas as pl

    left, found = pl.program_id(0), []
    for count in counts:
        found.append(lax.rem(left, np.int32(count)) if count > 1 else np.int32(0))
        left = lax.div(left, np.int32(count)) if count > 1 else left
    return *found, left


def _both(start: Any, size: int) -> tuple[Array, Array]:
    """So many indices from `start`, as a row and as a column."""
    return tuple(start + lax.broadcasted_iota(jnp.int32, shape, a) for shape, a in (((1, size), 1), ((size, 1), 0)))


def _query_rows(call: _Call, row: Any, group: Any) -> tuple[Array, Any]:
    """Queries and heads of the rows of a tile of the forward."""
    sizes, together = call.sizes, call.decoding.together
    if together == 1:
        return _both(row * call.tiling.block_q, call.tiling.block_q)[1], group
    number = lax.broadcasted_iota(jnp.int32, (_wide(sizes.query_length * together), 1), 0)
    return lax.div(number, np.int32(together)), group * np.int32(together) + lax.rem(number, np.int32(together))


def _loops(lists: Lists, first: Any, partial: Any, last: Any, step: Any, state: Any) -> Any:
    """Goes through a list from `first` to `last`: its partial blocks with the mask, the others without."""
    if lists.has_partial:
        state = lax.fori_loop(first, jnp.minimum(partial, last), functools.partial(step, True), state)
    if lists.has_full:
        state = lax.fori_loop(jnp.maximum(first, partial), last, functools.partial(step, False), state)
    return state


@dataclasses.dataclass(frozen=True, eq=False)
class _Launch:
    """A kernel with the shapes of its results, to be called with its arrays."""

    name: str
    body: Callable[[Refs], None]
    programs: int
    given: tuple[str, ...]
    results: Refs
    tiling: _Tiling
    interpret: bool

    def __call__(self, *arrays: Array) -> list[Array]:
        from jax.experimental import pallas as pl
        from jax.experimental.pallas import triton as plt

        def kernel(*refs: Any) -> None:
            self.body(dict(zip((*self.given, *self.results), refs, strict=True)))

        kernel.__name__ = self.name  # what profiles show
        return pl.pallas_call(
            kernel,
            grid=(self.programs,),
            out_shape=list(self.results.values()),
            compiler_params=plt.CompilerParams(num_warps=self.tiling.warps, num_stages=self.tiling.stages),
            interpret=self.interpret,
            name=self.name,
        )(*arrays)


# A primitive of its own, so that something can be done while the kernel is lowered.
_kernel_p = Primitive("attnjax_triton")
_kernel_p.multiple_results = True
_kernel_p.def_abstract_eval(
    lambda *_, launch: [jax.core.ShapedArray(x.shape, x.dtype) for x in launch.results.values()]
)


def _lower(ctx: Any, *arrays: Any, launch: _Launch) -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(launch, multiple_results=True)(ctx, *arrays)


mlir.register_lowering(_kernel_p, _lower, platform="cuda")
