"""attnjax: exact attention for JAX. Any mask, every transform, every device, linear memory."""

from attnjax.attention import Dropout as Dropout
from attnjax.attention import attention as attention
from attnjax.attention import causal_attention as causal_attention
from attnjax.attention import chunked_attention as chunked_attention
from attnjax.attention import dot_product_attention as dot_product_attention
from attnjax.attention import full_attention as full_attention
from attnjax.core.blocks import BlockMap as BlockMap
from attnjax.core.softmax import merge as merge
from attnjax.masks import Causal as Causal
from attnjax.masks import Chunked as Chunked
from attnjax.masks import Dense as Dense
from attnjax.masks import Dilated as Dilated
from attnjax.masks import Lengths as Lengths
from attnjax.masks import Mask as Mask
from attnjax.masks import Permutation as Permutation
from attnjax.masks import Prefix as Prefix
from attnjax.masks import Segments as Segments
from attnjax.masks import Where as Where
from attnjax.masks import Window as Window
from attnjax.scores import ALiBi as ALiBi
from attnjax.scores import Bias as Bias
from attnjax.scores import RelativeBias as RelativeBias
from attnjax.scores import Score as Score
from attnjax.scores import ScoreFn as ScoreFn
from attnjax.scores import SoftCap as SoftCap
