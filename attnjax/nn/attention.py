"""`MultiHeadAttention`: projections around `attnjax.attention`, with grouped heads, RoPE, norms, caches. No blocks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from attnjax.attention import Dropout, attention
from attnjax.cache import KVCache
from attnjax.core.node import is_array
from attnjax.masks import Lengths, Mask, as_mask
from attnjax.nn.checks import (
    check_input,
    check_lengths,
    check_name,
    check_no_dropout,
    check_positions,
    check_rate,
    check_rngs,
    check_same_batch,
    check_size,
    dropout_stream,
)
from attnjax.nn.constants import held, plain, unwrapped
from attnjax.nn.layers import (
    NORMS,
    Projection,
    attention_weights,
    default_bias_init,
    default_kernel_init,
    default_table_init,
    make_norm,
    named,
)
from attnjax.positions import RoPE
from attnjax.scores import RelativeBias, Score, as_scores

Array = jax.Array


class MultiHeadAttention(nnx.Module):
    """Attention of many heads with its projections, for tokens among themselves or towards a context.

    Any mask, score and number of batch axes; grouped heads; RoPE; norms of queries and keys; sinks; a cache.
    Parameters are `query.kernel [features, N, H]`, `key.kernel`, `value.kernel`, `out.kernel [N, V, out_features]` and
    their biases, as in `flax.nnx.MultiHeadAttention`.

    Args:
      features: size of each token of x.
      num_heads: N.
      key_heads: K, a divisor of N; each key head serves N / K query heads. Default N.
      head_size: H; default features / N.
      value_size: V, the head size of values; default H.
      context_features: size of each token of the context; default features.
      out_features: size of each token of the result; default features.
      mask: who sees whom, in every call; a mask of the call is combined with it by `&`.
      score: what is done to the logits, in every call; scores of the call come after it. Arrays in mask and score are
        copied and held as `attnjax.nn.Constant`, which is not trained; those of `nnx.Param(score)` are parameters.
      sinks: learn one more logit per head, which has no value.
      dropout: share of attention weights that are dropped in training.
      rope: an `attnjax.positions.RoPE`.
      normalize: "rms" or "layer": a norm of each query and key head, before RoPE.
      epsilon: of that norm.
      use_bias: of the projections of query, key and value.
      out_bias: of the last projection; default use_bias.
      scale: factor of the logits, a number or an array held like those of a score; default 1 / sqrt(H).
      implementation: as in `attnjax.attention`.
      dtype: of the computation; default: that of x and parameters.
      param_dtype: of the parameters.
      kernel_init, bias_init: initializers.
      rngs: `nnx.Rngs`; the streams "params" and, where there is dropout, "dropout".

    Raises:
      ValueError: sizes that do not fit, unknown names.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> import attnjax
      >>> from attnjax.nn import MultiHeadAttention, RoPE
      >>> layer = MultiHeadAttention(64, 8, key_heads=2, mask=attnjax.Causal(), rope=RoPE(), rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 16, 64))).shape
      (2, 16, 64)
    """

    def __init__(
        self,
        features: int,
        num_heads: int,
        *,
        key_heads: int | None = None,
        head_size: int | None = None,
        value_size: int | None = None,
        context_features: int | None = None,
        out_features: int | None = None,
        mask: Mask | Array | None = None,
        score: Score | nnx.Param | tuple[Score | nnx.Param, ...] | None = None,
        sinks: bool = False,
        dropout: float = 0.0,
        rope: RoPE | None = None,
        normalize: str | None = None,
        epsilon: float = 1e-6,
        use_bias: bool = True,
        out_bias: bool | None = None,
        scale: float | Array | nnx.Param | None = None,
        implementation: Any = None,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Callable = default_kernel_init,
        bias_init: Callable = default_bias_init,
        rngs: nnx.Rngs,
    ) -> None:
        name = type(self).__name__
        key_heads = num_heads if key_heads is None else key_heads
        for argument, size in dict(features=features, num_heads=num_heads, key_heads=key_heads).items():
            check_size(name, argument, size)
        if num_heads % key_heads:
            raise ValueError(
                f"attnjax.nn.{name}: num_heads must be a multiple of key_heads, got {num_heads} and {key_heads}."
            )
        if head_size is None and features % num_heads:
            raise ValueError(
                f"attnjax.nn.{name}: features = {features} cannot be divided among num_heads = {num_heads}: give "
                "head_size, or other sizes."
            )
        head_size = features // num_heads if head_size is None else head_size
        value_size = head_size if value_size is None else value_size
        context_features = features if context_features is None else context_features
        out_features = features if out_features is None else out_features
        sizes = dict(head_size=head_size, value_size=value_size, context_features=context_features)
        for argument, size in {**sizes, "out_features": out_features}.items():
            check_size(name, argument, size)
        check_rate(name, "dropout", dropout)
        if rope is not None:
            if not isinstance(rope, RoPE):
                raise TypeError(f"attnjax.nn.{name}: rope must be attnjax.positions.RoPE, got {type(rope).__name__}.")
            rope.rotated(head_size)
        if normalize is not None:
            check_name(name, "normalize", normalize, NORMS)

        self.features, self.context_features = features, context_features
        self.num_heads, self.key_heads, self.head_size, self.value_size = num_heads, key_heads, head_size, value_size
        self.mask = nnx.data(None if mask is None else held(as_mask(mask)))
        self.score = nnx.data(_held_scores(score))
        self.scale = nnx.data(held(scale)) if is_array(unwrapped(scale)) else scale
        self.rope, self.implementation = rope, implementation
        self.dropout, self.deterministic = dropout, False
        self.dtype, self.param_dtype = dtype, param_dtype
        types: dict[str, Any] = dict(dtype=dtype, param_dtype=param_dtype)
        inits: dict[str, Any] = dict(kernel_init=kernel_init, bias_init=bias_init, rngs=rngs)

        def projection(inputs: int, heads: int, size: int, name: str = "key_heads") -> Projection:
            axes = ("embed", name, "size")
            return Projection((inputs,), (heads, size), axes=axes, use_bias=use_bias, **types, **inits)

        self.query = projection(features, num_heads, head_size, "heads")
        self.key = projection(context_features, key_heads, head_size)
        self.value = projection(context_features, key_heads, value_size)
        self.query_norm, self.key_norm = nnx.data(None), nnx.data(None)
        if normalize is not None:
            norm: dict[str, Any] = dict(axis="size", epsilon=epsilon, use_bias=False, **types, rngs=rngs)
            self.query_norm = make_norm(name, "normalize", normalize, head_size, **norm)
            self.key_norm = make_norm(name, "normalize", normalize, head_size, **norm)
        self.sinks: nnx.Param | None = nnx.data(None)
        if sinks:
            self.sinks = nnx.Param(jnp.zeros((num_heads,), param_dtype), **named("heads"))
        out_bias = use_bias if out_bias is None else out_bias
        axes = ("heads", "size", "embed")
        self.out = Projection((num_heads, value_size), (out_features,), axes=axes, use_bias=out_bias, **types, **inits)
        self.rngs = nnx.data(dropout_stream(name, dropout, rngs))

    def __call__(
        self,
        x: Float[Array, "*B T D"],
        context: Float[Array, "*B S C"] | None = None,
        *,
        mask: Mask | Array | None = None,
        score: Score | tuple[Score, ...] | None = None,
        positions: Int[Array, ...] | None = None,
        cache: KVCache | None = None,
        lengths: Int[Array, ...] | None = None,
        keys_values: tuple[Array, Array] | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
        sow_weights: bool = False,
    ) -> Any:
        """Lets each token of x look at the tokens of x, or of a context.

        Args:
          x: `[*B, T, features]`.
          context: `[*B, S, context_features]`, where keys and values come from; default: x.
          mask: Mask, or booleans that broadcast to `[*B, N, T, S]`; with a cache, of absolute positions.
          score: a Score, or a tuple of them.
          positions: integers `[T]` or `[*B, T]`, where the tokens of x stand, for RoPE. Default: 0, 1, ..., or after
            what the cache holds.
          cache: an `attnjax.KVCache` with the tokens so far. Needs a mask that is causal.
          lengths: integers `[*B]`, how many of the T tokens of x are real; what stands behind is padding.
          keys_values: what `keys_values(context)` gave, in place of a context.
          deterministic: no dropout; default: the module's `deterministic`, which `eval()` and `train()` set.
          rngs: `nnx.Rngs` or a stream, for dropout in this call.
          sow_weights: give the weights `[*B, N, T, S]`, before dropout, to `nnx.capture(layer, nnx.Intermediate)` as
            "attention_weights". They are computed once more for that, with the T x S matrix.

        Returns:
          `[*B, T, out_features]`; with a cache a pair, the new cache behind it.

        Raises:
          TypeError, ValueError: arguments that do not fit.
        """
        name = type(self).__name__
        check_input(name, "x", x, self.features)
        crossing = context is not None or keys_values is not None
        if context is not None and keys_values is not None:
            raise ValueError(f"attnjax.nn.{name}: give context or keys_values, not both.")
        if crossing and (cache is not None or lengths is not None):
            raise ValueError(
                f"attnjax.nn.{name}: cache and lengths are for attention of x to itself. For a context give "
                "keys_values=layer.keys_values(context), computed once, and mask=attnjax.Lengths(key=lengths)."
            )
        batch, length = x.shape[:-2], x.shape[-2]
        if lengths is not None:
            check_lengths(name, lengths, batch)
        if positions is not None:
            check_positions(name, positions, batch, length)
        elif self.rope is not None:
            positions = jnp.arange(length, dtype=jnp.int32) if cache is None else cache.positions(length)
        query = self._placed(self.query(x), self.query_norm, positions)
        if keys_values is not None:
            key, value = keys_values
        elif context is not None:
            check_input(name, "context", context, self.context_features, "*B, S")
            check_same_batch(name, x=x, context=context)
            key, value = self.keys_values(context)
        else:
            if self.context_features != self.features:
                raise ValueError(
                    f"attnjax.nn.{name}: context is missing: context_features = {self.context_features} are not those "
                    f"of x, {self.features}."
                )
            key, value = self._placed(self.key(x), self.key_norm, positions), self.value(x)

        mask = _all_of(plain(self.mask), mask)
        options: dict[str, Any] = dict(
            score=(*plain(self.score), *as_scores(score)) or None,
            sinks=None if self.sinks is None else self.sinks[...],
            scale=plain(self.scale),
            implementation=self.implementation,
        )
        dropout = self._dropout(deterministic, rngs)
        if cache is not None:
            self._check_cache(cache, mask, dropout, sow_weights)
            out, cache = cache.attend(query, key, value, lengths=lengths, mask=mask, **options)
            return self.out(out), cache
        if lengths is not None:
            mask = _all_of(mask, Lengths(key=lengths, query=lengths))
        if sow_weights:
            self._sow(query, key, mask, options)
        return self.out(attention(query, key, value, mask=mask, dropout=dropout, **options))

    def keys_values(
        self, context: Float[Array, "*B S C"], positions: Int[Array, ...] | None = None
    ) -> tuple[Array, Array]:
        """Keys `[*B, S, K, H]` and values `[*B, S, K, V]` of a context, to be computed once and used often.

        Args:
          context: `[*B, S, context_features]`.
          positions: integers `[S]` or `[*B, S]`, for RoPE; default: 0, 1, ...
        """
        name = type(self).__name__
        check_input(name, "context", context, self.context_features, "*B, S")
        if positions is not None:
            check_positions(name, positions, context.shape[:-2], context.shape[-2])
        elif self.rope is not None:
            positions = jnp.arange(context.shape[-2], dtype=jnp.int32)
        return self._placed(self.key(context), self.key_norm, positions), self.value(context)

    def create_cache(self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None) -> KVCache:
        """An empty `attnjax.KVCache` of this layer's sizes: a ring where its mask is a window.

        Args:
          batch: `*B`.
          capacity: the most tokens of a row.
          dtype: what is stored; default: that of the computation.
        """
        window = _reach(self.mask)
        if window is not None:
            window, capacity = (window, window + 1) if window + 1 < capacity else (None, capacity)
        return KVCache.create(
            batch,
            capacity,
            self.key_heads,
            self.head_size,
            value_size=self.value_size,
            dtype=dtype or self.dtype or self.param_dtype,
            window=window,
        )

    def _placed(self, heads: Array, norm: Any, positions: Any) -> Array:
        """Queries or keys after their norm and rotation."""
        if norm is not None:
            heads = norm(heads)
        return heads if self.rope is None else self.rope(heads, positions)

    def _dropout(self, deterministic: bool | None, rngs: Any) -> Dropout | None:
        deterministic = self.deterministic if deterministic is None else deterministic
        check_rngs(type(self).__name__, rngs)
        if deterministic or not self.dropout:
            return None
        rngs = self.rngs if rngs is None else rngs
        stream = rngs.dropout if isinstance(rngs, nnx.Rngs) else rngs
        return Dropout(self.dropout, seed=jax.random.bits(stream()))

    def _check_cache(self, cache: Any, mask: Mask | None, dropout: Dropout | None, sow_weights: bool) -> None:
        name = f"attnjax.nn.{type(self).__name__}"
        if not isinstance(cache, KVCache):
            raise TypeError(f"{name}: cache must be an attnjax.KVCache, got {type(cache).__name__}.")
        if not _is_causal(mask):
            raise ValueError(
                f"{name}: a cache holds the tokens that came before, so attention with it is causal. Give "
                f"mask=attnjax.Causal(); the mask is {mask}."
            )
        reach = _reach(mask)
        if cache.window is not None and (reach is None or reach > cache.window):
            raise ValueError(
                f"{name}: the cache is a ring of window {cache.window} and the mask, {mask}, reaches further: "
                f"combine it with attnjax.Window(left={cache.window}, right=0)."
            )
        check_no_dropout(type(self).__name__, 0.0 if dropout is None else self.dropout, None)
        if sow_weights:
            raise ValueError(f"{name}: sow_weights needs all tokens in one call, without a cache.")

    def _sow(self, query: Array, key: Array, mask: Mask | None, options: dict[str, Any]) -> None:
        weights = attention_weights(query, key, mask=mask, **options)
        self.sow(nnx.Intermediate, "attention_weights", weights)


class RelativePositions(nnx.Module):
    """T5's learned relative positions: holds the table; called, it gives an `attnjax.RelativeBias`.

    Args:
      num_buckets: rows of the table.
      num_heads: N.
      bidirectional: half of the buckets are for keys that come later.
      max_distance: distances from here on share the last bucket.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.nn import MultiHeadAttention, RelativePositions
      >>> rngs = nnx.Rngs(0)
      >>> relative, layer = RelativePositions(32, 8, rngs=rngs), MultiHeadAttention(64, 8, rngs=rngs)
      >>> layer(jnp.ones((2, 16, 64)), score=relative()).shape
      (2, 16, 64)
    """

    def __init__(
        self,
        num_buckets: int,
        num_heads: int,
        bidirectional: bool = True,
        max_distance: int = 128,
        *,
        param_dtype: Any = jnp.float32,
        table_init: Callable = default_table_init,
        rngs: nnx.Rngs,
    ) -> None:
        for argument, size in dict(num_buckets=num_buckets, num_heads=num_heads).items():
            check_size("RelativePositions", argument, size)
        self.bidirectional, self.max_distance = bidirectional, max_distance
        made = table_init(rngs.params(), (num_buckets, num_heads), param_dtype)
        self.table = nnx.Param(made, **named(None, "heads"))

    def __call__(self) -> RelativeBias:
        return RelativeBias(self.table[...], self.bidirectional, self.max_distance)


def _held_scores(score: Any) -> tuple[Any, ...]:
    """A score or several, of which some may stand in an `nnx.Param`, with variables in the places of arrays."""
    given = tuple(score) if isinstance(score, (tuple, list)) else () if score is None else (score,)
    as_scores(tuple(map(unwrapped, given)))
    return held(given)


def _all_of(*masks: Any) -> Mask | None:
    combined = None
    for mask in masks:
        if mask is not None:
            combined = as_mask(mask) if combined is None else combined & as_mask(mask)
    return combined


def _is_causal(mask: Mask | None) -> bool:
    """Whether it is known that no query sees a later key."""
    after = None if mask is None else mask.reach()[1]
    return after is not None and after <= 0


def _reach(mask: Mask | None) -> int | None:
    """How many keys before its own a query sees at most; `None` where that is not known."""
    before = None if mask is None else mask.reach()[0]
    return None if before is None else max(before, 0)
