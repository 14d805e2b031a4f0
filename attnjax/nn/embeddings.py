"""From positions and images to vectors. Token embeddings are Flax's own `nnx.Embed`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from attnjax.core.integers import bounded
from attnjax.core.mesh_types import names_of, with_auto_axes
from attnjax.core.node import describe, is_array
from attnjax.nn.checks import check_size
from attnjax.nn.layers import Projection, default_bias_init, default_embedding_init, default_kernel_init, named
from attnjax.positions import sinusoidal_frequencies

Array = jax.Array


class LearnedPositions(nnx.Module):
    """A learned vector for each position.

    Args:
      length: how many positions there are.
      features: size of each vector.
      dtype: of the result; default param_dtype.
      param_dtype: of the parameter `embedding [length, features]`.
      embedding_init: initializer.
      rngs: `nnx.Rngs` with the stream "params".

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.nn import LearnedPositions
      >>> LearnedPositions(128, 64, rngs=nnx.Rngs(0))(jnp.arange(16)).shape
      (16, 64)
    """

    def __init__(
        self,
        length: int,
        features: int,
        *,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        embedding_init: Callable = default_embedding_init,
        rngs: nnx.Rngs,
    ) -> None:
        for argument, size in dict(length=length, features=features).items():
            check_size("LearnedPositions", argument, size)
        self.length, self.dtype = length, dtype or param_dtype
        made = embedding_init(rngs.params(), (length, features), param_dtype)
        self.embedding = nnx.Param(made, **named(None, "embed"))

    def __call__(self, positions: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """The vectors of positions: integers `[*B, T]` to `[*B, T, features]`; NaN for positions that do not exist.

        Raises:
          TypeError: positions that are not integers.
          ValueError: more positions in a row than there are.
        """
        _check_positions("LearnedPositions", positions)
        if positions.ndim and positions.shape[-1] > self.length:
            raise ValueError(
                f"attnjax.nn.LearnedPositions: positions are {describe(positions)}, and there are {self.length}."
            )
        table, rows = self.embedding[...].astype(self.dtype), bounded((1, positions))
        rows = jnp.where(rows < 0, jnp.int32(len(table)), rows)  # which are not counted from the end
        take = lambda table, rows: jnp.take(table, rows, axis=0, mode="fill", fill_value=jnp.nan)
        # Whole vectors: they are added to tokens, whose batch may lie divided over the axes that divide the table.
        names = lambda table, rows: [*(names_of(rows, i) for i in range(rows.ndim)), ()]
        return with_auto_axes(take, names, table, rows)


class SinusoidalPositions(nnx.Module):
    """The fixed vectors of positions of the first Transformer, as in `attnjax.positions.sinusoidal`.

    Args:
      features: size of each vector, even.
      dtype: of the result.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax.nn import SinusoidalPositions
      >>> SinusoidalPositions(64)(jnp.arange(16)).shape
      (16, 64)
    """

    def __init__(self, features: int, *, dtype: Any = jnp.float32) -> None:
        self.features, self.dtype = features, dtype
        sinusoidal_frequencies(features)

    def __call__(self, positions: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """The vectors of positions: integers `[*B, T]` to `[*B, T, features]`."""
        _check_positions("SinusoidalPositions", positions)
        frequencies = jnp.asarray(sinusoidal_frequencies(self.features), jnp.float32)
        angles = jnp.asarray(positions)[..., None].astype(jnp.float32) * frequencies
        table = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
        return table.reshape(*angles.shape[:-1], self.features).astype(self.dtype)


class PatchEmbedding(nnx.Module):
    """Cuts images into patches, row by row, and makes a vector of each.

    Args:
      patch_size: height and width of a patch: an integer, or two.
      channels: C.
      features: size of each vector.
      use_bias: of the projection.
      dtype: of the computation; default: that of the images and parameters.
      param_dtype: of the parameters `projection.kernel [height, width, channels, features]` and `projection.bias`.
      kernel_init, bias_init: initializers.
      rngs: `nnx.Rngs` with the stream "params".

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.nn import PatchEmbedding
      >>> PatchEmbedding(4, 3, 64, rngs=nnx.Rngs(0))(jnp.ones((2, 32, 32, 3))).shape
      (2, 64, 64)

    References:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021, section 3.1.
    """

    def __init__(
        self,
        patch_size: int | tuple[int, int],
        channels: int,
        features: int,
        *,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = default_kernel_init,
        bias_init: Callable = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        sides = patch_size if isinstance(patch_size, (tuple, list)) else (patch_size, patch_size)
        if len(sides) != 2:
            raise ValueError(
                f"attnjax.nn.PatchEmbedding: patch_size must be an integer, or (height, width), got {patch_size!r}."
            )
        height, width = sides
        check_size("PatchEmbedding", "patch_size", height)
        for argument, size in dict(patch_size=width, channels=channels, features=features).items():
            check_size("PatchEmbedding", argument, size)
        self.patch_size, self.channels = (height, width), channels
        self.projection = Projection(
            (height, width, channels),
            (features,),
            axes=(None, None, None, "embed"),
            use_bias=use_bias,
            dtype=dtype,
            param_dtype=param_dtype,
            kernel_init=kernel_init,
            bias_init=bias_init,
            rngs=rngs,
        )

    def __call__(self, images: Float[Array, "*B height width C"]) -> Float[Array, "*B S D"]:
        """Images `[*B, height, width, channels]` to `[*B, patches, features]`.

        Raises:
          TypeError: images that are not floats.
          ValueError: other channels, or sizes that are no multiples of the patch.
        """
        name, (height, width) = "attnjax.nn.PatchEmbedding", self.patch_size
        if not is_array(images) or not jnp.issubdtype(images.dtype, jnp.floating):
            raise TypeError(f"{name}: images must be an array of floats, got {describe(images)}.")
        shape = images.shape[-3:]
        if len(shape) < 3 or shape[2] != self.channels or shape[0] % height or shape[1] % width:
            raise ValueError(
                f"{name}: images must be [*B, height, width, {self.channels}], their height a multiple of {height} and "
                f"their width of {width}; got {describe(images)}."
            )
        n = images.ndim - 3
        names = lambda images: [*(names_of(images, i) for i in range(n)), (), (), (), names_of(images, n + 2)]
        return self.projection(with_auto_axes(self._cut, names, images))

    def _cut(self, images: Array) -> Array:
        """Patches `[*B, patches, height, width, channels]`."""
        height, width = self.patch_size
        *batch, rows, columns, channels = images.shape
        rows, columns = rows // height, columns // width
        patches = images.reshape(*batch, rows, height, columns, width, channels)
        return jnp.swapaxes(patches, -4, -3).reshape(*batch, rows * columns, height, width, channels)


def names_of_rows(table: Any, at: Any) -> list[tuple[str, ...]]:
    """How rows of a table `[rows, features]` lie on devices: divided as their numbers are, and as the features."""
    return [*(names_of(at, i) for i in range(at.ndim)), names_of(table, 1)]


def _check_positions(name: str, positions: Any) -> None:
    if not is_array(positions) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"attnjax.nn.{name}: positions must be an array of integers, got {describe(positions)}.")
