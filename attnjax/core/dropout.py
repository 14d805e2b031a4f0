"""Dropout as a hash of the position, so that every implementation, tiling and recomputation drops the same weights.

The hash goes through batch entry, head, query and key in turn. The first two are done once, outside of the kernels:
they take a number for each batch entry and head, and need not know which ones these are.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = jax.Array


def head_seeds(seed: Any, b: Any, n: Any) -> Any:
    """The hash of seed, batch entry and head. numpy stays numpy.

    Args:
      seed: uint32; b, n: uint32, row-major number of the batch entry and number of the query head. All broadcast.

    Returns:
      uint32 of the broadcast shape.
    """
    return _mix(_mix(seed + b * np.uint32(0x9E3779B1)) + n * np.uint32(0x85EBCA77))


def keep(seeds: Any, t: Any, s: Any, rate: float) -> Any:
    """Whether the weight of query t on key s is kept: true with probability 1 - rate.

    Args:
      seeds: `head_seeds` of the batch entry and head; t, s: integer indices. All broadcast together.
      rate: share of weights that are dropped, in [0, 1).

    Returns:
      Booleans of the broadcast shape.
    """
    u32 = lambda x: jnp.asarray(x).astype(jnp.uint32)
    row = _mix(u32(seeds) + u32(t) * np.uint32(0xC2B2AE3D))
    bits = _mix(row + u32(s) * np.uint32(0x27D4EB2F))
    return bits >= np.uint32(min(round(rate * 2**32), 2**32 - 1))


def _mix(x: Any) -> Any:
    """A bijection of 32 bits with low bias (C. Wellons, "Prospecting for hash functions", 2018: lowbias32)."""
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x7FEB352D)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(0x846CA68B)
    return x ^ (x >> np.uint32(16))
