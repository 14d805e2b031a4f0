"""Checks at the door of modules: chex inside, errors that name the module outside. Shapes and types only."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

import chex
import jax.numpy as jnp
from flax import nnx

from attnjax.core import checks
from attnjax.core.checks import check_count, number_of
from attnjax.core.node import describe, is_array


def check_input(module: str, name: str, x: Any, features: int, axes: str = "*B, T") -> None:
    """Floats `[*B, T, features]`.

    Raises:
      TypeError: not an array of floats.
      ValueError: too few axes, or another number of features.
    """
    wanted = f"attnjax.nn.{module}: {name} must be [{axes}, {features}]"
    if not is_array(x):
        raise TypeError(f"{wanted}, got {type(x).__name__}.")
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise TypeError(f"{wanted} of floats, got {describe(x)}: tokens become vectors by attnjax.nn.Embed.")
    least = axes.count(",") + 1  # *B may be nothing, the features are one
    try:
        chex.assert_scalar_non_negative(x.ndim - least)
        chex.assert_axis_dimension(x, -1, features)
    except AssertionError:
        raise ValueError(f"{wanted}, got {describe(x)}.") from None


def check_same_batch(module: str, **arrays: Any) -> None:
    """Arrays `[*B, length, features]` with the same batch axes.

    Raises:
      ValueError: others.
    """
    try:
        chex.assert_equal(*(tuple(x.shape[:-2]) for x in arrays.values()))
    except AssertionError:
        shown = " and ".join(f"{name} {describe(x)}" for name, x in arrays.items())
        raise ValueError(f"attnjax.nn.{module}: batch axes must be equal, got {shown}.") from None


def check_positions(module: str, positions: Any, batch: tuple[int, ...], length: int) -> None:
    """Integers `[T]` or `[*B, T]`.

    Raises:
      TypeError, ValueError: others.
    """
    if not is_array(positions) or not jnp.issubdtype(positions.dtype, jnp.integer):
        raise TypeError(f"attnjax.nn.{module}: positions must be an array of integers, got {describe(positions)}.")
    try:
        chex.assert_is_broadcastable(positions.shape, (*batch, length))
        chex.assert_axis_dimension(positions, -1, length)
    except AssertionError:
        raise ValueError(
            f"attnjax.nn.{module}: positions must be [{length}] or {[*batch, length]}, one for each token, got "
            f"{describe(positions)}."
        ) from None


def check_lengths(module: str, lengths: Any, batch: tuple[int, ...]) -> None:
    """An integer, or integers `[*B]`.

    Raises:
      TypeError, ValueError: others.
    """
    if isinstance(number_of(lengths), int):
        return
    wanted = f"attnjax.nn.{module}: lengths must be integers {list(batch)}, one for each row"
    if not is_array(lengths) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise TypeError(f"{wanted}, got {describe(lengths)}.")
    try:
        chex.assert_is_broadcastable(lengths.shape, batch)
    except AssertionError:
        raise ValueError(f"{wanted}, got {describe(lengths)}.") from None


def check_size(module: str, name: str, value: Any) -> None:
    """An integer of at least 1.

    Raises:
      ValueError: anything else.
    """
    check_count(f"attnjax.nn.{module}: {name}", value)


def check_rate(module: str, name: str, value: Any) -> None:
    """A number in [0, 1).

    Raises:
      ValueError: anything else.
    """
    checks.check_rate(f"attnjax.nn.{module}: {name}", value)


def check_name(module: str, argument: str, given: Any, known: Iterable[str]) -> None:
    """One of the known names.

    Raises:
      ValueError: another, with the nearest one.
    """
    known = list(known)
    if given in known:
        return
    near = difflib.get_close_matches(str(given), known, n=1, cutoff=0.4)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"attnjax.nn.{module}: {argument} must be one of {', '.join(known)}; got {given!r}.{hint}")


def check_rngs(module: str, rngs: Any) -> None:
    """`nnx.Rngs`, one of its streams, or `None`: a key would be the same for every layer.

    Raises:
      TypeError: anything else.
    """
    if rngs is not None and not isinstance(rngs, (nnx.Rngs, nnx.RngStream)):
        raise TypeError(
            f"attnjax.nn.{module}: rngs must be nnx.Rngs, or one of its streams, got {type(rngs).__name__}: give "
            "nnx.Rngs(key)."
        )


def check_no_dropout(module: str, rate: float, deterministic: bool | None) -> None:
    """Nothing is dropped in calls with a cache, which are for use: not in attention, nor in what is around it.

    Raises:
      ValueError: something would be dropped.
    """
    if rate and not deterministic:
        raise ValueError(
            f"attnjax.nn.{module}: a call with a cache has no dropout: call eval() or pass deterministic=True."
        )


def dropout_stream(module: str, rate: float, rngs: Any) -> Any:
    """A stream of random keys for dropout, forked from `rngs`; `None` where nothing is dropped.

    Raises:
      ValueError: `rngs` has none.
    """
    if not rate:
        return None
    try:
        return rngs.dropout.fork()
    except AttributeError:
        raise ValueError(
            f"attnjax.nn.{module}: dropout = {rate} needs random numbers: give rngs a stream for them, such as "
            "nnx.Rngs(0) or nnx.Rngs(params=0, dropout=1)."
        ) from None
