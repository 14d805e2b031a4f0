"""Beam search: the likeliest sequences that a width of so many candidates at every step finds."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.core.checks import check_count, number_of
from attnjax.models import prompts as door
from attnjax.models.prompts import Frozen

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Beams:
    """What beam search found, the best first.

    Attributes:
      tokens: int32 `[B, beams, max_new_tokens]`, without start tokens or prompts; behind a sequence's end stands
        `pad_token`.
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
    max_new_tokens: int
    capacity: int
    cache_dtype: Any


class Given(NamedTuple):
    """What is traced in a search besides its state."""

    leaves: list[Array]
    source: Any  # ([B, S], [B]), or None
    prefix: Array  # [B, P], what a sequence begins with
    lengths: Array  # [B], how many of the P are real
    stops: Array  # [n]
    pad_token: Array
    length_penalty: Array


class Search(NamedTuple):
    """What a step hands to the next: sequences that go on, sequences that have ended, each sorted by score."""

    caches: Any
    live: Array  # [B, K, L]
    live_scores: Array  # [B, K], log-probability
    ended: Array  # [B, K, L]
    ended_scores: Array  # [B, K], log-probability over length penalty; -inf where there is none
    ended_lengths: Array  # [B, K]
    failed: Array  # [B], true where no token was the likeliest
    step: Array  # []


def beam_search(
    model: Any,
    source: Any,
    *,
    stop_token: int | Iterable[int],
    max_new_tokens: int,
    start_token: Any = None,
    lengths: Any = None,
    mask: Any = None,
    beams: int = 4,
    length_penalty: float = 0.6,
    pad_token: int = 0,
    cache_dtype: Any = None,
) -> Beams:
    """Likely targets for sources, or continuations of prompts, by beam search.

        score = log-probability / ((5 + length) / 6)^length_penalty

    At every step, those of the K likeliest ways to go on that stop have ended, and the K likeliest that do not stop go
    on. Sequences that have not ended after `max_new_tokens` compete with those that have. A row is done when no
    sequence that goes on can become better than all K that have ended. One beam without length penalty is greedy; with
    a penalty it may find something better than what greedy search ends with.

    Args:
      model: a `Transformer`, or a `DecoderLM`.
      source: integers `[B, S]`, padded at the right (see `attnjax.models.pad`): what the encoder reads, or the prompts
        of a `DecoderLM`.
      stop_token: what a target ends with; or several such tokens.
      max_new_tokens: the most tokens of a target, stop token included.
      start_token: for a `Transformer`, what a target begins with: a token; or a prefix, integers `[P]` or `[B, P]`.
      lengths: integers `[B]`, the length of each source; default S.
      mask: in place of lengths, as in `generate`.
      beams: K, how many sequences are kept at every step, and returned.
      length_penalty: number >= 0; more favours longer targets.
      pad_token: what stands behind a target's end.
      cache_dtype: what the cache stores, as in `generate`.

    Returns:
      `Beams`: tokens `[B, K, max_new_tokens]`, lengths and scores `[B, K]`, the best first.

    Raises:
      TypeError, ValueError: arguments that do not fit; a call inside `jax.jit` and the like.
      FloatingPointError: no token is the likeliest, for logits are NaN or infinite.

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
    encodes = hasattr(model, "encode")
    door.check_model(model, encodes or None)
    door.check_outside("beam_search", source, lengths, mask, start_token)
    frozen, leaves = Frozen(model).without_arrays()
    door.check_outside("beam_search", leaves)
    vocab = model.vocab_size
    source, lengths = door.check_prompts(source, lengths, vocab, "source", mask)
    prefix, own = _prefix(model, start_token, source, lengths) if encodes else (source, lengths)
    if not encodes and start_token is not None:
        raise ValueError(f"start_token was given, and {type(model).__name__} continues its prompts: leave it out.")
    count = check_count("max_new_tokens", max_new_tokens)
    penalty = number_of(length_penalty)
    if penalty is None or not (math.isfinite(penalty) and penalty >= 0):
        raise ValueError(f"length_penalty must be a number of at least 0, got {length_penalty!r}.")
    capacity = door.check_room(model, prefix.shape[1], count)
    dtype = door.check_cache_dtype(cache_dtype, None)
    rules = Rules(check_count("beams", beams), count, capacity, dtype)
    given: Any = stop_token
    several = isinstance(given, Iterable) and not isinstance(given, str) and np.ndim(given)  # type: ignore[arg-type]
    stops = door.check_tokens("stop_token", stop_token if several else [stop_token], vocab)
    pads = np.int32(door.check_pad(pad_token))
    numbers = ((source, lengths) if encodes else None, prefix, own, stops, pads, np.float32(penalty))
    tokens, lengths, scores, failed = _search(frozen, rules, Given(leaves, *jax.device_put(numbers)))
    if failed.any():
        raise FloatingPointError(
            f"row {int(np.asarray(failed).argmax())} has no likeliest token: its logits are NaN or infinite. Look at "
            "the model's parameters and at what it gives for the source."
        )
    return Beams(tokens, lengths, scores)


def _prefix(model: Any, start_token: Any, source: np.ndarray, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What each target begins with, int32 `[B, P]`, and its lengths."""
    if start_token is None:
        raise ValueError(f"start_token is missing: a {type(model).__name__} begins its targets with one.")
    if np.ndim(start_token) == 0:
        start_token = [door.check_token("start_token", start_token, model.vocab_size)]
    start = np.asarray(start_token)
    start = start[None] if start.ndim == 1 else start
    start, own = door.check_prompts(start, None, model.vocab_size, "start_token")
    if len(start) not in (1, len(source)):
        raise ValueError(f"start_token has {len(start)} rows, and source has {len(source)}: give one for each, or one.")
    return np.repeat(start, len(source) // len(start), 0), np.repeat(own, len(source) // len(own), 0)


@functools.partial(jax.jit, static_argnames=("frozen", "rules"))
def _search(frozen: Frozen, rules: Rules, given: Given) -> tuple[Array, Array, Array, Array]:
    batch, (beams, length) = len(given.prefix), (rules.beams, rules.max_new_tokens)
    options, caches = _begun(frozen.model(given.leaves), rules, given)
    first = jnp.repeat(jnp.take_along_axis(given.prefix, given.lengths[:, None] - 1, 1), beams, axis=0)
    nothing = jnp.full((batch, beams, length), given.pad_token, jnp.int32)
    search = Search(
        caches=caches,
        live=nothing,
        live_scores=jnp.where(
            np.arange(beams)[None] == 0, jnp.zeros((batch, 1), jnp.float32), -jnp.inf
        ),  # all are one yet
        ended=nothing,
        ended_scores=jnp.full((batch, beams), -jnp.inf, jnp.float32),
        ended_lengths=jnp.zeros((batch, beams), jnp.int32),
        failed=jnp.zeros(batch, bool),
        step=jnp.int32(0),
    )

    def step(search: Search) -> Search:
        before = lax.dynamic_index_in_dim(search.live, jnp.maximum(search.step - 1, 0), axis=2, keepdims=False)
        last = jnp.where(search.step == 0, first, before.reshape(-1, 1))
        model = frozen.model(given.leaves)
        hidden, caches = model.hidden(last, caches=search.caches, deterministic=True, **options)
        logits = model.logits(hidden[:, 0]).astype(jnp.float32).reshape(batch, beams, -1)
        return _advanced(search._replace(caches=caches), logits, given)

    search = lax.while_loop(lambda search: _goes_on(search, length, given.length_penalty), step, search)
    rest = jnp.where(search.step == length, search.live_scores, -jnp.inf) / _penalty(search.step, given.length_penalty)
    tokens = jnp.concatenate([search.ended, search.live], 1)
    lengths = jnp.concatenate([search.ended_lengths, jnp.full((batch, beams), search.step)], 1)
    scores, chosen = lax.top_k(jnp.concatenate([search.ended_scores, rest], 1), beams)
    return _picked(tokens, chosen), _picked(lengths, chosen), scores, search.failed


def _begun(model: Any, rules: Rules, given: Given) -> tuple[dict[str, Any], Any]:
    """What the model takes at every step, and caches that hold the prefix but its last token; a row for each beam."""
    widened = lambda tree: jax.tree.map(lambda x: jnp.repeat(x, rules.beams, axis=0), tree)
    options: dict[str, Any] = {}
    if given.source is not None:
        source, lengths = given.source
        options["memory"] = model.encode(source, lengths=lengths)
    batch, count = given.prefix.shape
    if count == 1:
        return widened(options), door.create_caches(model, batch * rules.beams, rules.capacity, rules.cache_dtype)
    caches = door.create_caches(model, batch, rules.capacity, rules.cache_dtype)
    before = dict(caches=caches, lengths=given.lengths - 1, deterministic=True)
    _, caches = model.hidden(given.prefix[:, :-1], **before, **options)
    return widened(options), widened(caches)


def _advanced(search: Search, logits: Array, given: Given) -> Search:
    """The search with one more token. Of K (n + 1) candidates at most K n stop, so K that go on are among them."""
    batch, beams, vocab = logits.shape
    alive = search.live_scores > -jnp.inf
    failed = search.failed | (alive & ~jnp.isfinite(logits.max(-1))).any(1)
    scores = jnp.where(alive[..., None], search.live_scores[..., None] + jax.nn.log_softmax(logits), -jnp.inf)
    scores, flat = lax.top_k(scores.reshape(batch, -1), beams * min(1 + len(given.stops), vocab))
    origin, token = flat // vocab, flat % vocab
    tokens = _picked(search.live, origin)
    tokens = lax.dynamic_update_slice_in_dim(tokens, token[..., None], search.step, axis=2)
    stops = (token[..., None] == given.stops[None, None]).any(-1)

    ending = stops & (np.arange(token.shape[1])[None] < beams)
    ends = jnp.where(ending, scores / _penalty(search.step + 1, given.length_penalty), -jnp.inf)
    lengths = jnp.concatenate([search.ended_lengths, jnp.full(token.shape, search.step + 1)], 1)
    ended_scores, best = lax.top_k(jnp.concatenate([search.ended_scores, ends], 1), beams)
    ended, lengths = _picked(jnp.concatenate([search.ended, tokens], 1), best), _picked(lengths, best)

    live_scores, best = lax.top_k(jnp.where(stops, -jnp.inf, scores), beams)
    rows = (np.arange(batch, dtype=np.int32)[:, None] * beams + _picked(origin, best)).reshape(-1)
    return Search(
        caches=jax.tree.map(lambda x: x[rows], search.caches),
        live=_picked(tokens, best),
        live_scores=live_scores,
        ended=ended,
        ended_scores=ended_scores,
        ended_lengths=lengths,
        failed=failed,
        step=search.step + 1,
    )


def _goes_on(search: Search, most_tokens: int, length_penalty: Array) -> Array:
    """Whether a sequence may become better than the worst that has ended: log-probabilities only fall."""
    most = search.live_scores.max(1) / _penalty(jnp.int32(most_tokens), length_penalty)
    better = (most > search.ended_scores.min(1)).any()
    return (search.step < most_tokens) & better & ~search.failed.any()


def _penalty(length: Array, length_penalty: Array) -> Array:
    return ((5 + length.astype(jnp.float32)) / 6) ** length_penalty


def _picked(x: Array, index: Array) -> Array:
    """Beams of each row: `[B, K, ...]` at `[B, J]`."""
    return jax.vmap(lambda x, index: x[index])(x, index)
