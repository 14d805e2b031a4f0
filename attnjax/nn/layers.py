"""What all modules are made of: projections, norms, and the logical names of parameters' axes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from flax.core import meta, spmd
from jax._src.mesh import thread_resources  # has no public name: what `with mesh:` sets

from attnjax.attention import attention
from attnjax.core.mesh_types import gathered, names_of, with_auto_axes
from attnjax.nn.checks import check_name

Array = jax.Array

default_kernel_init = nnx.initializers.lecun_normal()
default_bias_init = nnx.initializers.zeros_init()
default_table_init = nnx.initializers.normal(1.0)
default_embedding_init = nnx.initializers.normal(0.02)


class LayerNorm(nnx.LayerNorm):
    """Flax's, with parameters that may lie divided over any axes of a mesh: they are gathered."""

    def __call__(self, x: Array, **options: Any) -> Array:
        return nnx.LayerNorm.__call__(_whole(self), x, **options)


class RMSNorm(nnx.RMSNorm):
    """Flax's, with a parameter that may lie divided over any axes of a mesh: it is gathered."""

    def __call__(self, x: Array, **options: Any) -> Array:
        return nnx.RMSNorm.__call__(_whole(self), x, **options)


def _whole(norm: Any) -> Any:
    """The norm, each of its parameters whole on each device where types tell that they are not."""
    if not names_of(jax.typeof(norm.scale[...]), 0):
        return norm
    graph, state = nnx.split(norm)
    return nnx.merge(graph, jax.tree.map(gathered, state))


NORMS = {"layer": LayerNorm, "rms": RMSNorm}


def named(*axes: str | None) -> dict[str, Any]:
    """Metadata of a parameter with these logical axis names.

    They say where it may be divided; `nnx.get_partition_spec` reads them. A parameter is placed as soon as it is made
    where both a mesh (`jax.set_mesh`) and rules (`nnx.logical_axis_rules`) are given; otherwise nothing changes.

    Raises:
      ValueError: rules, and a mesh that was set by `with mesh:`, of which JAX's own functions no longer know.
    """
    rules, placed = bool(spmd.get_logical_axis_rules()), meta.global_mesh_defined()
    if rules and not placed and not thread_resources.env.physical_mesh.empty:
        raise ValueError("attnjax.nn: with mesh: places no parameters. Use jax.set_mesh(mesh) in its place.")
    return {"out_sharding": axes, "eager_sharding": rules and placed}


class Projection(nnx.Module):
    """A linear map of the last axes: `[..., *inputs]` to `[..., *outputs]`.

    It is one product of matrices; only the parameter has more axes, as in `nnx.LinearGeneral`.

    Attributes:
      kernel: `[*inputs, *outputs]`.
      bias: `[*outputs]`, or `None`.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        *,
        axes: tuple[str | None, ...],
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = default_kernel_init,
        bias_init: Callable = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        self.inputs, self.outputs, self.dtype = inputs, outputs, dtype
        shape = (math.prod(inputs), math.prod(outputs))
        self.kernel = _parameter(kernel_init(rngs.params(), shape, param_dtype), (*inputs, *outputs), axes)
        self.bias: nnx.Param | None = nnx.data(None)
        if use_bias:
            made = bias_init(rngs.params(), shape[1:], param_dtype)
            self.bias = _parameter(made, outputs, axes[len(inputs) :])

    def __call__(self, x: Array) -> Array:
        kernel = self.kernel[...]
        bias = None if self.bias is None else self.bias[...]
        x, kernel, bias = promote(x, kernel, bias, dtype=self.dtype)
        outer = x.ndim - len(self.inputs)

        def names(x: Any, kernel: Any, *_: Any) -> list[tuple[str, ...]]:
            outputs = range(len(self.inputs), kernel.ndim)
            return [*(names_of(x, i) for i in range(outer)), *(names_of(kernel, i) for i in outputs)]

        return with_auto_axes(self._mapped, names, x, kernel, *([] if bias is None else [bias]))

    def _mapped(self, x: Array, kernel: Array, bias: Array | None = None) -> Array:
        outer = x.shape[: x.ndim - len(self.inputs)]
        size = math.prod(self.inputs)
        y = x.reshape(*outer, size) @ kernel.reshape(size, -1)
        if bias is not None:
            y = y + bias.reshape((1,) * (y.ndim - 1) + (-1,))
        return y.reshape(*outer, *self.outputs)


def _parameter(made: Any, shape: tuple[int, ...], axes: tuple[str | None, ...]) -> nnx.Param:
    """The parameter; an initializer that brings metadata of its own (`nnx.with_partitioning`) keeps it."""
    if isinstance(made, nnx.VariableMetadata):
        made.raw_value = made.raw_value.reshape(shape)
        return nnx.Param(made)
    return nnx.Param(made.reshape(shape), **named(*axes))


def promote(*arrays: Array | None, dtype: Any) -> list[Any]:
    """All arrays in `dtype`; `None` is the type that they promote to."""
    if dtype is None:
        dtype = jnp.result_type(*(x for x in arrays if x is not None))
    return [None if x is None else x.astype(dtype) for x in arrays]


def make_norm(
    module: str,
    argument: str,
    kind: str,
    size: int,
    *,
    axis: str = "embed",
    epsilon: float = 1e-6,
    use_bias: bool = True,
    dtype: Any = None,
    param_dtype: Any = jnp.float32,
    rngs: nnx.Rngs,
) -> Any:
    """Flax's `nnx.LayerNorm` ("layer") or `nnx.RMSNorm` ("rms") of the last axis.

    Raises:
      ValueError: another name; `module` and `argument` say whose.
    """
    check_name(module, argument, kind, NORMS)
    shared: dict[str, Any] = dict(epsilon=epsilon, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
    shared["scale_metadata"] = named(axis)
    if kind == "rms":
        return RMSNorm(size, **shared)
    return LayerNorm(size, use_bias=use_bias, bias_metadata=named(axis), **shared)


def attention_weights(query: Array, key: Array, **options: Any) -> Array:
    """The weights `[*B, N, T, S]` in the query's dtype: what attention gives for values that are unit vectors.

    Options are those of `attnjax.attention`. Computed by the plain formula, with T x S memory.
    """
    shape = (*key.shape[:-1], key.shape[-3])
    unit = jnp.broadcast_to(jnp.eye(shape[-1], dtype=key.dtype)[:, None], shape)
    weights = attention(query, key, unit, **{**options, "implementation": "reference"})
    return jnp.swapaxes(weights, -3, -2)
