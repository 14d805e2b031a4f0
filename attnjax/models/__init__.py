"""Whole models, generation and checkpoints. Imported by name: `import attnjax.models`."""

from attnjax.models.beam import Beams as Beams
from attnjax.models.beam import beam_search as beam_search
from attnjax.models.decoder import DecoderConfig as DecoderConfig
from attnjax.models.decoder import DecoderLM as DecoderLM
from attnjax.models.encoder import Encoder as Encoder
from attnjax.models.encoder import EncoderConfig as EncoderConfig
from attnjax.models.encoder import MaskedLM as MaskedLM
from attnjax.models.encoder import QuestionAnswering as QuestionAnswering
from attnjax.models.encoder import SequenceClassifier as SequenceClassifier
from attnjax.models.encoder import TokenClassifier as TokenClassifier
from attnjax.models.encoder_decoder import Memory as Memory
from attnjax.models.encoder_decoder import Transformer as Transformer
from attnjax.models.encoder_decoder import TransformerConfig as TransformerConfig
from attnjax.models.generate import Generated as Generated
from attnjax.models.generate import generate as generate
from attnjax.models.prompts import pad as pad
from attnjax.models.sampling import Sampling as Sampling
from attnjax.models.vision import VisionConfig as VisionConfig
from attnjax.models.vision import VisionTransformer as VisionTransformer
