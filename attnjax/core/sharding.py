"""How attention is divided over devices under `jit`: by batch entry and by head, each device its own share.

XLA does not know that a kernel's batch entries and heads do not depend on each other, nor that a loop over blocks runs
the same for each. `shared_out` tells it, so that inputs that lie divided over devices stay where they are. Positions
are not divided here: queries, or keys, on several devices need more than one pass. Computes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax._src.dispatch import prim_requires_devices_during_lowering  # has no public name
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnjax.core.context import in_64_bits, own_settings
from attnjax.core.mesh_types import Names, Operand
from attnjax.core.program import Problem

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Share:
    """Which axes of the mesh divide each batch axis, and the heads."""

    batch: tuple[Names, ...]
    heads: Names
    key_heads: Names  # those of `heads`, or none where there are more devices than key/value heads

    def names(self, sizes: Any, operand: Operand) -> list[Names]:
        """The mesh axes that divide each axis of an array."""
        n = len(sizes.batch)
        found = [names if size > 1 else () for names, size in zip(self.batch, operand.shape[:n], strict=True)]
        by_letter = {"h": (self.heads, sizes.heads), "k": (self.key_heads, sizes.key_heads)}
        for letter, size in zip(operand.axes, operand.shape[n:], strict=True):
            names, full = by_letter.get(letter, ((), 0))
            found.append(names if size == full and size > 1 else ())
        return found

    def spec(self, sizes: Any, operand: Operand) -> PartitionSpec:
        return PartitionSpec(*(names or None for names in self.names(sizes, operand)))

    def local(self, sizes: Any, operand: Operand, mesh: Mesh) -> tuple[int, ...]:
        """The shape of a device's share."""
        letters = "b" * len(sizes.batch) + operand.axes
        whole = (1 if self.picks(sizes, x) else size for x, size in zip(letters, operand.shape, strict=True))
        return tuple(size // _count(mesh, n) for size, n in zip(whole, self.names(sizes, operand), strict=True))

    def picks(self, sizes: Any, letter: str) -> bool:
        """Whether each device needs one of the key/value heads that it is given."""
        return letter == "k" and bool(self.heads) and not self.key_heads and sizes.key_heads > 1

    def picked(self, x: Array, sizes: Any, operand: Operand, mesh: Mesh) -> Array:
        """What a device needs of what it is given: the key/value head of its query heads."""
        for axis, letter in enumerate(operand.axes, len(sizes.batch)):
            if self.picks(sizes, letter):
                x = lax.dynamic_slice_in_dim(x, self._own_head(sizes, mesh), 1, axis)
        return x

    def put_back(self, x: Array, sizes: Any, operand: Operand, mesh: Mesh) -> Array:
        """The reverse, for a result: 0 for the heads of other devices."""
        for axis, letter in enumerate(operand.axes, len(sizes.batch)):
            if self.picks(sizes, letter):
                shape = [sizes.key_heads if i == axis else size for i, size in enumerate(x.shape)]
                whole = jnp.zeros(shape, x.dtype)
                x = lax.dynamic_update_slice_in_dim(whole, x, self._own_head(sizes, mesh), axis)
        return x

    def _own_head(self, sizes: Any, mesh: Mesh) -> Array:
        return lax.axis_index(self.heads) * sizes.key_heads // _count(mesh, self.heads)

    def summed_over(self, sizes: Any, operand: Operand) -> Names:
        """The mesh axes that divide the work and not this result, which is a sum over them."""
        own = {name for names in self.names(sizes, operand) for name in names}
        work = [name for names in (*self.batch, self.heads) for name in names]
        return tuple(name for name in work if name not in own)


def shared_out(
    body: Callable[[Problem, list[tuple[int, ...]]], Callable[..., list[Array]]],
    problem: Problem,
    arguments: Sequence[Operand],
    results: Sequence[Operand],
) -> Callable[..., list[Array]]:
    """A function of the arguments that every device runs on its own share of them.

    Args:
      body: (problem, shapes of the results) -> function of the arguments, for the whole problem and for a share.
      arguments, results: what goes in and comes out; results that lack an axis of the work are sums over it.

    Raises:
      NotImplementedError: a mask or score calls Python.
    """
    if problem.program.holds_code():
        _check_calls(jax.make_jaxpr(body(problem, [r.shape for r in results]))(*arguments).jaxpr)
    sizes, wide = problem.sizes, in_64_bits()
    # XLA asks `partition` for the program of a share; of the whole it needs the shapes.
    run = custom_partitioning(lambda *arrays: jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), list(results)))

    def partition(mesh: Mesh, given: Any, made: Any) -> Any:
        share = _chosen(problem, arguments, [x.sharding for x in given], mesh)
        local = dataclasses.replace(
            sizes,
            batch=tuple(size // _count(mesh, names) for size, names in zip(sizes.batch, share.batch, strict=True)),
            heads=sizes.heads // _count(mesh, share.heads),
            key_heads=1 if share.picks(sizes, "k") else sizes.key_heads // _count(mesh, share.key_heads),
        )
        own = body(dataclasses.replace(problem, sizes=local), [share.local(sizes, r, mesh) for r in results])

        def lower(*arrays: Array) -> list[Array]:
            sums = (share.summed_over(sizes, r) for r in results)
            with own_settings(wide=wide):  # XLA asks on a thread that knows of none
                needed = [share.picked(x, sizes, a, mesh) for x, a in zip(arrays, arguments, strict=True)]
                made = [share.put_back(x, sizes, r, mesh) for x, r in zip(own(*needed), results, strict=True)]
                return [lax.psum(x, names) if names else x for x, names in zip(made, sums, strict=True)]

        place = lambda some: [NamedSharding(mesh, share.spec(sizes, x)) for x in some]
        return mesh, lower, place(results), tuple(place(arguments))

    run.def_partition(partition=partition, sharding_rule=lambda *_: _rule(problem, arguments, results))
    return run


def _check_calls(jaxpr: Any) -> None:
    """Whether a program stays on its devices: XLA loses the Python functions that a share of a program calls."""
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name.endswith("callback") or name == "debug_print":
            raise NotImplementedError(
                f"a mask or score calls Python ({name}), which cannot be divided over devices: call attention inside "
                "jax.shard_map, or give a mask or score that computes with jax.numpy alone."
            )
        for value in jax.tree.leaves(equation.params):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                _check_calls(inner)


def tell_devices(primitive: Primitive) -> None:
    """Asks JAX to tell, when this primitive is lowered, for which devices that is done."""
    prim_requires_devices_during_lowering.add(primitive)


def compiled_for_several(context: Any) -> bool:
    """Whether a program being lowered is for several devices, over which XLA divides it (not `jax.shard_map`)."""
    axes = context.module_context.axis_context
    manual = getattr(axes, "manual_axes", None)
    if manual is not None:
        return set(manual) != set(axes.mesh.axis_names)
    return getattr(axes, "num_devices", 1) > 1


def _chosen(problem: Problem, arguments: Sequence[Operand], shardings: Sequence[Any], mesh: Mesh) -> _Share:
    """How the arguments lie already, where the work can be divided so; the first argument that is divided decides."""
    sizes, n = problem.sizes, len(problem.sizes.batch)
    reads_batch, reads_heads = problem.program.reads_index()
    specs = [s.spec if isinstance(s, NamedSharding) else PartitionSpec() for s in shardings]
    taken: set[str] = set()

    def first(places: list[tuple[int, int]], fits: Callable[[int], bool]) -> Names:
        for argument, axis in places:
            entry = specs[argument][axis] if axis < len(specs[argument]) else None
            names = entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else ()
            if names and not taken & set(names) and fits(_count(mesh, names)):
                taken.update(names)
                return names
        return ()

    batch = []
    for axis, size in enumerate(sizes.batch):
        places = [(i, axis) for i, a in enumerate(arguments) if a.shape[axis] > 1]
        fits = lambda count, size=size: size % count == 0
        batch.append(() if reads_batch and axis >= sizes.mapped else first(places, fits))
    whole = lambda count: sizes.key_heads % count == 0  # key heads on each device
    parts = lambda count: count % sizes.key_heads == 0 and sizes.heads % count == 0  # devices for each key head
    places = [(i, n + a.axes.index(x)) for x in "hk" for i, a in enumerate(arguments) if x in a.axes]
    heads = () if reads_heads else first(places, lambda count: whole(count) or parts(count))
    return _Share(tuple(batch), heads, heads if whole(_count(mesh, heads)) else ())


def _rule(problem: Problem, arguments: Sequence[Operand], results: Sequence[Operand]) -> SdyShardingRule:
    """Which axes of arguments and results belong together, for the propagation of shardings."""
    sizes, n = problem.sizes, len(problem.sizes.batch)
    reads_batch, reads_heads = problem.program.reads_index()
    whole: list[str] = []

    def alone() -> str:
        whole.append(f"x{len(whole)}")
        return whole[-1]

    def factors(operand: Operand) -> ArrayMapping:
        names: list[Any] = []
        for axis, size in enumerate(operand.shape[:n]):
            names.append(f"b{axis}" if size > 1 and not (reads_batch and axis >= sizes.mapped) else alone())
        for letter, size in zip(operand.axes, operand.shape[n:], strict=True):
            full = {"h": sizes.heads, "k": sizes.key_heads}.get(letter, 0)
            if size != full or size == 1 or reads_heads:
                names.append(alone())
            else:  # not bound together: more devices than key heads may divide the query heads
                names.append(letter if sizes.group > 1 else "k")
        return ArrayMapping(*names)

    mappings = [tuple(factors(x) for x in some) for some in (arguments, results)]
    return SdyShardingRule(*mappings, need_replication_factors=tuple(whole))


def _count(mesh: Mesh, names: Names) -> int:
    return math.prod(mesh.shape[name] for name in names)
