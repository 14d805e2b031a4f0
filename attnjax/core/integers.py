"""Integers that users give, of every type and size, as int32 that mean the same to a mask or score. Nothing of masks.

Positions are below 2**29 and what is saturated here lies within +-2**30, so that sums of the two are far from the ends
of int32. What is known (Python, NumPy) stays known, and is computed with exactly.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

FAR = 2**30  # beyond all distances of positions
MOST_POSITIONS = 2**29


def is_known(value: Any) -> bool:
    """Whether it is an integer, or an array of them, whose value can be looked at at no cost."""
    return isinstance(value, (int, np.ndarray, np.generic))


def bounded(*terms: tuple[int, Any]) -> Any:
    """The sum of sign * value over pairs (sign, value), saturated to +-FAR: a Python integer, or int32."""
    if all(is_known(value) for _, value in terms):
        return _bounded_known(_exact_sum(terms))
    known = _exact_sum([term for term in terms if is_known(term[1])])
    values = tuple(_array(value) for _, value in terms if not is_known(value))
    signs = tuple(sign for sign, value in terms if not is_known(value))
    if isinstance(known, int):
        if not known and len(values) == 1 and np.can_cast(values[0].dtype, np.int32):
            return _run(_clipped, *values, sign=signs[0])
        return _run(_sum, *values, signs=signs, known=min(max(known, -(2**100)), 2**100))
    near = np.clip(known, -(2**100), 2**100).astype(np.float64)
    low = (known % 2**32).astype(np.uint32).view(np.int32)
    return _run(_sum, *values, low, near, signs=signs)


def settled(value: Any, axes: str) -> Any:
    """A leaf of integers, or a Python integer, as int32 within +-FAR; ids of positions keep their values.

    Ids that are not known and may need more than 32 bits stay as they are, as does what is no integer.
    """
    if isinstance(value, int):
        return value if isinstance(value, bool) or -FAR <= value <= FAR else bounded((1, value))
    if not hasattr(value, "dtype") or not jnp.issubdtype(value.dtype, jnp.integer):
        return value
    if not set(axes) & set("ts"):
        return bounded((1, value))
    (made,) = same_as_int32(value)
    return made[0] if len(made) == 1 and value.dtype != np.uint32 else value


def chunk_and_offset(size: Any, offset: Any, more: Any) -> tuple[Any, Any]:
    """A size and an offset within +-FAR, for which (q + offset) // size == k // size holds for the same q and k.

    Args:
      size, offset: as given; `more` is added to the offset.
    """
    made, start = bounded((1, size)), bounded((1, offset), (1, more))
    if isinstance(made, int) and made < FAR:
        return made, start
    # One chunk holds all keys. It ends so many queries after the first one:
    end = bounded((1, size), (-1, offset), (-1, more))
    if isinstance(made, int) and isinstance(start, int) and isinstance(end, int):
        return made, FAR - max(end, 0) if start >= 0 else start
    if all(map(is_known, (made, start, end))):
        far = np.where(np.asarray(start) >= 0, FAR - np.maximum(end, 0), start)
        return made, np.where(np.asarray(made) == FAR, far, start).astype(np.int32)
    return made, _run(_chunk_offset, *map(_array, (made, start, end)))


def stride_and_offset(name: str, stride: Any, offset: Any, more: Any) -> tuple[Any, Any]:
    """A stride and an offset in [0, FAR], for which (q + offset - k) % stride is 0 at the same positions q and k.

    Args:
      name: of the mask, for errors.
      stride, offset: as given; `more` is added to the offset.

    Raises:
      ValueError: a known number of more than 32 bits beside one that is not known.
    """
    if is_known(stride) and is_known(offset) and isinstance(more, int):
        pairs = np.broadcast(_exact(stride), _exact(offset))
        near = [_near_known(int(one), (int(other) + more) % int(one)) for one, other in pairs]
        plain = isinstance(stride, int) and isinstance(offset, int)
        return bounded((1, stride)), near[0] if plain else np.array(near, np.int32).reshape(pairs.shape)
    given = [_in_few_bits(name, field, x) for field, x in (("stride", stride), ("offset", offset))]
    return bounded((1, stride)), _run(_stride_offset, *given, _array(more))


def same_as_int32(*ids: Any) -> list[tuple[Any, ...]]:
    """Arrays of ids as tuples of int32: equal where the ids are, and below others, from the first on, where they are.

    The tuples hold one array, but for ids of more bits.
    """
    ids = tuple(x.astype(np.int32) if isinstance(x, np.ndarray) and fits(x) else x for x in ids)
    types = {np.dtype(x.dtype) for x in ids}
    if all(np.can_cast(dtype, np.int32) for dtype in types):
        return [(x if x.dtype == np.int32 else _run(_narrow, x),) for x in ids]
    if types == {np.dtype(np.uint32)}:
        return [(_run(_ordered, x),) for x in ids]
    signed = np.dtype(np.uint64) not in types
    return [_run(_words, x, signed=signed) for x in ids]


def compressed(*ids: np.ndarray) -> list[np.ndarray]:
    """Known ids as int32: themselves where they fit, else their ranks among all of them."""
    if all(fits(x) for x in ids):
        return [x.astype(np.int32) for x in ids]
    exact = [x.astype(object) for x in ids]
    _, ranks = np.unique(np.concatenate([x.reshape(-1) for x in exact]), return_inverse=True)
    parts = np.split(ranks.reshape(-1), np.cumsum([x.size for x in exact])[:-1])
    return [part.reshape(x.shape).astype(np.int32) for part, x in zip(parts, exact, strict=True)]


def fits(value: Any) -> bool:
    """Whether all of a known array are numbers of int32."""
    value, limits = np.asarray(value), np.iinfo(np.int32)
    return not value.size or bool(value.min() >= limits.min and value.max() <= limits.max)


def _exact(value: Any) -> Any:
    return value if isinstance(value, int) else np.asarray(value).astype(object)


def _exact_sum(terms: Any) -> Any:
    return sum((sign * _exact(value) for sign, value in terms), 0)


def _bounded_known(value: Any) -> Any:
    if isinstance(value, int):
        return min(max(value, -FAR), FAR)
    return np.asarray(np.clip(value, -FAR, FAR)).astype(np.int32)


def _near_known(stride: int, rest: int) -> int:
    """The offset for a stride of any size, which counts as FAR where it is more: then one key is met at most."""
    if stride <= FAR or rest < MOST_POSITIONS:
        return rest
    behind = stride - rest
    return FAR - behind if behind < MOST_POSITIONS else MOST_POSITIONS


def _in_few_bits(name: str, field: str, value: Any) -> Any:
    """An integer beside one that is traced, as an array."""
    if not is_known(value):
        return value
    if not fits(np.asarray(value)):
        raise ValueError(f"{name}: {field} must fit 32 bits where the other of stride and offset is traced.")
    return np.asarray(value).astype(np.int32)


def _array(value: Any) -> Any:
    if isinstance(value, int):
        return np.int32(value)
    return value if hasattr(value, "dtype") else jnp.asarray(value)  # a size that is a symbol


def _run(function: Callable[..., Any], *arrays: Any, **static: Any) -> Any:
    """Runs a function of arrays in one piece; of those that are only described, tells the type."""
    if any(isinstance(x, jax.ShapeDtypeStruct) for x in arrays):
        return jax.eval_shape(functools.partial(function, **static), *arrays)
    if not any(isinstance(x, Tracer) for x in arrays):  # a transfer that is asked for, as some users want them all
        arrays = tuple(jax.device_put(x) if isinstance(x, (np.ndarray, np.generic)) else x for x in arrays)
    return _compiled(function, tuple(sorted(static.items())))(*arrays)


@functools.cache
def _compiled(function: Callable[..., Any], static: tuple[tuple[str, Any], ...]) -> Callable[..., Any]:
    return jax.jit(functools.partial(function, **dict(static)), inline=True)


def _clipped(value: Any, *, sign: int) -> Any:
    return jnp.int32(sign) * jnp.clip(value.astype(jnp.int32), jnp.int32(-FAR), jnp.int32(FAR))


def _sum(*values: Any, signs: tuple[int, ...], known: int | None = None) -> Any:
    """What is added and known is a number, or the last two values: its last 32 bits, and about how much it is.

    The last 32 bits of a sum are exact, and so is the sum where a float tells that it fits them.
    """
    floating = jnp.float64 if any(value.dtype.itemsize == 8 for value in values[: len(signs)]) else jnp.float32
    if known is not None:
        values = (*values, np.array(known % 2**32, np.uint32).view(np.int32), np.float64(known))
    *parts, total, size = _same_rank(*values)
    size = size.astype(floating)
    for sign, value in zip(signs, parts, strict=True):
        total = total + jnp.int32(sign) * value.astype(jnp.int32)
        size = size + floating(sign) * value.astype(floating)
    total = jnp.clip(total, jnp.int32(-FAR), jnp.int32(FAR))
    beyond = floating(1.5 * FAR)
    return jnp.where(size > beyond, jnp.int32(FAR), jnp.where(size < -beyond, jnp.int32(-FAR), total))


def _chunk_offset(size: Any, start: Any, end: Any) -> Any:
    size, start, end = _same_rank(size, start, end)
    far, zero = jnp.int32(FAR), jnp.int32(0)
    last = far - jnp.maximum(end.astype(jnp.int32), zero)
    return jnp.where((size == far) & (start >= zero), last, start.astype(jnp.int32))


def _stride_offset(stride: Any, offset: Any, more: Any) -> Any:
    """The traced twin of `_near_known`, in unsigned integers: so no sum leaves its type."""
    unsigned = jnp.uint64 if max(stride.dtype.itemsize, offset.dtype.itemsize) == 8 else jnp.uint32
    stride, offset = _same_rank(stride, offset)
    number = lambda n: jnp.asarray(n, unsigned)
    size = stride.astype(unsigned)
    rest, added = _rest(offset, size), _rest(more, size)
    rest = jnp.where(rest >= size - added, rest - (size - added), rest + added)
    behind = size - rest
    far = jnp.where(behind < number(MOST_POSITIONS), number(FAR) - behind, number(MOST_POSITIONS))
    return jnp.where((size <= number(FAR)) | (rest < number(MOST_POSITIONS)), rest, far).astype(jnp.int32)


def _rest(value: Any, size: Any) -> Any:
    """value modulo size, at least 0: `size` is unsigned."""
    negative = value < jnp.zeros_like(value)
    distance = value.astype(size.dtype)
    distance = jnp.where(negative, jnp.zeros_like(distance) - distance, distance)
    rest = distance % size
    return jnp.where(negative & (rest != jnp.zeros_like(rest)), size - rest, rest)


def _narrow(ids: Any) -> Any:
    return ids.astype(jnp.int32)


def _words(ids: Any, *, signed: bool) -> tuple[Any, ...]:
    """Upper and lower 32 bits of 64, each as int32 in its order; where not `signed`, the sign in front."""
    low = ids.astype(jnp.int32)
    sign = high = low >> jnp.int32(31)
    if ids.dtype.itemsize == 8:
        high = (ids >> jnp.asarray(32, ids.dtype)).astype(jnp.int32)
        sign = high >> jnp.int32(31)
    elif np.issubdtype(ids.dtype, np.unsignedinteger):
        high = jnp.zeros_like(low)
    if signed:
        return high, _ordered(low)
    unsigned = np.issubdtype(ids.dtype, np.unsignedinteger)
    return jnp.zeros_like(sign) if unsigned else sign, _ordered(high), _ordered(low)


def _ordered(bits: Any) -> Any:
    """The bits of unsigned numbers as int32 in the same order."""
    return bits.astype(jnp.int32) ^ jnp.int32(-(2**31))


def _same_rank(*values: Any) -> list[Any]:
    rank = max(value.ndim for value in values)
    return [jnp.asarray(value).reshape((1,) * (rank - value.ndim) + tuple(value.shape)) for value in values]
