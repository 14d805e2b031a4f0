"""Choosing the next token from logits: temperature, top-k, top-p, min-p, repetition penalty. Pure functions."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from attnjax.core.checks import check_count

Array = jax.Array


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
        for name in ("temperature", "min_p", "top_p", "repetition_penalty"):
            value = getattr(self, name)
            if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float, np.number))):
                raise TypeError(f"Sampling: {name} must be a number, got {value!r}.")
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
    logits = logits.astype(jnp.float32)
    if seen is not None:
        logits = penalize_repetition(logits, seen, sampling.repetition_penalty)
    if sampling.temperature == 0:
        return jnp.argmax(logits, -1).astype(jnp.int32)
    if rng is None:
        raise ValueError(
            f"rng is missing: temperature {sampling.temperature} draws at random, give jax.random.key(...)."
        )
    smallest = float(np.finfo(np.float32).tiny)  # below it a float32 is 0, and 0 / 0 not a number
    logits = (logits - logits.max(-1, keepdims=True)) / max(sampling.temperature, smallest)
    if sampling.top_k is not None:
        logits = keep_top_k(logits, sampling.top_k)
    if sampling.top_p is not None:
        logits = keep_top_p(logits, sampling.top_p)
    if sampling.min_p is not None:
        logits = keep_min_p(logits, sampling.min_p)
    rngs = jax.vmap(jax.random.fold_in, (None, 0))(rng, np.arange(logits.shape[0]))
    return jax.vmap(jax.random.categorical)(rngs, logits).astype(jnp.int32)


def keep_top_k(logits: Float[Array, "*B vocab"], k: int) -> Float[Array, "*B vocab"]:
    """-inf in place of all but the k largest logits. Those that equal the k-th stay."""
    least = lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: Float[Array, "*B vocab"], p: float) -> Float[Array, "*B vocab"]:
    """-inf in place of all but the most likely tokens that have probability p together. Ties stay or go together.

    Finds the largest threshold t with sum(probability where probability >= t) >= p. The bits of positive floats are
    ordered as the floats are, so that bisection over bits ends after 31 steps, exactly, and without sorting.
    """
    if p == 1:
        return logits
    probability = jax.nn.softmax(logits.astype(jnp.float32))
    bits = lax.bitcast_convert_type(probability, jnp.int32)

    def halve(_: int, ends: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = ends  # low is far enough down, high is not
        middle = low + (high - low) // 2
        enough = jnp.sum(jnp.where(bits >= middle, probability, 0), -1, keepdims=True) >= p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    low = jnp.zeros((*logits.shape[:-1], 1), jnp.int32)
    high = jnp.full_like(low, np.float32(2).view(np.int32))
    low, _ = lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where(bits >= low, logits, -jnp.inf)


def keep_min_p(logits: Float[Array, "*B vocab"], p: float) -> Float[Array, "*B vocab"]:
    """-inf in place of tokens that are less likely than p times the most likely one."""
    if p == 0:
        return logits
    return jnp.where(logits >= logits.max(-1, keepdims=True) + math.log(p), logits, -jnp.inf)


def penalize_repetition(
    logits: Float[Array, "*B vocab"], seen: Bool[Array, "*B vocab"], penalty: float
) -> Float[Array, "*B vocab"]:
    """Logits of seen tokens divided by the penalty where positive, multiplied by it where negative."""
    return jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
