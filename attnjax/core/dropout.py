"""Dropout as a hash of the position, so that every implementation, tiling and recomputation drops the same weights."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array


def keep(seed: Array, b: Array, n: Array, t: Array, s: Array, rate: float) -> Array:
    """Whether the weight of query (b, n, t) on key s is kept: true with probability 1 - rate.

    Args:
      seed: integer; b, n, t, s: integer indices (b counts the batch row-major). All broadcast together.
      rate: share of weights that are dropped, in [0, 1).

    Returns:
      Booleans of the broadcast shape.
    """
    u32 = lambda x: jnp.asarray(x).astype(jnp.uint32)
    row = _mix(u32(seed) + u32(b) * jnp.uint32(0x9E3779B1))
    row = _mix(row + u32(n) * jnp.uint32(0x85EBCA77))
    row = _mix(row + u32(t) * jnp.uint32(0xC2B2AE3D))
    bits = _mix(row + u32(s) * jnp.uint32(0x27D4EB2F))
    return bits >= jnp.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: Array) -> Array:
    """A bijection of 32 bits with low bias (C. Wellons, "Prospecting for hash functions", 2018: lowbias32)."""
    x = (x ^ lax.shift_right_logical(x, jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    x = (x ^ lax.shift_right_logical(x, jnp.uint32(15))) * jnp.uint32(0x846CA68B)
    return x ^ lax.shift_right_logical(x, jnp.uint32(16))
