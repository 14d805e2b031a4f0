"""`View`: a tile of logits inside a kernel, after scores and mask, and the way back through them. Loads nothing."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.operations import HARMLESS
from attnjax.core.program import Problem
from attnjax.core.softmax import settled
from attnjax.core.split import PairTile, Split

Array = jax.Array

LOG2E = math.log2(math.e)


def unit(problem: Problem) -> float:
    """What logits are multiplied by before they are exponents: of 2 in half precision, of e in float32.

    Exponents of 2 are faster, but their factor is one more rounding, which float32 shows where sums are long.
    """
    return 1.0 if problem.dtype == "float32" else LOG2E


def power(problem: Problem, exponents: Array) -> Array:
    """2 or e to these."""
    return jnp.exp(exponents) if problem.dtype == "float32" else jnp.exp2(exponents)


def _settled(logits: Array, interpreted: bool) -> Array:
    """`softmax.settled`. Of compilers of kernels a zero need not be hidden: they know that -0.0 + 0.0 is not -0.0."""
    return settled(logits) if interpreted else logits + 0.0


class View:
    """The logits of a tile, with queries along one of its axes and keys along the other: q and k are [r, 1] and [1, c].

    Both may be whole tiles.

    In a masked tile not every pair counts. What is hidden may hold NaN, and a weight of 0 times NaN is NaN. So where
    rows are summed, numbers that are not finite are 0 (`finite`), and those who see them have NaN as logits or weights.

    Attributes:
      logits: times `unit`, -inf where the query does not see the key.
    """

    def __init__(
        self,
        split: Split,
        at: tuple[Any, Any],
        q: Array,
        k: Array,
        values: list[Any],
        raw: Array,
        masked: bool,
        taint: Array | None = None,
    ):
        """`at`: batch entry and head; `values`: the tile's part of every piece; `raw`: the product of query and key.

        `taint` is added to the logits of a masked tile before the mask: see `taint`.
        """
        program, sizes = split.problem.program, split.problem.sizes
        self._tile: PairTile = split.tile(q, k, *at, values)
        self._scored, self._hides = bool(program.scores), program.hides(split.problem.accumulate)
        self._visible = None
        if masked:
            visible = jnp.broadcast_to((q < sizes.query_length) & (k < sizes.key_length), raw.shape)
            seen = self._tile.visible()
            self._visible = visible if seen is None else visible & jnp.broadcast_to(seen, raw.shape)
        if self._scored:  # where nothing is seen their derivatives must stay finite
            self._raw = self.hidden(raw * program.scale, HARMLESS)
            logits = self._tile.modify(self._raw) * unit(split.problem)
        else:
            logits = raw * (program.scale * unit(split.problem))
        if split.problem.dtype == "float32":
            logits = _settled(logits, getattr(split.problem.config, "interpret", False))
        if masked and taint is not None:
            logits = logits + taint
        self.logits = self.hidden(logits, -jnp.inf)

    def finite(self, rows: tuple[Array, ...]) -> tuple[Array, ...]:
        """Rows, in chunks, of which a masked tile has the finite numbers only, and 0 for others."""
        if self._visible is None:
            return rows
        kept = lambda x: lax.bitcast_convert_type(_bits(x) & _are_finite(x), x.dtype)
        return tuple(map(kept, rows))

    def drop(self, weights: Array) -> Array:
        """Dropout applied to the tile's weights."""
        return self._tile.drop(weights)

    def pulled(self, d_logits: Array, wanted: list[int]) -> tuple[Array, list[Array]]:
        """Cotangents of the scaled product of query and key, and of the pieces in `wanted`."""
        d_logits = self.hidden(d_logits, 0.0)
        if not self._scored:
            return d_logits, []
        counted = self.logits != -jnp.inf if self._hides else self._visible
        return self._tile.pull(self._raw, d_logits, wanted, counted)

    def hidden(self, pairs: Array, value: float) -> Array:
        """The pairs of a tile, with the value where the query does not see the key."""
        return pairs if self._visible is None else jnp.where(self._visible, pairs, value)


def taint(rows: tuple[Array, ...]) -> Array:
    """NaN for each of the rows [k, *], in chunks, that is not finite throughout, and 0 for others; [1, k]."""
    finite = [_are_finite(x).astype(jnp.int32).max(1) for x in rows]
    return jnp.where(functools.reduce(jnp.maximum, finite) < 0, 0.0, jnp.nan).reshape(1, -1)


def _are_finite(x: Array) -> Array:
    """-1, all bits, for finite numbers, and 0.

    By arithmetic: Triton moves what selects to where the product needs its operand, which fails for booleans.
    """
    bits = _bits(x)
    infinity = np.asarray(np.inf, x.dtype).view(bits.dtype)[()]
    return (bits & infinity) - infinity >> (8 * bits.dtype.itemsize - 1)


def _bits(x: Array) -> Array:
    return lax.bitcast_convert_type(x, jnp.int16 if x.dtype.itemsize == 2 else jnp.int32)
