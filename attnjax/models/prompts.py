"""What `generate` and `beam_search` are given: prompts, tokens, keys, room. Checked, and brought into one form."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.core import Tracer

from attnjax.cache import KVCache, checked_dtype
from attnjax.core.checks import check_count, number_of
from attnjax.core.node import describe

Array = jax.Array


class Frozen:
    """A model without its arrays, as a static argument that is hashed once and not at every step."""

    def __init__(self, model: nnx.Module) -> None:
        graph, state = nnx.split(model)
        self.leaves, tree = jax.tree.flatten(state)
        self._key = (graph, tree)
        self._hash = hash(self._key)

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Frozen) and self._key == other._key)

    def model(self, leaves: list[Array]) -> Any:
        graph, tree = self._key
        return nnx.merge(graph, jax.tree.unflatten(tree, leaves))

    def without_arrays(self) -> tuple[Frozen, list[Array]]:
        leaves, self.leaves = self.leaves, []
        return self, leaves


def pad(prompts: Iterable[Iterable[int]], pad_token: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Prompts of different lengths as one array, padded at the right, and their lengths.

    Example:
      >>> from attnjax.models import pad
      >>> tokens, lengths = pad([[5, 6, 7], [8]])
      >>> tokens.tolist(), lengths.tolist()
      ([[5, 6, 7], [8, 0, 0]], [3, 1])
    """
    rows = [list(prompt) for prompt in prompts]
    tokens = np.full((len(rows), max(map(len, rows), default=0)), pad_token, np.int32)
    for row, prompt in zip(tokens, rows, strict=True):
        row[: len(prompt)] = prompt
    return tokens, np.array([len(row) for row in rows], np.int32)


def check_outside(name: str, *given: Any) -> None:
    """Nothing that is given is traced.

    Raises:
      TypeError: something is.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(given)):
        raise TypeError(
            f"{name} compiles its own steps and cannot be part of another program: call it outside of jax.jit, "
            "jax.vmap, jax.grad and the like."
        )


def check_model(model: Any, memory: Any) -> None:
    """A model that generates, with a memory where it needs one, or a TypeError or ValueError."""
    kind = type(model).__name__
    if not all(hasattr(model, name) for name in ("hidden", "logits", "create_caches", "vocab_size", "max_length")):
        raise TypeError(f"model must be a DecoderLM, a Transformer or one like them, got {kind}.")
    parameters = inspect.signature(model.hidden).parameters.values()
    takes = any(p.name == "memory" or p.kind is p.VAR_KEYWORD for p in parameters)
    if memory is not None and not takes:
        raise ValueError(f"memory was given, and {kind} attends to its own tokens only: leave it out.")
    if memory is None and any(p.name == "memory" and p.default is p.empty for p in parameters):
        raise ValueError(f"memory is missing: a {kind} generates from memory=model.encode(source).")


def check_prompts(
    tokens: Any, lengths: Any, vocab_size: int, name: str = "tokens", mask: Any = None
) -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 `[B, T]`, padded at the right with 0, and their lengths `[B]`.

    Args:
      tokens: integers `[B, T]`.
      lengths: integers `[B]`, how many tokens of each row are real, from the left; or `None`.
      vocab_size: what tokens are less than.
      name: under which the user passed them.
      mask: booleans, 0 or 1, `[B, T]`: which tokens are real, at any side; or `None`.

    Raises:
      TypeError: they are no integers. ValueError: empty, not `[B, T]`, not in the vocabulary, lengths outside [1, T],
        padding at the left or in between.
    """
    try:
        tokens = np.asarray(tokens)
    except ValueError as error:
        raise ValueError(f"{name} must be [B, T]: rows differ in length, use attnjax.models.pad(prompts).") from error
    if tokens.ndim != 2:
        raise ValueError(f"{name} must be [B, T], got shape {list(tokens.shape)}.")
    if not tokens.size:
        raise ValueError(f"{name} is empty, {list(tokens.shape)}: every prompt needs at least one token.")
    if not np.issubdtype(tokens.dtype, np.integer):
        raise TypeError(f"{name} must be integers, got {tokens.dtype}.")
    if mask is not None:
        tokens, lengths = _to_the_left(tokens, lengths, mask, name)
    if lengths is None:
        lengths = np.full(len(tokens), tokens.shape[1], np.int32)
    lengths = np.asarray(lengths)
    if not np.issubdtype(lengths.dtype, np.integer) or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths must be integers [{len(tokens)}], got {lengths.dtype}{list(lengths.shape)}.")
    if lengths.min() < 1:
        raise ValueError(
            f"lengths: row {lengths.argmin()} has length {lengths.min()}: a prompt needs at least one token."
        )
    if lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths: {lengths.max()} is more than the T = {tokens.shape[1]} of {name}.")
    real = np.arange(tokens.shape[1]) < lengths[:, None]
    _check_padding(tokens, real, name)
    for token in (tokens[real].min(), tokens[real].max()):
        check_token(name, token, vocab_size)
    return np.where(real, tokens, 0).astype(np.int32), lengths.astype(np.int32)


def _to_the_left(tokens: np.ndarray, lengths: Any, mask: Any, name: str) -> tuple[np.ndarray, np.ndarray]:
    """The real tokens of each row moved to its beginning, and how many they are."""
    if lengths is not None:
        raise ValueError("lengths and mask were both given, and say the same: leave one of them out.")
    mask = np.asarray(mask)
    if mask.shape != tokens.shape or not (mask.dtype == bool or np.isin(mask, (0, 1)).all()):
        raise ValueError(
            f"mask must be booleans, or 0 and 1, one for each of {name} {list(tokens.shape)}, got {describe(mask)}."
        )
    mask = mask.astype(bool)
    lengths, first = mask.sum(1), mask.argmax(1)
    places = first[:, None] + np.arange(tokens.shape[1])
    whole = (np.arange(tokens.shape[1]) >= first[:, None]) & (np.arange(tokens.shape[1]) < (first + lengths)[:, None])
    if (mask != whole).any():
        row = int((mask != whole).any(1).argmax())
        raise ValueError(f"mask: row {row} has padding between its tokens: a prompt is one piece.")
    return np.take_along_axis(tokens, np.minimum(places, tokens.shape[1] - 1), 1), lengths


def _check_padding(tokens: np.ndarray, real: np.ndarray, name: str) -> None:
    """Where what lengths call padding is many tokens, and as many at the left are all one, the padding is there."""
    short = ~real.all(1)
    if not short.any():
        return
    behind = tokens[short][~real[short]]
    before = tokens[short][(~real[short])[:, ::-1]]
    if len(set(behind.tolist())) > 1 and len(set(before.tolist())) == 1 and len(before) > short.sum():
        raise ValueError(
            f"{name} seem to be padded at the left, with {before[0]}, and lengths are counted from the left: give "
            "mask=, true where a token is real, or pad at the right (attnjax.models.pad). Padding at the right should "
            "be one and the same token."
        )


def check_token(name: str, token: Any, vocab_size: int) -> int:
    """An integer in [0, vocab_size), or a TypeError or ValueError."""
    known = number_of(token)
    if not isinstance(known, int):
        raise TypeError(f"{name} must be integers, got {token!r}.")
    if not 0 <= known < vocab_size:
        raise ValueError(f"{name}: {known} is not in the vocabulary of {vocab_size} tokens.")
    return known


def check_tokens(name: str, tokens: Any, vocab_size: int) -> np.ndarray:
    """Several tokens as int32 `[n]`, or a TypeError or ValueError."""
    if not isinstance(tokens, Iterable) or isinstance(tokens, str) or getattr(tokens, "ndim", 1) != 1:
        raise TypeError(f"{name} must be integers in a list, got {tokens!r}.")
    return np.array([check_token(name, token, vocab_size) for token in tokens], np.int32)


def check_pad(token: Any) -> int:
    """An integer, also one that is no token, or a TypeError."""
    known = number_of(token)
    if not isinstance(known, int):
        raise TypeError(f"pad_token must be an integer, got {token!r}.")
    return known


def check_rng(rng: Any) -> None:
    """One PRNG key, or `None`.

    Raises:
      TypeError: no key. ValueError: several.
    """
    if rng is None:
        return
    wanted = "rng must be a PRNG key, such as jax.random.key(0)"
    if not isinstance(rng, jax.Array):
        raise TypeError(f"{wanted}, got {rng!r}.")
    typed = jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    if not typed and (rng.dtype != jnp.uint32 or rng.ndim == 0):
        raise TypeError(f"{wanted}, got {describe(rng)}.")
    if rng.ndim != (0 if typed else 1):
        raise ValueError(
            f"rng must be one PRNG key, got keys of shape {list(rng.shape)}: give one of them, each row of the prompts "
            "and each sample draws its own numbers."
        )


def check_caches(caches: Any, batch: int) -> tuple[int, int]:
    """Caches with the batch axis [B] or [1]: the most tokens that a row holds, and their capacity (rings left out).

    Raises:
      TypeError: no sequence of caches. ValueError: another batch axis.
    """
    if caches is None:
        return 0, 0
    if not isinstance(caches, Sequence) or not caches or not all(isinstance(c, KVCache) for c in caches):
        raise TypeError(
            "caches must be those of model.create_caches or of Generated, one attnjax.KVCache for each layer, got "
            f"{type(caches).__name__}."
        )
    if any(cache.batch not in ((batch,), (1,)) for cache in caches):
        raise ValueError(
            f"caches have the batch axes {list(caches[0].batch)}, and the prompts are {batch} rows: give as many, or "
            "caches of one row, which all prompts then continue."
        )
    straight = (cache.capacity for cache in caches if cache.window is None)
    return int(caches[0].length.max()), max(straight, default=0)


def check_cache_dtype(dtype: Any, caches: Any) -> np.dtype | None:
    """What caches store, or `None`; not together with caches."""
    if dtype is not None and caches is not None:
        raise ValueError("caches and cache_dtype were both given: the caches have a dtype.")
    return None if dtype is None else checked_dtype("cache_dtype", dtype)


def check_room(model: Any, count: int, new: int, capacity: Any = None, held: int = 0) -> int:
    """The cache's capacity: room for what it holds, the prompts and all that is generated, or a ValueError."""
    total = held + count + new
    needed = f"{f'{held} tokens of the caches, ' if held else ''}{count} tokens of the prompts and"
    needed += f" max_new_tokens = {new} are more than"
    if model.max_length is not None and total > model.max_length:
        raise ValueError(f"{needed} the model's max_length of {model.max_length}: shorten one of them.")
    if capacity is None:
        return total
    capacity = check_count("capacity", capacity)
    if total > capacity:
        raise ValueError(
            f"{needed} the cache's capacity of {capacity}: shorten one of them, or give a larger capacity."
        )
    return capacity


def create_caches(model: Any, batch: int, capacity: int, dtype: Any) -> Any:
    """The model's caches; dtype is passed on only where there is one, for not every model takes it."""
    return model.create_caches(batch, capacity, **({} if dtype is None else {"dtype": dtype}))
