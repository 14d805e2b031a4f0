"""implementation="xla": tiled attention in plain XLA, on every device, for every mask and score, in linear memory.

Forward is the online softmax over tiles; backward and tangent recompute the weights from what it kept of the softmax.
All three are differentiable again, to any order, because backward and tangent are sweeps (`core.sweep`).
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.core.checks import check_count
from attnjax.core.operations import HARMLESS
from attnjax.core.products import product
from attnjax.core.program import Problem, Program
from attnjax.core.softmax import (
    Rows,
    add_sinks,
    finite,
    first_max,
    inverse,
    merge_max,
    no_rows,
    row_delta,
    settled,
    sink_gradient,
    sink_weight,
)
from attnjax.core.sweep import product_type, sweep
from attnjax.core.walk import Output, Visit, Walk, level, push
from attnjax.tuning import Blocks, choose_blocks

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Config:
    """Tile sizes. `None` chooses by platform and shape.

    Attributes:
      block_q: queries of a tile.
      block_k: keys of a tile.
      lanes: at most this many (batch entry, key/value head) pairs are computed together.
    """

    block_q: int | None = None
    block_k: int | None = None
    lanes: int | None = None

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is not None:
                object.__setattr__(self, field.name, check_count(f"Config: {field.name}", value))


def unsupported(problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """A reason why this implementation cannot take the problem, or `None`: it takes everything but foreign configs."""
    return None if isinstance(problem.config, Config | None) or part == "tangent" else "config is not one of xla"


def blocks(problem: Problem, platform: str) -> Blocks:
    """The tiles."""
    return choose_blocks(problem, platform)


def temporary_bytes(problem: Problem, operands: list[Any], platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results."""
    sizes, blocks = problem.sizes, choose_blocks(problem, platform)
    lanes = math.prod(blocks.lanes) * blocks.lanes_kv
    item = problem.accumulate.itemsize
    tile = lanes * sizes.group * blocks.block_q * blocks.block_k * item
    query = lanes * sizes.group * sizes.query_length * item
    key = lanes * sizes.key_length * item
    copies = query * problem.head_size + key * (problem.head_size + problem.value_size)
    rows = math.prod(problem.out_shapes()[1]) * item
    return {
        "forward": copies + 2 * tile,
        "backward": 2 * copies + query * problem.value_size + 3 * tile + 2 * rows,
        "tangent": 2 * copies + 4 * tile + rows,
    }


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    program, accumulate = problem.program, problem.accumulate
    out_shape, row_shape = problem.out_shapes()
    sinks = program.sinks_of(operands)
    if not problem.pairs:
        return no_rows(out_shape, problem.dtype, accumulate, None if sinks is None else sinks[..., None, :])

    def start(tile: tuple[int, ...]) -> tuple[Array, Array, Array]:
        zeros = jnp.zeros((*tile[:-1], problem.value_size), accumulate)
        return zeros, jnp.full(tile[:-1], -jnp.inf, accumulate), jnp.zeros(tile[:-1], accumulate)

    def step(visit: Visit, state: Any, parts: list[Array]) -> tuple[Any, list[Array]]:
        out, highest, total = state
        view = _View(program, visit, parts, differentiated=False)
        if visit.only:
            highest, weights = first_max(view.logits)
            out = view.sum("kgts,ksv->kgtv", view.drop(weights), view.value)
            return (out, highest, weights.sum(-1)), []
        highest, shrink, weights = merge_max(highest, view.logits)
        total = total * shrink + weights.sum(-1)
        out = out * shrink[..., None] + view.sum("kgts,ksv->kgtv", view.drop(weights), view.value)
        return (out, highest, total), []

    def finish(state: Any) -> list[Array]:
        out, highest, total = state
        out = out * inverse(total)[..., None]
        return [out[..., None, :], highest[..., None], total[..., None]]

    blocks = choose_blocks(problem, platform)
    kinds = problem.kinds(operands, blocks.block_q, blocks.block_k)
    kept = jnp.dtype(problem.dtype) if sinks is None else accumulate
    outputs = [Output("th.", out_shape, kept), *[Output("th", row_shape, accumulate)] * 2]
    made = Walk(
        problem,
        blocks,
        kinds,
        operands,
        list(program.axes),
        outputs,
        start,
        step,
        finish,
        product=product_type(problem, platform),
        overwrite=True,
    ).run()
    rows = Rows(*made)
    if sinks is not None:
        rows = add_sinks(rows, sinks[..., None, :].astype(accumulate))
    return rows._replace(out=rows.out.astype(problem.dtype))


def tangent(
    problem: Problem,
    operands: list[Array],
    rows: Rows,
    moved: tuple[int, ...],
    tangents: list[Array],
) -> tuple[Array, Array]:
    """Tangents of the output and the log-sum-exp, linear in the tangents of the operands in `moved`."""
    program, accumulate = problem.program, problem.accumulate
    inner = tuple(i for i in moved if not (program.sinks and i == 3))
    out_shape, lse_shape = problem.out_shapes()
    d_out, d_lse = jnp.zeros(out_shape, accumulate), jnp.zeros(lse_shape, accumulate)
    if inner:
        values = [t for i, t in zip(moved, tangents, strict=True) if i in inner]
        d_out, d_lse = sweep(
            problem,
            _Tangent(program, inner),
            [*operands, finite(rows.highest), *values],
            [*program.axes, "th", *(program.axes[i] for i in inner)],
            [Output("th.", out_shape, accumulate), Output("th", lse_shape, accumulate)],
        )
        d_out, d_lse = d_out * inverse(rows.total)[..., None], d_lse * inverse(rows.total)
    if program.sinks and 3 in moved:
        d_sinks = tangents[moved.index(3)].astype(accumulate)
        d_lse = d_lse + sink_weight(operands[3], rows) * d_sinks[..., None, :]
    return (d_out - d_lse[..., None] * rows.out.astype(accumulate)).astype(problem.dtype), d_lse


def own_rows(problem: Problem, operands: list[Array], rows: Rows) -> Rows:
    """Rows that another implementation gave, with out and total of the logits as they are computed here.

    Logits that are computed twice, by different code, differ in their last bits. The weights of a row must add up to 1,
    and to its output, all the same: a tangent that sums over many of them shows it when they do not.
    """
    program, accumulate = problem.program, problem.accumulate
    out_shape, row_shape = problem.out_shapes()
    highest = finite(rows.highest)
    out, total = sweep(
        problem,
        _Softmax(program),
        [*operands, highest],
        [*program.axes, "th"],
        [Output("th.", out_shape, accumulate), Output("th", row_shape, accumulate)],
    )
    if program.sinks:
        total = total + jnp.exp(operands[3].astype(accumulate)[..., None, :] - highest)
    return Rows(out * inverse(total)[..., None], rows.highest, total)


def backward(
    problem: Problem,
    operands: list[Array],
    rows: Rows,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[tuple[int, tuple[int, ...]], ...],
) -> list[Array]:
    """Gradients of the operands in `wanted`: pairs of position and shape (batch axes of size 1 are summed over)."""
    program, accumulate = problem.program, problem.accumulate
    ct_out = ct_out.astype(accumulate)
    delta = row_delta(rows, ct_out, ct_lse)
    inner = tuple((i, shape) for i, shape in wanted if not (program.sinks and i == 3))
    made = {}
    if inner:
        share = inverse(rows.total)
        gradients = sweep(
            problem,
            _Backward(program, tuple(i for i, _ in inner)),
            [*operands, finite(rows.highest), ct_out * share[..., None], delta * share],
            [*program.axes, "th", "th.", "th"],
            [Output(program.axes[i], shape, accumulate) for i, shape in inner],
        )
        made = {i: g for (i, _), g in zip(inner, gradients, strict=True)}
    for i, shape in wanted:
        if i not in made:
            made[i] = sink_gradient(operands[3], rows, delta, shape)
    return [made[i] for i, _ in wanted]


@dataclasses.dataclass(frozen=True)
class _Softmax:
    """Tile function: the sums of p v and of p = exp(logit - highest). Operands: the problem's, and highest."""

    program: Program
    linear: tuple[int, ...] = ()
    flipped: tuple[int, ...] = ()

    def __call__(self, visit: Visit, *parts: Array) -> list[Array]:
        *own, highest = parts
        view = _View(self.program, visit, own)
        weights = jnp.exp(view.logits - highest[..., 0, None])
        out = view.sum("kgts,ksv->kgtv", view.drop(weights), view.value)
        return [out[..., None, :], weights.sum(-1, keepdims=True)]


@dataclasses.dataclass(frozen=True)
class _Tangent:
    """Tile function: sums of p ds v + p dv, and of p ds, with p = exp(logit - highest).

    Operands: the problem's, highest, and the tangents of `moved`.
    """

    program: Program
    moved: tuple[int, ...]

    @property
    def linear(self) -> tuple[int, ...]:
        first = self.program.count + 1
        return tuple(range(first, first + len(self.moved)))

    @property
    def flipped(self) -> tuple[int, ...]:
        return ()

    def __call__(self, visit: Visit, *parts: Array) -> list[Array]:
        count = self.program.count
        own, highest = list(parts[:count]), parts[count]
        tangents = dict(zip(self.moved, parts[count + 1 :], strict=True))
        view = _View(self.program, visit, own)
        d_raw = jnp.zeros(visit.tile.shape, visit.accumulate)
        if 0 in tangents:
            d_raw = d_raw + view.between("kgth,ksh->kgts", view.scale * _rows(tangents[0]), view.key)
        if 1 in tangents:
            d_raw = d_raw + view.between("kgth,ksh->kgts", view.query, _columns(tangents[1]))
        d_leaves = [tangents.get(i) for i in self.program.score_positions()]
        weights = jnp.exp(view.logits - highest[..., 0, None])
        change = weights * view.pushed(d_raw, d_leaves)
        d_out = view.sum("kgts,ksv->kgtv", view.drop(change), view.value)
        if 2 in tangents:
            d_out = d_out + view.sum("kgts,ksv->kgtv", view.drop(weights), _columns(tangents[2]))
        return [d_out[..., None, :], change.sum(-1, keepdims=True)]


@dataclasses.dataclass(frozen=True)
class _Backward:
    """Tile function: the flash backward, with p = exp(logit - highest).

    Operands: the problem's, highest, and the cotangent of out and delta, both divided by the total.
    """

    program: Program
    wanted: tuple[int, ...]

    @property
    def linear(self) -> tuple[int, ...]:
        return (self.program.count + 1, self.program.count + 2)

    @property
    def flipped(self) -> tuple[int, ...]:
        # XLA's matrix product on CPUs is half as fast when its first factor is large and transposed. So the weights
        # stand second, and the gradients of key and value come out as [free, s].
        return tuple(n for n, i in enumerate(self.wanted) if i in (1, 2))

    def __call__(self, visit: Visit, *parts: Array) -> list[Array]:
        *own, highest, ct_out, delta = parts
        view = _View(self.program, visit, own)
        ct_out = _rows(ct_out)
        weights = jnp.exp(view.logits - highest[..., 0, None])
        d_weights = view.drop(view.between("kgtv,ksv->kgts", ct_out, view.value))
        d_raw, d_leaves = view.pulled(weights * (d_weights - delta[..., 0, None]), self.wanted)
        made = {}
        if 0 in self.wanted:
            made[0] = (view.scale * view.sum("kgts,ksh->kgth", d_raw, view.key))[..., None, :]
        if 1 in self.wanted:
            made[1] = view.sum("kgth,kgts->khs", view.query, d_raw)[..., None, None, :, :]
        if 2 in self.wanted:
            made[2] = view.sum("kgtv,kgts->kvs", ct_out, view.drop(weights))[..., None, None, :, :]
        made.update(d_leaves)
        return [made[i] for i in self.wanted]


class _View:
    """A tile as the formulas see it: query (scaled), key, value, and the logits after scores and mask.

    Rows that do not see each other must not reach each other, whatever they hold, even NaN. So a sum over keys, or
    queries, is a `sum`: in it hidden pairs have no part. Logits need no such care, because the mask replaces those that
    are not seen; but their derivatives do, so where a derivative of the tile is formed (`between`) they are 0.
    """

    def __init__(self, program: Program, visit: Visit, own: list[Array], differentiated: bool = True):
        """`differentiated`: whether the scores' derivatives are asked for, which are 0 at pairs that do not count."""
        self.program, self.visit, self.own, self.scale = program, visit, own, program.scale
        self.visible = _visible(program, visit, own)
        self.query = _rows(own[0]) * program.scale
        self.key, self.value = _columns(own[1]), _columns(own[2])
        self.raw = self.between("kgth,ksh->kgts", self.query, self.key)
        self.leaves = [own[i] for i in program.score_positions()]
        self.tile, self.counted = visit.tile, self.visible
        if program.scores:
            self.raw = self.masked(self.raw, HARMLESS)
            self.tile = visit.tile.counting(self.visible if differentiated else None)
        # As the forward computes them, to the last bit: a row's weights must add up to the total that it gave.
        modified = program.modify(self.raw, self.tile if visit.derived else visit.tile, self.leaves)
        if differentiated and program.hides(visit.accumulate):
            modified = self._finite(modified)
        modified = settled(modified) if program.scores else modified
        self.logits = modified if self.counted is None else jnp.where(self.counted, modified, -jnp.inf)

    def _finite(self, modified: Array) -> Array:
        """The modified logits. From now on pairs do not count either that a score has put to -inf."""
        finite = jax.lax.stop_gradient(modified) != -jnp.inf
        self.counted = finite if self.visible is None else self.visible & finite
        self.tile = self.tile.counting(self.counted)
        return self.program.modify(self.raw, self.tile, self.leaves) if self.visit.derived else modified

    def masked(self, pairs: Array, hidden: float = 0.0) -> Array:
        """Pairs [..., K, G, t, s], `hidden` where the query does not see the key."""
        return pairs if self.visible is None else jnp.where(self.visible, pairs, hidden)

    def between(self, spec: str, rows: Array, columns: Array) -> Array:
        """The product of each row by query with each row by key."""
        return self._product(spec, rows, columns, self.visible if self.visit.derived else None)

    def sum(self, spec: str, a: Array, b: Array) -> Array:
        """A sum over keys, or queries, of pairs times rows."""
        return self._product(spec, a, b, self.visible)

    def _product(self, spec: str, a: Array, b: Array, visible: Array | None) -> Array:
        return product(spec, a, b, visible, factors=self.visit.product, accumulate=self.visit.accumulate)

    def drop(self, weights: Array) -> Array:
        return self.program.drop(weights, self.visit.tile, self.own)

    def pushed(self, d_raw: Array, d_leaves: list[Array | None]) -> Array:
        """The tangent of the logits from those of the raw logits and of the scores' operands."""
        moved = [n for n, d in enumerate(d_leaves) if d is not None]
        d_logits = d_raw
        if self.program.scores:
            tangents = [d for d in d_leaves if d is not None]
            d_logits = push(self._modify(moved), [self.raw, *(self.leaves[n] for n in moved)], [d_raw, *tangents])
        return d_logits if self.counted is None else jnp.where(self.counted, d_logits, 0)

    def pulled(self, d_logits: Array, wanted: tuple[int, ...]) -> tuple[Array, dict[int, Array]]:
        """Cotangents of the raw logits, and of those operands of the scores that are wanted."""
        d_logits = self.masked(d_logits)
        positions = self.program.score_positions()
        moved = [n for n, i in enumerate(positions) if i in wanted]
        # A gradient is wanted per lane, also where the operand is shared by all; and the sums are left to the walk.
        tile, count = self.visit.tile, len(self.visit.tile.shape)
        size = lambda leaf: tile.shape if leaf.ndim == count else (*tile.lanes, *leaf.shape[len(tile.lanes) :])
        wide = [jnp.broadcast_to(self.leaves[n], size(self.leaves[n])) for n in moved]
        raw, d_logits = level(self.raw, d_logits)
        _, pull = jax.vjp(self._modify(moved), raw, *wide)
        d_raw, *d_leaves = pull(d_logits)
        d_leaves = (d.astype(self.visit.accumulate) for d in d_leaves)
        return self.masked(d_raw), {positions[n]: d for n, d in zip(moved, d_leaves, strict=True)}

    def _modify(self, moved: list[int]) -> Any:
        """The scores as a function of the raw logits and of some of their operands."""

        def modify(raw: Array, *some: Array) -> Array:
            leaves = list(self.leaves)
            for n, leaf in zip(moved, some, strict=True):
                leaves[n] = leaf
            return self.program.modify(raw, self.tile, leaves)

        return modify


def _visible(program: Program, visit: Visit, own: list[Array]) -> Array | None:
    """Which pairs of the tile count, of at least the tile's last two axes; `None` for all."""
    if not visit.masked:
        return None
    seen = program.visible(visit.tile, own)
    if visit.fresh is not None:
        seen = visit.fresh if seen is None else seen & visit.fresh
    if seen is None:
        return None
    lead = (1,) * (len(visit.tile.shape) - max(seen.ndim, 2)) + seen.shape[:-2]
    return jnp.broadcast_to(seen, (*lead, *visit.tile.shape[-2:]))


def _rows(part: Array) -> Array:
    """Tile form of an array by query, without the key axis: [*lanes, K, G, t, *]."""
    return part[..., 0, :]


def _columns(part: Array) -> Array:
    """Tile form of an array by key, without the axes of the query: [*lanes, K, s, *]."""
    return part[..., 0, 0, :, :]
