"""Generation: prompts in, tokens out, with a KV cache and one compiled step. Beam search is in `beam.py`.

A model is what has `hidden(tokens, caches=, lengths=, memory=, deterministic=) -> (hidden, caches)`,
`logits(hidden)`, `create_caches(batch, capacity, dtype=)`, `vocab_size` and `max_length` (`None`: no limit).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax

from attnjax.cache import checked_dtype
from attnjax.core.checks import check_count
from attnjax.models.sampling import Sampling, sample

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated, without the prompts.

    Attributes:
      tokens: int32 `[B, max_new_tokens]`; behind a row's end stands `pad_token`.
      lengths: int32 `[B]`, how many tokens a row has; a stop token counts.
      stopped: booleans `[B]`, true where a stop token ended the row.
    """

    tokens: Array
    lengths: Array
    stopped: Array

    def lists(self) -> list[list[int]]:
        """The tokens of each row as a list, without padding."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        return [row[:n].tolist() for row, n in zip(tokens, lengths, strict=True)]


class State(NamedTuple):
    """What a step hands to the next."""

    caches: Any
    last: Array  # [B], the token to go in next
    tokens: Array  # [B, max_new_tokens]
    lengths: Array  # [B]
    done: Array  # [B]
    step: Array  # []
    seen: Array | None  # [B, vocab]


class Rules(NamedTuple):
    """What is static in a run."""

    sampling: Sampling
    stop_tokens: tuple[int, ...]
    pad_token: int
    max_new_tokens: int
    capacity: int
    cache_dtype: Any = None


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


def generate(
    model: Any,
    tokens: Any,
    *,
    max_new_tokens: int,
    lengths: Any = None,
    temperature: float = 0.0,
    sampling: Sampling | None = None,
    stop_tokens: Iterable[int] = (),
    pad_token: int = 0,
    rng: Array | None = None,
    memory: Any = None,
    capacity: int | None = None,
    cache_dtype: Any = None,
    on_token: Callable[[np.ndarray], Any] | None = None,
    progress: bool = True,
) -> Generated:
    """Continues prompts, token by token.

    Compiled twice per shape: once for the prompts, once for a step, in which the cache is donated and so written in
    place. Without callback many steps are one call. The same rng gives the same tokens, with a callback or without.

    Args:
      model: a `DecoderLM`; or a `Transformer`, with `memory=model.encode(source)` and start tokens as prompts.
      tokens: integers `[B, T]`, the prompts, padded at the right (see `pad`).
      max_new_tokens: the most tokens to generate for a row.
      lengths: integers `[B]`, the length of each prompt; default T.
      temperature: 0 takes the most likely token, else tokens are drawn; short for `Sampling(temperature)`.
      sampling: all rules of drawing.
      stop_tokens: a row ends when it has generated one of them.
      pad_token: what stands behind a row's end.
      rng: a PRNG key, for temperatures above 0.
      memory: what the decoder attends to besides its own tokens.
      capacity: tokens that the cache has room for, default T + max_new_tokens. With a fixed one the compiled step
        serves prompts of all lengths.
      cache_dtype: what the cache stores, default the model's dtype; bfloat16 or int8 take less memory.
      on_token: called on the host with the new tokens of each step in order, int32 `[B]`; -1 in rows that had ended.
      progress: show a bar for long runs, when stderr is a terminal and rich is installed.

    Returns:
      `Generated`: tokens, lengths, stopped.

    Raises:
      TypeError, ValueError: arguments that do not fit.

    Example:
      >>> import jax
      >>> from flax import nnx
      >>> from attnjax.models import DecoderConfig, DecoderLM, Sampling, generate
      >>> config = DecoderConfig(vocab_size=64, features=32, num_heads=2, num_layers=1, max_length=32)
      >>> model = DecoderLM(config, rngs=nnx.Rngs(0))
      >>> made = generate(model, [[1, 2, 3]], max_new_tokens=5, sampling=Sampling(top_k=8), rng=jax.random.key(1))
      >>> made.tokens.shape
      (1, 5)
    """
    _check_model(model, memory)
    sampling = _sampling(temperature, sampling, rng)
    tokens, lengths = check_prompts(tokens, lengths, model.vocab_size)
    check_count("max_new_tokens", max_new_tokens)
    capacity = check_room(model, tokens.shape[1], max_new_tokens, capacity)
    if not isinstance(stop_tokens, Iterable):
        raise TypeError(f"stop_tokens must be integers in a list, got {stop_tokens!r}.")
    stops = tuple(check_token("stop_tokens", t, model.vocab_size) for t in stop_tokens)
    dtype = None if cache_dtype is None else checked_dtype("cache_dtype", cache_dtype)
    rules = Rules(sampling, stops, check_pad(pad_token), max_new_tokens, capacity, dtype)
    frozen, leaves = Frozen(model).without_arrays()
    given = (leaves, memory, jax.random.key(0) if rng is None else rng)
    state = _start(frozen, rules, *given, tokens, lengths)
    with _bar(max_new_tokens, progress) as advance:
        each = 1 if on_token else 32 if advance else max_new_tokens
        done, finished = np.zeros(tokens.shape[0], bool), 1
        while True:
            if on_token:
                on_token(np.where(done, np.int32(-1), np.asarray(state.last)))
            if advance:
                advance(finished)
            if on_token or advance:
                done = np.asarray(state.done)
            if finished == max_new_tokens or done.all():
                break
            finished = min(finished + each, max_new_tokens)
            state = _steps(frozen, rules, *given, state, np.int32(finished))
    return Generated(state.tokens, state.lengths, state.done)


@functools.partial(jax.jit, static_argnames=("frozen", "rules"))
def _start(frozen: Frozen, rules: Rules, leaves: Any, memory: Any, rng: Array, tokens: Array, lengths: Array) -> State:
    """Reads the prompts, and draws the first token of each row."""
    model = frozen.model(leaves)
    batch, count = tokens.shape
    caches = model.create_caches(batch, rules.capacity, dtype=rules.cache_dtype)
    hidden, caches = model.hidden(tokens, caches=caches, lengths=lengths, deterministic=True, **_memory(memory))
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]
    seen = None
    if rules.sampling.repetition_penalty != 1:
        real = np.arange(count) < lengths[:, None]
        rows = np.arange(batch)[:, None]
        seen = jnp.zeros((batch, model.vocab_size), bool).at[rows, tokens].max(real)
    state = State(
        caches=caches,
        last=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, rules.max_new_tokens), rules.pad_token, jnp.int32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        step=jnp.int32(0),
        seen=seen,
    )
    return _drawn(state, caches, model.logits(last), rules, rng)


@functools.partial(jax.jit, static_argnames=("frozen", "rules"), donate_argnames="state")
def _steps(frozen: Frozen, rules: Rules, leaves: Any, memory: Any, rng: Array, state: State, until: Array) -> State:
    """Steps until there are so many tokens, or all rows have ended."""

    def step(state: State) -> State:
        model = frozen.model(leaves)
        hidden, caches = model.hidden(state.last[:, None], caches=state.caches, deterministic=True, **_memory(memory))
        return _drawn(state, caches, model.logits(hidden[:, 0]), rules, rng)

    return lax.while_loop(lambda state: (state.step < until) & ~state.done.all(), step, state)


def _drawn(state: State, caches: Any, logits: Array, rules: Rules, rng: Array) -> State:
    """The state with one more token."""
    token = sample(logits, rules.sampling, jax.random.fold_in(rng, state.step), state.seen)
    token = jnp.where(state.done, jnp.int32(rules.pad_token), token)
    seen = state.seen
    if seen is not None:
        seen = seen.at[np.arange(len(token)), token].max(~state.done)
    stops = jnp.zeros_like(state.done)
    for stop in rules.stop_tokens:
        stops |= token == stop
    return State(
        caches=caches,
        last=token,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], (jnp.int32(0), state.step)),
        lengths=state.lengths + jnp.where(state.done, 0, 1).astype(jnp.int32),
        done=state.done | stops,
        step=state.step + 1,
        seen=seen,
    )


def _memory(memory: Any) -> dict[str, Any]:
    return {} if memory is None else {"memory": memory}


def _check_model(model: Any, memory: Any) -> None:
    """A model that generates, with a memory where it needs one."""
    kind = type(model).__name__
    if not all(hasattr(model, name) for name in ("hidden", "logits", "create_caches", "vocab_size", "max_length")):
        raise TypeError(f"model must be a DecoderLM, a Transformer or one like them, got {kind}.")
    parameters = inspect.signature(model.hidden).parameters.values()
    takes = any(p.name == "memory" or p.kind is p.VAR_KEYWORD for p in parameters)
    if memory is not None and not takes:
        raise ValueError(f"memory was given, and {kind} attends to its own tokens only: leave it out.")
    if memory is None and any(p.name == "memory" and p.default is p.empty for p in parameters):
        raise ValueError(f"memory is missing: a {kind} generates from memory=model.encode(source).")


def _sampling(temperature: float, sampling: Sampling | None, rng: Array | None) -> Sampling:
    if sampling is None:
        sampling = Sampling(temperature)
    elif not isinstance(sampling, Sampling):
        raise TypeError(f"sampling must be attnjax.models.Sampling(...), got {type(sampling).__name__} {sampling!r}.")
    elif temperature != 0:
        raise ValueError(
            f"temperature = {temperature} and {sampling} were both given: put the temperature into sampling."
        )
    if sampling.temperature > 0 and rng is None:
        raise ValueError(
            f"rng is missing: temperature {sampling.temperature} draws at random, give jax.random.key(...)."
        )
    if rng is not None and not isinstance(rng, jax.Array):
        raise TypeError(f"rng must be a PRNG key, such as jax.random.key(0), got {rng!r}.")
    return sampling


def check_prompts(tokens: Any, lengths: Any, vocab_size: int, name: str = "tokens") -> tuple[np.ndarray, np.ndarray]:
    """Prompts as int32 `[B, T]` and `[B]`.

    Raises:
      TypeError: they are no integers. ValueError: empty, not `[B, T]`, not in the vocabulary, lengths outside [1, T].
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
    lengths = np.full(len(tokens), tokens.shape[1], np.int32) if lengths is None else np.asarray(lengths)
    if not np.issubdtype(lengths.dtype, np.integer) or lengths.shape != tokens.shape[:1]:
        raise ValueError(f"lengths must be integers [{len(tokens)}], got {lengths.dtype}{list(lengths.shape)}.")
    if lengths.min() < 1:
        raise ValueError(
            f"lengths: row {lengths.argmin()} has length {lengths.min()}: a prompt needs at least one token."
        )
    if lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths: {lengths.max()} is more than the T = {tokens.shape[1]} of {name}.")
    real = tokens[np.arange(tokens.shape[1]) < lengths[:, None]]
    for token in (real.min(), real.max()):
        check_token(name, token, vocab_size)
    return np.where(np.arange(tokens.shape[1]) < lengths[:, None], tokens, 0).astype(np.int32), lengths.astype(np.int32)


def check_token(name: str, token: Any, vocab_size: int) -> int:
    """An integer in [0, vocab_size), or a TypeError or ValueError."""
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
        raise TypeError(f"{name} must be integers, got {token!r}.")
    if not 0 <= token < vocab_size:
        raise ValueError(f"{name}: {token} is not in the vocabulary of {vocab_size} tokens.")
    return int(token)


def check_pad(token: Any) -> int:
    """An integer, also one that is no token, or a TypeError."""
    if isinstance(token, bool) or not isinstance(token, (int, np.integer)):
        raise TypeError(f"pad_token must be an integer, got {token!r}.")
    return int(token)


def check_room(model: Any, count: int, new: int, capacity: int | None = None) -> int:
    """The cache's capacity: room for the prompts and all that is generated, or a ValueError."""
    needed = f"{count} tokens of the prompts and max_new_tokens = {new} are more than"
    if model.max_length is not None and count + new > model.max_length:
        raise ValueError(f"{needed} the model's max_length of {model.max_length}: shorten one of them.")
    if capacity is None:
        return count + new
    check_count("capacity", capacity)
    if count + new > capacity:
        raise ValueError(
            f"{needed} the cache's capacity of {capacity}: shorten one of them, or give a larger capacity."
        )
    return capacity


@contextlib.contextmanager
def _bar(total: int, wanted: bool) -> Iterator[Callable[[int], None] | None]:
    """A function that is told how far we are, or `None` where nothing is shown."""
    if not wanted or total < 64 or not sys.stderr.isatty() or importlib.util.find_spec("rich") is None:
        yield None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("tokens", total=total)
        yield lambda done: progress.update(task, completed=done)
