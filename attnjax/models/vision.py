"""`VisionTransformer`: an encoder of image patches, with logits of classes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from attnjax.core.checks import number_of
from attnjax.core.mesh_types import divided_as
from attnjax.core.node import describe, is_array
from attnjax.models.checks import check_choice, check_config
from attnjax.models.layers import logits_dtype
from attnjax.nn.blocks import EncoderBlock
from attnjax.nn.checks import dropout_stream
from attnjax.nn.embeddings import LearnedPositions, PatchEmbedding
from attnjax.nn.layers import Projection, make_norm, named
from attnjax.nn.stack import Stack

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """What a `VisionTransformer` is made of. The defaults are those of the paper.

    Args:
      image_size: (height, width) of images; patch_size: (height, width) of patches, which divide it.
      num_classes: number of classes.
      features: size of each patch's vector.
      num_heads: N.
      num_layers: number of blocks.
      hidden: size between the layers of the feed-forward part; default 4 * features.
      channels: of images.
      pool: what the classes are told from: "token", a learned token before the patches; or "mean", that of patches.
      norm: "layer" or "rms"; epsilon is its own.
      activation: of the feed-forward part, see `attnjax.nn.FeedForward`.
      dropout: of embeddings, of what each part adds, and of hidden numbers; attention_dropout: of weights.
      scan: run equal layers by `jax.lax.scan`; remat: compute each layer anew for its gradient.
      dtype: of the computation, default param_dtype; param_dtype: of the parameters.
      implementation: as in `attnjax.attention`.

    Raises:
      ValueError: fields that do not fit.

    Example:
      >>> from attnjax.models import VisionConfig
      >>> base = VisionConfig((224, 224), (16, 16), num_classes=1000, features=768, num_heads=12, num_layers=12)
    """

    image_size: tuple[int, int]
    patch_size: tuple[int, int]
    num_classes: int
    features: int
    num_heads: int
    num_layers: int
    hidden: int | None = None
    channels: int = 3
    pool: str = "token"
    norm: str = "layer"
    epsilon: float = 1e-6
    activation: str | Callable = "gelu_exact"
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan: bool = False
    remat: Any = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self) -> None:
        hidden = () if self.hidden is None else ("hidden",)
        check_config(self, "num_classes", "features", "num_heads", "num_layers", "channels", *hidden)
        check_choice(self, "pool", "token", "mean")
        for field in ("image_size", "patch_size"):
            given = getattr(self, field)
            sides = tuple(map(number_of, given)) if isinstance(given, tuple) and len(given) == 2 else (None,)
            if not all(isinstance(side, int) and side > 0 for side in sides):
                raise ValueError(
                    f"VisionConfig: {field} must be (height, width), integers of at least 1, got {given!r}."
                )
            object.__setattr__(self, field, sides)
        if any(side % patch for side, patch in zip(self.image_size, self.patch_size, strict=True)):
            raise ValueError(
                f"VisionConfig: image_size = {self.image_size} must be a multiple of patch_size = {self.patch_size}."
            )

    @property
    def num_patches(self) -> int:
        (height, width), (rows, columns) = self.image_size, self.patch_size
        return (height // rows) * (width // columns)


class VisionTransformer(nnx.Module):
    """Patches of an image as tokens with learned positions, blocks, a norm, logits of classes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.models import VisionConfig, VisionTransformer
      >>> config = VisionConfig((8, 8), (2, 2), 10, features=32, num_heads=4, num_layers=2, channels=1)
      >>> VisionTransformer(config, rngs=nnx.Rngs(0))(jnp.zeros((5, 8, 8, 1))).shape
      (5, 10)

    References:
      Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021.
    """

    def __init__(self, config: VisionConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        self.patches = PatchEmbedding(c.patch_size, c.channels, c.features, **types, rngs=rngs)
        self.token: Any = nnx.data(None)
        if c.pool == "token":
            self.token = nnx.Param(jnp.zeros((c.features,), c.param_dtype), **named("embed"))
        count = c.num_patches + (c.pool == "token")
        self.positions = LearnedPositions(count, c.features, **types, rngs=rngs)
        self.dropout = nnx.Dropout(c.dropout, rngs=dropout_stream("VisionTransformer", c.dropout, rngs))
        self.stack = Stack(_block(c), c.num_layers, scan=c.scan, remat=c.remat, rngs=rngs)
        self.norm = make_norm("VisionTransformer", "norm", c.norm, c.features, epsilon=c.epsilon, **types, rngs=rngs)
        self.head = Projection((c.features,), (c.num_classes,), axes=("embed", None), **types, rngs=rngs)

    def __call__(
        self, images: Float[Array, "*B height width C"], *, deterministic: bool | None = None, rngs: Any = None
    ) -> Float[Array, "*B classes"]:
        """Logits of classes, float32 `[*B, classes]`, of images `[*B, height, width, channels]`.

        Args:
          images: floats.
          deterministic: no dropout; default: as `eval()` and `train()` have set it.
          rngs: `nnx.Rngs`, for dropout in this call.

        Raises:
          TypeError, ValueError: other images than the config says.
        """
        x = self.hidden(images, deterministic=deterministic, rngs=rngs)
        pooled = x[..., 0, :] if self.token is not None else x.mean(-2)
        return self.head(pooled).astype(logits_dtype(x))

    def hidden(
        self, images: Float[Array, "*B height width C"], *, deterministic: bool | None = None, rngs: Any = None
    ) -> Float[Array, "*B S D"]:
        """A vector for the class token, where there is one, and for each patch, row by row: `[*B, S, features]`."""
        c = self.config
        sizes = (*c.image_size, c.channels)
        if is_array(images) and tuple(images.shape[-3:]) != sizes:
            raise ValueError(
                f"VisionTransformer: images must be [*B, {', '.join(map(str, sizes))}], got {describe(images)}."
            )
        random: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        x = self.patches(images)
        if self.token is not None:
            token = jnp.broadcast_to(self.token[...].astype(x.dtype), (*x.shape[:-2], 1, c.features))
            x = jnp.concatenate([divided_as(token, x), x], -2)
        x = self.dropout(x + self.positions(np.arange(x.shape[-2])), **random)
        return self.norm(self.stack(x, **random))


def _block(c: VisionConfig) -> Callable[[nnx.Rngs], EncoderBlock]:
    return lambda rngs: EncoderBlock(
        c.features,
        c.num_heads,
        c.hidden or 4 * c.features,
        norm=c.norm,
        activation=c.activation,
        dropout=c.dropout,
        attention_dropout=c.attention_dropout,
        epsilon=c.epsilon,
        attention=dict(implementation=c.implementation),
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        rngs=rngs,
    )
