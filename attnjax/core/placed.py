"""`placed`: a mask or score of a whole sequence, said for queries and keys that are a part of it, as in a cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from attnjax.core.mesh_types import gathered
from attnjax.core.node import Node, is_array
from attnjax.core.tiles import operand_form
from attnjax.masks import Where
from attnjax.scores import Score, ScoreFn

Array = jax.Array


def placed(node: Any, batch: tuple[int, ...], start: Array, keys: Array | None = None) -> Any:
    """The node for queries that stand at start, start + 1, ... among keys that stand at `keys`.

    A class says of itself what its rule reads (`reads`) and how it moves (`moved`). Rules of positions that say nothing
    of that are evaluated at true positions. "Aligned to the end" means no more than aligned, for the last query of all
    is the last key. Arrays by query and key (Segments, Dense, Bias) are those of the call.

    Args:
      node: a Mask or Score whose arrays have the batch axes `batch`, or fewer.
      start: integers `[*B]`.
      keys: integers `[*B, S]`; `None`: key s stands at s.

    Raises:
      NotImplementedError: a mask or score that needs arrays by key, where keys have places of their own.
    """
    if keys is not None and any("s" in axes for _, _, axes in node.own_operands()):
        raise NotImplementedError(
            f"{type(node).__name__} has an array by key, and a ring's keys have no fixed places: use a cache "
            "without window, or attnjax.Where(function)."
        )
    if not set(node.reads) & set("qk"):
        fields = {f.name: getattr(node, f.name) for f in dataclasses.fields(node)}
        parts = {name: placed(x, batch, start, keys) for name, x in fields.items() if isinstance(x, Node)}
        return node.replaced(**parts)
    moved = node.moved(start) if keys is None else None
    return _function(node, batch, start, keys) if moved is None else moved


def _function(node: Any, batch: tuple[int, ...], start: Array, keys: Array | None) -> Any:
    """The rule of a mask or score for one pair, as a function of where the two stand."""
    node = node.settled(0, 0)
    rows = jnp.broadcast_to(gathered(start), batch).reshape(-1)
    places = None
    if keys is not None:
        places = jnp.broadcast_to(gathered(keys), (*batch, keys.shape[-1])).reshape(-1, keys.shape[-1])
    leaves, structure = jax.tree.flatten(node)
    axes = [axes for _, _, axes in node.operands()]
    by_row = [_by_row(leaf, names, batch) for leaf, names in zip(leaves, axes, strict=True)]

    def rule(b: Array, h: Array, q: Array, k: Array, logits: Array | None = None) -> Array:
        own = jax.tree.unflatten(structure, [leaf[0 if leaf.shape[0] == 1 else b] for leaf in by_row])
        pair = _Pair(b, h, rows[b] + q, k if places is None else places[b, k], (q, k))
        return own.evaluate(pair) if logits is None else own.evaluate(logits, pair)

    if isinstance(node, Score):
        return ScoreFn(lambda logits, b, h, q, k: rule(b, h, q, k, logits))
    return Where(rule)


def _by_row(leaf: Any, axes: str, batch: tuple[int, ...]) -> Array:
    """A leaf with one axis of batch entries in front, of size 1 where they share it."""
    leaf = gathered(jnp.asarray(operand_form(leaf, axes, len(batch))))
    n = len(batch)
    if any(size > 1 for size in leaf.shape[:n]):
        leaf = jnp.broadcast_to(leaf, (*batch, *leaf.shape[n:]))
    return leaf.reshape(-1, *leaf.shape[n:])


class _Pair:
    """A tile of one pair, for the rules of masks and scores: all its indices are scalars."""

    query_length = key_length = 0  # nothing is aligned to an end

    def __init__(self, b: Array, h: Array, q: Array, k: Array, number: tuple[Array, Array]):
        """`q` and `k` say where the two stand; `number`, the how-manieth of the call they are."""
        self.b, self.h, self.q, self.k = b, h, q, k
        self._at = dict(zip("hts", (h, *number), strict=True))

    def take(self, array: Any, axes: str) -> Any:
        if not is_array(array) or not axes:
            return array
        if "." in axes:  # a table, in the form that by_distance wants: [1, rows]
            return array[:, self.h].reshape(1, -1)
        for axis, letter in reversed(list(enumerate(axes))):
            array = jnp.take(array, self._at[letter] if array.shape[axis] > 1 else 0, axis=axis)
        return array

    def inverted(self, seen: Array) -> Array:
        return ~seen

    def by_distance(self, values: Any) -> Array:
        return values(jnp.reshape(self.k - self.q, 1)).reshape(())

    def apply(self, function: Any, constants: tuple[Array, ...], logits: Array | None = None) -> Array:
        return function(constants, *(() if logits is None else (logits,)), self.b, self.h, self.q, self.k)
