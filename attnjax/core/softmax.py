"""Online softmax: a sum of exponentials that is built block by block and never overflows."""

from __future__ import annotations

import jax
import jax.numpy as jnp

Array = jax.Array


def finite(x: Array) -> Array:
    """0 in place of -inf: a maximum, or log-sum-exp, that is safe to subtract."""
    return jnp.where(x == -jnp.inf, jnp.zeros_like(x), x)


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

    Args:
      out_a, out_b: outputs `[..., V]`.
      lse_a, lse_b: log-sum-exps `[...]`, -inf where nothing is seen.

    Returns:
      The output and the log-sum-exp over both sets.

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
    lse = jnp.logaddexp(lse_a, lse_b)
    safe = finite(lse)
    weight = lambda part: jnp.exp(part - safe)[..., None].astype(out_a.dtype)
    return weight(lse_a) * out_a + weight(lse_b) * out_b, lse


def add_sinks(out: Array, lse: Array, sinks: Array) -> tuple[Array, Array]:
    """Lets sinks join the denominator: out [..., V], lse [...], sinks broadcast to lse."""
    joined = jnp.logaddexp(lse, sinks)
    return out * jnp.exp(lse - finite(joined))[..., None], joined
