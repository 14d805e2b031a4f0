"""implementation="mosaic_tpu": flash attention for TPUs in Pallas, forward and backward; no other derivatives.

A kernel walks a list of tiles (`core.steps`) that lies in scalar memory: tiles that are full are computed without the
mask, empty ones are not in the list. What a step loads is written in `core.mosaic`; here is what it computes. In the
kernels that sum over queries, keys lie along the sublanes of a tile: so no matrix product needs a tile transposed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.checks import number_of
from attnjax.core.mosaic import LANES, Here, Loaded, Loop, wide
from attnjax.core.operations import HARMLESS
from attnjax.core.program import Problem
from attnjax.core.residual import NotSplittable
from attnjax.core.softmax import Rows, finite, inverse, row_delta, settled, sink_gradient, tainted
from attnjax.core.split import PairTile, Split, summed, widened
from attnjax.core.steps import MOST_BLOCKS, steps
from attnjax.core.tables import tuned
from attnjax.tuning import Blocks

Array = jax.Array

PARTS = ("forward", "backward")
_LOG2E = math.log2(math.e)
_MOST_SIZE = 256  # of heads
_MOST_SCALARS = 2**19  # bytes of scalar memory, of about 1 MiB
_MOST_VECTORS = 2**24  # bytes of vector memory that a kernel may take on any TPU, if it is not told otherwise
_USUAL = (1024, 1024)  # a tile: see "How the kernel works"
# Elementwise operations that JAX has no code of Mosaic for, or not for their derivatives in every version (erf).
LACKS = frozenset("erf asin acos atan sinh cosh asinh acosh atanh cbrt expm1".split())


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
        least = 8 if self.interpret else LANES
        for name in ("block_q", "block_k", "backward_block_q", "backward_block_k"):
            value = getattr(self, name)
            number = number_of(value)
            if isinstance(number, int) and number > 0 and number % least == 0:
                object.__setattr__(self, name, number)
            elif value is not None:
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
    block_q, block_k = _tiles(problem, part)
    if not (config and config.interpret) and (block_q % LANES or block_k % LANES):
        return f"block_map has blocks of {block_q} x {block_k}: those of TPUs are multiples of {LANES}"
    if max(-(-sizes.query_length // block_q), -(-sizes.key_length // block_k)) > MOST_BLOCKS:
        return f"counts up to {MOST_BLOCKS} blocks of queries, or keys"
    try:
        split = Split.described(problem, operands)
    except NotSplittable as reason:
        return f"cannot run this mask or score on its tiles: {reason}"
    return split.lacking(LACKS, "Mosaic") or _unsupported_pieces(problem, operands, split, (block_q, block_k))


def _unsupported_pieces(problem: Problem, operands: list[Any], split: Split, tiles: tuple[int, int]) -> str | None:
    wide = [piece.dtype for piece in split.pieces if np.dtype(piece.dtype).itemsize > 4]
    if wide:
        return f"takes masks and scores of at most 32 bits, not {wide[0]}"
    listed = lambda by_key: lambda operands: jnp.asarray(steps(problem, operands, *tiles, by_key=by_key).numbers)
    lists = [jax.eval_shape(listed(by_key), list(operands)) for by_key in (False, True)]
    scalars = sum(math.prod(a.shape) for a in split.arrays if a.shape[2:] == (1, 1))
    needed = 4 * (scalars + max(math.prod(one.shape) for one in lists))
    if needed > _MOST_SCALARS:
        return f"would need {needed // 1024} KiB of scalar memory for its tiles, and has {_MOST_SCALARS // 1024} KiB"
    return None


def gradients(problem: Problem, operands: list[Any]) -> tuple[int, ...]:
    """Positions of the operands whose gradients `backward` can give: all but tables of distances."""
    pieces = Split.described(problem, operands).pieces
    by_distance = {i for piece in pieces if piece.by_distance for i in piece.sources}
    return tuple(i for i in problem.differentiable if i not in by_distance)


def blocks(problem: Problem, platform: str) -> Blocks:
    """The tiles of the forward."""
    return Blocks(*_tiles(problem, "forward"), (1,) * len(problem.sizes.batch), 1)


def settings(problem: Problem, platform: str) -> dict[str, list[str]]:
    """The tiles by part, and what had to be made smaller than usual or asked for, for `explain`."""
    lines = {}
    for part in PARTS:
        start, tiles = _asked(problem, part), _tiles(problem, part)
        needed = f"{_vector_bytes(problem, part, start) / 2**20:.0f} MiB of vector memory"
        smaller = f"; {start[0]} x {start[1]} would need {needed}" if tiles != start else ""
        lines[part] = [f"{part}: {tiles[0]} x {tiles[1]}{smaller}"]
    return lines


def temporary_bytes(problem: Problem, operands: list[Any], platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results: heads first, and rows."""
    sizes, item = problem.sizes, np.dtype(problem.dtype).itemsize
    batch = math.prod(sizes.batch)
    queries, keys = batch * sizes.query_length * sizes.heads, batch * sizes.key_length * sizes.key_heads
    both = problem.head_size + problem.value_size
    forward = item * both * (queries + keys) + 32 * queries
    return {"forward": forward, "backward": forward + 4 * (problem.head_size * queries + both * keys) + 64 * queries}


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    sizes = problem.sizes
    tiles = _tiles(problem, "forward")
    split = Split(problem, operands)
    shape = lambda *last: (math.prod(sizes.batch), sizes.heads, *last)
    out = jax.ShapeDtypeStruct(shape(sizes.query_length, problem.value_size), problem.dtype)
    softmax = jax.ShapeDtypeStruct(shape(2, sizes.query_length), jnp.float32)
    out, softmax = Loop(problem, split, tiles, "query", steps(problem, operands, *tiles)).call(
        "attention_forward",
        _forward,
        [_head_first(problem, operands, i) for i in range(3)],
        [(out, sizes.batch, "ht."), (softmax, sizes.batch, "h.t")],
        [(tiles[0], problem.value_size), (tiles[0], LANES), (tiles[0], LANES)],
        interpret=(problem.config or Config()).interpret,
    )
    return Rows(_head_last(problem, out), *(_head_last(problem, softmax[:, :, n]) for n in range(2)))


def _forward(here: Here, q: Any, k: Any, v: Any, out: Any, softmax: Any, summed: Any, top: Any, total: Any) -> None:
    """The online softmax of a row of tiles. `top` and `total` hold the same number in all lanes."""
    sinks, factor = here.loop.split.sinks, _factor(here.loop.problem)

    @here.begin
    def _() -> None:
        summed[...] = jnp.zeros_like(summed)
        sink = jnp.full(top.shape, -jnp.inf if sinks is None else here.scalar(sinks), jnp.float32)
        top[...] = sink
        total[...] = jnp.exp(sink - finite(sink))

    @here.visit
    def _(pairs: PairTile, masked: bool) -> None:
        tile = _Tile(here.loop, pairs, masked)
        logits = tile.logits(q[...], k[...], v[...])
        before = top[...]
        highest = jnp.maximum(before, logits.max(1, keepdims=True))
        safe = finite(highest)
        weights = _exp(logits - wide(safe, logits.shape[1]), factor)
        shrink = _exp(before - safe, factor)
        top[...] = highest
        total[...] = shrink * total[...] + weights.sum(1, keepdims=True)
        values = tile.finite(v[...])
        more = _dot(pairs.drop(weights).astype(values.dtype), values, 1, 0)
        summed[...] = wide(shrink, summed.shape[1]) * summed[...] + more

    @here.end
    def _() -> None:
        empty = total[...] == 0
        divisor = jnp.where(empty, 1.0, total[...])
        out[...] = (summed[...] / wide(divisor, summed.shape[1])).astype(out.dtype)
        lane = lax.broadcasted_iota(jnp.int32, top.shape, 1)
        softmax[...] = jnp.where(lane == 0, top[...] * factor, total[...]).T[:2]


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
    if inner:
        made |= _Backward(problem, operands, rows, delta, ct_out, {i: shapes[i] for i in inner}).made
    return [made[i] for i, _ in wanted]


class _Backward:
    """The kernels of a backward: one by query, one by key, and one for every piece of scores that has both axes.

    Attributes:
      made: gradients of operands by position; of_pieces: those of pieces by number, for all batch entries and heads.
    """

    def __init__(
        self, problem: Problem, operands: list[Array], rows: Rows, delta: Array, ct_out: Array, shapes: dict[int, Any]
    ):
        self.problem, self.operands, self.shapes = problem, operands, shapes
        self.batch = batch = problem.sizes.batch
        self.tiles = _tiles(problem, "backward")
        scores = {i: shape for i, shape in shapes.items() if i > 2}
        self.split = Split(problem, widened(operands, scores, len(batch)))
        self.pieces = self.split.wanted(tuple(scores))
        share = inverse(rows.total)
        ct_out = (ct_out.astype(jnp.float32) * share[..., None]).astype(problem.dtype)
        highest = finite(rows.highest) / _factor(problem)
        if problem.program.mask:  # who sees such a query has it by way of its weights
            highest = tainted(highest, delta, ct_out)
        per_query = jnp.stack([highest, delta * share], -3)
        per_query = jnp.moveaxis(per_query, (-1, -3), (-3, -2))  # [*batch, N, 2, T]
        # What the last block has too much must be numbers: they are of queries that see nothing.
        short = -problem.sizes.query_length % self.tiles[0]
        per_query = jnp.pad(per_query, [(0, 0)] * (per_query.ndim - 1) + [(0, short)])
        self.inputs: list[Loaded] = [_head_first(problem, operands, i) for i in range(3)]
        self.inputs += [(_merged(ct_out.swapaxes(-3, -2), batch), batch, "ht.")]
        self.inputs += [(_merged(per_query, batch), batch, "h.t")]
        self.of_pieces: dict[int, Array] = {}
        self.made: dict[int, Array] = self._by_query() | self._by_key() | self._by_pair(tuple(scores))

    def _call(
        self, order: str, body: Any, outputs: list[Loaded], scratch: list[tuple[int, int]], **options: Any
    ) -> Any:
        made = steps(self.problem, self.operands, *self.tiles, by_key=order == "key", every=order == "pair")
        loop = Loop(self.problem, self.split, self.tiles, order, made, **options)
        interpret = (self.problem.config or Config()).interpret
        name = f"attention_backward_{order}"
        return loop.call(name, body, self.inputs, outputs, scratch, interpret=interpret)

    def _shape(self, heads: int, *last: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((math.prod(self.batch), heads, *last), jnp.float32)

    def _by_query(self) -> dict[int, Array]:
        """The gradient of the queries, and of pieces that have no axis of keys."""
        problem, sizes = self.problem, self.problem.sizes
        wanted = [n for n in self.pieces if not self.split.pieces[n].keys]
        if 0 not in self.shapes and not wanted:
            return {}
        outputs: list[Loaded] = [(self._shape(sizes.heads, sizes.query_length, problem.head_size), self.batch, "ht.")]
        outputs += [(self._shape(sizes.heads, 1, sizes.query_length), self.batch, "h.t")] * len(wanted)
        scratch = [(self.tiles[0], problem.head_size), *[(self.tiles[0], LANES)] * len(wanted)]
        d_q, *of_pieces = self._call("query", _queries, outputs, scratch, wanted=wanted, by_row=2)
        self.of_pieces |= {n: x[:, :, 0, :, None] for n, x in zip(wanted, of_pieces, strict=True)}
        return {0: summed(_head_last(problem, d_q), self.shapes[0])} if 0 in self.shapes else {}

    def _by_key(self) -> dict[int, Array]:
        """The gradients of keys and values, and of pieces that have an axis of keys only."""
        problem, sizes = self.problem, self.problem.sizes
        wanted = [n for n in self.pieces if self.split.pieces[n].keys and not self.split.pieces[n].queries]
        if not (self.shapes.keys() & {1, 2} or wanted):
            return {}
        of_size = (problem.head_size, problem.value_size)
        outputs: list[Loaded] = [
            (self._shape(sizes.key_heads, sizes.key_length, size), self.batch, "ks.") for size in of_size
        ]
        outputs += [(self._shape(sizes.key_heads, sizes.group, sizes.key_length), self.batch, "k.s")] * len(wanted)
        scratch = [(self.tiles[1], size) for size in of_size] + [(sizes.group, self.tiles[1])] * len(wanted)
        d_k, d_v, *of_pieces = self._call("key", _keys, outputs, scratch, wanted=wanted)
        shape = (math.prod(self.batch), sizes.heads, 1, sizes.key_length)
        self.of_pieces |= {n: x.reshape(shape) for n, x in zip(wanted, of_pieces, strict=True)}
        made = ((1, d_k), (2, d_v))
        return {i: summed(_head_last(problem, x), self.shapes[i]) for i, x in made if i in self.shapes}

    def _by_pair(self, scores: Sequence[int]) -> dict[int, Array]:
        """The gradients of scores: tiles of pieces with both axes, summed over what shares them and written once."""
        for n in self.pieces:
            piece, shape = self.split.pieces[n], self.split.arrays[n].shape
            if piece.queries and piece.keys:
                output = jax.ShapeDtypeStruct(shape, jnp.float32), piece.lanes, "hts" if piece.heads else "1ts"
                (self.of_pieces[n],) = self._call(
                    "pair", _pairs_of, [output], [(self.tiles[1], self.tiles[0])], wanted=[n], shared=piece
                )
        return self.split.pulled(self.of_pieces, scores) if scores else {}


def _queries(here: Here, q: Any, k: Any, v: Any, ct_out: Any, rows: Any, d_q: Any, *refs: Any) -> None:
    """d q of a row of tiles, and the sums over keys of the gradients of pieces."""
    count = len(here.loop.wanted)
    sums, d_sum, d_sums = refs[:count], refs[count], refs[count + 1 :]

    @here.begin
    def _() -> None:
        for ref in (d_sum, *d_sums):
            ref[...] = jnp.zeros_like(ref)

    @here.visit
    def _(pairs: PairTile, masked: bool) -> None:
        tile = _Tile(here.loop, pairs, masked)
        top, delta = (wide(ref[...], here.loop.shape[1]) for ref in here.rows)
        _, d_raw, d_values = tile.derived(q[...], k[...], v[...], ct_out[...], top, delta)
        keys = tile.finite(k[...])
        d_sum[...] += _dot(d_raw.astype(keys.dtype), keys, 1, 0)
        for ref, d in zip(d_sums, d_values, strict=True):
            ref[...] += d.sum(1, keepdims=True)

    @here.end
    def _() -> None:
        d_q[...] = d_sum[...] * here.loop.problem.program.scale
        for out, ref in zip(sums, d_sums, strict=True):
            out[...] = ref[...].T[:1]


def _keys(here: Here, q: Any, k: Any, v: Any, ct_out: Any, rows: Any, d_k: Any, d_v: Any, *refs: Any) -> None:
    """d k and d v of a row of tiles, of all heads that share them, and the sums over queries of gradients of pieces."""
    count = len(here.loop.wanted)
    sums, k_sum, v_sum, d_sums = refs[:count], refs[count], refs[count + 1], refs[count + 2 :]

    @here.begin
    def _() -> None:
        for ref in (k_sum, v_sum, *d_sums):
            ref[...] = jnp.zeros_like(ref)

    @here.visit
    def _(pairs: PairTile, masked: bool) -> None:
        tile = _Tile(here.loop, pairs, masked)
        top, delta = rows[0:1], rows[1:2]
        weights, d_raw, d_values = tile.derived(q[...], k[...], v[...], ct_out[...], top, delta)
        queries, cotangents = tile.finite(q[...]), tile.finite(ct_out[...])
        v_sum[...] += _dot(pairs.drop(weights).astype(cotangents.dtype), cotangents, 1, 0)
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


def _pairs_of(here: Here, q: Any, k: Any, v: Any, ct_out: Any, rows: Any, out: Any, d_sum: Any) -> None:
    """The gradient of one tile of a piece, summed over the batch entries and heads that share it."""

    @here.begin
    def _() -> None:
        d_sum[...] = jnp.zeros_like(d_sum)

    @here.visit
    def _(pairs: PairTile, masked: bool) -> None:
        tile = _Tile(here.loop, pairs, masked)
        _, _, (d,) = tile.derived(q[...], k[...], v[...], ct_out[...], rows[0:1], rows[1:2])
        d_sum[...] += d

    @here.end
    def _() -> None:
        out[...] = d_sum[...].T


class _Tile:
    """A tile of logits and what derivatives make of it; `masked` where not every pair of it counts."""

    def __init__(self, loop: Loop, pairs: PairTile, masked: bool):
        self.loop, self.pairs, self.masked = loop, pairs, masked
        self.program, self.factor = loop.problem.program, _factor(loop.problem)
        self._visible = self._counting() if masked else None

    def _counting(self) -> Array:
        """Which pairs count; blocks may reach beyond the last query and key."""
        sizes, visible = self.loop.problem.sizes, self.pairs.visible()
        lengths = (sizes.query_length, sizes.key_length)
        for index, length, block in zip((self.pairs.q, self.pairs.k), lengths, self.loop.blocks, strict=True):
            if length % block:
                visible = index < length if visible is None else visible & (index < length)
        return self.pairs.q >= 0 if visible is None else visible

    def _hidden(self, pairs: Array, value: float = 0.0) -> Array:
        """Pairs, with this value where the query does not see the key."""
        return pairs if self._visible is None else jnp.where(self._visible, pairs, value)

    def _raw(self, q: Array, k: Array) -> Array:
        """The logits before scores, whose derivatives must stay finite where nothing is seen."""
        raw = _dot(k, q, 1, 1) if self.loop.flipped else _dot(q, k, 1, 1)
        raw = raw * self.program.scale if self.factor == 1 else raw
        return self._hidden(raw, HARMLESS) if self.program.scores else raw

    def logits(self, q: Array, k: Array, v: Array) -> Array:
        """The logits, -inf where the query does not see the key; NaN of keys whose values are not all finite."""
        logits = self._modified(self._raw(q, k))
        if not self.masked:
            return logits
        # How many of them there are as a row: a product with ones.
        others = jnp.where(_is_finite(v), 0.0, 1.0).astype(jnp.bfloat16)
        count = _dot(jnp.ones((16, v.shape[1]), jnp.bfloat16), others, 1, 1)[:1]
        return self._hidden(logits + jnp.where(count == 0, 0.0, jnp.nan), -jnp.inf)

    def _modified(self, raw: Array) -> Array:
        """The logits after scores. A TPU does not contract products and differences; XLA does where it interprets."""
        logits, config = self.pairs.modify(raw), self.loop.problem.config or Config()
        return settled(logits) if config.interpret else logits

    def finite(self, rows: Array) -> Array:
        """Rows [lanes of the tile, *], of a masked tile with 0 in place of what is not finite: it may be hidden."""
        return jnp.where(_is_finite(rows), rows.astype(jnp.float32), 0.0).astype(rows.dtype) if self.masked else rows

    def derived(
        self, q: Array, k: Array, v: Array, ct_out: Array, top: Array, delta: Array
    ) -> tuple[Array, Array, list[Array]]:
        """The weights, and the cotangents of the raw logits and of the pieces that are wanted."""
        raw = self._raw(q, k)
        modified = self._modified(raw)
        weights = self._hidden(_exp(modified - top, self.factor))
        d_weights = _dot(v, ct_out, 1, 1) if self.loop.flipped else _dot(ct_out, v, 1, 1)
        d_logits = self._hidden(weights * (self.pairs.drop(d_weights) - delta))
        if not self.program.scores:
            return weights, d_logits, []
        counted = self._visible
        if self.program.hides(self.loop.problem.accumulate):
            counted = self._hidden(modified, -jnp.inf) != -jnp.inf
        d_raw, d_values = self.pairs.pull(raw, d_logits, self.loop.wanted, counted)
        return weights, self._hidden(d_raw), [self._hidden(d) for d in d_values]


def _asked(problem: Problem, part: str) -> tuple[int, int]:
    """Queries and keys of a tile, as asked for or as usual, and no more than there are."""
    sizes, config = problem.sizes, problem.config or Config()
    own = (config.backward_block_q, config.backward_block_k) if part == "backward" else (None, None)
    prefix = "backward_" if part == "backward" else ""
    known = tuned(problem, "mosaic_tpu", part, "tpu")
    usual = known.get(prefix + "block_q", _USUAL[0]), known.get(prefix + "block_k", _USUAL[1])
    asked = (own[0] or config.block_q or usual[0], own[1] or config.block_k or usual[1])
    least = 8 if config.interpret else LANES
    fit = lambda block, length: min(block, -(-max(length, 1) // least) * least)
    return problem.blocks or (fit(asked[0], sizes.query_length), fit(asked[1], sizes.key_length))


def _tiles(problem: Problem, part: str) -> tuple[int, int]:
    """What is asked for, halved while it takes too much memory. (Blocks of a given map may be cut, too.)"""
    tiles = _asked(problem, part)
    while _vector_bytes(problem, part, tiles) > _MOST_VECTORS:
        n = int(tiles[1] >= tiles[0])
        if tiles[n] % (2 * LANES):
            break
        tiles = (tiles[0], tiles[1] // 2) if n else (tiles[0] // 2, tiles[1])
    return tiles


def _vector_bytes(problem: Problem, part: str, tiles: tuple[int, int]) -> int:
    """About what the largest kernel of a part takes: two copies of what it loads and writes, sums, and whole tiles.

    How many whole tiles there are at a time was fitted to what the compiler takes: 4 of float32, 2.5 of bfloat16.
    """
    program, item = problem.program, np.dtype(problem.dtype).itemsize
    (block_q, block_k), pairs = tiles, tiles[0] * tiles[1]
    size = sum(-(-n // LANES) * LANES for n in (problem.head_size, problem.value_size))
    loaded = 2 * item * size * (block_q + block_k)
    scores = sum(program.axes[i] == "hts" for i in program.score_positions())
    masks = sum(program.axes[i] == "hts" for i in program.map_positions())
    loaded += pairs * (8 * scores + 2 * masks)
    nodes = (jax.tree.unflatten(one, [np.zeros(())] * one.num_leaves) for one in (*program.mask, *program.scores))
    functions = sum(len(list(node.functions())) for node in nodes)
    temporary = pairs * (16 if item == 4 else 10) + pairs * 4 * (
        bool(program.scores) + bool(program.map_positions()) + functions
    )
    if part == "forward":
        return loaded + temporary + 4 * block_q * (size + 2 * LANES)
    return loaded + temporary + 12 * max(block_q, block_k) * size + 12 * pairs * bool(scores)


def _factor(problem: Problem) -> float:
    """What is left to the exponential to multiply logits with.

    In float32 the scale is applied where the formula has it, so that all parts round alike.
    """
    program = problem.program
    plain = not program.scores and not program.sinks and program.scale > 0 and problem.dtype == "bfloat16"
    return program.scale if plain else 1.0


def _exp(x: Array, factor: float) -> Array:
    """exp(factor x)."""
    return jnp.exp(x) if factor == 1 else jnp.exp2(x * (factor * _LOG2E))


def _is_finite(x: Array) -> Array:
    return jnp.abs(x.astype(jnp.float32)) < jnp.inf


def _dot(a: Array, b: Array, axis_a: int, axis_b: int) -> Array:
    """A matrix product over these axes, in float32; of float32 to its full precision."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(
        a, b, (((axis_a,), (axis_b,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
    )


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
