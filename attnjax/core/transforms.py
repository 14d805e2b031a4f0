"""The three primitives of attention and their rules. `attend` binds them; every transform follows from here.

    attention           operands -> out, and highest and total: lse = highest + log(total), -inf where the total is 0
    attention_tangent   linear in the tangents; the derivatives of out and lse
    attention_backward  linear in the cotangents; its transpose, the flash backward

Each is lowered per platform by the implementation that `core.dispatch` chooses there. Derivatives of the last two
(second order and up) differentiate the tiled code, whose sweeps have rules of their own (`core.sweep`).

What a derivative keeps of the attention is named, so that policies of `jax.checkpoint` can keep it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive
from jax.interpreters import ad

from attnjax.core.context import own_settings
from attnjax.core.dispatch import choose, shares
from attnjax.core.mesh_types import Operand, check_positions, placed_as, result_types, untyped, vary_together
from attnjax.core.primitives import lead, register
from attnjax.core.program import Problem
from attnjax.core.sharding import shared_out, tell_devices
from attnjax.core.softmax import Rows, finite, log_sum_exp
from attnjax.core.walk import push

Array = jax.Array
Shapes = list[tuple[int, ...]]
Wanted = tuple[tuple[int, tuple[int, ...]], ...]  # positions of operands and the shapes of their gradients
_ROWS = ("th.", "th", "th")
_NAMES = ("attention_out", "attention_lse", "attention_lse")  # of rows


@partial(jax.jit, static_argnums=0)
def attend(problem: Problem, operands: list[Array]) -> list[Array]:
    """Attention as one differentiable operation: operands in operand form -> [out], and lse where it is returned."""
    out, highest, total = attention_p.bind(*vary_together(operands), problem=problem)
    return [out, log_sum_exp(highest, total)] if problem.returns_lse else [out]


@partial(jax.jit, static_argnums=0)
def highest(problem: Problem, operands: list[Array]) -> Array:
    """The largest logit of each query [*batch, T, N], -inf where it sees no key; of a problem without values."""
    _, most, total = attention_p.bind(*vary_together(operands), problem=problem)
    return jnp.where(total == 0, -jnp.inf, most)


attention_p, tangent_p, backward_p = (Primitive(f"attention{x}") for x in ("", "_tangent", "_backward"))
for _primitive in (attention_p, tangent_p, backward_p):
    _primitive.multiple_results = True
    tell_devices(_primitive)


def _outputs(problem: Problem, rows: int) -> list[Operand]:
    """out, and so many numbers per query."""
    out, row = problem.out_shapes()
    return [Operand("th.", out, problem.dtype), *[Operand("th", row, problem.accumulate)] * rows]


def _gradients(problem: Problem, wanted: Wanted) -> list[Operand]:
    return [Operand(problem.program.axes[i], shape, problem.accumulate) for i, shape in wanted]


def _attention_types(*operands: Any, problem: Problem) -> list[Any]:
    axes = problem.program.axes
    check_positions(axes, operands, len(problem.sizes.batch), problem.program.name_of)
    return result_types(problem.sizes, axes, operands, _outputs(problem, 2))


def _tangent_axes(problem: Problem, moved: tuple[int, ...]) -> list[str]:
    return [*problem.program.axes, *_ROWS, *(problem.program.axes[i] for i in moved)]


def _tangent_types(*args: Any, problem: Problem, moved: tuple[int, ...]) -> list[Any]:
    return result_types(problem.sizes, _tangent_axes(problem, moved), args, _outputs(problem, 1))


def _backward_axes(problem: Problem) -> list[str]:
    return [*problem.program.axes, *_ROWS, "th.", "th"]


def _backward_types(*args: Any, problem: Problem, wanted: Wanted) -> list[Any]:
    likes = [args[i] for i, _ in wanted]
    return result_types(problem.sizes, _backward_axes(problem), args, _gradients(problem, wanted), likes)


def _attention(*operands: Array, platform: str, exported: bool, divided: bool, problem: Problem) -> list[Array]:
    def body(problem: Problem, shapes: Shapes) -> Any:
        def run(*operands: Array) -> list[Array]:
            choice = choose(problem, list(operands), platform, "forward", exported=exported)
            rows = choice.kernel.forward(choice.own(problem), list(operands), platform)
            # The total says already where nothing is seen. Infinities would be found by jax.debug_infs.
            return list(rows._replace(highest=finite(rows.highest)))

        return run

    return _run(body, problem, operands, [*problem.program.axes], _outputs(problem, 2), divided)


def _attention_jvp(primals: list, tangents: list, *, problem: Problem) -> Any:
    rows = Rows(*map(checkpoint_name, attention_p.bind(*primals, problem=problem), _NAMES))
    zeros = [ad.Zero(jax.typeof(x)) for x in rows]
    moved = tuple(i for i in problem.differentiable if type(tangents[i]) is not ad.Zero)
    if not moved:
        return list(rows), zeros
    values = [tangents[i] for i in moved]
    d_out, d_lse = tangent_p.bind(*primals, *rows, *values, problem=problem, moved=moved)
    # Any `highest` gives the same attention, so it may stand still: d lse = d total / total.
    return list(rows), [d_out, zeros[1], rows.total * d_lse]


def _attention_transpose(cotangents: list, *operands: Any, problem: Problem) -> list:
    """The transpose with respect to value, in which out is linear, and what the softmax sums is constant."""
    unknown = [i for i, x in enumerate(operands) if ad.is_undefined_primal(x)]
    if unknown != [2]:
        names = ", ".join(problem.program.name_of(i) for i in unknown if i != 2)
        raise NotImplementedError(
            f"jax.linear_transpose: attention is linear in value, and not in {names}. Its gradient by {names}: jax.vjp."
        )
    aval, ct_out = operands[2].aval, cotangents[0]
    if type(ct_out) is ad.Zero:
        return [ad.Zero(aval) if i == 2 else None for i in range(len(operands))]
    none = placed_as(jnp.zeros(aval.shape, aval.dtype), aval)  # the softmax does not depend on values
    known = [none if i == 2 else x for i, x in enumerate(operands)]
    rows = attention_p.bind(*known, problem=problem)
    wanted = ((2, tuple(aval.shape)),)
    made = backward_p.bind(*known, *rows, ct_out, jnp.zeros_like(rows[2]), problem=problem, wanted=wanted)
    return [placed_as(made[0].astype(aval.dtype), aval) if i == 2 else None for i in range(len(operands))]


def _attention_batch(operands: list, dims: list, *, problem: Problem) -> Any:
    operands, size = lead(operands, dims)
    return attention_p.bind(*operands, problem=problem.with_batch(size)), [0, 0, 0]


def _tangent(
    *args: Array, platform: str, exported: bool, divided: bool, problem: Problem, moved: tuple[int, ...]
) -> list[Array]:
    """Operands, rows, and the tangents of the operands in `moved`."""
    count = problem.program.count

    def body(problem: Problem, shapes: Shapes) -> Any:
        def run(*args: Array) -> list[Array]:
            operands, rows, tangents = list(args[:count]), Rows(*args[count : count + 3]), list(args[count + 3 :])
            choice = choose(problem, operands, platform, "tangent", exported=exported)
            kernel, own = choice.kernel, choice.own(problem)
            if choose(problem, operands, platform, "forward", exported=exported).kernel is not kernel:
                rows = kernel.own_rows(own, operands, rows)
            return list(kernel.tangent(own, operands, rows, moved, tangents))

        return run

    return _run(body, problem, args, _tangent_axes(problem, moved), _outputs(problem, 1), divided)


def _tangent_jvp(primals: list, tangents: list, *, problem: Problem, moved: tuple[int, ...]) -> Any:
    linear = len(primals) - len(moved)
    bind = partial(tangent_p.bind, problem=problem, moved=moved)
    made = bind(*primals)
    if all(type(t) is ad.Zero for t in tangents[:linear]):
        return made, bind(*primals[:linear], *map(ad.instantiate_zeros, tangents[linear:]))
    return made, _derivative(partial(_tangent, problem=problem, moved=moved), primals, tangents, made)


def _tangent_transpose(cotangents: list, *args: Any, problem: Problem, moved: tuple[int, ...]) -> list:
    linear = len(args) - len(moved)
    wanted = [(i, x.aval) for i, x in zip(moved, args[linear:], strict=True) if ad.is_undefined_primal(x)]
    made = backward_p.bind(
        *args[:linear],
        *map(ad.instantiate_zeros, cotangents),
        problem=problem,
        wanted=tuple((i, tuple(aval.shape)) for i, aval in wanted),
    )
    made = {i: placed_as(x.astype(aval.dtype), aval) for (i, aval), x in zip(wanted, made, strict=True)}
    return [None] * linear + [made.get(i) for i in moved]


def _tangent_batch(args: list, dims: list, *, problem: Problem, moved: tuple[int, ...]) -> Any:
    args, size = lead(args, dims)
    args = _whole(args, problem.program.count, size, 3)
    return tangent_p.bind(*args, problem=problem.with_batch(size), moved=moved), [0, 0]


def _backward(
    *args: Array, platform: str, exported: bool, divided: bool, problem: Problem, wanted: Wanted
) -> list[Array]:
    """Operands, rows, and the cotangents of out and lse; gives float32 (float64) gradients."""
    count = problem.program.count
    positions = [i for i, _ in wanted]

    def body(problem: Problem, shapes: Shapes) -> Any:
        def run(*args: Array) -> list[Array]:
            operands, rows, cotangents = list(args[:count]), Rows(*args[count : count + 3]), args[count + 3 :]
            made = {}
            for choice, able in shares(problem, operands, platform, exported=exported):
                own = tuple((i, shape) for i, shape in zip(positions, shapes, strict=True) if i in able)
                if own:
                    gradients = choice.kernel.backward(choice.own(problem), operands, rows, *cotangents, own)
                    made |= {i: x for (i, _), x in zip(own, gradients, strict=True)}
            return [made[i].astype(problem.accumulate) for i in positions]

        return run

    return _run(body, problem, args, _backward_axes(problem), _gradients(problem, wanted), divided)


def _backward_jvp(primals: list, tangents: list, *, problem: Problem, wanted: Wanted) -> Any:
    bind = partial(backward_p.bind, problem=problem, wanted=wanted)
    made = bind(*primals)
    if all(type(t) is ad.Zero for t in tangents[:-2]):
        return made, bind(*primals[:-2], *map(ad.instantiate_zeros, tangents[-2:]))
    return made, _derivative(partial(_backward, problem=problem, wanted=wanted), primals, tangents, made)


def _backward_transpose(cotangents: list, *args: Any, problem: Problem, wanted: Wanted) -> list:
    live = [(i, c) for (i, _), c in zip(wanted, cotangents, strict=True) if type(c) is not ad.Zero]
    types = [args[i].dtype for i, _ in live]
    made = tangent_p.bind(
        *args[:-2],
        *(c.astype(dtype) for (_, c), dtype in zip(live, types, strict=True)),
        problem=problem,
        moved=tuple(i for i, _ in live),
    )
    results = [
        placed_as(x.astype(a.aval.dtype), a.aval) if ad.is_undefined_primal(a) else None
        for a, x in zip(args[-2:], made, strict=True)
    ]
    return [None] * (len(args) - 2) + results


def _backward_batch(args: list, dims: list, *, problem: Problem, wanted: Wanted) -> Any:
    args, size = lead(args, dims)
    args = _whole(args, problem.program.count, size, 5)
    wanted = tuple((i, (size, *shape)) for i, shape in wanted)
    return backward_p.bind(*args, problem=problem.with_batch(size), wanted=wanted), [0] * len(wanted)


def _run(
    body: Any,
    problem: Problem,
    args: tuple[Array, ...],
    axes: list[str],
    results: list[Operand],
    divided: bool,
) -> list[Array]:
    """Runs a body: on each device its own share, where it is compiled for several and no array is empty."""
    arguments = [Operand(a, tuple(x.shape), x.dtype) for a, x in zip(axes, args, strict=True)]
    if not divided or any(0 in x.shape for x in (*arguments, *results)):
        return body(problem, [r.shape for r in results])(*args)
    return shared_out(body, problem, arguments, results)(*args)


def _whole(args: list, first: int, size: int, count: int) -> list:
    """Rows and cotangents always have every batch axis."""
    args = list(args)
    for i in range(first, first + count):
        args[i] = jnp.broadcast_to(args[i], (size, *args[i].shape[1:]))
    return args


def _derivative(body: Any, primals: list, tangents: list, results: list) -> list[Array]:
    """The tangent of a body of tiled code that has given these results, where it is moved as a whole."""
    moved = [i for i, t in enumerate(tangents) if type(t) is not ad.Zero]

    def derivative(*some: Array) -> list[Array]:
        primals, tangents = some[: -len(moved)], some[-len(moved) :]

        def moving(*values: Array) -> list[Array]:
            args = list(primals)
            for i, x in zip(moved, values, strict=True):
                args[i] = x
            return body(*args, platform="", exported=False, divided=False)

        with own_settings(keep_mesh=True):
            return list(push(moving, [primals[i] for i in moved], tangents))

    return untyped(derivative, [jax.typeof(x) for x in results])(*primals, *(tangents[i] for i in moved))


def _register() -> None:
    register(attention_p, _attention_types, _attention, _attention_batch)
    register(tangent_p, _tangent_types, _tangent, _tangent_batch)
    register(backward_p, _backward_types, _backward, _backward_batch)
    ad.primitive_jvps[attention_p] = _attention_jvp
    ad.primitive_transposes[attention_p] = _attention_transpose
    ad.primitive_jvps[tangent_p] = _tangent_jvp
    ad.primitive_transposes[tangent_p] = _tangent_transpose
    ad.primitive_jvps[backward_p] = _backward_jvp
    ad.primitive_transposes[backward_p] = _backward_transpose


_register()
