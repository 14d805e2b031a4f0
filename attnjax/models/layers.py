"""The two ends of a language model: tokens to vectors, and vectors to logits over the vocabulary."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax
from jaxtyping import Float, Int

from attnjax.core.mesh_types import division, names_of, with_auto_axes
from attnjax.nn.embeddings import LearnedPositions, SinusoidalPositions, names_of_rows
from attnjax.nn.layers import named

Array = jax.Array


class TokenEmbedding(nnx.Module):
    """Vectors of tokens, times a scale, plus vectors of their positions.

    Args:
      config: of the model: vocab_size, features, positions, max_length, dtype, param_dtype.
      scale: what vectors of tokens are multiplied by.
      stddev: of the initial vectors.
      rngs: `nnx.Rngs`.
    """

    def __init__(self, config: Any, *, scale: float = 1.0, stddev: float = 0.02, rngs: nnx.Rngs) -> None:
        types: dict[str, Any] = dict(dtype=config.dtype, param_dtype=config.param_dtype)
        init = nnx.initializers.normal(stddev)
        axes = named("vocab", "embed")
        self.tokens = nnx.Embed(
            config.vocab_size, config.features, embedding_init=init, embedding_metadata=axes, **types, rngs=rngs
        )
        self.positions: Any = nnx.data(None)
        if config.positions == "learned":
            self.positions = LearnedPositions(config.max_length, config.features, **types, rngs=rngs)
        elif config.positions == "sinusoidal":
            self.positions = SinusoidalPositions(config.features, dtype=config.dtype or config.param_dtype)
        self.scale = scale

    def __call__(self, tokens: Int[Array, "*B T"], positions: Int[Array, "*B T"]) -> Float[Array, "*B T D"]:
        """Tokens `[*B, T]` at positions `[T]` or `[*B, T]` to `[*B, T, features]`."""
        x = self.tokens(tokens, out_sharding=division(names_of_rows, self.tokens.embedding[...], tokens))
        if self.scale != 1:
            x = x * jnp.asarray(self.scale, x.dtype)
        if self.positions is not None:
            x = x + self.positions(positions)
        return x

    def logits(self, hidden: Float[Array, "*B T D"]) -> Float[Array, "*B T vocab"]:
        """Products of hidden vectors with the vectors of all tokens: `[..., vocab]`, as `vocabulary_logits`."""
        return vocabulary_logits(hidden, self.tokens.embedding[...], axis=1)


def vocabulary_logits(hidden: Array, kernel: Array, axis: int = 0, cap: float | None = None) -> Array:
    """Logits `[..., vocab]` in float32 (float64 for float64): the product with a kernel whose `axis` is features.

    Both are multiplied in the type of `hidden` and summed in that of the logits, where bfloat16 would be too coarse.
    """
    outer = hidden.ndim - 1
    contract = (((outer,), (axis,)), ((), ()))
    product = lambda x, kernel: lax.dot_general(x, kernel, contract, preferred_element_type=logits_dtype(x))
    names = lambda x, kernel: [*(names_of(x, i) for i in range(outer)), names_of(kernel, 1 - axis)]
    logits = with_auto_axes(product, names, hidden, kernel.astype(hidden.dtype))
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def logits_dtype(hidden: Array) -> Any:
    """float64 for float64, else float32."""
    return jnp.float64 if hidden.dtype == jnp.float64 else jnp.float32
