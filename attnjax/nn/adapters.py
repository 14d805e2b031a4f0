"""`attention_fn`: attnjax inside Flax's own attention modules, of NNX and of Linen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float

from attnjax.attention import Dropout, attention
from attnjax.core.node import describe, is_array
from attnjax.masks import Causal, Mask, as_mask
from attnjax.nn.layers import attention_weights, promote
from attnjax.scores import Bias, Score, as_scores

Array = jax.Array


def attention_fn(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    bias: Array | None = None,
    mask: Mask | Array | None = None,
    broadcast_dropout: bool = True,
    dropout_rng: Array | None = None,
    dropout_rate: float = 0.0,
    deterministic: bool = False,
    dtype: Any = None,
    precision: Any = None,
    module: Any = None,
    promote_dtype: Callable | None = None,
    is_causal: bool = False,
    force_fp32_for_softmax: bool = False,
    einsum_dot_general: Callable | None = None,
    qk_attn_weights_einsum: Callable | None = None,
    attn_weights_value_einsum: Callable | None = None,
    *,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | Array | None = None,
    sinks: Array | None = None,
    implementation: Any = None,
) -> Float[Array, "*B T N V"]:
    """Takes the place of `flax.nnx.dot_product_attention` and of `flax.linen.dot_product_attention`.

    It is given to Flax's own modules as their `attention_fn`. What differs:

    - A query that may see nothing gives 0; Flax gives the mean of all values.
    - Dropout drops each weight with the same probability, but others: a hash of seed and position decides, not random
      numbers of shape T x S, and each batch entry and head has a pattern of its own, also with `broadcast_dropout`.
    - Where a module sows its weights they are computed once more, by the plain formula, with the T x S matrix. Like
      Flax's they are those before dropout.
    - The softmax is always in float32, and products of float32 are always exact, whatever `precision` and
      `force_fp32_for_softmax` say.

    Args:
      query: `[*B, T, N, H]`; key: `[*B, S, K, H]`; value: `[*B, S, K, V]`; N is a multiple of K.
      bias: floats that broadcast to `[*B, N, T, S]`, added to the logits.
      mask: booleans or numbers, not 0 where the query may see the key, that broadcast to `[*B, N, T, S]`; or a Mask.
      broadcast_dropout: see above.
      dropout_rng: PRNG key; needed where something is dropped.
      dropout_rate: share of weights that are dropped, in [0, 1).
      deterministic: drop nothing.
      dtype: of the computation; default: that of query, key and value.
      precision: see above.
      module: a Flax module that sows the weights.
      promote_dtype: a function of `(query, key, value)` and `dtype`, in place of a plain conversion.
      is_causal: query t sees keys s <= t, counted from 0 in each call. Leave it out where a Flax module decodes step by
        step: the mask of its own cache is causal.
      force_fp32_for_softmax: see above.
      einsum_dot_general, qk_attn_weights_einsum, attn_weights_value_einsum: products of one's own; not possible here.
      score, scale, sinks, implementation: as in `attnjax.attention`, to be set by `functools.partial`.

    Returns:
      `[*B, T, N, V]`.

    Raises:
      TypeError, ValueError: arguments that do not fit, such as is_causal in a step of decoding.
      NotImplementedError: products of one's own.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.nn import attention_fn
      >>> layer = nnx.MultiHeadAttention(8, 64, attention_fn=attention_fn, decode=False, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((2, 16, 64)), is_causal=True).shape
      (2, 16, 64)
    """
    own = dict(
        einsum_dot_general=einsum_dot_general,
        qk_attn_weights_einsum=qk_attn_weights_einsum,
        attn_weights_value_einsum=attn_weights_value_einsum,
    )
    for name, given in own.items():
        if given is not None:
            raise NotImplementedError(
                f"attnjax.nn.attention_fn cannot use {name}, for logits and weights are not kept: "
                "flax.linen.dot_product_attention can."
            )
    if promote_dtype is not None:
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
    else:
        query, key, value = promote(query, key, value, dtype=dtype)
    if mask is not None and not isinstance(mask, Mask):
        if not is_array(mask):
            raise TypeError(f"mask must be an array or an attnjax Mask, got {describe(mask)}.")
        mask = as_mask(mask if mask.dtype == jnp.bool_ else mask != 0)
    if is_causal and mask is not None and query.shape[-3] == 1 < key.shape[-3]:
        raise ValueError(
            f"is_causal is for all queries at once: the single query {describe(query)} would see the first of the keys "
            f"{describe(key)} only. In a module that decodes (decode=True), leave is_causal out: the mask of "
            "its cache is causal. Elsewhere give mask=attnjax.Causal(offset)."
        )
    if is_causal:
        mask = Causal() if mask is None else Causal() & mask
    options: dict[str, Any] = dict(
        mask=mask,
        score=(*(() if bias is None else (Bias(bias),)), *as_scores(score)) or None,
        scale=scale,
        sinks=sinks,
    )
    if module is not None:
        weights = attention_weights(query, key, **options)
        module.sow(
            nnx.Intermediate if isinstance(module, nnx.Module) else "intermediates", "attention_weights", weights
        )
    dropout = None
    if dropout_rate > 0 and not deterministic:
        if dropout_rng is None:
            raise ValueError(
                f"dropout_rng is missing: dropout_rate is {dropout_rate}. Give a PRNG key, or deterministic=True."
            )
        dropout = Dropout(dropout_rate, seed=jax.random.bits(dropout_rng))
    return attention(query, key, value, dropout=dropout, implementation=implementation, **options)
