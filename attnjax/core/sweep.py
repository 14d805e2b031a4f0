"""`sweep`: sums a tile function over all visible tiles, as a primitive that is closed under differentiation.

A sweep maps operands to outputs, out = sum over tiles of fn(parts of the operands). Its derivative is the sweep of
fn's derivative, its transpose the sweep of fn's transpose: derivatives of every order are loops of the same kind over
the same tiles, skip the same blocks, save nothing between tiles, and so need memory linear in T and S.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad

from attnjax.core.mesh_types import Operand, placed_as, result_types
from attnjax.core.primitives import lead, register
from attnjax.core.program import Problem
from attnjax.core.walk import Output, Visit, Walk, push, reduce_to
from attnjax.tuning import choose_blocks

Array = jax.Array


class TileFunction(Protocol):
    """What is summed: a frozen dataclass, so that equal functions compile once.

    The first operands are those of the problem; `linear` are positions in which the function is linear, jointly;
    `flipped` are outputs by key that it gives as [..., free, s] (see `core.walk.Output`).
    """

    @property
    def linear(self) -> tuple[int, ...]: ...

    @property
    def flipped(self) -> tuple[int, ...]: ...

    def __call__(self, visit: Visit, *parts: Array) -> list[Array]: ...


def sweep(
    problem: Problem, fn: TileFunction, operands: list[Array], axes: list[str], outputs: list[Output]
) -> list[Array]:
    """Sums `fn` over the visible tiles.

    Args:
      problem: sizes, mask and scores; its own operands come first in `operands`.
      fn: (visit, parts in tile form) -> one part per output, in tile form.
      operands: arrays in operand form with all batch axes; `axes` of each (see `core.tiles`).
      outputs: what comes out; float32 (float64) whatever their own dtype says.

    Returns:
      One array per output.
    """
    outputs = [dataclasses.replace(o, dtype=problem.accumulate) for o in outputs]
    return sweep_p.bind(*operands, problem=problem, fn=fn, axes=tuple(axes), outputs=tuple(outputs))


def product_type(problem: Problem, platform: str) -> Any:
    """Factors of matrix products: 16-bit floats stay so where the hardware multiplies them."""
    low = problem.dtype in ("bfloat16", "float16") and platform != "cpu"
    return jnp.dtype(problem.dtype).type if low else jnp.dtype(problem.accumulate).type


def _run(
    *operands: Array,
    platform: str,
    exported: bool,
    divided: bool,
    problem: Problem,
    fn: TileFunction,
    axes: tuple,
    outputs: tuple,
) -> list:
    if not problem.pairs:
        return [jnp.zeros(o.shape, o.dtype) for o in outputs]
    rows = [o.by_row for o in outputs]
    outputs = tuple(dataclasses.replace(o, flipped=i in fn.flipped) for i, o in enumerate(outputs))

    def start(shape: tuple[int, ...]) -> list[Array]:
        n = len(problem.sizes.batch)
        lanes = lambda o: tuple(1 if d == 1 else lane for d, lane in zip(o.shape[:n], shape[:n], strict=True))
        part = lambda o: _part_shape(o.axes, o.shape[n:], shape, lanes(o))
        return [jnp.zeros(part(o), problem.accumulate) for o in outputs if o.by_row]

    def step(visit: Visit, state: list[Array], parts: list[Array]) -> tuple[list[Array], list[Array]]:
        made = fn(visit, *parts)
        by_row = (x for x, row in zip(made, rows, strict=True) if row)
        state = [total + reduce_to(x, total.shape) for total, x in zip(state, by_row, strict=True)]
        return state, [x for x, row in zip(made, rows, strict=True) if not row]

    blocks = choose_blocks(problem, platform)
    kinds = problem.kinds(list(operands), blocks.block_q, blocks.block_k)
    return Walk(
        problem,
        blocks,
        kinds,
        list(operands),
        list(axes),
        list(outputs),
        start,
        step,
        lambda state: state,
        product=product_type(problem, platform),
    ).run()


def _part_shape(axes: str, own: tuple[int, ...], tile: tuple[int, ...], lanes: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in tile form of the part that a tile has of an array with these axes of these sizes (batch left out)."""
    named = dict(zip(axes, own, strict=True))
    kv, group, t, s = tile[-4:]
    heads = (1, 1) if named.get("h", 1) == 1 else (kv, group)
    heads = (kv, 1) if named.get("k", 1) > 1 else heads
    t, s = (1 if named.get(a, 1) == 1 else size for a, size in (("t", t), ("s", s)))
    return (*lanes, *heads, t, s, *(size for a, size in zip(axes, own, strict=True) if a == "."))


@dataclasses.dataclass(frozen=True)
class _Derivative:
    """The tangent of `fn` when the operands in `moved` move; their tangents are appended to the operands."""

    fn: TileFunction
    count: int
    moved: tuple[int, ...]

    @property
    def linear(self) -> tuple[int, ...]:
        return tuple(range(self.count, self.count + len(self.moved)))

    @property
    def flipped(self) -> tuple[int, ...]:
        return self.fn.flipped

    def __call__(self, visit: Visit, *parts: Array) -> list[Array]:
        visit = dataclasses.replace(visit, derived=True)
        primals, tangents = list(parts[: self.count]), parts[self.count :]

        def moving(*values: Array) -> list[Array]:
            return self.fn(visit, *_replaced(primals, self.moved, values))

        return push(moving, [primals[i] for i in self.moved], tangents)


@dataclasses.dataclass(frozen=True)
class _Transpose:
    """The transpose of `fn`, linear in `of`: those operands are gone, cotangents of the outputs in `live` appended."""

    fn: TileFunction
    count: int
    of: tuple[int, ...]
    live: tuple[int, ...]
    specs: tuple[tuple[str, tuple[int, ...]], ...]  # axes and sizes, batch left out, of the operands in `of`

    @property
    def linear(self) -> tuple[int, ...]:
        rest = self.count - len(self.of)
        return tuple(range(rest, rest + len(self.live)))

    @property
    def flipped(self) -> tuple[int, ...]:
        return ()

    def __call__(self, visit: Visit, *parts: Array) -> list[Array]:
        rest = self.count - len(self.of)
        cotangents, fixed = parts[rest : rest + len(self.live)], iter(parts[:rest])
        visit = dataclasses.replace(visit, derived=True)
        tile = visit.tile
        shapes = [_part_shape(axes, own, tile.shape, tile.lanes) for axes, own in self.specs]
        whole = [None if i in self.of else next(fixed) for i in range(self.count)]

        def applied(*values: Array) -> list[Array]:
            made = self.fn(visit, *_replaced(whole, self.of, values))
            made = [jnp.swapaxes(x, -1, -2) if i in self.fn.flipped else x for i, x in enumerate(made)]
            return [reduce_to(made[i], c.shape) for i, c in zip(self.live, cotangents, strict=True)]

        likes = [jax.ShapeDtypeStruct(shape, visit.accumulate) for shape in shapes]
        return list(jax.linear_transpose(applied, *likes)(list(cotangents)))


def _replaced(values: list, positions: tuple[int, ...], new: Any) -> list:
    values = list(values)
    for position, value in zip(positions, new, strict=True):
        values[position] = value
    return values


sweep_p = Primitive("attention_sweep")
sweep_p.multiple_results = True


def _abstract(*operands: Any, problem: Problem, fn: TileFunction, axes: tuple, outputs: tuple) -> list:
    made = [Operand(o.axes, o.shape, o.dtype) for o in outputs]
    return result_types(problem.sizes, axes, operands, made)


def _jvp(primals: list, tangents: list, *, problem: Problem, fn: TileFunction, axes: tuple, outputs: tuple) -> Any:
    made = sweep_p.bind(*primals, problem=problem, fn=fn, axes=axes, outputs=outputs)
    moved = tuple(i for i, t in enumerate(tangents) if type(t) is not ad.Zero)
    if not moved:
        return made, [ad.Zero(jax.typeof(x)) for x in made]
    if set(moved) <= set(fn.linear):  # the function is its own derivative
        values = [
            ad.instantiate_zeros(t) if i in fn.linear else p
            for i, (p, t) in enumerate(zip(primals, tangents, strict=True))
        ]
        return made, sweep_p.bind(*values, problem=problem, fn=fn, axes=axes, outputs=outputs)
    derivative = _Derivative(fn, len(primals), moved)
    more = [tangents[i] for i in moved]
    axes = (*axes, *(axes[i] for i in moved))
    return made, sweep_p.bind(*primals, *more, problem=problem, fn=derivative, axes=axes, outputs=outputs)


def _transpose(
    cotangents: list, *operands: Any, problem: Problem, fn: TileFunction, axes: tuple, outputs: tuple
) -> list:
    of = tuple(i for i, x in enumerate(operands) if ad.is_undefined_primal(x))
    live = tuple(i for i, c in enumerate(cotangents) if type(c) is not ad.Zero)
    if not live:
        return [ad.Zero(operands[i].aval) if i in of else None for i in range(len(operands))]
    n = len(problem.sizes.batch)
    specs = tuple((axes[i], tuple(operands[i].aval.shape[n:])) for i in of)
    transposed = _Transpose(fn, len(operands), of, live, specs)
    rest = [i for i in range(len(operands)) if i not in of]
    values = [operands[i] for i in rest] + [cotangents[i] for i in live]
    named = (*(axes[i] for i in rest), *(outputs[i].axes for i in live))
    wanted = tuple(Output(axes[i], tuple(operands[i].aval.shape), problem.accumulate) for i in of)
    made = sweep_p.bind(*values, problem=problem, fn=transposed, axes=named, outputs=wanted)
    results: list[Any] = [None] * len(operands)
    for i, x in zip(of, made, strict=True):
        results[i] = placed_as(x.astype(operands[i].aval.dtype), operands[i].aval)
    return results


def _batch(operands: Any, dims: Any, *, problem: Problem, fn: TileFunction, axes: tuple, outputs: tuple) -> Any:
    operands, size = lead(operands, dims)
    outputs = tuple(dataclasses.replace(o, shape=(size, *o.shape)) for o in outputs)
    made = sweep_p.bind(*operands, problem=problem.with_batch(size), fn=fn, axes=axes, outputs=outputs)
    return made, [0] * len(outputs)


register(sweep_p, _abstract, _run, _batch)
ad.primitive_jvps[sweep_p] = _jvp
ad.primitive_transposes[sweep_p] = _transpose
