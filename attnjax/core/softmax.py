"""Online softmax: a sum of exponentials that is built block by block and never overflows."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Rows(NamedTuple):
    """What the forward gives for each query, and what derivatives start from.

    The softmax is kept as (highest, total) and not as its logarithm alone: weights exp(logit - highest) / total add up
    to 1 to the last bit, weights exp(logit - lse) only to the rounding of lse, which shows in gradients that sum over
    many pairs. An implementation that has the log-sum-exp only may give it as `highest`, with a total of 1.

    Attributes:
      out: [*batch, T, N, V]; highest: [*batch, T, N], -inf where nothing is seen; total: [*batch, T, N].
    """

    out: Array
    highest: Array
    total: Array


def log_sum_exp(highest: Array, total: Array) -> Array:
    """highest + log(total), -inf where the total is 0."""
    empty = total == 0
    return jnp.where(empty, -jnp.inf, finite(highest) + jnp.log(jnp.where(empty, jnp.ones_like(total), total)))


def inverse(total: Array) -> Array:
    """1 / total, and 1 where the total is 0."""
    return 1 / jnp.where(total == 0, jnp.ones_like(total), total)


def finite(x: Array) -> Array:
    """0 in place of -inf: a maximum, or log-sum-exp, that is safe to subtract."""
    return jnp.where(x == -jnp.inf, jnp.zeros_like(x), x)


def no_rows(shape: tuple[int, ...], dtype: Any, accumulate: Any, sinks: Array | None) -> Rows:
    """The rows of an attention that has no keys: nothing is seen but the sinks, which broadcast to [*batch, T, N].

    Args:
      shape: of the output, whose type is `dtype`; highest and total have the type `accumulate`.
    """
    highest, total = jnp.full(shape[:-1], -jnp.inf, accumulate), jnp.zeros(shape[:-1], accumulate)
    rows = Rows(jnp.zeros(shape, accumulate), highest, total)
    rows = rows if sinks is None else add_sinks(rows, sinks.astype(accumulate))
    return rows._replace(out=rows.out.astype(dtype))


def settled(x: Array) -> Array:
    """x, rounded: for logits that end in a product, before anything is subtracted from them.

    XLA on CPUs contracts a product and the difference that follows, which is then not rounded between them. A maximum
    is of rounded products, so that what it leaves of itself is not 0, but 64 for logits of 10^9. Adding a zero that
    XLA does not know costs nothing: that is contracted with the product.
    """
    return x + jax.lax.optimization_barrier(jnp.zeros((), x.dtype))


def merge_max(highest: Array, logits: Array) -> tuple[Array, Array, Array]:
    """Takes in a block of logits.

    Args:
      highest: the running maximum, [..., t].
      logits: [..., t, s]; -inf where nothing is seen.

    Returns:
      The new maximum, the factor for what was summed before, and the block's weights exp(logits - maximum).
    """
    new = jnp.maximum(highest, logits.max(-1))
    safe = finite(new)
    return new, jnp.exp(highest - safe), jnp.exp(logits - safe[..., None])


def first_max(logits: Array) -> tuple[Array, Array]:
    """The maximum and the weights of a block that has none before it; as `merge_max` without its first argument."""
    highest = logits.max(-1)
    return highest, jnp.exp(logits - finite(highest)[..., None])


def merge(out_a: Array, lse_a: Array, out_b: Array, lse_b: Array) -> tuple[Array, Array]:
    """Attention over two sets of keys from attention over each of them.

    Weights and sums are float32 (float64 where a part is float64), and the output is rounded once. Where many parts of
    16 bits are merged one after the other, `out.astype(jnp.float32)` of the first keeps the sum from being rounded at
    every step.

    Args:
      out_a, out_b: outputs `[..., V]`.
      lse_a, lse_b: log-sum-exps `[...]`, -inf where nothing is seen.

    Returns:
      The output and the log-sum-exp over both sets. The output has the type of the two outputs, the wider one where
      they differ. Both are differentiable to any order, also where neither part sees anything.

    Raises:
      TypeError, ValueError: parts that are not floats, or of different shapes.

    Example:
      >>> import jax
      >>> from attnjax import attention, merge
      >>> q, k, v = jax.random.normal(jax.random.key(0), (3, 8, 2, 4))
      >>> first, second = (attention(q, k[s], v[s], return_lse=True) for s in (slice(0, 5), slice(5, 8)))
      >>> bool(abs(merge(*first, *second)[0] - attention(q, k, v)).max() < 1e-5)
      True

    References:
      Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018.
    """
    _check_parts(out_a=out_a, lse_a=lse_a, out_b=out_b, lse_b=lse_b)
    wide = _widest(jnp.float32, lse_a.dtype, lse_b.dtype, out_a.dtype, out_b.dtype)
    lse_a, lse_b = lse_a.astype(wide), lse_b.astype(wide)
    # The result does not depend on what is subtracted, so that may stand still: no derivative divides by nothing.
    highest = jax.lax.stop_gradient(finite(jnp.maximum(lse_a, lse_b)))
    weight_a, weight_b = jnp.exp(lse_a - highest), jnp.exp(lse_b - highest)
    total = weight_a + weight_b
    out = weight_a[..., None] * out_a.astype(wide) + weight_b[..., None] * out_b.astype(wide)
    out = out * inverse(total)[..., None]
    return out.astype(_widest(out_a.dtype, out_b.dtype)), log_sum_exp(highest, total)


def _check_parts(**parts: Any) -> None:
    for name, part in parts.items():
        if not hasattr(part, "dtype") or not jnp.issubdtype(part.dtype, jnp.floating):
            kind = getattr(part, "dtype", type(part).__name__)
            raise TypeError(
                f"merge: {name} must be an array of floats, as attention(return_lse=True) gives, got {kind}."
            )
    shapes = {name: tuple(part.shape) for name, part in parts.items()}
    out = shapes["out_a"]
    if not out or shapes["out_b"] != out or {shapes["lse_a"], shapes["lse_b"]} != {out[:-1]}:
        given = ", ".join(f"{name} {list(shape)}" for name, shape in shapes.items())
        raise ValueError(f"merge: outputs must be [..., V] and log-sum-exps [...], equal in both parts, got {given}.")


def _widest(*dtypes: Any) -> Any:
    """The type of the most bits, the first of these; no promotion, which may be forbidden."""
    return max(dtypes, key=lambda dtype: jnp.dtype(dtype).itemsize)


def merge_rows(out: Array, highest: Array, total: Array) -> Rows:
    """The rows over all keys from those over parts of them, stacked in front; `out` is not yet divided by the total."""
    most = highest.max(0)
    share = jnp.exp(highest - finite(most))
    total = (total * share).sum(0)
    return Rows((out * share[..., None]).sum(0) * inverse(total)[..., None], most, total)


def add_sinks(rows: Rows, sinks: Array) -> Rows:
    """Lets sinks, which broadcast to [*batch, T, N], join the denominator."""
    highest = jnp.maximum(rows.highest, sinks)
    before = rows.total * jnp.exp(rows.highest - finite(highest))
    total = before + jnp.exp(sinks - finite(highest))
    return Rows(rows.out * (before * inverse(total))[..., None], highest, total)


def sink_weight(sinks: Array, rows: Rows) -> Array:
    """The share of the softmax that each sink takes, [*batch, T, N]; sinks are [*batch or 1, N]."""
    return jnp.exp(sinks.astype(rows.total.dtype)[..., None, :] - finite(rows.highest)) * inverse(rows.total)


def row_delta(rows: Rows, ct_out: Array, ct_lse: Array) -> Array:
    """What the backward subtracts from every weight's cotangent, [*batch, T, N]."""
    accumulate = rows.total.dtype
    return (ct_out.astype(accumulate) * rows.out.astype(accumulate)).sum(-1) - ct_lse


def tainted(highest: Array, delta: Array, ct_out: Array) -> Array:
    """Highest, and NaN for rows of which delta, or the cotangent of out, is not finite.

    Kernels sum such rows without what is not finite in them, so that it stays with those who see it: they have it from
    the weights, which are made with `highest`.
    """
    return jnp.where(jnp.isfinite(delta) & jnp.isfinite(ct_out).all(-1), highest, jnp.nan)


def sink_gradient(sinks: Array, rows: Rows, delta: Array, shape: tuple[int, ...]) -> Array:
    """The gradient of the sinks, summed over the batch axes that have size 1 in `shape`."""
    gradient = (-sink_weight(sinks, rows) * delta).sum(-2)
    return gradient.sum(
        tuple(a for a, (x, y) in enumerate(zip(gradient.shape, shape, strict=True)) if x != y), keepdims=True
    )
