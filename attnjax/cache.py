"""`KVCache`: the keys and values of the tokens so far, so that the next ones need not compute them again."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Float, Int

from attnjax.attention import attention
from attnjax.core.checks import broadcasts, check_count, check_integer, number_of
from attnjax.core.mesh_types import divided_as, names_of, with_auto_axes
from attnjax.core.node import describe, is_array
from attnjax.core.placed import placed
from attnjax.masks import Causal, Mask, Window, as_mask
from attnjax.scores import Score, as_scores

Array = jax.Array

_NOWHERE = -(2**30)  # where a slot without token stands: before all that any window reaches
_LOST = np.int32(_NOWHERE)  # the length of a row that was told nonsense under `jit`: it stays negative


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("key", "value", "length", "key_scale", "value_scale", "first"),
    meta_fields=("window",),
)
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of a fixed capacity, and how many tokens each row holds: a pytree, never changed in place.

    `attend` does what a layer needs: it appends the new tokens and lets their queries see all that is held, causally. A
    whole sequence in one call, in several, or token by token gives the same numbers, to rounding. Rows may have
    different lengths. Donate the cache to a compiled step (`jax.jit(step, donate_argnames="cache")`), and its memory is
    written to in place.

    `truncate` and `rollback` take tokens back, `reset` all of them; `grow` makes room for more.

    Where more tokens come than there is room for, or a ring no longer holds what a row cut short must see, an error is
    raised while lengths are known, outside of `jit`; under `jit` the output of such rows is NaN.

    Attributes:
      key: `[*B, S, K, H]`, value: `[*B, S, K, V]`; S is the capacity. All leaves have the batch axes in front, so that
        rows are picked by `jax.tree.map(lambda x: x[rows], cache)`.
      length: int32 `[*B]`, the number of tokens so far.
      key_scale, value_scale: float32 `[*B, S, K]` where int8 is stored, else `None`.
      first: int32 `[*B]` in a ring, else `None`: the tokens of a row before this one are no longer held.
      window: tokens before its own that a query sees; `None` is all. With a window the cache is a ring: new tokens take
        the place of those that no query will see again, and any number of them may come.

    Example:
      >>> import jax
      >>> from attnjax import KVCache
      >>> prompt, token = jax.random.normal(jax.random.key(0), (3, 2, 5, 4, 8)), jax.numpy.ones((3, 2, 1, 4, 8))
      >>> cache = KVCache.create(batch=2, capacity=16, key_heads=4, head_size=8)
      >>> out, cache = cache.attend(*prompt)
      >>> out, cache = cache.attend(*token)
      >>> out.shape, cache.length.tolist()
      ((2, 1, 4, 8), [6, 6])
    """

    key: Array
    value: Array
    length: Array
    key_scale: Array | None = None
    value_scale: Array | None = None
    first: Array | None = None
    window: int | None = None

    @classmethod
    def create(
        cls,
        batch: int | tuple[int, ...],
        capacity: int,
        key_heads: int,
        head_size: int,
        *,
        value_size: int | None = None,
        dtype: Any = jnp.float32,
        window: int | None = None,
    ) -> KVCache:
        """An empty cache.

        Args:
          batch: `*B`, a size or several.
          capacity: S, the most tokens that a row can hold; with a window at least window + 1.
          key_heads: K; head_size: H; value_size: V, default H.
          dtype: what is stored; int8 takes a quarter of float32, with a scale for each token and head.
          window: how many tokens before its own a query sees; `None` is all.

        Raises:
          TypeError, ValueError: arguments that do not fit.

        Example:
          >>> from attnjax import KVCache
          >>> KVCache.create(batch=(2, 3), capacity=16, key_heads=4, head_size=8).key.shape
          (2, 3, 16, 4, 8)
        """
        sizes = tuple(map(number_of, batch)) if isinstance(batch, (tuple, list)) else (number_of(batch),)
        if not all(isinstance(size, int) and size >= 0 for size in sizes):
            raise ValueError(f"KVCache: batch must be an integer of at least 0, or several, got {batch!r}.")
        batch = cast("tuple[int, ...]", sizes)
        capacity, key_heads = check_count("KVCache: capacity", capacity), check_count("KVCache: key_heads", key_heads)
        head_size = check_count("KVCache: head_size", head_size)
        value_size = head_size if value_size is None else check_count("KVCache: value_size", value_size)
        dtype = checked_dtype("KVCache: dtype", dtype)
        if window is not None:
            window = check_count("KVCache: window", window, least=0)
            if capacity < window + 1:
                raise ValueError(
                    f"KVCache: capacity must be at least window + 1 = {window + 1}, got {capacity}: a query sees "
                    f"its own token and {window} before it."
                )
        rows = (*batch, capacity, key_heads)
        scale = jnp.zeros(rows, jnp.float32) if dtype == jnp.int8 else None
        return cls(
            key=jnp.zeros((*rows, head_size), dtype),
            value=jnp.zeros((*rows, value_size), dtype),
            length=jnp.zeros(batch, jnp.int32),
            key_scale=scale,
            value_scale=None if scale is None else jnp.zeros_like(scale),
            first=None if window is None else jnp.zeros(batch, jnp.int32),
            window=window,
        )

    @property
    def capacity(self) -> int:
        """S, the number of tokens that a row has room for."""
        return self.key.shape[-3]

    @property
    def batch(self) -> tuple[int, ...]:
        """*B, the batch axes."""
        return tuple(self.key.shape[:-3])

    def positions(self, count: int) -> Int[Array, "*B T"]:
        """Where the next `count` tokens stand in their rows: what positional embeddings want. int32 `[*B, count]`."""
        return _positions(self, count)

    def append(
        self, key: Float[Array, "*B T K H"], value: Float[Array, "*B T K V"], lengths: Int[Array, "*B"] | None = None
    ) -> KVCache:
        """The cache with T more tokens.

        Args:
          key: `[*B, T, K, H]`, value: `[*B, T, K, V]`; stored in the cache's dtype.
          lengths: integers `[*B]`, how many of the T are tokens; those behind are padding and dropped. Default: all.

        Raises:
          TypeError: no arrays of floats, lengths that are no array.
          ValueError: shapes that do not fit the cache, lengths outside [0, T], more tokens than it has room for.

        Example:
          >>> import jax.numpy as jnp
          >>> from attnjax import KVCache
          >>> cache = KVCache.create(batch=2, capacity=16, key_heads=4, head_size=8)
          >>> cache.append(jnp.ones((2, 3, 4, 8)), jnp.ones((2, 3, 4, 8)), lengths=jnp.array([3, 1])).length.tolist()
          [3, 1]
        """
        self._check(key, value, lengths)
        self.check_room(key.shape[-3], lengths)
        return _appended(self, key, value, lengths)

    def _appended(self, key: Array, value: Array, lengths: Array | None) -> KVCache:
        count = key.shape[-3]
        added: Any = np.int32(count) if lengths is None else _counts(lengths)
        length = self.length + added
        slots = self.positions(count)
        if self.window is not None:  # of the new ones, only the last have room
            slots = jnp.where(slots >= (length - self.capacity)[..., None], slots % self.capacity, self.capacity)
        if lengths is not None:
            real = self._steps(count) < added[..., None]
            slots = jnp.where(real, slots, self.capacity)
        new: dict[str, Any] = {"length": length}
        if self.first is not None:
            new["first"] = jnp.maximum(self.first, length - np.int32(self.capacity))
        if lengths is not None:
            new["length"] = jnp.where((added < 0) | (added > count), _LOST, length)
        for name, x in (("key", key), ("value", value)):
            held, scale = getattr(self, name), getattr(self, f"{name}_scale")
            if scale is not None:
                x, x_scale = _quantized(x)
                new[f"{name}_scale"] = _written(scale, x_scale, slots)
            new[name] = _written(held, x.astype(held.dtype), slots)
        return dataclasses.replace(self, **new)

    def check_room(self, count: int, lengths: Int[Array, "*B"] | None = None) -> None:
        """Whether `count` more tokens, or of each row as many as `lengths` says, have room. Under `jit` nobody knows.

        Raises:
          ValueError: they have not; or lengths outside [0, count].
        """
        added = np.int32(count) if lengths is None else _known(lengths)
        if added is not None:
            added = _counts(added)
            if ((added < 0) | (added > count)).any():
                raise ValueError(
                    f"KVCache: lengths must be between 0 and the {count} tokens that came, got {int(added.min())} to "
                    f"{int(added.max())}."
                )
        held, first = _known(self.length), None if self.first is None else _known(self.first)
        if added is None or held is None or (first is None) != (self.first is None):
            return
        length = held + added
        if (length < 0).any():
            raise ValueError(
                "KVCache: a row was given impossible lengths, or lost more tokens than it had, under jit: reset() it."
            )
        if self.window is None and (length > self.capacity).any():
            raise ValueError(
                f"KVCache: {int(length.max())} tokens are more than its capacity of {self.capacity}: create it with "
                "capacity= or grow() it, or create it with window= where only the last ones are seen."
            )
        if not self._sees(held, first).all():
            raise ValueError(
                f"KVCache: a row was cut to {int(held.min())} tokens, and its ring of capacity {self.capacity} "
                f"does not hold all of the {self.window} that its next query sees: to take n tokens back, it needs a "
                f"capacity of {self.window} + n."
            )

    def attend(
        self,
        query: Float[Array, "*B T N H"],
        key: Float[Array, "*B T K H"],
        value: Float[Array, "*B T K V"],
        *,
        lengths: Int[Array, "*B"] | None = None,
        mask: Mask | Array | None = None,
        score: Score | tuple[Score, ...] | None = None,
        **options: Any,
    ) -> tuple[Array, KVCache]:
        """Appends T tokens; their queries see them, up to their own, and all that were held before.

        Args:
          query: `[*B, T, N, H]`; key, value, lengths: as in `append`.
          mask: who else may not see whom. Masks and scores are those of the whole sequence: `Window(255, 0)` or `ALiBi`
            mean the same as in one call for all tokens. Arrays by query and key (Segments, Dense, Bias) are for these T
            queries and the S slots of the cache.
          options: those of `attention`: scale, sinks, implementation, config, return_lse.

        Returns:
          What `attention` gives for the T queries, and the new cache. What padding gives means nothing.

        Raises:
          ValueError: as `append`. NotImplementedError: an array by key, where the cache has a window.
        """
        if not is_array(query) or query.ndim != key.ndim or query.shape[-3] != key.shape[-3]:
            raise ValueError(
                f"KVCache: query must be [*B, T, N, H], one for each new key, got query {describe(query)} and key "
                f"{describe(key)}."
            )
        cache = self.append(key, value, lengths)
        causal = Causal() if self.window is None else Window(self.window, 0)
        mask = causal if mask is None else causal & as_mask(mask)
        keys, values, start, places, right = _seen(self, cache, key, value, lengths, query.dtype)
        place = functools.partial(placed, batch=self.batch, start=start, keys=places)
        scores = tuple(place(s) for s in as_scores(score))
        made = attention(query, keys, values, mask=place(mask), score=scores, **options)
        return _where_right(right, made), cache

    def truncate(self, length: int | Int[Array, "*B"]) -> KVCache:
        """The cache with the first `length` tokens of each row; rows that have no more stay as they are.

        Args:
          length: integer of at least 0, or integers `[*B]`.

        Raises:
          TypeError, ValueError: no such integers; a ring that no longer holds what the next query of a row must see.

        Example:
          >>> import jax.numpy as jnp
          >>> from attnjax import KVCache
          >>> cache = KVCache.create(batch=2, capacity=16, key_heads=4, head_size=8)
          >>> cache = cache.append(jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 4, 8)))
          >>> cache.truncate(jnp.array([3, 9])).length.tolist()
          [3, 5]
        """
        return _cut(self, self._by_row("length", length))._checked()

    def rollback(self, count: int | Int[Array, "*B"]) -> KVCache:
        """The cache without the last `count` tokens of each row, as when the tokens of a draft are refused.

        Args:
          count: integer of at least 0, or integers `[*B]`.

        Raises:
          TypeError, ValueError: no such integers; more than a row has; a ring that no longer holds what the next query
            of a row must see: to take n tokens back, it needs a capacity of window + n.

        Example:
          >>> import jax.numpy as jnp
          >>> from attnjax import KVCache
          >>> cache = KVCache.create(batch=2, capacity=16, key_heads=4, head_size=8)
          >>> cache.append(jnp.ones((2, 5, 4, 8)), jnp.ones((2, 5, 4, 8))).rollback(2).length.tolist()
          [3, 3]
        """
        count = self._by_row("count", count)
        known, held = _known(count), _known(self.length)
        if known is not None and held is not None and (held < known).any():
            raise ValueError(
                f"KVCache: {int(known.max())} tokens cannot be taken back: the shortest row has {int(held.min())}."
            )
        return _cut(self, count, back=True)._checked()

    def reset(self) -> KVCache:
        """The cache without tokens, in the same memory. `truncate` empties some rows."""
        length, first = _zeros((self.length, self.first))
        return dataclasses.replace(self, length=length, first=first)

    def _checked(self) -> KVCache:
        self.check_room(0)
        return self

    def grow(self, capacity: int) -> KVCache:
        """The cache with room for `capacity` tokens; what it holds is copied.

        Args:
          capacity: integer, at least the present one.

        Raises:
          ValueError: a smaller one.

        Example:
          >>> from attnjax import KVCache
          >>> KVCache.create(batch=2, capacity=16, key_heads=4, head_size=8).grow(32).key.shape
          (2, 32, 4, 8)
        """
        check_count("KVCache: capacity", capacity, self.capacity)
        return _grown(self, int(capacity))

    def _grown(self, capacity: int) -> KVCache:
        axis, more = len(self.batch), capacity - self.capacity
        places = None if self.window is None else self._places(capacity) % self.capacity

        def grown(x: Array) -> Array:
            if places is not None:  # a ring's tokens move to the slots of the new size
                return jnp.take_along_axis(x, jnp.expand_dims(places, range(axis + 1, x.ndim)), axis)
            return jnp.pad(x, [(0, more if i == axis else 0) for i in range(x.ndim)])

        names = ("key", "value", "key_scale", "value_scale")
        return dataclasses.replace(self, **{n: grown(x) for n in names if (x := getattr(self, n)) is not None})

    def _by_row(self, name: str, value: Any) -> Array:
        """An integer of at least 0 for each row, or a TypeError or ValueError."""
        check_integer("KVCache", name, value, least=0)
        if not broadcasts(np.shape(value), self.batch):
            raise ValueError(
                f"KVCache: {name} must be an integer or integers {list(self.batch)}, got {describe(value)}."
            )
        count = _counts(value)
        return count if isinstance(count, jax.Array) else jax.device_put(np.broadcast_to(count, self.batch))

    def _cut(self, length: Array, back: bool = False) -> KVCache:
        """Rows of this length at most, or shorter by this length."""
        shorter = jnp.where(self.length < length, _LOST, self.length - length)
        length = shorter if back else jnp.minimum(self.length, length)
        first = None if self.first is None else jnp.minimum(self.first, length)
        return dataclasses.replace(self, length=length, first=first)

    def _sees(self, length: Any, first: Any) -> Any:
        """Rows that hold all that their next query is to see: of a ring that was cut it may be gone. `[*B]`."""
        if self.window is None or first is None:
            return length >= 0
        return (length >= 0) & ((first <= 0) | (first <= length - np.int32(self.window)))

    def _seen(self, cache: KVCache, key: Array, value: Array, lengths: Array | None, dtype: np.dtype) -> Any:
        """Keys and values that queries see, where queries and keys stand, and which rows are right."""
        before = self._divided_as(key, value)
        keys, values, places = before._keys(cache, key, value, lengths, dtype)
        right = before._sees(before.length, before.first) & (cache.length >= 0)
        if self.window is None:
            right &= cache.length <= self.capacity
        return keys, values, before.length, places, right

    def _keys(self, cache: KVCache, key: Array, value: Array, lengths: Array | None, dtype: np.dtype) -> Any:
        """Keys, values, and where they stand (`None`: in order from 0), given the cache before and after the new ones.

        A ring is looked at before several tokens are written into it, for their places may be those of tokens that the
        first of them still see.
        """
        if self.window is None:
            return *cache._floats(dtype), None
        count = key.shape[-3]
        if count == 1 and lengths is None:
            return *cache._floats(dtype), cache._places()
        own = self.positions(count)
        if lengths is not None:
            own = jnp.where(self._steps(count) < _counts(lengths)[..., None], own, _NOWHERE)
        held = self._floats(dtype)
        keys, values = (jnp.concatenate([x, new.astype(dtype)], -3) for x, new in zip(held, (key, value), strict=True))
        return keys, values, jnp.concatenate([self._places(), own], -1)

    def _places(self, capacity: int | None = None) -> Int[Array, "*B S"]:
        """Where the token in each slot of a ring stands: the last one that fell there."""
        capacity = self.capacity if capacity is None else capacity
        last = self.length[..., None] - 1
        places = last - (last - self._steps(capacity)) % capacity
        return jnp.where(places >= 0, places, _NOWHERE)

    def _steps(self, count: int) -> np.ndarray:
        """0, 1, ... with an axis of size 1 for each batch axis: nothing is to gain axes by itself."""
        return np.arange(count, dtype=np.int32).reshape(*(1,) * len(self.batch), count)

    def _floats(self, dtype: Any) -> tuple[Array, Array]:
        """What is stored, as floats."""
        if self.key_scale is None or self.value_scale is None:
            return self.key.astype(dtype), self.value.astype(dtype)
        whole = lambda x, scale: (x.astype(jnp.float32) * scale[..., None]).astype(dtype)
        return whole(self.key, self.key_scale), whole(self.value, self.value_scale)

    def _divided_as(self, key: Array, value: Array) -> KVCache:
        """The cache, divided over devices as what comes is, where types tell how."""
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "window"}
        like = {"value": value, "value_scale": value}
        new = {name: divided_as(x, like.get(name, key)) for name, x in held.items() if x is not None}
        return dataclasses.replace(self, **new)

    def _check(self, key: Any, value: Any, lengths: Any) -> None:
        """Shapes and types of what is appended."""
        given = f"key {describe(key)}, value {describe(value)}"
        given += f"; the cache holds {describe(self.key)} and {describe(self.value)}."
        for name, x, held in (("key", key, self.key), ("value", value, self.value)):
            if not is_array(x) or not jnp.issubdtype(x.dtype, jnp.floating):
                raise TypeError(f"KVCache: {name} must be an array of floats, got {describe(x)}.")
            if x.ndim != held.ndim or x.shape[:-3] != held.shape[:-3] or x.shape[-2:] != held.shape[-2:]:
                raise ValueError(f"KVCache: {name} must be [*B, T, heads, size] with the sizes of the cache. {given}")
        if key.shape[-3] != value.shape[-3]:
            raise ValueError(f"KVCache: key and value must have as many tokens as each other. {given}")
        if lengths is None:
            return
        if not is_array(lengths):
            raise TypeError(f"KVCache: lengths must be an array of integers, got {describe(lengths)}.")
        if not jnp.issubdtype(lengths.dtype, jnp.integer) or tuple(lengths.shape) != self.batch:
            raise ValueError(f"KVCache: lengths must be integers {list(self.batch)}, got {describe(lengths)}.")


# What is computed is compiled as a whole, also outside of `jit`: one program in place of many small ones, whose
# constants jax.transfer_guard would count as transfers.
_compiled = functools.partial(jax.jit, inline=True)


@functools.partial(_compiled, static_argnames="count")
def _positions(cache: KVCache, count: int) -> Array:
    return cache.length[..., None] + cache._steps(count)


@_compiled
def _appended(cache: KVCache, key: Array, value: Array, lengths: Array | None) -> KVCache:
    return cache._divided_as(key, value)._appended(key, value, lengths)


@functools.partial(_compiled, static_argnames="dtype")
def _seen(cache: KVCache, after: KVCache, key: Array, value: Array, lengths: Array | None, dtype: np.dtype) -> Any:
    return cache._seen(after, key, value, lengths, dtype)


@functools.partial(_compiled, static_argnames="back")
def _cut(cache: KVCache, length: Array, back: bool = False) -> KVCache:
    return cache._cut(length, back)


@_compiled
def _zeros(arrays: Any) -> Any:
    return jax.tree.map(jnp.zeros_like, arrays)


@functools.partial(_compiled, static_argnames="capacity")
def _grown(cache: KVCache, capacity: int) -> KVCache:
    return cache._grown(capacity)


@_compiled
def _where_right(right: Array, made: Any) -> Any:
    """Arrays `[*B, ...]`, NaN in rows that are not right: these must not look like one that is."""
    rows = lambda x: right.reshape(*right.shape, *(1,) * (x.ndim - right.ndim))
    fill = lambda x: jnp.where(rows(x), x, np.asarray(np.nan, x.dtype))
    return jax.tree.map(fill, made)


def _known(x: Any) -> np.ndarray | None:
    """The numbers, where they are known and lie here."""
    if isinstance(x, Tracer):
        return None
    here = not isinstance(x, jax.Array) or x.is_fully_addressable or x.is_fully_replicated
    return np.asarray(jax.device_get(x)) if here else None


def _written(held: Array, new: Array, slots: Array) -> Array:
    """`held` [*B, S, ...] with `new` [*B, T, ...] at `slots` [*B, T]; what has no slot is dropped."""
    names = lambda held, *_: [names_of(held, i) for i in range(held.ndim)]
    return with_auto_axes(_write, names, held, new, slots)


def _write(held: Array, new: Array, slots: Array) -> Array:
    n = slots.ndim - 1
    if math.prod(slots.shape) == 1:  # one token: plainly a slice that is written in place
        slot, zero = slots.reshape(()), np.int32(0)  # a Python zero would be int64 under x64
        start = (zero,) * n + (jnp.clip(slot, 0, held.shape[n] - 1),) + (zero,) * (held.ndim - n - 1)
        inside = (slot >= 0) & (slot < held.shape[n])
        return lax.dynamic_update_slice(held, jnp.where(inside, new, lax.dynamic_slice(held, start, new.shape)), start)
    write = lambda held, new, slots: held.at[slots].set(new, mode="drop")
    for _ in range(n):
        write = jax.vmap(write)
    return write(held, new, slots)


def checked_dtype(name: str, dtype: Any) -> np.dtype:
    """What a cache can store.

    Raises:
      TypeError: anything else.
    """
    known = "float64, float32, bfloat16, float16 or int8"
    try:
        found = jnp.dtype(dtype)
    except TypeError as error:
        raise TypeError(f"{name} must be {known}, got {dtype!r}.") from error
    if found != jnp.int8 and not (jnp.issubdtype(found, jnp.floating) and found.itemsize >= 2):
        raise TypeError(f"{name} must be {known}, got {found.name}.")
    return found


def _quantized(x: Array) -> tuple[Array, Array]:
    """int8 of the same shape, and what each token and head is to be multiplied by."""
    scale = jnp.abs(x).max(-1).astype(jnp.float32) / 127
    steps = x.astype(jnp.float32) / jnp.where(scale > 0, scale, 1)[..., None]
    return jnp.round(steps).astype(jnp.int8), scale


def _counts(lengths: Any) -> Array:
    """int32, whatever type of integers came; what has no room in it is far too many, and does not wrap around."""
    lengths = lengths if is_array(lengths) else np.asarray(lengths)
    kind = np.iinfo(lengths.dtype)
    if kind.max > np.iinfo(np.int32).max:
        clip = jnp.clip if isinstance(lengths, jax.Array) else np.clip
        lengths = clip(lengths, max(kind.min, _NOWHERE), -_NOWHERE)
    return lengths.astype(np.int32)
