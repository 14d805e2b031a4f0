"""implementation="mosaic_tpu": flash attention for TPUs in Pallas, forward and backward; no other derivatives.

A kernel walks a list of tiles (`core.steps`), which lies in scalar memory: tiles that are full are computed without the
mask, empty ones are not in the list. Masks and scores come as small arrays and rules (`core.split`). Queries lie along
the sublanes of a tile, keys along its lanes; in the kernels that sum over queries it is the other way round, so that no
matrix product needs a tile transposed.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.program import Problem
from attnjax.core.residual import NotSplittable
from attnjax.core.softmax import Rows, finite, inverse, row_delta, sink_gradient
from attnjax.core.split import Piece, Split, entry_of, widened
from attnjax.core.steps import MOST_BLOCKS, Step, Steps, step_of, steps
from attnjax.core.tiles import Sizes
from attnjax.tuning import Blocks

Array = jax.Array

PARTS = ("forward", "backward")
_LANES = 128
_PARTIAL, _FULL = 1, 2  # kinds of tiles
_LOWEST = -0.7 * float(np.finfo(np.float32).max)  # a maximum of nothing: finite, so that it can be subtracted
_LOG2E = math.log2(math.e)
_MOST_SIZE = 256  # of heads
_MOST_SCALARS = 2**19  # bytes of scalar memory, of about 1 MiB
_MOST_VMEM = 14 * 2**20  # bytes of vector memory that tiles may take, of 16 MiB


@dataclasses.dataclass(frozen=True)
class Config:
    """How the kernels run. `None` chooses.

    Attributes:
      block_q, block_k: queries and keys of a tile of the forward, multiples of 128.
      backward_block_q, backward_block_k: the same of the backward; default: those of the forward, where they are given.
      interpret: run as plain JAX, on any device, for tests; or a `pltpu.InterpretParams`, which can look for races.
    """

    block_q: int | None = None
    block_k: int | None = None
    backward_block_q: int | None = None
    backward_block_k: int | None = None
    interpret: Any = False

    def __post_init__(self) -> None:
        least = 8 if self.interpret else _LANES
        for name in ("block_q", "block_k", "backward_block_q", "backward_block_k"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1 or value % least):
                raise ValueError(f"Config: {name} must be a multiple of {least} or None, got {value!r}.")


def unsupported(problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """A reason why this implementation cannot take a part of the problem, or `None`."""
    config, sizes = problem.config, problem.sizes
    if config is not None and not isinstance(config, Config):
        return "config is not one of mosaic_tpu"
    if platform != "tpu" and not (config and config.interpret):
        return f"runs on TPUs only, not on {platform}"
    if part not in PARTS:
        return "has forward and backward; other derivatives are those of the tiled code"
    if problem.dtype not in ("float32", "bfloat16"):
        return f"takes float32 and bfloat16, not {problem.dtype}"
    if max(problem.head_size, problem.value_size) > _MOST_SIZE:
        return f"takes head sizes up to {_MOST_SIZE}"
    if not _pairs(problem):
        return None
    block_q, block_k = _tiles(problem, part)
    least = 1 if config and config.interpret else _LANES
    if block_q % least or block_k % least:
        return f"block_map has blocks of {block_q} x {block_k}; its own are multiples of {_LANES}"
    if max(-(-sizes.query_length // block_q), -(-sizes.key_length // block_k)) > MOST_BLOCKS:
        return f"counts up to {MOST_BLOCKS} blocks"
    return _unsupported_pieces(problem, operands, block_q, block_k)


def _unsupported_pieces(problem: Problem, operands: list[Any], block_q: int, block_k: int) -> str | None:
    found: list[Any] = []

    def arrays(operands: list[Any]) -> None:
        found.append(Split(problem, operands))
        for by_key in (False, True):
            found.append(steps(problem, operands, block_q, block_k, by_key=by_key).numbers)

    try:
        jax.eval_shape(arrays, list(operands))
    except NotSplittable as reason:
        return f"cannot run this mask or score on its tiles: {reason}"
    split, *numbers = found
    wide = [piece.dtype for piece in split.pieces if np.dtype(piece.dtype).itemsize > 4]
    if wide:
        return f"takes masks and scores of at most 32 bits, not {wide[0]}"
    if any(piece.by_distance for piece in split.pieces) and max(block_q, block_k) % min(block_q, block_k):
        return "takes scores by distance where one side of its tiles is a multiple of the other"
    scalars = sum(math.prod(a.shape) for a in split.arrays if a.shape[2:] == (1, 1))
    needed = 4 * (scalars + max(math.prod(one.shape) for one in numbers))
    if needed > _MOST_SCALARS:
        return f"would need {needed // 1024} KiB of scalar memory for its tiles, more than {_MOST_SCALARS // 1024} KiB"
    return None


def gradients(problem: Problem, operands: list[Any]) -> tuple[int, ...]:
    """Positions of the operands whose gradients `backward` can give: all but tables of distances."""
    by_distance: set[int] = set()

    def look(operands: list[Any]) -> None:
        by_distance.update(i for piece in Split(problem, operands).pieces if piece.by_distance for i in piece.sources)

    jax.eval_shape(look, list(operands))
    return tuple(i for i in problem.differentiable if i not in by_distance)


def blocks(problem: Problem, platform: str) -> Blocks:
    """The tiles of the forward."""
    return Blocks(*_tiles(problem, "forward"), (1,) * len(problem.sizes.batch), 1)


def temporary_bytes(problem: Problem, platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results: heads first, and rows."""
    sizes, item = problem.sizes, np.dtype(problem.dtype).itemsize
    batch = math.prod(sizes.batch)
    queries, keys = batch * sizes.query_length * sizes.heads, batch * sizes.key_length * sizes.key_heads
    both = problem.head_size + problem.value_size
    forward = item * both * (queries + keys) + 32 * queries
    return {"forward": forward, "backward": forward + 4 * (problem.head_size * queries + both * keys) + 64 * queries}


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    program, sizes = problem.program, problem.sizes
    out_shape, row_shape = problem.out_shapes()
    if not _pairs(problem):
        rows = Rows(jnp.zeros(out_shape, problem.dtype), jnp.full(row_shape, -jnp.inf), jnp.zeros(row_shape))
        if program.sinks and math.prod(row_shape):
            sinks = operands[3].astype(jnp.float32)[..., None, :]
            rows = rows._replace(highest=jnp.broadcast_to(sinks, row_shape), total=jnp.ones(row_shape))
        return rows
    block_q, block_k = tiles = _tiles(problem, "forward")
    split = Split(problem, operands)
    loop = _Loop(problem, split, tiles, "query", steps(problem, operands, *tiles))
    lead = (math.prod(sizes.batch), sizes.heads)
    out, numbers = loop.call(
        "attention_forward",
        _forward,
        [_head_first(problem, operands, i) for i in range(3)],
        [
            (jax.ShapeDtypeStruct((*lead, sizes.query_length, problem.value_size), problem.dtype), sizes.batch, "ht."),
            (jax.ShapeDtypeStruct((*lead, 2, sizes.query_length), jnp.float32), sizes.batch, "h.t"),
        ],
        [(block_q, problem.value_size), (block_q, _LANES), (block_q, _LANES)],
    )
    return Rows(_head_last(problem, out), *(_head_last(problem, numbers[:, :, n]) for n in range(2)))


def _forward(here: _Here, q: Any, k: Any, v: Any, out: Any, rows: Any, summed: Any, top: Any, total: Any) -> None:
    """The online softmax of a row of tiles. `top` and `total` hold the same number in all lanes."""
    loop = here.loop

    @here.begin
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)
        start = jnp.full(top.shape, _LOWEST, jnp.float32)
        if loop.split.sinks is not None:
            sink = here.scalar(loop.split.sinks)
            start = jnp.maximum(start, sink)
            total[...] = jnp.exp(sink - start)
        else:
            total[...] = jnp.zeros_like(total)
        top[...] = start

    @here.visit
    def _(tile: _Tile) -> None:
        logits = tile.logits(q[...], k[...])
        before = top[...]
        highest = jnp.maximum(before, logits.max(1, keepdims=True))
        weights = loop.exp(logits - _wide(highest, logits.shape[1]))
        shrink = loop.exp(before - highest)
        top[...] = highest
        total[...] = shrink * total[...] + weights.sum(1, keepdims=True)
        values = tile.seen(v[...], weights)
        more = _dot(tile.pairs.drop(weights).astype(values.dtype), values, 1, 0)
        summed[...] = _wide(shrink, summed.shape[1]) * summed[...] + more

    @here.end
    def _() -> None:
        empty = total[...] == 0
        share = 1 / jnp.where(empty, 1.0, total[...])
        out[...] = (summed[...] * _wide(share, summed.shape[1])).astype(out.dtype)
        highest = jnp.where(empty, -jnp.inf, top[...] * loop.factor)
        lane = lax.broadcasted_iota(jnp.int32, top.shape, 1)
        rows[...] = jnp.where(lane == 0, highest, total[...]).T[:2]


def backward(
    problem: Problem,
    operands: list[Array],
    rows: Rows,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[tuple[int, tuple[int, ...]], ...],
) -> list[Array]:
    """Gradients of the operands in `wanted`: pairs of position and shape (batch axes of size 1 are summed over)."""
    shapes, program = dict(wanted), problem.program
    delta = row_delta(rows, ct_out, ct_lse)
    made = {}
    if program.sinks and 3 in shapes:
        made[3] = sink_gradient(operands[3], rows, delta, shapes[3])
    inner = [i for i in shapes if i not in made]
    if not _pairs(problem):
        made |= {i: jnp.zeros(shapes[i], jnp.float32) for i in inner}
    elif inner:
        made |= _Backward(problem, operands, rows, delta, ct_out, {i: shapes[i] for i in inner}).made
    return [made[i] for i, _ in wanted]


class _Backward:
    """The kernels of a backward: one by query, one by key, and one for every piece that has both axes."""

    def __init__(
        self, problem: Problem, operands: list[Array], rows: Rows, delta: Array, ct_out: Array, shapes: dict[int, Any]
    ):
        self.problem, self.operands, self.shapes = problem, operands, shapes
        sizes = problem.sizes
        self.batch = sizes.batch
        self.blocks = _tiles(problem, "backward")
        scores = {i: shape for i, shape in shapes.items() if i > 2}
        self.split = Split(problem, widened(operands, scores, len(self.batch)))
        self.pieces = self.split.wanted(tuple(scores))
        share = inverse(rows.total)
        ct_out = (ct_out.astype(jnp.float32) * share[..., None]).astype(problem.dtype)
        tops = finite(rows.highest) / _factor(problem)
        # What the last block has too much must be numbers: they are of queries that nobody sees.
        short = [(0, 0)] * (len(self.batch) + 2) + [(0, -sizes.query_length % self.blocks[0])]
        per_row = jnp.pad(jnp.stack([tops, delta * share], -1).swapaxes(-3, -1).swapaxes(-3, -2), short)
        self.inputs = [_head_first(problem, operands, i) for i in range(3)]
        self.inputs += [(_merged(ct_out.swapaxes(-3, -2), self.batch), self.batch, "ht.")]
        self.inputs += [(_merged(per_row, self.batch), self.batch, "h.t")]
        self.made = self._by_query() | self._by_key()
        of_pieces = self.per_query | self.per_key | {n: self._by_pair(n) for n in self.pieces if self._both(n)}
        self.made |= self.split.pulled(of_pieces, tuple(scores)) if scores else {}

    def _both(self, n: int) -> bool:
        return self.split.pieces[n].queries and self.split.pieces[n].keys

    def _loop(self, order: str, **options: Any) -> _Loop:
        made = steps(self.problem, self.operands, *self.blocks, by_key=order == "key", every=order == "pair")
        return _Loop(self.problem, self.split, self.blocks, order, made, **options)

    def _by_query(self) -> dict[int, Array]:
        """The gradient of the queries, and of pieces that have no axis of keys (`per_query`)."""
        problem, sizes = self.problem, self.problem.sizes
        pieces = [n for n in self.pieces if not self.split.pieces[n].keys]
        self.per_query: dict[int, Array] = {}
        if 0 not in self.shapes and not pieces:
            return {}
        block_q = self.blocks[0]
        lead = (math.prod(self.batch), sizes.heads)
        d_q, *per_query = self._loop("query", wanted=pieces, by_row=2).call(
            "attention_backward_queries",
            _queries,
            self.inputs,
            [
                (jax.ShapeDtypeStruct((*lead, sizes.query_length, problem.head_size), jnp.float32), self.batch, "ht."),
                *[(jax.ShapeDtypeStruct((*lead, 1, sizes.query_length), jnp.float32), self.batch, "h.t")] * len(pieces),
            ],
            [(block_q, problem.head_size), *[(block_q, _LANES)] * len(pieces)],
        )
        self.per_query = {n: x[:, :, 0, :, None] for n, x in zip(pieces, per_query, strict=True)}
        return {0: _summed(_head_last(problem, d_q), self.shapes[0])} if 0 in self.shapes else {}

    def _by_key(self) -> dict[int, Array]:
        """The gradients of keys and values, and of pieces that have an axis of keys only (`per_key`)."""
        problem, sizes = self.problem, self.problem.sizes
        pieces = [n for n in self.pieces if self.split.pieces[n].keys and not self.split.pieces[n].queries]
        self.per_key: dict[int, Array] = {}
        if not (self.shapes.keys() & {1, 2} or pieces):
            return {}
        block_k, group = self.blocks[1], sizes.group
        lead = (math.prod(self.batch), sizes.key_heads)
        head_sizes = (problem.head_size, problem.value_size)
        d_k, d_v, *per_key = self._loop("key", wanted=pieces).call(
            "attention_backward_keys",
            _keys,
            self.inputs,
            [
                *[
                    (jax.ShapeDtypeStruct((*lead, sizes.key_length, size), jnp.float32), self.batch, "ks.")
                    for size in head_sizes
                ],
                *[(jax.ShapeDtypeStruct((*lead, group, sizes.key_length), jnp.float32), self.batch, "k.s")]
                * len(pieces),
            ],
            [*[(block_k, size) for size in head_sizes], *[(group, block_k)] * len(pieces)],
        )
        heads = (lead[0], sizes.heads, 1, sizes.key_length)
        self.per_key = {n: x.reshape(heads) for n, x in zip(pieces, per_key, strict=True)}
        made = {1: d_k, 2: d_v}
        return {i: _summed(_head_last(problem, made[i]), self.shapes[i]) for i in (1, 2) if i in self.shapes}

    def _by_pair(self, n: int) -> Array:
        """The gradient of a piece with both axes: each tile of it is summed over what shares it, and written once."""
        block_q, block_k = self.blocks
        piece, array = self.split.pieces[n], self.split.arrays[n]
        shape = jax.ShapeDtypeStruct(array.shape, jnp.float32)
        (made,) = self._loop("pair", wanted=[n], shared=piece).call(
            "attention_backward_pairs",
            _pair,
            self.inputs,
            [(shape, piece.lanes, "hts" if piece.heads else "1ts")],
            [(block_k, block_q)],
        )
        return made


def _queries(here: _Here, q: Any, k: Any, v: Any, ct_out: Any, rows: Any, d_q: Any, *refs: Any) -> None:
    """d q of a row of tiles, and the sums over keys of the gradients of pieces."""
    count = len(here.loop.wanted)
    sums, d_sum, d_sums = refs[:count], refs[count], refs[count + 1 :]

    @here.begin
    def _() -> None:
        for ref in (d_sum, *d_sums):
            ref[...] = jnp.zeros_like(ref)

    @here.visit
    def _(tile: _Tile) -> None:
        top, delta = (_wide(column[...], tile.shape[1]) for column in here.row_columns)
        weights, d_raw, d_values = tile.derived(q[...], k[...], v[...], ct_out[...], top, delta)
        keys = tile.seen(k[...], weights)
        d_sum[...] += _dot(d_raw.astype(keys.dtype), keys, 1, 0)
        for ref, d in zip(d_sums, d_values, strict=True):
            ref[...] += d.sum(1, keepdims=True)

    @here.end
    def _() -> None:
        d_q[...] = d_sum[...] * here.loop.problem.program.scale
        for out, ref in zip(sums, d_sums, strict=True):
            out[...] = ref[...].T[:1]


def _keys(here: _Here, q: Any, k: Any, v: Any, ct_out: Any, rows: Any, d_k: Any, d_v: Any, *refs: Any) -> None:
    """d k and d v of a row of tiles, of all heads that share them, and the sums over queries of gradients of pieces."""
    count = len(here.loop.wanted)
    sums, k_sum, v_sum, d_sums = refs[:count], refs[count], refs[count + 1], refs[count + 2 :]

    @here.begin
    def _() -> None:
        for ref in (k_sum, v_sum, *d_sums):
            ref[...] = jnp.zeros_like(ref)

    @here.visit
    def _(tile: _Tile) -> None:
        top, delta = rows[0:1], rows[1:2]
        weights, d_raw, d_values = tile.derived(q[...], k[...], v[...], ct_out[...], top, delta)
        queries, cotangents = tile.seen(q[...], weights), tile.seen(ct_out[...], weights)
        v_sum[...] += _dot(tile.pairs.drop(weights).astype(cotangents.dtype), cotangents, 1, 0)
        k_sum[...] += _dot(d_raw.astype(queries.dtype), queries, 1, 0)
        for ref, d in zip(d_sums, d_values, strict=True):
            # Sums along lanes as a row: a product with ones.
            row = _dot(jnp.ones((8, d.shape[1]), jnp.float32), d, 1, 1)[:1]
            ref[here.own_row] += row

    @here.end
    def _() -> None:
        d_k[...] = k_sum[...] * here.loop.problem.program.scale
        d_v[...] = v_sum[...]
        for out, ref in zip(sums, d_sums, strict=True):
            out[...] = ref[...]


def _pair(here: _Here, q: Any, k: Any, v: Any, ct_out: Any, rows: Any, out: Any, d_sum: Any) -> None:
    """The gradient of one tile of a piece, summed over the batch entries and heads that share it."""

    @here.begin
    def _() -> None:
        d_sum[...] = jnp.zeros_like(d_sum)

    @here.visit
    def _(tile: _Tile) -> None:
        _, _, (d,) = tile.derived(q[...], k[...], v[...], ct_out[...], rows[0:1], rows[1:2])
        d_sum[...] += d

    @here.end
    def _() -> None:
        out[...] = d_sum[...].T


class _Loop:
    """The grid of one kernel, and which part of each array a step of it loads.

    Attributes:
      order: what a row of tiles is: "query" (of one head), "key" (of all heads of a group), or "pair": each tile is
        alone, and visited by all batch entries and heads that share a piece.
      flipped: whether keys lie along sublanes.
      wanted: the pieces whose gradients are asked for.
      by_row: how many numbers per query are needed as columns; they are in the last input.
      shared: the piece, in the order "pair".
      factor: what logits are still to be multiplied with when the softmax sees them.
      kinds: of tiles that there may be.
    """

    def __init__(
        self,
        problem: Problem,
        split: Split,
        blocks: tuple[int, int],
        order: str,
        made: Steps,
        *,
        wanted: Sequence[int] = (),
        by_row: int = 0,
        shared: Piece | None = None,
    ):
        self.problem, self.split, (self.block_q, self.block_k) = problem, split, blocks
        self.order, self.steps, self.wanted, self.by_row, self.shared = order, made, wanted, by_row, shared
        self.flipped = order != "query"
        self.factor = _factor(problem)
        sizes = problem.sizes
        batch, count = math.prod(sizes.batch), made.numbers.shape[-1]
        self.grid: tuple[int, ...] = (batch, sizes.heads, count)
        if order == "key":
            self.grid = (batch, sizes.key_heads, count, sizes.group)
        if shared is not None:
            entries, heads = math.prod(shared.lanes), sizes.heads if shared.heads else 1
            self.grid = (entries, heads, count, batch // entries, sizes.heads // heads)
        found = step_of(made.numbers).kind if isinstance(made.numbers, np.ndarray) else np.arange(3)
        self.kinds = tuple(kind for kind in (_PARTIAL, _FULL) if (found == kind).any())

    def exp(self, x: Array) -> Array:
        """exp(factor x)."""
        return jnp.exp(x) if self.factor == 1 else jnp.exp2(x * (self.factor * _LOG2E))

    @property
    def shape(self) -> tuple[int, int]:
        """Of a tile."""
        return (self.block_k, self.block_q) if self.flipped else (self.block_q, self.block_k)

    def at(self, ids: Sequence[Any], numbers: Any) -> tuple[Any, Any, Step]:
        """The batch entry, the query head and the tile of a step."""
        sizes = self.problem.sizes
        b, h, t, *inner = ids
        if self.order == "key":
            h = h * sizes.group + inner[0]
        if self.shared is not None:
            b = _joined(self.shared.lanes, sizes.batch, b, inner[0])
            h = h if self.shared.heads else inner[1]
        return b, h, step_of(numbers[self.steps.place(sizes.batch, b, h) + t])

    def spec(self, array: Any, lanes: tuple[int, ...], axes: str) -> Any:
        """The part of an array `[entries, *axes]` that a step loads.

        Axes are h query heads, k key/value heads, t queries, s keys, w windows of distances, 1 of that size, . whole.
        """
        sizes = self.problem.sizes
        blocks = {"t": self.block_q, "s": self.block_k}
        block = (n if a == "." else blocks.get(a) for a, n in zip(axes, array.shape[1:], strict=True))

        def index(*args: Any) -> tuple[Any, ...]:
            b, h, step = self.at(args[:-1], args[-1])
            place: dict[str, Any] = {"h": h, "t": step.query, "s": step.key, "1": 0, ".": 0}
            place["k"] = h if sizes.group == 1 else lax.div(h, np.int32(sizes.group))
            place["w"] = _window(sizes.query_length, self.block_q, self.block_k, step)
            return (entry_of(lanes, sizes.batch, b), *(place[a] for a in axes))

        return _pallas().BlockSpec((None, *block), index)

    def piece(self, n: int) -> tuple[Array, tuple[int, ...], str | None]:
        """The array of a piece as the kernels load it, its lanes and axes; without axes it is in scalar memory."""
        piece, array = self.split.pieces[n], self.split.arrays[n]
        array = array.astype(_loaded(piece))
        head = "h" if piece.heads else "1"
        if piece.by_distance:
            windows = _windows(array, self.problem.sizes, self.block_q, self.block_k, self.flipped)
            return windows, piece.lanes, head + "w.."
        if piece.queries and piece.keys:
            return array, piece.lanes, head + "ts"
        if piece.queries or piece.keys:
            return array.reshape(*array.shape[:2], 1, -1), piece.lanes, head + (".t" if piece.queries else ".s")
        return array.reshape(-1), piece.lanes, None

    def call(self, name: str, body: Callable, inputs: list, outputs: list, scratch: list) -> list[Array]:
        """Runs `body(here, *inputs, *outputs, *scratch)` on the grid; arrays come with their lanes and axes."""
        pl, memory = _pallas(), _tpu()
        pieces = [self.piece(n) for n in range(len(self.split.pieces))]
        side = "keys" if self.flipped else "queries"
        columns = [n for n, p in enumerate(self.split.pieces) if getattr(p, side) and p.queries != p.keys]
        columns = [n for n in columns if not self.split.pieces[n].by_distance]
        kept = [memory.VMEM((self.shape[0], _LANES), _loaded(self.split.pieces[n])) for n in columns]
        kept += [memory.VMEM((self.shape[0], _LANES), jnp.float32)] * self.by_row

        def kernel(numbers: Any, *refs: Any) -> None:
            ends = np.cumsum([len(inputs), len(pieces), len(outputs), len(scratch), len(columns)])
            own, loaded, made, room, of_pieces = (refs[a:b] for a, b in zip((0, *ends), ends, strict=False))
            here = _Here(self, numbers, loaded, dict(zip(columns, of_pieces, strict=True)), refs[ends[-1] :], own[-1])
            body(here, *own, *made, *room)

        specs = [
            pl.BlockSpec(memory_space=memory.SMEM) if one[2] is None else self.spec(*one) for one in [*inputs, *pieces]
        ]
        return pl.pallas_call(
            kernel,
            grid_spec=memory.PrefetchScalarGridSpec(
                num_scalar_prefetch=1,
                grid=self.grid,
                in_specs=specs,
                out_specs=[self.spec(*one) for one in outputs],
                scratch_shapes=[*(memory.VMEM(shape, jnp.float32) for shape in scratch), *kept],
            ),
            out_shape=[shape for shape, _, _ in outputs],
            compiler_params=memory.CompilerParams(
                dimension_semantics=("parallel", "parallel", *["arbitrary"] * (len(self.grid) - 2)),
            ),
            interpret=(self.problem.config or Config()).interpret,
            name=name,
        )(jnp.asarray(self.steps.numbers).reshape(-1), *(array for array, _, _ in [*inputs, *pieces]))


class _Here:
    """One step of a kernel: where it is, and when which part of the body runs.

    Attributes:
      row_columns: the numbers per query as columns, `[queries, lanes]`, the same in all lanes.
      own_row: the head's place in its group.
    """

    def __init__(self, loop: _Loop, numbers: Any, pieces: Any, columns: dict[int, Any], row_columns: Any, rows: Any):
        pl = _pallas()
        self.loop, self._pieces, self._columns, self.row_columns = loop, pieces, columns, row_columns
        ids = [pl.program_id(axis) for axis in range(len(loop.grid))]
        self.b, self.h, self.step = loop.at(ids, numbers)
        inner, ends = ids[3:], loop.grid[3:]
        alone = loop.order == "pair"
        at_first = (inner[0] >= 0) if alone else self.step.first != 0
        at_last = (inner[0] >= 0) if alone else self.step.last != 0
        for index, size in zip(inner, ends, strict=True):
            at_first, at_last = at_first & (index == 0), at_last & (index == size - 1)
        self._first, self._last = at_first, at_last
        if loop.order == "key":
            self.own_row = pl.ds(inner[0], 1)
        for n, ref in columns.items():  # of the row of tiles, but for those of heads that take turns
            turns = loop.order == "pair" or (inner and loop.split.pieces[n].heads)
            self._fill(True if turns else at_first, ref, pieces[n][...])
        for n, ref in enumerate(row_columns):
            self._fill(at_first, ref, rows[n : n + 1])

    def _fill(self, when: Any, ref: Any, row: Array) -> None:
        @_pallas().when(when)
        def _() -> None:
            ref[...] = _column(row)

    def begin(self, body: Callable[[], None]) -> None:
        """Runs it where a row of tiles begins."""
        _pallas().when(self._first)(body)

    def visit(self, body: Callable[[_Tile], None]) -> None:
        """Runs it on a tile that is not empty."""
        for kind in self.loop.kinds:
            _pallas().when(self.step.kind == kind)(lambda kind=kind: body(_Tile(self, kind == _PARTIAL)))

    def end(self, body: Callable[[], None]) -> None:
        """Runs it where a row of tiles ends."""
        _pallas().when(self._last)(body)

    def scalar(self, n: int) -> Array:
        """The number of a piece that has neither queries nor keys."""
        piece = self.loop.split.pieces[n]
        sizes = self.loop.problem.sizes
        entry = piece.entry(sizes.batch, self.b)
        return self._pieces[n][entry * sizes.heads + self.h if piece.heads else entry]

    def value(self, n: int) -> Array:
        """The tile's part of a piece, of a shape that broadcasts to the tile; booleans have its whole shape."""
        loop, piece, ref = self.loop, self.loop.split.pieces[n], self._pieces[n]
        if piece.by_distance:
            value = _spread_window(ref[...], loop)
        elif piece.queries and piece.keys:
            value = ref[...].astype(_wide_dtype(piece))
            value = value.T if loop.flipped else value
        elif n in self._columns:
            value = _wide(self._columns[n][...], loop.shape[1])
        elif piece.queries or piece.keys:
            value = ref[...]
        else:
            value = self.scalar(n)
        if piece.dtype == "bool" or n in loop.wanted:
            value = jnp.broadcast_to(value, loop.shape)
        return value != 0 if piece.dtype == "bool" else value


class _Tile:
    """One tile: its logits, its weights, and what derivatives make of them."""

    def __init__(self, here: _Here, masked: bool):
        loop = here.loop
        self.loop, self.masked, self.shape = loop, masked, loop.shape
        q = here.step.query * loop.block_q + lax.broadcasted_iota(jnp.int32, loop.shape, int(loop.flipped))
        k = here.step.key * loop.block_k + lax.broadcasted_iota(jnp.int32, loop.shape, int(not loop.flipped))
        values = [here.value(n) for n in range(len(loop.split.pieces))]
        self.pairs = loop.split.tile(q, k, here.b, here.h, values)
        self._visible = self._seen_pairs(q, k) if masked else None

    def _seen_pairs(self, q: Array, k: Array) -> Array:
        """Which pairs count; blocks may reach beyond the last query and key."""
        sizes, visible = self.loop.problem.sizes, self.pairs.visible()
        for index, length, block in (
            (q, sizes.query_length, self.loop.block_q),
            (k, sizes.key_length, self.loop.block_k),
        ):
            if length % block:
                inside = index < length
                visible = inside if visible is None else visible & inside
        return q >= 0 if visible is None else visible

    def _counted(self, pairs: Array, hidden: float = 0.0) -> Array:
        return pairs if self._visible is None else jnp.where(self._visible, pairs, hidden)

    def _raw(self, q: Array, k: Array) -> Array:
        """The logits before scores."""
        program, factor = self.loop.problem.program, self.loop.factor
        raw = _dot(k, q, 1, 1) if self.loop.flipped else _dot(q, k, 1, 1)
        raw = raw if factor != 1 else raw * program.scale
        return self._counted(raw) if program.scores else raw  # scores stay finite where nothing is seen

    def logits(self, q: Array, k: Array) -> Array:
        """The logits, -inf where the query does not see the key."""
        return self._counted(self.pairs.modify(self._raw(q, k)), -jnp.inf)

    def seen(self, rows: Array, weights: Array) -> Array:
        """Rows [lanes of the tile, *], 0 where they have no weight in a masked tile: they may hold NaN."""
        if not self.masked:
            return rows
        some = _wide(_column(weights.max(0, keepdims=True)), rows.shape[1])
        return jnp.where(some > 0, rows.astype(jnp.float32), 0.0).astype(rows.dtype)

    def derived(
        self, q: Array, k: Array, v: Array, ct_out: Array, top: Array, delta: Array
    ) -> tuple[Array, Array, list[Array]]:
        """The weights, and the cotangents of the raw logits and of the pieces that are wanted."""
        raw = self._raw(q, k)
        weights = self._counted(self.loop.exp(self.pairs.modify(raw) - top))
        d_weights = _dot(v, ct_out, 1, 1) if self.loop.flipped else _dot(ct_out, v, 1, 1)
        d_logits = self._counted(weights * (self.pairs.drop(d_weights) - delta))
        if not self.loop.problem.program.scores:
            return weights, d_logits, []
        d_raw, d_values = self.pairs.pull(raw, d_logits, self.loop.wanted)
        return weights, self._counted(d_raw), [self._counted(d) for d in d_values]


def _pairs(problem: Problem) -> int:
    """Of batch entries, queries and keys."""
    return math.prod((*problem.sizes.batch, problem.sizes.query_length, problem.sizes.key_length))


def _tiles(problem: Problem, part: str) -> tuple[int, int]:
    """Queries and keys of a tile."""
    sizes, config = problem.sizes, problem.config or Config()
    if problem.blocks is not None:
        return problem.blocks
    own = (config.backward_block_q, config.backward_block_k) if part == "backward" else (None, None)
    asked = (own[0] or config.block_q or 512, own[1] or config.block_k or 512)
    lengths = (sizes.query_length, sizes.key_length)
    least = 8 if config.interpret else _LANES
    return tuple(min(block, -(-max(n, 1) // least) * least) for block, n in zip(asked, lengths, strict=True))  # type: ignore[return-value]


def _factor(problem: Problem) -> float:
    """What is left to the exponential to multiply logits with.

    In float32 the scale is applied where the formula has it, so that all parts round alike.
    """
    program = problem.program
    plain = not program.scores and not program.sinks and program.scale > 0 and problem.dtype == "bfloat16"
    return program.scale if plain else 1.0


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """A matrix product over these axes, in float32; of float32 to its full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


def _column(row: Array) -> Array:
    """A row [1, n] as a column [n, lanes], the same in all lanes."""
    return jnp.broadcast_to(row, (_LANES, row.shape[1])).T


def _wide(column: Array, width: int) -> Array:
    """A column [n, lanes] as [n, width]."""
    return jnp.tile(column, (1, -(-width // _LANES)))[:, :width]


def _loaded(piece: Piece) -> Any:
    """The type in which a piece is given to a kernel: of 32 bits, but for large ones."""
    large = piece.queries and piece.keys
    if piece.dtype == "bool":
        return jnp.int8 if large else jnp.int32
    if large and piece.dtype == "bfloat16":
        return jnp.bfloat16
    return jnp.float32 if jnp.issubdtype(piece.dtype, jnp.floating) else jnp.int32


def _wide_dtype(piece: Piece) -> Any:
    return jnp.float32 if jnp.issubdtype(piece.dtype, jnp.floating) else jnp.int32


def _joined(lanes: tuple[int, ...], batch: tuple[int, ...], entry: Any, inner: Any) -> Any:
    """The batch entry, from the entry over the axes in `lanes` that are not 1, and the number over all others."""
    b, after = 0, 1
    for own, size in zip(reversed(lanes), reversed(batch), strict=True):
        from_, rest = (entry, inner) if own == size else (inner, entry)
        b, after = b + from_ % size * after, after * size
        entry, inner = (from_ // size, rest) if own == size else (rest, from_ // size)
    return b


def _merged(x: Array, batch: tuple[int, ...]) -> Array:
    """The batch axes as one."""
    return x.reshape(math.prod(x.shape[: len(batch)]), *x.shape[len(batch) :])


def _head_first(problem: Problem, operands: list[Array], i: int) -> tuple[Array, tuple[int, ...], str]:
    """An operand [entries, heads, positions, size], its lanes and axes."""
    n = len(problem.sizes.batch)
    array = operands[i].swapaxes(n, n + 1)
    return _merged(array, problem.sizes.batch), tuple(array.shape[:n]), "ht." if i == 0 else "ks."


def _head_last(problem: Problem, array: Array) -> Array:
    """[all batch entries, heads, positions, ...] in operand form."""
    return array.swapaxes(1, 2).reshape(*problem.sizes.batch, array.shape[2], array.shape[1], *array.shape[3:])


def _summed(x: Array, shape: tuple[int, ...]) -> Array:
    """Summed over the axes that have size 1 in `shape`."""
    return x.sum(tuple(a for a, (n, m) in enumerate(zip(x.shape, shape, strict=True)) if n != m), keepdims=True)


def _window(query_length: int, block_q: int, block_k: int, step: Step) -> Any:
    """Which window of distances belongs to a tile: see `_windows`."""
    apart = math.gcd(block_q, block_k)
    before = -(-query_length // block_q) - 1
    return step.key * (block_k // apart) + (before - step.query) * (block_q // apart)


def _windows(array: Array, sizes: Sizes, block_q: int, block_k: int, flipped: bool) -> Array:
    """The distances of each tile: [entries, heads, 1, T + S - 1] -> [entries, heads, windows, 1, width].

    A window begins with the last query and the first key of its tile. Flipped ones run backwards.
    """
    apart, width = math.gcd(block_q, block_k), block_q + block_k
    rows, columns = -(-sizes.query_length // block_q), -(-sizes.key_length // block_k)
    count = ((columns - 1) * block_k + (rows - 1) * block_q) // apart + 1
    before = rows * block_q - sizes.query_length
    after = (count - 1) * apart + width - before - array.shape[-1]
    padded = jnp.pad(array[:, :, 0], [(0, 0), (0, 0), (before, after)])
    windows = padded[:, :, np.arange(count)[:, None] * apart + np.arange(width)[:: -1 if flipped else 1]]
    return windows[:, :, :, None]


def _spread_window(window: Array, loop: _Loop) -> Array:
    """A tile, constant along its diagonals, from a row of its distances: each row of it is rolled one further."""
    rows, columns = loop.shape
    spread = jnp.broadcast_to(window, (rows, window.shape[1]))
    shift = rows if loop.flipped else window.shape[1] - rows + 1
    return _tpu().roll(spread, shift, 1, stride=1, stride_axis=0)[:, :columns]


def _pallas() -> ModuleType:
    """Pallas, when it is first needed: it takes long to import."""
    return importlib.import_module("jax.experimental.pallas")


def _tpu() -> ModuleType:
    return importlib.import_module("jax.experimental.pallas.tpu")
