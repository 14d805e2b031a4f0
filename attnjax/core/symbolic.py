"""Sizes that are symbols: with `jax.export.symbolic_shape` one program serves all sizes, and none is known in tracing.

A symbol may be added and multiplied like an integer, and stand in shapes. It equals another size only where that holds
for all its values; which of two is larger may not be known; and it is no index: see `number`.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

Size = Any  # an integer or a symbol


def is_known(size: Size) -> bool:
    """Whether a size is an integer."""
    return isinstance(size, (int, np.integer))


def at_most(size: Size, limit: int) -> Size:
    """The size, or the limit where that is less."""
    return min(size, limit) if is_known(size) else jax.core.min_dim(size, limit)


def number(value: Any) -> Any:
    """A size as a number to compute indices with: an int32 array where it is a symbol, else as it is."""
    return value if is_known(value) or hasattr(value, "dtype") else jnp.asarray(value, jnp.int32)


def indices(size: Size) -> Any:
    """int32 [size]: 0, 1, 2, ...; numpy where the size is known."""
    return np.arange(size, dtype=np.int32) if is_known(size) else jnp.arange(size, dtype=jnp.int32)
