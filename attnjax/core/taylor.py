"""`jax.experimental.jet` through attnjax's primitives: Taylor series, by repeated forward mode."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import jet
from jax.extend.core import Primitive

Array = jax.Array


def give_series(primitive: Primitive) -> None:
    """Gives a primitive, whose derivatives of every order JAX knows already, its rule for `jet`."""
    jet.jet_rules[primitive] = lambda primals, series, **params: _series(primitive, primals, series, params)


def _series(primitive: Primitive, primals: list, series: list, params: dict) -> tuple[list[Array], list[list[Array]]]:
    """The outputs, and for each of them the coefficients of t, t^2, ..., from those of the arguments.

    Computed as derivatives: that of f(x, first, second, ...) by t is its tangent in the direction (first, second, ...).
    """
    factorials = [math.factorial(n) for n in range(1, len(series[0]) + 1)]
    moved = [i for i, x in enumerate(primals) if jnp.issubdtype(x.dtype, jnp.floating)]

    def bound(some: list[Array]) -> list[Array]:
        args = list(primals)
        for i, x in zip(moved, some, strict=True):
            args[i] = x
        return primitive.bind(*args, **params)

    curve = [[primals[i] for i in moved]]
    for n, factorial in enumerate(factorials):
        curve.append([(series[i][n] * factorial).astype(primals[i].dtype) for i in moved])
    made, *derivatives = _derivatives(bound, len(factorials))(*curve)
    scaled = ([x / factorial for x in some] for some, factorial in zip(derivatives, factorials, strict=True))
    return made, [list(x) for x in zip(*scaled, strict=True)]


def _derivatives(f: Callable[..., Any], order: int) -> Callable[..., list[Any]]:
    """A function of x and its derivatives along a curve that gives f(x) and as many derivatives of it."""
    if not order:
        return lambda x: [f(x)]
    lower = _derivatives(f, order - 1)

    def raised(*x: Any) -> list[Any]:
        made, moved = jax.jvp(lower, x[:-1], x[1:])
        return [*made, moved[-1]]

    return raised


def _give_names_series() -> None:
    """`checkpoint_name`, which attention's derivatives contain, may have no rule of JAX's own: it is the identity."""
    (name,) = jax.make_jaxpr(lambda x: checkpoint_name(x, ""))(0.0).eqns
    jet.jet_rules.setdefault(name.primitive, lambda primals, series, **params: (primals[0], series[0]))


_give_names_series()
