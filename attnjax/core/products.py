"""`product`: a matrix product over pairs of queries and keys in which hidden pairs take no part, whatever stands there.

A weight of 0 times NaN is NaN, so that what a query must not see would reach it through a tile that they share. So
numbers that are not finite are left out of products, and added afterwards where their weight is not 0. That takes no
time where there are none. The derivatives of a product are products of the same kind, to every order.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import Primitive
from jax.interpreters import ad

from attnjax.core.mesh_types import placed_as
from attnjax.core.primitives import lead, register
from attnjax.core.symbolic import number

Array = jax.Array

PAIRS = "kgts"


def product(spec: str, a: Array, b: Array, visible: Array | None, *, factors: Any, accumulate: Any) -> Array:
    """An einsum of pairs of queries and keys, rows by query and rows by key, in any order: two in, the third out.

    Args:
      spec: einsum's, without the lanes that all of them have in front. Pairs are "kgts", rows "kgt." and "ks.".
      a, b: arrays of floats.
      visible: booleans that broadcast to the pairs, with as many axes; `None`: all are seen. Pairs that are not count
        as 0, and what comes out there is 0.
      factors: the type in which they are multiplied; accumulate: that of the sums, and of the result.
    """
    options = dict(spec=spec, factors=jnp.dtype(factors).name, accumulate=jnp.dtype(accumulate).name)
    return _einsum(a, b, **options) if visible is None else product_p.bind(a, b, visible, **options)[0]


def _einsum(a: Array, b: Array, *, spec: str, factors: str, accumulate: str) -> Array:
    (x, y), result = _letters(spec)
    exact = lax.Precision.HIGHEST if factors in ("float32", "float64") else None
    a, b = a.astype(factors), b.astype(factors)
    return jnp.einsum(f"...{x},...{y}->...{result}", a, b, precision=exact, preferred_element_type=accumulate)


def _letters(spec: str) -> tuple[list[str], str]:
    given, result = spec.split("->")
    return given.split(","), result


product_p = Primitive("attention_product")
product_p.multiple_results = True


def _run(
    a: Array, b: Array, visible: Array, *, platform: str, exported: bool, divided: bool, spec: str, **types: str
) -> list[Array]:
    given, result = _letters(spec)
    if result == PAIRS:
        made = _einsum(a, b, spec=spec, **types)
        return [jnp.where(visible, made, jnp.zeros_like(made))]
    first = given[0] == PAIRS
    pairs, rows = (a, b) if first else (b, a)
    pairs = jnp.where(visible, pairs, jnp.zeros_like(pairs))
    sizes = dict(zip(PAIRS, pairs.shape[-4:], strict=True))
    finite = jnp.isfinite(rows)
    clean = jnp.where(finite, rows, jnp.zeros_like(rows))
    made = _einsum(*((pairs, clean) if first else (clean, pairs)), spec=spec, **types)
    add = partial(_with_others, pairs=pairs, rows=rows, own=given[first], result=result)
    length = sizes["s"] if "s" not in result else sizes["g"] * sizes["t"]
    # Unlike a `cond` a loop without a turn copies nothing.
    count = jnp.where(finite.all(), np.int32(0), jnp.int32(number(length)))
    return [lax.fori_loop(np.int32(0), count, add, made)]


def _with_others(i: Array, sums: Array, *, pairs: Array, rows: Array, own: str, result: str) -> Array:
    """The sums with what the i-th of the rows adds to them that is not finite."""
    # Heads of a group are more queries: pairs [..., k, queries, keys] and rows [..., k, queries or keys, numbers].
    merged = lambda x: x.reshape(*x.shape[:-3], x.shape[-3] * x.shape[-2], x.shape[-1])  # which may be of size 0
    pairs = merged(pairs)
    rows = rows.swapaxes(-1, -2) if own.endswith("s") else rows
    rows = merged(rows) if "g" in own else rows
    one = partial(lax.dynamic_index_in_dim, index=i)
    row, weights = one(rows, axis=rows.ndim - 2), one(pairs, axis=pairs.ndim - 2 + ("g" in result))
    if result.endswith("s"):
        row = row.swapaxes(-1, -2)
    elif "g" not in result:
        weights = weights.swapaxes(-1, -2)
    more = jnp.where((weights != 0) & ~jnp.isfinite(row), weights * row, jnp.zeros((), row.dtype))
    return sums + more.reshape(sums.shape).astype(sums.dtype)


def _types(a: Any, b: Any, visible: Any, **options: str) -> list[Any]:
    """The type of the einsum, in all lanes of the pairs that are seen."""

    def made(a: Array, b: Array) -> Array:
        out = _einsum(a, b, **options)
        lanes = out.ndim - len(_letters(options["spec"])[1])
        shape = *lax.broadcast_shapes(out.shape[:lanes], visible.shape[: -len(PAIRS)]), *out.shape[lanes:]
        return out if out.shape == shape else jnp.broadcast_to(out, shape)

    return list(jax.make_jaxpr(made)(a, b).out_avals)


def _batch(operands: list, dims: list, **options: str) -> Any:
    operands, _ = lead(operands, dims)
    return product_p.bind(*operands, **options), [0]


def _jvp(primals: list, tangents: list, **options: str) -> Any:
    a, b, visible = primals
    d_a, d_b, _ = tangents
    moved = [(d_a, b)] * (type(d_a) is not ad.Zero) + [(a, d_b)] * (type(d_b) is not ad.Zero)
    made = product_p.bind(a, b, visible, **options)
    parts = [product_p.bind(*pair, visible, **options)[0] for pair in moved]
    return made, [sum(parts[1:], parts[0]) if parts else ad.Zero(jax.typeof(made[0]))]


def _transpose(cotangents: list, a: Any, b: Any, visible: Array, *, spec: str, **types: str) -> list:
    (x, y), result = _letters(spec)
    first = ad.is_undefined_primal(a)
    aval = (a if first else b).aval
    if type(cotangents[0]) is ad.Zero:
        made = ad.Zero(aval)
    else:
        given, spec = (
            ((cotangents[0], b), f"{result},{y}->{x}") if first else ((a, cotangents[0]), f"{x},{result}->{y}")
        )
        made = product_p.bind(*given, visible, spec=spec, **types)[0]
        shared = tuple(n for n, (have, want) in enumerate(zip(made.shape, aval.shape, strict=True)) if have != want)
        made = placed_as(made.sum(shared, keepdims=True).astype(aval.dtype), aval)
    return [made, None, None] if first else [None, made, None]


register(product_p, _types, _run, _batch)
ad.primitive_jvps[product_p] = _jvp
ad.primitive_transposes[product_p] = _transpose
