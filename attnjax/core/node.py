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

Leaf = Any  # jax.Array, numpy array, tracer or ShapeDtypeStruct


def is_array(value: Any) -> TypeGuard[Any]:
    """Whether `value` becomes a leaf: an array of any kind, concrete, traced or only described."""
    return isinstance(value, (jax.Array, np.ndarray, np.generic, jax.ShapeDtypeStruct))


@dataclass_transform(frozen_default=True, eq_default=False)
class Node:
    """Base class. Subclasses are turned into frozen dataclasses and registered as pytrees when they are defined.

    `axes` names, for each field that may hold an array, the axes that array has behind its batch axes:
    `h` query heads, `t` query positions, `s` key positions, `.` an axis that is never split.
    `broadcasts`: whether its arrays may lack some of these axes, or have size 1 there.
    """

    axes: ClassVar[dict[str, str]] = {}
    broadcasts: ClassVar[bool] = False

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
        return tuple(f.name for f in self._fields() if _is_child(getattr(self, f.name)))

    def _flatten_with_keys(self) -> tuple[Any, Any]:
        dynamic = self._dynamic()
        static = tuple((f.name, getattr(self, f.name)) for f in self._fields() if f.name not in dynamic)
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in dynamic)
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

    def functions(self) -> Iterator[IndexFunction]:
        """Yields the functions of indices in it."""
        for node in self.nodes():
            for field in node._fields():
                value = getattr(node, field.name)
                if isinstance(value, IndexFunction):
                    yield value

    def __repr__(self) -> str:
        parts = []
        for f in self._fields():
            value = getattr(self, f.name)
            if f.default is not dataclasses.MISSING and not is_array(value) and value == f.default:
                continue
            shown = describe(value)
            parts.append(shown if not parts and f.default is dataclasses.MISSING else f"{f.name}={shown}")
        return f"{type(self).__name__}({', '.join(parts)})"


def _is_child(value: Any) -> bool:
    return is_array(value) or isinstance(value, Node) or (isinstance(value, tuple) and any(map(is_array, value)))


def describe(value: Any) -> str:
    """`int32[2, 128]` for arrays, `repr` for the rest; scalars that are known are shown by value."""
    if not is_array(value):
        return repr(value)
    if np.ndim(value) == 0 and isinstance(value, (np.ndarray, np.generic)):
        return str(value)
    return f"{np.dtype(value.dtype).name}{list(value.shape)}"
