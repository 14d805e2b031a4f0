"""What the types of arrays say of devices: how results of attention lie divided over a mesh. Divides nothing itself.

On a mesh with Explicit axes a type tells over which of them each axis of an array is divided; inside `jax.shard_map`,
over which of them it varies. On Auto axes types say nothing, and XLA decides (`core.sharding`).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax import lax
from jax.core import ShapedArray
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Array = jax.Array
Names = tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Operand:
    """An argument or result: its axes in operand form, its shape and type."""

    axes: str
    shape: tuple[int, ...]
    dtype: Any


def vary_together(arrays: Sequence[Array]) -> list[Array]:
    """The arrays, each of them varying over the mesh axes that any of them varies over, inside `jax.shard_map`.

    What devices share gets a gradient that is summed over them: that is the transpose of this.
    """
    every = frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))
    missing = [tuple(every - jax.typeof(x).mat.varying) for x in arrays]
    return [lax.pcast(x, names, to="varying") if names else x for x, names in zip(arrays, missing, strict=True)]


def result_types(
    sizes: Any, axes: Sequence[str], avals: Sequence[Any], results: Sequence[Operand], likes: Sequence[Any] = ()
) -> list[ShapedArray]:
    """The types of results of arguments with these axes and types.

    Results are divided by batch entry and head as the first argument is that is so divided, the query before others.

    Args:
      sizes: those of the problem (`core.tiles.Sizes`).
      likes: types that the results follow first, in the axes in which they have the same size: of a gradient, the type
        of what it is the gradient of.
    """
    typed = next((a for a in avals if a.mat.varying), None) or next((a for a in avals if _is_explicit(a)), None)
    if typed is None:
        return [ShapedArray(r.shape, r.dtype) for r in results]
    batch, by_letter = _divided(sizes, axes, avals)

    def spec(result: Operand, like: Any) -> PartitionSpec:
        n = len(sizes.batch)
        names = [batch[i] if size > 1 else () for i, size in enumerate(result.shape[:n])]
        for letter, size in zip(result.axes, result.shape[n:], strict=True):
            known, full = by_letter.get(letter, ((), 0))
            names.append(known if size == full and size > 1 else ())
        if like is not None:
            own = [names_of(like, i) if like.shape[i] == size else None for i, size in enumerate(result.shape)]
            taken = {name for some in own for name in some or ()}
            names = [a if b is None and not taken & set(a) else b or () for a, b in zip(names, own, strict=True)]
        return _spec(names)

    likes = likes or [None] * len(results)
    place = lambda r, like: NamedSharding(typed.sharding.mesh, spec(r, like))
    change = lambda r, like: dict(shape=r.shape, dtype=r.dtype, weak_type=False, sharding=place(r, like))
    return [typed.update(**change(r, like)) for r, like in zip(results, likes, strict=True)]


def placed_as(x: Array, aval: Any) -> Array:
    """The array, divided as the type says."""
    if not _is_explicit(aval) or jax.typeof(x).sharding == aval.sharding:
        return x
    return jax.sharding.reshard(x, aval.sharding)


def divided_as(x: Array, like: Array) -> Array:
    """The array, with each axis divided as the same axis of the other, where that one is divided and has it."""
    own, other = jax.typeof(x), jax.typeof(like)
    if not _is_explicit(other):
        return x
    names = [names_of(other, i) if i < other.ndim and names_of(other, i) else names_of(own, i) for i in range(own.ndim)]
    return jax.sharding.reshard(x, _placed(other, names))


def gathered(x: Array) -> Array:
    """The array, whole on each device."""
    aval = jax.typeof(x)
    return jax.sharding.reshard(x, _placed(aval, [()] * aval.ndim)) if _is_explicit(aval) else x


def division(names: Callable[..., Sequence[Names]], *arrays: Array) -> NamedSharding | None:
    """How a result of these arrays is to lie; `None` where no type says anything of devices.

    Args:
      names: types of the arrays -> for each axis of the result the axes of the mesh. What is named twice counts once.
    """
    avals = [jax.typeof(x) for x in arrays]
    typed = next((a for a in avals if _is_explicit(a)), None)
    return None if typed is None else _placed(typed, names(*avals))


def with_auto_axes(function: Callable[..., Array], names: Callable[..., Sequence[Names]], *arrays: Array) -> Array:
    """function(*arrays) with Auto axes: XLA decides what moves. The result is divided as `names` says (`division`)."""
    place = division(names, *arrays)
    return function(*arrays) if place is None else _automatic(function, place)(*arrays)


def untyped(function: Callable[..., list[Array]], likes: Sequence[Any]) -> Callable[..., list[Array]]:
    """The function, with Auto axes inside: its code may reshape what is divided. Results have the types `likes`."""
    if not any(_is_explicit(aval) for aval in likes):
        return function
    return _automatic(function, [aval.sharding for aval in likes])


def _automatic(function: Callable, places: Any) -> Any:
    mesh = jax.tree.leaves(places)[0].mesh
    explicit = tuple(n for n, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == AxisType.Explicit)
    return jax.sharding.auto_axes(function, axes=explicit, out_sharding=places)


def check_positions(axes: Sequence[str], avals: Sequence[Any], n: int, name_of: Any) -> None:
    """Whether the types divide no argument but by batch entry and head.

    Raises:
      ValueError: one of them is divided along positions, or along the numbers of a head.
    """
    for i, (own, aval) in enumerate(zip(axes, avals, strict=True)):
        along = [(axis, letter) for axis, letter in enumerate(own, n) if letter not in "hk" and names_of(aval, axis)]
        if not along or not _is_explicit(aval):
            continue
        axis, letter = along[0]
        whole = [None if (a, x) in along else names_of(aval, a) for a, x in enumerate("b" * n + own)]
        mesh = " and ".join(names_of(aval, axis))
        where = "an axis that every pair may read" if letter == "." and i > 2 else _ALONG[letter]
        spec = _spec(whole) if any(whole) else "P()"
        raise ValueError(
            f"{name_of(i)} {aval.str_short()} is divided along {where}, over {mesh} of the mesh. Attention is "
            f"divided by batch entry and head. Gather it, jax.sharding.reshard({name_of(i)}, {spec}), or call "
            "attention inside jax.shard_map on parts; attnjax.merge puts parts of the keys together."
        )


def _placed(typed: Any, names: Sequence[Names]) -> NamedSharding:
    taken: set[str] = set()
    once = []
    for some in names:
        once.append(() if taken & set(some) else some)
        taken.update(once[-1])
    return NamedSharding(typed.sharding.mesh, _spec(once))


def _spec(names: Sequence[Names | None]) -> PartitionSpec:
    short = [some[0] if some and len(some) == 1 else some or None for some in names]
    return PartitionSpec(*short)


_ALONG = {"t": "the queries", "s": "the keys", ".": "the numbers of a head"}


def names_of(aval: Any, axis: int) -> Names:
    """The mesh axes over which a type says that this axis is divided."""
    spec = aval.sharding.spec
    entry = spec[axis] if axis < len(spec) else None
    return entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else ()


def _is_explicit(aval: Any) -> bool:
    return AxisType.Explicit in aval.sharding.mesh.axis_types


def _divided(sizes: Any, axes: Sequence[str], avals: Sequence[Any]) -> tuple[list[Names], dict[str, tuple[Names, int]]]:
    """The mesh axes that divide each batch axis, and by letter those that divide the heads and how many there are."""
    n = len(sizes.batch)
    taken: set[str] = set()

    def first(places: list[tuple[Any, int]]) -> Names:
        found = (names_of(aval, axis) for aval, axis in places)
        return next((names for names in found if names and not taken & set(names)), ())

    batch = []
    for axis in range(n):
        batch.append(first([(aval, axis) for aval in avals if aval.shape[axis] > 1]))
        taken.update(batch[-1])
    given = list(zip(axes, avals, strict=True))
    of = lambda letter: [(aval, n + own.index(letter)) for own, aval in given if letter in own]
    heads, key_heads = first(of("h")), first(of("k"))
    if not heads and sizes.key_heads > 1:
        heads = key_heads
    if given and not key_heads and heads:
        mesh = next(a for a in avals if _is_explicit(a)).sharding.mesh
        key_heads = heads if sizes.key_heads % math.prod(mesh.shape[name] for name in heads) == 0 else ()
    return batch, {"h": (heads, sizes.heads), "k": (key_heads, sizes.key_heads)}
