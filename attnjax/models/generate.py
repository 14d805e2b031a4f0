"""Generation: prompts in, tokens out, with a KV cache and one compiled step. Beam search is in `beam.py`.

A model is what has `hidden(tokens, caches=, lengths=, deterministic=) -> (hidden, caches)`, `logits(hidden)`,
`create_caches(batch, capacity)`, `vocab_size` and `max_length` (`None`: no limit). Where `memory` is given, `hidden`
takes it; where `cache_dtype` is given, `create_caches` takes `dtype`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from attnjax.cache import KVCache
from attnjax.core.checks import check_count
from attnjax.core.mesh_types import gathered
from attnjax.models import prompts as door
from attnjax.models.processors import Processor, as_processors, processed, without
from attnjax.models.prompts import Frozen
from attnjax.models.sampling import Sampling, drawn

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Generated:
    """What was generated, without the prompts. With `num_samples` there is an axis for them behind B.

    Attributes:
      tokens: int32 `[B, max_new_tokens]`; behind a row's end stands `pad_token`.
      lengths: int32 `[B]`, how many tokens a row has; a stop token counts.
      stopped: booleans `[B]`, true where a stop token ended the row.
      log_probabilities: float32 `[B, max_new_tokens]`, of each token, given those before it, as the model has them:
        before temperature, processors and other rules. 0 behind a row's end.
      caches: with `return_caches`, those of the model, with prompts and tokens, one row for each of `tokens`.
    """

    tokens: Array
    lengths: Array
    stopped: Array
    log_probabilities: Array
    caches: Any = None

    def lists(self) -> list[Any]:
        """The tokens of each row as a list, without padding; with `num_samples` a list of such lists for each row."""
        tokens, lengths = np.asarray(self.tokens), np.asarray(self.lengths)
        rows = zip(tokens.reshape(-1, tokens.shape[-1]), lengths.reshape(-1), strict=True)
        made = [row[:n].tolist() for row, n in rows]
        count = 1 if lengths.ndim == 1 else lengths.shape[1]
        return made if lengths.ndim == 1 else [made[i : i + count] for i in range(0, len(made), count)]


class State(NamedTuple):
    """What a step hands to the next. B counts samples."""

    caches: Any
    last: Array  # [B], the token to go in next
    tokens: Array  # [B, L]
    log_probabilities: Array  # [B, L]
    lengths: Array  # [B]
    done: Array  # [B], true where a row has ended
    failed: Array  # [B], true where it ended because no token was the likeliest
    step: Array  # []
    seen: Array | None  # [B, vocab], for the repetition penalty
    waits: Array | None  # [B], whether `last` is a token that the caches do not hold; where caches are wanted


class Rules(NamedTuple):
    """What is static in a run."""

    room: int  # L
    capacity: int
    samples: int = 1
    cache_dtype: Any = None
    keeps_caches: bool = False


class Given(NamedTuple):
    """What a run is given besides, all of it traced: other values are no other program."""

    leaves: list[Array]
    memory: Any
    rng: Array | None
    sampling: dict[str, Any]  # Sampling.numbers()
    pad_token: Any = 0
    stops: Any = ()  # [n]
    least: Any = None  # min_new_tokens; None is 0
    banned: Any = None  # [m]
    processors: tuple[Any, ...] = ()


def generate(
    model: Any,
    tokens: Any,
    *,
    max_new_tokens: int,
    lengths: Any = None,
    mask: Any = None,
    temperature: float = 0.0,
    sampling: Sampling | None = None,
    num_samples: int | None = None,
    stop_tokens: Iterable[int] = (),
    min_new_tokens: int = 0,
    banned_tokens: Iterable[int] = (),
    processors: Processor | Sequence[Processor] = (),
    pad_token: int = 0,
    rng: Array | None = None,
    memory: Any = None,
    caches: Sequence[KVCache] | None = None,
    return_caches: bool = False,
    capacity: int | None = None,
    cache_dtype: Any = None,
    on_token: Callable[[np.ndarray], Any] | None = None,
    progress: bool = True,
) -> Generated:
    """Continues prompts, token by token.

    Compiled twice per shape: once for the prompts, once for a step, in which the cache is donated and so written in
    place. Without callback many steps are one call. The same rng gives the same tokens, with a callback or without.
    Numbers such as temperature, top-p or max_new_tokens are arguments of the compiled programs: others compile nothing,
    where `capacity` is fixed.

    Args:
      model: a `DecoderLM`; or a `Transformer`, with `memory=model.encode(source)` and start tokens as prompts.
      tokens: integers `[B, T]`, the prompts, padded at the right (see `pad`).
      max_new_tokens: the most tokens to generate for a row.
      lengths: integers `[B]`, the length of each prompt; default T.
      mask: in place of lengths: booleans, or 0 and 1, `[B, T]`, true where a token is real. Padding may be at the left.
      temperature: 0 takes the most likely token, else tokens are drawn; short for `Sampling(temperature)`.
      sampling: all rules of drawing.
      num_samples: n, continuations of each prompt, which is read once; results are then `[B, n, ...]`.
      stop_tokens: a row ends when it has generated one of them.
      min_new_tokens: no row ends by a stop token before it has so many tokens.
      banned_tokens: what is never generated.
      processors: functions `(logits, tokens, step) -> logits` that are traced into the step, applied in order before
        all other rules: float32 `[B, vocab]`; int32 `[B, L]`, what was generated so far, `pad_token` behind; int32
        `[]`, how many tokens that is. B counts samples. Another function is compiled anew; arrays that change belong
        into a `jax.tree_util.Partial(function, array)`.
      pad_token: what stands behind a row's end.
      rng: a PRNG key, for temperatures above 0.
      memory: what the decoder attends to besides its own tokens.
      caches: what comes before the prompts, from a run with `return_caches` or a call of the model: `[B]` rows, or one
        row that all prompts continue. They are copied, and grown where they are too small.
      return_caches: give the caches back, with all that was read and generated; for the next turn of a chat.
      capacity: tokens that the cache has room for, default what is needed. With a fixed one the compiled step serves
        prompts of all lengths and any max_new_tokens.
      cache_dtype: what the cache stores, default the model's dtype; bfloat16 or int8 take less memory.
      on_token: called on the host with the new tokens of each step in order, int32 `[B]`, or `[B, n]` with samples; -1
        in rows that had ended. Where it returns `True`, the run ends, and what there is is the result.
      progress: show a bar for long runs, when stderr is a terminal and rich is installed.

    Returns:
      `Generated`: tokens, lengths, stopped, log_probabilities, caches.

    Raises:
      TypeError, ValueError: arguments that do not fit; a call inside `jax.jit` and the like.
      FloatingPointError: no token is the likeliest, for logits are NaN or infinite, or all are banned.

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
    door.check_model(model, memory)
    door.check_outside("generate", tokens, lengths, mask, memory, rng, caches)
    frozen, leaves = Frozen(model).without_arrays()
    door.check_outside("generate", leaves)
    vocab = model.vocab_size
    sampling = _sampling(temperature, sampling, rng, num_samples)
    tokens, lengths = door.check_prompts(tokens, lengths, vocab, mask=mask)
    count = check_count("max_new_tokens", max_new_tokens)
    least = check_count("min_new_tokens", min_new_tokens, 0)
    if least > count:
        raise ValueError(f"min_new_tokens = {least} is more than max_new_tokens = {count}.")
    held, own = door.check_caches(caches, len(tokens))
    needed = door.check_room(model, tokens.shape[1], count, capacity, held)
    room = count if capacity is None and caches is None else max(count, needed if capacity else own)
    samples = 1 if num_samples is None else check_count("num_samples", num_samples)
    dtype = door.check_cache_dtype(cache_dtype, caches)
    rules = Rules(room, max(own, needed) if own or caches is None else 0, samples, dtype, bool(return_caches))
    stops = door.check_tokens("stop_tokens", stop_tokens, vocab)
    banned = door.check_tokens("banned_tokens", banned_tokens, vocab)
    numbers: dict[str, Any] = dict(
        sampling=sampling.numbers(),
        pad_token=np.int32(door.check_pad(pad_token)),
        stops=stops,
        least=np.int32(least) if least and len(stops) else None,
        banned=banned if len(banned) else None,
    )
    tokens, lengths, numbers = jax.device_put((tokens, lengths, numbers))
    rng = rng if sampling.temperature > 0 else None
    given = Given(leaves, memory, rng, processors=as_processors(processors), **numbers)
    state = _start(frozen, rules, given, tokens, lengths, caches)
    shape = (len(tokens),) if num_samples is None else (len(tokens), samples)
    if samples > 1:
        given = given._replace(memory=jax.tree.map(lambda x: jnp.repeat(x, samples, 0), memory))
    state = _run(frozen, given, state, count, shape, on_token, progress)
    if return_caches:
        state = _finish(frozen, given, state)
    cut = lambda x: x if x.shape[1] == count else jax.device_put(np.asarray(x)[:, :count])  # that compiles nothing
    parts = lambda x: x if num_samples is None else x.reshape(*shape, *x.shape[1:])
    tokens, log_probabilities = cut(state.tokens), cut(state.log_probabilities)
    made = tuple(map(parts, (tokens, state.lengths, state.done, log_probabilities)))
    return Generated(made[0], made[1], made[2], made[3], state.caches if return_caches else None)


def _run(
    frozen: Frozen,
    given: Given,
    state: State,
    count: int,
    shape: tuple[int, ...],
    on_token: Callable[[np.ndarray], Any] | None,
    progress: bool,
) -> State:
    """All steps, and the calls that tell of them."""
    with _bar(count, progress) as advance:
        each = 1 if on_token else 32 if advance else count
        done, finished, halted = np.zeros(len(state.done), bool), 1, False
        while True:
            if on_token:
                _check_likeliest(state)
                answer = on_token(np.where(done, np.int32(-1), np.asarray(state.last)).reshape(shape))
                halted = isinstance(answer, (bool, np.bool_)) and bool(answer)
            if advance:
                advance(finished)
            if on_token or advance:
                done = np.asarray(state.done)
            if halted or finished == count or done.all():
                break
            finished = min(finished + each, count)
            state = _steps(frozen, given, state, jax.device_put(np.int32(finished)))
    _check_likeliest(state)
    return state


@functools.partial(jax.jit, static_argnames=("frozen", "rules"))
def _start(frozen: Frozen, rules: Rules, given: Given, tokens: Array, lengths: Array, caches: Any = None) -> State:
    """Reads the prompts, and chooses the first token of each row."""
    model = frozen.model(given.leaves)
    batch, count = tokens.shape
    if caches is None:
        caches = door.create_caches(model, batch, rules.capacity, rules.cache_dtype)
    else:
        caches = tuple(_widened(cache, batch, rules.capacity) for cache in caches)
    options = dict(caches=caches, lengths=lengths, deterministic=True)
    hidden, caches = model.hidden(tokens, **options, **_memory(given.memory))
    logits = model.logits(jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0])
    seen = None
    if "repetition_penalty" in given.sampling:
        real = np.arange(count, dtype=np.int32)[None] < lengths[:, None]
        rows = np.arange(batch, dtype=np.int32)[:, None]
        seen = jnp.zeros((batch, model.vocab_size), bool).at[rows, tokens].max(real)
    if rules.samples > 1:
        caches, logits, seen = jax.tree.map(lambda x: jnp.repeat(x, rules.samples, 0), (caches, logits, seen))
        batch *= rules.samples
    state = State(
        caches=caches,
        last=jnp.zeros(batch, jnp.int32),
        tokens=jnp.full((batch, rules.room), given.pad_token, jnp.int32),
        log_probabilities=jnp.zeros((batch, rules.room), jnp.float32),
        lengths=jnp.zeros(batch, jnp.int32),
        done=jnp.zeros(batch, bool),
        failed=jnp.zeros(batch, bool),
        step=jnp.int32(0),
        seen=seen,
        waits=jnp.zeros(batch, bool) if rules.keeps_caches else None,
    )
    return _chosen(state, caches, logits, given)


@functools.partial(jax.jit, static_argnames="frozen", donate_argnames="state")
def _steps(frozen: Frozen, given: Given, state: State, until: Array) -> State:
    """Steps until there are so many tokens, or all rows have ended."""

    def step(state: State) -> State:
        model = frozen.model(given.leaves)
        hidden, caches = _read(model, given, state)
        return _chosen(state, caches, model.logits(hidden[:, 0]), given)

    return lax.while_loop(lambda state: (state.step < until) & ~state.done.all(), step, state)


@functools.partial(jax.jit, static_argnames="frozen", donate_argnames="state")
def _finish(frozen: Frozen, given: Given, state: State) -> State:
    """The state with caches that hold the last tokens, too."""
    _, caches = _read(frozen.model(given.leaves), given, state)
    return state._replace(caches=caches)


def _read(model: Any, given: Given, state: State) -> tuple[Array, Any]:
    """Hidden vectors of the last tokens, and caches with them: without those of rows that end, where they are kept."""
    options = dict(caches=state.caches, deterministic=True, **_memory(given.memory))
    if state.waits is not None:
        options["lengths"] = state.waits.astype(jnp.int32)
    return model.hidden(state.last[:, None], **options)


def _chosen(state: State, caches: Any, logits: Array, given: Given) -> State:
    """The state with one more token."""
    own = gathered(logits).astype(jnp.float32)  # whoever chooses looks at the whole vocabulary
    logits = processed(own, given.processors, state.tokens, state.step)
    if given.banned is not None:
        logits = without(logits, given.banned)
    if given.least is not None:
        logits = without(logits, given.stops, state.step < given.least)
    rng = None if given.rng is None else jax.random.fold_in(given.rng, state.step)
    token = drawn(logits, given.sampling, rng, state.seen)
    failed = ~state.done & ~jnp.isfinite(logits.max(-1))  # NaN somewhere, or nothing left to choose from
    ended = state.done | failed
    probability = jnp.take_along_axis(own, token[:, None], 1) - jax.nn.logsumexp(own, 1, keepdims=True)
    token = jnp.where(ended, given.pad_token, token)
    probability = jnp.where(ended[:, None], np.float32(0), probability)
    seen = state.seen
    if seen is not None:
        seen = seen.at[np.arange(len(token), dtype=np.int32), token].max(~ended)
    place = (jnp.int32(0), state.step)
    return State(
        caches=caches,
        last=token,
        tokens=lax.dynamic_update_slice(state.tokens, token[:, None], place),
        log_probabilities=lax.dynamic_update_slice(state.log_probabilities, probability, place),
        lengths=state.lengths + (~ended).astype(jnp.int32),
        done=ended | (token[:, None] == given.stops[None]).any(1),
        failed=state.failed | failed,
        step=state.step + 1,
        seen=seen,
        waits=None if state.waits is None else ~ended,
    )


def _widened(cache: KVCache, batch: int, capacity: int) -> KVCache:
    """A cache for so many rows, with room enough."""
    if cache.batch != (batch,):
        cache = jax.tree.map(lambda x: jnp.broadcast_to(x, (batch, *x.shape[1:])), cache)
    return cache.grow(capacity) if cache.window is None and cache.capacity < capacity else cache


def _memory(memory: Any) -> dict[str, Any]:
    return {} if memory is None else {"memory": memory}


def _check_likeliest(state: State) -> None:
    """Every row had a likeliest token at every step, or a FloatingPointError."""
    if state.failed.any():
        row = int(np.asarray(state.failed).argmax())
        raise FloatingPointError(
            f"row {row} has no likeliest token behind {int(state.lengths[row])} new ones: its logits are NaN or "
            "infinite, or processors and banned_tokens leave none. Look at the model's parameters and at model(tokens)."
        )


def _sampling(temperature: Any, sampling: Sampling | None, rng: Any, num_samples: int | None) -> Sampling:
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
    if sampling.temperature == 0 and num_samples is not None and num_samples != 1:
        raise ValueError(f"num_samples = {num_samples} would be equal at temperature 0: give a temperature and rng.")
    door.check_rng(rng)
    return sampling


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
