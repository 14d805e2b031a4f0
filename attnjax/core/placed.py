"""`placed`: a mask or score of a whole sequence, said for queries and keys that are a part of it, as in a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.core.node import is_array
from attnjax.core.tiles import operand_form
from attnjax.masks import (
    And,
    Causal,
    Chunked,
    Dense,
    Dilated,
    Lengths,
    Mask,
    Not,
    Or,
    Permutation,
    Prefix,
    Segments,
    Where,
    Window,
)
from attnjax.scores import ALiBi, Bias, RelativeBias, Score, ScoreFn

Array = jax.Array

_BY_OFFSET = (Causal, Window, Chunked, Dilated, ALiBi)
_OF_THE_CALL = (Segments, Permutation, Dense, Bias)  # their arrays tell of these queries and keys, wherever they stand


def placed(node: Any, batch: tuple[int, ...], start: Array, keys: Array | None = None) -> Any:
    """The node for queries that stand at start, start + 1, ... among keys that stand at `keys`.

    Rules of positions (Causal, Window, Prefix, Where, ALiBi ...) are moved; "aligned to the end" then means no more
    than aligned, for the last query of all is the last key. Arrays by query and key (Segments, Dense, Bias) are those
    of the call.

    Args:
      node: a Mask or Score whose arrays have the batch axes `batch`, or fewer.
      start: integers `[*B]`.
      keys: integers `[*B, S]`; `None`: key s stands at s.

    Raises:
      NotImplementedError: a mask or score that needs arrays by key, where keys have places of their own.
    """
    if isinstance(node, (And, Or)):
        return type(node)(placed(node.left, batch, start, keys), placed(node.right, batch, start, keys))
    if isinstance(node, Not):
        return Not(placed(node.mask, batch, start, keys))
    if isinstance(node, _OF_THE_CALL):
        if keys is not None:
            raise NotImplementedError(
                f"{type(node).__name__} has an array by key, and a ring's keys have no fixed places: use a cache "
                "without window, or attnjax.Where(function)."
            )
        return node
    moves = isinstance(node, (*_BY_OFFSET, RelativeBias, Where, ScoreFn)) or getattr(node, "query", None) is not None
    if not moves and (keys is None or not isinstance(node, (Prefix, Lengths))):
        return node  # says nothing of positions, or of keys' alone
    if keys is None and isinstance(node, _BY_OFFSET):
        moved = {"offset": jnp.asarray(node.offset, start.dtype) + start}
        return dataclasses.replace(node, **moved, **({"at_end": False} if isinstance(node, Mask) else {}))
    if keys is None and isinstance(node, Lengths):
        return Lengths(node.key, jnp.maximum(jnp.asarray(node.query, start.dtype) - start, 0))
    return _function(node, batch, start, keys)


def _function(node: Any, batch: tuple[int, ...], start: Array, keys: Array | None) -> Any:
    """The rule of a mask or score for one pair, as a function of where the two stand."""
    rows = jnp.broadcast_to(start, batch).reshape(-1)
    places = None if keys is None else jnp.broadcast_to(keys, (*batch, keys.shape[-1])).reshape(-1, keys.shape[-1])
    leaves, structure = jax.tree.flatten(node)
    axes = [axes for _, _, axes in node.operands()]
    by_row = [_by_row(leaf, names, batch) for leaf, names in zip(leaves, axes, strict=True)]

    def rule(b: Array, h: Array, q: Array, k: Array, logits: Array | None = None) -> Array:
        own = jax.tree.unflatten(structure, [leaf[0 if leaf.shape[0] == 1 else b] for leaf in by_row])
        pair = _Pair(b, h, rows[b] + q, k if places is None else places[b, k])
        return own.evaluate(pair) if logits is None else own.evaluate(logits, pair)

    if isinstance(node, Score):
        return ScoreFn(lambda logits, b, h, q, k: rule(b, h, q, k, logits))
    return Where(rule)


def _by_row(leaf: Any, axes: str, batch: tuple[int, ...]) -> Array:
    """A leaf with one axis of batch entries in front, of size 1 where they share it."""
    leaf = jnp.asarray(operand_form(leaf, axes, len(batch)))
    n = len(batch)
    if any(size > 1 for size in leaf.shape[:n]):
        leaf = jnp.broadcast_to(leaf, (*batch, *leaf.shape[n:]))
    return leaf.reshape(-1, *leaf.shape[n:])


class _Pair:
    """A tile of one pair, for the rules of masks and scores: all its indices are scalars."""

    query_length = key_length = 0  # nothing is aligned to an end

    def __init__(self, b: Array, h: Array, q: Array, k: Array):
        self.b, self.h, self.q, self.k = b, h, q, k

    def take(self, array: Any, axes: str) -> Any:
        if not is_array(array) or not axes:
            return array
        return array[self.h if array.shape[0] > 1 else 0] if axes == "h" else array[:, self.h].reshape(1, -1)

    def inverted(self, seen: Array) -> Array:
        return ~seen

    def by_distance(self, values: Any) -> Array:
        return values(jnp.reshape(self.k - self.q, 1)).reshape(())

    def apply(self, function: Any, constants: tuple[Array, ...], logits: Array | None = None) -> Array:
        return function(constants, *(() if logits is None else (logits,)), self.b, self.h, self.q, self.k)
