"""`IndexFunction`: a user's Python function of scalar indices, traced once, with what it captured made explicit."""

from __future__ import annotations

import functools
import inspect
import pickle
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.context import neutral
from attnjax.core.operations import Captured, Operations, Visible

Array = jax.Array

_LETTERS = {False: ("b", "h", "q", "k"), True: ("score", "b", "h", "q", "k")}


class IndexFunction:
    """A traced function `([score,] b, h, q, k) -> value`, hashable by what it computes.

    Two functions with the same operations are equal, so a lambda that is written anew at every call compiles once.

    Attributes:
      uses: which of b, h, q, k matter.
    """

    def __init__(self, programs: dict[str, Operations], failures: dict[str, str], origin: _Origin):
        self._programs, self._failures, self._origin = programs, failures, origin
        self._key = tuple((name, program.key()) for name, program in sorted(programs.items()))
        self._hash = hash(self._key)
        read = frozenset().union(*(program.reads for program in programs.values()))
        self.uses = tuple(letter in read for letter in "bhqk")

    def __call__(self, constants: Sequence[Array], *scalars: Array, visible: Visible | None = None) -> Array:
        """Evaluates at scalars; `constants` are the captured arrays, in the order in which they were found."""
        name = np.dtype(scalars[0].dtype).name if len(scalars) == 5 else None
        return self.program(name).run(constants, scalars, visible)

    def program(self, score: str | None) -> Operations:
        """What is computed where scores have this type; `None`: of a mask."""
        name = score or "mask"
        if name in self._programs:
            return self._programs[name]
        if name in self._failures:
            raise TypeError(f"the function of {self._origin.name} cannot be traced for {name}: {self._failures[name]}")
        raise NotImplementedError(
            f"the score function was traced for {sorted(self._programs)} and is asked for {name}: "
            "create it after jax.enable_x64, where float64 is wanted."
        )

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexFunction) and self._key == other._key

    def __repr__(self) -> str:
        return "<function of indices>"

    def __deepcopy__(self, memo: Any) -> IndexFunction:
        return self

    def __reduce__(self) -> Any:
        function = self._origin.function()
        if function is None:
            raise pickle.PicklingError(
                f"this {self._origin.name} cannot be pickled: its Python function is gone, because it went through "
                "jax.jit, jax.tree.map or the like. Pickle the object that was made from the function, or make it from "
                "a function that a module holds by name."
            )
        return _traced_again, (function, self._origin.score, self._origin.name, self._origin.captured)


class _Origin:
    """Where an index function comes from. Holds no array, and the Python function only as long as others do."""

    def __init__(self, function: Callable, score: bool, name: str, captured: tuple):
        try:
            self.function: Callable[[], Callable | None] = weakref.ref(function)
        except TypeError:  # an object that nothing can refer to weakly
            self.function = lambda: None
        self.score, self.name, self.captured = score, name, captured


def trace(function: Callable, *, score: bool, name: str) -> tuple[IndexFunction, tuple[Array, ...]]:
    """Traces `function` and returns it with the arrays it captured.

    Under x64 the function of a score is traced for float32 and for float64; one of them may fail.

    Raises:
      TypeError: `function` is not callable, or does not give one scalar (a boolean where `score` is false).
    """
    if not callable(function):
        raise TypeError(f"{name} takes a function of {_signature(score)}, got {type(function).__name__}.")
    try:
        inspect.signature(function).bind(*range(5 if score else 4))
    except TypeError as error:
        raise TypeError(f"{name} takes a function of {_signature(score)}: {error}.") from None
    captured, programs, failures, errors = Captured(), {}, {}, []
    for dtype in _dtypes(score):
        try:
            programs[dtype] = Operations(_jaxpr(function, dtype, name), captured, _LETTERS[score])
        except Exception as error:  # raised again below, unless another type of score can be traced
            failures[dtype] = f"{type(error).__name__}: {error}"
            errors.append(error)
    if not programs:
        raise errors[0]
    constants = tuple(map(_canonical, captured.arrays))
    kinds = tuple((tuple(x.shape), str(x.dtype)) for x in constants)
    return IndexFunction(programs, failures, _Origin(function, score, name, kinds)), constants


def _dtypes(score: bool) -> list[str]:
    """Types of scores to trace for."""
    if not score:
        return ["mask"]
    return ["float32", *(["float64"] if jax.dtypes.canonicalize_dtype("float64") == "float64" else [])]


def _jaxpr(function: Callable, dtype: str, name: str) -> Any:
    """The traced program for scores of a type, or of a mask."""
    index = jax.ShapeDtypeStruct((), jnp.int32)
    first = () if dtype == "mask" else (jax.ShapeDtypeStruct((), dtype),)
    # Another object each time: JAX remembers what a function gave, and what it captured may have changed since.
    anew = functools.partial(function)
    # Inside jax.shard_map what is captured varies over axes of its mesh, and means nothing without them.
    manual = jax.sharding.AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types
    with neutral(keep_mesh=manual):
        try:
            closed, shape = jax.make_jaxpr(anew, return_shape=True)(*first, index, index, index, index)
        except jax.errors.TracerArrayConversionError as error:
            raise TypeError(
                f"the function of {name} gives its indices, or what it computed from them, to NumPy: inside of it "
                "NumPy arrays cannot be indexed, nor NumPy's functions be called. Make such an array "
                "jax.numpy.asarray(array) before, and call jax.numpy's functions."
            ) from error
        except Exception as error:
            if type(error).__name__ == "ShardingTypeError":
                error.add_note(
                    f"The function of {name} is of scalars, and reads arrays an element at a time: what it captures "
                    "must not be divided over mesh axes of type Explicit. jax.reshard(array, jax.P()) before."
                )
            raise
    _check_result(shape, dtype != "mask", name)
    return closed


def _canonical(array: Any) -> Any:
    """A captured NumPy array in the type that it had while it was traced."""
    if isinstance(array, (np.ndarray, np.generic)):
        return np.asarray(array, jax.dtypes.canonicalize_dtype(array.dtype))
    return array


def _traced_again(function: Callable, score: bool, name: str, captured: tuple) -> IndexFunction:
    """An index function from a pickle. What it captured has been pickled apart, and must be the same again."""
    made, constants = trace(function, score=score, name=name)
    kinds = tuple((tuple(x.shape), str(x.dtype)) for x in constants)
    if kinds != captured:
        raise ValueError(
            f"the function of this pickled {name} captured {list(captured)} when it was pickled, and now "
            f"{list(kinds)}: it was changed, or jax.enable_x64 is set otherwise."
        )
    return made


def _check_result(shape: Any, score: bool, name: str) -> None:
    leaves = jax.tree.leaves(shape)
    wanted = jnp.floating if score else jnp.bool_
    kind = "one floating-point scalar" if score else "one boolean scalar"
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, wanted):
        raise TypeError(f"the function of {name} must give {kind} for {_signature(score)}, it gave {shape}.")


def _signature(score: bool) -> str:
    return "(score, b, h, q, k)" if score else "(b, h, q, k)"
