"""Beam search: the likeliest sequences that a width of so many candidates at every step finds."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.cache import checked_dtype
from attnjax.core.checks import check_count
from attnjax.models.generate import Frozen, check_pad, check_prompts, check_room, check_token

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Beams:
    """What beam search found, the best first.

    Attributes:
      tokens: int32 `[B, beams, max_new_tokens]`, without the start token; behind a sequence's end stands `pad_token`.
      lengths: int32 `[B, beams]`; the stop token counts.
      scores: float32 `[B, beams]`, log-probability over length penalty.
    """

    tokens: Array
    lengths: Array
    scores: Array

    def lists(self) -> list[list[int]]:
        """The best sequence of each row as a list, without padding."""
        tokens, lengths = np.asarray(self.tokens[:, 0]), np.asarray(self.lengths[:, 0])
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


class Rules(NamedTuple):
    """What is static in a search."""

    beams: int
    start_token: int
    stop_token: int
    pad_token: int
    max_new_tokens: int
    length_penalty: float
    cache_dtype: Any


class Search(NamedTuple):
    """What a step hands to the next: sequences that go on, sequences that have ended, each sorted by score."""

    caches: Any
    live: Array  # [B, K, L]
    live_scores: Array  # [B, K], log-probability
    ended: Array  # [B, K, L]
    ended_scores: Array  # [B, K], log-probability over length penalty; -inf where there is none
    ended_lengths: Array  # [B, K]
    step: Array  # []


def beam_search(
    model: Any,
    source: Any,
    *,
    start_token: int,
    stop_token: int,
    max_new_tokens: int,
    lengths: Any = None,
    beams: int = 4,
    length_penalty: float = 0.6,
    pad_token: int = 0,
    cache_dtype: Any = None,
) -> Beams:
    """Likely targets for sources, by beam search.

        score = log-probability / ((5 + length) / 6)^length_penalty

    Sequences that have not ended after `max_new_tokens` compete with those that have. A row is done when no sequence
    that goes on can become better than all `beams` that have ended.

    Args:
      model: a `Transformer`.
      source: integers `[B, S]`, padded at the right (see `attnjax.models.pad`).
      start_token: what the target begins with; stop_token: what it ends with.
      max_new_tokens: the most tokens of a target, stop token included.
      lengths: integers `[B]`, the length of each source; default S.
      beams: K, how many sequences are kept at every step, and returned. 1 is greedy.
      length_penalty: number >= 0; more favours longer targets.
      pad_token: what stands behind a target's end.
      cache_dtype: what the cache stores, as in `generate`.

    Returns:
      `Beams`: tokens `[B, K, max_new_tokens]`, lengths and scores `[B, K]`, the best first.

    Raises:
      TypeError, ValueError: arguments that do not fit.

    Example:
      >>> from flax import nnx
      >>> from attnjax.models import Transformer, TransformerConfig, beam_search
      >>> config = TransformerConfig(16, features=8, num_heads=2, hidden=16, encoder_layers=1, decoder_layers=1)
      >>> model = Transformer(config, rngs=nnx.Rngs(0))
      >>> found = beam_search(model, [[5, 6, 7]], start_token=1, stop_token=2, max_new_tokens=4, beams=3)
      >>> found.tokens.shape
      (1, 3, 4)

    References:
      Vaswani et al., "Attention Is All You Need", 2017, section 6.1. Wu et al., "Google's Neural Machine Translation
      System", 2016, section 7 (length penalty).
    """
    if not hasattr(model, "encode"):
        raise TypeError(f"model must be a Transformer, with an encoder of the source, got {type(model).__name__}.")
    source, lengths = check_prompts(source, lengths, model.vocab_size, "source")
    check_count("max_new_tokens", max_new_tokens)
    check_count("beams", beams)
    check_room(model, 1, max_new_tokens)
    if not (isinstance(length_penalty, (int, float)) and math.isfinite(length_penalty) and length_penalty >= 0):
        raise ValueError(f"length_penalty must be a number of at least 0, got {length_penalty!r}.")
    start = check_token("start_token", start_token, model.vocab_size)
    stop = check_token("stop_token", stop_token, model.vocab_size)
    dtype = None if cache_dtype is None else checked_dtype("cache_dtype", cache_dtype)
    rules = Rules(beams, start, stop, check_pad(pad_token), max_new_tokens, float(length_penalty), dtype)
    frozen, leaves = Frozen(model).without_arrays()
    return Beams(*_search(frozen, rules, leaves, source, lengths))


@functools.partial(jax.jit, static_argnames=("frozen", "rules"))
def _search(frozen: Frozen, rules: Rules, leaves: Any, source: Array, lengths: Array) -> tuple[Array, Array, Array]:
    model = frozen.model(leaves)
    batch, (beams, length) = len(source), (rules.beams, rules.max_new_tokens)
    memory = jax.tree.map(lambda x: jnp.repeat(x, beams, axis=0), model.encode(source, lengths=lengths))
    nothing = jnp.full((batch, beams, length), rules.pad_token, jnp.int32)
    search = Search(
        caches=model.create_caches(batch * beams, length + 1, dtype=rules.cache_dtype),
        live=nothing,
        live_scores=jnp.where(np.arange(beams) == 0, jnp.zeros((batch, 1)), -jnp.inf),  # all are the start token yet
        ended=nothing,
        ended_scores=jnp.full((batch, beams), -jnp.inf),
        ended_lengths=jnp.zeros((batch, beams), jnp.int32),
        step=jnp.int32(0),
    )

    def step(search: Search) -> Search:
        before = lax.dynamic_index_in_dim(search.live, jnp.maximum(search.step - 1, 0), axis=2, keepdims=False)
        last = jnp.where(search.step == 0, jnp.int32(rules.start_token), before).reshape(-1, 1)
        model = frozen.model(leaves)
        hidden, caches = model.hidden(last, caches=search.caches, memory=memory, deterministic=True)
        logits = model.logits(hidden[:, 0]).reshape(batch, beams, -1)
        return _advanced(search._replace(caches=caches), jax.nn.log_softmax(logits), rules)

    search = lax.while_loop(lambda search: _goes_on(search, rules), step, search)
    rest = jnp.where(search.step == length, search.live_scores, -jnp.inf) / _penalty(search.step, rules)
    tokens = jnp.concatenate([search.ended, search.live], 1)
    lengths = jnp.concatenate([search.ended_lengths, jnp.full((batch, beams), search.step)], 1)
    scores, chosen = lax.top_k(jnp.concatenate([search.ended_scores, rest], 1), beams)
    return _picked(tokens, chosen), _picked(lengths, chosen), scores


def _advanced(search: Search, log_probability: Array, rules: Rules) -> Search:
    """The search with one more token. Of 2 K candidates at most K end, so K that go on are always among them."""
    batch, beams, vocab = log_probability.shape
    scores = (search.live_scores[..., None] + log_probability).reshape(batch, -1)
    scores, flat = lax.top_k(scores, min(2 * beams, beams * vocab))
    origin, token = flat // vocab, flat % vocab
    tokens = _picked(search.live, origin)
    tokens = lax.dynamic_update_slice_in_dim(tokens, token[..., None], search.step, axis=2)
    stops = token == rules.stop_token

    ends = jnp.where(stops, scores / _penalty(search.step + 1, rules), -jnp.inf)
    lengths = jnp.concatenate([search.ended_lengths, jnp.full(token.shape, search.step + 1)], 1)
    ended_scores, best = lax.top_k(jnp.concatenate([search.ended_scores, ends], 1), beams)
    ended, lengths = _picked(jnp.concatenate([search.ended, tokens], 1), best), _picked(lengths, best)

    live_scores, best = lax.top_k(jnp.where(stops, -jnp.inf, scores), beams)
    rows = (np.arange(batch)[:, None] * beams + _picked(origin, best)).reshape(-1)
    return Search(
        caches=jax.tree.map(lambda x: x[rows], search.caches),
        live=_picked(tokens, best),
        live_scores=live_scores,
        ended=ended,
        ended_scores=ended_scores,
        ended_lengths=lengths,
        step=search.step + 1,
    )


def _goes_on(search: Search, rules: Rules) -> Array:
    """Whether a sequence may become better than the worst that has ended: log-probabilities only fall."""
    most = search.live_scores.max(1) / _penalty(jnp.int32(rules.max_new_tokens), rules)
    return (search.step < rules.max_new_tokens) & (most > search.ended_scores.min(1)).any()


def _penalty(length: Array, rules: Rules) -> Array:
    return ((5 + length.astype(jnp.float32)) / 6) ** rules.length_penalty


def _picked(x: Array, index: Array) -> Array:
    """Beams of each row: `[B, K, ...]` at `[B, J]`."""
    return jax.vmap(lambda x, index: x[index])(x, index)
