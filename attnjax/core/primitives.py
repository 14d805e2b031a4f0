"""`register`: gives a primitive its shapes, batching, Taylor series and, per platform, its body. Knows no primitive."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from attnjax.core.context import in_64_bits, own_settings
from attnjax.core.mesh_types import placed_as
from attnjax.core.sharding import compiled_for_several
from attnjax.core.taylor import give_series
from attnjax.tuning import PLATFORMS

Array = jax.Array


def register(
    primitive: Primitive,
    abstract: Any,
    body: Any,
    batch: Any,
) -> None:
    """Gives a primitive its shapes, its batching, its Taylor series and, per platform, its body.

    The body is a function of the operands, `platform`, `exported` (by `jax.export`), `divided` (over several devices,
    by XLA) and the parameters. Inside `jax.shard_map` it is told nothing of the devices: kernels know no such types.
    """
    primitive.def_abstract_eval(abstract)
    compiled = jax.jit(lambda *args, params: primitive.bind(*args, **dict(params)), static_argnames="params")

    def eager(*args: Array, **params: Any) -> list[Array]:
        with jax.disable_jit(False):
            return compiled(*args, params=tuple(params.items()))

    primitive.def_impl(eager)
    batching.primitive_batchers[primitive] = batch
    give_series(primitive)
    for platform in (None, *PLATFORMS):

        def lower(ctx: Any, *args: Any, platform: str | None = platform, **params: Any) -> Any:
            exported = ctx.module_context.lowering_parameters.for_export
            divided = not exported and compiled_for_several(ctx)
            bound = partial(body, platform=platform or "other", exported=exported, divided=divided)
            types = ctx.avals_out

            def placed(*args: Array, **params: Any) -> list[Array]:
                return [placed_as(x, aval) for x, aval in zip(bound(*args, **params), types, strict=True)]

            plain = lambda avals: [ShapedArray(a.shape, a.dtype) for a in avals]
            ctx = ctx.replace(avals_in=plain(ctx.avals_in), avals_out=plain(types))
            with own_settings(wide=in_64_bits([*ctx.avals_in, *types])):
                return mlir.lower_fun(placed, multiple_results=True)(ctx, *args, **params)

        mlir.register_lowering(primitive, lower, platform=platform)


def lead(operands: list, dims: list) -> tuple[list, int]:
    """Gives every operand the mapped axis in front: of full size where it is mapped, of size 1 where it is not."""
    size = next(x.shape[d] for x, d in zip(operands, dims, strict=True) if d is not None)
    moved = [x[None] if d is None else jnp.moveaxis(x, d, 0) for x, d in zip(operands, dims, strict=True)]
    return moved, size
