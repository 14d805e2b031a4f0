"""`Stack`: equal layers one after another, as a loop or a scan, with rematerialisation. Knows no particular layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from attnjax.cache import KVCache
from attnjax.nn.checks import check_rngs, check_size
from attnjax.nn.constants import Constant

Array = jax.Array
Make = Callable[[nnx.Rngs], Any]

_CHANGING = nnx.All(nnx.Variable, nnx.Not(nnx.Any(nnx.Param, Constant)))  # what a layer may leave changed behind


class Stack(nnx.Module):
    """Layers one after another, as one module.

    Args:
      make: gives a layer for `nnx.Rngs`; or a list of such functions, one for each layer, where layers differ.
      count: how many layers.
      scan: hold the parameters of all layers in one array each, `[layers, ...]`, and run the layers by
        `jax.lax.scan`: the program is compiled for one layer, whatever their number. Caches are then copied in every
        call, where a loop writes them in place: long generations are faster without.
      remat: compute each layer anew for its gradient, and keep what goes into it only; or a policy of
        `jax.checkpoint_policies` that says what else is kept, such as attention itself:
        `save_only_these_names("attention_out", "attention_lse")`. On CPUs this needs scan; XLA undoes it in a loop.
      rngs: `nnx.Rngs`.

    Attributes:
      layers: `nnx.List` of layers; with scan one layer whose parameters have the axis "layers" in front.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from attnjax.nn import EncoderBlock, Stack
      >>> stack = Stack(lambda rngs: EncoderBlock(64, 8, 256, rngs=rngs), 3, scan=True, remat=True, rngs=nnx.Rngs(0))
      >>> stack(jnp.ones((2, 16, 64))).shape
      (2, 16, 64)
    """

    def __init__(
        self, make: Make | Sequence[Make], count: int, *, scan: bool = False, remat: Any = False, rngs: nnx.Rngs
    ) -> None:
        check_size("Stack", "count", count)
        self.count, self.scan, self.remat = count, scan, remat
        if not callable(make) and len(make) != count:
            raise ValueError(f"attnjax.nn.Stack: make has {len(make)} functions and count is {count}.")
        if not scan:
            makes = [make] * count if callable(make) else make
            self.layers: Any = nnx.List([one(rngs) for one in makes])
        elif callable(make):
            metadata = {nnx.PARTITION_NAME: "layers"}
            made = nnx.vmap(make, in_axes=0, out_axes=0, transform_metadata=metadata)
            self.layers = nnx.split_rngs(splits=count)(made)(rngs)
        else:
            raise ValueError("attnjax.nn.Stack: layers that differ cannot be scanned: give one make, or no scan.")

    def __call__(
        self, x: Array, *args: Any, caches: Sequence[Any] | None = None, keys_values: Any = None, **options: Any
    ) -> Any:
        """Runs x through all layers.

        Args:
          x: what the first layer takes, `[*B, T, features]`.
          args, options: further arguments, the same for every layer; of `rngs`, each layer draws its own keys.
          caches: one cache for each layer, given to it as `cache`.
          keys_values: `keys_values(context)`, one pair for each layer.

        Returns:
          What the last layer gives; with caches a pair, the tuple of new caches behind it.

        Raises:
          ValueError: not one cache, or pair, for each layer.
        """
        own: dict[str, tuple[Any, ...]] = {}
        for name, argument, values in (("cache", "caches", caches), ("keys_values", "keys_values", keys_values)):
            if values is not None:
                if len(values) != self.count:
                    raise ValueError(
                        f"attnjax.nn.Stack: {argument} must have one entry for each of {self.count} layers, got "
                        f"{len(values)}."
                    )
                own[name] = tuple(values)
        check_rngs("Stack", options.get("rngs"))
        run = self._scanned if self.scan else self._looped
        x, new = run(x, args, own, options)
        return x if caches is None else (x, new)

    def keys_values(self, context: Array) -> tuple[Any, ...]:
        """What each layer's `keys_values(context)` gives, computed once for `keys_values=` of every call."""
        if not self.scan:
            return tuple(layer.keys_values(context) for layer in self.layers)
        graph, *states = nnx.split(self.layers, nnx.Param, nnx.Variable, ...)
        made = jax.vmap(lambda *states: nnx.merge(graph, *states).keys_values(context))(*states)
        return _unstacked(made, self.count)

    def create_caches(self, batch: int | tuple[int, ...], capacity: int, *, dtype: Any = None) -> tuple[Any, ...]:
        """An empty cache for each layer, by its `create_cache`."""
        layers = [self.layers] * self.count if self.scan else self.layers
        return tuple(layer.create_cache(batch, capacity, dtype=dtype) for layer in layers)

    def _looped(self, x: Array, args: Any, own: dict[str, tuple[Any, ...]], options: dict[str, Any]) -> Any:
        new = []
        for i, layer in enumerate(self.layers):
            mine = {name: values[i] for name, values in own.items()}
            if self.remat and "cache" not in mine:
                graph, *states = nnx.split(layer, nnx.Param, nnx.Variable, ...)
                run, random = _step(graph, args, options)
                (x, random), (_, changed, sown) = self._remat(run, prevent_cse=True)((x, random), (states, mine))
                _keep(layer, changed, sown)
                _advance(options, random)
            else:
                x = layer(x, *args, **mine, **options)
                if "cache" in mine:
                    x, cache = x
                    new.append(cache)
        return x, tuple(new)

    def _scanned(self, x: Array, args: Any, own: dict[str, tuple[Any, ...]], options: dict[str, Any]) -> Any:
        graph, *states = nnx.split(self.layers, nnx.Param, nnx.Variable, ...)
        for cache in own.get("cache", ()):
            if isinstance(cache, KVCache):  # within the scan nothing is known
                cache.check_room(x.shape[-2], options.get("lengths"))
        stacked = {name: jax.tree.map(lambda *leaves: jnp.stack(leaves), *values) for name, values in own.items()}
        step, random = _step(graph, args, options)
        if self.remat and "cache" not in own:
            step = self._remat(step, prevent_cse=False)  # a scan keeps the two apart by itself
        (x, random), (cache, changed, sown) = jax.lax.scan(step, (x, random), (states, stacked))
        _keep(self.layers, changed, sown)
        _advance(options, random)
        return x, _unstacked(cache, self.count) if "cache" in own else ()

    def _remat(self, step: Callable, *, prevent_cse: bool) -> Callable:
        policy: Any = self.remat if callable(self.remat) else None
        return jax.checkpoint(step, prevent_cse=prevent_cse, policy=policy)


def _step(graph: Any, args: Any, options: dict[str, Any]) -> tuple[Callable, Any]:
    """One layer as a function of arrays, and the state of the random streams in `options`, to begin with.

    From x, that state and (the layer's states, its own arguments) to x, the next state and what it leaves behind.
    """
    streams, random = (None, None) if options.get("rngs") is None else nnx.split(options["rngs"])

    def step(carry: Any, given: Any) -> Any:
        (x, random), (states, mine) = carry, given
        layer, own = nnx.merge(graph, *states), dict(options)
        if streams is not None:
            own["rngs"] = nnx.merge(streams, random)
        x = layer(x, *args, **mine, **own)
        x, cache = x if "cache" in mine else (x, None)
        sown = nnx.pop(layer, lambda path, leaf: isinstance(leaf, nnx.Intermediate) and "__captures__" not in path)
        random = None if streams is None else nnx.state(own["rngs"])
        return (x, random), (cache, nnx.state(layer, _CHANGING), sown)

    return step, random


def _advance(options: dict[str, Any], random: Any) -> None:
    """Counts what was drawn from the random streams in `options`."""
    if random is not None:
        nnx.update(options["rngs"], random)


def _keep(layer: Any, changed: Any, sown: Any) -> None:
    """Writes back what a step left behind: counters of random streams, and what was sown."""
    nnx.update(layer, changed)
    for path, variable in nnx.to_flat_state(sown):
        *outer, name = path
        owner: Any = layer
        for part in outer:
            owner = owner[part] if isinstance(part, int) else getattr(owner, str(part))
        setattr(owner, str(name), variable)


def _unstacked(tree: Any, count: int) -> tuple[Any, ...]:
    leaves, structure = jax.tree.flatten(tree)
    return tuple(structure.unflatten([leaf[i] for leaf in leaves]) for i in range(count))
