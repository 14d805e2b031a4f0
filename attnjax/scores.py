"""Scores: what is done to a logit before the mask and the softmax. Each is data with one rule on tiles."""

from __future__ import annotations

from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.checks import check_count, check_integer, number_of
from attnjax.core.functions import IndexFunction, trace
from attnjax.core.integers import FAR, bounded
from attnjax.core.node import Node, describe, is_array
from attnjax.core.tiles import Tile, everything
from attnjax.positions import alibi_slopes, relative_position_bucket

Array = jax.Array
Number = int | Array


class Score(Node):
    """Base class of all scores.

    `by_distance`: whether the score adds to the logit what depends only on head and on key minus query position.
    """

    by_distance: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if type(self) is Score:
            raise TypeError("Score is the base of scores: give one of them, such as attnjax.ALiBi.for_heads(8).")

    def evaluate(self, logits: Array, tile: Tile) -> Array:
        """The changed logits, of the tile's shape and the logits' dtype."""
        raise NotImplementedError

    def infinities(self, given: bool, dtype: str) -> tuple[bool, bool]:
        """Whether it may give infinite logits, and whether its derivatives may be infinite, or NaN, at logits that are.

        Args:
          given: whether the logits may be infinite that it is given.
          dtype: the type of the logits.
        """
        return True, True

    def to_array(self, query_length: int, key_length: int, *, batch: tuple[int, ...] = (), heads: int = 1) -> Array:
        """What the score makes of logits that are all zero, for looking at.

        Args:
          query_length: T.
          key_length: S.
          batch: batch axes that the score's own arrays do not tell.
          heads: number of query heads, when the score's own arrays do not tell.

        Returns:
          float32 `[T, S]`, or `[*B, N, T, S]` (N may be 1) when there are batch axes or heads.

        Example:
          >>> import jax.numpy as jnp
          >>> from attnjax import ALiBi
          >>> ALiBi(jnp.array([0.5])).to_array(2, 2).tolist()
          [[[0.0, -0.5], [-0.5, 0.0]]]
        """
        tile, node, plain = everything(self, query_length, key_length, batch, heads)
        logits = jnp.broadcast_to(node.evaluate(jnp.zeros(tile.shape, jnp.float32), tile), tile.shape)
        logits = logits.reshape(*logits.shape[:-4], tile.heads, query_length, key_length)
        return logits[0] if plain else logits


def _added(self: Score, given: bool, dtype: str) -> tuple[bool, bool]:
    """`infinities` of what is added to logits: its arrays may hold -inf, and its derivatives are finite."""
    return True, False


class SoftCap(Score):
    """cap * tanh(logit / cap): keeps logits within (-cap, cap), also those that a `Bias` before it set to -inf.

    Args:
      cap: positive number, or an array `[]` or `[*B]`, which then gets a gradient.

    Example:
      >>> from attnjax import SoftCap
      >>> SoftCap(50.0)
      SoftCap(50.0)

    References:
      Gemma Team, "Gemma 2", 2024, section 2.
    """

    axes: ClassVar = {"cap": ""}
    reads: ClassVar = ""
    cap: float | Array

    def __post_init__(self) -> None:
        if isinstance(self.cap, (int, np.number)) and not isinstance(self.cap, bool):
            object.__setattr__(self, "cap", float(self.cap))
        if not isinstance(self.cap, float):
            _check_floats("SoftCap", "cap", self.cap)
        elif not (np.isfinite(self.cap) and self.cap > 0):
            raise ValueError(f"SoftCap: cap must be positive and finite, got {self.cap}.")

    def evaluate(self, logits: Array, tile: Tile) -> Array:
        cap = _like(tile.take(self.cap, ""), logits)
        if not is_array(cap):
            return cap * jnp.tanh(logits / cap)
        below = logits == -jnp.inf  # where the derivative by the cap would be inf * 0
        return cap * jnp.where(below, -1, jnp.tanh(jnp.where(below, jnp.zeros_like(logits), logits) / cap))

    def infinities(self, given: bool, dtype: str) -> tuple[bool, bool]:
        return False, False


class Bias(Score):
    """logit + array. The array gets an exact gradient, reduced on the fly to its own shape.

    Args:
      array: floats that broadcast, aligned at the right, to `[*B, N, T, S]`. -inf forbids a pair.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax import Bias
      >>> Bias(jnp.zeros((1, 8, 1, 16)))
      Bias(float32[1, 8, 1, 16])
    """

    axes: ClassVar = {"array": "hts"}
    always: ClassVar = ("array",)
    reads: ClassVar = ""
    broadcasts: ClassVar = True
    array: Array

    def __post_init__(self) -> None:
        _check_floats("Bias", "array", self.array)

    def evaluate(self, logits: Array, tile: Tile) -> Array:
        return logits + _like(tile.take(self.array, "hts"), logits)

    infinities = _added


class ALiBi(Score):
    """logit - slope[n] * |t + offset - s|: attention falls off linearly with distance.

    Args:
      slopes: floats `[N]` or `[*B, N]`.
      offset: integer, or integers `[*B]`; where the first query stands among the keys.

    Example:
      >>> from attnjax import ALiBi
      >>> ALiBi.for_heads(8)
      ALiBi(float32[8])

    References:
      Press et al., "Train Short, Test Long: Attention with Linear Biases", 2022.
    """

    axes: ClassVar = {"slopes": "h", "offset": ""}
    always: ClassVar = ("slopes",)
    reads: ClassVar = "qk"
    by_distance: ClassVar = True
    slopes: Array
    offset: Number = 0

    def __post_init__(self) -> None:
        _check_floats("ALiBi", "slopes", self.slopes)
        object.__setattr__(self, "offset", check_integer("ALiBi", "offset", self.offset))
        if isinstance(self.offset, int) and abs(self.offset) > FAR:
            raise ValueError(f"ALiBi: offset must be within +-2**30, got {self.offset}.")

    def moved(self, start: Array) -> ALiBi:
        return self.replaced(offset=bounded((1, self.offset), (1, start)))

    @classmethod
    def for_heads(cls, num_heads: int, offset: Number = 0) -> ALiBi:
        """ALiBi with the paper's slopes for `num_heads` heads."""
        return cls(alibi_slopes(num_heads), offset)

    def evaluate(self, logits: Array, tile: Tile) -> Array:
        distance = jnp.abs(tile.q + tile.take(self.offset, "") - tile.k)
        return logits - _like(tile.take(self.slopes, "h"), logits) * distance.astype(logits.dtype)

    infinities = _added


class RelativeBias(Score):
    """logit + table[bucket(s - t - offset), n]: the learned relative positions of T5.

    Args:
      table: floats `[num_buckets, N]` (or with batch axes in front); gets a gradient.
      bidirectional: half of the buckets are for keys that come later than the query.
      max_distance: distances from here on share the last bucket.
      offset: integer; where the first query stands among the keys.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax import RelativeBias
      >>> RelativeBias(jnp.zeros((32, 8)), bidirectional=False)
      RelativeBias(float32[32, 8], bidirectional=False)

    References:
      Raffel et al., "Exploring the Limits of Transfer Learning", 2020, section 2.1.
    """

    axes: ClassVar = {"table": ".h", "offset": ""}
    always: ClassVar = ("table",)
    reads: ClassVar = "qk"
    by_distance: ClassVar = True
    table: Array
    bidirectional: bool = True
    max_distance: int = 128
    offset: int = 0

    def __post_init__(self) -> None:
        _check_floats("RelativeBias", "table", self.table)
        least = 4 if self.bidirectional else 2
        if is_array(self.table) and np.ndim(self.table) < 2:
            raise ValueError(f"RelativeBias: table must be [num_buckets, N], got {describe(self.table)}.")
        if is_array(self.table) and self.table.shape[-2] < least:
            raise ValueError(f"RelativeBias: table must have at least {least} buckets, got {describe(self.table)}.")
        offset = number_of(self.offset)
        if not isinstance(offset, int):
            raise TypeError(f"RelativeBias: offset must be an integer that is known, got {describe(self.offset)}.")
        object.__setattr__(self, "offset", offset)
        object.__setattr__(self, "max_distance", check_count("RelativeBias: max_distance", self.max_distance))

    def evaluate(self, logits: Array, tile: Tile) -> Array:
        table = _like(tile.take(self.table, ".h"), logits)
        rules = dict(num_buckets=table.shape[-1], max_distance=self.max_distance, bidirectional=self.bidirectional)
        bias = lambda distance: table[..., relative_position_bucket(distance - self.offset, **rules)]
        return logits + tile.by_distance(bias)

    infinities = _added


class ScoreFn(Score):
    """A score given as a Python function of scalars: `function(score, b, h, q, k) -> score`.

    b counts the batch (row-major when there are several batch axes), h the query heads. Floating-point arrays that the
    function captures become leaves and get gradients. The function must not read arrays of size T x S: use `Bias`.

    Args:
      function: the function, made of jax.numpy operations.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax import ScoreFn
      >>> weight = jnp.ones(16)
      >>> ScoreFn(lambda score, b, h, q, k: score * weight[k])
      ScoreFn(function of (score, b, h, q, k), capturing float32[16])
    """

    function: Any  # a function when it is given, an IndexFunction from then on
    constants: tuple[Array, ...] = ()

    @property
    def reads(self) -> str:  # type: ignore[override]  # of each function, not of the class
        return "".join(index for index, used in zip("bhqk", self.function.uses, strict=True) if used)

    def __post_init__(self) -> None:
        if not isinstance(self.function, IndexFunction):  # which it is in dataclasses.replace
            function, constants = trace(self.function, score=True, name="ScoreFn")
            object.__setattr__(self, "_function", self.function)  # to be pickled; no part of the pytree
            object.__setattr__(self, "function", function)
            object.__setattr__(self, "constants", constants)

    def evaluate(self, logits: Array, tile: Tile) -> Array:
        return tile.apply(self.function, self.constants, logits).astype(logits.dtype)

    def infinities(self, given: bool, dtype: str) -> tuple[bool, bool]:
        return self.function.program(dtype).infinities(given)

    def __repr__(self) -> str:
        captured = ", ".join(map(describe, self.constants))
        return f"ScoreFn(function of (score, b, h, q, k){', capturing ' + captured if captured else ''})"


class Scale(Score):
    """logit * factor, for a scale that is an array; `attention(scale=array)` puts it first.

    Args:
      factor: floats that broadcast to `[*B, N]`, such as one for each query head; gets a gradient.
    """

    axes: ClassVar = {"factor": "h"}
    always: ClassVar = ("factor",)
    reads: ClassVar = ""
    broadcasts: ClassVar = True
    factor: Array

    def evaluate(self, logits: Array, tile: Tile) -> Array:
        return logits * _like(tile.take(self.factor, "h"), logits)

    def infinities(self, given: bool, dtype: str) -> tuple[bool, bool]:
        return given, given


def as_scores(score: Any) -> tuple[Score, ...]:
    """A score, a tuple or list of scores, or `None`, as a tuple."""
    scores = () if score is None else tuple(score) if isinstance(score, (tuple, list)) else (score,)
    for item in scores:
        if not isinstance(item, Score):
            hint = " An array that is added to the logits is attnjax.Bias(array)." if is_array(item) else ""
            hint = hint or (" A function is attnjax.ScoreFn(function)." if callable(item) else "")
            raise TypeError(f"score must be an attnjax Score or a tuple of them, got {type(item).__name__}.{hint}")
    return scores


def _like(value: Any, logits: Array) -> Any:
    return value.astype(logits.dtype) if is_array(value) else value


def _check_floats(node: str, name: str, value: Any) -> None:
    if isinstance(value, int) and not isinstance(value, bool):  # an axis, in the trees of jax.vmap
        return
    if not is_array(value) or not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{node}: {name} must be an array of floats, got {describe(value)}.")
