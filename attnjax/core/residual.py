"""`Residual`: a function of scalar indices, taken apart for kernels on tiles. Traces nothing and knows no kernel.

What depends on the query alone, or on the key alone, and is more than arithmetic on indices (it reads captured arrays,
say) is computed outside for all queries, or keys: it is hoisted. What is left is elementwise, and runs on tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal

from attnjax.core.functions import IndexFunction
from attnjax.core.tiles import Sizes

Array = jax.Array

_ELEMENTWISE = frozenset(
    "add sub mul div rem max min neg abs sign eq ne lt le gt ge and or not xor select_n convert_element_type exp exp2 "
    "log log1p expm1 tanh logistic sqrt rsqrt square pow integer_pow sin cos floor ceil clamp shift_left "
    "shift_right_logical shift_right_arithmetic stop_gradient".split()
)
_SAME = ("broadcast_in_dim", "reshape", "squeeze", "copy")  # of a scalar: the scalar
_CALLS = ("pjit", "jit", "closed_call")
_QUERY, _KEY = frozenset("bhq"), frozenset("bhk")


class NotSplittable(Exception):
    """Where query and key meet, the function does more than elementwise arithmetic."""


class _Name:
    """A variable; each call of an inner function has its own."""

    def __init__(self, aval: Any):
        self.dtype = aval.dtype


class _Step(NamedTuple):
    """One operation: its equation, the names (or numbers) that it reads, and those that it makes."""

    equation: Any
    inputs: tuple[Any, ...]
    outputs: tuple[_Name, ...]

    @property
    def name(self) -> str:
        return self.equation.primitive.name


class Residual:
    """An index function, split.

    Attributes:
      of_mask: whether it gives booleans of pairs, and not scores.
      count: how many arrays are hoisted.
      primitives: what is left to do on a tile.

    Raises:
      NotSplittable: it cannot be split.
    """

    def __init__(self, function: IndexFunction, score: Any):
        jaxpr = function.jaxpr(None if score is None else np.dtype(score).name)
        self.of_mask = score is None
        self._steps: list[_Step] = []
        self._held: dict[Any, Any] = {}  # arrays that inner functions hold
        names = {v: _Name(v.aval) for v in (*jaxpr.constvars, *jaxpr.invars)}
        self._captured, self._inputs = ([names[v] for v in some] for some in (jaxpr.constvars, jaxpr.invars))
        (self._out,) = self._unfold(jaxpr, names)
        self._sides, self._hoisted = self._sort()
        self.count = len(self._hoisted)
        self._left = self._needed(self._out, set(self._hoisted))
        self.primitives = tuple(step.name for step in self._left if step.name not in _SAME)
        for step in self._left:
            if step.name not in (*_ELEMENTWISE, *_SAME):
                raise NotSplittable(f"{step.name} of query and key together")

    def hoisted(self, constants: tuple[Array, ...], sizes: Sizes) -> list[tuple[Array, str]]:
        """The hoisted arrays in operand form, and their axes. `constants`: what was captured, in operand form."""
        return [self._everywhere(v, constants, sizes) for v in self._hoisted]

    def __call__(self, b: Any, h: Any, q: Any, k: Any, pieces: list[Any], score: Any) -> Array:
        """The function on a tile; `pieces` are the tile's parts of what was hoisted."""
        env = self._indices(b, h, q, k, score)
        for v, piece in zip(self._hoisted, pieces, strict=True):
            env[v] = piece != 0 if v.dtype == np.bool_ and piece.dtype != np.bool_ else piece
        for step in self._left:
            env[step.outputs[0]] = self._on_tile(step, [_read(env, v) for v in step.inputs])
        return jnp.asarray(_read(env, self._out))

    def _unfold(self, jaxpr: Any, names: dict[Any, Any]) -> list[Any]:
        """Lists the operations, those of called functions in place of the calls; gives the results."""
        for equation in jaxpr.eqns:
            inputs = tuple(_named(names, v) for v in equation.invars)
            if equation.primitive.name in _CALLS:
                inner = equation.params["jaxpr"]
                held = {v: _Name(v.aval) for v in inner.jaxpr.constvars}
                self._held.update(zip(held.values(), inner.consts, strict=True))
                outputs = self._unfold(inner.jaxpr, held | dict(zip(inner.jaxpr.invars, inputs, strict=True)))
            else:
                outputs = [_Name(v.aval) for v in equation.outvars]
                self._steps.append(_Step(equation, inputs, tuple(outputs)))
            names.update(zip(equation.outvars, outputs, strict=True))
        return [_named(names, v) for v in jaxpr.outvars]

    def _sort(self) -> tuple[dict[Any, frozenset[str]], list[Any]]:
        """What each name depends on, and those to hoist: of one side, more than arithmetic, used by both sides."""
        letters = ["b", "h", "q", "k"] if self.of_mask else ["score", "b", "h", "q", "k"]
        depends = {v: frozenset((letter,)) for v, letter in zip(self._inputs, letters, strict=True)}
        heavy = dict.fromkeys(depends, False)
        for v in (*self._captured, *self._held):
            depends[v], heavy[v] = frozenset(), True
        for step in self._steps:
            read = [v for v in step.inputs if isinstance(v, _Name)]
            side = frozenset().union(*(depends[v] for v in read))
            work = any(heavy[v] for v in read) or step.name not in (*_ELEMENTWISE, *_SAME)
            for v in step.outputs:
                depends[v], heavy[v] = side, work
        one_sided = lambda v: depends[v] <= _QUERY or depends[v] <= _KEY
        met = [v for step in self._steps if not one_sided(step.outputs[0]) for v in step.inputs]
        used = [v for v in dict.fromkeys((*met, self._out)) if isinstance(v, _Name)]
        return depends, [v for v in used if heavy[v] and one_sided(v)]

    def _needed(self, wanted: Any, known: set[Any]) -> list[_Step]:
        """The operations that `wanted` is made of, from what is known."""
        made = {v: n for n, step in enumerate(self._steps) for v in step.outputs}
        found: set[int] = set()
        waiting = [wanted]
        while waiting:
            v = waiting.pop()
            if v in known or v not in made or made[v] in found:
                continue
            found.add(made[v])
            waiting += self._steps[made[v]].inputs
        return [self._steps[n] for n in sorted(found)]

    def _indices(self, b: Any, h: Any, q: Any, k: Any, score: Any) -> dict[Any, Any]:
        values = (b, h, q, k) if self.of_mask else (score, b, h, q, k)
        return dict(zip(self._inputs, values, strict=True))

    def _everywhere(self, wanted: Any, constants: tuple[Array, ...], sizes: Sizes) -> tuple[Array, str]:
        """A one-sided variable for all batch entries, heads and positions that it depends on: [*lanes, *axes]."""
        n, side, steps = len(sizes.batch), self._sides[wanted], self._needed(wanted, set())
        own = {v for step in steps for v in step.inputs if isinstance(v, _Name)} | {wanted}
        given = {v: c for v, c in zip(self._captured, constants, strict=True) if v in own}
        lanes = tuple(max((c.shape[i] for c in given.values()), default=1) for i in range(n))
        b = sizes.batch_index() if "b" in side else np.zeros((1,) * n, np.int32)
        lanes = np.broadcast_shapes(lanes, b.shape)

        def one(free: list[Array], b: Any, h: Any, position: Any) -> Array:
            env = self._held | dict(zip(given, free, strict=True))
            env |= self._indices(b, h, position, position, None)
            for step in steps:
                env.update(zip(step.outputs, _bind(step, [_read(env, v) for v in step.inputs]), strict=True))
            return jnp.asarray(_read(env, wanted))

        f, axes, arguments = one, "", [jnp.int32(0), jnp.int32(0)]
        if side & {"q", "k"}:
            axes = "t" if "q" in side else "s"
            arguments[1] = jnp.arange(sizes.query_length if "q" in side else sizes.key_length, dtype=jnp.int32)
            f = jax.vmap(f, in_axes=(None, None, None, 0))
        if "h" in side:
            axes = "h" + axes
            arguments[0] = jnp.arange(sizes.heads, dtype=jnp.int32)
            f = jax.vmap(f, in_axes=(None, None, 0, None))
        for axis in reversed(range(n)):
            mapped = [0 if c.shape[axis] > 1 else None for c in given.values()]
            f = jax.vmap(f, in_axes=(mapped, 0, None, None))
        free = [c.reshape(*(d for d in c.shape[:n] if d > 1), *c.shape[n:]) for c in given.values()]
        return f(free, jnp.broadcast_to(b, lanes), *arguments), axes

    def _on_tile(self, step: _Step, values: list[Any]) -> Any:
        """An elementwise operation on scalars, rows, columns and whole tiles, which broadcast together."""
        if step.name in _SAME:
            return values[0]
        kinds = [v.dtype for v in step.inputs]
        shape = np.broadcast_shapes(*(np.shape(v) for v in values))
        values = [_spread(v, kind, shape) for v, kind in zip(values, kinds, strict=True)]
        if step.name == "select_n" and kinds[1] == np.bool_ and len(values) == 3:  # no device selects booleans
            which, no, yes = values
            return (which & yes) | (opposite(which) & no)
        if step.name == "not" and kinds[0] == np.bool_:
            return opposite(values[0])
        parameters = step.equation.params | ({"sharding": None} if "sharding" in step.equation.params else {})
        return step.equation.primitive.bind(*values, **parameters)


def opposite(x: Array) -> Array:
    """Booleans, inverted as integers: not every device can otherwise."""
    return jnp.asarray(x).astype(jnp.int32) == 0


def _bind(step: _Step, values: list[Any]) -> list[Any]:
    primitive = step.equation.primitive
    made = primitive.bind(*values, **primitive.get_bind_params(step.equation.params))
    return list(made) if primitive.multiple_results else [made]


def _spread(value: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    """A value at the shape. Booleans travel as integers: no device spreads them."""
    if np.shape(value) == shape:
        return value
    if dtype == np.bool_:
        return jnp.broadcast_to(jnp.asarray(value).astype(jnp.int32), shape) != 0
    return jnp.broadcast_to(value, shape)


def _named(names: dict[Any, Any], v: Any) -> Any:
    aval: Any = v.aval
    return np.asarray(v.val, aval.dtype)[()] if isinstance(v, Literal) else names[v]


def _read(env: dict[Any, Any], v: Any) -> Any:
    return env[v] if isinstance(v, _Name) else v
