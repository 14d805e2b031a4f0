"""`Encoder`: tokens that see each other, as in BERT; and its heads: masked tokens, classes, answers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Float, Int

from attnjax.core.checks import check_count
from attnjax.core.symbolic import indices
from attnjax.masks import Mask, Segments, Window, as_mask
from attnjax.models.checks import (
    check_choice,
    check_config,
    check_like_tokens,
    check_positions,
    check_tokens,
    check_windows,
    given,
    restarting,
)
from attnjax.models.layers import TokenEmbedding, logits_dtype
from attnjax.nn.blocks import EncoderBlock
from attnjax.nn.checks import check_size, dropout_stream
from attnjax.nn.feed_forward import ACTIVATIONS
from attnjax.nn.layers import Projection, make_norm, named
from attnjax.nn.stack import Stack
from attnjax.positions import RoPE
from attnjax.scores import ALiBi

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """What an `Encoder` is made of. The defaults are those of BERT.

    Args:
      vocab_size: number of tokens.
      features: size of each token's vector.
      num_heads: N.
      num_layers: number of blocks.
      hidden: size between the layers of the feed-forward part; default 4 * features.
      max_length: the most tokens of a row; needed for learned positions, else `None` is no limit.
      num_types: kinds of tokens (first or second sentence) with vectors of their own; 0 for none.
      positions: "learned", "sinusoidal", "alibi", "none", or an `attnjax.nn.RoPE`.
      norm: "layer" or "rms"; epsilon is its own.
      pre_norm: norm what goes into each part; otherwise, as in BERT, embeddings and the sum behind each part.
      activation: of the feed-forward part, see `attnjax.nn.FeedForward`.
      use_bias: of projections and norms.
      windows: how far to either side a token sees, `None` for all; taken in turn by the layers.
      dropout: of embeddings, of what each part adds, and of hidden numbers; attention_dropout: of weights.
      scan: run equal layers by `jax.lax.scan`; remat: compute each layer anew for its gradient.
      dtype: of the computation, default param_dtype; param_dtype: of the parameters.
      implementation: as in `attnjax.attention`.

    Raises:
      ValueError: fields that do not fit.

    Example:
      >>> from attnjax.models import EncoderConfig
      >>> bert = EncoderConfig(30522, features=768, num_heads=12, num_layers=12, max_length=512, num_types=2)
    """

    vocab_size: int
    features: int
    num_heads: int
    num_layers: int
    hidden: int | None = None
    max_length: int | None = None
    num_types: int = 0
    positions: str | RoPE = "learned"
    norm: str = "layer"
    epsilon: float = 1e-6
    pre_norm: bool = False
    activation: str | Callable = "gelu_exact"
    use_bias: bool = True
    windows: tuple[int | None, ...] = (None,)
    dropout: float = 0.0
    attention_dropout: float = 0.0
    scan: bool = False
    remat: Any = False
    dtype: Any = None
    param_dtype: Any = jnp.float32
    implementation: str | None = None

    def __post_init__(self) -> None:
        optional = given(self, "hidden", "max_length")
        check_config(self, "vocab_size", "features", "num_heads", "num_layers", *optional)
        check_positions(self, "learned", "sinusoidal", "alibi", "none")
        check_windows(self)
        object.__setattr__(self, "num_types", check_count("EncoderConfig: num_types", self.num_types, least=0))


class Encoder(nnx.Module):
    """Embeddings and blocks in which all tokens see each other.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.models import Encoder, EncoderConfig
      >>> config = EncoderConfig(vocab_size=64, features=32, num_heads=4, num_layers=2, max_length=16)
      >>> Encoder(config, rngs=nnx.Rngs(0))(jnp.zeros((2, 16), int), lengths=jnp.array([16, 9])).shape
      (2, 16, 32)

    References:
      Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers", 2019.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        c = self.config = config
        types: dict[str, Any] = dict(dtype=c.dtype, param_dtype=c.param_dtype)
        self.embed = TokenEmbedding(c, rngs=rngs)
        self.dropout = _dropout(c, rngs)
        self.types: Any = nnx.data(None)
        if c.num_types:
            init, axes = nnx.initializers.normal(0.02), named(None, "embed")
            self.types = nnx.Embed(
                c.num_types, c.features, embedding_init=init, embedding_metadata=axes, **types, rngs=rngs
            )
        makes = [_block(c, c.windows[i % len(c.windows)]) for i in range(c.num_layers)]
        make = makes[0] if len(c.windows) == 1 else makes
        self.stack = Stack(make, c.num_layers, scan=c.scan, remat=c.remat, rngs=rngs)
        norm: dict[str, Any] = dict(epsilon=c.epsilon, use_bias=c.use_bias, **types, rngs=rngs)
        self.norm = make_norm("Encoder", "norm", c.norm, c.features, **norm)  # of the end, or of embeddings

    def __call__(
        self,
        tokens: Int[Array, "*B T"],
        *,
        types: Int[Array, "*B T"] | None = None,
        lengths: Int[Array, "*B"] | None = None,
        segments: Int[Array, "*B T"] | None = None,
        mask: Mask | Array | None = None,
        deterministic: bool | None = None,
        rngs: Any = None,
    ) -> Float[Array, "*B T D"]:
        """A vector for each token, which knows of all the others.

        Args:
          tokens: integers `[*B, T]`.
          types: integers `[*B, T]`, kinds of tokens; default all 0.
          lengths: integers `[*B]`: how many of the T tokens are real, the others are padding.
          segments: integers `[*B, T]`: tokens see only those with the same number, as for packed documents; positions
            begin anew in each.
          mask: a Mask, or booleans that broadcast to `[*B, N, T, T]`: who else may not see whom.
          deterministic: no dropout; default: as `eval()` and `train()` have set it.
          rngs: `nnx.Rngs`, for dropout in this call.

        Returns:
          `[*B, T, features]`.

        Raises:
          TypeError, ValueError: arguments that do not fit.
        """
        c = self.config
        check_tokens("Encoder", "tokens", tokens, c.max_length)
        check_like_tokens("Encoder", "types", types, tokens)
        check_like_tokens("Encoder", "segments", segments, tokens)
        if types is not None and self.types is None:
            raise ValueError("Encoder: types were given to a model without: make it with num_types=.")
        placed: Any = indices(tokens.shape[-1]) if segments is None else restarting(segments)
        if segments is not None:
            own = Segments(segments)
            mask = own if mask is None else own & as_mask(mask)
        random: dict[str, Any] = dict(deterministic=deterministic, rngs=rngs)
        x = self.embed(tokens, placed)
        if self.types is not None:
            x = x + self.types(jnp.zeros_like(tokens) if types is None else types)
        if not c.pre_norm:
            x = self.norm(x)
        x = self.stack(
            self.dropout(x, **random),
            mask=mask,
            score=ALiBi.for_heads(c.num_heads) if c.positions == "alibi" else None,
            positions=placed if isinstance(c.positions, RoPE) else None,
            lengths=lengths,
            **random,
        )
        return self.norm(x) if c.pre_norm else x


class MaskedLM(nnx.Module):
    """An encoder that guesses masked tokens. A call takes what the encoder takes, and gives logits `[*B, T, vocab]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.models import EncoderConfig, MaskedLM
      >>> config = EncoderConfig(vocab_size=64, features=32, num_heads=4, num_layers=2, max_length=16)
      >>> MaskedLM(config, rngs=nnx.Rngs(0))(jnp.zeros((2, 16), int)).shape
      (2, 16, 64)
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        c = config
        self.encoder = Encoder(c, rngs=rngs)
        self.transform = _projection(c, c.features, (None, "embed"), rngs)
        norm: dict[str, Any] = dict(epsilon=c.epsilon, dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)
        self.norm = make_norm("MaskedLM", "norm", c.norm, c.features, **norm)
        self.bias = nnx.Param(jnp.zeros((c.vocab_size,), c.param_dtype), **named("vocab"))

    def __call__(self, tokens: Int[Array, "*B T"], **options: Any) -> Float[Array, "*B T vocab"]:
        hidden = self.norm(_activation(self.encoder.config)(self.transform(self.encoder(tokens, **options))))
        logits = self.encoder.embed.logits(hidden)
        return logits + self.bias[...].astype(logits.dtype)


class SequenceClassifier(nnx.Module):
    """An encoder with logits of classes for each row. A call takes what the encoder takes, and gives `[*B, classes]`.

    Args:
      config: of the encoder.
      num_classes: how many.
      pool: "first", the vector of the first token through a layer with tanh (BERT); or "mean", that of real tokens.
      rngs: `nnx.Rngs`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.models import EncoderConfig, SequenceClassifier
      >>> config = EncoderConfig(vocab_size=64, features=32, num_heads=4, num_layers=2, max_length=16)
      >>> SequenceClassifier(config, 3, rngs=nnx.Rngs(0))(jnp.zeros((2, 16), int)).shape
      (2, 3)
    """

    def __init__(self, config: EncoderConfig, num_classes: int, *, pool: str = "first", rngs: nnx.Rngs) -> None:
        check_size("SequenceClassifier", "num_classes", num_classes)
        self.pool = pool
        check_choice(self, "pool", "first", "mean")
        self.encoder = Encoder(config, rngs=rngs)
        self.pooler: Any = nnx.data(
            _projection(config, config.features, (None, "embed"), rngs) if pool == "first" else None
        )
        self.dropout = _dropout(config, rngs)
        self.head = _projection(config, num_classes, ("embed", None), rngs)

    def __call__(
        self, tokens: Int[Array, "*B T"], *, lengths: Int[Array, "*B"] | None = None, **options: Any
    ) -> Float[Array, "*B classes"]:
        hidden = self.encoder(tokens, lengths=lengths, **options)
        if self.pooler is not None:
            pooled = jnp.tanh(self.pooler(hidden[..., 0, :]))
        else:
            pooled = mean_of_real(hidden, lengths)
        return self.head(self.dropout(pooled, **_random(options))).astype(logits_dtype(hidden))


class TokenClassifier(nnx.Module):
    """An encoder with logits of classes for each token. A call takes what the encoder takes: `[*B, T, classes]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.models import EncoderConfig, TokenClassifier
      >>> config = EncoderConfig(vocab_size=64, features=32, num_heads=4, num_layers=2, max_length=16)
      >>> TokenClassifier(config, 3, rngs=nnx.Rngs(0))(jnp.zeros((2, 16), int)).shape
      (2, 16, 3)
    """

    def __init__(self, config: EncoderConfig, num_classes: int, *, rngs: nnx.Rngs) -> None:
        check_size("TokenClassifier", "num_classes", num_classes)
        self.encoder = Encoder(config, rngs=rngs)
        self.dropout = _dropout(config, rngs)
        self.head = _projection(config, num_classes, ("embed", None), rngs)

    def __call__(self, tokens: Int[Array, "*B T"], **options: Any) -> Float[Array, "*B T classes"]:
        hidden = self.encoder(tokens, **options)
        return self.head(self.dropout(hidden, **_random(options))).astype(logits_dtype(hidden))


class QuestionAnswering(nnx.Module):
    """An encoder that points at an answer: logits of its first and of its last token.

    A call takes what the encoder takes, and gives a pair of `[*B, T]`, which are -inf at padding.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.models import EncoderConfig, QuestionAnswering
      >>> config = EncoderConfig(vocab_size=64, features=32, num_heads=4, num_layers=2, max_length=16)
      >>> start, end = QuestionAnswering(config, rngs=nnx.Rngs(0))(jnp.zeros((2, 16), int))
      >>> start.shape, end.shape
      ((2, 16), (2, 16))

    References:
      Devlin et al., "BERT", 2019, section 4.2.
    """

    def __init__(self, config: EncoderConfig, *, rngs: nnx.Rngs) -> None:
        self.encoder = Encoder(config, rngs=rngs)
        self.head = _projection(config, 2, ("embed", None), rngs)

    def __call__(
        self, tokens: Int[Array, "*B T"], *, lengths: Int[Array, "*B"] | None = None, **options: Any
    ) -> tuple[Float[Array, "*B T"], Float[Array, "*B T"]]:
        hidden = self.encoder(tokens, lengths=lengths, **options)
        logits = self.head(hidden).astype(logits_dtype(hidden))
        if lengths is not None:
            logits = jnp.where(_real(tokens.shape[-1], lengths)[..., None], logits, -jnp.inf)
        return logits[..., 0], logits[..., 1]


def mean_of_real(hidden: Float[Array, "*B T D"], lengths: Int[Array, "*B"] | None = None) -> Float[Array, "*B D"]:
    """The mean vector of the tokens that are no padding."""
    if lengths is None:
        return hidden.mean(-2)
    total = jnp.where(_real(hidden.shape[-2], lengths)[..., None], hidden, 0).sum(-2)
    return total / jnp.maximum(lengths, 1)[..., None].astype(hidden.dtype)


def _real(count: int, lengths: Array) -> Array:
    return jnp.arange(count) < lengths[..., None]


def _projection(c: EncoderConfig, outputs: int, axes: tuple[str | None, ...], rngs: nnx.Rngs) -> Projection:
    return Projection((c.features,), (outputs,), axes=axes, dtype=c.dtype, param_dtype=c.param_dtype, rngs=rngs)


def _dropout(c: EncoderConfig, rngs: nnx.Rngs) -> nnx.Dropout:
    return nnx.Dropout(c.dropout, rngs=dropout_stream("Encoder", c.dropout, rngs))


def _random(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options.get(name) for name in ("deterministic", "rngs")}


def _activation(c: EncoderConfig) -> Callable:
    """That of the feed-forward part; of a gated one, GELU."""
    return c.activation if callable(c.activation) else ACTIVATIONS.get(c.activation, jax.nn.gelu)


def _block(c: EncoderConfig, window: int | None) -> Callable[[nnx.Rngs], EncoderBlock]:
    attention: dict[str, Any] = dict(
        mask=None if window is None else Window(window, window),
        rope=c.positions if isinstance(c.positions, RoPE) else None,
        implementation=c.implementation,
    )
    return lambda rngs: EncoderBlock(
        c.features,
        c.num_heads,
        c.hidden or 4 * c.features,
        norm=c.norm,
        pre_norm=c.pre_norm,
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
