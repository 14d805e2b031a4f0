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
from jax.experimental.custom_partitioning import ArrayMapping, CompoundFactor, SdyShardingRule, custom_partitioning
from jax.extend.core import Primitive
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from attnjax.core.mesh_types import Names, Operand, without_mesh
from attnjax.core.program import Problem

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class _Share:
    """Which axes of the mesh divide each batch axis, and the heads."""

    batch: tuple[Names, ...]
    heads: Names
    key_heads: Names  # those of `heads`, or none where all query heads share one key/value head

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
        names = self.names(sizes, operand)
        return tuple(size // _count(mesh, n) for size, n in zip(operand.shape, names, strict=True))

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
    """
    sizes = problem.sizes
    # XLA asks `partition` for the program of a share; of the whole it needs the shapes.
    run = custom_partitioning(lambda *arrays: jax.tree.map(lambda r: jnp.zeros(r.shape, r.dtype), list(results)))

    def partition(mesh: Mesh, given: Any, made: Any) -> Any:
        share = _chosen(problem, arguments, [x.sharding for x in given], mesh)
        local = dataclasses.replace(
            sizes,
            batch=tuple(size // _count(mesh, names) for size, names in zip(sizes.batch, share.batch, strict=True)),
            heads=sizes.heads // _count(mesh, share.heads),
            key_heads=sizes.key_heads // _count(mesh, share.key_heads),
        )
        own = body(dataclasses.replace(problem, sizes=local), [share.local(sizes, r, mesh) for r in results])

        def lower(*arrays: Array) -> list[Array]:
            sums = (share.summed_over(sizes, r) for r in results)
            with without_mesh():
                made = own(*arrays)
            return [lax.psum(x, names) if names else x for x, names in zip(made, sums, strict=True)]

        place = lambda some: [NamedSharding(mesh, share.spec(sizes, x)) for x in some]
        return mesh, lower, place(results), tuple(place(arguments))

    run.def_partition(partition=partition, sharding_rule=lambda *_: _rule(problem, arguments, results))
    return run


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

    def first(places: list[tuple[int, int]], size: int) -> Names:
        for argument, axis in places:
            entry = specs[argument][axis] if axis < len(specs[argument]) else None
            names = entry if isinstance(entry, tuple) else (entry,) if isinstance(entry, str) else ()
            if names and not taken & set(names) and size % _count(mesh, names) == 0:
                taken.update(names)
                return names
        return ()

    batch = []
    for axis, size in enumerate(sizes.batch):
        places = [(i, axis) for i, a in enumerate(arguments) if a.shape[axis] > 1]
        batch.append(() if reads_batch and axis >= sizes.mapped else first(places, size))
    one = sizes.key_heads == 1
    places = [(i, n + a.axes.index("h")) for i, a in enumerate(arguments) if "h" in a.axes]
    places += [] if one else [(i, n + a.axes.index("k")) for i, a in enumerate(arguments) if "k" in a.axes]
    heads = () if reads_heads else first(places, sizes.heads if one else sizes.key_heads)
    return _Share(tuple(batch), heads, () if one else heads)


def _rule(problem: Problem, arguments: Sequence[Operand], results: Sequence[Operand]) -> SdyShardingRule:
    """Which axes of arguments and results belong together, for the propagation of shardings."""
    sizes, n = problem.sizes, len(problem.sizes.batch)
    reads_batch, reads_heads = problem.program.reads_index()
    whole: list[str] = []
    compound: dict[str, int] = {}

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
            elif letter == "k" or sizes.group == 1:
                names.append("k")
            elif sizes.key_heads == 1:
                names.append("g")
            else:
                names.append(CompoundFactor("k", "g"))
                compound["g"] = sizes.group
        return ArrayMapping(*names)

    mappings = [tuple(factors(x) for x in some) for some in (arguments, results)]
    return SdyShardingRule(*mappings, need_replication_factors=tuple(whole), **compound)


def _count(mesh: Mesh, names: Names) -> int:
    return math.prod(mesh.shape[name] for name in names)
