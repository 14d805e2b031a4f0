"""implementation="reference": the formula itself, with the T x S matrix. For checking, and to be read; not fast.

Its derivatives are JAX's own, of the plain formula, so that they check the tiled ones.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.core.operations import HARMLESS
from attnjax.core.products import product
from attnjax.core.program import Problem
from attnjax.core.softmax import Rows, finite, inverse, log_sum_exp, settled
from attnjax.core.tiles import Tile, from_tile_form, tile_form
from attnjax.core.walk import push

Array = jax.Array


def unsupported(problem: Problem, operands: list[Any], platform: str, part: str) -> str | None:
    """A reason why this implementation cannot take the problem, or `None`."""
    return None if problem.config is None else "reference has no config: leave config out"


def blocks(problem: Problem, platform: str) -> None:
    """There are none: the whole T x S matrix at once."""


def temporary_bytes(problem: Problem, operands: list[Any], platform: str) -> dict[str, int]:
    """About how much memory each part needs beside its arguments and results: a few T x S matrices."""
    sizes = problem.sizes
    matrix = math.prod(sizes.batch) * sizes.heads * sizes.query_length * sizes.key_length * problem.accumulate.itemsize
    return {"forward": 2 * matrix, "backward": 4 * matrix, "tangent": 4 * matrix}


def forward(problem: Problem, operands: list[Array], platform: str) -> Rows:
    """The output, and highest and total of the softmax, all in operand form."""
    program, sizes, n = problem.program, problem.sizes, len(problem.sizes.batch)
    parts = [tile_form(x, axes, n, sizes.group) for x, axes in zip(operands, program.axes, strict=False)]
    parts = list(map(problem.wide, parts))
    spans = (0, sizes.key_heads), (0, sizes.query_length), (0, sizes.key_length)
    tile = Tile(sizes, sizes.batch_index(), sizes.batch, *spans)
    seen = program.visible(tile, parts)
    query, key, value = parts[0][..., 0, :], parts[1][..., 0, 0, :, :], parts[2][..., 0, 0, :, :]
    if seen is not None:  # the barrier keeps XLA from computing with a constant mask while it compiles, pair by pair
        seen = jax.lax.optimization_barrier(jnp.broadcast_to(seen, tile.shape))
    # What the mask hides has no part in them: it may hold anything, even NaN.
    multiply = partial(product, visible=seen, factors=problem.accumulate, accumulate=problem.accumulate)
    logits = multiply("kgth,ksh->kgts", query * program.scale, key)
    logits, seen = _scored(problem, logits, tile, [parts[i] for i in program.score_positions()], seen)
    logits = settled(logits)
    logits = logits if seen is None else jnp.where(seen, logits, -jnp.inf)
    highest = logits.max(-1)
    if program.sinks:
        sinks = tile_form(operands[3], "h", n, sizes.group)[..., 0].astype(problem.accumulate)
        highest = jnp.maximum(highest, sinks)
    highest = jax.lax.stop_gradient(finite(highest))
    weights = jnp.exp(logits - highest[..., None])
    total = weights.sum(-1)
    if program.sinks:
        total = total + jnp.exp(sinks - highest)
    weights = program.drop(weights * inverse(total)[..., None], tile, parts)
    out = multiply("kgts,ksv->kgtv", weights, value)
    out = from_tile_form(out[..., None, :], "th.", n).astype(problem.dtype)
    out_shape, row_shape = problem.out_shapes()
    rows = (jnp.broadcast_to(from_tile_form(x[..., None], "th", n), row_shape) for x in (highest, total))
    return Rows(jnp.broadcast_to(out, out_shape), *rows)


def _scored(problem: Problem, logits: Array, tile: Tile, leaves: list[Array], seen: Array | None) -> Any:
    """The logits after the scores, and which pairs count: not those that the mask hides, or a score puts to -inf.

    The derivatives of scores are 0 at others, also where they would be infinite.
    """
    program = problem.program
    if seen is not None and program.scores:
        logits, tile = jnp.where(seen, logits, HARMLESS), tile.counting(seen)
    made = program.modify(logits, tile, leaves)
    if program.hides(problem.accumulate):
        counted = jax.lax.stop_gradient(made) != -jnp.inf
        seen = counted if seen is None else seen & counted
        made = program.modify(logits, tile.counting(seen), leaves)
    return made, seen


def tangent(
    problem: Problem, operands: list[Array], rows: Rows, moved: tuple[int, ...], tangents: list[Array]
) -> tuple[Array, Array]:
    """Tangents of the output and the log-sum-exp, linear in the tangents of the operands in `moved`."""
    f = lambda *some: _out_and_lse(problem, _with(operands, moved, some))
    return push(f, [operands[i] for i in moved], tangents)


def backward(
    problem: Problem,
    operands: list[Array],
    rows: Rows,
    ct_out: Array,
    ct_lse: Array,
    wanted: tuple[tuple[int, tuple[int, ...]], ...],
) -> list[Array]:
    """Gradients of the operands in `wanted`: pairs of position and shape (batch axes of size 1 are summed over)."""
    positions = tuple(i for i, _ in wanted)
    wide = [jnp.broadcast_to(operands[i], _widest(operands[i].shape, shape)) for i, shape in wanted]
    _, pull = jax.vjp(lambda *some: _out_and_lse(problem, _with(operands, positions, some)), *wide)
    return list(pull((ct_out.astype(problem.dtype), ct_lse)))


def _out_and_lse(problem: Problem, operands: list[Array]) -> tuple[Array, Array]:
    rows = forward(problem, operands, "")
    return rows.out, log_sum_exp(rows.highest, rows.total)


def _widest(have: tuple[int, ...], want: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(a, b) for a, b in zip(have, want, strict=True))


def _with(operands: list[Array], positions: tuple[int, ...], values: Any) -> list[Array]:
    operands = list(operands)
    for i, value in zip(positions, values, strict=True):
        operands[i] = value
    return operands
