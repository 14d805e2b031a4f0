"""`Residual`: a function of scalar indices, taken apart for kernels on tiles. Traces nothing and knows no kernel.

What depends on the query alone, or on the key alone, and is more than arithmetic on indices (it reads captured arrays,
say) is computed outside for all queries, or keys: it is hoisted. What is left is elementwise, and runs on tiles.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from attnjax.core.functions import IndexFunction
from attnjax.core.operations import SAME, Captured, Name, Operation, Operations, typed
from attnjax.core.tiles import Sizes

Array = jax.Array

# Of these each kernel's own file says which its compiler lacks.
ELEMENTWISE = frozenset(
    "add sub mul div rem max min neg abs sign eq ne lt le gt ge and or not xor select_n convert_element_type exp exp2 "
    "log log1p expm1 tanh logistic sqrt rsqrt cbrt square pow integer_pow sin cos tan sinh cosh asin acos atan asinh "
    "acosh atanh atan2 erf erf_inv floor ceil round is_finite nextafter clamp clz population_count shift_left "
    "shift_right_logical shift_right_arithmetic stop_gradient add_any one_minus_square".split()
)
# One compiler or another lacks these: of the query alone, or the key alone, they are computed outside.
_RARE = frozenset("erf round asin acos atan sinh cosh asinh acosh atanh cbrt expm1".split())
# Functions with a derivative, or a way to be mapped, of their own: what they compute is in this parameter.
_CUSTOM = {"custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr", "custom_vmap_call": "call"}
_QUERY, _KEY = frozenset("bhq"), frozenset("bhk")


class NotSplittable(Exception):
    """Where query and key meet, the function does more than elementwise arithmetic."""


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
        self.of_mask = score is None
        self._program = function.program(None if score is None else np.dtype(score).name)
        self._hoisted = self._sort()
        self.count = len(self._hoisted)
        self._left = self._program.needed([self._program.out], set(self._hoisted))
        self.primitives = tuple(name for step in self._left for name in self._runs(step) if name not in SAME)

    def hoisted(
        self, constants: tuple[Array, ...], sizes: Sizes, counted: Sequence[Array | None] | None = None
    ) -> list[tuple[Array, str]]:
        """The hoisted arrays in operand form, and their axes.

        Args:
          constants: what was captured, in operand form.
          counted: for each, where it counts, in any shape of its size: its derivatives are exactly 0 elsewhere.
        """
        counted = counted or [None] * self.count
        return [self._everywhere(v, constants, sizes, c) for v, c in zip(self._hoisted, counted, strict=True)]

    def __call__(
        self, b: Any, h: Any, q: Any, k: Any, pieces: list[Any], score: Any, visible: Array | None = None
    ) -> Array:
        """The function on a tile; `pieces` are the tile's parts of what was hoisted.

        Args:
          visible: the pairs that count, of the tile's shape, where a derivative is formed. At others it is exactly 0.
        """
        env = self._indices(b, h, q, k, score)
        for v, piece in zip(self._hoisted, pieces, strict=True):
            env[v] = piece != 0 if v.dtype == np.bool_ and piece.dtype != np.bool_ else piece
        for step in self._left:
            values = [_read(env, v) for v in step.inputs]
            if visible is not None:
                values = self._program.guarded(step, values, _Pairs(visible))
            env[step.outputs[0]] = self._on_tile(step, values, visible is not None)
        return jnp.asarray(_read(env, self._program.out))

    def _sort(self) -> list[Any]:
        """The names to hoist: those of one side, more than arithmetic, that are used by both sides."""
        program = self._program
        depends, heavy = program.depends, dict.fromkeys(program.depends, False)
        heavy |= dict.fromkeys(program.captured, True)
        for step in program.steps:
            work = any(heavy[v] for v in step.inputs if isinstance(v, Name))
            heavy |= dict.fromkeys(step.outputs, work or step.name not in (*(ELEMENTWISE - _RARE), *SAME))
        one_sided = lambda v: depends[v] <= _QUERY or depends[v] <= _KEY
        met = [v for step in program.steps if not one_sided(step.outputs[0]) for v in step.inputs]
        used = [v for v in dict.fromkeys((*met, program.out)) if isinstance(v, Name)]
        return [v for v in used if heavy[v] and one_sided(v)]

    def _runs(self, step: Operation) -> list[str]:
        """The primitives that an operation runs on a tile.

        Raises:
          NotSplittable: it is not elementwise.
        """
        if step.name in (*ELEMENTWISE, *SAME):
            return [step.name]
        if step.name in _CUSTOM and len(step.outputs) == 1:
            inner = _inner(step)
            return [name for one in inner.steps for name in self._runs(one)]
        arrays = [f"{np.dtype(v.dtype).name}{list(v.shape)}" for v in step.inputs if isinstance(v, Name) and v.shape]
        of = f", of an array {', '.join(arrays)}" if arrays else ""
        raise NotSplittable(f"{step.name} of query and key together{of}")

    def _indices(self, b: Any, h: Any, q: Any, k: Any, score: Any) -> dict[Any, Any]:
        values = (b, h, q, k) if self.of_mask else (score, b, h, q, k)
        return dict(zip(self._program.inputs, values, strict=True))

    def _everywhere(
        self, wanted: Any, constants: tuple[Array, ...], sizes: Sizes, counted: Array | None
    ) -> tuple[Array, str]:
        """A one-sided variable for all batch entries, heads and positions that it depends on: [*lanes, *axes]."""
        program = self._program
        n, side, steps = len(sizes.batch), program.depends[wanted], program.needed([wanted], set())
        own = {v for step in steps for v in step.inputs if isinstance(v, Name)} | {wanted}
        given = {v: constants[number] for v, number in program.captured.items() if v in own}
        lanes = tuple(max((c.shape[i] for c in given.values()), default=1) for i in range(n))
        b = sizes.batch_index() if "b" in side else np.zeros((1,) * n, np.int32)
        lanes = np.broadcast_shapes(lanes, b.shape)

        def one(free: list[Array], b: Any, h: Any, position: Any, counts: Any) -> Array:
            env = dict(zip(given, free, strict=True)) | self._indices(b, h, position, position, None)
            for step in steps:
                values = [_read(env, v) for v in step.inputs]
                if counts is not None:
                    values = program.guarded(step, values, _All(counts))
                env.update(zip(step.outputs, step.bind(values), strict=True))
            return jnp.asarray(_read(env, wanted))

        f: Any = one
        axes, arguments = "", [jnp.int32(0), jnp.int32(0)]
        if side & {"q", "k"}:
            axes = "t" if "q" in side else "s"
            arguments[1] = jnp.arange(sizes.query_length if "q" in side else sizes.key_length, dtype=jnp.int32)
            f = jax.vmap(f, in_axes=(None, None, None, 0, 0))
        if "h" in side:
            axes = "h" + axes
            arguments[0] = jnp.arange(sizes.heads, dtype=jnp.int32)
            f = jax.vmap(f, in_axes=(None, None, 0, None, 0))
        for axis in reversed(range(n)):
            mapped = [0 if c.shape[axis] > 1 else None for c in given.values()]
            f = jax.vmap(f, in_axes=(mapped, 0, None, None, 0))
        free = [c.reshape(*(d for d in c.shape[:n] if d > 1), *c.shape[n:]) for c in given.values()]
        lengths = {"h": sizes.heads, "t": sizes.query_length, "s": sizes.key_length}
        counts = None if counted is None else counted.reshape(*lanes, *(lengths[a] for a in axes))
        return f(free, jnp.broadcast_to(b, lanes), *arguments, counts), axes

    def _on_tile(self, step: Operation, values: list[Any], derived: bool) -> Any:
        """An elementwise operation on scalars, rows, columns and whole tiles, which broadcast together."""
        if step.name in SAME:
            return values[0]
        shape = np.broadcast_shapes(*(np.shape(v) for v in values))
        values = [_spread(v, x.dtype, shape) for v, x in zip(values, step.inputs, strict=True)]
        values = [typed(v, x, step) for v, x in zip(values, step.inputs, strict=True)]
        if step.name in _CUSTOM:
            if derived:  # its own rule, of scalars
                f = lambda *scalars: step.bind(scalars)[0]
                for _ in shape:
                    f = jax.vmap(f)
                return f(*values)
            return self._inside(_inner(step), values)
        if step.name == "select_n" and step.inputs[1].dtype == np.bool_ and len(values) == 3:
            which, no, yes = values  # no device selects booleans
            return (which & yes) | (opposite(which) & no)
        if step.name == "not" and step.inputs[0].dtype == np.bool_:
            return opposite(values[0])
        return step.primitive.bind(*values, **step.parameters)

    def _inside(self, program: Operations, values: list[Any]) -> Any:
        """The value of a custom function on a tile."""
        env: dict[Any, Any] = dict(zip(program.inputs, values, strict=True))
        for step in program.steps:
            env[step.outputs[0]] = self._on_tile(step, [_read(env, v) for v in step.inputs], False)
        return _read(env, program.out)


class _All(NamedTuple):
    """As `Visible` where all is said of one side."""

    counts: Array

    def to(self, letters: frozenset[str]) -> Array:
        return self.counts


class _Pairs(NamedTuple):
    """As `Visible` on a tile, where nothing of one side alone has a derivative."""

    pair: Array

    def to(self, letters: frozenset[str]) -> Array | None:
        return self.pair if "score" in letters or {"q", "k"} <= letters else None


def opposite(x: Array) -> Array:
    """Booleans, inverted as integers: not every device can otherwise."""
    return jnp.asarray(x).astype(jnp.int32) == 0


def _inner(step: Operation) -> Operations:
    """What a custom function computes."""
    closed = step.parameters[_CUSTOM[step.name]]
    return Operations(closed, Captured(), [str(n) for n in range(len(step.inputs))])


def _spread(value: Any, dtype: Any, shape: tuple[int, ...]) -> Any:
    """A value at the shape. Booleans travel as integers: no device spreads them."""
    if np.shape(value) == shape:
        return value
    if dtype == np.bool_:
        return jnp.broadcast_to(jnp.asarray(value).astype(jnp.int32), shape) != 0
    return jnp.broadcast_to(value, shape)


def _read(env: dict[Any, Any], v: Any) -> Any:
    return env[v] if isinstance(v, Name) else v
