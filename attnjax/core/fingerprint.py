"""`fingerprint`: a traced program, or a part of one, as a key. Equal keys, equal results; runs nothing."""

from __future__ import annotations

import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.extend.core import Literal

# Parameters that change no number: where arrays lie, what things are called, what follows from other parameters.
_OF_NO_ACCOUNT = frozenset(
    "sharding out_sharding in_shardings out_shardings ctx_mesh in_layouts out_layouts name out_trees debug_info".split()
)


class Same:
    """Equal to itself alone: what cannot be compared by value. Keeps it alive, so that its id stays its own."""

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


def fingerprint(value: Any) -> Any:
    """A hashable key of a parameter of an equation.

    Programs are compared equation by equation, numbers by type and to the last bit, arrays by their bytes, functions
    (rules of custom derivatives, callbacks) by identity, all else by value where it has one.
    """
    if hasattr(value, "eqns"):
        return _program(value)
    if isinstance(value, dict):
        return tuple((name, fingerprint(x)) for name, x in sorted(value.items()) if name not in _OF_NO_ACCOUNT)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(fingerprint, value))
    if isinstance(value, Tracer):
        return Same(value)
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        return of_array(value)
    if isinstance(value, (float, complex)):
        return type(value), repr(value)  # 0.0 is not -0.0, and a NaN is itself
    if callable(value) or hasattr(value, "call_wrapped"):
        return _of_rule(value)
    try:
        hash(value)
    except TypeError:
        return Same(value)
    return type(value), value  # 1 is neither 1.0 nor True


def of_array(x: Any) -> tuple:
    """The key of an array that is known."""
    dtype = str(x.dtype)
    if jnp.issubdtype(x.dtype, jax.dtypes.extended):  # keys of jax.random
        x = jax.random.key_data(x)
    x = np.asarray(jax.device_get(x))
    return dtype, x.shape, x.tobytes()


def _program(program: Any) -> tuple:
    """The key of a jaxpr, closed or not: its variables are numbered in the order in which they are made."""
    jaxpr, constants = getattr(program, "jaxpr", program), getattr(program, "consts", ())
    numbers: dict[Any, int] = {}

    def made(variables: Any) -> tuple:
        for v in variables:
            numbers[v] = len(numbers)
        return tuple((getattr(v.aval, "shape", None), str(getattr(v.aval, "dtype", v.aval))) for v in variables)

    def read(v: Any) -> Any:
        aval: Any = v.aval
        return of_array(np.asarray(v.val, aval.dtype)) if isinstance(v, Literal) else numbers[v]

    given = made(jaxpr.constvars), made(jaxpr.invars), tuple(map(fingerprint, constants))
    equations = tuple(
        (e.primitive, fingerprint(e.params), tuple(map(read, e.invars)), made(e.outvars)) for e in jaxpr.eqns
    )
    return given, equations, tuple(map(read, jaxpr.outvars))


def _of_rule(rule: Any) -> Any:
    """The key of a function: the user's own, below what JAX wraps it in anew at every call, and what it is given."""
    if hasattr(rule, "call_wrapped"):
        given = [x for _, arguments in rule.transforms for x in arguments if not _is_bookkeeping(x)]
        return "wrapped", _of_rule(rule.f), tuple(map(fingerprint, given))
    module = getattr(rule, "__module__", None) or ""
    if module == "jax._src.interpreters.partial_eval" and getattr(rule, "__closure__", None):
        held = dict(zip(rule.__code__.co_freevars, rule.__closure__, strict=True))
        for name in ("fn", "jvp", "fwd"):
            if name in held:
                return _of_rule(held[name].cell_contents)
    if type(rule).__module__ == "jax._src.custom_batching" and hasattr(rule, "rule"):
        return _of_rule(rule.rule)
    try:  # bound methods and JAX's own records of callbacks are equal by what they call
        hash(rule)
    except TypeError:
        return Same(rule)
    return rule


def _is_bookkeeping(x: Any) -> bool:
    own = isinstance(x, types.FunctionType) and x.__module__ == "jax._src.linear_util"
    return own or type(x).__name__ == "DebugInfo"
