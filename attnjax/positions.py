"""Where tokens stand: the fixed rules behind position scores. Plain functions, no parameters."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def alibi_slopes(num_heads: int) -> Array:
    """The slopes of ALiBi, one per head: a geometric sequence that starts at 2^(-8/n) with that ratio.

    When the number of heads n is not a power of two, the slopes of the next lower power come first, then every other
    slope of twice that power.

    Args:
      num_heads: integer >= 1.

    Returns:
      float32 `[N]`.

    Example:
      >>> from attnjax.positions import alibi_slopes
      >>> alibi_slopes(4).tolist()
      [0.25, 0.0625, 0.015625, 0.00390625]

    References:
      Press et al., "Train Short, Test Long: Attention with Linear Biases", 2022, section 3 and its code.
    """
    if not isinstance(num_heads, (int, np.integer)) or num_heads < 1:
        raise ValueError(f"num_heads must be an integer of at least 1, got {num_heads!r}.")
    power = 2 ** int(np.floor(np.log2(num_heads)))
    geometric = lambda n: 2.0 ** (-8.0 / n * np.arange(1, n + 1))
    slopes = np.concatenate([geometric(power), geometric(2 * power)[::2][: num_heads - power]])
    return jnp.asarray(slopes, jnp.float32)


def relative_position_bucket(
    relative_position: Array, *, bidirectional: bool = True, num_buckets: int = 32, max_distance: int = 128
) -> Array:
    """T5's bucket of a relative position: exact for near tokens, logarithmic up to `max_distance` for far ones.

    Args:
      relative_position: integers, key position minus query position.
      bidirectional: half of the buckets for keys that come later; otherwise those all fall into bucket 0.
      num_buckets: how many buckets.
      max_distance: distances from here on share the last bucket.

    Returns:
      int32 of the same shape, in [0, num_buckets).

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax.positions import relative_position_bucket
      >>> relative_position_bucket(jnp.array([-200, -3, 0, 3])).tolist()
      [15, 3, 0, 19]

    References:
      Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1 and its code.
    """
    relative_position = jnp.asarray(relative_position).astype(jnp.int32)
    if bidirectional:
        num_buckets //= 2
        start = jnp.where(relative_position > 0, num_buckets, 0)
        distance = jnp.abs(relative_position)
    else:
        start = jnp.zeros_like(relative_position)
        distance = jnp.maximum(-relative_position, 0)
    # The ends of the logarithmic buckets are integers, found here once in float64, so that a logarithm that is
    # rounded differently on another device cannot move a token into another bucket.
    exact = num_buckets // 2
    candidates = np.arange(exact, max(max_distance, exact) + 1)
    share = np.log(candidates / exact) / np.log(max_distance / exact) if max_distance > exact else candidates * 0.0
    bucket = exact + np.floor(share.astype(np.float32) * np.float32(num_buckets - exact)).astype(np.int64)
    bucket = np.minimum(bucket, num_buckets - 1)
    steps = np.zeros((1,), np.int32) if not len(candidates) else candidates[1:][np.diff(bucket) > 0]
    jumps = np.diff(bucket)[np.diff(bucket) > 0]
    far = exact + sum(
        (int(jump) * (distance >= int(step)).astype(jnp.int32) for step, jump in zip(steps, jumps, strict=True)),
        jnp.zeros_like(distance),
    )
    return start + jnp.where(distance < exact, distance, far)
