"""What modules hold, by name, and how it fits what a checkpoint holds. Reads and writes no files."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import spmd
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec, Sharding

Facts = dict[str, Any]  # of one leaf in a checkpoint: "value" of a number; "shape", "dtype" and "crc32" of an array


class Leaf(NamedTuple):
    """What a variable holds in one place: an array, a number of Python or a text; with `nnx.eval_shape`, a shape."""

    value: Any
    variable: Any

    @property
    def plain(self) -> bool:
        return isinstance(self.value, (bool, int, float, str))

    @property
    def abstract(self) -> bool:
        return isinstance(self.value, jax.ShapeDtypeStruct)

    @property
    def key(self) -> bool:
        return not self.plain and jnp.issubdtype(self.value.dtype, jax.dtypes.prng_key)

    @property
    def free(self) -> bool:
        """Whether it may stay as it is: a stream of random numbers, which another checkpoint need not have."""
        return isinstance(self.variable, nnx.RngState) and not self.abstract

    def facts(self) -> Facts:
        if self.plain:
            return {"value": self.value}
        return {"shape": list(self.value.shape), "dtype": str(self.value.dtype)}

    def data(self) -> Any:
        """What is written: arrays as they are, PRNG keys as their integers."""
        return jax.random.key_data(self.value) if self.key else self.value

    def sharding(self) -> Sharding | None:
        """Where it lies, or is to lie: that of a shape, or as it would be made by the rules and the mesh that are set.

        `None` is numpy's memory.
        """
        if isinstance(self.value, (np.ndarray, np.generic)):
            return None
        given = None if self.plain else self.value.sharding if self.abstract else self.data().sharding
        mesh = jax.sharding.get_mesh()
        if given is None and not mesh.empty and spmd.get_logical_axis_rules():
            spec = nnx.get_partition_spec({"": self.variable})[""].get_value()
            given = NamedSharding(mesh, spec) if isinstance(spec, PartitionSpec) else None
        if isinstance(given, NamedSharding) and isinstance(given.mesh, AbstractMesh):
            given = NamedSharding(mesh, given.spec)
        return jnp.zeros(()).sharding if given is None else given

    def placed(self, x: Any) -> Any:
        place = self.sharding()
        return np.asarray(x) if place is None else jax.device_put(x, place)


class Source(NamedTuple):
    """Where a leaf comes from: an array of that name, one layer of an array of all, or the arrays of all layers."""

    names: tuple[str, ...]
    layer: int | None = None
    stacked: bool = False

    def facts(self, stored: dict[str, Facts]) -> Facts:
        """Of what it gives."""
        first = stored[self.names[0]]
        if self.stacked:
            return {"shape": [len(self.names), *first["shape"]], "dtype": first["dtype"]}
        return first if self.layer is None else {"shape": first["shape"][1:], "dtype": first["dtype"]}

    def like(self, leaf: Leaf, stored: dict[str, Facts]) -> dict[str, jax.ShapeDtypeStruct]:
        """The arrays to read, as they are stored, each where its part of the leaf is to lie."""
        facts, place = stored[self.names[0]], leaf.sharding()
        shape, dtype = tuple(facts["shape"]), "uint32" if leaf.key else facts["dtype"]
        if leaf.key:
            shape += jax.eval_shape(jax.random.key_data, leaf.value).shape[leaf.value.ndim :]
        if jax.dtypes.canonicalize_dtype(dtype) != jnp.dtype(dtype):
            place = None
        if isinstance(place, NamedSharding) and (self.stacked or self.layer is not None):
            spec = place.spec[1:] if self.stacked else (None, *place.spec)
            place = NamedSharding(place.mesh, PartitionSpec(*spec))
        return {name: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place) for name in self.names}

    def build(self, leaf: Leaf, read: dict[str, Any], dtype: Any) -> Any:
        """The new value of the leaf."""
        parts = [read[name] for name in self.names]
        x = jnp.stack(parts) if self.stacked else parts[0] if self.layer is None else parts[0][self.layer]
        if leaf.key:
            impl: list[Any] = []
            jax.eval_shape(lambda key: impl.append(jax.random.key_impl(key)), leaf.value)
            return jax.random.wrap_key_data(leaf.placed(x), impl=impl[0])
        return leaf.placed(x if leaf.plain or leaf.sharding() is None else x.astype(dtype))


class Match(NamedTuple):
    """How leaves fit what is stored.

    Attributes:
      sources: of leaves that fit.
      shapes: of those with other shapes, what to say, and the names of what is stored.
      types: of those with other types, what to say.
      missing: leaves that are not stored.
      left: what is stored for no leaf.
    """

    sources: dict[str, Source]
    shapes: dict[str, tuple[str, tuple[str, ...]]]
    types: dict[str, str]
    missing: list[str]
    left: list[str]


def leaves_of(part: str, module: Any) -> dict[str, Leaf]:
    """All that the variables of a module hold, by names such as model/stack/layers/0/attention/query/kernel.

    Raises:
      TypeError: a thing that is no array, number or text; or an array outside of variables that nobody can replace.
    """
    found: dict[str, Leaf] = {}
    owners: dict[Any, Any] = {}
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if not isinstance(variable, nnx.Variable):
            owners = owners or dict(nnx.iter_graph(module))
            if not isinstance(owners[path[:-1]], nnx.Pytree):
                raise TypeError(
                    f"{_name(part, path)} is an array outside of variables, in a {type(owners[path[:-1]]).__name__}: "
                    "hold it in an attnjax.nn.Constant or another nnx.Variable."
                )
        for name, value in _named(_name(part, path), variable):
            leaf = Leaf(value, variable)
            if name in found:
                raise ValueError(f"two variables have the name {name}: rename one of them.")
            if not leaf.plain and not (hasattr(value, "dtype") and hasattr(value, "shape")):
                raise TypeError(
                    f"{name} is a {type(value).__name__}, and a checkpoint holds arrays, numbers and texts: make it an "
                    "array, or an attribute that is no variable."
                )
            found[name] = leaf
    return found


def updated(part: str, module: Any, fresh: dict[str, Any]) -> Any:
    """The state for `nnx.update` with the new values."""
    state = []
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        named = _named(_name(part, path), variable)
        if any(name in fresh for name, _ in named):
            held = isinstance(variable, nnx.Variable)
            structure = jax.tree.structure(variable.get_value() if held else variable)
            new = structure.unflatten([fresh.get(name, old) for name, old in named])
            state.append((path, variable.replace(new) if held else new))
    return nnx.from_flat_state(state)


def wanted_dtype(name: str, leaf: Leaf, dtype: Any) -> Any:
    """The type that a leaf is to have: floats of the model that which is asked for, all others their own."""
    if dtype is not None and name.startswith("model/") and _is_float(leaf.facts()):
        return jnp.dtype(dtype)
    return None if leaf.plain else leaf.value.dtype


def matched(leaves: dict[str, Leaf], stored: dict[str, Facts], dtype: Any) -> Match:
    """Finds a source for each leaf, and says what does not fit. Layers may be stored in one array or in many."""
    match = Match({}, {}, {}, [], [])
    seen: set[str] = set()
    used: dict[str, int] = {}  # of arrays of all layers, how many layers
    for name, leaf in leaves.items():
        source = _source(name, stored)
        if source is None:
            match.missing.extend([] if leaf.free else [name])
            continue
        seen.update(source.names)
        have, want = source.facts(stored), leaf.facts()
        text = f"{name} is {_shown(have)}, the model has {_shown(want)}"
        if have.get("shape", []) != want.get("shape", []):
            match.shapes.update({} if leaf.free else {name: (text, source.names)})
        elif not _types_fit(have, want, leaf, wanted_dtype(name, leaf, dtype), cast=dtype is not None):
            floats = _is_float(have) and _is_float(want)
            match.types.update({} if leaf.free else {name: text + ("; dtype= converts it" if floats else "")})
        else:
            match.sources[name] = source
            if source.layer is not None:
                used[source.names[0]] = used.get(source.names[0], 0) + 1
    for name, count in used.items():
        have = stored[name]["shape"][0]
        if count != have:
            match.shapes[name] = f"{name} has {have} layers, the model has {count}", (name,)
    match.left.extend(name for name in stored if name not in seen and not _is_stream(name, stored))
    return match


def _name(part: str, path: tuple[Any, ...]) -> str:
    return "/".join((part, *map(str, path)))


def _named(name: str, variable: Any) -> list[tuple[str, Any]]:
    """What is in a variable: mostly one array; of an optimizer that is masked, sometimes nothing."""
    value = variable.get_value() if isinstance(variable, nnx.Variable) else variable
    inner = jax.tree_util.tree_flatten_with_path(value)[0]
    simple = lambda path: jax.tree_util.keystr(path, simple=True, separator="/")
    return [("/".join((name, simple(path))) if path else name, leaf) for path, leaf in inner]


def _source(name: str, stored: dict[str, Facts]) -> Source | None:
    if name in stored:
        return Source((name,))
    parts = name.split("/")
    for i, part in enumerate(parts, start=1):
        if part != "layers":
            continue
        head, tail = parts[:i], parts[i:]
        joined = lambda *middle, head=head, tail=tail: "/".join((*head, *middle, *tail))
        names = []
        while (one := joined(str(len(names)))) in stored:
            names.append(one)
        if names and len({str(_shown(stored[one])) for one in names}) == 1:
            return Source(tuple(names), stacked=True)
        whole = "/".join((*head, *tail[1:]))
        if tail and tail[0].isdecimal() and whole in stored:
            layer, shape = int(tail[0]), stored[whole].get("shape")
            return Source((whole,), layer=layer) if shape and layer < shape[0] else None
    return None


def _types_fit(have: Facts, want: Facts, leaf: Leaf, dtype: Any, *, cast: bool) -> bool:
    text = [isinstance(facts.get("value"), str) for facts in (have, want)]
    if leaf.plain:  # takes any number, as the program that counts has left it
        return text[0] == text[1] and not have.get("dtype", "").startswith("key<")
    if "value" in have:
        kinds = {bool: jnp.bool_, int: jnp.number, float: jnp.inexact}
        return not text[0] and not leaf.key and jnp.issubdtype(dtype, kinds[type(have["value"])])
    numpy = isinstance(leaf.value, (np.ndarray, np.generic)) and str(jax.dtypes.canonicalize_dtype(dtype))
    return have["dtype"] in (str(dtype), numpy) or (cast and _is_float(have) and _is_float(want))


def _is_float(facts: Facts) -> bool:
    dtype = facts.get("dtype", "key<")
    return not dtype.startswith("key<") and jnp.issubdtype(jnp.dtype(dtype), jnp.floating)


def _is_stream(name: str, stored: dict[str, Facts]) -> bool:
    """Whether it is the key or the counter of a stream of random numbers, which a model without dropout has not."""
    owner, _, last = name.rpartition("/")
    key = stored.get(f"{owner}/key", {}).get("dtype", "")
    return last in ("key", "count") and key.startswith("key<") and f"{owner}/count" in stored


def _shown(facts: Facts) -> str:
    return repr(facts["value"]) if "value" in facts else f"{facts['dtype']}{facts['shape']}"
