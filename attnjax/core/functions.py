"""`IndexFunction`: a user's Python function of scalar indices, traced once, with what it captured made explicit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun

Array = jax.Array


class IndexFunction:
    """A traced function `([score,] b, h, q, k) -> value`, hashable by what it computes.

    Two functions with the same operations are equal, so a lambda that is written anew at every call compiles once.
    """

    def __init__(self, jaxprs: dict[str, ClosedJaxpr]):
        self._jaxprs = {name: closed.jaxpr for name, closed in jaxprs.items()}
        self._key = tuple((name, _fingerprint(closed)) for name, closed in sorted(jaxprs.items()))
        first = next(iter(jaxprs.values())).jaxpr
        used = {id(v) for eqn in first.eqns for v in eqn.invars} | {id(v) for v in first.outvars}
        self.uses = tuple(id(v) in used for v in first.invars)[-4:]  # which of b, h, q, k matter

    def __call__(self, constants: tuple[Array, ...], *scalars: Array) -> Array:
        """Evaluates at scalars; `constants` are the captured arrays, in the order in which they were found."""
        name = np.dtype(scalars[0].dtype).name if len(scalars) == 5 else None
        (out,) = jaxpr_as_fun(ClosedJaxpr(self.jaxpr(name), list(constants)))(*scalars)
        return out

    def jaxpr(self, score: str | None) -> Any:
        """The traced program: inputs the scalars, constants what was captured. `score`: the dtype of a score's."""
        name = score or "mask"
        if name not in self._jaxprs:
            raise NotImplementedError(
                f"the score function was traced for {sorted(self._jaxprs)} and is asked for {name}: "
                "create it after jax.enable_x64, where float64 is wanted."
            )
        return self._jaxprs[name]

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IndexFunction) and self._key == other._key

    def __repr__(self) -> str:
        return "<function of indices>"


def trace(function: Callable, *, score: bool, name: str) -> tuple[IndexFunction, tuple[Array, ...]]:
    """Traces `function` and returns it with the arrays it captured.

    Raises:
      TypeError: `function` is not callable, or does not give one scalar (a boolean where `score` is false).
    """
    if not callable(function):
        raise TypeError(f"{name} takes a function of {_signature(score)}, got {type(function).__name__}.")
    try:
        inspect.signature(function).bind(*range(5 if score else 4))
    except TypeError as error:
        raise TypeError(f"{name} takes a function of {_signature(score)}: {error}.") from None
    index = jax.ShapeDtypeStruct((), jnp.int32)
    dtypes = (
        ["float32", *(["float64"] if jax.dtypes.canonicalize_dtype("float64") == "float64" else [])]
        if score
        else ["mask"]
    )
    jaxprs = {}
    for dtype in dtypes:
        first = (jax.ShapeDtypeStruct((), dtype),) if score else ()
        closed, shape = jax.make_jaxpr(function, return_shape=True)(*first, index, index, index, index)
        _check_result(shape, score, name)
        jaxprs[dtype] = closed
    constants = [tuple(closed.consts) for closed in jaxprs.values()]
    if len({tuple(map(id, c)) for c in constants}) > 1:
        constants = [tuple(jnp.asarray(x) for x in c) for c in constants]
    return IndexFunction(jaxprs), tuple(constants[0])


def _check_result(shape: Any, score: bool, name: str) -> None:
    leaves = jax.tree.leaves(shape)
    wanted = jnp.floating if score else jnp.bool_
    kind = "one floating-point scalar" if score else "one boolean scalar"
    if len(leaves) != 1 or leaves[0].shape != () or not jnp.issubdtype(leaves[0].dtype, wanted):
        raise TypeError(f"the function of {name} must give {kind} for {_signature(score)}, it gave {shape}.")


def _signature(score: bool) -> str:
    return "(score, b, h, q, k)" if score else "(b, h, q, k)"


def _fingerprint(closed: ClosedJaxpr) -> tuple:
    """The printed program and, to the last bit, the numbers in it."""
    literals = tuple(
        (np.asarray(v.val).dtype.name, np.asarray(v.val).tobytes())
        for eqn in closed.jaxpr.eqns
        for v in eqn.invars
        if hasattr(v, "val")
    )
    return str(closed.jaxpr), literals
