"""Choosing the next token from logits: temperature, top-k, top-p, min-p, repetition penalty. Pure functions."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from attnjax.core.checks import check_count, number_of

Array = jax.Array
Scalar = Any  # a Python number, or a scalar array that may be traced


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the next token is drawn: repetition penalty, temperature, top-k, top-p, min-p, in this order.

    Args:
      temperature: logits are divided by it; 0 takes the most likely token.
      top_k: leave out all but this many tokens.
      top_p: leave out the least likely tokens as long as the others have this probability together, in (0, 1].
      min_p: leave out tokens less likely than this share of the most likely one, in [0, 1].
      repetition_penalty: logits of tokens in the prompt or made before are divided by it where positive, multiplied
        where negative; 1 does nothing.

    Example:
      >>> from attnjax.models import Sampling
      >>> Sampling(temperature=0.8, top_p=0.95)
      Sampling(temperature=0.8, top_k=None, top_p=0.95, min_p=None, repetition_penalty=1.0)

    References:
      Fan et al., "Hierarchical Neural Story Generation", 2018 (top-k). Holtzman et al., "The Curious Case of Neural
      Text Degeneration", 2020 (top-p). Nguyen et al., "Turning Up the Heat", 2024 (min-p). Keskar et al., "CTRL", 2019,
      section 4.1 (repetition penalty).
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name in ("temperature", "min_p", "top_p", "repetition_penalty", "top_k"):
            value = getattr(self, name)
            known = None if value is None else number_of(value)
            if known is None and value is not None and name != "top_k":
                raise TypeError(f"Sampling: {name} must be a number, got {value!r}.")
            if known is not None:
                object.__setattr__(self, name, known)
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise ValueError(f"Sampling: temperature must be at least 0 and finite, got {self.temperature}.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"Sampling: min_p must be in [0, 1], got {self.min_p}.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"Sampling: top_p must be in (0, 1], got {self.top_p}.")
        if self.top_k is not None:
            check_count("Sampling: top_k", self.top_k)
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            raise ValueError(
                f"Sampling: repetition_penalty must be positive and finite, got {self.repetition_penalty}."
            )

    def numbers(self) -> dict[str, np.generic]:
        """The rules that do something, by name, as scalars that a program may take as arguments: it is one for all."""
        kinds = np.finfo(np.float32)  # below the smallest a float32 is 0, above the largest inf; neither divides well
        made: dict[str, np.generic] = {}
        if self.temperature > 0:
            made["temperature"] = np.float32(min(max(self.temperature, kinds.tiny), kinds.max))
            if self.top_k is not None:
                made["top_k"] = np.int32(min(self.top_k, 2**31 - 1))
            if self.top_p is not None and self.top_p < 1:
                made["top_p"] = np.float32(max(self.top_p, kinds.tiny))
            if self.min_p:
                made["min_p"] = np.float32(self.min_p)
        if self.repetition_penalty != 1:
            made["repetition_penalty"] = np.float32(min(max(self.repetition_penalty, kinds.tiny), kinds.max))
        return made


def sample(
    logits: Float[Array, "B vocab"], sampling: Sampling, rng: Array | None = None, seen: Array | None = None
) -> Int[Array, " B"]:
    """One token for each row. A row's draw depends on its own logits and number, not on how many rows there are.

    Args:
      logits: `[B, vocab]`.
      sampling: the rules.
      rng: a PRNG key; needed unless the temperature is 0.
      seen: booleans `[B, vocab]`, the tokens that the repetition penalty is for.

    Returns:
      int32 `[B]`.

    Example:
      >>> import jax.numpy as jnp
      >>> from attnjax.models import Sampling
      >>> from attnjax.models.sampling import sample
      >>> sample(jnp.array([[0.0, 2.0, 1.0]]), Sampling(temperature=0)).tolist()
      [1]
    """
    if rng is None and sampling.temperature > 0:
        raise ValueError(
            f"rng is missing: temperature {sampling.temperature} draws at random, give jax.random.key(...)."
        )
    return drawn(logits, sampling.numbers(), rng, seen)


def drawn(
    logits: Float[Array, "B vocab"], numbers: dict[str, Any], rng: Array | None = None, seen: Array | None = None
) -> Int[Array, " B"]:
    """`sample` by the rules in `Sampling.numbers()`, which may be traced."""
    logits = logits.astype(jnp.float32)
    if seen is not None and "repetition_penalty" in numbers:
        logits = penalize_repetition(logits, seen, numbers["repetition_penalty"])
    if "temperature" not in numbers:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    logits = (logits - logits.max(-1, keepdims=True)) / numbers["temperature"]
    for name, keep in (("top_k", keep_top_k), ("top_p", keep_top_p), ("min_p", keep_min_p)):
        if name in numbers:
            logits = keep(logits, numbers[name])
    assert rng is not None  # a temperature asks for it
    rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, np.arange(logits.shape[0], dtype=np.uint32))
    return jax.vmap(jax.random.categorical)(rngs, logits).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "*B vocab"], k: Scalar) -> Float[Array, "*B vocab"]:
    """-inf in place of all but the k largest logits. Those that equal the k-th stay.

    Finds the largest threshold t with count(logit >= t) >= k.
    """
    logits = logits.astype(jnp.float32)
    bits = lax.bitcast_convert_type(jnp.where(logits == 0, np.float32(0), logits), jnp.uint32)  # -0 is 0
    order = jnp.where(bits >> 31 == 1, ~bits, bits | np.uint32(2**31))  # as the floats are ordered
    count = lambda least: jnp.sum(order >= least, -1, keepdims=True, dtype=jnp.int32) >= k
    return jnp.where(order >= _largest(count, order, 2**32 - 1), logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "*B vocab"], p: Scalar) -> Float[Array, "*B vocab"]:
    """-inf in place of all but the most likely tokens that have probability p together. Ties stay or go together.

    Finds the largest threshold t with sum(probability where probability >= t) >= p.
    """
    if isinstance(p, (int, float)) and p == 1:  # a rounded sum may reach it before the last
        return logits
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    bits = lax.bitcast_convert_type(probability, jnp.uint32)
    enough = lambda least: jnp.sum(jnp.where(bits >= least, probability, 0), -1, keepdims=True) >= p
    return jnp.where(bits >= _largest(enough, bits, int(np.float32(2).view(np.int32))), logits, -jnp.inf)


def _largest(enough: Callable[[Array], Array], bits: Array, beyond: int) -> Array:
    """The largest threshold, one for each row, that is far enough down; 0 is, and `beyond` is not.

    The bits of positive floats are ordered as the floats are, so that bisection over bits ends after 32 steps, exactly,
    and without sorting.
    """

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends
        middle = low + (high - low) // 2
        lower = enough(middle)
        return jnp.where(lower, middle, low), jnp.where(lower, high, middle)

    low = jnp.zeros((*bits.shape[:-1], 1), jnp.uint32)
    return lax.fori_loop(0, beyond.bit_length(), halve, (low, jnp.full_like(low, beyond)))[0]


def keep_min_p(logits: Float[Array, "*B vocab"], p: Scalar) -> Float[Array, "*B vocab"]:
    """-inf in place of tokens that are less likely than p times the most likely one."""
    least = logits.max(-1, keepdims=True) + jnp.log(jnp.asarray(p, logits.dtype))
    return jnp.where(logits >= least, logits, -jnp.inf)


def penalize_repetition(
    logits: Float[Array, "*B vocab"], seen: Bool[Array, "*B vocab"], penalty: Scalar
) -> Float[Array, "*B vocab"]:
    """Logits of seen tokens divided by the penalty where positive, multiplied by it where negative."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
