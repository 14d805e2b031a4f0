"""Checks of what a user passes, and the wording of their errors. Shapes and types only; values are never read."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from attnjax.core.integers import compressed, fits
from attnjax.core.node import Node, describe, is_array
from attnjax.core.symbolic import is_known

Array = jax.Array


def check_arrays(query: Any, key: Any, value: Any) -> None:
    """Query [*B, T, N, H], key [*B, S, K, H], value [*B, S, K, V]: types, ranks and sizes.

    Raises:
      TypeError: not arrays, not of one floating-point type.
      ValueError: sizes that do not fit.
    """
    named = {"query": query, "key": key, "value": value}
    for name, x in named.items():
        if not is_array(x):
            raise TypeError(f"{name} must be an array, got {type(x).__name__}.")
        if not jnp.issubdtype(x.dtype, jnp.floating) or jnp.finfo(x.dtype).bits < 16:
            raise TypeError(
                f"{name} must be float64, float32, bfloat16 or float16, got {x.dtype}: convert it with "
                f"{name}.astype(jnp.float32)."
            )
    _check_symbols(named)
    context = " ".join(f"{name} {_dims(x.shape)}," for name, x in named.items())[:-1] + "."
    if len({np.dtype(x.dtype) for x in named.values()}) > 1:
        types = ", ".join(f"{name} {np.dtype(x.dtype).name}" for name, x in named.items())
        raise TypeError(f"query, key and value must have one dtype, got {types}: convert them with .astype.")
    for name, x in named.items():
        if x.ndim < 3:
            raise ValueError(f"{name} must have at least 3 axes, [*B, length, heads, size], got {x.ndim}. {context}")
    import chex  # takes as long to import as all of attnjax, and is needed at the first call only

    rule = "query [*B, T, N, H], key [*B, S, K, H], value [*B, S, K, V]"
    try:
        chex.assert_equal_rank([query, key, value])
        chex.assert_equal_shape_prefix([query, key, value], query.ndim - 3)
        chex.assert_equal_shape_prefix([key, value], key.ndim - 1)
        chex.assert_equal(query.shape[-1], key.shape[-1])
    except AssertionError:
        raise ValueError(f"{_mismatch(query.shape, key.shape, value.shape)} Expected {rule}; got {context}") from None
    heads, key_heads = query.shape[-2], key.shape[-2]
    if heads == 0 or key_heads == 0:
        raise ValueError(f"query and key need at least one head. {context}")
    if heads % key_heads:
        raise ValueError(
            f"query has {heads} heads and key has {key_heads}: the number of query heads must be a multiple of "
            f"key/value heads. {context}"
        )
    if query.shape[-1] == 0:
        raise ValueError(f"query and key need a head size of at least 1. {context}")


def _check_symbols(named: dict[str, Any]) -> None:
    """Sizes may be symbols of `jax.export` where they count batch entries or positions, and are at least 1."""
    for name, x in named.items():
        for axis, size in enumerate(x.shape):
            if is_known(size):
                continue
            what = f"{name} {_dims(x.shape)}: {size}"
            if axis - x.ndim >= -2:
                raise ValueError(
                    f"{what} is a symbol where the number of heads or their size stands: those must be known; batch "
                    "axes and lengths may be symbols."
                )
            try:
                least = size >= 1
            except Exception as error:  # JAX's has no public name
                if "inconclusive" not in str(error):
                    raise
                least = False
            if not least:
                raise ValueError(
                    f"{what} may be 0, and sizes that are symbols must be at least 1: say so with "
                    f'jax.export.symbolic_shape(..., constraints=["{size} >= 1"]).'
                )


def _mismatch(q: tuple[int, ...], k: tuple[int, ...], v: tuple[int, ...]) -> str:
    """The first rule that the shapes break, in words."""
    if not len(q) == len(k) == len(v):
        return f"query, key and value have {len(q)}, {len(k)} and {len(v)} axes: they must have equally many."
    if not q[:-3] == k[:-3] == v[:-3]:
        return (
            f"query, key and value have batch axes {_dims(q[:-3])}, {_dims(k[:-3])} and {_dims(v[:-3])}: they must be "
            "equal (use jax.vmap to share one of them)."
        )
    if k[-3] != v[-3]:
        return f"key has {k[-3]} positions and value has {v[-3]}: they must have equally many (S)."
    if k[-2] != v[-2]:
        return f"key has {k[-2]} heads and value has {v[-2]}: they must have equally many (K)."
    return f"query has head size {q[-1]} and key has {k[-1]}: they must be equal (H)."


def check_leaves(node: Node, argument: str, batch: tuple[int, ...], sizes: dict[str, int]) -> None:
    """Every array of a mask or score must broadcast to `[*B]` and its own axes.

    Args:
      node: the mask or score; `argument` is the name under which the user passed it.
      batch: B; sizes: T, S and N by the letters t, s, h.

    Raises:
      ValueError: an array that does not fit.
    """
    for part in node.nodes():
        for name, leaf, axes in part.own_operands():
            _check_leaf(f"{argument}: {name}", leaf, axes, not part.broadcasts, batch, sizes)


def _check_leaf(name: str, leaf: Any, axes: str, exact: bool, batch: tuple[int, ...], sizes: dict[str, int]) -> None:
    own = [sizes.get(a) for a in axes]
    shape = tuple(leaf.shape)
    least = len(axes) if exact else 0
    full = (*batch, *own)
    fits = least <= len(shape) <= len(full)
    is_own = [True] * len(own) + [False] * len(batch)
    for have, want, mine in zip(reversed(shape), reversed(full), is_own, strict=False):
        fits = fits and (want is None or have == want or (have == 1 and not (mine and exact)))
    if fits:
        return
    letters = [{"t": "T", "s": "S", "h": "N", ".": "*"}[a] for a in axes]
    known = "".join(f", {letter} = {n}" for letter, n in zip(letters, own, strict=True) if n is not None)
    wanted = f"[{', '.join(['*B', *letters])}]{' (any *B may be left out)' if exact else ''}"
    raise ValueError(
        f"{name} is {describe(leaf)} and must {'have shape' if exact else 'broadcast to'} {wanted}, with *B = "
        f"{_dims(batch)}{known}."
    )


def check_static_lengths(node: Node, argument: str, query_length: int, key_length: int) -> None:
    """Lengths (`limits` of a class) must not reach beyond the sequence, where their values are known.

    Raises:
      ValueError: a known length that is larger than T or S.
    """
    for part in node.nodes():
        for name, letter in part.limits.items():
            value = getattr(part, name)
            if value is None or isinstance(value, (Tracer, jax.ShapeDtypeStruct)):
                continue
            largest, limit = np.max(np.asarray(value), initial=0), {"t": query_length, "s": key_length}[letter]
            if is_known(limit) and largest > limit:
                beyond = f"beyond {letter.upper()} = {limit}"
                raise ValueError(f"{argument}: {type(part).__name__}.{name} is {largest}, {beyond}.")


def check_integer(node: str, name: str, value: Any, least: int | None = None) -> Any:
    """An integer, or an array of integers; where its values are known, none below `least`. NumPy's become int32.

    Raises:
      TypeError, ValueError: anything else.
    """
    if isinstance(value, bool) or not (isinstance(value, int) or is_array(value)):
        raise TypeError(f"{node}: {name} must be an integer or an integer array, got {value!r}.")
    if is_array(value) and not jnp.issubdtype(value.dtype, jnp.integer):
        raise TypeError(f"{node}: {name} must be integers, got {describe(value)}.")
    known = None if isinstance(value, (Tracer, jax.ShapeDtypeStruct)) else np.asarray(value)
    if least is not None and known is not None and known.size and known.min() < least:
        raise ValueError(f"{node}: {name} must be at least {least}, got {known.min()}.")
    if not isinstance(value, (np.ndarray, np.generic)):
        return value
    if fits(value):
        return value.astype(np.int32)
    if not value.ndim:  # a Python integer may have any size
        return value.item()
    raise ValueError(f"{node}: {name} must fit 32 bits, got {describe(value)} with values beyond.")


def check_integers(node: str, names: Sequence[str], values: Sequence[Any]) -> list[Any]:
    """Arrays of integers that are compared with each other. Known ones become int32, by rank where they do not fit.

    Raises:
      TypeError: anything else.
      ValueError: known ones that do not fit 32 bits beside some that are not known.
    """
    values = [np.asarray(value) if isinstance(value, (list, tuple)) else value for value in values]
    for name, value in zip(names, values, strict=True):
        if not is_array(value) or not jnp.issubdtype(value.dtype, jnp.integer):
            raise TypeError(f"{node}: {name} must be an array of integers, got {describe(value)}.")
    if all(isinstance(value, (np.ndarray, np.generic)) for value in values):
        return compressed(*map(np.asarray, values))
    for name, value in zip(names, values, strict=True):
        if isinstance(value, (np.ndarray, np.generic)) and not fits(value):
            raise ValueError(f"{node}: {name} must fit 32 bits where the others are not known, got {describe(value)}.")
    known = lambda value: isinstance(value, (np.ndarray, np.generic))
    return [value.astype(np.int32) if known(value) else value for value in values]


def check_count(name: str, value: Any, least: int = 1) -> int:
    """An integer of at least `least`, as Python's.

    Raises:
      ValueError: anything else.
    """
    number = number_of(value)
    if not isinstance(number, int) or number < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}.")
    return number


def check_rate(name: str, value: Any) -> float:
    """A number in [0, 1), as Python's.

    Raises:
      ValueError: anything else.
    """
    number = number_of(value)
    if number is None or not 0 <= number < 1:
        raise ValueError(f"{name} must be a number in [0, 1), got {value!r}.")
    return number


def check_scale(scale: Any, heads: int, batch: tuple[int, ...]) -> Any:
    """The factor of logits: a Python number where one is known, else floats `[]`, `[N]` or `[*B, N]`.

    Raises:
      TypeError, ValueError: anything else.
    """
    if scale is None:
        return None
    known = number_of(scale)
    if known is not None:
        if not math.isfinite(known):
            raise ValueError(f"scale must be finite, got {known}.")
        return float(known)
    if not is_array(scale) or not jnp.issubdtype(scale.dtype, jnp.floating):
        raise TypeError(f"scale must be a number or an array of floats, got {_kind(scale)}.")
    if not broadcasts(tuple(scale.shape), (*batch, heads)):
        raise ValueError(
            f"scale is {describe(scale)} and must be a number, or broadcast to [*B, N] with *B = {_dims(batch)} and "
            f"N = {heads}, one for each query head."
        )
    return scale


def number_of(value: Any) -> int | float | None:
    """The number that a Python, numpy or JAX scalar is, as Python's; `None` for anything else, and while it is traced.

    Booleans are no numbers.
    """
    if isinstance(value, (bool, Tracer)):
        return None
    if isinstance(value, (int, float)):
        return value
    if not isinstance(value, (np.number, np.ndarray, jax.Array)) or value.ndim:
        return None
    if jnp.issubdtype(value.dtype, jnp.integer):
        return int(value)
    return float(value) if jnp.issubdtype(value.dtype, jnp.floating) else None


def check_sinks(sinks: Any, heads: int, batch: tuple[int, ...]) -> None:
    """Floats `[N]`, or `[*B, N]`.

    Raises:
      TypeError, ValueError: anything else.
    """
    if sinks is None:
        return
    if not is_array(sinks) or not jnp.issubdtype(sinks.dtype, jnp.floating):
        raise TypeError(f"sinks must be an array of floats [N], got {_kind(sinks)}.")
    if sinks.ndim < 1 or sinks.shape[-1] != heads or not broadcasts(sinks.shape[:-1], batch):
        raise ValueError(f"sinks is {describe(sinks)} and must be [N] with N = {heads}, one per query head.")


def broadcasts(shape: tuple[int, ...], to: tuple[int, ...]) -> bool:
    return len(shape) <= len(to) and all(a in (1, b) for a, b in zip(reversed(shape), reversed(to), strict=False))


def _kind(value: Any) -> str:
    return describe(value) if is_array(value) else f"{type(value).__name__} {value!r}"


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"
