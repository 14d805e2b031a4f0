"""What changes the logits of the next token before one is chosen: banned tokens, a minimum length, own functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial
from jaxtyping import Float, Int

from attnjax.core.node import describe, is_array

Array = jax.Array
Processor = Callable[[Array, Array, Array], Array]  # (logits [B, vocab], tokens [B, L], step []) -> logits


def as_processors(given: Any) -> tuple[Partial, ...]:
    """One function or several as a pytree: arrays that a `jax.tree_util.Partial` holds are its leaves.

    Raises:
      TypeError: no functions.
    """
    functions = (given,) if callable(given) else given
    if not isinstance(functions, (tuple, list)) or not all(map(callable, functions)):
        raise TypeError(f"processors must be a function, or a tuple of functions, got {given!r}.")
    return tuple(f if isinstance(f, Partial) else Partial(f) for f in functions)


def processed(
    logits: Float[Array, "B vocab"], processors: tuple[Processor, ...], tokens: Int[Array, "B L"], step: Array
) -> Float[Array, "B vocab"]:
    """The logits after all processors, in order.

    Raises:
      TypeError: a processor that gives something else than floats `[B, vocab]`.
    """
    for function in processors:
        made = function(logits, tokens, step)
        if not is_array(made) or made.shape != logits.shape or not jnp.issubdtype(made.dtype, jnp.floating):
            shown = describe(made) if is_array(made) else type(made).__name__
            name = getattr(function, "func", function)
            raise TypeError(f"processors: {name} must give the logits, {describe(logits)}, got {shown}.")
        logits = made.astype(logits.dtype)
    return logits


def without(logits: Float[Array, "B vocab"], tokens: Int[Array, " n"], when: Any = True) -> Float[Array, "B vocab"]:
    """-inf at these tokens, when the condition holds."""
    banned = logits.at[:, tokens].set(-jnp.inf)
    return banned if when is True else jnp.where(when, banned, logits)
