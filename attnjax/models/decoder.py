"""`DecoderLM`: a decoder-only language model. GPT-2, Llama, Gemma 2 and their like are configs of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from attnjax.cache import KVCache
from attnjax.core.symbolic import indices
from attnjax.masks import Causal, Segments, Window
from attnjax.models.checks import (
    check_caches,
    check_config,
    check_like_tokens,
    check_positions,
    check_tokens,
    check_windows,
    given,
    restarting,
)
from attnjax.models.layers import TokenEmbedding, vocabulary_logits
from attnjax.nn.blocks import DecoderBlock
from attnjax.nn.checks import dropout_stream
from attnjax.nn.layers import Projection, make_norm
from attnjax.nn.stack import Stack
from attnjax.positions import RoPE
from attnjax.scores import ALiBi, SoftCap

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """What a `DecoderLM` is made of. The defaults are those of GPT-2.

    Args:
      vocab_size: number of tokens.
      features: size of each token's vector.
      num_heads: N.
      num_layers: number of blocks.
      hidden: size between the layers of the feed-forward part; default 4 * features.
      max_length: the most tokens of a row; needed for learned positions, else `None` is no limit.
      key_heads: K, default N; head_size: default features / N.
      positions: "learned", "sinusoidal", "alibi", "none", or an `attnjax.nn.RoPE`.
      norm: "layer" or "rms"; epsilon is its own.
      pre_norm, output_norm: where norms stand, see `attnjax.nn.EncoderBlock`.
      activation: of the feed-forward part, see `attnjax.nn.FeedForward`.
      use_bias: of projections and norms; out_bias: of the last projection of attention, default use_bias.
      normalize: "rms" or "layer": a norm of each query and key head.
      sinks: learn one more logit per head, without value.
      windows: how many tokens before its own a token sees, `None` for all; taken in turn by the layers.
      attention_cap, logit_cap: soft caps of the logits of attention, and of tokens.
      attention_scale: factor of the logits of attention; default 1 / sqrt(head_size).
      tie_embeddings: the vectors of tokens are also those of the last layer.
      embedding_scale: what vectors of tokens are multiplied by.
      dropout: of embeddings, of what each part adds, and of hidden numbers; attention_dropout: of weights.
      scan: run equal layers by `jax.lax.scan`; remat: compute each layer anew for its gradient.
      dtype: of the computation, default param_dtype; param_dtype: of the parameters.
      implementation: as in `attnjax.attention`.

    Raises:
      ValueError: fields that do not fit.

    Example:
      >>> from attnjax.models import DecoderConfig
      >>> from attnjax.nn import RoPE
      >>> gpt2 = DecoderConfig(vocab_size=50257, features=768, num_heads=12, num_layers=12, max_length=1024)
      >>> llama = DecoderConfig(
      ...     vocab_size=32000, features=4096, num_heads=32, key_heads=8, num_layers=32, hidden=14336, positions=RoPE(),
      ...     norm="rms", activation="swiglu", use_bias=False, tie_embeddings=False,
      ... )
    """

    vocab_size: int
    features: int
    num_heads: int
    num_layers: int
    hidden: int | None = None
    max_length: int | None = None
    key_heads: int | None = None
    head_size: int | None = None
    positions: str | RoPE = "learned"
    norm: str = "layer"
    epsilon: float = 1e-5
    pre_norm: bool = True
    output_norm: bool = False
    activation: str | Callable = "gelu"
    use_bias: bool = True
    out_bias: bool | None = None
    normalize: str | None = None
    sinks: bool = False
    windows: tuple[int | None, ...] = (None,)
    attention_cap: float | None = None
    logit_cap: float | None = None
    attention_scale: float | None = None
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan: bool = False
    remat: Any = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self) -> None:
        optional = given(self, "hidden", "max_length", "key_heads", "head_size")
        check_config(self, "vocab_size", "features", "num_heads", "num_layers", *optional)
        check_positions(self, "learned", "sinusoidal", "alibi", "none")
        check_windows(self)
        for field in given(self, "attention_cap", "logit_cap"):
            if not getattr(self, field) > 0:
                raise ValueError(f"DecoderConfig: {field} must be positive or None, got {getattr(self, field)!r}.")


class DecoderLM(nnx.Module):
    """Embeddings, blocks with causal attention, a norm, logits of the next token.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.models import DecoderConfig, DecoderLM
      >>> config = DecoderConfig(vocab_size=64, features=32, num_heads=4, num_layers=2, max_length=16)
      >>> model = DecoderLM(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 16), int)).shape
      (2, 16, 64)

    References:
      Radford et al., "Language Models are Unsupervised Multitask Learners", 2019. Touvron et al., "Llama 2", 2023.
      Gemma Team, "Gemma 2", 2024.
    """

    def __init__(self, config: DecoderConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        self.embed = TokenEmbedding(c, scale=c.embedding_scale, rngs=rngs)
        self.dropout = nnx.Dropout(c.dropout, rngs=dropout_stream("DecoderLM", c.dropout, rngs))
        makes = [_block(c, c.windows[i % len(c.windows)]) for i in range(c.num_layers)]
        make = makes[0] if len(c.windows) == 1 else makes
        self.stack = Stack(make, c.num_layers, scan=c.scan, remat=c.remat, rngs=rngs)
        self.norm: Any = nnx.data(None)
        if c.pre_norm or c.output_norm:
            norm: dict[str, Any] = dict(epsilon=c.epsilon, use_bias=c.use_bias, **types, rngs=rngs)
            self.norm = make_norm("DecoderLM", "norm", c.norm, c.features, **norm)
        self.head: Any = nnx.data(None)
        if not c.tie_embeddings:
            axes = ("embed", "vocab")
            self.head = Projection((c.features,), (c.vocab_size,), axes=axes, use_bias=False, **types, rngs=rngs)

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        *,
        positions: Int[Array, "*B T"] | None = None,
        segments: Int[Array, "*B T"] | Segments | None = None,
        caches: Sequence[KVCache] | None = None,
        lengths: Int[Array, "*B"] | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """Logits of the token that follows each.

        Args:
          tokens: integers `[*B, T]`.
          positions: integers `[T]` or `[*B, T]`, where tokens stand. Default: 0, 1, ...; from 0 in each segment; after
            what the caches hold.
          segments: integers `[*B, T]`: tokens see only those with the same number, as for packed documents. Tokens of
            a document stand together. With caches, `attnjax.Segments(ids, held)` with the ids `[*B, T]` of the tokens
            and `[*B, S]` of the caches' slots; positions are then to be given, and layers have no windows.
          caches: of the tokens so far, from `create_caches`; one for each layer.
          lengths: integers `[*B]`: how many of the T tokens are real, the others are padding.
          deterministic: no dropout; default: as `eval()` and `train()` have set it.
          rngs: `nnx.Rngs`, for dropout in this call.

        Returns:
          `[*B, T, vocab]` in float32; with caches a pair, the new caches behind it.

        Raises:
          TypeError, ValueError: arguments that do not fit.
        """
        options: dict[str, Any] = dict(positions=positions, segments=segments, caches=caches, lengths=lengths)
        made = self.hidden(tokens, **options, deterministic=deterministic, rngs=rngs)
        if caches is None:
            return self.logits(made)
        return self.logits(made[0]), made[1]

    def hidden(
        self,
        tokens: Int[Array, "*B T"],
        *,
        positions: Int[Array, "*B T"] | None = None,
        segments: Int[Array, "*B T"] | Segments | None = None,
        caches: Sequence[KVCache] | None = None,
        lengths: Int[Array, "*B"] | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """What goes into the last layer, `[*B, T, features]`; arguments and caches as in a call."""
        c = self.config
        check_tokens("DecoderLM", "tokens", tokens, c.max_length)
        check_like_tokens("DecoderLM", "positions", positions, tokens)
        ids = segments.query_ids if isinstance(segments, Segments) else segments
        check_like_tokens("DecoderLM", "segments", ids, tokens)
        check_caches("DecoderLM", caches, tokens, lengths, c.max_length)
        if segments is not None and caches is not None and (segments is ids or positions is None):
            raise ValueError(
                "DecoderLM: with caches, segments must be attnjax.Segments(ids, held), integers [*B, T] of the tokens "
                "and [*B, S] of the caches' slots, and positions must be given: where tokens stand in their documents."
            )
        count = tokens.shape[-1]
        placed: Any = positions
        if placed is None and caches is not None:
            placed = caches[0].positions(count)
        elif placed is None:
            placed = indices(count) if ids is None else restarting(jnp.asarray(ids))
        random: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        made = self.stack(
            self.dropout(self.embed(tokens, placed), **random),
            mask=segments if segments is None or isinstance(segments, Segments) else Segments(segments),
            score=ALiBi.for_heads(c.num_heads) if c.positions == "alibi" else None,
            positions=placed if isinstance(c.positions, RoPE) else None,
            lengths=lengths,
            caches=caches,
            **random,
        )
        x, caches = (made, None) if caches is None else made
        if self.norm is not None:
            x = self.norm(x)
        return x if caches is None else (x, caches)

    def logits(self, hidden: Float[Array, "*B T D"]) -> Float[Array, "*B T vocab"]:
        """The last layer: `[..., features]` to float32 `[..., vocab]`."""
        tied = self.head is None
        kernel = self.embed.tokens.embedding[...] if tied else self.head.kernel[...]
        return vocabulary_logits(hidden, kernel, axis=int(tied), cap=self.config.logit_cap)

    def create_caches(self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None) -> tuple[KVCache, ...]:
        """Empty caches, one for each layer; rings where a layer has a window.

        Args:
          batch: `*B`.
          capacity: the most tokens of a row.
          dtype: what is stored, such as `jnp.int8`; default: that of the computation.
        """
        return self.stack.create_caches(batch, capacity, dtype=dtype)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int | None:
        return self.config.max_length


def _block(c: DecoderConfig, window: int | None) -> Callable[[nnx.Rngs], DecoderBlock]:
    attention: dict[str, Any] = dict(
        key_heads=c.key_heads,
        head_size=c.head_size,
        mask=Causal() if window is None else Causal() & Window(window, 0),
        score=None if c.attention_cap is None else SoftCap(c.attention_cap),
        sinks=c.sinks,
        rope=c.positions if isinstance(c.positions, RoPE) else None,
        normalize=c.normalize,
        out_bias=c.out_bias,
        scale=c.attention_scale,
        implementation=c.implementation,
    )
    return lambda rngs: DecoderBlock(
        c.features,
        c.num_heads,
        c.hidden or 4 * c.features,
        norm=c.norm,
        pre_norm=c.pre_norm,
        output_norm=c.output_norm,
        activation=c.activation,
        use_bias=c.use_bias,
        dropout=c.dropout,
        attention_dropout=c.attention_dropout,
        epsilon=c.epsilon,
        attention=attention,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        rngs=rngs,
    )
