"""implementation="triton": kernels for NVIDIA GPUs in Pallas on Triton, forward and backward; none for other devices.

A program of the forward, and of the gradient of the queries, owns a block of queries and goes through the keys that it
visits; one of the gradients of keys and values owns a block of keys; one of the gradient of a bias a block of pairs.
Each is the only one that writes what it owns, so results are the same to the last bit. Masks and scores are run on
tiles by `core.split`. How large the blocks are is decided in `tuning`.
"""

from __future__ import annotations

import contextlib
import copy
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
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import mlir

from attnjax.core.checks import number_of
from attnjax.core.devices import gpus
from attnjax.core.parts import Chunks, Parts, Refs
from attnjax.core.program import Problem
from attnjax.core.residual import NotSplittable
from attnjax.core.softmax import Rows, add_sinks, finite, inverse, merge_rows, row_delta, sink_gradient
from attnjax.core.split import Split, member_of, summed, widened
from attnjax.core.view import power, taint, unit
from attnjax.core.visits import Kinds, Lists
from attnjax.tuning import LEAST, Blocks, Tiling, choose_tiling, compiled_for, heads_together, key_splits, power_of_two

Array = jax.Array

PARTS = ("forward", "backward")
_MOST_SIZE = 256  # of heads: more does not fit into the registers of a block
_MOST_TOGETHER = 128  # the same, of the gradients of key and value in one kernel
LACKS = frozenset(("erf", "round"))  # elementwise operations that JAX has no Triton for


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
            number = number_of(value)
            if isinstance(number, int) and number in allowed:
                object.__setattr__(self, field.name, number)
            elif value is not None:
                shown = f"from 1 to {allowed[-1]}" if isinstance(allowed, range) else f"one of {list(allowed)}"
                raise ValueError(f"Config: {field.name} must be {shown} or None, got {value!r}.")


_BLOCKS = (16, 32, 64, 128, 256)


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
    if max(problem.head_size, problem.value_size) > _MOST_SIZE:
        return f"takes head sizes up to {_MOST_SIZE}"
    gpu = compiled_for()
    if platform == "cuda" and (0, 0) < gpu.capability < (8, 0):
        return f"runs on Ampere and later (compute capability 8.0), not on {gpu.name}"
    sizes, given = problem.sizes, problem.blocks or (LEAST, LEAST)
    for block, length in zip(given, (sizes.query_length, sizes.key_length), strict=True):
        if block < length and block % LEAST:
            return f"block_map has blocks of {given[0]} x {given[1]}, its own are multiples of {LEAST}"
    return _unsupported_pieces(problem, operands)


def _unsupported_pieces(problem: Problem, operands: list[Any]) -> str | None:
    try:
        pieces = Split.described(problem, operands)
    except NotSplittable as reason:
        return f"cannot run this mask or score on its tiles: {reason}"
    if reason := pieces.lacking(LACKS, "Triton"):
        return reason
    bytes_ = (math.prod(x.shape) for x in pieces.arrays if np.dtype(x.dtype).itemsize == 1)
    return "takes masks of at most 2^31 booleans" if max(bytes_, default=0) > 2**31 else None


def gradients(problem: Problem, operands: list[Any]) -> tuple[int, ...]:
    """Positions of the operands whose gradients `backward` can give: not of those that make a score by distance.

    A tile would add to every diagonal that it crosses, as would others, in no fixed order.
    """
    pieces = Split.described(problem, operands).pieces
    diagonal = {i for piece in pieces if piece.by_distance for i in piece.sources}
    return tuple(i for i in problem.differentiable if i not in diagonal)


def blocks(problem: Problem, platform: str) -> Blocks:
    """The tiles of the forward."""
    tiling = choose_tiling(problem, "forward", compiled_for())
    return Blocks(*(problem.blocks or (tiling.block_q, tiling.block_k)), (1,) * len(problem.sizes.batch), 1)


def temporary_bytes(problem: Problem, operands: list[Any], platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results."""
    rows = math.prod(problem.out_shapes()[1]) * problem.accumulate.itemsize
    gpu = compiled_for()
    splits = key_splits(problem, choose_tiling(problem, "forward", gpu), gpu)
    return {"forward": rows * (problem.value_size + 2) * splits if splits > 1 else 0, "backward": 2 * rows}


def settings(problem: Problem, platform: str) -> dict[str, list[str]]:
    """The sizes of the kernels by part, and what had to be smaller than usual or asked for, for `explain`."""
    gpu = compiled_for()
    forward, *others = (choose_tiling(problem, kernel, gpu) for kernel in ("forward", "query", "key"))
    splits = key_splits(problem, forward, gpu)
    more = f", {splits} programs for the keys of a tile" if splits > 1 else ""
    names = ("gradient of query", "gradients of key and value")
    return {
        "forward": [f"forward: {forward}{more}"],
        "backward": [f"{name}: {tiling}" for name, tiling in zip(names, others, strict=True)],
    }


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    out_shape, row_shape = problem.out_shapes()
    sinks = problem.program.sinks_of(operands)
    call = _Call(problem, operands, "forward")
    splits = call.splits
    kept = problem.dtype if splits == 1 else problem.accumulate
    flat = lambda shape: (splits * call.entries, *shape[len(call.batch) :])
    results = {"out": jax.ShapeDtypeStruct(flat(out_shape), kept)}
    results |= {name: jax.ShapeDtypeStruct(flat(row_shape), problem.accumulate) for name in ("highest", "total")}
    block_q = call.tiling.block_q if call.together == 1 else problem.sizes.query_length
    lists = call.lists(block_q, call.tiling.block_k, group=call.together)
    programs = lists.rows * (call.sizes.heads // call.together) * call.entries * splits
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
    scores = {i: shape for i, shape in shapes.items() if i in program.score_positions()}
    call = _Call(problem, widened(operands, scores, len(problem.sizes.batch)), "backward")
    call.take_rows(rows, delta, ct_out)
    own, of_pieces = _gradients(call, shapes, call.split.wanted(tuple(scores)))
    made |= own | call.split.pulled(of_pieces, tuple(scores))
    return [made[i] for i, _ in wanted]


def _gradients(
    call: _Call, shapes: dict[int, tuple[int, ...]], pieces: tuple[int, ...]
) -> tuple[dict[int, Array], dict[int, Array]]:
    """Gradients of those of query, key and value that are wanted, and of the pieces. A kernel of no use is not run."""
    problem, sizes, entries, known = call.problem, call.sizes, call.entries, call.split.pieces
    pairs = [n for n in pieces if known[n].queries and known[n].keys]
    by_key = [n for n in pieces if known[n].keys and n not in pairs]
    by_query = [n for n in pieces if n not in (*pairs, *by_key)]
    queries, keys = (entries, sizes.query_length, sizes.heads), (entries, sizes.key_length, sizes.key_heads)
    first = {0: (*queries, problem.head_size), 1: (*keys, problem.head_size), 2: (*keys, problem.value_size)}
    by_row = (entries, sizes.heads, sizes.query_length, 1), (entries, sizes.heads, 1, sizes.key_length)
    made: dict[str, Array] = {}
    # Large heads leave no registers for the gradients of key and value at once: then two kernels give them.
    both = power_of_two(max(problem.head_size, problem.value_size)) <= _MOST_TOGETHER
    for side, body, heads, own, rest, shape in (
        ("query", _backward_query, sizes.heads, (0,), by_query, by_row[0]),
        ("key", _backward_key, sizes.key_heads, (1, 2) if both else (1,), by_key, by_row[1]),
        ("value", _backward_key, sizes.key_heads, () if both else (2,), [], by_row[1]),
    ):
        results = {f"d_{i}": first[i] for i in own if i in shapes} | {f"d_piece{n}": shape for n in rest}
        if results:
            made |= _run(call, side, body, heads, results, rest)
    for n in pairs:
        made |= _run_pairs(call, n)
    apart = lambda x: x.reshape(*call.batch, *x.shape[1:])
    return (
        {i: summed(apart(made[f"d_{i}"]), shapes[i]) for i in first if i in shapes},
        {n: made[f"d_piece{n}"] for n in pieces},
    )


def _run(
    call: _Call, side: str, body: Any, heads: int, results: dict[str, tuple[int, ...]], pieces: list[int]
) -> dict[str, Array]:
    call = call.tiled(side)
    lists = call.lists(call.tiling.block_q, call.tiling.block_k, by_key=side != "query")
    shapes = {name: jax.ShapeDtypeStruct(shape, call.problem.accumulate) for name, shape in results.items()}
    programs = lists.rows * heads * call.entries
    made = call.run(side, lambda refs: body(call, lists, refs, pieces), programs, lists.given, shapes)
    return dict(zip(results, made, strict=True))


def _run_pairs(call: _Call, n: int) -> dict[str, Array]:
    call = call.tiled("pairs")
    shape, block_q, block_k = call.split.arrays[n].shape, call.tiling.block_q, call.tiling.block_k
    kinds, results = call.kinds(block_q, block_k), {f"d_piece{n}": jax.ShapeDtypeStruct(shape, call.problem.accumulate)}
    programs = -(-shape[2] // block_q) * -(-shape[3] // block_k) * shape[0] * shape[1]
    body = lambda refs: _backward_pairs(call, kinds, refs, n)
    return dict(zip(results, call.run("pairs", body, programs, kinds.given, results), strict=True))


class _Call(Parts):
    """A call: its arrays, the sizes of its tiles, and how it is run.

    Attributes:
      config: as the user gave it.
      tiling: the sizes of the kernel that is made.
      together, splits: so many heads share a tile of the forward, so many programs its keys.
    """

    def __init__(self, problem: Problem, operands: list[Array], part: str):
        super().__init__(problem, operands, _load, _store)
        self.config, self.gpu = problem.config or Config(), compiled_for()
        self.tiling = choose_tiling(problem, "forward", self.gpu)
        self.together, self.splits = 1, 1
        if part == "forward":
            self.together, self.splits = heads_together(problem), key_splits(problem, self.tiling, self.gpu)

    def tiled(self, kernel: str) -> _Call:
        """A copy with the sizes of another kernel: bodies run later, when programs are lowered."""
        made = copy.copy(self)
        made.tiling = choose_tiling(self.problem, kernel, self.gpu)
        return made

    def run(self, name: str, body: Callable[[Refs], None], programs: int, more: Refs, results: Refs) -> list[Array]:
        """Runs a kernel: so many programs, each of which is given all arrays by name."""
        given, own = self.given | more, (results, self.tiling, self.config.interpret)
        launch = _Launch(f"attnjax_{name}", body, programs, tuple(given), *own)
        return list(launch(*given.values()) if launch.interpret else _kernel_p.bind(*given.values(), launch=launch))

    def dot(self, x: Array, y: Array, across: tuple[int, int]) -> Array:
        """The product over these axes, in float32."""
        exact: Any = lax.Precision.HIGHEST if self.config.interpret else lax.DotAlgorithmPreset.TF32_TF32_F32_X3
        precision = exact if self.problem.dtype == "float32" and not self.config.tf32 else lax.Precision.DEFAULT
        dimensions = (((across[0],), (across[1],)), ((), ()))
        return lax.dot_general(x, y, dimensions, precision=precision, preferred_element_type=jnp.float32)

    def inner(self, x: Chunks, y: Chunks) -> Array:
        """Every row of x times every row of y: [rows of x, rows of y]."""
        made = self.dot(x[0], y[0], (1, 1))
        for one, other in zip(x[1:], y[1:], strict=True):
            made = made + self.dot(one, other, (1, 1))
        return made

    def add(self, chunks: Chunks, pairs: Array, rows: Chunks, over: int = 1) -> Chunks:
        """Adds the sums of rows, weighted by pairs, over this axis of the pairs."""
        weights = pairs.astype(rows[0].dtype)
        return tuple(x + self.dot(weights, y, (over, 0)) for x, y in zip(chunks, rows, strict=True))

    def held(self, load: Callable[[], Chunks]) -> Callable[[], Chunks]:
        """What is loaded once for a loop; chunks are loaded anew for every tile, because registers cannot hold them."""
        if self.chunked:
            return load
        found = load()
        return lambda: found


def _load(ref: Any, index: tuple[Any, ...], inside: Any) -> Array:
    """Loads single elements at index arrays that broadcast together; 0 where they are not `inside`."""
    from jax.experimental.pallas import triton as plt

    shape = np.broadcast_shapes(*(np.shape(i) for i in index), () if inside is None else inside.shape)
    index = tuple(i if np.ndim(i) == 0 else jnp.broadcast_to(i, shape) for i in index)
    if not any(map(np.ndim, index)):
        return jnp.full(shape, ref[index])
    if inside is None:
        return plt.load(ref.at[index])
    return plt.load(ref.at[index], mask=jnp.broadcast_to(inside, shape), other=jnp.zeros((), ref.dtype))


def _store(ref: Any, index: tuple[Any, ...], value: Array, inside: Array) -> None:
    """Stores single elements where they are `inside`."""
    from jax.experimental.pallas import triton as plt

    index = tuple(i if np.ndim(i) == 0 else jnp.broadcast_to(i, value.shape) for i in index)
    plt.store(ref.at[index], value.astype(ref.dtype), mask=jnp.broadcast_to(inside, value.shape))


def _forward(call: _Call, lists: Lists, refs: Refs) -> None:
    """Attention of a block of queries: all of their keys, or a part of them."""
    sizes, tiling, splits = call.sizes, call.tiling, call.splits
    split, row, group, b = _place(splits, lists.rows, sizes.heads // call.together)
    q, h = _query_rows(call, row, group)
    kv = group if call.together > 1 else lax.div(h, np.int32(sizes.group))
    whole = sizes.query_length % tiling.block_q == 0 and call.together == 1
    query = call.held(lambda: call.rows(refs, "query", b, q, h, None if whole else sizes.query_length))
    known = call.before(refs, b, h, q, None)
    partial, visited, block_of = lists.of(refs, b, group, row)
    share = lax.div(visited + np.int32(splits - 1), np.int32(splits))
    first, last = (np.int32(0), visited) if splits == 1 else (split * share, jnp.minimum(visited, (split + 1) * share))

    def step(masked: bool, place: Any, state: Any) -> Any:
        out, highest, total = state
        start, end = block_of(place, masked) * tiling.block_k, sizes.key_length if masked else None
        k, columns = _both(start, tiling.block_k)
        key, value = (call.rows(refs, name, b, columns, kv, end) for name in ("key", "value"))
        spoilt = taint(value) if masked else None
        view = call.view(refs, (b, h), q, k, call.inner(query(), key), masked, known, spoilt)
        new = jnp.maximum(highest, view.logits.max(1, keepdims=True))
        safe = finite(new)
        shrink, weights = (power(call.problem, x - safe) for x in (highest, view.logits))
        out = call.add(tuple(x * shrink for x in out), view.drop(weights), view.finite(value))
        return out, new, total * shrink + weights.sum(1, keepdims=True)

    zeros = jnp.zeros(q.shape, jnp.float32)
    state = (call.zeros("value", q.shape[0]), jnp.full(q.shape, -jnp.inf, jnp.float32), zeros)
    state = _loops(lists, first, partial, last, step, state)
    _finish(call, refs, split * call.entries + b, b, q, h, state)


def _finish(call: _Call, refs: Refs, at: Any, b: Any, q: Array, h: Any, state: Any) -> None:
    """Writes the rows of a block. `highest` is divided by `unit` again, and `total` goes with what it is rounded to."""
    (out, highest, total), own = state, unit(call.problem)
    if call.split.sinks is not None and call.splits == 1:
        sink = call.piece(refs, call.split.sinks, b, h, q, q).astype(jnp.float32) * own
        most = jnp.maximum(highest, sink)
        shrink = power(call.problem, highest - finite(most))
        total, highest = total * shrink + power(call.problem, sink - finite(most)), most
        out = tuple(x * shrink for x in out)
    natural = highest * (1 / own)
    rounded = power(call.problem, jnp.where(highest == -jnp.inf, 0.0, highest - finite(natural) * own))
    factor = inverse(total) if call.splits == 1 else rounded
    inside = q < call.sizes.query_length
    call.store_rows(refs["out"], at, q, h, tuple(x * factor for x in out), inside)
    _store(refs["highest"], (at, q, h), natural, inside)
    _store(refs["total"], (at, q, h), total * rounded, inside)


def _backward_query(call: _Call, lists: Lists, refs: Refs, wanted: list[int]) -> None:
    """Gradients of a block of queries, and of pieces by query."""
    sizes, tiling = call.sizes, call.tiling
    row, h, b = _place(lists.rows, sizes.heads)
    _, q = _both(row * tiling.block_q, tiling.block_q)
    kv = lax.div(h, np.int32(sizes.group))
    limit = None if sizes.query_length % tiling.block_q == 0 else sizes.query_length
    query = call.held(lambda: call.rows(refs, "query", b, q, h, limit))
    ct_out = call.held(lambda: call.cotangents(refs, b, q, h, limit))
    highest, delta = (call.row_values(refs, name, b, q, h) for name in ("highest", "delta"))
    known = call.before(refs, b, h, q, None)
    known |= {n: jnp.broadcast_to(known[n], q.shape) for n in wanted}
    partial, visited, block_of = lists.of(refs, b, h, row)

    def step(masked: bool, place: Any, state: Any) -> Any:
        d_query, d_pieces = state
        start, end = block_of(place, masked) * tiling.block_k, sizes.key_length if masked else None
        k, columns = _both(start, tiling.block_k)
        key = call.rows(refs, "key", b, columns, kv, end)
        value = call.rows(refs, "value", b, columns, kv, end)
        view = call.view(refs, (b, h), q, k, call.inner(query(), key), masked, known)
        weights = power(call.problem, view.logits - highest)
        d_weights = view.drop(call.inner(ct_out(), value))
        d_raw, more = view.pulled(weights * (d_weights - delta), wanted)
        if d_query:
            d_query = call.add(d_query, d_raw, view.finite(key))
        return d_query, tuple(d + one.astype(jnp.float32) for d, one in zip(d_pieces, more, strict=True))

    d_pieces = tuple(jnp.zeros(q.shape, jnp.float32) for _ in wanted)
    state = (call.zeros("query", tiling.block_q) if "d_0" in refs else (), d_pieces)
    d_query, d_pieces = _loops(lists, np.int32(0), partial, visited, step, state)
    inside = q < sizes.query_length
    if d_query:
        call.store_rows(refs["d_0"], b, q, h, tuple(x * call.problem.program.scale for x in d_query), inside)
    for n, d in zip(wanted, d_pieces, strict=True):
        _store(refs[f"d_piece{n}"], (b, h, q, 0), d, inside)


def _backward_key(call: _Call, lists: Lists, refs: Refs, wanted: list[int]) -> None:
    """Gradients of a block of keys and values, over all heads of their group, and of pieces by key."""
    sizes, tiling = call.sizes, call.tiling
    row, kv, b = _place(lists.rows, sizes.key_heads)
    across, columns = _both(row * tiling.block_k, tiling.block_k)
    k = across if tiling.upright else columns
    limit = None if sizes.key_length % tiling.block_k == 0 else sizes.key_length
    key = call.held(lambda: call.rows(refs, "key", b, columns, kv, limit))
    value = call.held(lambda: call.rows(refs, "value", b, columns, kv, limit))
    product = lambda x, y: call.inner(x, y) if tiling.upright else call.inner(y, x)
    over = 0 if tiling.upright else 1

    def step(masked: bool, place: Any, state: Any, block_of: Any, h: Any, known: Any) -> Any:
        d_key, d_value, d_pieces = state
        start, end = block_of(place, masked) * tiling.block_q, sizes.query_length if masked else None
        across, rows = _both(start, tiling.block_q)
        q = rows if tiling.upright else across
        query = call.rows(refs, "query", b, rows, h, end)
        view = call.view(refs, (b, h), q, k, product(query, key()), masked, known)
        highest, delta = (call.row_values(refs, name, b, q, h) for name in ("highest", "delta"))
        weights = view.hidden(power(call.problem, view.logits - highest), 0.0)
        ct_out = view.finite(call.cotangents(refs, b, rows, h, end))
        if d_value:
            d_value = call.add(d_value, view.drop(weights), ct_out, over)
        if d_key or wanted:
            d_weights = view.drop(product(ct_out, value()))
            d_raw, more = view.pulled(weights * (d_weights - delta), wanted)
            d_pieces = tuple(d + one.astype(jnp.float32) for d, one in zip(d_pieces, more, strict=True))
            if d_key:
                d_key = call.add(d_key, d_raw, view.finite(query), over)
        return d_key, d_value, d_pieces

    def head(n: Any, state: Any) -> Any:
        h = kv * np.int32(sizes.group) + n
        known = call.before(refs, b, h, None, k)
        known |= {n: jnp.broadcast_to(known[n], k.shape) for n in wanted}
        partial, visited, block_of = lists.of(refs, b, h, row)
        one = functools.partial(step, block_of=block_of, h=h, known=known)
        state = (*state, tuple(jnp.zeros(k.shape, jnp.float32) for _ in wanted))
        *state, d_pieces = _loops(lists, np.int32(0), partial, visited, one, state)
        for n, d in zip(wanted, d_pieces, strict=True):
            _store(refs[f"d_piece{n}"], (b, h, 0, k), d, k < sizes.key_length)
        return tuple(state)

    names = (("d_1", "key"), ("d_2", "value"))
    state = tuple(call.zeros(name, tiling.block_k) if d_name in refs else () for d_name, name in names)
    heads = np.int32(sizes.group)
    d_key, d_value = lax.fori_loop(np.int32(0), heads, head, state) if sizes.group > 1 else head(heads - 1, state)
    inside = columns < sizes.key_length
    if d_key:
        call.store_rows(refs["d_1"], b, columns, kv, tuple(x * call.problem.program.scale for x in d_key), inside)
    if d_value:
        call.store_rows(refs["d_2"], b, columns, kv, d_value, inside)


def _backward_pairs(call: _Call, kinds: Kinds, refs: Refs, n: int) -> None:
    """The gradient of a piece by query and key at a block of pairs, over all batch entries and heads that share it."""
    sizes, tiling, piece = call.sizes, call.tiling, call.split.pieces[n]
    entries, heads = call.split.arrays[n].shape[:2]
    down, across = -(-sizes.query_length // tiling.block_q), -(-sizes.key_length // tiling.block_k)
    j, i, own_head, entry = _place(across, down, heads)
    k, columns = _both(j * tiling.block_k, tiling.block_k)
    _, q = _both(i * tiling.block_q, tiling.block_q)
    shared = np.int32(1 if piece.heads else sizes.heads)

    def visit(b: Any, h: Any, gradient: Array) -> Array:
        kv = lax.div(h, np.int32(sizes.group))
        query = call.rows(refs, "query", b, q, h, sizes.query_length)
        key = call.rows(refs, "key", b, columns, kv, sizes.key_length)
        view = call.view(refs, (b, h), q, k, call.inner(query, key), True, {})
        highest, delta = (call.row_values(refs, name, b, q, h) for name in ("highest", "delta"))
        ct_out = call.cotangents(refs, b, q, h, sizes.query_length)
        value = call.rows(refs, "value", b, columns, kv, sizes.key_length)
        d_weights = view.drop(call.inner(ct_out, value))
        weights = power(call.problem, view.logits - highest)
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
    _store(refs[f"d_piece{n}"], (entry, own_head, q, k), gradient, (q < sizes.query_length) & (k < sizes.key_length))


def _place(*counts: int) -> tuple[Any, ...]:
    """The program's number as indices, the first the fastest; the last counts what is left."""
    from jax.experimental import pallas as pl

    left, found = pl.program_id(0), list[Any]([np.int32(0)] * len(counts))
    for n, count in enumerate(counts):
        if count > 1:
            left, found[n] = lax.div(left, np.int32(count)), lax.rem(left, np.int32(count))
    return *found, left


def _both(start: Any, size: int) -> tuple[Array, Array]:
    """So many indices from `start`, as a row and as a column."""
    return tuple(start + lax.broadcasted_iota(jnp.int32, shape, a) for shape, a in (((1, size), 1), ((size, 1), 0)))


def _query_rows(call: _Call, row: Any, group: Any) -> tuple[Array, Any]:
    """Queries and heads of the rows of a tile of the forward."""
    sizes, together = call.sizes, call.together
    if together == 1:
        return _both(row * call.tiling.block_q, call.tiling.block_q)[1], group
    number = lax.broadcasted_iota(jnp.int32, (power_of_two(sizes.query_length * together), 1), 0)
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
    tiling: Tiling
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
_kernel_p.def_abstract_eval(lambda *_, launch: [ShapedArray(x.shape, x.dtype) for x in launch.results.values()])


def _lower(ctx: Any, *arrays: Any, launch: _Launch) -> Any:
    with warnings.catch_warnings(), contextlib.nullcontext() if gpus() else _some_gpu():
        warnings.filterwarnings("ignore", "The Pallas Triton backend is deprecated", DeprecationWarning)
        return mlir.lower_fun(launch, multiple_results=True)(ctx, *arrays)


def _some_gpu() -> contextlib.AbstractContextManager[Any]:
    """Tells JAX of a GPU where none is known, as it asks from 0.11 on; 0.10 takes the same for granted."""
    device = jax.sharding.AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    return jax.sharding.use_abstract_mesh(jax.sharding.AbstractMesh((), (), abstract_device=device))


mlir.register_lowering(_kernel_p, _lower, platform="cuda")
