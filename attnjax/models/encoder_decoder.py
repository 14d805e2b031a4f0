"""`Transformer`: the encoder-decoder of 2017, for sequence to sequence tasks such as translation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from attnjax.cache import KVCache
from attnjax.core.node import describe
from attnjax.core.symbolic import indices
from attnjax.masks import Lengths
from attnjax.models.checks import check_caches, check_config, check_positions, check_tokens, given
from attnjax.models.layers import TokenEmbedding
from attnjax.nn.blocks import DecoderBlock, EncoderBlock
from attnjax.nn.checks import dropout_stream
from attnjax.nn.layers import make_norm
from attnjax.nn.stack import Stack

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """What a `Transformer` is made of. The defaults are the base model of the paper.

    Args:
      vocab_size: number of tokens, which source and target share. Their vectors are those of the last layer, too.
      features: size of each token's vector.
      num_heads: N.
      hidden: size between the layers of the feed-forward part.
      encoder_layers, decoder_layers: number of blocks.
      max_length: the most tokens of a row; needed for learned positions, else `None` is no limit.
      positions: "sinusoidal" or "learned".
      norm: "layer" or "rms"; epsilon is its own.
      pre_norm: norm what goes into each part; otherwise, as in the paper, the sum behind it.
      activation: of the feed-forward part, see `attnjax.nn.FeedForward`.
      dropout: of embeddings, of what each part adds, and of hidden numbers; attention_dropout: of weights.
      scan: run equal layers by `jax.lax.scan`; remat: compute each layer anew for its gradient.
      dtype: of the computation, default param_dtype; param_dtype: of the parameters.
      implementation: as in `attnjax.attention`.

    Raises:
      ValueError: fields that do not fit.

    Example:
      >>> from attnjax.models import TransformerConfig
      >>> big = TransformerConfig(37000, features=1024, num_heads=16, hidden=4096, dropout=0.3)

    References:
      Vaswani et al., "Attention Is All You Need", 2017, table 3.
    """

    vocab_size: int
    features: int = 512
    num_heads: int = 8
    hidden: int = 2048
    encoder_layers: int = 6
    decoder_layers: int = 6
    max_length: int | None = None
    positions: str = "sinusoidal"
    norm: str = "layer"
    epsilon: float = 1e-6
    pre_norm: bool = False
    activation: str | Callable = "relu"
    dropout: float = 0.1
    attention_dropout: float = 0.0
    scan: bool = False
    remat: Any = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "features", "num_heads", "hidden", "encoder_layers", "decoder_layers")
        check_config(self, *sizes, *given(self, "max_length"))
        check_positions(self, "sinusoidal", "learned")
        if self.positions == "sinusoidal" and self.features % 2:
            raise ValueError(f"TransformerConfig: features must be even for sinusoidal positions, got {self.features}.")


class Memory(NamedTuple):
    """What the decoder sees of the source: vectors, or keys and values of each layer computed from them.

    Attributes:
      context: `[*B, S, features]`, or `None`.
      keys_values: a pair `[*B, S, N, H]` for each layer, or `None`.
      lengths: integers `[*B]`, how many of the S tokens are real; `None` is all.
    """

    context: Array | None
    keys_values: tuple[tuple[Array, Array], ...] | None
    lengths: Array | None


class Transformer(nnx.Module):
    """An encoder of the source, and a decoder of the target that attends to it.

    For training, `model(source, target)` gives logits of the token that follows each of `target`, which begins with a
    start token. For generation, `attnjax.models.generate` and `beam_search` take `model.encode(source)`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.models import Transformer, TransformerConfig
      >>> config = TransformerConfig(64, features=32, num_heads=4, hidden=64, encoder_layers=2, decoder_layers=2)
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> model(jnp.zeros((2, 9), int), jnp.zeros((2, 7), int), source_lengths=jnp.array([9, 4])).shape
      (2, 7, 64)

    References:
      Vaswani et al., "Attention Is All You Need", 2017.
    """

    def __init__(self, config: TransformerConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        # Vectors of that length, times sqrt(features), are as long as those of positions; and logits begin near 1.
        self.embed = TokenEmbedding(c, scale=math.sqrt(c.features), stddev=c.features**-0.5, rngs=rngs)
        self.dropout = nnx.Dropout(c.dropout, rngs=dropout_stream("Transformer", c.dropout, rngs))
        run: dict[str, Any] = dict(scan=c.scan, remat=c.remat, rngs=rngs)
        self.encoder = Stack(_block(c, EncoderBlock), c.encoder_layers, **run)
        self.decoder = Stack(_block(c, DecoderBlock, cross=True), c.decoder_layers, **run)
        self.encoder_norm: Any = nnx.data(None)
        self.decoder_norm: Any = nnx.data(None)
        if c.pre_norm:
            norm: dict[str, Any] = dict(epsilon=c.epsilon, dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)
            self.encoder_norm = make_norm("Transformer", "norm", c.norm, c.features, **norm)
            self.decoder_norm = make_norm("Transformer", "norm", c.norm, c.features, **norm)

    def __call__(
        self,
        source: Int[Array, "*B S"],
        target: Int[Array, "*B T"],
        *,
        source_lengths: Int[Array, "*B"] | None = None,
        target_lengths: Int[Array, "*B"] | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Float[Array, "*B T vocab"]:
        """Logits of the token that follows each of the target.

        Args:
          source: integers `[*B, S]`.
          target: integers `[*B, T]`, a start token first.
          source_lengths: integers `[*B]`: how many of the S tokens are real, the others are padding.
          target_lengths: the same for the target. Not needed for its real tokens, which see no later ones.
          deterministic: no dropout; default: as `eval()` and `train()` have set it.
          rngs: `nnx.Rngs`, for dropout in this call.

        Returns:
          `[*B, T, vocab]` in float32.

        Raises:
          TypeError, ValueError: arguments that do not fit.
        """
        random: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        memory = Memory(self._encoded(source, source_lengths, **random), None, source_lengths)
        return self.logits(self.hidden(target, memory=memory, lengths=target_lengths, **random))

    def encode(self, source: Int[Array, "*B S"], *, lengths: Int[Array, "*B"] | None = None) -> Memory:
        """The source as the decoder sees it, keys and values of all its layers, without dropout: for generation.

        Args:
          source: integers `[*B, S]`.
          lengths: integers `[*B]`: how many of the S tokens are real, the others are padding.
        """
        source = jnp.asarray(source)
        lengths = None if lengths is None else jnp.asarray(lengths)
        context = self._encoded(source, lengths, deterministic=True)
        return Memory(None, self.decoder.keys_values(context), lengths)

    def hidden(
        self,
        tokens: Int[Array, "*B T"],
        *,
        memory: Memory,
        caches: Sequence[KVCache] | None = None,
        lengths: Int[Array, "*B"] | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Any:
        """What goes into the last layer for tokens of the target, `[*B, T, features]`; with caches a pair."""
        check_tokens("Transformer", "target", tokens, self.config.max_length)
        check_caches("Transformer", caches, tokens, lengths, self.config.max_length)
        _check_memory(memory, tokens)
        count = tokens.shape[-1]
        placed: Any = indices(count) if caches is None else caches[0].positions(count)
        random: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        made = self.decoder(
            self.dropout(self.embed(tokens, placed), **random),
            *([] if memory.context is None else [memory.context]),
            context_mask=None if memory.lengths is None else Lengths(key=memory.lengths),
            keys_values=memory.keys_values,
            lengths=lengths,
            caches=caches,
            **random,
        )
        x, caches = (made, None) if caches is None else made
        if self.decoder_norm is not None:
            x = self.decoder_norm(x)
        return x if caches is None else (x, caches)

    def logits(self, hidden: Float[Array, "*B T D"]) -> Float[Array, "*B T vocab"]:
        """The last layer: `[..., features]` to float32 `[..., vocab]`."""
        return self.embed.logits(hidden)

    def create_caches(self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None) -> tuple[KVCache, ...]:
        """Empty caches, one for each layer of the decoder, as in `DecoderLM.create_caches`."""
        return self.decoder.create_caches(batch, capacity, dtype=dtype)

    @property
    def vocab_size(self) -> int:
        return self.config.vocab_size

    @property
    def max_length(self) -> int | None:
        return self.config.max_length

    def _encoded(self, source: Array, lengths: Array | None, **random: Any) -> Array:
        check_tokens("Transformer", "source", source, self.config.max_length)
        placed: Any = indices(source.shape[-1])
        x = self.dropout(self.embed(source, placed), **random)
        x = self.encoder(x, lengths=lengths, **random)
        return x if self.encoder_norm is None else self.encoder_norm(x)


def _check_memory(memory: Any, tokens: Array) -> None:
    """A `Memory` of the batch axes of tokens `[*B, T]`, or a TypeError or ValueError."""
    if not isinstance(memory, Memory):
        raise TypeError(f"Transformer: memory must be model.encode(source), got {type(memory).__name__}.")
    held = memory.context if memory.keys_values is None else memory.keys_values[0][0]
    batch = tokens.shape[:-1]
    if held is not None and held.shape[: len(batch)] != batch:
        raise ValueError(
            f"Transformer: target {describe(tokens)} has the batch axes {list(batch)}, and the source's vectors are "
            f"{describe(held)}: give as many targets as sources."
        )


def _block(c: TransformerConfig, kind: Any, **more: Any) -> Callable[[nnx.Rngs], Any]:
    shared: dict[str, Any] = dict(implementation=c.implementation)
    if more:
        more["cross_attention"] = shared
    return lambda rngs: kind(
        c.features,
        c.num_heads,
        c.hidden,
        norm=c.norm,
        pre_norm=c.pre_norm,
        activation=c.activation,
        dropout=c.dropout,
        attention_dropout=c.attention_dropout,
        epsilon=c.epsilon,
        attention=shared,
        dtype=c.dtype,
        param_dtype=c.param_dtype,
        rngs=rngs,
        **more,
    )
