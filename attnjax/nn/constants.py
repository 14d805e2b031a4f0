"""`Constant`: arrays of masks and scores that a module holds, as variables: saved, moved, updated, not trained."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnjax.core.node import Node, is_array


class Constant(nnx.Variable):
    """An array that a module holds and does not train, such as the slopes of an ALiBi.

    It is no `nnx.Param`, so that gradients and optimizers pass it by. Everything else takes it like a parameter:
    checkpoints, `nnx.update`, donation, scans.

    Example:
      >>> from attnjax import ALiBi
      >>> from attnjax.nn import Constant, MultiHeadAttention
      >>> from flax import nnx
      >>> layer = MultiHeadAttention(64, 8, score=ALiBi.for_heads(8), rngs=nnx.Rngs(0))
      >>> nnx.state(layer, Constant)["score"][0]["slopes"].shape
      (8,)
    """


def held(value: Any) -> Any:
    """A mask, a score, a tuple of them, or an array, as a module holds it: with variables in the places of arrays.

    The arrays are copied, so that what one module donates is no other's. They become constants; what comes in an
    `nnx.Param`, `nnx.Param(ALiBi.for_heads(8))`, parameters, where it is of floats.
    """
    if isinstance(value, tuple):
        return tuple(map(held, value))
    if isinstance(value, nnx.Variable):
        learned, value = value, value.get_value()
        wrap = lambda x: learned.replace(x) if jnp.issubdtype(x.dtype, jnp.floating) else Constant(x)
    else:
        wrap = Constant
    return jax.tree.map(lambda x: wrap(_copied(x)) if is_array(x) else x, _known(value))


def plain(value: Any) -> Any:
    """What `held` was given: arrays in the places of variables."""
    variable = lambda x: isinstance(x, nnx.Variable)
    return jax.tree.map(lambda x: x.get_value() if variable(x) else x, value, is_leaf=variable)


def unwrapped(value: Any) -> Any:
    """A score that may stand in an `nnx.Param`, for checks of what it is."""
    return value.get_value() if isinstance(value, nnx.Variable) else value


def _copied(x: Any) -> Any:
    return x if isinstance(x, jax.ShapeDtypeStruct) else jnp.array(x)


def _known(value: Any) -> Any:
    """With Python's integers in the places of numpy's, which would not be known under `jit`."""
    if isinstance(value, np.integer):
        return int(value)
    if not isinstance(value, Node):
        return value
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}  # type: ignore[arg-type]
    changed = {name: new for name, old in fields.items() if (new := _known(old)) is not old}
    return dataclasses.replace(value, **changed) if changed else value  # type: ignore[type-var]
