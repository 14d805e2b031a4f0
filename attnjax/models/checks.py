"""Checks that all models share: configs when they are made, tokens at the door, and the wording of errors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from attnjax.cache import KVCache
from attnjax.core.checks import check_count, check_rate, number_of
from attnjax.core.node import describe, is_array
from attnjax.positions import RoPE


def check_config(config: Any, *sizes: str, rates: tuple[str, ...] = ("dropout", "attention_dropout")) -> None:
    """Sizes (where not `None`) are integers of at least 1, rates in [0, 1), heads divide what they must.

    Raises:
      ValueError: with the name of the config and of the field.
    """
    name = type(config).__name__
    for field in sizes:
        object.__setattr__(config, field, check_count(f"{name}: {field}", getattr(config, field)))
    for field in rates:
        object.__setattr__(config, field, check_rate(f"{name}: {field}", getattr(config, field)))
    if getattr(config, "head_size", None) is None and config.features % config.num_heads:
        raise ValueError(
            f"{name}: features = {config.features} must be a multiple of num_heads = {config.num_heads}"
            + (", unless head_size is given." if hasattr(config, "head_size") else ".")
        )
    key_heads = getattr(config, "key_heads", None)
    if key_heads is not None and config.num_heads % key_heads:
        raise ValueError(f"{name}: num_heads = {config.num_heads} must be a multiple of key_heads = {key_heads}.")


def given(config: Any, *fields: str) -> tuple[str, ...]:
    """The fields that are not `None`."""
    return tuple(field for field in fields if getattr(config, field) is not None)


def check_choice(config: Any, field: str, *known: Any) -> None:
    """One of the known values.

    Raises:
      ValueError: another.
    """
    value = getattr(config, field)
    if value not in known:
        shown = ", ".join(repr(k) for k in known)
        raise ValueError(f"{type(config).__name__}: {field} must be one of {shown}, got {value!r}.")


def check_positions(config: Any, *known: str) -> None:
    """A known kind of positions, or a RoPE; learned ones have a length.

    Raises:
      ValueError: anything else.
    """
    name, positions = type(config).__name__, config.positions
    if not isinstance(positions, RoPE) and positions not in known:
        shown = ", ".join(map(repr, known))
        raise ValueError(f"{name}: positions must be one of {shown} or attnjax.nn.RoPE(...), got {positions!r}.")
    if positions == "learned" and config.max_length is None:
        raise ValueError(f"{name}: positions='learned' needs max_length, the number of positions.")


def check_windows(config: Any) -> None:
    """A tuple of sizes or `None`; only one where layers are scanned.

    Raises:
      ValueError: anything else.
    """
    name, windows = type(config).__name__, config.windows
    right = isinstance(windows, tuple) and len(windows) > 0
    if right:
        windows = tuple(
            window if window is None or number_of(window) is None else number_of(window) for window in windows
        )
        object.__setattr__(config, "windows", windows)
    if not right or any(w is not None and (not isinstance(w, int) or isinstance(w, bool) or w < 0) for w in windows):
        raise ValueError(f"{name}: windows must be a tuple of integers of at least 0, or None, got {windows!r}.")
    if config.scan and len(windows) > 1:
        raise ValueError(f"{name}: scan=True needs equal layers, and windows = {windows!r} differ: leave scan out.")


def check_tokens(model: str, name: str, tokens: Any, max_length: int | None) -> None:
    """Integers `[*B, T]`, T at most `max_length`.

    Raises:
      TypeError: no array of integers.
      ValueError: no axis, or too long.
    """
    if not is_array(tokens) or not jnp.issubdtype(tokens.dtype, jnp.integer):
        kind = describe(tokens) if is_array(tokens) else type(tokens).__name__
        raise TypeError(f"{model}: {name} must be an array of integers [*B, T], got {kind}.")
    try:
        chex.assert_scalar_positive(tokens.ndim)
    except AssertionError:
        raise ValueError(f"{model}: {name} must be [*B, T], got {describe(tokens)}.") from None
    if max_length is not None and tokens.shape[-1] > max_length:
        raise ValueError(
            f"{model}: {name} is {describe(tokens)}, longer than max_length = {max_length}: shorten it, or make a "
            "model with a larger max_length."
        )


def check_like_tokens(model: str, name: str, given: Any, tokens: Any) -> None:
    """Integers `[T]` or `[*B, T]`, one for each token, or `None`.

    Raises:
      TypeError: no array of integers.
      ValueError: another shape.
    """
    if given is None:
        return
    wanted = f"{model}: {name} must be integers [T] or [*B, T], one for each of tokens {describe(tokens)}"
    if not is_array(given) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise TypeError(f"{wanted}, got {describe(given) if is_array(given) else type(given).__name__}.")
    try:
        chex.assert_is_broadcastable(given.shape, tokens.shape)
        chex.assert_axis_dimension(given, -1, tokens.shape[-1])
    except AssertionError:
        raise ValueError(f"{wanted}, got {describe(given)}.") from None


def check_caches(model: str, caches: Any, tokens: Any, lengths: Any, max_length: int | None) -> None:
    """Caches of the batch axes of tokens `[*B, T]`, or `None`; with the tokens, no row is longer than `max_length`.

    Under `jit` nobody knows how long rows are. `lengths` says how many of the T tokens are real.

    Raises:
      TypeError: no sequence of caches.
      ValueError: other batch axes, or rows that are too long.
    """
    if caches is None:
        return
    if not isinstance(caches, Sequence) or not caches or not all(isinstance(cache, KVCache) for cache in caches):
        raise TypeError(
            f"{model}: caches must be those of create_caches, one attnjax.KVCache for each layer, got "
            f"{type(caches).__name__}."
        )
    batch = tuple(tokens.shape[:-1])
    if any(cache.batch != batch for cache in caches):
        raise ValueError(
            f"{model}: caches have the batch axes {list(caches[0].batch)}, and those of tokens {describe(tokens)} are "
            f"{list(batch)}: give create_caches the batch of tokens."
        )
    added = tokens.shape[-1] if lengths is None else lengths
    if max_length is None or any(isinstance(x, Tracer) for x in (caches[0].length, added)):
        return
    longest = int(np.max(jax.device_get(caches[0].length) + jax.device_get(added), initial=0))
    if longest > max_length:
        raise ValueError(
            f"{model}: with what the caches hold, a row has {longest} tokens, more than max_length = {max_length}: "
            "make a model with a larger max_length."
        )


def restarting(segments: jax.Array) -> jax.Array:
    """Positions that begin at 0 in every run of equal ids: int32 `[*B, T]`."""
    index = jnp.broadcast_to(jnp.arange(segments.shape[-1], dtype=jnp.int32), segments.shape)
    first = jnp.concatenate([jnp.ones_like(segments[..., :1], bool), segments[..., 1:] != segments[..., :-1]], axis=-1)
    return index - jax.lax.cummax(jnp.where(first, index, 0), axis=segments.ndim - 1)
