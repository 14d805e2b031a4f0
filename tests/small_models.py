"""Small models of every kind, for tests."""

import jax
from flax import nnx

from attnjax.models import (
    DecoderConfig,
    DecoderLM,
    Encoder,
    EncoderConfig,
    Transformer,
    TransformerConfig,
    VisionConfig,
    VisionTransformer,
)
from attnjax.nn import RoPE

SMALL = dict(vocab_size=53, features=24, num_heads=4, num_layers=2)
DECODERS = {
    "gpt": DecoderConfig(**SMALL, max_length=19),
    "llama": DecoderConfig(
        **SMALL, key_heads=2, positions=RoPE(), norm="rms", activation="swiglu", use_bias=False, tie_embeddings=False
    ),
    "gemma": DecoderConfig(
        **SMALL,
        key_heads=2,
        head_size=8,
        positions=RoPE(),
        norm="rms",
        output_norm=True,
        activation="geglu",
        use_bias=False,
        windows=(3, None),
        attention_cap=5.0,
        logit_cap=3.0,
        attention_scale=0.3,
        embedding_scale=24**0.5,
    ),
    "alibi": DecoderConfig(**SMALL, positions="alibi", normalize="rms", sinks=True),
}
ENCODER = EncoderConfig(**SMALL, max_length=19)
TRANSFORMER = TransformerConfig(
    53, features=24, num_heads=4, hidden=32, encoder_layers=2, decoder_layers=2, dropout=0.0
)
VISION = VisionConfig((6, 4), (2, 2), 5, features=24, num_heads=4, num_layers=2)


def build(config, seed=0):
    kinds = {DecoderConfig: DecoderLM, EncoderConfig: Encoder, TransformerConfig: Transformer}
    return {**kinds, VisionConfig: VisionTransformer}[type(config)](config, rngs=nnx.Rngs(params=seed, dropout=seed))


def draw(*shape, seed=0):
    return jax.random.randint(jax.random.key(seed), shape, 0, 53)
