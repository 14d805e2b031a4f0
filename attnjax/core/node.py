"""`Node`: the base of masks and scores, a frozen dataclass that is a pytree. Knows nothing of attention itself.

A field that holds an array (or another node) is a leaf and may be traced, mapped and, in a score, differentiated.
A field that holds a plain Python value is static: it is part of the compiled program.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, ClassVar, TypeGuard, dataclass_transform

import jax
import numpy as np

from attnjax.core.functions import IndexFunction
from attnjax.core.integers import settled

Leaf = Any  # jax.Array, numpy array, tracer or ShapeDtypeStruct


def is_array(value: Any) -> TypeGuard[Any]:
    """Whether `value` becomes a leaf: an array of any kind, concrete, traced or only described."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


class _Field(jax.tree_util.GetAttrKey):
    """The name of a field. Where two trees differ, JAX's message asks for `key`, whatever the kind of the name."""

    @property
    def key(self) -> str:
        return self.name


@dataclass_transform(frozen_default=True, eq_default=False)
class Node:
    """Base class. Subclasses are turned into frozen dataclasses and registered as pytrees when they are defined.

    `axes` names, for each field that may hold an array, the axes that array has behind its batch axes:
    `h` query heads, `t` query positions, `s` key positions, `.` an axis that is never split.
    `always`: the fields that hold arrays always, and in the trees that `jax.vmap` takes as in_axes numbers of axes.
    `broadcasts`: whether its arrays may lack some of these axes, or have size 1 there.
    `reads`: which of the tile's indices b, h, q and k its rule reads beside its arrays and the nodes in it. Where less
    is said, calls are divided over devices by batch entry and head, and a cache need not ask for true positions.
    `limits`: for fields that are numbers of positions, the letter of the length that they must not exceed.
    """

    axes: ClassVar[dict[str, str]] = {}
    broadcasts: ClassVar[bool] = False
    always: ClassVar[tuple[str, ...]] = ()
    reads: ClassVar[str] = "bhqk"
    limits: ClassVar[dict[str, str]] = {}
    __array_ufunc__: ClassVar[None] = None  # so that NumPy arrays leave `array & mask` to the mask

    def __init_subclass__(cls) -> None:
        dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
        jax.tree_util.register_pytree_with_keys(cls, cls._flatten_with_keys, cls._unflatten)

    def _fields(self) -> tuple[dataclasses.Field, ...]:
        return dataclasses.fields(self)  # type: ignore[arg-type]  # every subclass is a dataclass

    def _dynamic(self) -> tuple[str, ...]:
        """Names of the fields that are children. Remembered from unflattening, where a child may be any object."""
        remembered = self.__dict__.get("_children")
        if remembered is not None:
            return remembered
        return tuple(f.name for f in self._fields() if f.name in self.always or _is_child(getattr(self, f.name)))

    def _flatten_with_keys(self) -> tuple[Any, Any]:
        dynamic = self._dynamic()
        static = tuple((f.name, getattr(self, f.name)) for f in self._fields() if f.name not in dynamic)
        children = tuple((_Field(name), getattr(self, name)) for name in dynamic)
        return children, (dynamic, static)

    @classmethod
    def _unflatten(cls, aux: Any, children: Any) -> Any:
        dynamic, static = aux
        node = object.__new__(cls)
        node.__dict__.update(dict(static))
        node.__dict__.update(zip(dynamic, children, strict=True))
        node.__dict__["_children"] = dynamic
        return node

    def operands(self) -> Iterator[tuple[str, Leaf, str]]:
        """Yields (name, leaf, axes) for every leaf, in the order in which `jax.tree.leaves` gives them."""
        for name in self._dynamic():
            value = getattr(self, name)
            yield from value.operands() if isinstance(value, Node) else self._own(name, value)

    def own_operands(self) -> Iterator[tuple[str, Leaf, str]]:
        """Yields the same for its own leaves, without those of the nodes in it."""
        for name in self._dynamic():
            value = getattr(self, name)
            if not isinstance(value, Node):
                yield from self._own(name, value)

    def _own(self, name: str, value: Any) -> Iterator[tuple[str, Leaf, str]]:
        if isinstance(value, tuple):
            for i, item in enumerate(value):
                yield f"{type(self).__name__}.{name}[{i}]", item, "." * np.ndim(item)
        else:
            yield f"{type(self).__name__}.{name}", value, self.axes[name]

    def nodes(self) -> Iterator[Node]:
        """Yields itself and all nodes in it."""
        yield self
        for field in self._fields():
            value = getattr(self, field.name)
            if isinstance(value, Node):
                yield from value.nodes()

    def settled(self, query_length: Any, key_length: Any, dtype: Any = None) -> Any:
        """The node as kernels evaluate it: its integers are int32 that stay in their type when a position is added.

        Args:
          query_length, key_length: T and S.
          dtype: of the call; float64 arrays are brought to float32 where it is another.
        """
        made = {}
        for field in self._fields():
            value = getattr(self, field.name)
            if isinstance(value, Node):
                made[field.name] = value.settled(query_length, key_length, dtype)
            elif field.name in self.axes:
                made[field.name] = narrowed(settled(value, self.axes[field.name]), dtype)
        return self.replaced(**{name: new for name, new in made.items() if new is not getattr(self, name)})

    def moved(self, start: Any) -> Any:
        """The same rule for queries that stand at start, start + 1, ... (`start`: int32 `[*B]`) and not at 0, 1, ...

        `None`: it cannot be said by another node of this class, so that the rule is evaluated at true positions.
        """
        return None

    def replaced(self, **fields: Any) -> Any:
        """The node with other values of fields, which are not checked."""
        if not fields:
            return self
        node = object.__new__(type(self))
        node.__dict__.update({f.name: getattr(self, f.name) for f in self._fields()} | fields)
        return node

    def functions(self) -> Iterator[IndexFunction]:
        """Yields the functions of indices in it."""
        for node in self.nodes():
            for field in node._fields():
                value = getattr(node, field.name)
                if isinstance(value, IndexFunction):
                    yield value

    def __eq__(self, other: object) -> bool:
        """By value; arrays of JAX are equal where they are the same."""
        if type(self) is not type(other):
            return False
        pairs = ((getattr(self, f.name), getattr(other, f.name)) for f in self._fields())
        return all(_same(*pair) for pair in pairs)

    def __hash__(self) -> int:
        return hash((type(self), *(_hashed(getattr(self, f.name)) for f in self._fields())))

    def __repr__(self) -> str:
        parts = []
        for f in self._fields():
            value = getattr(self, f.name)
            if f.default is not dataclasses.MISSING and not is_array(value) and value == f.default:
                continue
            shown = describe(value)
            parts.append(shown if not parts and f.default is dataclasses.MISSING else f"{f.name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _same(one: Any, other: Any) -> bool:
    if one is other:
        return True
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    known = (np.ndarray, np.generic)
    if isinstance(one, known) and isinstance(other, known):
        return one.dtype == other.dtype and one.shape == other.shape and bool((one == other).all())
    if is_array(one) or is_array(other):
        return False
    return type(one) is type(other) and one == other


def _hashed(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_hashed, value))
    if isinstance(value, (np.ndarray, np.generic)):
        return value.dtype, value.shape
    return id(value) if is_array(value) else value


def narrowed(value: Any, dtype: Any) -> Any:
    """float64 as float32, but in a call of float64."""
    if dtype is None or dtype == np.float64 or getattr(value, "dtype", None) != np.float64:
        return value
    if isinstance(value, jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct(value.shape, np.float32)
    return value.astype(np.float32)


def _is_child(value: Any) -> bool:
    return is_array(value) or isinstance(value, Node) or (isinstance(value, tuple) and any(map(is_array, value)))


def describe(value: Any) -> str:
    """`int32[2, 128]` for arrays, `repr` for the rest; scalars that are known are shown by value."""
    if not is_array(value):
        return repr(value)
    if np.ndim(value) == 0 and isinstance(value, (np.ndarray, np.generic)):
        return str(value)
    return f"{np.dtype(value.dtype).name}{list(value.shape)}"
