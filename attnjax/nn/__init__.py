"""Flax NNX modules on `attnjax.attention`. Imported by name, `import attnjax.nn`: attnjax itself does without Flax."""

from flax.nnx import Embed as Embed

from attnjax.nn.adapters import attention_fn as attention_fn
from attnjax.nn.attention import MultiHeadAttention as MultiHeadAttention
from attnjax.nn.attention import RelativePositions as RelativePositions
from attnjax.nn.blocks import DecoderBlock as DecoderBlock
from attnjax.nn.blocks import EncoderBlock as EncoderBlock
from attnjax.nn.constants import Constant as Constant
from attnjax.nn.embeddings import LearnedPositions as LearnedPositions
from attnjax.nn.embeddings import PatchEmbedding as PatchEmbedding
from attnjax.nn.embeddings import SinusoidalPositions as SinusoidalPositions
from attnjax.nn.feed_forward import FeedForward as FeedForward
from attnjax.nn.stack import Stack as Stack
from attnjax.positions import LinearScaling as LinearScaling
from attnjax.positions import Llama3Scaling as Llama3Scaling
from attnjax.positions import NTKScaling as NTKScaling
from attnjax.positions import RoPE as RoPE
from attnjax.positions import YaRN as YaRN
