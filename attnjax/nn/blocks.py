"""`EncoderBlock` and `DecoderBlock`: attention and feed-forward layers with norms, dropout and residual sums."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from attnjax.cache import KVCache
from attnjax.masks import Causal, Mask
from attnjax.nn.attention import MultiHeadAttention
from attnjax.nn.checks import check_input, check_no_dropout, check_rate, dropout_stream
from attnjax.nn.feed_forward import FeedForward
from attnjax.nn.layers import default_bias_init, default_kernel_init, make_norm
from attnjax.scores import Score

Array = jax.Array


class EncoderBlock(nnx.Module):
    """Attention of tokens among themselves, then a feed-forward layer.

        x + attention(norm(x)), then x + feed_forward(norm(x))                        pre_norm (default)
        norm(x + attention(x)), then norm(x + feed_forward(x))                        pre_norm=False
        x + norm(attention(norm(x))), then x + norm(feed_forward(norm(x)))            output_norm=True
        x + norm(attention(x)), then x + norm(feed_forward(x))                        both

    Args:
      features: size of each token.
      num_heads: N.
      hidden: size between the layers of the feed-forward part.
      norm: "layer" or "rms".
      pre_norm: norm what goes into each part; otherwise the sum behind it.
      output_norm: norm what comes out of each part, before it is added.
      activation: as in `FeedForward`.
      use_bias: of projections, feed-forward layers and norms.
      dropout: share that is dropped in training: of what is added, and of hidden numbers.
      attention_dropout: share of attention weights that are dropped in training.
      epsilon: of the norms.
      attention: further arguments of `MultiHeadAttention`, by name.
      dtype: of the computation; default: that of x and parameters.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers.
      rngs: `nnx.Rngs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax import Lengths
      >>> from attnjax.nn import EncoderBlock
      >>> block = EncoderBlock(64, 8, 256, attention=dict(key_heads=2), rngs=nnx.Rngs(0))
      >>> block(jnp.ones((2, 16, 64)), mask=Lengths(key=jnp.array([16, 9]))).shape
      (2, 16, 64)

    References:
      Vaswani et al., "Attention Is All You Need", 2017, section 3.1. Xiong et al., "On Layer Normalization in the
      Transformer Architecture", 2020.
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden: int,
        *,
        norm: str = "layer",
        pre_norm: bool = True,
        output_norm: bool = False,
        activation: str | Callable = "gelu",
        use_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        epsilon: float = 1e-6,
        attention: dict[str, Any] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = default_kernel_init,
        bias_init: Callable = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        shared: dict[str, Any] = dict(use_bias=use_bias, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)
        shared |= types
        options: dict[str, Any] = {**shared, "dropout": attention_dropout, **(attention or {})}
        self.features = features
        self.attention = MultiHeadAttention(features, num_heads, **options)
        self.feed_forward = FeedForward(features, hidden, activation=activation, dropout=dropout, **shared)
        norms: dict[str, Any] = dict(kind=norm, size=features, epsilon=epsilon, use_bias=use_bias, **types, rngs=rngs)
        _add_norms(self, ("attention", "feed_forward"), pre_norm, output_norm, norms)
        self.dropout = _dropout(type(self).__name__, dropout, rngs)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        *,
        mask: Mask | Array | None = None,
        score: Score | tuple[Score, ...] | None = None,
        positions: Int[Array, ...] | None = None,
        lengths: Int[Array, ...] | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
        sow_weights: bool = False,
    ) -> Float[Array, "*B T D"]:
        """x `[*B, T, features]` to `[*B, T, features]`; the other arguments are those of `MultiHeadAttention`."""
        check_input(type(self).__name__, "x", x, self.features)
        random: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        options: dict[str, Any] = dict(
            **random, mask=mask, score=score, positions=positions, lengths=lengths, sow_weights=sow_weights
        )
        x = _residual(self, "attention", x, lambda y: self.attention(y, **options), random)
        return _residual(self, "feed_forward", x, lambda y: self.feed_forward(y, **random), random)


class DecoderBlock(nnx.Module):
    """Causal attention of tokens among themselves, attention to a context where asked for, a feed-forward layer.

    Args:
      cross: attend to a context between the two other parts.
      context_features: size of each token of the context; default features.
      attention: further arguments of the first `MultiHeadAttention`, by name; its mask is `Causal()` unless one is
        given here.
      cross_attention: further arguments of the second one.
      features, num_heads, hidden: as in `EncoderBlock`, and all others too.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.nn import DecoderBlock, RoPE
      >>> block = DecoderBlock(64, 8, 256, norm="rms", attention=dict(rope=RoPE()), rngs=nnx.Rngs(0))
      >>> y, cache = block(jnp.ones((2, 5, 64)), cache=block.create_cache(2, 16))
      >>> y.shape, cache.length.tolist()
      ((2, 5, 64), [5, 5])
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        hidden: int,
        *,
        cross: bool = False,
        context_features: int | None = None,
        norm: str = "layer",
        pre_norm: bool = True,
        output_norm: bool = False,
        activation: str | Callable = "gelu",
        use_bias: bool = True,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        epsilon: float = 1e-6,
        attention: dict[str, Any] | None = None,
        cross_attention: dict[str, Any] | None = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = default_kernel_init,
        bias_init: Callable = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        shared: dict[str, Any] = dict(use_bias=use_bias, kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)
        shared |= types
        options: dict[str, Any] = {**shared, "dropout": attention_dropout}
        self.features = features
        self.attention = MultiHeadAttention(features, num_heads, **{**options, "mask": Causal(), **(attention or {})})
        self.cross: MultiHeadAttention | None = nnx.data(None)
        if cross:
            options |= {"context_features": context_features, **(cross_attention or {})}
            self.cross = MultiHeadAttention(features, num_heads, **options)
        elif context_features is not None or cross_attention is not None:
            raise ValueError("attnjax.nn.DecoderBlock: context_features and cross_attention are for cross=True.")
        self.feed_forward = FeedForward(features, hidden, activation=activation, dropout=dropout, **shared)
        norms: dict[str, Any] = dict(kind=norm, size=features, epsilon=epsilon, use_bias=use_bias, **types, rngs=rngs)
        parts = ("attention", "cross", "feed_forward") if cross else ("attention", "feed_forward")
        _add_norms(self, parts, pre_norm, output_norm, norms)
        self.dropout = _dropout(type(self).__name__, dropout, rngs)

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        context: Float[Array, "*B S C"] | None = None,
        *,
        mask: Mask | Array | None = None,
        context_mask: Mask | Array | None = None,
        score: Score | tuple[Score, ...] | None = None,
        positions: Int[Array, ...] | None = None,
        cache: KVCache | None = None,
        lengths: Int[Array, ...] | None = None,
        keys_values: tuple[Array, Array] | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
        sow_weights: bool = False,
    ) -> Any:
        """Args:
          x: `[*B, T, features]`.
          context: `[*B, S, context_features]`, with cross=True.
          context_mask: which tokens of x see which of the context, such as `attnjax.Lengths(key=lengths)`.
          keys_values: `keys_values(context)`, in place of the context.
          mask, score, positions, cache, lengths: of the first attention, as in `MultiHeadAttention`. With a cache
            nothing may be dropped.
          deterministic, rngs, sow_weights: as in `MultiHeadAttention`.

        Returns:
          `[*B, T, features]`; with a cache a pair, the new cache behind it.
        """
        check_input("DecoderBlock", "x", x, self.features)
        given = context is not None or keys_values is not None
        if given != (self.cross is not None):
            raise ValueError(
                "attnjax.nn.DecoderBlock: "
                + ("a context needs a block with cross=True." if given else "context is missing, for cross=True.")
            )
        random: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        options: dict[str, Any] = dict(
            **random, mask=mask, score=score, positions=positions, lengths=lengths, sow_weights=sow_weights
        )
        if cache is not None:
            still = self.dropout.deterministic if deterministic is None else deterministic
            rates = (self.dropout.rate, 0.0 if self.cross is None else self.cross.dropout)
            check_no_dropout("DecoderBlock", max(rates), still)
        new_cache = None

        def attend(y: Array) -> Array:
            nonlocal new_cache
            if cache is None:
                return self.attention(y, **options)
            y, new_cache = self.attention(y, cache=cache, **options)
            return y

        x = _residual(self, "attention", x, attend, random)
        if self.cross is not None:
            cross = self.cross
            more: dict[str, Any] = dict(**random, mask=context_mask, sow_weights=sow_weights)
            x = _residual(self, "cross", x, lambda y: cross(y, context, keys_values=keys_values, **more), random)
        x = _residual(self, "feed_forward", x, lambda y: self.feed_forward(y, **random), random)
        return x if cache is None else (x, new_cache)

    def keys_values(self, context: Float[Array, "*B S C"]) -> tuple[Array, Array]:
        """Keys and values of a context, to be computed once and used for every token that is generated."""
        if self.cross is None:
            raise ValueError("attnjax.nn.DecoderBlock: keys_values needs a block with cross=True.")
        return self.cross.keys_values(context)

    def create_cache(self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None) -> KVCache:
        """An empty cache for the first attention, as in `MultiHeadAttention.create_cache`."""
        return self.attention.create_cache(batch, capacity, dtype=dtype)


def _add_norms(block: Any, parts: tuple[str, ...], pre_norm: bool, output_norm: bool, norms: dict[str, Any]) -> None:
    """Gives the block `<part>_norm` and `<part>_output_norm`, or `None` in their places."""
    block.pre_norm = pre_norm
    for part in parts:
        for suffix, wanted in (("norm", pre_norm or not output_norm), ("output_norm", output_norm)):
            made = make_norm(type(block).__name__, "norm", **norms) if wanted else None
            setattr(block, f"{part}_{suffix}", nnx.data(made))


def _dropout(block: str, rate: float, rngs: nnx.Rngs) -> nnx.Dropout:
    check_rate(block, "dropout", rate)
    return nnx.Dropout(rate, rngs=dropout_stream(block, rate, rngs))


def _residual(block: Any, part: str, x: Array, run: Callable[[Array], Array], random: dict[str, Any]) -> Array:
    """x with what a part of the block adds to it."""
    norm, output_norm = getattr(block, f"{part}_norm"), getattr(block, f"{part}_output_norm")
    y = run(norm(x) if block.pre_norm else x)
    if output_norm is not None:
        y = output_norm(y)
    x = x + block.dropout(y, **random)
    return x if block.pre_norm or norm is None else norm(x)
