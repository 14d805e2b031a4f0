"""The public functions: check once, build the problem, bind the primitive. All of them are `attention` underneath."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from attnjax.core import checks
from attnjax.core.blocks import BlockMap
from attnjax.core.dispatch import check_name
from attnjax.core.dropout import head_seeds
from attnjax.core.node import describe, is_array, narrowed
from attnjax.core.program import Problem, Program
from attnjax.core.symbolic import indices
from attnjax.core.tiles import Sizes, operand_form
from attnjax.core.transforms import attend, highest
from attnjax.kernels import cpu, mosaic_gpu, mosaic_tpu, triton, xla
from attnjax.masks import Causal, Lengths, Mask, Window, as_mask
from attnjax.scores import Bias, Scale, Score, as_scores

Array = jax.Array
Implementation = Literal["reference", "xla", "cpu", "cudnn", "triton", "mosaic_gpu", "mosaic_tpu"]


@dataclasses.dataclass(frozen=True)
class Dropout:
    """Dropout of attention weights, the same for every implementation: a hash of seed and position decides.

    Args:
      rate: share of weights that are dropped, in [0, 1); the others are divided by 1 - rate.
      seed: integer or integer array `[]` or `[*B]`; give another at every step.

    Example:
      >>> from attnjax import Dropout
      >>> Dropout(0.1, seed=7)
      Dropout(rate=0.1, seed=7)
    """

    rate: float
    seed: Any = None

    def __post_init__(self) -> None:
        rate = checks.number_of(self.rate)
        if rate is None:
            raise TypeError(f"Dropout: rate must be a number that is known, got {type(self.rate).__name__}.")
        if not 0 <= rate < 1:
            raise ValueError(f"Dropout: rate must be in [0, 1), got {self.rate}.")
        object.__setattr__(self, "rate", rate)
        if self.seed is None:
            raise ValueError("Dropout: seed is missing: give an integer (or integer array), another one at every step.")
        integer = isinstance(self.seed, (int, np.integer)) and not isinstance(self.seed, bool)
        if not integer and not (is_array(self.seed) and jnp.issubdtype(self.seed.dtype, jnp.integer)):
            kind = str(self.seed.dtype) if is_array(self.seed) else repr(self.seed)
            raise TypeError(
                f"Dropout: seed must be an integer or an integer array, got {kind}. From a PRNG key: "
                "jax.random.bits(rng)."
            )
        if is_array(self.seed) and self.seed.dtype == np.uint32 and tuple(self.seed.shape) == (2,):
            raise ValueError(
                "Dropout: seed is uint32[2], which is what jax.random.PRNGKey gives. From a PRNG key: "
                "jax.random.bits(rng). Seeds of two batch entries: seeds.astype(jnp.int32)."
            )


def _unflatten_dropout(rate: float, seed: Any) -> Dropout:
    """Without the checks: while a tree is rebuilt, any object may stand in the place of the seed."""
    dropout = object.__new__(Dropout)
    dropout.__dict__.update(rate=rate, seed=seed[0])
    return dropout


jax.tree_util.register_pytree_with_keys(
    Dropout, lambda d: (((jax.tree_util.GetAttrKey("seed"), d.seed),), d.rate), _unflatten_dropout
)


def attention(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    value: Float[Array, "*B S K V"],
    *,
    mask: Mask | Array | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | Array | None = None,
    sinks: Array | None = None,
    dropout: Dropout | None = None,
    implementation: Implementation | None = None,
    config: Any = None,
    block_map: BlockMap | None = None,
    return_lse: bool = False,
) -> Any:
    """Exact attention: any mask, every transform, every device, linear memory.

        s = scale * q k^T -> scores in order -> mask -> softmax (sinks join the denominator) -> dropout -> * v

    A query that may see nothing gives 0, with log-sum-exp -inf and gradients 0. What keys that nobody sees hold, even
    NaN, does not matter. Products accumulate in float32 (float64 for float64).

    What derivatives keep has names for policies of `jax.checkpoint`, "attention_out" and "attention_lse": where both
    are kept, the backward does not run the forward again.

    Args:
      query: `[*B, T, N, H]`; any number of batch axes, also none. N is a multiple of K (grouped-query attention).
      key: `[*B, S, K, H]`, value: `[*B, S, K, V]`; float64, float32, bfloat16 or float16, all of one type.
      mask: who may see whom: a Mask (combined with & | ~), or booleans that broadcast to `[*B, N, T, S]`. Default: all.
      score: what is done to the logits: a Score, or a tuple of them, applied in order.
      scale: factor of the logits, a number or floats that broadcast to `[*B, N]`, such as one for each query head;
        default 1 / sqrt(H). Arrays have a gradient.
      sinks: `[N]`, one more logit per head that takes part in the softmax but has no value.
      dropout: `Dropout(rate, seed)`.
      implementation: "cpu", "cudnn", "triton", "mosaic_gpu", "mosaic_tpu", "xla" or "reference"; default: the best that
        can. A named one runs or raises.
      config: how the implementation runs, such as `attnjax.kernels.xla.Config(...)`.
      block_map: a `BlockMap` of the mask that was built before.
      return_lse: also return the log-sum-exp of the logits (sinks included).

    Returns:
      `[*B, T, N, V]` in the query's dtype; with `return_lse` also the log-sum-exp `[*B, T, N]` in float32 (float64
      for float64). Both are differentiable.

    Raises:
      TypeError, ValueError: arguments that do not fit.
      NotImplementedError: the implementation that was named cannot do it.

    Example:
      >>> import jax
      >>> from attnjax import Causal, SoftCap, attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 1, 16, 4, 8))
      >>> attention(q, k, v, mask=Causal(), score=SoftCap(50.0)).shape
      (1, 16, 4, 8)

    References:
      Dao, "FlashAttention-2", 2023. Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021.
    """
    _check_no_shapes(query=query, key=key, value=value)
    problem, operands = build(
        query,
        key,
        value,
        mask=mask,
        score=score,
        scale=scale,
        sinks=sinks,
        dropout=dropout,
        implementation=implementation,
        config=config,
        block_map=block_map,
        return_lse=return_lse,
    )
    made = attend(problem, operands)
    return tuple(made) if return_lse else made[0]


def _check_no_shapes(**arguments: Any) -> None:
    for name, x in arguments.items():
        if isinstance(x, jax.ShapeDtypeStruct):
            raise TypeError(
                f"{name} is a jax.ShapeDtypeStruct, no array: attnjax.explain and jax.eval_shape take such."
            )


def build(
    query: Any,
    key: Any,
    value: Any,
    *,
    mask: Any = None,
    score: Any = None,
    scale: Any = None,
    sinks: Any = None,
    dropout: Dropout | None = None,
    implementation: str | None = None,
    config: Any = None,
    block_map: BlockMap | None = None,
    return_lse: bool = True,
) -> tuple[Problem, list[Any]]:
    """Checks the arguments of `attention` and splits them into what is static and the list of operands."""
    plain = (list, tuple, np.ndarray)
    query, key, value = (jnp.asarray(x) if isinstance(x, plain) else x for x in (query, key, value))
    checks.check_arrays(query, key, value)
    check_name(implementation)
    *batch, query_length, heads, head_size = query.shape
    key_length, key_heads, value_size = value.shape[-3:]
    batch = tuple(batch)
    by_letter = {"t": query_length, "s": key_length, "h": heads}
    scale = checks.check_scale(scale, heads, batch)
    checks.check_sinks(sinks, heads, batch)
    if dropout is not None and not isinstance(dropout, Dropout):
        raise TypeError(f"dropout must be attnjax.Dropout(rate, seed), got {type(dropout).__name__} {dropout!r}.")
    implementation = _configured(implementation, config)
    mask = None if mask is None else as_mask(mask)
    scores = as_scores(score)
    if is_array(scale):
        scores, scale = (Scale(scale), *scores), 1.0
    scale = 1.0 / math.sqrt(head_size) if scale is None else scale
    for argument, node in [("mask", mask), *(("score", s) for s in scores)]:
        if node is not None:
            checks.check_leaves(node, argument, batch, by_letter)
    if mask is not None:
        checks.check_static_lengths(mask, "mask", query_length, key_length)
    _check_map(block_map, mask, query_length, key_length, batch, heads, config)
    if block_map is not None and mask is not None:
        mask = block_map.effective(mask, batch, heads)
    mask = None if mask is None else mask.settled(query_length, key_length, query.dtype)
    scores = tuple(s.settled(query_length, key_length, query.dtype) for s in scores)

    n = len(batch)
    operands, axes, floats = [query, key, value], ["th.", "sk.", "sk."], [0, 1, 2]
    if sinks is not None:
        floats.append(len(operands))
        operands.append(operand_form(narrowed(sinks, query.dtype), "h", n))
        axes.append("h")
    dropping = dropout is not None and dropout.rate > 0
    if dropping:
        assert dropout is not None
        operands.append(operand_form(_seeds(dropout.seed, batch, heads), "h", n))
        axes.append("h")
    for node in [*([] if mask is None else [mask]), *scores]:
        for _, leaf, names in node.operands():
            if isinstance(node, Score) and jnp.issubdtype(leaf.dtype, jnp.floating):
                floats.append(len(operands))
            operands.append(operand_form(leaf, names, n))
            axes.append(names)
    if block_map is not None:
        missing = n + 3 - block_map.kinds.ndim
        operands.append(block_map.kinds.reshape((1,) * missing + block_map.kinds.shape))
        axes.append("h..")
    program = Program(
        scale=scale,
        scores=tuple(jax.tree.structure(s) for s in scores),
        mask=() if mask is None else (jax.tree.structure(mask),),
        sinks=sinks is not None,
        dropout=float(dropout.rate) if dropping and dropout is not None else 0.0,
        axes=tuple(axes),
        has_map=block_map is not None,
    )
    problem = Problem(
        program=program,
        sizes=Sizes(batch, 0, query_length, key_length, heads, key_heads),
        dtype=np.dtype(query.dtype).name,
        head_size=head_size,
        value_size=value_size,
        differentiable=tuple(floats),
        implementation=implementation,
        config=config,
        blocks=None if block_map is None else (block_map.block_q, block_map.block_k),
        returns_lse=return_lse,
    )
    return problem, operands


def _configured(implementation: str | None, config: Any) -> str | None:
    """The implementation, which a config names too."""
    if config is None:
        return implementation
    kernels = {xla: "xla", cpu: "cpu", triton: "triton", mosaic_gpu: "mosaic_gpu", mosaic_tpu: "mosaic_tpu"}
    named = {kernel.Config: name for kernel, name in kernels.items()}.get(type(config))
    if named is None:
        kind = type(config).__name__
        raise TypeError(
            f"config must be the Config of an implementation, such as attnjax.kernels.xla.Config, got {kind}."
        )
    if implementation not in (None, named, "reference"):
        raise ValueError(f"config is one of {named!r} and implementation is {implementation!r}: give one of that.")
    return implementation or named


def _seeds(seed: Any, batch: tuple[int, ...], heads: int) -> Any:
    """Dropout's seeds by batch entry and head, uint32 [*B, N]."""
    if isinstance(seed, (int, np.integer)):
        return jax.device_put(_hashed(np.asarray(int(seed) % 2**32, np.uint32), batch, heads))
    if not checks.broadcasts(seed.shape, batch):
        raise ValueError(f"dropout: seed is {describe(seed)} and must be a scalar or broadcast to *B = {list(batch)}.")
    if isinstance(seed, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((*batch, heads), np.uint32)
    return jax.jit(_hashed, static_argnums=(1, 2))(seed.astype(np.uint32), batch, heads)


def _hashed(seed: Any, batch: tuple[int, ...], heads: int) -> Any:
    seed = seed.reshape((1,) * (len(batch) - seed.ndim) + seed.shape + (1,))
    entries = indices(math.prod(batch)).astype(np.uint32).reshape(*batch, 1)
    return head_seeds(seed, entries, np.arange(heads, dtype=np.uint32).reshape((1,) * len(batch) + (heads,)))


def _check_map(block_map: Any, mask: Any, t: int, s: int, batch: tuple[int, ...], heads: int, config: Any) -> None:
    if block_map is None:
        return
    if not isinstance(block_map, BlockMap):
        raise TypeError(f"block_map must be an attnjax.BlockMap, got {type(block_map).__name__}.")
    if mask is None:
        raise ValueError("block_map was given without mask: pass the mask that it was built from, too.")
    if (block_map.query_length, block_map.key_length) != (t, s):
        raise ValueError(
            f"block_map was built for T = {block_map.query_length}, S = {block_map.key_length}, the call has T = {t}, "
            f"S = {s}: build it for these lengths."
        )
    shape = block_map.kinds.shape[:-2]
    if not checks.broadcasts(shape, (*batch, heads)):
        raise ValueError(f"block_map is for batch and heads {list(shape)}, the call has {[*batch, heads]}.")
    if isinstance(config, xla.Config) and any(
        asked not in (None, built)
        for asked, built in ((config.block_q, block_map.block_q), (config.block_k, block_map.block_k))
    ):
        raise ValueError(
            f"config asks for other blocks than block_map has ({block_map.block_q} x {block_map.block_k}): give one."
        )


def max_logit(
    query: Float[Array, "*B T N H"],
    key: Float[Array, "*B S K H"],
    *,
    mask: Mask | Array | None = None,
    score: Score | tuple[Score, ...] | None = None,
    scale: float | Array | None = None,
) -> Array:
    """The largest logit of each query, after the scores, among the keys that it sees; in linear memory.

    QK-clip wants it by head: the maximum over the batch and the queries. Its gradient is 0.

    Args:
      query, key, mask, score, scale: as in `attention`.

    Returns:
      `[*B, T, N]` in float32 (float64 for float64), -inf where a query sees no key.

    Raises:
      TypeError, ValueError: arguments that do not fit.

    Example:
      >>> import jax
      >>> from attnjax import Causal, max_logit
      >>> q, k = jax.random.normal(jax.random.key(0), (2, 3, 16, 4, 8))
      >>> max_logit(q, k, mask=Causal()).max((0, 1)).shape
      (4,)

    References:
      Kimi Team, "Kimi K2: Open Agentic Intelligence", 2025, section 2.1 (QK-clip).
    """
    _check_no_shapes(query=query, key=key)
    key = jnp.asarray(key) if isinstance(key, (list, tuple)) else key
    value = key[..., :0] if is_array(key) and key.ndim else key  # of size 0: the tiled code, on every device
    problem, operands = build(query, key, value, mask=mask, score=score, scale=scale, return_lse=False)
    return highest(problem, operands)


def full_attention(query: Array, key: Array, value: Array, **options: Any) -> Any:
    """Every query sees every key: `attention` without a mask. `options` are those of `attention`.

    Example:
      >>> import jax
      >>> from attnjax import full_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 16, 4, 8))
      >>> full_attention(q, k, v).shape
      (16, 4, 8)
    """
    if options.get("mask") is not None:
        raise ValueError("full_attention takes no mask: use attention(..., mask=...).")
    return attention(query, key, value, **options)


def causal_attention(query: Array, key: Array, value: Array, *, offset: Any = 0, **options: Any) -> Any:
    """Query t sees keys s <= t + offset. A mask in `options` is combined with it; the rest is as in `attention`.

    Example:
      >>> import jax
      >>> from attnjax import causal_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 16, 4, 8))
      >>> causal_attention(q, k, v).shape
      (16, 4, 8)
    """
    mask = options.pop("mask", None)
    causal = Causal(offset)
    return attention(query, key, value, mask=causal if mask is None else causal & as_mask(mask), **options)


def chunked_attention(
    query: Array,
    key: Array,
    value: Array,
    *,
    query_chunk_size: int | None = None,
    key_chunk_size: int | None = None,
    **options: Any,
) -> Any:
    """Memory-efficient attention with tile sizes of one's own: the same numbers as `attention`, cut as asked.

    Args:
      query, key, value: as in `attention`.
      query_chunk_size, key_chunk_size: queries and keys of a tile; `None` chooses.
      options: those of `attention`, without `config`.

    Example:
      >>> import jax
      >>> from attnjax import Causal, chunked_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 64, 4, 8))
      >>> chunked_attention(q, k, v, mask=Causal(), query_chunk_size=16, key_chunk_size=32).shape
      (64, 4, 8)

    References:
      Rabe and Staats, "Self-attention Does Not Need O(n^2) Memory", 2021.
    """
    for name, size in (("query_chunk_size", query_chunk_size), ("key_chunk_size", key_chunk_size)):
        if size is not None:
            checks.check_count(name, size)
    if options.get("config") is not None:
        raise ValueError("chunked_attention takes its chunk sizes in place of config: leave config out.")
    options = {**options, "config": xla.Config(block_q=query_chunk_size, block_k=key_chunk_size)}
    options.setdefault("implementation", "xla")
    return attention(query, key, value, **options)


def dot_product_attention(
    query: Array,
    key: Array,
    value: Array,
    bias: Array | None = None,
    mask: Array | None = None,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    query_seq_lengths: Array | None = None,
    key_value_seq_lengths: Array | None = None,
    local_window_size: int | tuple[int, int] | None = None,
    implementation: Implementation | None = None,
    return_residual: bool = False,
) -> Any:
    """`jax.nn.dot_product_attention`, argument for argument: put in its place, it changes speed and memory only.

    Deliberate differences: a query that sees nothing gives 0 (jax.nn: the mean of the values); the residual is
    float32 and differentiable (jax.nn: the query's type, without gradient); float64 is computed in float64 throughout;
    value may have a head size of its own; implementations are attnjax's.

    Args:
      query: `[B, T, N, H]` or `[T, N, H]`; key, value: `[B, S, K, H]` or `[S, K, H]`.
      bias: floats that broadcast to `[B, N, T, S]`, added to the logits; gets a gradient.
      mask: booleans that broadcast to `[B, N, T, S]`, true where the query may see the key.
      scale: factor of the logits; default 1 / sqrt(H).
      is_causal: query t sees keys s <= t.
      query_seq_lengths, key_value_seq_lengths: int32 `[B]`; what lies beyond is padding.
      local_window_size: (left, right), or one number for both: keys in [t - left, t + right].
      implementation: "xla" or "reference"; default: the best that can.
      return_residual: also return the log-sum-exp `[B, T, N]`.

    Returns:
      The output, shaped like query (with the value's head size); with `return_residual` a tuple with the log-sum-exp.

    Example:
      >>> import jax
      >>> from attnjax import dot_product_attention
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 2, 16, 4, 8))
      >>> bool(abs(dot_product_attention(q, k, v) - jax.nn.dot_product_attention(q, k, v)).max() < 1e-5)
      True
    """
    named = (("query", query), ("key", key), ("value", value))
    for name, x in named:
        if not (is_array(x) or isinstance(x, (list, tuple))):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
    query, key, value = (jnp.asarray(x) for _, x in named)
    if query.ndim not in (3, 4):
        raise ValueError(
            f"query must be [B, T, N, H] or [T, N, H], got {describe(query)}; attnjax.attention takes any batch axes."
        )
    parts: list[Mask] = []
    if mask is not None:
        parts.append(as_mask(_pairs(mask, query.ndim)))
    if is_causal:
        parts.append(Causal())
    if local_window_size is not None:
        size = checks.number_of(local_window_size)
        given = (size, size) if size is not None else local_window_size
        both: list[Any] = [checks.number_of(x) for x in given] if isinstance(given, (tuple, list)) else []
        if len(both) != 2 or not all(isinstance(x, int) for x in both):
            raise ValueError(f"local_window_size must be an integer or (left, right), got {local_window_size!r}.")
        left, right = both
        parts.append(Window(left, right))
    if query_seq_lengths is not None or key_value_seq_lengths is not None:
        parts.append(Lengths(*(_lengths(x, query.ndim) for x in (key_value_seq_lengths, query_seq_lengths))))
    combined = None
    for part in parts:
        combined = part if combined is None else combined & part
    made = attention(
        query,
        key,
        value,
        mask=combined,
        score=None if bias is None else Bias(_pairs(bias, query.ndim)),
        scale=scale,
        implementation=implementation,
        return_lse=return_residual,
    )
    return made


def _pairs(array: Any, ndim: int) -> Any:
    """A mask or bias; that of a query without batch axis may have one of size 1, as in jax.nn."""
    array = jnp.asarray(array)
    return array[0] if ndim == 3 and array.ndim == 4 and array.shape[0] == 1 else array


def _lengths(lengths: Any, ndim: int) -> Any:
    if lengths is None:
        return None
    lengths = jnp.asarray(lengths)
    return lengths.reshape(()) if ndim == 3 and lengths.shape == (1,) else lengths
